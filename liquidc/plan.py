"""What a compile is asked for, and what it will do: target, passes, stages."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import cast

from liquidc.backends.base import Backend, Choices
from liquidc.backends.registry import get_backend
from liquidc.effects import check_plan, check_start, check_without
from liquidc.engine import sha256_file
from liquidc.errors import InputError, TargetUnavailable
from liquidc.files import check_regular
from liquidc.option_text import Named, parse_named
from liquidc.passes.registry import PROFILED
from liquidc.passplan import PassPlan, default_passes, plan_passes, profiled_passes
from liquidc.records import check_fields

WHOLE = ("hoist-common", "group-experts", "order-experts")
"""After these passes a layer is still one conditional with one op for its experts."""
FEWER_EXPERTS = ("prune-experts", "merge-experts")
"""After these passes the profile speaks of other experts."""
NO_BYTES = ("verify_each", "dump", "force", "resume")
"""Options on which no byte of an engine depends."""


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """How to compile.

    Attributes:
        target: name of the backend.
        passes: names instead of the target's own, in order, with options as `name{key=value}`.
        without: names of passes to leave out.
        add: names of passes to run besides, where the model's layers are still whole.
        profile: what `liquidc profile` measured of this model: adds the passes that use it.
        machine: a file of `bench/machine_table.py`, instead of the table that comes with liquidc.
        specialize: "exact" adds what the profile suggests and changes no result; "budget" also
            fixes gates as far as `max_kl` allows.
        quantize: scheme of the weights, with options of the pass `quantize`: `int4{block=64}`.
        quantize_cache: scheme of keys and values, `int8`.
        calibration: text to calibrate on, as `quantize{method=gptq}` and `quantize-cache` do.
        portable_weights: dequantise codes by an operator of the ONNX standard.
        fused_experts: make the experts of a layer one operator, which hides which of them ran.
        recipe: file that names a scheme for each weight, for `quantize="mixed"`.
        target_size: bytes of weights to reach, for `quantize="mixed"`.
        max_kl: mean KL(original || compiled) in nats per token that a lossy compile may cost;
            None for 0.01 with `specialize="budget"`, else no limit.
        data: held-out text to measure a lossy compile on; default: heldout.txt of the model.
        verify_each: check the IR after every pass.
        dump: directory that gets each stage's artefact.
        start: stage whose artefact is read from a file instead of being computed.
        force: replace an engine that is there.
        resume: go on where a compile stopped.

    Raises:
        InputError: a value is of another type.
    """

    target: str = "onnxruntime"
    passes: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    profile: Path | None = None
    machine: Path | None = None
    specialize: str = ""
    quantize: str = ""
    quantize_cache: str = ""
    portable_weights: bool = False
    fused_experts: bool = False
    calibration: Path | None = None
    recipe: Path | None = None
    target_size: int | None = None
    max_kl: float | None = None
    data: Path | None = None
    verify_each: bool = False
    dump: Path | None = None
    start: tuple[str, Path] | None = None
    force: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except ValueError as error:
            raise InputError(f"the option {error}") from None

    @property
    def choices(self) -> Choices:
        """Lowerings that are asked for."""
        return Choices(self.portable_weights, self.fused_experts)

    def told(self) -> dict[str, str]:
        """What an engine's bytes depend on, by name; files by their hashes.

        Raises:
            InputError: a file can't be read.
        """
        names = [field.name for field in fields(self) if field.name not in NO_BYTES]
        return {name: _told(getattr(self, name)) for name in names}


def _told(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_told, cast(tuple[object, ...], value)))
    if not isinstance(value, Path):
        return str(value)
    check_regular(value, InputError)
    try:
        return sha256_file(value)
    except OSError as error:
        raise InputError(f"{value}: can't be read ({error.strerror})") from None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a compile will do.

    Attributes:
        backend: the target.
        passes: the passes that run, in order.
        stages: all stages, the two that every target has in front.
    """

    backend: Backend
    passes: tuple[PassPlan, ...]
    stages: tuple[str, ...]


def make_plan(options: CompileOptions) -> Plan:
    """What `options` mean.

    Raises:
        InputError: an unknown target, pass or stage, a stage that can't be started from, or an
            option that would do nothing.
        TargetUnavailable: the target can't be built here.
    """
    backend = get_backend(options.target)
    for name, asked in asdict(options.choices).items():
        if asked and name not in backend.choices:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"the target {backend.name} has no {flag}: leave it out")
    stages = ("trace", "passes", *(stage.name for stage in backend.stages))
    if options.start is not None:
        name = options.start[0]
        loads = {stage.name: stage.load is not None for stage in backend.stages}
        if name not in stages:
            raise InputError(f"no stage {name!r}; {backend.name} has {', '.join(stages)}")
        if not loads.get(name, True):
            raise InputError(f"the stage {name} can't be started from: its artefact has no file")
        if not options.start[1].is_file():
            raise InputError(f"{options.start[1]}: no such file to start from")
        check_start(options, name)
    passes: tuple[PassPlan, ...] = ()
    if options.start is None or options.start[0] != "passes":
        names, asked = _pass_names(options, backend)
        passes = plan_passes(names, options.without)
        check_without(options.without, [bare_name(name) for name in names], asked)
        check_plan(options, passes)
    reason = backend.availability()
    if reason is not None:
        raise TargetUnavailable(f"the target {backend.name} can't be built here: {reason}")
    return Plan(backend, passes, stages)


def _pass_names(options: CompileOptions, backend: Backend) -> tuple[list[str], list[str]]:
    """The passes to run, as text; and the names of those that were asked for besides `passes`."""
    if options.specialize not in ("", "exact", "budget"):
        raise InputError(f"specialize is exact or budget, not {options.specialize!r}")
    if options.specialize and options.profile is None:
        raise InputError("to specialise a model takes a profile: give one with --profile P.json")
    added = [str(parse_named(text, "pass")) for text in options.add]
    if options.passes is not None:
        names = list(options.passes)
    else:
        names = default_passes(backend) if options.profile is None else profiled_passes(backend)
        given = {bare_name(name) for name in added}
        other = {"order-experts"} if given & set(FEWER_EXPERTS) else set[str]()
        names = [name for name in names if name not in other | (given & PROFILED.keys())]
    if options.specialize == "exact":
        added.append("specialize-depth")
    if options.specialize == "budget":
        added.append("fix-gates")
    asked = {"quantize-cache": options.quantize_cache, "quantize": options.quantize}
    quantising = [_scheme(name, text) for name, text in asked.items() if text]
    if quantising:
        # Before a layer's conditional becomes a mask or its tokens are compacted: which tokens run
        # a layer is then still to be seen, and what lowering is best depends on the bytes to read.
        at = names.index("fuse-linear") + 1 if "fuse-linear" in names else len(names)
        names[at:at] = quantising
        if "eliminate-dead" not in names[at:]:
            names.append("eliminate-dead")
    wanted = [bare_name(name) for name in (*added, *quantising)]
    if options.specialize == "budget":
        added.append("eliminate-dead")
    if added:
        bare = [bare_name(name) for name in names]
        at = max((bare.index(name) + 1 for name in WHOLE if name in bare), default=0)
        names[at:at] = added
    return names, wanted


def bare_name(text: str) -> str:
    """The name of a pass without its options."""
    return text.partition("{")[0].strip()


def _scheme(name: str, text: str) -> str:
    """The pass for a scheme with options, `int4{block=64}`."""
    given = parse_named(text, "scheme")
    if "scheme" in given.options:
        raise InputError(f"{text!r}: the scheme is {given.name} already; leave scheme= out")
    return str(Named(name, {"scheme": given.name, **given.options}))
