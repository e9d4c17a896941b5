"""Llama 4's text model: input-scaled experts, layers without rotation, attention in chunks."""

from __future__ import annotations

from liquidc.frontend.families.common import Data, Family, llama_part
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.tensors import Tensors, half_rotation, swapped
from liquidc.frontend.fields import Fields
from liquidc.ir.weights import WeightExpr


def read(f: Fields, t: Tensors) -> Data:
    """`Llama4TextConfig`."""
    del t
    data = llama_part(f, theta=500000.0, eps=1e-5)
    layers = data["num_hidden_layers"]
    width, dense = data["intermediate_size"], f.integer("intermediate_size_mlp", 16384, least=1)
    step = f.integer("interleave_moe_layer_step", 1, least=0)
    sparse = f.get("moe_layers", None)
    moe: Data = {}
    if sparse is None:
        sparse = list(range(step - 1, layers, step)) if step else []
    if sparse:
        moe = {
            "num_experts": f.integer("num_local_experts", 16, least=1),
            "num_experts_per_tok": f.integer("num_experts_per_tok", 1, least=1),
            "moe_intermediate_size": width,
            "layers": sparse,
            "score": "identity",
            "post": "sigmoid",
            "apply": "input",
            "shared_intermediate_size": width,
        }
    data["head_dim"] = data["head_dim"] or 128
    attention = _attention(f, layers, data["max_position_embeddings"])
    biased = f.boolean("attention_bias", False)
    return {
        **data,
        "intermediate_size": dense,
        "attention_bias": biased,
        "attention": attention,
        "moe": moe,
    }


def _attention(f: Fields, layers: int, positions: int) -> Data:
    """Which layers rotate and see chunks, and how the others are tempered."""
    period = f.integer("no_rope_layer_interval", 4, least=1)
    told = f.get("no_rope_layers", None) != [] and f.optional_list("no_rope_layers", layers, 0, 1)
    rotates = told or [int((i + 1) % period != 0) for i in range(layers)]
    still = [i for i, turns in enumerate(rotates) if not turns]
    kinds = f.get("layer_types", None)
    expected = ["chunked_attention" if turns else "full_attention" for turns in rotates]
    f.refuse_if(kinds not in (None, expected), "layer_types", f"{expected}, as no_rope_layers")
    chunk = f.optional_integer("attention_chunk_size")
    tempered = bool(f.get("attn_temperature_tuning", True))
    floor = f.number("floor_scale", 8192, above=0.0)
    scale = f.number("attn_scale", 0.1, least=0.0)
    f.refuse_if(tempered and floor != int(floor), "floor_scale", "a whole number")
    return {
        "no_rope_layers": still,
        "chunk_size": chunk if chunk is not None and chunk < positions else None,
        "l2_norm": f.boolean("use_qk_norm", True),
        "temperature_floor": int(floor) if tempered else 0,
        "temperature_scale": scale if tempered else 0.0,
    }


def weight(name: str, t: Tensors, data: Data) -> WeightExpr | None:
    """`feed_forward`, experts [E, in, out], and rotation in pairs side by side."""
    if name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        layer = int(name.split(".")[2])
        rotates = layer not in data["attention"]["no_rope_layers"]
        return half_rotation(t[name], data["head_dim"]) if rotates else None
    layer, part, rest = name.partition(".mlp.")
    if not part:
        return None
    prefix = f"{layer}.feed_forward."
    match rest:
        case "gate.weight":
            return t[prefix + "router.weight"]
        case "experts.gate_up_proj" | "experts.down_proj":
            return swapped(t[prefix + rest])
        case _:
            return t[prefix + rest]


LLAMA4 = Family(
    ("llama4_text", "llama4"),
    read,
    weight,
    prefixes=("language_model.", ""),
    ignored=(*IGNORED, r"vision_model\..*", r"multi_modal_projector\..*"),
)
