"""One example of every op that computes something: text, and what torch makes of the operands.

An operand is written as `name: type`; floats are drawn at random, integers from 0, 1 and 2. The
cache ops, gates and experts have their meaning in `tests.oracle`; here they have an example of use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liquidc.ir import DType, Module, parse_module
from liquidc.ir.weights import torch_dtype

SIZES = {"B": 2, "T": 3, "S": 7, "N": 4}


@dataclass(frozen=True)
class Example:
    """`text` is the op with its result types; `compute`, where torch has such a function, is it."""

    args: str
    text: str
    compute: Callable[..., Any] | None = None

    def module(self) -> Module:
        """A module whose @prefill is the op alone."""
        types = self.text.rsplit(" : ", 1)[1].split("] ")[0]
        types = [t.strip() + "]" for t in types.rstrip("]").split("], ")]
        names = [f"y{i}" for i in range(len(types))]
        args = ", ".join(f"%{arg}" for arg in self.args.split("; ") if arg)
        results = ", ".join(f"{n}: {t}" for n, t in zip(names, types, strict=True))
        values = ", ".join(f"%{n}" for n in names)
        return parse_module(
            f"module @m\n\nfunc @prefill({args}) -> ({results}) {{\n"
            f"  {values} = {self.text}\n  return {values}\n}}\n"
        )

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Random operands."""
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, Tensor] = {}
        for arg in self.module().functions["prefill"].args:
            shape = [SIZES[d] if isinstance(d, str) else d for d in arg.shape]
            if arg.dtype.is_float:
                tensor = torch.randn(shape, generator=generator)
            else:
                tensor = torch.randint(0, 3, shape, generator=generator)
            made[arg.name] = tensor.to(torch_dtype(arg.dtype))
            if arg.dtype == DType.BOOL:
                made[arg.name] = torch.rand(shape, generator=generator) < 0.5
        return made


X, AB, MASK = "x: f32[B, 4]", "a: f32[B, 4]; b: f32[B, 4]", "a: bool[B]; b: bool[B]"
F32, BOOL = "f32[B, 4]", "bool[B, 4]"


def unary(name: str, compute: Callable[..., Any]) -> Example:
    return Example(X, f"{name} %x : {F32}", compute)


def binary(name: str, compute: Callable[..., Any], to: str = F32) -> Example:
    return Example(AB, f"{name} %a, %b : {to}", compute)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (4,), weight, 1e-5)


EXAMPLES: dict[str, Example] = {
    "constant": Example("", "constant value=[1.5, -2.0] : f32[2]", lambda: torch.tensor([1.5, -2])),
    "size": Example(X, 'size dim="B" : i64[]', lambda x: torch.tensor(2)),
    "iota": Example(X, 'iota dim="B" : i64[B]', lambda x: torch.arange(2)),
    "neg": unary("neg", torch.neg),
    "exp": unary("exp", torch.exp),
    "log": unary("log", torch.log),
    "floor": unary("floor", torch.floor),
    "sqrt": unary("sqrt", torch.sqrt),
    "rsqrt": unary("rsqrt", torch.rsqrt),
    "sin": unary("sin", torch.sin),
    "cos": unary("cos", torch.cos),
    "tanh": unary("tanh", torch.tanh),
    "sigmoid": unary("sigmoid", torch.sigmoid),
    "relu": unary("relu", torch.relu),
    "silu": unary("silu", F.silu),
    "gelu": unary("gelu", F.gelu),
    "not": Example("x: bool[B]", "not %x : bool[B]", torch.logical_not),
    "cast": Example(X, "cast %x, to=i64 : i64[B, 4]", lambda x: x.to(torch.int64)),
    "add": binary("add", torch.add),
    "sub": binary("sub", torch.sub),
    "mul": binary("mul", torch.mul),
    "div": binary("div", torch.div),
    "maximum": binary("maximum", torch.maximum),
    "minimum": binary("minimum", torch.minimum),
    "eq": binary("eq", torch.eq, BOOL),
    "ne": binary("ne", torch.ne, BOOL),
    "lt": binary("lt", torch.lt, BOOL),
    "le": binary("le", torch.le, BOOL),
    "gt": binary("gt", torch.gt, BOOL),
    "ge": binary("ge", torch.ge, BOOL),
    "and": Example(MASK, "and %a, %b : bool[B]", torch.logical_and),
    "or": Example(MASK, "or %a, %b : bool[B]", torch.logical_or),
    "where": Example(f"m: {BOOL}; {AB}", f"where %m, %a, %b : {F32}", torch.where),
    "reshape": Example(X, 'reshape %x, shape=["4*B"] : f32[4*B]', lambda x: x.reshape(-1)),
    "broadcast": Example(
        f"x: f32[1, 4]; like: {F32}",
        f'broadcast %x, shape=["B", 4] : {F32}',
        lambda x, like: x.expand(2, 4),
    ),
    "assume_sizes": Example(X, "assume_sizes %x, shape=[2, 4] : f32[2, 4]", lambda x: x),
    "transpose": Example(X, "transpose %x, perm=[1, 0] : f32[4, B]", lambda x: x.T),
    "slice": Example(X, "slice %x, dim=1, start=1, stop=3 : f32[B, 2]", lambda x: x[:, 1:3]),
    "concat": Example(AB, "concat [%a, %b], dim=1 : f32[B, 8]", lambda a, b: torch.cat([a, b], 1)),
    "gather": Example(
        "x: f32[B, 4]; i: i64[N]", "gather %x, %i, dim=1 : f32[B, N]", lambda x, i: x[:, i]
    ),
    "sum": Example(X, "sum %x, dims=[1] : f32[B]", lambda x: x.sum(1)),
    "mean": Example(X, "mean %x, dims=[1], keep=true : f32[B, 1]", lambda x: x.mean(1, True)),
    "max": Example(X, "max %x, dims=[1] : f32[B]", lambda x: x.amax(1)),
    "any": Example("x: bool[B, T]", "any %x, dims=[0, 1] : bool[]", lambda x: x.any()),
    "cumsum": Example("x: i64[B, T]", "cumsum %x, dim=1 : i64[B, T]", lambda x: x.cumsum(1)),
    "softmax": Example(X, f"softmax %x, dim=1 : {F32}", lambda x: x.softmax(1)),
    "matmul": Example(
        "a: f32[B, 4, T]; b: f32[B, T, 5]", "matmul %a, %b : f32[B, 4, 5]", torch.matmul
    ),
    "linear": Example(
        "x: f32[B, T, 4]; w: f32[6, 4]; b: f32[6]",
        "linear %x, %w, bias=%b : f32[B, T, 6]",
        F.linear,
    ),
    "dequantize": Example(
        "codes: u8[6, 2, 4]; scales: f32[6, 2]; zeros: u8[6, 2]",
        'dequantize %codes, %scales, zeros=%zeros, format="int8" : f32[6, 8]',
        lambda c, s, z: ((c.float() - z[..., None]) * s[..., None]).flatten(1),
    ),
    "embed": Example(
        "ids: i64[B, T]; table: f32[5, 4]",
        "embed %ids, %table : f32[B, T, 4]",
        F.embedding,
    ),
    "rms_norm": Example(
        "x: f32[B, 4]; w: f32[4]", f"rms_norm %x, weight=%w, eps=1e-05 : {F32}", norm
    ),
    "layer_norm": Example(
        "x: f32[B, 4]; w: f32[4]; b: f32[4]",
        f"layer_norm %x, weight=%w, bias=%b, eps=1e-05 : {F32}",
        lambda x, w, b: F.layer_norm(x, (4,), w, b, 1e-5),
    ),
    "rope": Example(
        "x: f32[B, T, 2, 8]; p: i64[B, T]", "rope %x, %p, theta=100.0 : f32[B, T, 2, 8]"
    ),
    "take_tokens": Example(
        "x: f32[B, T, 4]; i: i64[B, N]",
        "take_tokens %x, %i : f32[B, N, 4]",
        lambda x, i: torch.stack([row[place] for row, place in zip(x, i, strict=True)]),
    ),
    "rows": Example(
        "m: bool[B, T]", 'rows %m, dim="R" : i64[R]', lambda m: m.reshape(-1).nonzero()[:, 0]
    ),
    "gather_rows": Example(
        "x: f32[B, T, 4]; r: i64[N]",
        "gather_rows %x, %r : f32[N, 4]",
        lambda x, r: x.reshape(-1, 4)[r],
    ),
    "fixed_gate": Example(
        "m: bool[B, T]",
        "fixed_gate %m, layer=1, gate=0, run=true, threshold=0.5 : bool[B, T], f32[B, T]",
    ),
    "renumber": Example(
        "i: i64[B, T, 2]",
        "renumber %i, table=[2, 0, 1] : i64[B, T, 2]",
        lambda i: torch.tensor([2, 0, 1])[i],
    ),
    "expert_mask": Example(
        "i: i64[B, T, 2]",
        "expert_mask %i, expert=1 : bool[B, T]",
        lambda i: (i == 1).any(-1),
    ),
    "expert_weight": Example(
        "i: i64[B, T, 2]; w: f32[B, T, 2]",
        "expert_weight %i, %w, expert=1 : f32[B, T]",
        lambda i, w: torch.where(i == 1, w, 0.0).sum(-1),
    ),
    "route": Example(
        "x: f32[B, T, 6]; m: bool[B, T]", "route %x, %m, k=2 : i64[B, T, 2], f32[B, T, 2]"
    ),
    "attend": Example(
        "q: f32[B, T, 2, 8]; k: f32[B, 1, S, 8]; v: f32[B, 1, S, 8]; n: i64[B, T]",
        f"attend %q, %k, %v, %n, scale={1 / math.sqrt(8)!r} : f32[B, T, 2, 8]",
    ),
    "append": Example(
        "c: f32[B, 1, S, 8]; x: f32[B, T, 1, 8]; n: i64[B]; m: bool[B, T]",
        "append %c, %x, %n, %m : f32[B, 1, S, 8]",
    ),
}
IN_GENERATED = {
    "weight", "yield", "return", "if", "depth_gate", "map_experts", "grouped_experts",
    "scatter_rows", "append_rows", "attend_rows",
}  # fmt: skip
"""Ops whose operands must fit one another: tests/generator makes them, and the oracle's grid."""
