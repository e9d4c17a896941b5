"""Which gates a budget lets a compile fix, and what a lossy compile changed, measured on text.

Both run the IR in the interpreter, so they need no target; they hold the weights in memory. The
text must be held out from the profile. Gates are chosen on its first half and measured on the
second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from liquidc import facts, lossy, mixed
from liquidc.calibrated import CalibratedSource
from liquidc.effects import calibrates, mixes
from liquidc.errors import CheckFailed, InputError, InternalError
from liquidc.fidelity import LogitMetrics
from liquidc.heldout import MOST, HeldOutText, Report, Scorer, read_text
from liquidc.inputs import ModelInput
from liquidc.ir import Module
from liquidc.ir.rewriter import Statistics
from liquidc.ir.weights import WeightSource
from liquidc.mixed import Recipe, read_recipe
from liquidc.passes.base import PassContext
from liquidc.passes.fix_depth import PATH
from liquidc.passes.quantize import Quantize
from liquidc.passes.registry import is_lossy
from liquidc.passes.stream import Calibration
from liquidc.passplan import PassPlan, plan_passes, run_passes
from liquidc.plan import CompileOptions
from liquidc.profile import Profile
from liquidc.tokenizer import Tokenizer

DEFAULT_MAX_KL = 0.01
"""Nats per token: on average the compiled model gives a token 0.99 of its probability."""
OFTEN = 0.95
"""A gate is fixed to run only if it ran for this share of the tokens."""
MEASURED = 2 * 2**30
"""Bytes of weights that measuring may hold in memory unasked."""
CALIBRATED = 256
"""Windows of text to calibrate on, as far as memory allows."""
UNASKED = {"quantize", "quantize-cache"}
"""Lossy passes that need no held-out text: without any, what they cost is not measured."""


def choose_gates(
    module: Module,
    source: WeightSource,
    text: HeldOutText,
    profile: Profile,
    max_kl: float,
    report: Report,
) -> tuple[str, list[dict[str, Any]]]:
    """The gates to fix, as `fix-gates` takes them, and what each trial showed.

    Gates that run for less than half of the tokens are tried to skip, those that run for nearly
    all to run (to run a layer for more tokens costs time), the most decided first. A gate stays
    fixed if the mean KL(original || fixed) of all so far, and two standard errors over the
    windows, are within the budget.

    Args:
        module: the model, unspecialised.
        source: its weights.
        text: to measure on.
        profile: of this model.
        max_kl: the budget, in nats per token.
        report: told about the progress.
    """
    scorer = Scorer(module, source)
    original = [scorer.logits(window) for window in text.windows]
    rates = [profile.rate(gate) for gate in range(len(profile.gates))]
    decided = [gate for gate, rate in enumerate(rates) if rate < 0.5 or rate >= OFTEN]
    order = sorted(decided, key=lambda gate: (min(rates[gate], 1 - rates[gate]), gate))
    fixed, trials = [0] * len(rates), list[dict[str, Any]]()
    for number, gate in enumerate(order):
        report("gates", number, len(order))
        tried = list(fixed)
        tried[gate] = -1 if rates[gate] < 0.5 else 1
        costs: list[float] = []
        for window, theirs in zip(text.windows, original, strict=True):
            metrics = LogitMetrics()
            metrics.add(scorer.logits(window, tried), theirs)
            costs.append(metrics.report()["kl_nats"])
        kl, error = float(np.mean(costs)), float(np.std(costs) / len(costs) ** 0.5)
        kept = kl + 2 * error <= max_kl
        fixed = tried if kept else fixed
        trials.append(
            {
                "gate": gate,
                "to": "run" if tried[gate] > 0 else "skip",
                "run_rate": rates[gate],
                "kl_nats": kl,
                "kl_error": error,
                "kept": kept,
            }
        )
    report("gates", len(order), len(order))
    return "".join({-1: "0", 0: ".", 1: "1"}[value] for value in fixed), trials


def measure(
    before: Module, after: Module, source: WeightSource, text: HeldOutText, report: Report
) -> dict[str, Any]:
    """What a lossy compile changed: KL(before || after), top-1, bits per byte, decisions.

    Both run freely: a decision that differs changes what later layers see. Token ids stand for no
    bytes: their bits per byte are None. So are `gate_flips` in a model without gates.

    Args:
        before: the model after exact passes only.
        after: the model that is compiled.
        source: the weights of both.
        text: to measure on.
        report: told about the progress.
    """
    old, new, metrics = Scorer(before, source), Scorer(after, source), LogitMetrics()
    decisions = flips = 0
    for number, (window, size) in enumerate(zip(text.windows, text.sizes, strict=True)):
        report("windows", number, len(text.windows))
        (theirs, wanted), (ours, made) = old.decided(window), new.decided(window)
        metrics.add(ours, theirs)
        decisions += wanted.size
        flips += int((wanted != made).sum())
        targets = np.array(window[1:], np.int64)
        metrics.add_text(ours[:-1], theirs[:-1], targets, size)
    report("windows", len(text.windows), len(text.windows))
    found = metrics.report()
    return {
        "data": text.sha256,
        "tokens": sum(map(len, text.windows)),
        "kl_nats": found["kl_nats"],
        "top1_agreement": found["top1_agreement"],
        "bits_per_byte": found["bits_per_byte"],
        "bits_per_byte_original": found["bits_per_byte_reference"],
        "gate_flips": flips / decisions if decisions else None,
    }


def measure_paths(
    module: Module, source: WeightSource, text: HeldOutText, paths: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """What it would cost to run every token on one depth path, whatever its gates decide."""
    scorer = Scorer(module, source)
    original = [scorer.logits(window) for window in text.windows]
    found: dict[str, dict[str, float | None]] = {}
    for path in paths:
        metrics = LogitMetrics()
        force = [1 if digit == "1" else -1 for digit in path]
        for window, size, theirs in zip(text.windows, text.sizes, original, strict=True):
            ours = scorer.logits(window, force)
            metrics.add(ours, theirs)
            metrics.add_text(ours[:-1], theirs[:-1], np.array(window[1:], np.int64), size)
        told = metrics.report()
        keys = ("kl_nats", "top1_agreement", "bits_per_byte", "bits_per_byte_reference")
        found[path] = {key: told[key] for key in keys}
    return found


def paths_of(module: Module) -> list[str]:
    """The depth paths for which a module has functions of their own."""
    return [name.removeprefix(PATH) for name in module.functions if name.startswith(PATH)]


class Lossy:
    """The part of a compile that changes results: what it chooses, and its price.

    Args:
        options: of the compile.
        model: what is compiled.
        passes: the plan.
        context: what the passes may use.
        report: told about the progress.

    Attributes:
        told: what choosing found, for the manifest.
    """

    def __init__(
        self,
        options: CompileOptions,
        model: ModelInput,
        passes: Sequence[PassPlan],
        context: PassContext,
        report: Report,
    ) -> None:
        self._report = report
        self._options, self._model, self._context = options, model, context
        self._weights = context.source or model.weights
        self._passes = tuple(passes)
        self.told: dict[str, Any] = {}
        self._budget = options.max_kl
        if self._budget is None and options.specialize == "budget":
            self._budget = DEFAULT_MAX_KL
        self._read: HeldOutText | None = None
        self._calibrated_on: HeldOutText | None = None

    def check(self, traced: Module) -> None:
        """Read the files that will be needed, before anything is computed.

        Raises:
            InputError: text is missing, too short or the wrong one, a recipe is none, or the
                profile tells of other gates or experts.
        """
        if self._context.profile is not None:
            _check_parts(self._context.profile, traced)
        if self._options.recipe is not None:
            read_recipe(self._options.recipe)
        if calibrates(self._passes):
            self.calibration_text(traced)
        chooses = self._options.specialize == "budget" or (
            mixes(self._passes) and self._options.recipe is None
        )
        if chooses or self._options.data is not None or self.needed(traced, traced):
            self.text(traced)

    def needed(self, traced: Module, module: Module) -> bool:
        """Whether there is anything to measure, and text or a budget to do it.

        Measuring holds the weights in memory, as floats of 32 bits: of a large model it is done
        only if it is asked for.

        Args:
            traced: the model before the passes.
            module: after them.
        """
        lossy = {plan.name for plan in self._passes if is_lossy(plan.name)}
        if lossy - UNASKED or (lossy and self._budget is not None):
            return True
        size = facts.total_bytes(expr.type for expr in traced.weights.values())
        asked = self._options.data is not None or size <= MEASURED
        return bool(lossy or paths_of(module)) and self._has_text and asked

    @property
    def _has_text(self) -> bool:
        origin = self._model.origin
        default = origin is not None and (origin / "heldout.txt").exists()
        return self._options.data is not None or default

    def choose(self, traced: Module) -> tuple[PassPlan, ...]:
        """The plan with the gates to fix in it.

        Raises:
            InputError: there is no text to choose on.
        """
        profile = self._context.need_profile("fix-gates")
        before = self._exact(traced)
        text = self.text(traced).half(0)
        digits, trials = choose_gates(
            before, self._weights, text, profile, self._budget or 0.0, self._report
        )
        self.told = {"trials": trials, "max_kl": self._budget, "chosen_on": text.sha256}
        chosen = plan_passes([f"fix-gates{{gates={digits}}}"], ())[0]
        self._passes = tuple(chosen if p.name == "fix-gates" else p for p in self._passes)
        return self._passes

    def measure(self, traced: Module, after: Module) -> dict[str, Any]:
        """What the compile changed.

        Raises:
            CheckFailed: more than the budget.
            InputError: there is no text to measure on.
        """
        text = self.text(traced).half(1)
        before, found = self._exact(traced), dict[str, Any]()
        if paths := paths_of(after):
            found["paths"] = measure_paths(before, self._weights, text, paths)
        if not any(is_lossy(plan.name) for plan in self._passes):
            return found
        found |= measure(before, after, self._weights, text, self._report)
        budget, cost = self._budget, found["kl_nats"]
        if budget is not None and not cost <= budget:
            raise CheckFailed(
                f"the compiled model is {cost:.3g} nats per token from the original on held-out "
                f"text, more than the {budget:g} that --max-kl allows; nothing was written"
            )
        return {**found, "max_kl": budget}

    def measure_experts(self, traced: Module, before: Module, after: Module, said: Any) -> None:
        """What a pass over experts changed in each layer, added to what the pass `said`.

        Raises:
            InputError: there is no text to measure on.
        """
        text = self.text(traced).half(1)
        errors = lossy.measure(before, after, self._weights, text.windows)
        lossy.note(errors, said)

    def recipe(self, traced: Module) -> Recipe:
        """The scheme of each weight.

        Raises:
            InputError: there is no text to choose on, or nothing to choose by.
        """
        options = self._options
        if options.recipe is not None:
            return read_recipe(options.recipe)
        at = next(n for n, plan in enumerate(self._passes) if mixes([plan]))
        module = run_passes(traced, self._passes[:at], Statistics(), context=self._context)
        quantize = self._passes[at].instance
        if not isinstance(quantize, Quantize):
            raise InternalError(f"{self._passes[at].text} takes a recipe")
        return mixed.choose(
            module,
            self._weights,
            self.text(traced).half(0),
            quantize,
            target_size=options.target_size,
            max_kl=options.max_kl,
            report=self._report,
        )

    def calibration(self, traced: Module, source: CalibratedSource) -> Calibration:
        """What passes calibrate with.

        Raises:
            InputError: there is no text, or it is the one that the compile is measured on.
        """
        text = self.calibration_text(traced)
        return Calibration(text.windows, text.sha256, source, source, self._report)

    def calibration_text(self, traced: Module) -> HeldOutText:
        """The text to calibrate on, in windows of the model's context.

        Raises:
            InputError: there is none, it can't be used, or the compile is measured on it.
        """
        if self._calibrated_on is not None:
            return self._calibrated_on
        path = self._options.calibration
        if path is None:
            raise InputError("passes calibrate on text: give it with --calibration FILE")
        text = self._windows(traced, path, None, CALIBRATED)
        self._check_ids(traced, path, text)
        if self._has_text and self.text(traced).sha256 == text.sha256:
            raise InputError(f"{path}: the compile is measured on it; calibrate on other text")
        self._calibrated_on = text
        return text

    def _exact(self, traced: Module) -> Module:
        """The model after all passes that change nothing, each function one of the model's."""
        plan = [p for p in self._passes if not is_lossy(p.name) and p.name != "fix-depth"]
        return run_passes(traced, plan, Statistics(), context=self._context)

    def text(self, traced: Module) -> HeldOutText:
        """The held-out text, in windows of the model's context.

        Raises:
            InputError: there is none, or it can't be used.
        """
        if self._read is None:
            origin = self._model.origin
            path = self._options.data or (None if origin is None else origin / "heldout.txt")
            if path is None:
                raise InputError("a lossy compile is measured on text: give it with --data FILE")
            self._read = self._windows(traced, path, self._context.profile)
            self._check_ids(traced, path, self._read)
        return self._read

    def _check_ids(self, traced: Module, path: Path, text: HeldOutText) -> None:
        known = facts.model_info(traced, "", "").vocabulary
        if wrong := [i for window in text.windows for i in window if not 0 <= i < known]:
            raise InputError(f"{path}: token {wrong[0]} is not in the vocabulary of {known}")

    def _windows(
        self, traced: Module, path: Path, profile: Profile | None, most: int = MOST
    ) -> HeldOutText:
        origin = self._model.origin
        tokenizer = None if origin is None else origin / "tokenizer.json"
        context = traced.attributes.get("max_positions")
        return read_text(
            path,
            Tokenizer(tokenizer) if tokenizer is not None and tokenizer.exists() else None,
            context if isinstance(context, int) else None,
            profile,
            most,
        )


def _check_parts(profile: Profile, traced: Module) -> None:
    """Check that a profile tells of the gates and the experts that the model has.

    Raises:
        InputError: it does not, although it names the model: it was edited.
    """
    model = facts.model_info(traced, "", "")
    gates, told = [gate.layer for gate in model.gates], [gate.layer for gate in profile.gates]
    if gates != told:
        raise InputError(
            f"the profile has {len(told)} gates, the module {len(gates)}, or in other layers"
        )
    experts = [(info.layer, info.experts) for info in model.experts]
    if experts != [(info.layer, len(info.load)) for info in profile.experts]:
        raise InputError("the profile has other experts than the module")
