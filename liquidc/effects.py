"""Options that would do nothing are refused, each as soon as that is known.

Three moments: when the passes are planned, when the model is traced, and when the passes have run.
`force`, `resume`, `verify_each` and `dump` change no byte of an engine and are always allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from liquidc import facts
from liquidc.errors import InputError
from liquidc.ir import Module, ops
from liquidc.ir.rewriter import Statistics
from liquidc.passes.quantize import MIXED
from liquidc.passes.registry import PASSES, is_lossy
from liquidc.passplan import PassPlan

if TYPE_CHECKING:
    from liquidc.plan import CompileOptions

ONCE = {"specialize-depth"} | {name for name in PASSES if is_lossy(name)}
"""Passes of which a second run finds nothing left to do."""
OF_PASSES = {
    "passes": "--passes",
    "without": "--no-pass",
    "add": "--add-pass",
    "machine": "--machine",
    "specialize": "--specialize",
    "quantize": "--quantize",
    "quantize_cache": "--quantize-cache",
    "calibration": "--calibration",
    "recipe": "--recipe",
    "target_size": "--target-size",
    "max_kl": "--max-kl",
    "data": "--data",
}
"""Options that say which passes run, or that only passes read, with their flags."""
OF_LOWERING = {"portable_weights": "--portable-weights", "fused_experts": "--fused-experts"}
"""Options that only a target's first stage reads, with their flags."""


def calibrates(passes: Sequence[PassPlan]) -> bool:
    """Whether a pass runs the model on calibration text."""
    return any(p.name == "quantize-cache" or p.options.get("method") == "gptq" for p in passes)


def mixes(passes: Sequence[PassPlan]) -> bool:
    """Whether a pass takes the scheme of each weight from a recipe."""
    return any(p.options.get("scheme") == MIXED for p in passes)


def check_start(options: CompileOptions, stage: str) -> None:
    """Refuse options of work that a compile which starts from the artefact of `stage` skips.

    Where the artefact is a target's own, the passes run all the same: the manifest describes the
    engine by the module that they give.

    Raises:
        InputError: an option would do nothing.
    """
    late = {"trace": {}, "passes": OF_PASSES}.get(stage, OF_LOWERING)
    default = type(options)()
    for name, flag in late.items():
        if getattr(options, name) != getattr(default, name):
            raise InputError(
                f"{flag} does nothing when a compile starts from the stage {stage}, which is "
                "behind what it changes: leave it out"
            )


def check_plan(options: CompileOptions, passes: Sequence[PassPlan]) -> None:
    """Refuse options that no pass of the plan reads.

    Raises:
        InputError: an option would do nothing, or contradicts another one.
    """
    names = [plan.name for plan in passes]
    if twice := [name for name in dict.fromkeys(names) if name in ONCE and names.count(name) > 1]:
        raise InputError(f"the pass {twice[0]} is asked for twice: a second run changes nothing")
    lossy = any(map(is_lossy, names))
    measured = lossy or ("fix-depth" in names and options.profile is not None)
    mixed = mixes(passes)
    needs = [
        (
            options.portable_weights and "quantize" not in names,
            "--portable-weights says how codes are read, and nothing is quantized: give --quantize",
        ),
        (
            options.fused_experts and "quantize" not in names,
            "--fused-experts takes experts of few bits, and nothing is quantized: give --quantize",
        ),
        (
            options.calibration is not None and not calibrates(passes),
            "nothing calibrates: --calibration is for --quantize SCHEME{method=gptq} and "
            "--quantize-cache",
        ),
        (
            not mixed and (options.recipe is not None or options.target_size is not None),
            "--recipe and --target-size are for --quantize mixed",
        ),
        (
            options.recipe is not None and options.target_size is not None,
            "--recipe and --target-size both say what each weight gets: give one of them",
        ),
        (
            mixed and all(v is None for v in (options.recipe, options.target_size, options.max_kl)),
            "--quantize mixed needs --target-size, --max-kl or --recipe",
        ),
        (
            options.max_kl is not None and not 0 <= options.max_kl < float("inf"),
            f"--max-kl is 0 nats or more, not {options.max_kl}",
        ),
        (
            options.max_kl is not None and not lossy,
            "--max-kl bounds what a lossy compile costs, and nothing here is lossy: give "
            "--specialize budget, --quantize or a lossy pass",
        ),
        (
            options.data is not None and not measured,
            "--data is what a lossy compile is measured on, and nothing here is lossy: give "
            "--specialize budget, --quantize or a lossy pass",
        ),
        (
            options.machine is not None and "choose-lowering" not in names,
            "--machine is for the pass choose-lowering, which does not run: give --profile, or add "
            "the pass",
        ),
    ]
    for wrong, message in needs:
        if wrong:
            raise InputError(message)


def check_without(without: Sequence[str], planned: Sequence[str], asked: Sequence[str]) -> None:
    """Refuse `--no-pass` of a pass that would not run, or that another option asks for.

    Args:
        without: names to leave out.
        planned: names of the passes that run unless they are left out.
        asked: those of them that another option asks for.

    Raises:
        InputError: leaving one out does nothing, or undoes another option.
    """
    for number, name in enumerate(without):
        if name in asked:
            raise InputError(f"--no-pass {name} leaves out what another option asks for")
        if name not in planned or name in without[:number]:
            raise InputError(f"--no-pass {name}: it would not run anyway")


def check_model(options: CompileOptions, passes: Sequence[PassPlan], traced: Module) -> None:
    """Refuse options for which the model has nothing.

    Raises:
        InputError: an option is about gates, experts or caches that the model does not have.
    """
    model, cache = facts.model_info(traced, "", ""), facts.cache_info(traced)
    has = {
        "": True,
        "gates": bool(model.gates),
        "experts": bool(model.experts),
        "cache": cache is not None and bool(cache.buffers),
    }
    flags: list[tuple[str, str]] = []
    if options.specialize:
        flags.append((f"--specialize {options.specialize}", "gates"))
    if options.quantize_cache:
        flags.append(("--quantize-cache", "cache"))
    if options.machine is not None:
        flags.append(("--machine", "gates"))
    if options.fused_experts:
        flags.append(("--fused-experts", "experts"))
    named = {text.partition("{")[0] for text in (*(options.passes or ()), *options.add)}
    flags += [(f"the pass {p.name}", PASSES[p.name].needs) for p in passes if p.name in named]
    for flag, need in flags:
        if not has[need]:
            raise InputError(
                f"{flag} is about {_PLURAL[need]}, and the model has none: leave it out"
            )
    if options.data is not None and not (has["gates"] or any(is_lossy(p.name) for p in passes)):
        raise InputError("--data measures depth paths, and the model has no gates: leave it out")
    if options.profile is not None and not (has["gates"] or has["experts"]):
        raise InputError(
            f"{options.profile}: a profile tells of gates and experts, and the model has neither: "
            "leave --profile out"
        )


_PLURAL = {"gates": "depth gates", "experts": "experts", "cache": "caches of keys and values"}


def check_compiled(
    options: CompileOptions,
    passes: Sequence[PassPlan],
    module: Module,
    statistics: Statistics,
) -> None:
    """Refuse lossy passes that changed nothing, and lowerings of what is not there.

    A budget or a size may leave everything as it is: that is an answer, not a fault.

    Raises:
        InputError: an option did nothing; with the reason that the pass gave.
    """
    chosen = {"fix-gates"} if options.specialize == "budget" else set[str]()
    chosen |= {"quantize"} if mixes(passes) else set[str]()
    for name in dict.fromkeys(plan.name for plan in passes):
        if is_lossy(name) and name not in chosen and not statistics.fired[name]:
            reason = _reason(statistics.facts.get(name, {}))
            raise InputError(f"the pass {name} would change nothing{reason}: leave it out")
    if options.fused_experts and not any(
        isinstance(op, ops.GroupedExperts) for op in module.walk()
    ):
        raise InputError(
            "--fused-experts takes SwiGLU experts, and those of the model are others: leave it out"
        )
    formats = {op.format for op in module.walk() if isinstance(op, ops.Dequantize)}
    if options.portable_weights and formats == {"e4m3"}:
        raise InputError(
            "--portable-weights would change nothing: the standard operator reads fp8 anyway; "
            "leave it out"
        )


def _reason(told: dict[str, Any]) -> str:
    """Why a pass did nothing, as it says itself; empty if it does not."""
    found = [*told.get("kept", {}).values(), *told.get("refused", {}).values()]
    found += [entry["reason"] for entry in told.get("layers", ()) if "reason" in entry]
    return f" ({found[0]})" if found else ""
