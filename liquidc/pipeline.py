"""From a model to an engine: one loop runs every stage of every target.

    trace → passes → the stages that the backend declares → manifest, hashes, rename

Each stage turns one artefact into the next. `dump` writes what each returned; `start` reads one
back and goes on from there.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liquidc import cost, facts
from liquidc.backends.base import Stage, StageContext
from liquidc.calibrated import CalibratedSource
from liquidc.effects import calibrates, check_compiled, check_model, mixes
from liquidc.engine import EngineWriter, sha256_file
from liquidc.errors import InputError
from liquidc.inputs import DirectoryInput, ModelInput, ModuleInput
from liquidc.ir import Module, print_module
from liquidc.ir.rewriter import Statistics
from liquidc.manifest import SCHEMA, Manifest, PassInfo
from liquidc.measure import Measured, measured
from liquidc.passes.base import PassContext
from liquidc.passes.stream import one_thread
from liquidc.passlog import PassLog, PassRecord
from liquidc.passplan import run_passes
from liquidc.plan import FEWER_EXPERTS, CompileOptions, Plan, make_plan
from liquidc.prepare import check_dump, depends_on, read_context, read_ir, tools, trace_for
from liquidc.profile import Profile
from liquidc.progress import Progress, Silent
from liquidc.records import canonical
from liquidc.report import REPORT, report_data, report_page
from liquidc.specialize import Lossy
from liquidc.version import __version__

if TYPE_CHECKING:
    import torch

IR_SUFFIX = ".ir"


@dataclass(frozen=True, slots=True)
class StageTime:
    """What one stage took: see `Measured`."""

    name: str
    seconds: float
    peak_rss_bytes: int
    bytes_read: int
    bytes_written: int

    @classmethod
    def of(cls, name: str, took: Measured) -> StageTime:
        """What was measured of a stage."""
        return cls(name, *astuple(took))


@dataclass(frozen=True, slots=True)
class Compiled:
    """A finished compile.

    Attributes:
        engine: the directory.
        manifest: what it says.
        stages: what each stage took, in order.
        statistics: what the passes' rules did.
        resumed: bytes that a stopped compile had written and this one took up.
    """

    engine: Path
    manifest: Manifest
    stages: tuple[StageTime, ...]
    statistics: Statistics
    resumed: int = 0

    @property
    def seconds(self) -> float:
        """Time of all stages together."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident memory over all stages."""
        return max(stage.peak_rss_bytes for stage in self.stages)


def open_model(model: str | Path | torch.nn.Module) -> ModelInput:
    """A checkpoint directory or a module, checked without reading weights.

    Raises:
        InputError: it can't be compiled.
    """
    opened: ModelInput
    opened = DirectoryInput(Path(model)) if isinstance(model, str | Path) else ModuleInput(model)
    opened.check()
    return opened


def compile_model(
    model: str | Path | torch.nn.Module,
    output: str | Path,
    options: CompileOptions | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Compile `model` into the engine directory `output`; all of it, or nothing.

    If it is interrupted or the disk is full, `output.partial` keeps what is complete for the option
    `resume`.

    Raises:
        InputError: the model, the options or the output are wrong.
        TargetUnavailable: the target can't be built here.
    """
    options = options or CompileOptions()
    writer = EngineWriter(Path(output), force=options.force, resume=options.resume)
    writer.check()
    plan = make_plan(options)
    check_dump(options)
    opened = open_model(model)
    source = CalibratedSource(opened.weights, writer.scratch, writer.journal)
    with writer:
        run = _Run(plan, options, opened, source, writer, progress or Silent())
        manifest = run.everything()
        resumed = writer.journal.resumed
        with measured() as took:
            manifest = writer.commit(manifest, _build_log(opened, run.times, resumed, run.ops))
        run.times.append(StageTime.of("commit", took))
    return Compiled(writer.output, manifest, tuple(run.times), run.statistics, resumed)


@dataclass
class _Run:
    """One compile under way."""

    plan: Plan
    options: CompileOptions
    model: ModelInput
    source: CalibratedSource
    writer: EngineWriter
    progress: Progress
    times: list[StageTime] = field(default_factory=list[StageTime])
    statistics: Statistics = field(default_factory=Statistics)
    records: list[PassRecord] = field(default_factory=list[PassRecord])
    of_experts: list[tuple[str, Module, Module]] = field(
        default_factory=list[tuple[str, "Module", "Module"]]
    )
    dumped: int = 0
    ops: int = 0

    def __post_init__(self) -> None:
        self.passes = self.plan.passes
        self.directory = self.writer.path

    def everything(self) -> Manifest:
        """Run all stages; returns the manifest without `files`."""
        self._timed("hash", self._begin)
        context = read_context(self.options, self.model, self.source)
        start = self.options.start
        if start is not None and start[0] in ("trace", "passes"):
            traced = read_ir(start[1])
        else:
            traced = self._timed("trace", self._trace)
        self.ops = sum(1 for _ in traced.walk())
        check_model(self.options, self.passes, traced)
        with one_thread():  # what is measured goes into the manifest
            module, fidelity = self._transformed(traced, context)
        artifact = self._backend_stages(module)
        files = self.model.files()
        for name, data in sorted(files.items()):
            (self.directory / name).write_bytes(data)
        manifest = self._timed("manifest", lambda: self._manifest(module, artifact, fidelity))
        self._timed("report", lambda: self._report(manifest, module, traced, context.profile))
        self._timed("seal", self.writer.seal)
        return manifest

    def _transformed(
        self, traced: Module, context: PassContext
    ) -> tuple[Module, dict[str, Any] | None]:
        """The module after the passes, and what a lossy compile measured."""
        if self.options.start is not None and self.options.start[0] == "passes":
            return traced, None
        lossy = Lossy(self.options, self.model, self.plan.passes, context, self.progress.part)
        lossy.check(traced)
        if calibrates(self.passes):
            context = replace(context, calibration=lossy.calibration(traced, self.source))
        if self.options.specialize == "budget":
            self.passes = self._timed("specialize", lambda: lossy.choose(traced))
        recipe = self._timed("recipe", lambda: lossy.recipe(traced)) if mixes(self.passes) else None
        if recipe is not None:
            context = replace(context, recipe=recipe.schemes)
        module = self._timed("passes", lambda: self._passes(traced, context))
        check_compiled(self.options, self.passes, module, self.statistics)
        if recipe is not None:
            self.statistics.facts["quantize"]["recipe"] = recipe.told
        for name, before, after in self.of_experts:
            said = self.statistics.facts[name]
            self._timed(
                name, lambda b=before, a=after, said=said: lossy.measure_experts(traced, b, a, said)
            )
        if not lossy.needed(traced, module):
            return module, None
        fidelity = self._timed("measure", lambda: lossy.measure(traced, module))
        self.statistics.facts.setdefault("fix-gates", {}).update(lossy.told)
        return module, fidelity

    def _begin(self) -> None:
        """Start the journal, or go on with it."""
        journal = self.writer.journal
        if self.options.resume and not journal.started:
            self.progress.note("nothing to resume: compiling from the start")
        journal.begin(depends_on(self.options, self.model, self.plan.backend))

    def _trace(self) -> Module:
        module = trace_for(self.model, self.plan.backend)
        self._dump("trace", IR_SUFFIX, lambda path: path.write_text(print_module(module)))
        return module

    def _passes(self, module: Module, context: PassContext) -> Module:
        log = PassLog(module, self.statistics)
        self.records = log.records
        names, before = [plan.name for plan in self.passes] + [""], module

        def after(name: str, changed: Module) -> None:
            nonlocal before
            if name in FEWER_EXPERTS:
                self.of_experts.append((name, before, changed.clone()))
            log.after(name, changed)
            if names[len(log.records)] in FEWER_EXPERTS:
                before = changed.clone()
            self._dump(name, IR_SUFFIX, lambda path: path.write_text(print_module(changed)))

        return run_passes(
            module,
            self.passes,
            self.statistics,
            context=context,
            verify_each=self.options.verify_each,
            after=after,
        )

    def _backend_stages(self, module: Module) -> dict[str, Any]:
        if (hint := self.plan.backend.hint(module, self.options.choices)) is not None:
            self.progress.note(hint)
        context = StageContext(
            self.directory,
            self.source,
            self.progress.advance,
            self.options.choices,
            self.writer.journal,
        )
        start = self.options.start
        stages = list(self.plan.backend.stages)
        names = [stage.name for stage in stages]
        artifact: Any = module
        if start is not None and start[0] in names:
            at = names.index(start[0])
            load = stages[at].load
            if load is None:
                raise InputError(f"the stage {start[0]} can't be started from")
            artifact = load(start[1])
            stages = stages[at + 1 :]
        total = facts.total_bytes(expr.type for expr in module.weights.values())
        for stage in stages:
            last = stage is stages[-1]
            given = artifact
            artifact = self._timed(
                stage.name,
                lambda stage=stage, given=given: stage.run(given, context),
                total if last else 0,
            )
            self._dump_stage(stage, artifact)
        return artifact

    def _manifest(
        self, module: Module, artifact: dict[str, Any], fidelity: dict[str, Any] | None
    ) -> Manifest:
        backend = self.plan.backend
        said = self.statistics.facts
        passes = [PassInfo(p.name, p.options, said.get(p.name)) for p in self.passes]
        if self.options.start is not None:
            stage, path = self.options.start
            passes.insert(0, PassInfo("start-from", {"stage": stage, "sha256": sha256_file(path)}))
        guard = cost.guard_info(module, said.get("fix-depth", {}).get("paths", {}))
        if tried := said.get("specialize-depth", {}).get("path"):
            guard = said["specialize-depth"]
            guard = {"path": tried, "gates": guard["path_gates"], "miss_rate": guard["miss_rate"]}
        return Manifest(
            schema=SCHEMA,
            liquidc=__version__,
            model=facts.model_info(module, self.model.type, self.model.sha256),
            target=backend.target(),
            passes=tuple(passes),
            functions=facts.entry_points(module),
            files={},
            tools=tools(backend),
            cost=cost.cost_info(module),
            artifact=artifact if guard is None else {**artifact, "guard": guard},
            cache=facts.cache_info(module),
            fidelity=fidelity,
        )

    def _report(
        self, manifest: Manifest, module: Module, traced: Module, profile: Profile | None
    ) -> None:
        data = report_data(manifest, module, traced, profile, self.records)
        (self.directory / REPORT).write_text(report_page(data), encoding="utf-8")

    def _timed(self, name: str, work: Any, total: int = 0) -> Any:
        self.progress.stage(name, total)
        with measured() as took:
            result = work()
        self.times.append(StageTime.of(name, took))
        self.progress.done(name, took.seconds)
        return result

    def _dump_stage(self, stage: Stage, artifact: Any) -> None:
        if stage.dump is not None:
            dump = stage.dump
            self._dump(stage.name, stage.suffix, lambda path: dump(artifact, path))

    def _dump(self, name: str, suffix: str, write: Callable[[Path], object]) -> None:
        if self.options.dump is None:
            return
        self.options.dump.mkdir(parents=True, exist_ok=True)
        write(self.options.dump / f"{self.dumped:02d}-{name}{suffix}")
        self.dumped += 1


def _build_log(model: ModelInput, stages: Sequence[StageTime], resumed: int, ops: int) -> bytes:
    """What differs from run to run, and is therefore no part of the engine; ops were traced."""
    return canonical(
        {
            "schema": SCHEMA,
            "liquidc": __version__,
            "source": None if model.origin is None else str(model.origin),
            "host": platform.node(),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": sum(stage.seconds for stage in stages),
            "peak_rss_bytes": max(stage.peak_rss_bytes for stage in stages),
            "bytes_resumed": resumed,
            "ops": ops,
            "stages": [asdict(stage) for stage in stages],
        }
    )
