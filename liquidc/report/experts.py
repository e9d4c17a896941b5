"""The report's section about experts: load and pairs, layer by layer."""

from __future__ import annotations

from typing import Any

from liquidc.report.parts import columns, escape, heat_map, no_profile, number, tag

Data = dict[str, Any]


def experts_section(data: Data) -> str:
    """A card for each layer."""
    if not data["model"]["experts"]:
        return tag("p", "The model has no experts: its feed-forward layers are dense.", cls="dim")
    if not data["profile"]:
        return no_profile("Which experts tokens use is not known")
    cards = [_card(index, layer) for index, layer in enumerate(data["experts"])]
    ordered = any("order" in layer for layer in data["experts"])
    note = (
        "Upright bars: tokens by expert, in the model's order. Squares: the stronger, the more "
        "tokens used both experts"
    )
    note += (
        "; on the right in the order that order-experts chose, so that pairs lie in one group, "
        "which is framed."
        if ordered
        else ". The pass order-experts lays those that are used together side by side."
    )
    return tag("p", note) + tag("div", "\n".join(cards), cls="cards")


def _card(index: int, layer: Data) -> str:
    load, tokens = layer["load"], layer["tokens"]
    title = tag("h3", f"layer {layer['layer']}")
    if not tokens:
        return tag(
            "div", title + tag("p", "No token of the profile ran it.", cls="dim"), cls="card"
        )
    mean = sum(load) / len(load)
    told = [f"{tokens:,} tokens, {layer['per_token']} of {len(load)} experts each"]
    if layer["identity"]:
        told.append(f"the last {layer['identity']} give back their input and cost nothing")
    told.append(f"the most used has {number(max(load) / mean)} times the mean")
    if layer["entropy_bits"] is not None:
        told.append(f"router entropy {layer['entropy_bits']:.2f} bits")
    if layer["removed"]:
        told.append("removed: " + ", ".join(map(str, layer["removed"])))
    titles = [f"expert {number}: {count:,} tokens" for number, count in enumerate(load)]
    parts = [title, tag("p", escape("; ".join(told)), cls="dim"), columns(load, titles)]
    maps = [_map(layer, "together", index, "as in the model")]
    if "order" in layer:
        groups = layer["groups_per_token"]
        caption = (
            f"ordered: a token's experts lie in {groups['after']:.2f} groups, before "
            f"{groups['before']:.2f}"
        )
        maps.append(_map(layer, "together_ordered", index, caption))
    parts.append(tag("div", "".join(maps), cls="pair"))
    return tag("div", "".join(parts), cls="card")


def _map(layer: Data, key: str, index: int, caption: str) -> str:
    name = f"pairs of experts in layer {layer['layer']}, {caption}"
    block = layer.get("group_size", 0) / layer["per_cell"]
    drawn = heat_map(layer[key], name, block, data_key=key, data_index=index)
    return tag("figure", drawn + tag("figcaption", escape(caption)))
