"""What a trace assumed about sizes: an engine must be right for all of them, or say its limit.

`torch.export` notes a guard for each size that decided what Python did. A guard `T <= 256`, as a
table of 256 positions leaves, is a limit that an engine can state. Any other would make a graph
that is right for some sizes only. For `T == 1` it notes nothing and assumes that it is false, so
what Python decides by sizes is looked at here too.
"""

from __future__ import annotations

import itertools
import re
import sys
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
from torch import SymBool, SymInt, Tensor
from torch.utils._pytree import tree_leaves

from liquidc.errors import UnsupportedError
from liquidc.frontend.source_lines import place


class SizeLimits(UnsupportedError):
    """The model serves sizes only up to a limit.

    Args:
        message: for a size that may have no limit.
        most: the largest value of each dimension, by name.
        traced: the largest value with which it can be traced: less, where PyTorch's own layout of
            memory, but not the result, is another at the limit.
    """

    def __init__(self, message: str, most: Mapping[str, int], traced: Mapping[str, int]) -> None:
        super().__init__(message)
        self.most, self.traced = dict(most), dict(traced)


@dataclass(frozen=True)
class Decision:
    """What Python decided by sizes: the condition, whether it held, and the stack."""

    condition: Any
    held: bool
    stack: str


class _Guards(list[Any]):
    """The tracer's list of guards, which notes the stack of each new one."""

    def __init__(self, guards: list[Any], stacks: dict[int, str]) -> None:
        super().__init__(guards)
        self._stacks = stacks

    def append(self, guard: Any) -> None:
        self._stacks[len(self)] = _stack()
        super().append(guard)


@dataclass
class Sizes:
    """The symbols of one trace.

    Attributes:
        env: the tracer's record of guards; None before the first input with a symbol.
        inputs: the symbol of each dimension of each input tensor, "" for a known size, in order.
        examples: the size that each symbol was traced with.
        decisions: those of the model's code, by the number of guards before.
        stacks: where each guard was made.
    """

    env: Any = None
    inputs: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    examples: dict[Any, int] = field(default_factory=dict[Any, int])
    decisions: list[tuple[int, Decision]] = field(default_factory=list[tuple[int, Decision]])
    stacks: dict[int, str] = field(default_factory=dict[int, str])

    def note(self, args: Any) -> None:
        """Called with the arguments of the traced function, while it is traced."""
        for tensor in tree_leaves(args):
            if not isinstance(tensor, Tensor):
                continue
            self.inputs.append(tuple(str(size) if _symbolic(size) else "" for size in tensor.shape))
            for size in filter(_symbolic, tensor.shape):
                node = cast(Any, size).node
                self.examples[node.expr] = node.hint
                if self.env is None:
                    self.env = node.shape_env
                    self.env.guards = _Guards(self.env.guards, self.stacks)

    @contextmanager
    def watched(self) -> Generator[None]:
        """While this lasts, decisions by sizes are noted."""
        decide = SymBool.__bool__

        def noted(self: SymBool) -> bool:
            guards = len(sizes.env.guards) if sizes.env is not None else 0
            held = decide(self)
            frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
            module = str(frame.f_globals.get("__name__", "torch"))
            if module.partition(".")[0] not in ("torch", "sympy"):
                stack = _stack(frame)
                sizes.decisions.append((guards, Decision(self.node.expr, held, stack)))
            return held

        sizes = self
        SymBool.__bool__ = noted
        try:
            yield
        finally:
            SymBool.__bool__ = decide

    def check_decisions(self, shapes: Any, limits: Mapping[str, int]) -> None:
        """Look at what Python decided for sizes of 1, and at the limits, where there is no guard.

        Args:
            shapes: `dynamic_shapes` of `torch.export.export`.
            limits: the largest sizes, by the names in `shapes`.

        Raises:
            UnsupportedError: it decides something else for them; names it and the line.
        """
        named = self._names(shapes)
        for _, decision in self.decisions:
            symbols = decision.condition.free_symbols & self.examples.keys()
            most = {s: limits[named[str(s)]] for s in symbols if named.get(str(s)) in limits}
            others = [dict.fromkeys(ones, 1) for ones in _subsets(symbols)]
            for sizes in (*others, most):
                held = decision.condition.subs(self.examples | sizes)
                if bool(held) != decision.held:
                    told = _told(decision.condition, decision.held, named)
                    raise _refused(told, place(decision.stack))

    def check_guards(self, shapes: Any) -> None:
        """Look at the guards.

        Raises:
            SizeLimits: they are upper limits.
            UnsupportedError: a guard that is none; names it and the line.
        """
        named = self._names(shapes)
        most: dict[str, int] = {}
        layout: list[tuple[str, int]] = []
        first: UnsupportedError | None = None
        decided = {number for number, _ in self.decisions}
        guards: list[Any] = [] if self.env is None else self.env.guards
        for number, guard in enumerate(guards):
            expr: Any = guard.expr
            left, right = expr.args if len(expr.args) == 2 else (expr, None)
            symbol = named.get(str(left), str(left))
            bound = int(right) if left.is_Symbol and isinstance(right, sympy.Integer) else None
            if isinstance(expr, sympy.Eq) and left.is_Symbol and isinstance(right, sympy.Symbol):
                continue  # one dimension of two inputs
            if isinstance(expr, sympy.GreaterThan) and bound in (0, 1, 2):
                continue  # `check_decisions` looks at sizes of 1
            if isinstance(expr, sympy.Ne) and bound is not None and number not in decided:
                layout.append((symbol, bound))
                continue
            if _always(expr):
                continue
            refused = _refused(_told(expr, True, named), place(self.stacks.get(number)))
            limits = isinstance(expr, sympy.LessThan | sympy.StrictLessThan)
            if not limits or bound is None:
                raise refused
            bound -= isinstance(expr, sympy.StrictLessThan)
            most[symbol] = min(bound, most.get(symbol, bound))
            first = first or refused
        if first is not None:
            traced = {name: bound - ((name, bound) in layout) for name, bound in most.items()}
            raise SizeLimits(str(first), most, traced)

    def _names(self, shapes: Any) -> dict[str, str]:
        """Names of the symbols, from `dynamic_shapes` of the same inputs."""
        leaves = tree_leaves(shapes, is_leaf=lambda node: isinstance(node, dict))
        given = [dims for dims in leaves if dims is not None]
        return {
            symbol: dims[i].__name__
            for symbols, dims in zip(self.inputs, given, strict=False)
            for i, symbol in enumerate(symbols)
            if i in dims
        }


TRACED = "exporting.py"
"""The file whose function calls the traced one."""


def _stack(frame: Any = None) -> str:
    """The stack, from the traced function on."""
    return "".join(traceback.format_stack(frame)).rpartition(TRACED)[2]


SAMPLES = frozenset((1, 2, 3, 5, 8, 16, 31, 64, 1000))
"""Sizes for which a condition is tried."""


def _always(condition: Any) -> bool:
    """Whether a condition such as `T * Min(32, 32 * T) = 32 * T` holds for every size tried.

    Those are `SAMPLES` and the neighbours of each number in it.
    """
    numbers = {int(number) for number in condition.atoms(sympy.Integer)}
    tried = SAMPLES | {n + d for n in numbers for d in (-1, 0, 1) if n + d > 0}
    symbols = sorted(condition.free_symbols, key=str)
    return all(
        bool(condition.subs(dict(zip(symbols, sizes, strict=True))))
        for sizes in itertools.product(sorted(tried), repeat=len(symbols))
    )


def _symbolic(size: int) -> bool:
    return isinstance(size, SymInt)


def _subsets(symbols: set[Any]) -> Iterator[tuple[Any, ...]]:
    """All subsets but the empty one."""
    subsets = (itertools.combinations(symbols, n) for n in range(1, len(symbols) + 1))
    return itertools.chain.from_iterable(subsets)


def _refused(condition: str, where: str) -> UnsupportedError:
    at = f" at {where}" if where else ""
    return UnsupportedError(
        f"the trace is right only for {condition}{at}: an engine serves every size; compute with "
        "tensors what depends on sizes"
    )


def _told(condition: Any, held: bool, named: Mapping[str, str]) -> str:
    """A condition that held with the names of the sizes: `T > 4`, `T ≠ 1`."""
    text = str(condition if held else sympy.Not(condition))
    for symbol, name in named.items():
        text = re.sub(rf"\b{symbol}\b", name, text)
    signs = {"Ne": "≠", "Eq": "="}
    match = re.fullmatch(r"(Ne|Eq)\((.*), (-?\w+)\)", text)
    return f"{match[2]} {signs[match[1]]} {match[3]}" if match else text
