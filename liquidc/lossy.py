"""What lossy expert passes cost: the error of each layer's experts, and how many are still used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from liquidc import facts
from liquidc.errors import InputError
from liquidc.ir import Block, Module, Op, Value, ops
from liquidc.ir.interpreter import Frame, Interpreter, first_call
from liquidc.ir.rewriter import Refusal, Rewriter
from liquidc.ir.weight_maths import Take
from liquidc.ir.weights import WeightSource
from liquidc.passes.routed_experts import Routed, readers, routed, routers

COLUMNS = ("layer", "tokens", "relative error", "top-k overlap", "experts with too few tokens")


@dataclass(frozen=True, slots=True)
class LayerError:
    """One layer with experts, over the tokens that ran it.

    Attributes:
        layer: the layer.
        tokens: how many.
        error: Σ‖y − y'‖² / Σ‖y‖² of the experts' outputs before and after, on the same inputs.
        overlap: the share of the tokens' experts that are still used, itself or as an alias of
            what it was merged into, when the changed model runs by itself.
    """

    layer: int
    tokens: int
    error: float
    overlap: float


def measure(
    before: Module, after: Module, source: WeightSource, sequences: Sequence[Sequence[int]]
) -> list[LayerError]:
    """Run a module before and after passes on token ids, and compare their experts.

    Args:
        before: with its experts in one op each.
        after: what `prune-experts` or `merge-experts` made of it.
        source: where the weights are.
        sequences: calibration text; each sequence starts with an empty cache.

    Returns:
        One entry for each layer whose experts are found and were used, in order.

    Raises:
        InputError: there are no tokens.
    """
    if not any(len(ids) for ids in sequences):
        raise InputError("no tokens to measure on: give calibration data")
    pairs = _pairs(before, after)
    if not pairs:
        return []
    shared: dict[str, torch.Tensor] = {}  # a pass gives a weight that it changes a new name
    new = Interpreter(after, source, weights=shared)
    old = _Comparing(before, source, weights=shared, pairs=pairs, other=new)
    main = facts.main_function(before)
    kept = {pair.layer: pair for pair in pairs.values()}
    shares: dict[int, list[float]] = {layer: [] for layer in kept}
    for ids in sequences:
        inputs = first_call(main.args, ids)
        chosen, now = (run.run(main.name, inputs)["experts"] for run in (old, new))
        for layer, pair in kept.items():
            shares[layer] += _overlap(chosen[layer, 0], now[layer, 0], pair)
    return [
        LayerError(
            layer,
            len(shares[layer]),
            old.errors[layer] / old.sizes[layer] if old.sizes[layer] else 0.0,
            sum(shares[layer]) / len(shares[layer]),
        )
        for layer in sorted(kept)
        if shares[layer]
    ]


def note(errors: Sequence[LayerError], said: Mapping[str, Any]) -> None:
    """Add what was measured to what a pass left in `Statistics.facts`, layer by layer."""
    found = {error.layer: error for error in errors}
    for entry in said["layers"]:
        if (error := found.get(entry["layer"])) is not None:
            entry["measured"] = {
                "tokens": error.tokens,
                "relative_error": error.error,
                "top_k_overlap": error.overlap,
            }


def table(said: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows to print under `COLUMNS`; of a layer that the pass left alone, why."""
    rows: list[tuple[str, ...]] = []
    for entry in said["layers"]:
        if (found := entry.get("measured")) is None:
            rows.append((str(entry["layer"]), "", "", "", entry.get("reason", "not measured")))
            continue
        rows.append(
            (
                str(entry["layer"]),
                str(found["tokens"]),
                f"{found['relative_error']:.3%}",
                f"{found['top_k_overlap']:.1%}",
                ", ".join(map(str, entry.get("starved", []))) or "–",
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class _Pair:
    """A layer's experts before and after.

    Attributes:
        layer: the layer.
        steps: the ops to run again, from the router's linear to the experts.
        given: by a value that they read from outside, the value before.
        originals: by an expert's number after, its number before.
        merged: by an expert's number before, that of its weights after merging.
    """

    layer: int
    steps: tuple[Op, ...]
    given: dict[Value, Value]
    originals: torch.Tensor
    merged: torch.Tensor


def _pairs(before: Module, after: Module) -> dict[Op, _Pair]:
    """By the op that holds experts before, what it is compared with."""
    layers = [info.layer for info in facts.model_info(before, "", "").experts]
    found: dict[Op, _Pair] = {}
    sides = [(routers(facts.main_function(module)), readers(module)) for module in (before, after)]
    (old, old_users), (new, new_users) = sides
    for layer, olds, news in zip(layers, old, new, strict=True):
        for one, other in zip(olds, news, strict=True):
            rw = Rewriter(Block(), [])
            try:
                a, b = routed(one, old_users, rw), routed(other, new_users, rw)
            except Refusal:
                continue  # neither pass changes what it does not find
            found[a.holder] = _pair(layer, a, b, before, after)
    return found


def _pair(layer: int, old: Routed, new: Routed, before: Module, after: Module) -> _Pair:
    aliases = [op for op in new.ops if isinstance(op, ops.Renumber)]
    made = {value for op in new.ops for value in op.results}
    same = [op for op in new.ops if op not in aliases]
    given = {
        theirs: ours
        for a, b in zip(old.ops, same, strict=True)
        for ours, theirs in zip(a.operands, b.operands, strict=True)
        if theirs not in made and not isinstance(theirs.op, ops.Weight)
    }
    numbers = range(before.weights[old.router].sizes[0])
    old_weight, new_weight = before.weights[old.router], after.weights[new.router]
    if isinstance(new_weight, Take) and new_weight.x == old_weight:
        originals = new_weight.index
    else:
        originals = numbers
    merged = aliases[0].table if aliases else numbers
    return _Pair(layer, new.ops, given, torch.tensor(originals), torch.tensor(merged))


def _overlap(chosen: torch.Tensor, now: torch.Tensor, pair: _Pair) -> list[float]:
    """For each token that had experts, i64[T, k], the share of them that it still uses."""
    shares: list[float] = []
    for old, new in zip(chosen, now, strict=True):
        if (wanted := old[old >= 0]).numel():
            used = pair.merged[pair.originals[new[new >= 0]]]
            shares.append(float(torch.isin(pair.merged[wanted], used).double().mean()))
    return shares


@dataclass(slots=True, kw_only=True)
class _Comparing(Interpreter):
    """Runs the experts of another module on the inputs of this one's."""

    other: Interpreter
    pairs: dict[Op, _Pair]
    errors: dict[int, float] = field(default_factory=dict[int, float])
    sizes: dict[int, float] = field(default_factory=dict[int, float])

    def _op(self, op: Op, frame: Frame) -> Sequence[torch.Tensor]:
        outputs = Interpreter._op(self, op, frame)
        if op in self.pairs:
            pair, y = self.pairs[op], outputs[0].double()
            other = self._again(pair, frame).double()
            for sums, x in ((self.errors, y - other), (self.sizes, y)):
                sums[pair.layer] = sums.get(pair.layer, 0.0) + float(x.square().sum())
        return outputs

    def _again(self, pair: _Pair, frame: Frame) -> torch.Tensor:
        """What the experts after compute from the values before."""
        values = {theirs: frame.values[ours] for theirs, ours in pair.given.items()}
        new = Frame(values, frame.dims)
        for op in pair.steps:
            for value in op.operands:
                if isinstance(value.op, ops.Weight):
                    new.values[value] = self.other.weight(value.op.weight)
            new.values |= dict(zip(op.results, Interpreter._op(self.other, op, new), strict=True))
        return new.values[pair.steps[-1].result]
