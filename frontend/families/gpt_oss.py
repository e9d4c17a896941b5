"""GPT-OSS: sinks, every other layer slides, experts with biases and a clamped activation.

The released checkpoints hold experts as MXFP4: two codes of four bits in a byte, and an exponent
for 32 of them. Gate and up rows alternate.
"""

from __future__ import annotations

from liquidc.frontend.families.common import Data, Family, llama_part, sliding
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.tensors import Tensors, apart, swapped
from liquidc.frontend.fields import Fields
from liquidc.ir.mxfp4 import Mxfp4
from liquidc.ir.weights import WeightExpr


def read(f: Fields, t: Tensors) -> Data:
    """`GptOssConfig`."""
    del t
    told = f.get("quantization_config", None)
    if told is not None:
        inner = Fields("quantization_config.", told)
        inner.skip(("modules_to_not_convert", "dequantize"))
        inner.require("quant_method", "mxfp4")
        inner.finish()
    f.only("swiglu_limit", 7.0)
    f.only("swiglu_alpha", 1.702)
    f.skip(("experts_per_token", "initial_context_length"))
    data = llama_part(f, theta=150000.0, eps=1e-5, quantised=True)
    moe = {
        "num_experts": f.integer("num_local_experts", 128, least=1),
        "num_experts_per_tok": f.integer("num_experts_per_tok", 4, least=1),
        "score": "identity",
        "post": "softmax_k",
        "router_bias": True,
        "expert_act": "clamped_glu",
        "expert_bias": True,
    }
    return {
        **data,
        "head_dim": data["head_dim"] or 64,
        "attention_bias": f.boolean("attention_bias", True),
        "attention": {**sliding(f, data), "sinks": True},
        "moe": moe,
    }


def weight(name: str, t: Tensors, data: Data) -> WeightExpr | None:
    """The router, and experts as bf16 or MXFP4, gate rows first."""
    del data
    layer, _, rest = name.partition(".mlp.")
    prefix = f"{layer}.mlp."
    match rest:
        case "gate.weight" | "gate.bias":
            return t[prefix + "router." + rest.removeprefix("gate.")]
        case "experts.gate_up_proj":
            return apart(_expert(t, prefix + rest), 1)
        case "experts.gate_up_proj_bias":
            return apart(t[prefix + rest], 1)
        case "experts.down_proj":
            return _expert(t, prefix + rest)
        case _:
            return None


def _expert(t: Tensors, name: str) -> WeightExpr:
    """[E, out, in] of bf16 [E, in, out], or of blocks, which are the other way round."""
    if name in t:
        return swapped(t[name])
    return Mxfp4(t[f"{name}_blocks"], t[f"{name}_scales"])


GPT_OSS = Family(("gpt_oss",), read, weight, ignored=IGNORED)
