"""liquify: the model stays what it was, until layers are closed or gates are trained."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import liquidc
from liquidc.errors import InputError
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.families import open_model
from liquidc.frontend.gate_hooks import random_gates
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.gate_tuning import TRAINED, Tuning, measure
from liquidc.liquify import Recipe, liquify
from tests.frontend.families.cases import CASES
from tests.liquidc.conftest import CONFIG, save_model
from tests.liquidc.test_cli import call, names, ok, refused

STATIC = {**CONFIG, "num_hidden_layers": 6, "depth_gate": {}}
TEXT = Path(__file__).resolve().parents[2] / "samples" / "corpus.txt"


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without gates; nobody changes it."""
    return save_model(tmp_path_factory.mktemp("static") / "model", STATIC)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT.read_text()[:4000])
    return path


def ids(vocabulary: int = 256, rows: int = 2, tokens: int = 24) -> Tensor:
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(3))


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("policy", ["own", "drop", "inherit"])
@torch.no_grad()
def test_untouched_it_is_the_same_model(static: Path, tmp_path: Path, policy: str) -> None:
    liquify(static, tmp_path / "out", Recipe(kv_policy=policy))
    before = LiquidForCausalLM.from_directory(static)
    after = LiquidForCausalLM.from_directory(tmp_path / "out")
    assert after.config.gated_layers == (2, 3, 4)
    assert after.config.depth_gate.kv_policy == policy
    found = after(ids())
    assert bool(found.gates.all())
    assert torch.equal(found.logits, before(ids()).logits)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3"])
@torch.no_grad()
def test_families(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model = case.model()
    case.save(model, tmp_path / "hf")
    liquify(tmp_path / "hf", tmp_path / "out", Recipe(layers=(1,)))
    found = LiquidForCausalLM.from_directory(tmp_path / "out")
    expected = LiquidForCausalLM.from_directory(tmp_path / "hf")
    assert found.config.gated_layers == (1,)
    assert torch.equal(found(ids(97)).logits, expected(ids(97)).logits)


def test_it_compiles(static: Path, tmp_path: Path) -> None:
    liquify(static, tmp_path / "out", Recipe())
    with (
        liquidc.compile(static, tmp_path / "a") as a,
        liquidc.compile(tmp_path / "out", tmp_path / "b") as b,
    ):
        before, after = (list(e.generate("The end", max_new_tokens=12)) for e in (a, b))
    assert [t.id for t in before] == [t.id for t in after]
    assert {t.depth for t in after} == {6}


def test_base_weights_keep_their_type_and_gates_are_float32(static: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    liquidc.export.export_checkpoint(static, half, dtype="bfloat16")
    liquify(half, tmp_path / "out", Recipe())
    base, made = weights(half), weights(tmp_path / "out")
    for name, value in made.items():
        if "depth_gate" in name:
            assert value.dtype == torch.float32
        else:
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, base[name])
    assert LiquidConfig.from_file(tmp_path / "out").dtype == "bfloat16"


def test_influence_is_that_of_the_paper(static: Path, text: Path, tmp_path: Path) -> None:
    made = liquify(static, tmp_path / "out", Recipe(skip=1, data=text, length=32))
    model = LiquidForCausalLM.from_directory(static)
    states: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda m, args, out: states.append(args[0]))
    model.model.norm.register_forward_hook(lambda m, args, out: states.append(args[0]))
    tokens = torch.tensor(list(text.read_bytes())).unfold(0, 33, 32)[:, :-1]
    with torch.no_grad():
        model(tokens)
    expected = [
        1 - float((F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1).double().mean())
        for x, y in itertools.pairwise(states)
    ]
    assert len(made.influence) == 6
    assert made.influence == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_closed_layers_are_as_good_as_gone(static: Path, text: Path, tmp_path: Path) -> None:
    made = liquify(static, tmp_path / "out", Recipe(skip=2, data=text, length=64))
    gated = made.exported.config.gated_layers
    assert made.exported.config.depth_gate.kv_policy == "drop"
    assert list(made.closed) == sorted(sorted(gated, key=lambda i: made.influence[i])[:2])
    found = LiquidForCausalLM.from_directory(tmp_path / "out")
    result = found(ids())
    ran = [layer for layer, gate in zip(gated, result.gates, strict=True) if bool(gate.any())]
    assert ran == [layer for layer in gated if layer not in made.closed]
    shorter = LiquidForCausalLM.from_directory(static)
    kept = [layer for i, layer in enumerate(shorter.layers) if i not in made.closed]
    shorter.model.layers = torch.nn.ModuleList(kept)
    shorter.config = replace(shorter.config, num_hidden_layers=4)
    torch.testing.assert_close(result.logits, shorter(ids()).logits, rtol=1e-5, atol=1e-5)
    record = json.loads((tmp_path / "out" / "liquify.json").read_bytes())
    assert (record["method"], record["closed"]) == ("influence", list(made.closed))


TUNING = Tuning(steps=60, rows=4, rate=5e-2)


def test_training_changes_gates_and_adapters_alone(
    static: Path, text: Path, tmp_path: Path
) -> None:
    recipe = Recipe(run=0.5, adapter=8, data=text, length=32, tuning=TUNING)
    made = liquify(static, tmp_path / "out", recipe)
    liquify(static, tmp_path / "again", recipe)
    base, tuned = weights(static), weights(tmp_path / "out")
    fresh = tmp_path / "fresh"
    liquify(static, fresh, replace(recipe, tuning=replace(TUNING, steps=1, rate=1e-12)))
    start = weights(fresh)
    for name, value in tuned.items():
        if any(part in name for part in TRAINED):
            assert not torch.equal(value, start[name])
        else:
            assert torch.equal(value, base[name])
    for name in names(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert made.measured is not None
    target = made.exported.config.training.depth_target
    assert made.measured.depth < target + 0.03
    record = json.loads((tmp_path / "out" / "liquify.json").read_bytes())
    assert record["measured"]["loss"] == made.measured.loss


@torch.no_grad()
def test_what_is_measured(model_directory: Path) -> None:
    model = LiquidForCausalLM.from_directory(model_directory)
    rows = torch.tensor(list(TEXT.read_bytes()[: 40 * 64])).unfold(0, 65, 64)
    found = measure(model, rows)

    def loss(force: int) -> float:
        logits = model(rows[:, :-1], gate_force=torch.full((2,), force, dtype=torch.int8)).logits
        return float(F.cross_entropy(logits.transpose(1, 2), rows[:, 1:]))

    assert found.tokens == 39 * 64
    assert found.loss == pytest.approx(loss(0), rel=1e-5)
    assert found.loss_all == pytest.approx(loss(1), rel=1e-5)
    gates = model(rows[:, :-1]).gates.float().mean((1, 2))
    assert found.gates == pytest.approx(gates.tolist())
    assert found.skipped == pytest.approx(1 - float(gates.mean()))
    with random_gates(model, found.gates, 0):
        drawn = model(rows[:, :-1]).gates.float().mean((1, 2))
    assert drawn.tolist() == pytest.approx(gates.tolist(), abs=0.05)
    assert found.loss_random != pytest.approx(found.loss, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--skip", 1), "give one with --data"),
        (("--run", 0.5), "give one with --data"),
        (("--skip", 1, "--run", 0.5, "--data", TEXT), "not both"),
        (("--adapter",), "an adapter must be trained"),
        (("--run", 1.5, "--data", TEXT), "between 0 and 1"),
        (("--skip", 4, "--data", TEXT), "only 3 have gates"),
        (("--layers", "4-9"), "depth_gate.layers"),
        (("--layers", "x"), "no list such as"),
        (("--layers", "5-2"), "none is in the middle"),
        (("--skip", 1, "--data", "/nowhere.txt"), "no such file"),
        (("--run", 0.5, "--data", TEXT, "--rate", "nan"), "the learning rate is nan"),
    ],
)
def test_refusals(static: Path, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    result = call("liquify", static, "-o", tmp_path / "out", "--steps", 3, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.splitlines()[-1]
    assert names(tmp_path) == []


def test_more_refusals(
    static: Path, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    refused("has gates already", "liquify", model_directory, "-o", out)
    refused("no such directory", "liquify", tmp_path / "none", "-o", out)
    short = tmp_path / "short.txt"
    short.write_text("abc")
    refused("at least", "liquify", static, "-o", out, "--skip", 1, "--data", short)
    refused("at least", "liquify", static, "-o", out, "--run", 0.5, "--data", short)
    beyond = tmp_path / "ids.jsonl"
    beyond.write_text('{"ids": [1, 256]}\n')
    refused("beyond the vocabulary", "liquify", static, "-o", out, "--skip", 1, "--data", beyond)
    monkeypatch.setattr("liquidc.liquify.available_memory", lambda: 1000)
    refused("one is held at a time", "liquify", static, "-o", out, "--run", 0.5, "--data", TEXT)
    assert names(tmp_path) == ["ids.jsonl", "short.txt"]


def test_output(static: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = ok("liquify", static, "-o", out)
    assert made["files"] == names(out)
    assert "tokenizer.json" in made["files"]
    refused("--force replaces it", "liquify", static, "-o", out)
    before = weights(out)
    assert call("liquify", static, "-o", out, "--force", "--seed", 1).exit_code == 0
    name = "model.layers.2.depth_gate.proj1.weight"
    assert not torch.equal(before[name], weights(out)[name])
    (out / "mine.txt").write_text("x")
    refused("mine.txt is not part of a checkpoint", "liquify", static, "-o", out, "--force")
    assert names(tmp_path) == ["out"]


def test_what_people_see(static: Path, text: Path, tmp_path: Path) -> None:
    shown = call("liquify", static, "-o", tmp_path / "a", "--skip", 1, "--data", text)
    assert shown.exit_code == 0
    assert shown.stdout.count("never") == 1
    shown = call(
        *("liquify", static, "-o", tmp_path / "b", "--run", 0.5, "--adapter", "--data", text),
        *("--steps", 2, "--length", 32),
    )
    assert shown.exit_code == 0
    assert "at random" in shown.stdout
    assert "steps: 2 of 2" in shown.stderr
    config = LiquidConfig.from_file(tmp_path / "b")
    assert (config.depth_gate.skip_path, config.adapter_width) == ("adapter", 3)


def test_what_fails_leaves_nothing(
    static: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("liquidc.export.canonical", fail)
    with pytest.raises(KeyboardInterrupt):
        liquify(static, tmp_path / "deep" / "out", Recipe())
    assert names(tmp_path) == []


def test_open_model_reads_what_was_made(static: Path, tmp_path: Path) -> None:
    liquify(static, tmp_path / "out", Recipe())
    found = open_model(tmp_path / "out")
    assert found.config.num_gates == 3
    assert math.prod(found.weights["model.layers.2.depth_gate.proj1.weight"].sizes) == 2 * 32
    with pytest.raises(InputError, match="has gates already"):
        liquify(tmp_path / "out", tmp_path / "again", Recipe())
