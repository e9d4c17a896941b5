"""`liquidc compile --dry-run`: all that can be checked without reading a weight, and an estimate.

The model is traced and passes run, since neither computes anything; passes that would run the model
on text, or read weights, are left out, and what they save is not counted. With a profile the model
is hashed, to see that the profile is of this model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from pathlib import Path

from liquidc import facts, mixed
from liquidc.effects import calibrates, check_compiled, check_model, mixes
from liquidc.engine import EngineWriter
from liquidc.estimate import Estimate, Work, estimate
from liquidc.heldout import HeldOutText
from liquidc.inputs import ModelInput
from liquidc.ir import Module
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import PassContext
from liquidc.passes.quantize import Quantize
from liquidc.passes.quantize_cache import WINDOWS
from liquidc.passes.stream import ACTIVATIONS, LIVE, widest
from liquidc.passplan import PassPlan, run_passes
from liquidc.pipeline import open_model
from liquidc.plan import FEWER_EXPERTS, CompileOptions, Plan, make_plan
from liquidc.prepare import check_dump, depends_on, read_context, read_ir, trace_for
from liquidc.specialize import Lossy, paths_of

READS_WEIGHTS = ("merge-experts",)
"""Passes that compute with weights."""
NO_SIZE = ("order-experts", "quantize-cache")
"""Passes that take time or text, and on which no number of bytes depends to speak of."""
LIVE_AT_ONCE = 5
"""Memory of calibration, by what `widest` says of the windows: measured on samples/tiny-liquid."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """A compile that could be run.

    Attributes:
        plan: what it would do.
        model: what it would compile.
        estimate: what it would take.
        resumed: bytes that a stopped compile had completed.
    """

    plan: Plan
    model: ModelInput
    estimate: Estimate
    resumed: int


def dry_run(model: Path, output: Path | None, options: CompileOptions) -> DryRun:
    """Check a compile and estimate what it takes; nothing is written.

    Args:
        model: checkpoint directory.
        output: the engine to be; None checks no place.
        options: of the compile.

    Raises:
        InputError: the compile would refuse its model, options, files or output.
        TargetUnavailable: the target can't be built here.
    """
    journal = None
    if output is not None:
        journal = EngineWriter(output, force=options.force, resume=options.resume).look()
    plan = make_plan(options)
    check_dump(options)
    opened = open_model(model)
    if journal is not None:
        journal.check(depends_on(options, opened, plan.backend))
    context = read_context(options, opened, opened.weights)
    start = options.start
    if start is not None and start[0] in ("trace", "passes"):
        traced = read_ir(start[1])
    else:
        traced = trace_for(opened, plan.backend)
    for stage in plan.backend.stages:
        if start is not None and stage.name == start[0] and stage.load is not None:
            stage.load(start[1])
    check_model(options, plan.passes, traced)
    lossy = Lossy(options, opened, plan.passes, context, _quiet)
    lossy.check(traced)
    if options.recipe is not None:
        context = replace(context, recipe=mixed.read_recipe(options.recipe).schemes)
    module, left_out = _without_computing(plan.passes, traced, context, options)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    found = estimate(
        traced,
        module,
        _work(options, plan.passes, lossy, traced, module),
        checkpoint=size,
        copied=sum(map(len, opened.files().values())),
        most=options.target_size,
        at_most=left_out,
    )
    return DryRun(plan, opened, found, 0 if journal is None else journal.noted)


def _quiet(what: str, done: int, total: int) -> None:
    del what, done, total


def _without_computing(
    passes: Sequence[PassPlan], traced: Module, context: PassContext, options: CompileOptions
) -> tuple[Module, bool]:
    """The module after the passes that need neither weights nor text, and whether some may save."""
    ran: list[PassPlan] = []
    left_out = False
    for plan in passes:
        instance = plan.instance
        measured = plan.name == "fix-gates" and options.specialize == "budget"
        chosen = mixes([plan]) and options.recipe is None
        if chosen and options.target_size is not None and isinstance(instance, Quantize):
            module = run_passes(traced, ran, Statistics(), context=context)
            mixed.check_size(module, mixed.grids_of(module, instance), options.target_size)
        if measured or chosen or plan.name in READS_WEIGHTS:
            left_out = True
        elif isinstance(instance, Quantize):
            ran.append(PassPlan(plan.name, replace(instance, method="nearest")))
        elif plan.name not in NO_SIZE:
            ran.append(plan)
    statistics = Statistics()
    module = run_passes(traced, ran, statistics, context=context)
    check_compiled(options, ran, module, statistics)
    return module, left_out


def _work(
    options: CompileOptions,
    passes: Sequence[PassPlan],
    lossy: Lossy,
    traced: Module,
    module: Module,
) -> Work:
    """What is run on text."""
    names = [plan.name for plan in passes]
    work = Work()
    if calibrates(passes):
        text = lossy.calibration_text(traced)
        tokens = sum(map(len, text.windows))
        held = LIVE_AT_ONCE * LIVE * 4 * tokens * widest(facts.main_function(traced))
        if any(plan.options.get("method") == "gptq" for plan in passes):
            work += Work(tokens, len(text.windows), 0, min(held, ACTIVATIONS))
        if "quantize-cache" in names:
            windows = text.windows[:WINDOWS]
            work += Work(2 * sum(map(len, windows)), 2 * len(windows), 0, min(held, ACTIVATIONS))
    if options.specialize == "budget":
        gates = len(facts.model_info(traced, "", "").gates)
        work += _runs(lossy.text(traced).half(0), 1 + gates, copies=1)
    if mixes(passes) and options.recipe is None:
        half = lossy.text(traced).half(0)
        weights = len(module.weights)
        share = min(1.0, mixed.FEW / len(half.windows))
        together = 0 if options.target_size is not None else ceil(log2(2 * weights + 1))
        work += _runs(half, 1 + ceil(2 * weights * share) + together, copies=1)
    if set(names) & set(FEWER_EXPERTS):
        work += _runs(lossy.text(traced).half(1), 2, copies=2)
    if lossy.needed(traced, module):
        paths = len(paths_of(module))
        work += _runs(lossy.text(traced).half(1), 2 + paths, copies=2)
    return work


def _runs(text: HeldOutText, times: int, *, copies: int) -> Work:
    """All windows, so many times."""
    return Work(times * sum(map(len, text.windows)), times * len(text.windows), copies)
