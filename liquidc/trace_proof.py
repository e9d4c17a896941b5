"""Proof that skipping is real: what the gates decided against what the target's profiler saw.

Both sides are integers over the same run. The gates' side says how many tokens each region that a
gate opens has to compute, from what the gates decided; the trace's side counts the rows that the
work there had, as the profiler recorded them. Equal numbers for each region mean that a skipped
token cost no row of work. Experts likewise: tokens sent to an expert against rows that it computed;
identity experts compute none. To a shared expert that was fused with the others go all tokens that
run the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liquidc.backends.base import Runner, Trace
from liquidc.ir.regions import Key
from liquidc.manifest import RegionInfo
from liquidc.runtime import Engine
from liquidc.session import CHUNK, DepthControls, StepResult


@dataclass(frozen=True, slots=True)
class RegionCount:
    """Tokens that a region of a gate had to compute, and that it computed by the trace."""

    gate: int
    number: int
    computed: int
    traced: int


@dataclass(frozen=True, slots=True)
class Proof:
    """Tokens run by gate and by expert, as decided and as traced.

    A gate that was fixed at compile time decides nothing, and nothing stands behind it: it counts
    as 0 on both sides. `free` gates are left. Behind a gate that is a branch or a mask, tokens are
    computed that do not run: `computed` says how many tokens the lowering has to compute. A gate
    that opens several `regions` has the numbers of the one that computes most. Of gates in
    `not_shown` some work is neither proven nor disproven: under a mask, without a product, or where
    something else than gates decides too. What the experts of a layer compute is not shown where
    they are one operator, in `experts_fused`.
    """

    gates: tuple[int, ...]
    gates_traced: tuple[int, ...]
    experts: dict[int, dict[int, int]]
    experts_traced: dict[int, dict[int, int]]
    experts_fused: frozenset[int]
    tokens: int
    free: int
    computed: tuple[int, ...]
    regions: tuple[RegionCount, ...] = ()
    not_shown: tuple[int, ...] = ()

    @property
    def holds(self) -> bool:
        """True if no region did more or less than decided, and no expert that is not fused."""
        return (
            self.computed == self.gates_traced
            and all(region.computed == region.traced for region in self.regions)
            and all(
                _nonzero(decided) == _nonzero(self.experts_traced.get(layer, {}))
                for layer, decided in self.experts.items()
                if layer not in self.experts_fused
            )
        )

    @property
    def covers(self) -> bool:
        """True if every gate's work was computed for at least the tokens that it let run."""
        return all(a <= b for a, b in zip(self.gates, self.gates_traced, strict=True))

    def report(self) -> dict[str, Any]:
        """The JSON keys of the proof."""
        layers = sorted(self.experts_traced)
        return {
            "layers_run_by_gates": sum(self.gates),
            "layers_computed": sum(self.computed),
            "layers_run_by_trace": sum(self.gates_traced),
            "layers_offered": self.free * self.tokens,
            "gates_run": list(self.gates),
            "gates_computed": list(self.computed),
            "gates_run_traced": list(self.gates_traced),
            "gates_not_shown": list(self.not_shown),
            "regions": [
                {
                    "gate": region.gate,
                    "region": region.number,
                    "computed": region.computed,
                    "traced": region.traced,
                }
                for region in self.regions
            ],
            "experts_run_by_routes": sum(sum(self.experts[n].values()) for n in layers),
            "experts_run_by_trace": sum(sum(self.experts_traced[n].values()) for n in layers),
            "experts_traced_layers": layers,
            "experts_not_shown_layers": [
                layer
                for layer, decided in sorted(self.experts.items())
                if _nonzero(decided) and layer not in self.experts_traced
            ],
        }


def prove(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    depth: DepthControls | None = None,
) -> Proof:
    """Run prompts under the target's profiler, then decode, and compare.

    Args:
        engine: the engine; it is run on a second runner, the profiled one.
        prompts: token ids; each is fed whole, then continued greedily.
        new_tokens: decoding steps after each prompt.
        depth: how deep to run.
    """
    infos = engine.manifest.model.gates
    fixed = [bool(gate.fixed) for gate in infos]
    gates, masked = [0] * len(fixed), [0] * len(fixed)
    computed: dict[Key, int] = {
        (gate, region.number): 0
        for gate, info in enumerate(infos)
        for region in info.regions
        if region.shown
    }
    experts: dict[int, Counter[int]] = {
        info.layer: Counter() for info in engine.manifest.model.experts
    }
    context = engine.manifest.model.context
    tokens = 0

    def count(result: StepResult) -> None:
        nonlocal tokens
        tokens += result.gates.shape[2]
        for gate, info in enumerate(infos):
            if not fixed[gate]:
                gates[gate] += int(result.gates[gate].sum())
                masked[gate] += result.gates[gate].size
            for region in info.regions:
                if region.shown:
                    computed[gate, region.number] += _computed(region, result.gates)
        for info in engine.manifest.model.experts:
            chosen, counter = result.experts[info.layer], experts[info.layer]
            used = (int(e) for e in chosen.ravel() if 0 <= e < info.experts - info.identity)
            counter.update(info.places[e] if info.places else e for e in used)
            ran = int((chosen >= 0).any(-1).sum())
            counter.update({info.experts + slot: ran for slot in range(info.shared)})

    def work(runner: Runner) -> None:
        profiled = engine.with_runner(runner)
        for prompt in prompts:
            steps = new_tokens if context is None else min(new_tokens, context - len(prompt))
            session = profiled.session(capacity=len(prompt) + steps)
            result = session.prefill(prompt, depth=depth)
            count(result)
            for _ in range(steps):
                result = session.step([int(result.logits[0, -1].argmax())], depth=depth)
                count(result)

    trace: Trace = engine.runner.profile(work)
    regions = tuple(
        RegionCount(*key, count, trace.regions.get(key, 0)) for key, count in computed.items()
    )
    due, traced, not_shown = list(gates), list(gates), list[int]()
    for gate, info in enumerate(infos):
        mine = [region for region in regions if region.gate == gate]
        if mine:
            due[gate] = max(region.computed for region in mine)
            traced[gate] = max(region.traced for region in mine)
        elif not info.regions and not fixed[gate]:
            due[gate] = masked[gate]
            traced[gate] = trace.regions.get((gate, 0), masked[gate])
        told = (gate, 0) in trace.regions if not info.regions else len(mine) == len(info.regions)
        if not told and not fixed[gate]:
            not_shown.append(gate)
    return Proof(
        tuple(gates),
        tuple(traced),
        {layer: dict(counter) for layer, counter in experts.items()},
        trace.experts,
        trace.fused,
        tokens,
        fixed.count(False),
        tuple(due),
        regions,
        tuple(not_shown),
    )


def _computed(region: RegionInfo, gates: NDArray[np.bool_]) -> int:
    """Tokens that a region computes, of decisions bool[G, 1, T] that were fed in chunks."""
    count = 0
    for at in range(0, gates.shape[2], CHUNK):
        chunk = gates[:, :, at : at + CHUNK]
        runs = chunk[list(region.masks)].all(0)
        reached = all(chunk[list(masks)].all(0).any() for masks in region.within)
        barred = any(chunk[list(masks)].all(0).any() for masks in region.without)
        if runs.any() and reached and not barred:
            count += int(runs.sum()) if region.lowering == "compact" else runs.size
    return count


def _nonzero(counts: dict[int, int]) -> dict[int, int]:
    return {expert: count for expert, count in counts.items() if count}
