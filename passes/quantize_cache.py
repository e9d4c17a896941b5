"""The pass `quantize-cache`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch

from liquidc.errors import InputError
from liquidc.ir import Block, Function, Module, Op, Value, ops
from liquidc.ir.quantised import CALIBRATED
from liquidc.ir.rewriter import Rewriter, Statistics
from liquidc.ir.types import DType, TensorType
from liquidc.ir.weights import Stored, sizes
from liquidc.passes.base import Need, Pass, PassContext
from liquidc.passes.fold_constants import declare
from liquidc.passes.stream import Calibration, Lane, Stream, affordable

SCHEMES = ("int8",)
"""What caches may hold."""
LEAST = 32
"""A cache that fewer tokens of the text are written to says little of what others will write."""
WINDOWS = 64
"""Windows of text that are run: ranges need fewer than products do."""
HEADROOM = 1.25
"""How much larger than on the text a channel may get: what is cut off costs far more than what is
rounded (on the sample, KL 0.0017 at 1, 0.036 at 0.75)."""
Appending = ops.Append | ops.AppendRows
Attending = ops.Attend | ops.AttendRows


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Keys and values are kept as codes of 8 bits with a scale for every channel of every head.

    Before::

        %n = append %past.0.key, %k, %length, %mask : f32[B, 4, S, 64]
        %y = attend %q, %n, %m, %limit

    After::

        %s = weight "past.0.key.scale" : f32[4, 64]
        %n = append %past.0.key, %k, %length, %mask, scale=%s : i8[B, 4, S, 64]
        %y = attend %q, %n, %m, %limit, key_scale=%s, value_scale=%t

    Attention reads back what was stored, so a text gives the same results whole, in chunks and
    token by token. A channel's scale lets codes reach 1.25 times its largest size on calibration
    text; what is larger later is cut off. The text is run twice, as the gates decide and with all
    of them forced to run, for an engine may be told to run deeper than its gates. Caches that fewer
    than 32 tokens reached either way are listed.
    """

    scheme: str = "int8"

    name: ClassVar[str] = "quantize-cache"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "lossy"
    needs: ClassVar[Need] = "cache"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise InputError(f"a cache's scheme is {', '.join(SCHEMES)}, not {self.scheme!r}")

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Quantise the caches of every function.

        Raises:
            InputError: there is no text to calibrate on, or a cache is used in another way.
        """
        found = {function: caches_of(function) for function in module.functions.values()}
        names = {name for caches in found.values() for name in caches.values()}
        if not names:
            statistics.facts[self.name] = {"caches": 0, "starved": []}
            return
        if context.calibration is None:
            raise InputError(f"{self.name} calibrates on text: give it with --calibration FILE")
        seen, tokens = _ranges(module, context.calibration)
        starved = sorted(name for name in names if seen.count(name) < LEAST)
        for function, caches in found.items():
            _quantise(module, function, caches, seen, context.calibration)
        statistics.fired[self.name] += len(names)
        statistics.facts[self.name] = {
            "scheme": self.scheme,
            "caches": len(names),
            "starved": starved,
            "calibration": {"data": context.calibration.data, "tokens": tokens},
        }


def caches_of(function: Function) -> dict[Value, str]:
    """The values that are a cache of floats in some state, by the argument that it began as.

    Raises:
        InputError: something but an append or attention uses one.
    """
    found = {
        arg: arg.name
        for arg in function.args
        if arg.name.startswith("past.") and arg.name.endswith((".key", ".value"))
        if arg.dtype == DType.F32
    }
    waiting = list(found)
    while waiting:
        value = waiting.pop()
        for user in value.uses:
            for after in _states(value, user):
                if after not in found:
                    found[after] = found[value]
                    waiting.append(after)
    return found


def _states(cache: Value, user: Op) -> list[Value]:
    """What an op makes of a cache."""
    if isinstance(user, Attending | ops.Return):
        return []
    if isinstance(user, Appending) and user.cache is cache and user.new is not cache:
        return [user.y]
    if isinstance(user, ops.AssumeSizes):
        return [user.y]
    around = cast(Block, user.parent).parent
    if isinstance(user, ops.Yield) and isinstance(around, ops.If):
        places = [n for n, value in enumerate(user.operands) if value is cache]
        return [around.results[n] for n in places]
    raise InputError(f"quantize-cache: {user.op_name} uses the cache %{cache.name}")


class _Seen(Stream):
    """The largest size of each channel of what is written to the caches.

    Attributes:
        largest: f32[KV, hd] by cache.
    """

    def __init__(self, module: Module, caches: dict[Value, str], calibration: Calibration) -> None:
        super().__init__(module, calibration.source)
        self._caches, self._report = caches, calibration.report
        self._most = 0
        self._tokens: dict[str, list[int]] = {}
        self.largest: dict[str, torch.Tensor] = {}

    def count(self, name: str) -> int:
        """Tokens that were written to a cache, in the run that wrote most."""
        return max(self._tokens.get(name, [0]))

    def wants(self, op: Op) -> bool:
        """See `Stream`."""
        return isinstance(op, Appending)

    def begin(self) -> None:
        """Another run over the text begins."""
        for counts in self._tokens.values():
            counts.append(0)

    def op(self, op: Op, lanes: list[Lane]) -> list[Sequence[torch.Tensor]]:
        """See `Stream`."""
        if isinstance(op, Appending) and op.cache in self._caches:
            name = self._caches[op.cache]
            counts = self._tokens.setdefault(name, [0])
            for lane in lanes:
                new = lane.frame.values[op.new]
                if isinstance(op, ops.Append):
                    new = new[lane.frame.values[op.mask]]
                if len(new):
                    size = new.abs().amax(0)
                    self.largest[name] = torch.maximum(self.largest.get(name, size), size)
                    counts[-1] += len(new)
            self._report("caches calibrated", len(self.largest), len(set(self._caches.values())))
        return super().op(op, lanes)

    def scale(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """f32[KV, hd] of a cache; a channel that was always 0 has that of its head's largest."""
        size = self.largest.get(name, torch.zeros(shape))
        if not bool(size.isfinite().all()):
            raise InputError("the model computes numbers that are not finite on this text")
        head = size.amax(-1, keepdim=True).expand_as(size)
        size = torch.where(size > 0, size, head)
        return torch.where(size > 0, size, 1.0) * HEADROOM / 127


def _ranges(module: Module, calibration: Calibration) -> tuple[_Seen, int]:
    """What is written to the caches, and the tokens of the text."""
    main = next(iter(module.functions.values()))
    windows = affordable(calibration, main).windows[:WINDOWS]
    seen = _Seen(module, caches_of(main), calibration)
    seen.run(main, windows)
    gates = [arg for arg in main.args if arg.name == "gate_force"]
    if gates:
        seen.begin()
        force = torch.ones(sizes(gates[0].shape), dtype=torch.int8)
        seen.run(main, windows, {"gate_force": force})
    return seen, sum(map(len, windows))


def _quantise(
    module: Module,
    function: Function,
    caches: dict[Value, str],
    seen: _Seen,
    calibration: Calibration,
) -> None:
    """Let caches hold codes, and what writes and reads them have the scales."""
    rw = Rewriter(function.body, [])
    scales: dict[str, Value] = {}
    for arg, name in [(value, name) for value, name in caches.items() if value.op is None]:
        _, heads, _, width = arg.shape
        scales[name] = _declared(module, rw, name, sizes((heads, width)), seen, calibration)
    for op in list(_users(caches)):
        if isinstance(op, Appending):
            new = op.clone({}, scale=scales[caches[op.cache]])
        else:
            key, value = (scales[caches[cache]] for cache in (op.key, op.value))
            new = op.clone({}, key_scale=key, value_scale=value)
        _replace(op, new, caches)
    for value in caches:
        value.type = value.type.with_dtype(DType.I8)
    for op in reversed(rw.emitted):
        op.parent = function.body
        function.body.ops.insert(0, op)


def _declared(
    module: Module,
    rw: Rewriter,
    name: str,
    shape: tuple[int, ...],
    seen: _Seen,
    calibration: Calibration,
) -> Value:
    """The scale of a cache, stored once for all functions."""
    _, layer, part = name.split(".")
    expr = Stored(f"{CALIBRATED}past.{layer}.{part}.scale", TensorType(DType.F32, shape))
    if expr not in module.weights.values():
        heads, width = shape
        calibration.store.append(expr.name, expr.type, seen.scale(name, (heads, width)))
    return declare(module, rw, f"{name}.scale", expr)


def _users(caches: dict[Value, str]) -> Iterator[Any]:
    """Each op that appends to a cache or attends over it, once."""
    known: set[Op] = set()
    for value in caches:
        for user in value.uses:
            if isinstance(user, Appending | Attending) and user not in known:
                known.add(user)
                yield user


def _replace(op: Op, new: Op, caches: dict[Value, str]) -> None:
    """Put an op in the place of one with the same results."""
    cast(Block, op.parent).insert_before(op, new)
    for old, result in zip(op.results, new.results, strict=True):
        old.replace_by(result)
        if old in caches:
            caches[result] = caches.pop(old)
    op.detach()
