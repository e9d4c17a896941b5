"""What the ops of `ops.liquid` and `ops.cache` compute, as plain functions on torch tensors.

These are the definitions: the reference model's custom ops and the interpreter share them. They
are differentiable where that has a meaning, and work in any floating dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from liquidc.ir.rotary import Scaling, rates

Tensor = torch.Tensor


def rope(x: Tensor, positions: Tensor, theta: float, scaling: str = "") -> Tensor:
    """Rotary embedding (Su et al. 2021) of x [..., H, hd] at positions i64[...], half rotation.

    Component i < hd/2 is rotated with component i + hd/2 by `position · theta^(-2i/hd)`, changed as
    `scaling` says; angle, sine and cosine are float32 (float64 where x is).
    """
    rule = Scaling.read(scaling)
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    angle = positions.unsqueeze(-1) * rates(theta, x.shape[-1] // 2, rule, wide.dtype).to(x.device)
    cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
    if rule is not None:
        cos, sin = cos * rule.amplitude, sin * rule.amplitude
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


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
    p = torch.sigmoid(score)
    decided = torch.sigmoid(score + bias[:, None])
    mask = decided >= threshold if compare == "ge" else decided > threshold
    mask = mask | (min_depth[:, None] - executed >= remaining) | (positions < reserved)
    mask = torch.where(force == 0, mask, (force > 0).expand_as(mask))
    return mask & valid, p


def fixed_gate(valid: Tensor, run: bool) -> tuple[Tensor, Tensor]:
    """A gate that was decided at compile time: (mask bool[B, T], p f32[B, T])."""
    mask = valid if run else torch.zeros_like(valid)
    return mask, torch.full(valid.shape, float(run))


def append(
    cache: Tensor, new: Tensor, length: Tensor, mask: Tensor, scale: Tensor | None = None
) -> Tensor:
    """The cache [B, KV, S, hd] with the tokens of `new` [B, T, KV, hd] where mask bool[B, T] holds.

    Those of row b go, in order, to slots length[b], length[b] + 1, …; other slots stay. With scale
    f32[KV, hd] the cache holds codes i8.
    """
    slots = cache.shape[2]
    if scale is not None:
        new = cache_codes(new, scale)
    rank = torch.cumsum(mask.to(torch.int64), 1) - 1
    # Tokens that are not written go to one slot beyond the end, which is cut off again.
    target = torch.where(mask, length[:, None] + rank, slots)
    wide = torch.cat([cache, cache[:, :, :1]], 2)
    index = target[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
    return wide.scatter(2, index, new.transpose(1, 2))[:, :, :slots]


def cache_codes(x: Tensor, scale: Tensor) -> Tensor:
    """The multiples of scale f32[KV, hd] nearest to x f32[..., KV, hd], i8; ties go to even.

    What lies beyond the codes gets the nearest of them. ONNX Runtime's GroupQueryAttention rounds
    so (`k_quant_type` PER_CHANNEL). NaN becomes 0.
    """
    return (x / scale).round().nan_to_num(0.0).clamp(-128, 127).to(torch.int8)


def attend(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    limit: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
) -> Tensor:
    """Q [B, T, H, hd] over slots j < limit[b, t] of key, value [B, KV, S, hd]; 0 without any.

    Keys and values that are codes have their scales f32[KV, hd]. See `ops.Attend` for the rest.
    """
    if key_scale is not None and value_scale is not None:
        key, value = key * key_scale[:, None], value * value_scale[:, None]
    groups = q.shape[2] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    visible = seen(key.shape[2], limit, window, chunk).unsqueeze(1)
    # Slots beyond the limit may hold anything, NaN included: neither may reach a product.
    used = visible.any(2)[..., None]
    key, value = (torch.where(used, x, torch.zeros_like(x)) for x in (key, value))
    scores = (q.transpose(1, 2) @ key.transpose(2, 3)) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    if sink is not None:
        column = sink[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column.to(scores.dtype)), -1)
    share = torch.softmax(scores, -1)[..., : key.shape[2]].masked_fill(~visible, 0.0)
    return (share @ value).transpose(1, 2)


def seen(slots: int, limit: Tensor, window: int = 0, chunk: int = 0) -> Tensor:
    """Which slots the queries of limit i64[...] see, bool[..., slots]."""
    slot, end = torch.arange(slots, device=limit.device), limit.unsqueeze(-1)
    visible = slot < end
    if window:
        visible = visible & (slot >= end - window)
    if chunk:
        visible = visible & (slot >= (end - 1).div(chunk, rounding_mode="floor") * chunk)
    return visible


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
    scores = router_scores(logits, score)
    chosen = scores if selection_bias is None else scores + selection_bias
    if n_group > 1:
        chosen = _limit_groups(chosen, n_group, topk_group, group_score, group_fill)
    # A stable descending sort makes the lowest index win a tie; torch.topk promises no order.
    index = torch.sort(chosen, dim=-1, descending=True, stable=True).indices[..., :k]
    weight = scores.gather(-1, index)
    match post:
        case "renorm":
            weight = weight / (weight.sum(-1, keepdim=True) + renorm_eps)
        case "softmax_k":
            weight = torch.softmax(weight, -1)
        case "sigmoid":
            weight = torch.sigmoid(weight)
        case _:
            pass
    weight = weight * scaling
    seen = mask[..., None]
    return torch.where(seen, index, -1), torch.where(seen, weight, 0.0)


def router_scores(logits: Tensor, score: str) -> Tensor:
    """Scores of the experts from logits f32[..., E]: softmax, sigmoid or identity."""
    if score == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if score == "sigmoid" else logits


def _limit_groups(
    scores: Tensor, n_group: int, topk_group: int, group_score: str, group_fill: str
) -> Tensor:
    """Keep the scores of the best `topk_group` of `n_group` equal groups (DeepSeek-V2/V3)."""
    grouped = scores.unflatten(-1, (n_group, -1))
    if group_score == "top2sum":
        rank = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
    else:
        rank = grouped.amax(-1)
    best = torch.sort(rank, dim=-1, descending=True, stable=True).indices[..., :topk_group]
    kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)
    fill = 0.0 if group_fill == "zero" else float("-inf")
    return grouped.masked_fill(~kept[..., None], fill).flatten(-2)


def renumber(index: Tensor, table: Sequence[int]) -> Tensor:
    """`table[index]`; a negative number stays."""
    numbers = torch.tensor(table, device=index.device)
    return torch.where(index < 0, index, numbers[index.clamp_min(0)])


def expert_mask(index: Tensor, expert: int) -> Tensor:
    """Tokens that use the expert: bool[...]."""
    return (index == expert).any(-1)


def expert_weight(index: Tensor, weight: Tensor, expert: int) -> Tensor:
    """The weight that each token gives the expert, 0 if none: [...]."""
    return torch.where(index == expert, weight, 0.0).sum(-1)


def map_experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    count: int,
    body: Callable[[Tensor, int], Tensor],
    apply: str,
) -> Tensor:
    """`Σ_slots weight · body(x, expert)`, each expert once over the tokens that use it.

    Args:
        x: [..., D].
        index: i64[..., k], -1 for none.
        weight: [..., k].
        count: number of experts.
        body: tokens [n, D] and an expert's number to [n, D'].
        apply: "output", or "input" when the weight multiplies x.
    """
    tokens, chosen = x.reshape(-1, x.shape[-1]), index.reshape(-1, index.shape[-1])
    shares = weight.reshape(chosen.shape).to(x.dtype)
    total: Tensor | None = None
    for expert in range(count):
        where, slot = (chosen == expert).nonzero(as_tuple=True)
        if where.numel() == 0:
            continue
        share = shares[where, slot][:, None]
        inputs = tokens[where]
        out = body(inputs * share, expert) if apply == "input" else body(inputs, expert) * share
        if total is None:
            total = out.new_zeros(tokens.shape[0], out.shape[-1])
        total = total.index_add(0, where, out)
    if total is None:
        total = body(tokens[:0], 0).new_zeros(tokens.shape[0], tokens.shape[1])
    return total.reshape(*x.shape[:-1], total.shape[-1])


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """X [B, T, ...] at `index` [B, P]: [B, P, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def rows(mask: Tensor) -> Tensor:
    """The true places of `mask` [B, T] as b · T + t: i64[N]."""
    return mask.reshape(-1).nonzero(as_tuple=True)[0]


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens of x [B, T, ...]: [N, ...]."""
    return x.flatten(0, 1)[rows]


def scatter_rows(base: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """`base` [B, T, ...] with the tokens `rows` replaced."""
    return base.flatten(0, 1).index_copy(0, rows, update).reshape(base.shape)


def append_rows(
    cache: Tensor,
    new: Tensor,
    rows: Tensor,
    length: Tensor,
    mask: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """`append` of the compacted tokens new [N, KV, hd]."""
    blank = new.new_zeros(*mask.shape, *new.shape[1:])
    return append(cache, scatter_rows(blank, rows, new), length, mask, scale)


def attend_rows(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    limit: Tensor,
    rows: Tensor,
    mask: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
) -> Tensor:
    """`attend` of the compacted queries q [N, H, hd]."""
    wide = scatter_rows(q.new_zeros(*mask.shape, *q.shape[1:]), rows, q)
    limits = scatter_rows(limit.new_zeros(mask.shape), rows, limit)
    scales = (key_scale, value_scale, sink)
    y = attend(wide, key, value, limits, *scales, scale=scale, window=window, chunk=chunk)
    return gather_rows(y, rows)
