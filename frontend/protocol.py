"""What a module calls so that liquidc sees its gates, caches and experts whole.

The functions compute the reference mathematics of `semantic_ops` when the model runs, and leave
one `torch.ops.liquid.*` call (or a `torch.cond`) when it is traced by `torch.export`. Sizes are
named as there: B, T, H, KV, hd, S, E, k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from liquidc.errors import InputError
from liquidc.frontend import semantic_ops as ops

expert = ops.expert
R = TypeVar("R")


def is_exporting() -> bool:
    """Whether `torch.export` is tracing."""
    return torch.compiler.is_exporting()


class LayerCache(NamedTuple):
    """The cache of a layer: key and value [B, KV, S, hd], and how many slots are taken, i64[B]."""

    key: Tensor
    value: Tensor
    length: Tensor


@dataclass
class Step:
    """What one layer is told about the tokens of a forward, and what it records.

    positions i64[B, T] and valid bool[B, T] (false for padding); for the depth gates: force i8[g]
    for the layer's own gates, bias f32[B], min_depth i64[B], executed i64[B, T] (layers that each
    token has run so far) and remaining (layers from this one to the last); below: the layer
    below's new keys and values [B, T, KV, hd], as cached, under the cache policy inherit.
    dense_estimate: in training, compute skipped tokens in the experts too, so that the gates'
    straight-through gradient knows what skipping lost.

    Recorded: gates, the (mask bool[B, T], p f32[B, T]) of each gate in order; scores f32[B, T];
    experts i64[B, T, k]; kv, this layer's new keys and values; router, the experts' logits
    f32[B, T, E] and the tokens counted for them (in training only).
    """

    positions: Tensor
    valid: Tensor
    force: Tensor
    bias: Tensor
    min_depth: Tensor
    executed: Tensor
    remaining: int
    below: tuple[Tensor, Tensor] | None = None
    dense_estimate: bool = False
    gates: list[tuple[Tensor, Tensor]] = field(default_factory=lambda: [])
    scores: list[Tensor] = field(default_factory=lambda: [])
    experts: Tensor | None = None
    kv: tuple[Tensor, Tensor] | None = None
    router: tuple[Tensor, Tensor] | None = None

    def depth_gate(
        self, score: Tensor, *, threshold: float = 0.5, compare: str = "gt", reserved: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Decide which tokens run: (mask bool[B, T], p f32[B, T]) from score f32[B, T].

        See `semantic_ops.depth_gate`. p = sigmoid(score) never contains the bias.

        Raises:
            InputError: the layer has more gates than `force` has entries.
        """
        if len(self.gates) == self.force.shape[0]:
            raise InputError(f"a layer may have {len(self.gates)} depth gates, not more")
        gate = _op("depth_gate")
        mask, p = gate(
            score,
            self.valid,
            self.positions,
            self.force[len(self.gates)],
            self.bias,
            self.min_depth,
            self.executed,
            threshold,
            compare,
            reserved,
            self.remaining,
        )
        self.gates.append((mask, p))
        self.scores.append(score)
        return mask, p

    def executed_after(self) -> Tensor:
        """`executed` with this layer counted for the tokens that all its gates ran, i64[B, T]."""
        ran = torch.ones_like(self.executed)
        for mask, _ in self.gates:
            ran = ran * mask.to(torch.int64)
        return self.executed + ran


def gated(mask: Tensor, run: Callable[..., R], skip: Callable[..., R], *operands: Any) -> R:
    """`run(*operands)` if any token of mask bool[B, T] runs, else `skip(*operands)`.

    Both arms are functions of tensors, or of dicts and tuples of them, and return the same kind.
    They take sizes from their own arguments, return no operand unchanged (clone it) and mask what
    `run` computes with `keep`: `run` must be right for every mask. Traced, this is a `torch.cond`.
    With gradients on, it is always `run`.
    """
    if is_exporting():
        return cast("Any", torch.cond)(mask.any(), run, skip, operands)
    if torch.is_grad_enabled() or bool(mask.any()):
        return run(*operands)
    return skip(*operands)


def keep(mask: Tensor, value: Tensor, p: Tensor | None = None) -> Tensor:
    """`value` [B, T, ...] where mask bool[B, T] holds, else 0.

    In training, with the gate's p f32[B, T], the mask is straight-through: [p > τ] + p - stop(p).
    """
    if p is not None and p.requires_grad and torch.is_grad_enabled() and not is_exporting():
        return value * straight_through(mask, p).to(value.dtype).unsqueeze(-1)
    return torch.where(mask.unsqueeze(-1), value, 0.0)


def straight_through(mask: Tensor, p: Tensor) -> Tensor:
    """Exactly 0 or 1 as mask bool[B, T] says, with the gradient of p: f32[B, T] (spec 5.5)."""
    return mask.to(p.dtype) + (p - p.detach())


def rope(x: Tensor, positions: Tensor, theta: float, scaling: str = "") -> Tensor:
    """Rotary embedding of x [B, T, H, hd] at positions i64[B, T]; see `semantic_ops.rope`.

    `scaling` is the text of a `liquidc.ir.rotary.Scaling`.
    """
    return _op("rope")(x, positions, theta, scaling)


def append(cache: LayerCache, k: Tensor, v: Tensor, mask: Tensor) -> tuple[LayerCache, Tensor]:
    """Write the new k, v [B, T, KV, hd] where mask bool[B, T] holds: (new cache, limit i64[B, T]).

    limit[b, t] is the number of slots that query (b, t) sees: all up to the token itself.

    Raises:
        InputError: the cache has too few slots (only when the model runs, not when traced).
    """
    count = mask.to(torch.int64)
    length = cache.length + count.sum(1)
    if not is_exporting() and int(length.max()) > cache.key.shape[2]:
        raise InputError(
            f"the cache has {cache.key.shape[2]} slots, {int(length.max())} are needed: make it "
            "larger with new_cache(batch, capacity)"
        )
    write = _op("append")
    key = write(cache.key, k, cache.length, mask)
    value = write(cache.value, v, cache.length, mask)
    return LayerCache(key, value, length), cache.length.unsqueeze(1) + count.cumsum(1)


def attend(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    limit: Tensor,
    scale: float,
    *,
    window: int = 0,
    chunk: int = 0,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention of q [B, T, H, hd] over cached key, value [B, KV, S, hd]: [B, T, H, hd].

    Query (b, t) sees the slots j < limit[b, t]; with none it is 0. With a `window`, the last of
    them; with a `chunk`, those of its own chunk. `sink` [H] are scores that take their part of
    each head's softmax and give nothing.
    """
    return _op("attend")(q, key, value, limit, sink, scale, window, chunk)


def attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    *,
    window: int = 0,
    chunk: int = 0,
    sink: Tensor | None = None,
) -> Tensor:
    """Causal attention without a cache, for training: q [B, T, H, hd], k and v [B, T, KV, hd].

    visible bool[B, T] says which tokens are keys (None: all); a token always sees itself. The rest
    as in `attend`.

    Raises:
        InputError: a window, a chunk or a sink together with keys that are left out.
    """
    if window or chunk or sink is not None:
        if visible is not None:
            raise InputError("training under the cache policy drop knows no window, chunk or sink")
        limit = torch.arange(1, q.shape[1] + 1, device=q.device).expand(q.shape[:2])
        key, value = k.transpose(1, 2), v.transpose(1, 2)
        return ops.attend(q, key, value, limit, sink, scale, window, chunk)
    groups = q.shape[2] // k.shape[2]
    query, key, value = (
        t.transpose(1, 2) for t in (q, *(x.repeat_interleave(groups, 2) for x in (k, v)))
    )
    mask = None
    if visible is not None:
        tokens = q.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        itself = torch.eye(tokens, dtype=torch.bool, device=q.device)
        mask = (causal & visible.unsqueeze(1) | itself).unsqueeze(1)
    mixed = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale
    )
    return mixed.transpose(1, 2)


def route(
    logits: Tensor,
    mask: Tensor,
    k: int,
    *,
    score: str = "softmax",
    post: str = "renorm",
    renorm_eps: float = 0.0,
    selection_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    group_fill: str = "neg_inf",
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose k of E experts for each token: (index i64[..., k], weight f32[..., k]).

    logits [..., E]; tokens where mask bool[...] is false get index -1 and weight 0. The formula
    is the generic router of model spec 2.1; see `semantic_ops.route`.
    """
    return _op("route")(
        ops.at_least_float32(logits),
        mask,
        selection_bias,
        k,
        score,
        post,
        renorm_eps,
        n_group,
        topk_group,
        group_score,
        group_fill,
        scaling,
    )


def dispatch(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    body: ops.Expert,
    params: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    *,
    apply: str = "output",
    identity: int = 0,
) -> Tensor:
    """Run the chosen experts on x [..., D] and add up their weighted results, [..., D].

    index and weight [..., k] as from `route`. `body(rows [N, D], *params)` is a plain function
    decorated with `@protocol.expert`; it is traced once for all experts. `params` are tensors with
    the experts in front ([E, ...] each), or one tuple of tensors for each expert. The `identity`
    numbers behind them are experts that give back their input.

    Raises:
        InputError: `body` is not decorated.
    """
    if not isinstance(cast(object, body), ops.Expert):
        raise InputError(f"{body!r} is no expert body: decorate it with @protocol.expert")
    if isinstance(params[0], Tensor):
        flat, width = list(cast("Sequence[Tensor]", params)), 0
    else:
        flat = [p for mine in cast("Sequence[Sequence[Tensor]]", params) for p in mine]
        width = len(params[0])
    if is_exporting():
        site = ops.site_name(body, width)
        return torch.ops.liquid.dispatch(x, index, weight, flat, site, apply, identity)
    return ops.dispatch(x, index, weight, body, ops.by_expert(flat, width), apply)


def _op(name: str) -> Any:
    """The custom operator when tracing, else its reference."""
    return getattr(torch.ops.liquid if is_exporting() else ops, name)
