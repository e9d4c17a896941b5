"""The script that runs engines without liquidc, on every kind of engine."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

import liquidc
from liquidc.inputs import DirectoryInput
from liquidc.pipeline import compile_model
from liquidc.plan import CompileOptions
from tests.liquidc.conftest import CONFIG, save_byte_tokenizer, save_model
from tests.liquidc.profiles import made_profile, write_profile

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "samples" / "run_with_onnxruntime.py"
PROMPT, COUNT = "The with statement", 10

FIXED = ("fix-gates{gates=01}", "eliminate-dead")
"""What a budget adds: gate 0 never runs, so that its layer and its cache are gone."""
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "drop, sparse": ({}, {}),
    "own": ({"depth_gate": {"layers": [1, 2], "kv_policy": "own"}}, {}),
    "inherit": ({"depth_gate": {"layers": [1, 2], "kv_policy": "inherit"}, "moe": None}, {}),
    "two gates a layer": ({"depth_gate": {"layers": [1, 2], "scope": "attn_ffn"}}, {}),
    "no gates, sparse": ({"depth_gate": None}, {}),
    "no gates, dense": ({"depth_gate": None, "moe": None}, {}),
    "layers removed": ({}, {"add": FIXED}),
    "hot path": ({}, {"specialize": "exact"}),
    "int8": ({}, {"quantize": "int8{block=16}"}),
    "portable": ({}, {"quantize": "int4{block=16}", "portable_weights": True}),
    "fused experts": ({}, {"quantize": "int8{block=16}", "fused_experts": True}),
    "cache of codes": ({}, {"quantize_cache": "int8"}),
    "without control flow": ({}, {"target": "onnxruntime-fixed"}),
    "no gates, without control flow": ({"depth_gate": None}, {"target": "onnxruntime-fixed"}),
}


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """The script's functions."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """A checkpoint by what its config has of its own, written once."""
    made: dict[str, Path] = {}

    def make(changes: dict[str, Any]) -> Path:
        key = json.dumps(changes)
        if key not in made:
            config = {k: v for k, v in (CONFIG | changes).items() if v is not None}
            made[key] = save_model(tmp_path_factory.mktemp("models") / "m", config)
        return made[key]

    return make


@pytest.mark.parametrize("kind", ENGINES)
def test_it_writes_what_the_engine_writes(
    kind: str,
    script: dict[str, Any],
    checkpoint: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes, options = ENGINES[kind]
    model = checkpoint(changes)
    if "quantize_cache" in options:
        text = (model / "heldout.txt").read_text().replace("Wert", "Text")
        (tmp_path / "calibration.txt").write_text(text)
        options = {**options, "calibration": tmp_path / "calibration.txt"}
    if "specialize" in options:
        profile = made_profile(DirectoryInput(model).sha256)
        options = {**options, "profile": write_profile(profile, tmp_path / "profile.json")}
    engine = compile_model(model, tmp_path / "e", replace(CompileOptions(), **options)).engine
    text = script["generate"](engine, PROMPT, COUNT)
    printed = capsys.readouterr().out
    with liquidc.load(engine) as loaded:
        made = list(loaded.generate(PROMPT, COUNT, temperature=0))
        context = loaded.manifest.model.context
    assert text == Tokenizer.from_file(str(engine / "tokenizer.json")).decode([t.id for t in made])
    depths = [int(depth) for depth in re.findall(r"after (\d+) of 4 layers", printed)]
    assert depths == [token.depth for token in made]
    with pytest.raises(SystemExit, match=f"has 129 tokens, the context of the model {context}"):
        script["generate"](engine, "x" * 129, COUNT)


class Plain(nn.Module):
    """A module that is only `model(input_ids) -> logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.linear(self.table(input_ids), self.table.weight)


def test_an_engine_without_a_cache_is_refused(script: dict[str, Any], tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path / "tokenizer.json")
    liquidc.compile(Plain(), tmp_path / "e").close()
    (tmp_path / "tokenizer.json").rename(tmp_path / "e" / "tokenizer.json")
    with pytest.raises(SystemExit, match="has no cache: it computes the logits of whole sequences"):
        script["generate"](tmp_path / "e", PROMPT, COUNT)
