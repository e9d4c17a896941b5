"""Mixed precision: bits for each weight, by what each costs alone, to meet a size or a budget.

Each weight alone is rounded to each scheme's codes, the rest of the model staying as it is, and the
mean KL(original || rounded) is measured on held-out text. Costs are taken to add up; steps to fewer
bits are then made in the order of nats per byte saved, and what they cost together is measured.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from liquidc import facts
from liquidc.errors import InputError
from liquidc.fidelity import LogitMetrics
from liquidc.files import read_utf8
from liquidc.heldout import HeldOutText, Report, Scorer
from liquidc.ir import Module, ops
from liquidc.ir.quantised import Grid, dequantise
from liquidc.ir.weights import WeightExpr, WeightSource, materialize
from liquidc.passes.base import PassContext
from liquidc.passes.quantize import Quantize
from liquidc.passlog import weights_in_use

SCHEMES = ("int8", "int4")
"""From more bits to fewer."""
FEW = 8
"""Windows on which each weight alone is measured."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One weight alone.

    Attributes:
        weight: its name.
        scheme: "float", or one of `SCHEMES`.
        kl_nats: mean KL(original || rounded) per token.
        bytes: what it takes.
    """

    weight: str
    scheme: str
    kl_nats: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Schemes by weight.

    Attributes:
        schemes: "float" is left out.
        told: for the manifest: the trials, and what was asked for.
    """

    schemes: dict[str, str]
    told: dict[str, Any]


def read_recipe(path: Path) -> Recipe:
    """A file of `[weights]` with lines `"name" = "int4"`.

    Raises:
        InputError: it can't be read, or is none.
    """
    try:
        given = tomllib.loads(read_utf8(path, InputError))
    except (ValueError, RecursionError) as error:  # long integers are no TOMLDecodeError
        raise InputError(f"{path}: not TOML: {error}") from None
    weights = given.get("weights")
    if set(given) != {"weights"} or not isinstance(weights, dict):
        raise InputError(f'{path}: a recipe is a table [weights] of "name" = "int4"')
    schemes: dict[str, str] = {}
    for name, scheme in weights.items():  # pyright: ignore[reportUnknownVariableType]
        if scheme not in (*SCHEMES, "fp8", "float"):
            known = ", ".join((*SCHEMES, "fp8", "float"))
            raise InputError(f"{path}: {name} is {scheme!r}; schemes are {known}")
        schemes[str(name)] = str(scheme)  # pyright: ignore[reportUnknownArgumentType]
    return Recipe(schemes, {"recipe": path.name})


def choose(
    module: Module,
    source: WeightSource,
    text: HeldOutText,
    quantize: Quantize,
    *,
    target_size: int | None,
    max_kl: float | None,
    report: Report,
) -> Recipe:
    """The recipe with the fewest nats for a size, or the fewest bytes for a budget.

    Args:
        module: the model as `quantize` gets it.
        source: its weights.
        text: to measure on.
        quantize: its options hold for every scheme.
        target_size: bytes that all weights may take together.
        max_kl: nats per token that they may cost; two standard errors are added to what is
            measured.
        report: told about the progress.

    Raises:
        InputError: the size can't be reached.
    """
    grids = grids_of(module, quantize)
    if target_size is not None:
        check_size(module, grids, target_size)
    measured = _Measured(module, source, text)
    trials = measured.alone(grids, report)
    steps = _steps(trials)
    reached = [weights_in_use(module)]
    for before, after in steps:
        reached.append(reached[-1] - before.bytes + after.bytes)
    told: dict[str, Any] = {"measured_on": text.sha256, "sensitivity": [_told(t) for t in trials]}
    if target_size is not None:
        told["target_size"] = target_size
        count = next(n for n, bytes in enumerate(reached) if bytes <= target_size)
    else:
        told["max_kl"] = max_kl
        low, high = 0, len(steps)
        while low < high:
            middle = (low + high + 1) // 2
            report("steps decided", len(steps) - (high - low), len(steps))
            fits = measured.together(_after(steps[:middle]), grids) <= (max_kl or 0.0)
            low, high = (middle, high) if fits else (low, middle - 1)
        count = low
    return Recipe(_after(steps[:count]), told)


Grids = Mapping[str, Mapping[str, Grid]]
"""By scheme, how each weight is rounded."""


def grids_of(module: Module, quantize: Quantize) -> Grids:
    """How the weights of a module are rounded with each scheme, under the options of a pass."""
    return {
        scheme: Quantize(scheme, quantize.block, quantize.symmetric, head="same").grids(
            module, PassContext()
        )
        for scheme in SCHEMES
    }


def check_size(module: Module, grids: Grids, target_size: int) -> None:
    """Check that the weights can be made to take no more bytes; nothing is read.

    Raises:
        InputError: they can't.
    """
    tables, least = _tables(module), weights_in_use(module)
    for name, expr in module.weights.items():
        if any(name in by_name for by_name in grids.values()):
            whole = facts.total_bytes([expr.type])
            least -= whole - min(
                whole, *(_size(module, grids[s][name], name, tables) for s in grids)
            )
    if least > target_size:
        raise InputError(
            f"--target-size {target_size}: with {SCHEMES[-1]} everywhere the weights still "
            f"take {least} bytes"
        )


def _size(module: Module, grid: Grid, name: str, tables: set[str]) -> int:
    """Bytes of a rounded weight, with the floats that stay if an embedding reads them."""
    expr = module.weights[name]
    size = facts.total_bytes(part.type for part in grid.parts(expr).values())
    return size + facts.total_bytes([expr.type]) * (name in tables)


def _steps(trials: Sequence[Trial]) -> list[tuple[Trial, Trial]]:
    """Steps to fewer bits, the fewest nats per byte first; a weight's own stay in their order."""
    chains: dict[str, list[Trial]] = {}
    for trial in trials:
        chain = chains.setdefault(trial.weight, [])
        if not chain or trial.bytes < chain[-1].bytes:
            chain.append(trial)
    steps: list[tuple[Trial, Trial]] = []
    at = dict.fromkeys(chains, 0)

    def price(name: str) -> tuple[float, str]:
        before, after = chains[name][at[name] : at[name] + 2]
        return (after.kl_nats - before.kl_nats) / (before.bytes - after.bytes), name

    while more := [name for name in chains if at[name] + 1 < len(chains[name])]:
        name = min(more, key=price)
        steps.append((chains[name][at[name]], chains[name][at[name] + 1]))
        at[name] += 1
    return steps


def _tables(module: Module) -> set[str]:
    """Weights that stay in the engine because an embedding reads them too."""
    reads = [op for op in module.walk() if isinstance(op, ops.Embed)]
    return {op.table.op.weight for op in reads if isinstance(op.table.op, ops.Weight)}


def _after(steps: Sequence[tuple[Trial, Trial]]) -> dict[str, str]:
    return {after.weight: after.scheme for _, after in steps}


def _told(trial: Trial) -> dict[str, Any]:
    return {
        "weight": trial.weight,
        "scheme": trial.scheme,
        "kl_nats": trial.kl_nats,
        "bytes": trial.bytes,
    }


class _Measured:
    """Runs the model with some of its weights rounded."""

    def __init__(self, module: Module, source: WeightSource, text: HeldOutText) -> None:
        self._module, self._source, self._text = module, source, text
        self._scorer = Scorer(module, source)
        self._original = [self._scorer.logits(window) for window in text.windows]

    def alone(self, grids: Grids, report: Report) -> list[Trial]:
        """Every weight in every scheme, on a few windows."""
        few = range(0, len(self._original), max(1, len(self._original) // FEW))
        names = list(next(iter(grids.values())))
        trials: list[Trial] = []
        tables = _tables(self._module)
        for number, name in enumerate(names):
            report("weights measured", number, len(names))
            whole = facts.total_bytes([self._module.weights[name].type])
            trials.append(Trial(name, "float", 0.0, whole))
            for scheme, by_name in grids.items():
                kl, _ = self._kl({name: by_name[name]}, few)
                size = _size(self._module, by_name[name], name, tables)
                trials.append(Trial(name, scheme, kl, size))
        report("weights measured", len(names), len(names))
        return trials

    def together(self, schemes: Mapping[str, str], grids: Grids) -> float:
        """KL of a recipe and two standard errors of it, on all windows."""
        rounded = {name: grids[scheme][name] for name, scheme in schemes.items()}
        kl, error = self._kl(rounded, range(len(self._original)))
        return kl + 2 * error

    def _kl(self, rounded: Mapping[str, Grid], windows: Sequence[int]) -> tuple[float, float]:
        with self._scorer.replaced(
            {name: self._rounded(name, grid) for name, grid in rounded.items()}
        ):
            costs = [self._cost(self._text.windows[n], self._original[n]) for n in windows]
        return float(np.mean(costs)), float(np.std(costs) / len(costs) ** 0.5)

    def _cost(self, window: Sequence[int], original: NDArray[np.float32]) -> float:
        metrics = LogitMetrics()
        metrics.add(self._scorer.logits(window), original)
        return metrics.report()["kl_nats"]

    def _rounded(self, name: str, grid: Grid) -> torch.Tensor:
        parts: dict[str, WeightExpr] = {**grid.parts(self._module.weights[name])}
        read = {kind: materialize(part, self._source) for kind, part in parts.items()}
        return dequantise(read["codes"], read["scales"], read.get("zeros"), grid.format)


COLUMNS = ("layer", "scheme", "weights", "bytes", "in float")


def table(said: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What `quantize` told, as rows to print under `COLUMNS`."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, entry in said["weights"].items():
        rows.setdefault((_layer(name), entry["scheme"]), []).append(entry)
    return [
        (
            layer,
            scheme,
            str(len(entries)),
            str(sum(entry["bytes"] for entry in entries)),
            str(sum(entry["bytes_float"] for entry in entries)),
        )
        for (layer, scheme), entries in sorted(rows.items(), key=_order)
    ]


def _order(row: tuple[tuple[str, str], Any]) -> tuple[int, str]:
    (layer, scheme), _ = row
    return int(layer) if layer.isdigit() else -1, scheme


def _layer(name: str) -> str:
    """The first number in a dotted name; none has what belongs to no layer."""
    return next((part for part in name.split(".") if part.isdigit()), "–")


def notes(said: Mapping[str, Any]) -> list[str]:
    """One line for each weight that calibration did not reach, and for what stays in float."""
    lines = [
        f"{name}: rounded to the nearest{_experts(entry)}: {entry['reason']}"
        for name, entry in said["weights"].items()
        if entry.get("nearest")
    ]
    kept: dict[str, list[str]] = {}
    for name, reason in said["kept"].items():
        kept.setdefault(reason, []).append(name)
    return lines + [f"in float, {len(names)}: {why}" for why, names in kept.items()]


def _experts(entry: Mapping[str, Any]) -> str:
    experts, tokens = entry["nearest"], entry["tokens"]
    if len(tokens) < 2:
        return ""
    return f", {len(experts)} of {len(tokens)} experts ({', '.join(map(str, experts))})"
