"""Compiles that quantise: mixed precision, calibration, what is told, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from liquidc.facts import total_bytes
from liquidc.ir import parse_module
from liquidc.manifest import MANIFEST
from liquidc.mixed import Trial, _steps  # pyright: ignore[reportPrivateUsage]
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
def bare_model(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model without held-out text."""
    path = tmp_path_factory.mktemp("bare") / "tiny"
    shutil.copytree(model_directory, path)
    (path / "heldout.txt").unlink()
    return path


def build(model: Path, out: Path, *more: object) -> dict[str, Any]:
    ok("compile", model, "-o", out, "--target", "null", *more)
    return json.loads((out / MANIFEST).read_bytes())


def quantized(manifest: dict[str, Any]) -> dict[str, Any]:
    return next(p["facts"] for p in manifest["passes"] if p["name"] == "quantize")


def weight_bytes(out: Path) -> int:
    """Of all tensors, the padding between them apart."""
    module = parse_module((out / "module.ir").read_text())
    return total_bytes(expr.type for expr in module.weights.values())


def refused(code: int, message: str, *arguments: object) -> None:
    result = call("compile", *arguments)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr


def test_mixed_precision_reaches_a_size_and_a_smaller_one_costs_more(
    model_directory: Path, held_out: Path, tmp_path: Path
) -> None:
    found: list[int] = []
    for number, size in enumerate((150_000, 120_000)):
        out = tmp_path / f"{number}"
        options = ("--quantize", "mixed{block=16}", "--target-size", f"{size}B")
        manifest = build(model_directory, out, "--data", held_out, *options)
        told = quantized(manifest)
        recipe = {name: entry["scheme"] for name, entry in told["weights"].items()}
        assert set(recipe.values()) <= {"int8", "int4"}
        assert told["recipe"]["target_size"] == size
        assert {t["weight"] for t in told["recipe"]["sensitivity"]} >= set(recipe)
        assert weight_bytes(out) <= size
        found.append(weight_bytes(out))
    assert found[1] < found[0]


def test_mixed_precision_keeps_a_budget(
    model_directory: Path, held_out: Path, tmp_path: Path
) -> None:
    options = ("--data", held_out, "--quantize", "mixed{block=16}")
    sizes: list[int] = []
    for number, budget in enumerate((1e-9, 0.5)):
        out = tmp_path / f"{number}"
        manifest = build(model_directory, out, *options, "--max-kl", budget)
        assert manifest["fidelity"]["kl_nats"] <= budget
        told = quantized(manifest)["weights"].values()
        sizes.append(sum(t["bytes_float"] - t["bytes"] for t in told))
    assert sizes[0] == 0
    assert sizes[1] > 0


def test_a_recipe_from_a_file_is_followed(model_directory: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    name = "model.layers.0.self_attn.o_proj.weight"
    recipe.write_text(f'[weights]\n"{name}" = "int4"\n')
    out = tmp_path / "engine"
    told = quantized(build(model_directory, out, "--quantize", "mixed", "--recipe", recipe))
    assert {n: entry["scheme"] for n, entry in told["weights"].items()} == {name: "int4"}
    assert told["recipe"] == {"recipe": "recipe.toml"}
    for text, message in (
        ('[weights]\n"nothing" = "int4"\n', "the recipe names nothing"),
        (f'[weights]\n"{name}" = "int3"\n', "is 'int3'; schemes are"),
        ("[other]\n", "a recipe is a table [weights]"),
        ("weights = \n", "not TOML"),
    ):
        recipe.write_text(text)
        more = ("--target", "null", "--quantize", "mixed", "--recipe", recipe)
        refused(2, message, model_directory, "-o", tmp_path / "no", *more)
    assert not (tmp_path / "no").exists()


def test_what_mixed_precision_needs(model_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    common = (model_directory, "-o", out, "--target", "null")
    refused(2, "needs --target-size, --max-kl or --recipe", *common, "--quantize", "mixed")
    refused(2, "are for --quantize mixed", *common, "--quantize", "int4", "--target-size", "1MB")
    refused(2, "is not a size", *common, "--quantize", "mixed", "--target-size", "much")
    size = ("--quantize", "mixed", "--target-size", "1kB")
    refused(2, "with int4 everywhere the weights still take", *common, *size)
    assert not out.exists()


def test_steps_are_taken_in_the_order_of_nats_per_byte() -> None:
    trials = [
        Trial("a", "float", 0.0, 100), Trial("a", "int8", 1.0, 50), Trial("a", "int4", 9.0, 25),
        Trial("b", "float", 0.0, 100), Trial("b", "int8", 0.5, 50), Trial("b", "int4", 0.75, 25),
        # Tied: codes come on top of the table, so they save nothing.
        Trial("c", "float", 0.0, 100), Trial("c", "int8", 0.1, 150), Trial("c", "int4", 0.1, 125),
    ]  # fmt: skip
    steps = [(after.weight, after.scheme) for _, after in _steps(trials)]
    assert steps == [("b", "int8"), ("b", "int4"), ("a", "int8"), ("a", "int4")]


def test_without_text_the_codes_are_written_and_nothing_is_claimed(
    bare_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engine"
    result = call("compile", bare_model, "-o", out, "--target", "null", "--quantize", "int8")
    assert result.exit_code == 0, result.stderr
    assert "not measured on held-out text" in result.stdout
    assert json.loads((out / MANIFEST).read_bytes()).get("fidelity") is None
    common = (bare_model, "-o", tmp_path / "no", "--target", "null")
    refused(
        2,
        "no held-out text; give one with --data FILE",
        *common,
        "--quantize",
        "int8",
        "--max-kl",
        "0.1",
    )


def test_a_calibrated_compile_tells_tokens_and_what_they_did_not_reach(
    model_directory: Path, held_out: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Some other words, a little longer, for the weights to be fitted to. " * 12)
    scheme = ("--quantize", "int4{block=16,method=gptq}", "--data", held_out)
    engines = [tmp_path / "a", tmp_path / "b"]
    manifests = [build(model_directory, out, *scheme, "--calibration", other) for out in engines]
    told = quantized(manifests[0])
    assert told["calibration"]["tokens"] == 768
    attention = told["weights"]["model.layers.0.self_attn.o_proj.weight"]
    assert attention["tokens"] == [768]
    assert "nearest" not in attention
    files = [sorted(path for path in out.rglob("*") if path.is_file()) for out in engines]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
    assert not any(path.name == "calibrated" for path in tmp_path.rglob("*"))
    common = (model_directory, "-o", tmp_path / "no", "--target", "null", *scheme)
    refused(2, "give it with --calibration FILE", *common)
    refused(2, "calibrate on other text", *common, "--calibration", held_out)


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_a_cache_of_codes(
    model_directory: Path, held_out: Path, tmp_path: Path, target: str
) -> None:
    """Calibrated on token ids as well as on text, alone and beside weights of few bits."""
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([(7 * i * i) % 61 for i in range(512)]))
    common = (model_directory, "--target", target, "--quantize-cache", "int8", "--data", held_out)
    one = tmp_path / "one"
    ok("compile", *common, "-o", one, "--calibration", ids)
    manifest = json.loads((one / MANIFEST).read_bytes())
    assert manifest["cache"]["dtype"] == "i8"
    (told,) = (p["facts"] for p in manifest["passes"] if p["name"] == "quantize-cache")
    assert (told["caches"], told["starved"], told["calibration"]["tokens"]) == (8, [], 512)
    assert 0 < manifest["fidelity"]["kl_nats"] < 0.01
    assert ok("inspect", one)["cache"]["dtype"] == "i8"
    both = tmp_path / "both"
    ok("compile", *common, "-o", both, "--calibration", ids, "--quantize", "int4{block=16}")
    ok("run", both, "--ids", "1,2,3", "--max-new-tokens", "4")
    refused(2, "give it with --calibration FILE", *common, "-o", tmp_path / "no")
    wrong = tmp_path / "wrong.json"
    for text, message in (
        (json.dumps([10**6] + [1] * 400), "token 1000000 is not in the vocabulary"),
        ('{"a": 1}', "must be a list of token ids"),
        ("[1, 2", "not valid JSON"),
        ("[1, 2]", "2 tokens; at least"),
    ):
        wrong.write_text(text)
        refused(2, message, *common, "-o", tmp_path / "no", "--calibration", wrong)


def test_token_ids_measure_a_model_without_a_tokenizer(
    model_directory: Path, tmp_path: Path
) -> None:
    """They stand for no bytes of text, so that there are no bits per byte."""
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    (model / "tokenizer.json").unlink()
    ids, out = tmp_path / "ids.json", tmp_path / "engine"
    ids.write_text(json.dumps([(7 * i * i) % 61 for i in range(256)]))
    common = ("--target", "null", "--quantize", "int8", "--data", ids)
    told = call("compile", model, "-o", out, *common).stdout
    assert "on 128 held-out tokens: KL" in told
    assert "bits per byte" not in told
    found = json.loads((out / MANIFEST).read_bytes())["fidelity"]
    assert found["kl_nats"] > 0
    assert found["bits_per_byte"] is found["bits_per_byte_original"] is None
    assert "bits per byte" not in call("inspect", out).stdout
    ids.write_text(json.dumps([300] * 256))
    refused(2, "token 300 is not in the vocabulary", model, "-o", tmp_path / "no", *common)


def test_a_large_model_is_measured_only_if_asked(
    model_directory: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring holds all weights in memory; a compile has a bound on it."""
    monkeypatch.setattr("liquidc.specialize.MEASURED", 1000)
    unasked = build(model_directory, tmp_path / "a", "--quantize", "int8")
    assert unasked.get("fidelity") is None
    asked = build(model_directory, tmp_path / "b", "--quantize", "int8", "--data", held_out)
    assert asked["fidelity"]["tokens"] == 256


def test_inspect_says_what_is_quantised_and_what_it_cost(
    model_directory: Path, held_out: Path, tmp_path: Path
) -> None:
    build(model_directory, tmp_path / "e", "--quantize", "int4{block=16}", "--data", held_out)
    shown = call("inspect", tmp_path / "e").stdout
    assert re.search(r"weights\s+16 of int4, 1 of int8, 8 in float; [\d.]+ kB → [\d.]+ kB", shown)
    assert re.search(r"measured\s+KL [\d.e-]+ nats, top-1 [\d.]+%, bits per byte", shown)
