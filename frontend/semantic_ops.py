"""The semantic operators: what a tracer must see whole.

Each has a reference in plain, differentiable torch (where the IR has the same op, its definition
in `liquidc.ir.semantics`) and a custom operator `torch.ops.liquid.<name>` with the same arguments,
which `torch.export` keeps as one call. Sizes: B rows of T tokens, H query heads and KV key/value
heads of width hd, S cache slots, E experts of which a token uses k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from liquidc.ir import semantics
from liquidc.ir.semantics import append, depth_gate, rope, route, seen


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


def attend(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    limit: Tensor,
    sink: Tensor | None,
    scale: float,
    window: int,
    chunk: int,
) -> Tensor:
    """Softmax attention of q [B, T, H, hd] over a cache: key, value [B, KV, S, hd].

    Query (b, t) sees slots j < limit[b, t] (see `ops.Attend` for window, chunk and sink f32[H]) and
    is 0 where that is none. Query head h reads key/value head h · KV // H. The IR's definition
    bears NaN in slots that nobody sees; this one is PyTorch's own attention, which trains faster,
    as far as that knows no sink.
    """
    if sink is not None:
        return semantics.attend(
            q, key, value, limit, sink=sink, scale=scale, window=window, chunk=chunk
        )
    visible = seen(key.shape[2], limit, window, chunk)
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2), key, value, visible.unsqueeze(1), scale=scale, enable_gqa=True
    )
    return torch.where((limit > 0)[..., None, None], mixed.transpose(1, 2), 0.0)


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
    of each expert; an index behind them is an identity expert, which adds weight · x. With apply
    "input" the weight multiplies the expert's input instead.
    """
    slots = index.shape[-1]
    flat = x.reshape(-1, x.shape[-1])
    order = index.reshape(-1).sort(stable=True)
    nobody, *counts = torch.bincount(order.values + 1, minlength=len(params) + 1).tolist()
    order = order.indices[nobody:]
    if not len(order):
        return torch.zeros_like(x)
    token = order // slots
    factor = weight.reshape(-1)[order].unsqueeze(-1).to(x.dtype)
    rows = flat.index_select(0, token)
    rows = rows * factor if apply == "input" else rows
    sizes = counts[: len(params)]
    *parts, unchanged = rows.split([*sizes, len(rows) - sum(sizes)])
    done = [body(part, *own) for part, own in zip(parts, params, strict=True) if len(part)]
    result = torch.cat([*done, unchanged])
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
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    params: list[Tensor],
    site: str,
    apply: str,
    identity: int,
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


_define("rope", "(Tensor x, Tensor positions, float theta, str scaling) -> Tensor", rope, _as_first)
_define(
    "append", "(Tensor cache, Tensor new, Tensor length, Tensor mask) -> Tensor", append, _as_first
)
_define(
    "attend",
    "(Tensor q, Tensor key, Tensor value, Tensor limit, Tensor? sink, float scale, int window, "
    "int chunk) -> Tensor",
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
    "(Tensor x, Tensor index, Tensor weight, Tensor[] params, str site, str apply, "
    "int identity) -> Tensor",
    _dispatch_op,
    _as_first,
)
