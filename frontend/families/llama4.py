"""Llama 4's text model: input-scaled experts, layers without rotation, attention in chunks."""

from __future__ import annotations

from liquidc.frontend.families import common
from liquidc.frontend.families.common import Data, Family, llama_part
from liquidc.frontend.families.llama import IGNORED
from liquidc.frontend.families.tensors import Tensors, half_rotation, swapped
from liquidc.frontend.fields import Fields
from liquidc.ir.weights import WeightExpr


def read(f: Fields, t: Tensors) -> Data:
    """`Llama4TextConfig`."""
    del t
    data = llama_part(f)
    layers, width = data["num_hidden_layers"], data["intermediate_size"]
    chosen = f.optional_integers("moe_layers")
    if chosen is None:
        step = f.integer("interleave_moe_layer_step", least=1)
        chosen = list(range(step - 1, layers, step))
    f.skip(("interleave_moe_layer_step",))
    sparse = {*chosen} & {*range(layers)}
    moe = {
        "num_experts": f.integer("num_local_experts", least=1),
        "num_experts_per_tok": f.integer("num_experts_per_tok", least=1),
        "moe_intermediate_size": width,
        "layers": sorted(sparse),
        "score": "identity",
        "post": "sigmoid",
        "apply": "input",
        "shared_intermediate_size": width,
    }
    return {
        **data,
        "intermediate_size": f.integer("intermediate_size_mlp", least=1),
        "attention_bias": f.boolean("attention_bias"),
        "attention": _attention(f, layers, data["max_position_embeddings"]),
        "moe": moe if sparse else {},
    }


def _attention(f: Fields, layers: int, positions: int) -> Data:
    """Which layers rotate and see chunks, and how the others are tempered."""
    period = f.integer("no_rope_layer_interval", least=1)
    told = f.optional_integers("no_rope_layers")
    rotates = told or [int((i + 1) % period != 0) for i in range(layers)]
    f.refuse_if(len(rotates) < layers, "no_rope_layers", f"of {layers} layers")
    kinds = f.optional_choices("layer_types", layers, "chunked_attention", "full_attention")
    if kinds is None:
        chunked = [i for i in range(layers) if rotates[i]]
    else:
        chunked = [i for i, kind in enumerate(kinds) if kind == "chunked_attention"]
    chunk = f.optional_integer("attention_chunk_size")
    chunk = chunk if chunked and chunk is not None and chunk < positions else None
    tempered = bool(f.get("attn_temperature_tuning"))
    floor = f.integer("floor_scale", least=1)
    scale = f.number("attn_scale", least=0.0)
    return {
        "no_rope_layers": [i for i in range(layers) if not rotates[i]],
        "chunk_size": chunk,
        "chunk_layers": chunked if chunk else None,
        "l2_norm": f.boolean("use_qk_norm"),
        "temperature_floor": floor if tempered else 0,
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
    {
        **common.LLAMA,
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "layer_types": None,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    section="text_config",
    prefixes=("language_model.", ""),
    ignored=(*IGNORED, r"vision_model\..*", r"multi_modal_projector\..*"),
)
