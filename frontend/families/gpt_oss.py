"""GPT-OSS: sinks, every other layer slides, experts with biases and a clamped activation.

The released checkpoints hold experts as MXFP4: two codes of four bits in a byte, and an exponent
for 32 of them. Gate and up rows alternate.
"""

from __future__ import annotations

from liquidc.frontend.families import common
from liquidc.frontend.families.common import Data, Family, llama_part, sliding, sliding_kinds
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.tensors import Tensors, apart, swapped
from liquidc.frontend.fields import Fields
from liquidc.ir.mxfp4 import Mxfp4
from liquidc.ir.weights import WeightExpr

LIMIT, STEEPNESS = 7.0, 1.702
"""Of the clamped activation, as `frontend.moe` has it."""
RULE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The default of `rope_parameters`."""


def read(f: Fields, t: Tensors) -> Data:
    """`GptOssConfig`."""
    del t
    told = f.get("quantization_config", None)
    if told is not None:
        inner = Fields("quantization_config.", told)
        inner.skip(("modules_to_not_convert", "dequantize"))
        inner.require("quant_method", "mxfp4")
        inner.finish()
    f.only("swiglu_limit", LIMIT)
    f.only("swiglu_alpha", STEEPNESS)
    f.skip(("experts_per_token", "initial_context_length", "hidden_act"))
    data = llama_part(f, act=False, quantised=True, rule=RULE)
    window = f.optional_integer("sliding_window")
    slides = sliding_kinds(f, data, range(0, data["num_hidden_layers"], 2))
    f.refuse_if(bool(slides) and window is None, "sliding_window", "given, since layers slide")
    moe = {
        "num_experts": f.integer("num_local_experts", least=1),
        "num_experts_per_tok": f.integer("num_experts_per_tok", least=1),
        "score": "identity",
        "post": "softmax_k",
        "router_bias": True,
        "expert_act": "clamped_glu",
        "expert_bias": True,
    }
    return {
        **data,
        "attention_bias": f.boolean("attention_bias"),
        "attention": {**sliding(data, window, slides), "sinks": True},
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


GPT_OSS = Family(
    ("gpt_oss",),
    read,
    weight,
    {
        **common.LLAMA,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    aliases={"num_experts": "num_local_experts"},
    ignored=IGNORED,
)
