"""Which passes run, in which order, with which options: `fold-constants,quantize{block=64}`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from liquidc.errors import InputError, InternalError, IRError
from liquidc.ir import Module, verify
from liquidc.ir.rewriter import Statistics
from liquidc.option_text import parse_named
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.registry import DEFAULT_PIPELINE, PASSES, PROFILED

if TYPE_CHECKING:
    from liquidc.backends.base import Backend

_INTEGER = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class PassPlan:
    """One pass that will run.

    Attributes:
        name: of the pass.
        instance: the pass with its options.
    """

    name: str
    instance: Pass

    @property
    def options(self) -> dict[str, Any]:
        """All options, defaults included."""
        return dataclasses.asdict(self.instance)

    @property
    def text(self) -> str:
        """As on the command line, without options that have their defaults."""
        changed = [
            f"{f.name}={getattr(self.instance, f.name)}"
            for f in dataclasses.fields(self.instance)
            if getattr(self.instance, f.name) != f.default
        ]
        return self.name + (f"{{{','.join(changed)}}}" if changed else "")


def default_passes(backend: Backend) -> list[str]:
    """The passes of a target that is told nothing else."""
    return _without(backend, backend.pipeline or DEFAULT_PIPELINE)


def profiled_passes(backend: Backend) -> list[str]:
    """The passes of a target that is given a profile of the model."""
    names = list(backend.pipeline or DEFAULT_PIPELINE)
    for name, before in PROFILED.items():
        if before in names:
            names.insert(names.index(before), name)
    return _without(backend, names)


def _without(backend: Backend, names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in backend.leaves_out]


def plan_passes(texts: Sequence[str], without: Sequence[str]) -> tuple[PassPlan, ...]:
    """The passes that `texts` name, except those in `without`.

    Raises:
        InputError: an unknown pass or option, or a value of another type.
    """
    for name in without:
        _find(name)
    return tuple(plan for text in texts if (plan := _parse(text)).name not in without)


def _parse(text: str) -> PassPlan:
    given = parse_named(text, "pass")
    kind = _find(given.name)
    fields = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    options: dict[str, Any] = {}
    for key, value in given.options.items():
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise InputError(f"the pass {given.name} has no option {key!r}; it has {known}")
        options[key] = _option(given.name, key, value, fields[key])
    try:
        return PassPlan(given.name, kind(**options))
    except ValueError as error:
        raise InputError(f"the pass {given.name}: {error}") from None


def _find(name: str) -> type[Pass]:
    if name not in PASSES:
        raise InputError(f"no pass {name!r}; there are {', '.join(sorted(PASSES))}")
    return PASSES[name]


def _option(name: str, key: str, value: str, kind: str) -> Any:
    if kind == "str":
        return value
    if kind == "bool" and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    if kind == "int" and _INTEGER.fullmatch(value):
        return int(value)
    if kind == "float" and _NUMBER.fullmatch(value) and math.isfinite(float(value)):
        return float(value)
    raise InputError(f"the pass {name}: {key} must be of type {kind}, not {value!r}")


def describe_passes() -> list[tuple[str, str]]:
    """Name and first line of the documentation of every pass."""
    return [
        (name, (kind.__doc__ or "").strip().partition("\n")[0])
        for name, kind in sorted(PASSES.items())
    ]


def run_passes(
    module: Module,
    plan: Sequence[PassPlan],
    statistics: Statistics,
    *,
    context: PassContext | None = None,
    verify_each: bool = False,
    after: Callable[[str, Module], None] | None = None,
) -> Module:
    """Run passes over a copy of `module`.

    Args:
        module: stays as it is.
        plan: the passes, in order.
        statistics: counts the rules' firings.
        context: what passes may use besides the module.
        verify_each: check the IR after every pass.
        after: called with the name and the module after each pass.

    Raises:
        InternalError: a pass broke the IR; names the passes that had run.
    """
    module = module.clone()
    ran: list[str] = []
    for step in plan:
        step.instance.run(module, statistics, context)
        ran.append(step.name)
        if verify_each:
            try:
                verify(module)
            except IRError as error:
                raise InternalError(f"invalid IR after {' → '.join(ran)}: {error}") from None
        if after is not None:
            after(step.name, module)
    return module
