"""The semantic operators: what a tracer must see whole.

Each has a reference (plain, differentiable torch; the definition of its meaning) and a custom
operator `torch.ops.liquid.<name>` with the same arguments, which `torch.export` keeps as one call.
Sizes: B rows of T tokens, H query heads and KV key/value heads of width hd, S cache slots,
E experts of which a token uses k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Expert:
    """The body that experts share: function(x [N, D], *one expert's params) -> [N, D].

    `name` is its module and name, the same in every process.
    """

    name: str
    function: Callable[..., Tensor]

    def __call__(self, x: Tensor, *params: Tensor) -> Tensor:
        """Run it on rows x [N, D]."""
        return self.function(x, *params)


def at_least_float32(x: Tensor) -> Tensor:
    """X itself in float32 and float64 (no cast is traced), else a float32 copy."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding (Su et al. 2021) of x [..., H, hd] at positions i64[...], half rotation.

    Component i < hd/2 is rotated with component i + hd/2 by `position · theta^(-2i/hd)`; angle,
    sine and cosine are float32 (float64 where x is).
    """
    half = x.shape[-1] // 2
    wide = at_least_float32(x)
    rates = [theta ** (-i / half) for i in range(half)]
    angle = positions.unsqueeze(-1) * torch.tensor(rates, dtype=wide.dtype, device=x.device)
    cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def append(cache: Tensor, new: Tensor, length: Tensor, mask: Tensor) -> Tensor:
    """The cache [B, KV, S, hd] with the tokens of `new` [B, T, KV, hd] where mask bool[B, T] holds.

    Those of row b go, in order, to slots length[b], length[b] + 1, …; other slots stay.
    """
    row, token = mask.nonzero(as_tuple=True)
    slot = (length.unsqueeze(1) + mask.cumsum(1) - 1)[row, token]
    written = cache.clone()
    written[row, :, slot] = new[row, token]
    return written


def attend(q: Tensor, key: Tensor, value: Tensor, limit: Tensor, scale: float) -> Tensor:
    """Softmax attention of q [B, T, H, hd] over a cache: key, value [B, KV, S, hd].

    Query (b, t) sees the slots j < limit[b, t] and is 0 where that is none. Query head h reads
    key/value head h · KV // H.
    """
    seen = torch.arange(key.shape[2], device=q.device) < limit.unsqueeze(-1)
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2), key, value, seen.unsqueeze(1), scale=scale, enable_gqa=True
    )
    return torch.where((limit > 0)[..., None, None], mixed.transpose(1, 2), 0.0)


def depth_gate(
    score: Tensor,
    valid: Tensor,
    positions: Tensor,
    force: Tensor,
    bias: Tensor,
    min_depth: Tensor,
    executed: Tensor,
    threshold: float,
    compare: str,
    reserved: int,
    remaining: int,
) -> tuple[Tensor, Tensor]:
    """Which tokens run: (mask bool[B, T], p f32[B, T]); model spec 5.1 and its depth controls.

    score f32[B, T]; valid bool[B, T]; positions i64[B, T]; force i8 scalar; bias f32[B];
    min_depth i64[B]; executed i64[B, T] counts the layers the token has run. From the weakest to
    the strongest: the router decides by sigmoid(score + bias) against the threshold ("gt": above,
    "ge": at or above); a token runs when the layers that remain, this one included, are no more
    than min_depth - executed; positions under `reserved` run; force 1 runs, -1 skips; a token
    that is not valid skips. p = sigmoid(score), without the bias.
    """
    biased = torch.sigmoid(score + bias.unsqueeze(1))
    run = biased >= threshold if compare == "ge" else biased > threshold
    run = run | (remaining <= min_depth.unsqueeze(1) - executed) | (positions < reserved)
    run = torch.where(force == 0, run, force > 0)
    return run & valid, torch.sigmoid(score)


def route(
    logits: Tensor,
    mask: Tensor,
    selection_bias: Tensor | None,
    k: int,
    score: str,
    post: str,
    renorm_eps: float,
    n_group: int,
    topk_group: int,
    group_score: str,
    group_fill: str,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The experts of each token: (index i64[..., k], weight f32[..., k]); model spec 2.1.

    logits f32[..., E]; a token where mask bool[...] is false gets index -1 and weight 0. Equal
    scores: the lowest index wins.
    """
    logits = at_least_float32(logits)
    scores = router_scores(logits, score)
    chosen_by = scores if selection_bias is None else scores + selection_bias
    if n_group > 1:
        chosen_by = _limit_groups(chosen_by, n_group, topk_group, group_score, group_fill)
    index = _top(chosen_by, k)
    weight = scores.gather(-1, index)
    if post == "renorm":
        weight = weight / (weight.sum(-1, keepdim=True) + renorm_eps)
    elif post == "softmax_k":
        weight = weight.softmax(-1)
    elif post == "sigmoid":
        weight = weight.sigmoid()
    shown = mask.unsqueeze(-1)
    return torch.where(shown, index, -1), torch.where(shown, weight * scaling, 0.0)


def router_scores(logits: Tensor, score: str) -> Tensor:
    """Scores of the experts from logits f32[..., E]: softmax, sigmoid or identity."""
    if score == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if score == "sigmoid" else logits


def _top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last dimension; the lowest index wins a tie."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _limit_groups(scores: Tensor, groups: int, keep: int, how: str, fill: str) -> Tensor:
    """Scores with all but the best `keep` groups of neighbouring experts filled."""
    grouped = scores.unflatten(-1, (groups, -1))
    best = grouped.amax(-1) if how == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, _top(best, keep), True)
    filled = grouped.masked_fill(~kept.unsqueeze(-1), 0.0 if fill == "zero" else -torch.inf)
    return filled.flatten(-2)


def dispatch(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    body: Expert,
    params: Sequence[Sequence[Tensor]],
    apply: str,
) -> Tensor:
    """Σ over slots of weight · body(x), shape of x; only experts that a token chose run.

    x [..., D]; index i64[..., k], -1 = no expert; weight f32[..., k]; `params` holds the tensors
    of each expert. With apply "input" the weight multiplies the expert's input instead.
    """
    slots = index.shape[-1]
    flat = x.reshape(-1, x.shape[-1])
    order = index.reshape(-1).sort(stable=True)
    counts = torch.bincount(order.values + 1, minlength=len(params) + 1).tolist()
    order = order.indices[counts[0] :]
    if not len(order):
        return torch.zeros_like(x)
    token = order // slots
    factor = weight.reshape(-1)[order].unsqueeze(-1).to(x.dtype)
    rows = flat.index_select(0, token)
    rows = rows * factor if apply == "input" else rows
    parts = [
        body(part, *mine)
        for part, mine in zip(rows.split(counts[1:]), params, strict=True)
        if len(part)
    ]
    result = torch.cat(parts)
    result = result if apply == "input" else result * factor
    return torch.zeros_like(flat).index_add(0, token, result).view_as(x)


EXPERTS: dict[str, Expert] = {}
"""The expert bodies by name."""


def expert(function: Callable[..., Tensor]) -> Expert:
    """Decorator: make a plain function the body of experts (see `protocol.dispatch`).

    Raises:
        TypeError: it is a closure, or another one has its name.
    """
    code = getattr(function, "__code__", None)
    if code is None or function.__closure__ is not None:
        raise TypeError(f"the expert body {function!r} must be a plain function without a closure")
    name = f"{function.__module__}.{function.__qualname__}"
    if name in EXPERTS and EXPERTS[name].function.__code__ != code:
        raise TypeError(f"two expert bodies are named {name}")
    return EXPERTS.setdefault(name, Expert(name, function))


def site_name(body: Expert, width: int) -> str:
    """The `site` of the custom operator `dispatch`: `<body>:<width>`.

    Its params are the `width` tensors of each expert, expert after expert; with width 0 they are
    stacked tensors [E, ...].
    """
    return f"{body.name}:{width}"


def open_site(site: str, params: Sequence[Tensor]) -> tuple[Expert, list[tuple[Tensor, ...]]]:
    """The body that a `site` names, and the operator's params by expert."""
    name, _, width = site.rpartition(":")
    return EXPERTS[name], by_expert(params, int(width))


def by_expert(params: Sequence[Tensor], width: int) -> list[tuple[Tensor, ...]]:
    """Stacked tensors (width 0), or `width` tensors for each expert in a row: by expert."""
    if width == 0:
        return list(zip(*(p.unbind(0) for p in params), strict=True))
    return [tuple(params[i : i + width]) for i in range(0, len(params), width)]


def _dispatch_op(
    x: Tensor, index: Tensor, weight: Tensor, params: list[Tensor], site: str, apply: str
) -> Tensor:
    body, mine = open_site(site, params)
    return dispatch(x, index, weight, body, mine, apply)


def _define(name: str, schema: str, reference: Any, fake: Any) -> None:
    define = cast("Any", torch.library.custom_op)
    operator = define(f"liquid::{name}", reference, mutates_args=(), schema=schema)
    operator.register_fake(fake)


def _as_first(first: Tensor, *_: object) -> Tensor:
    return torch.empty_like(first)


def _as_gate(score: Tensor, valid: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(valid), torch.empty_like(score)


def _as_route(
    logits: Tensor, mask: Tensor, bias: Tensor | None, k: int, *_: object
) -> tuple[Tensor, Tensor]:
    chosen = logits[..., :k]
    return torch.empty_like(chosen, dtype=torch.int64), torch.empty_like(chosen)


_define("rope", "(Tensor x, Tensor positions, float theta) -> Tensor", rope, _as_first)
_define(
    "append", "(Tensor cache, Tensor new, Tensor length, Tensor mask) -> Tensor", append, _as_first
)
_define(
    "attend",
    "(Tensor q, Tensor key, Tensor value, Tensor limit, float scale) -> Tensor",
    attend,
    _as_first,
)
_define(
    "depth_gate",
    "(Tensor score, Tensor valid, Tensor positions, Tensor force, Tensor bias, Tensor min_depth, "
    "Tensor executed, float threshold, str compare, int reserved, int remaining) "
    "-> (Tensor, Tensor)",
    depth_gate,
    _as_gate,
)
_define(
    "route",
    "(Tensor logits, Tensor mask, Tensor? selection_bias, int k, str score, str post, "
    "float renorm_eps, int n_group, int topk_group, str group_score, str group_fill, "
    "float scaling) -> (Tensor, Tensor)",
    route,
    _as_route,
)
_define(
    "dispatch",
    "(Tensor x, Tensor index, Tensor weight, Tensor[] params, str site, str apply) -> Tensor",
    _dispatch_op,
    _as_first,
)
