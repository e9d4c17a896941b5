"""Compiles that use a profile: what a budget lets them fix, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from liquidc.manifest import MANIFEST
from liquidc.runtime import load
from liquidc.session import DepthControls
from liquidc.verify import VerifyOptions, read_held_out, verify
from tests.liquidc.test_cli import call, ok


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows of 128 tokens for each half."""
    path = tmp_path_factory.mktemp("data") / "heldout.txt"
    path.write_text(
        "".join(f"{i} times {i} is {i * i}. Quite so, ever after.\n" for i in range(16))
    )
    return path


@pytest.fixture(scope="module")
def profile(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "p.json"
    ok("profile", model_directory, "--data", model_directory / "heldout.txt", "-o", path)
    return path


def build(model: Path, out: Path, profile: Path, data: Path, *more: object) -> dict[str, object]:
    options = ("--target", "null", "--profile", profile, "--data", data)
    ok("compile", model, "-o", out, *options, *more)
    return json.loads((out / MANIFEST).read_bytes())


def test_what_is_fixed_is_measured_and_computes_the_forced_model(
    model_directory: Path, profile: Path, held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engine"
    manifest = build(
        model_directory, out, profile, held_out, "--add-pass", "fix-gates{gates=01}",
        "--add-pass", "eliminate-dead",
    )  # fmt: skip
    assert [gate["fixed"] for gate in manifest["model"]["gates"]] == [-1, 1]
    assert manifest["cache"]["absent"] == [1]
    found = manifest["fidelity"]
    assert found["kl_nats"] > 0
    assert found["tokens"] == 256
    assert found["max_kl"] is None or "max_kl" not in found
    from liquidc.reference import Reference

    reference = Reference.load(model_directory, manifest["model"]["sha256"])
    with load(out) as engine:
        options = VerifyOptions(windows=2, window=64, prompts=2, new_tokens=8, traced=1)
        told = verify(engine, reference, read_held_out(held_out, engine), options)
        assert told["passed"], told["failures"]
        assert told["original"]["kl_nats"] > 0
        assert told["layers_offered"] == 0
        ids = list(b"any words")
        logits = engine.logits(ids)
        with pytest.raises(Exception, match="fixed to skip"):
            engine.logits(ids, depth=DepthControls(gate_force=(1, 0)))
        with pytest.raises(Exception, match="min_depth is 4, this engine has 3 layers left"):
            engine.logits(ids, depth=DepthControls(min_depth=4))
        free = engine.logits(ids, depth=DepthControls(gate_force=(-1, 1)))
    np.testing.assert_array_equal(logits, free)
    np.testing.assert_allclose(logits, reference.evaluate(ids, (-1, 1)).logits, atol=1e-4)


def test_over_the_budget_nothing_is_written(
    model_directory: Path, profile: Path, held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engine"
    options = ("--target", "null", "--profile", profile, "--data", held_out)
    fixed = ("--add-pass", "fix-gates{gates=00}", "--max-kl", "1e-9")
    result = call("compile", model_directory, "-o", out, *options, *fixed)
    assert result.exit_code == 1
    assert "more than the 1e-09 that --max-kl allows" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_budget_chooses(
    model_directory: Path, profile: Path, held_out: Path, tmp_path: Path
) -> None:
    """With no budget nothing is fixed; with a wide one, every gate that may be is."""
    rates = [gate["run_rate"] for gate in ok("profile", "show", profile)["gates"]]
    all_of_them = "".join("0" if r < 0.5 else "1" if r >= 0.95 else "." for r in rates)
    for budget, wanted in (("0", ".."), ("1e9", all_of_them)):
        out = tmp_path / f"engine{budget}"
        manifest = build(
            model_directory, out, profile, held_out, "--specialize", "budget", "--max-kl", budget
        )
        (told,) = [p for p in manifest["passes"] if p["name"] == "fix-gates"]
        assert told["options"]["gates"] == wanted
        assert [trial["kept"] for trial in told["facts"]["trials"]] == [
            budget != "0" for _ in told["facts"]["trials"]
        ]
        assert manifest["fidelity"]["kl_nats"] <= float(budget)


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_an_expected_path_is_tried_and_counted(
    target: str, model_directory: Path, profile: Path, held_out: Path, tmp_path: Path
) -> None:
    """The text is that of the engine without it, and every miss is counted."""
    texts: list[str] = []
    for name, *more in (("plain",), ("tried", "--add-pass", "specialize-depth{hot=0}")):
        out = tmp_path / name
        options = ("--profile", profile, "--target", target, *more)
        ok("compile", model_directory, "-o", out, *options)
        told = ok("run", out, "--prompt", "One times", "--max-new-tokens", 12)
        texts.append(told["text"])
    assert texts[0] == texts[1]
    manifest = json.loads((out / MANIFEST).read_bytes())
    guard = manifest["artifact"]["guard"]
    assert len(guard["path"]) == len(guard["gates"]) > 1
    assert 0 <= guard["miss_rate"] < 1
    tokens = [token["layers"] for token in told["tokens"]]
    assert 0 <= told["guard"]["missed"] <= told["guard"]["tried"] <= len(tokens)
    done = call("verify", out, "--data", held_out, "--windows", 2, "--prompts", 2)
    assert done.exit_code == 0, done.output
    shown = call("inspect", out, "--explain").stdout
    assert "how each gate is computed" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--specialize", "budget"), "to specialise a model takes a profile"),
        (("--add-pass", "fix-gates"), "the pass fix-gates needs a profile"),
        (("--add-pass", "fix-gates{gates=00}", "--data", "/nowhere.txt"), "can't be read"),
        (("--specialize", "budget", "--profile", "P"), "the profile was made with it"),
    ],
)
def test_refusals(
    options: tuple[str, ...], message: str, model_directory: Path, profile: Path, tmp_path: Path
) -> None:
    given = [profile if option == "P" else option for option in options]
    result = call("compile", model_directory, "-o", tmp_path / "e", "--target", "null", *given)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []
