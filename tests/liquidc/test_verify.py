"""Verification over a fake engine and a fake reference, with faults put in on purpose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from liquidc.errors import InputError
from liquidc.reference import ReferenceResult
from liquidc.runtime import Engine
from liquidc.verify import (
    HeldOut,
    Thresholds,
    VerifyOptions,
    find_reference,
    read_held_out,
    verify,
)
from tests.liquidc.fakes import FakeRunner, manifest

OPTIONS = VerifyOptions(windows=3, window=16, prompts=4, prompt=8, new_tokens=8, traced=2)
DATA = HeldOut(tuple(int(i) for i in np.random.default_rng(0).integers(0, 256, 100)))


@dataclass
class FakeReference:
    """Answers as the fake runner does; `change` may alter a result, `replayed` counts replays."""

    change: Any = None
    engine: Engine = field(default_factory=lambda: Engine(manifest(), FakeRunner()))
    replayed: list[int] = field(default_factory=list[int])
    source: None = None

    def evaluate(self, ids: Sequence[int], force: Sequence[int] | None = None) -> ReferenceResult:
        assert not any(force or ())
        out = self.engine.evaluate(ids)
        result = ReferenceResult(
            out.logits[0].copy(), out.gates[:, 0], out.gate_p[:, 0].copy(), out.experts[:, 0].copy()
        )
        return self.change(result) if self.change else result

    def replay(
        self,
        ids: Sequence[int],
        natural: ReferenceResult,
        first: int,
        routes: NDArray[np.bool_],
        force: Sequence[int] | None = None,
    ) -> ReferenceResult:
        self.replayed.append(first)
        gates = natural.gates.copy()
        gates[:, first:] = routes[:, first:]
        return replace(natural, gates=gates)

    def greedy(
        self, prompts: Sequence[Sequence[int]], count: int, force: Sequence[int] | None = None
    ) -> list[list[int]]:
        assert not any(force or ())
        return [[(p[-1] + 1 + i) % 256 for i in range(count)] for p in prompts]


def run(
    runner: FakeRunner | None = None, reference: FakeReference | None = None, **options: Any
) -> dict[str, Any]:
    engine = Engine(manifest(), runner or FakeRunner())
    given: Any = reference or FakeReference()
    return verify(engine, given, DATA, replace(OPTIONS, **options))


def test_equal_sides_pass() -> None:
    result = run()
    assert result["passed"]
    assert result["failures"] == []
    assert result["gate_agreement"] == result["greedy_match"] == result["expert_overlap"] == 1.0
    assert result["logits_max_rel"] == result["kl_nats"] == 0.0
    assert result["tokens"] == 48
    assert result["layers_run_by_gates"] == result["layers_run_by_trace"] > 0
    assert result["layers_run_by_gates"] < result["layers_offered"]
    assert result["experts_run_by_routes"] == result["experts_run_by_trace"] > 0
    assert json.dumps(result)


def test_logits_over_the_limit_fail() -> None:
    def shifted(result: ReferenceResult) -> ReferenceResult:
        result.logits[3, 7] += 0.01
        return result

    result = run(reference=FakeReference(shifted))
    assert not result["passed"]
    assert result["logits_max_rel"] == pytest.approx(0.01 / 8, rel=1e-3)
    assert result["failures"][-1].startswith("logits_max_rel is 0.00125, at most 0.0001 is allowed")
    assert run(
        reference=FakeReference(shifted), thresholds=Thresholds(logits_max_rel=0.01, kl_nats=1)
    )["passed"]


def test_a_flip_forces_the_rest_of_the_window_and_fails() -> None:
    def flipped(result: ReferenceResult) -> ReferenceResult:
        gates, p = result.gates.copy(), result.gate_p
        gates[0, 5] = ~gates[0, 5]
        p[0, 5] = 1 - p[0, 5]
        return replace(result, gates=gates)

    reference = FakeReference(flipped)
    result = run(reference=reference)
    assert reference.replayed == [5, 5, 5]
    assert result["tokens_with_forced_routes"] == 3 * 11
    assert result["gate_flips"] == 3
    assert result["gate_agreement"] == pytest.approx(1 - 3 / 96)
    assert not result["passed"]


def test_a_flip_inside_the_tie_band_passes() -> None:
    class Near(FakeRunner):
        def step(self, inputs: Any, cache: Any) -> Any:
            out = super().step(inputs, cache)
            out["gate_p"] = np.where(out["gates"], 0.50001, 0.49999).astype(np.float32)
            return out

    def flipped(result: ReferenceResult) -> ReferenceResult:
        p = np.where(result.gates, 0.50001, 0.49999).astype(np.float32)
        gates = result.gates.copy()
        gates[1, 2] = ~gates[1, 2]
        p[1, 2] = 1 - p[1, 2]
        return replace(result, gates=gates, gate_p=p)

    result = run(Near(), FakeReference(flipped))
    assert result["gate_flips"] == 3
    assert result["gate_agreement"] == 1.0
    assert all(flip["tie"] for flip in result["gate_flips_listed"])
    assert result["passed"]


def test_other_greedy_tokens_fail() -> None:
    class Other(FakeReference):
        def greedy(
            self, prompts: Sequence[Sequence[int]], count: int, force: Sequence[int] | None = None
        ) -> list[list[int]]:
            tokens = super().greedy(prompts, count, force)
            tokens[1][4] += 1
            return tokens

    result = run(reference=Other())
    assert result["greedy_match"] == (8 * 3 + 4) / 32
    assert result["greedy_prompts_identical"] == 3
    assert not result["passed"]


def test_other_experts_fail() -> None:
    def other(result: ReferenceResult) -> ReferenceResult:
        assert result.experts is not None
        result.experts[3, 0, 0] = (result.experts[3, 0, 0] + 2) % 4
        return result

    result = run(reference=FakeReference(other))
    assert result["expert_overlap"] == pytest.approx(1 - 0.5 / 16)
    assert len(result["expert_differences_listed"]) == 3
    assert not result["passed"]


def test_work_that_the_gates_did_not_allow_fails() -> None:
    result = run(FakeRunner(extra_rows=5))
    assert result["layers_run_by_trace"] == result["layers_run_by_gates"] + 10
    assert not result["passed"]
    assert "by the profiler" in result["failures"][0]


def test_too_little_text() -> None:
    engine = Engine(manifest(), FakeRunner())
    with pytest.raises(InputError, match="fewer than two tokens"):
        verify(engine, FakeReference(), HeldOut((1,)), OPTIONS)  # pyright: ignore


def test_short_text_still_works() -> None:
    engine = Engine(manifest(), FakeRunner())
    short: Any = FakeReference()
    result = verify(engine, short, HeldOut((1, 2, 3)), OPTIONS)
    assert result["passed"]
    assert result["windows"] == 1


def test_held_out_files(tmp_path: Path) -> None:
    engine = Engine(manifest(), FakeRunner())
    ids = tmp_path / "ids.json"
    ids.write_text("[1, 2, 3]")
    assert read_held_out(ids, engine) == HeldOut((1, 2, 3))
    for content, message in (
        ("[", "not valid JSON"),
        ('["a"]', "must be a list of token ids"),
        ("[]", "the prompt is empty"),
        ("[999]", "token 999 is not in the vocabulary"),
    ):
        ids.write_text(content)
        with pytest.raises(InputError, match=message):
            read_held_out(ids, engine)
    with pytest.raises(InputError, match="no held-out text; give one with --data"):
        read_held_out(tmp_path / "none.txt", engine)
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_held_out(text, engine)
    text.write_text("abc")
    with pytest.raises(InputError, match=r"no tokenizer; give a \.json list"):
        read_held_out(text, engine)


def test_the_reference_is_named_by_the_build_log(tmp_path: Path) -> None:
    engine, log = tmp_path / "engine", tmp_path / "engine.build.json"
    with pytest.raises(InputError, match=r"no reference, for engine\.build\.json is missing"):
        find_reference(engine)
    log.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        find_reference(engine)
    log.write_text('{"source": null}')
    with pytest.raises(InputError, match="names no model directory"):
        find_reference(engine)
    log.write_text(json.dumps({"source": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match="not there any more"):
        find_reference(engine)
    log.write_text(json.dumps({"source": str(tmp_path)}))
    assert find_reference(engine) == tmp_path
