"""FlexiDepth (arXiv 2503.23798): gates and adapters over Llama or Qwen3.

Released as `ddllama`; the port to Qwen3 decides without scaling either branch (`router_gate_mode`
"ste_hard"). The code that comes with the checkpoints is not run.
"""

from __future__ import annotations

from liquidc.frontend.families import llama, qwen3
from liquidc.frontend.families.common import Data, Family
from liquidc.frontend.families.tensors import Tensors
from liquidc.frontend.fields import Fields
from liquidc.ir.types import DType
from liquidc.ir.weight_maths import Product
from liquidc.ir.weights import WeightExpr, cast

NAMES = {
    "depth_gate.proj1.weight": "router.router_enc.weight",
    "depth_gate.norm.weight": "router.router_norm.weight",
    "depth_adapter.gate_proj.weight": "router_proj.gate_proj.weight",
    "depth_adapter.up_proj.weight": "router_proj.down_proj.weight",
    "depth_adapter.down_proj.weight": "router_proj.up_proj.weight",
}
"""Our names and theirs, in which up and down of the adapter are exchanged."""


def read_llama(f: Fields, t: Tensors) -> Data:
    """`ddllama`."""
    return {**llama.read_llama(f, t), "depth_gate": _gate(f, t)}


def read_qwen3(f: Fields, t: Tensors) -> Data:
    """`ddqwen3`."""
    return {**qwen3.read(f, t), "depth_gate": _gate(f, t)}


def _gate(f: Fields, t: Tensors) -> Data:
    """The gates: their layers are those that have a router."""
    hidden, width = f.integer("hidden_size", least=1), f.integer("intermediate_size", least=1)
    factor = f.integer("router_reduction_factor", 16, least=1)
    adapter = f.integer("proj_reduction_factor", factor, least=1)
    layers = t.numbers(r"model\.layers\.(\d+)\.router\.router_enc\.weight")
    told = f.get("routing_layers", None)
    given = list(layers) if told is None else told
    f.refuse_if(
        given != list(layers), "routing_layers", f"{list(layers)}, the layers that have a router"
    )
    biased = t.numbers(r"model\.layers\.(\d+)\.router\.router_head\.bias")
    f.refuse_if(bool(biased), "router_head_bias_init", "absent: heads of routers have no bias here")
    f.skip(("router_head_bias_init", "router_force_mode"))
    scaled = f.choice("router_gate_mode", "prob", "ste", "ste_hard") != "ste_hard"
    return {
        "layers": list(layers),
        "input": "post_norm",
        "router_type": "bottleneck",
        "router_hidden_size": max(1, hidden // factor),
        "router_act": "tanh",
        "exec_scale": "prob" if scaled else "none",
        "scale_target": "ffn",
        "skip_path": "adapter",
        "adapter_intermediate_size": max(1, width // adapter),
        "skip_scale": "one_minus_prob" if scaled else "one",
        "kv_policy": "own",
    }


def weight(name: str, t: Tensors, data: Data) -> WeightExpr | None:
    """Two products without anything between them are one: dec and head of the router."""
    del data
    layer, part, rest = name.rpartition(".depth_")
    if not part:
        return None
    rest = "depth_" + rest
    if rest == "depth_gate.proj2.weight":
        head, dec = (
            cast(t[f"{layer}.router.router_{n}.weight"], DType.F32) for n in ("head", "dec")
        )
        return Product(head, dec)
    return t[f"{layer}.{NAMES[rest]}"]


DD_LLAMA = Family(
    ("ddllama",), read_llama, weight, llama.DEFAULTS, custom_code=True, ignored=llama.IGNORED
)
DD_QWEN3 = Family(
    ("ddqwen3",), read_qwen3, weight, qwen3.DEFAULTS, custom_code=True, ignored=llama.IGNORED
)
