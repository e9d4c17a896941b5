"""An engine whose directory is replaced while it is loaded is the old one or the new one."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from liquidc.errors import EngineError
from liquidc.pipeline import CompileOptions, compile_model
from liquidc.runtime import load
from tests.liquidc.conftest import save_model

SWAP = """
import os, random, sys, time
engine, other, aside = sys.argv[1:]
chance = random.Random(0)
while True:
    time.sleep(chance.random() * 0.1)
    os.rename(engine, aside)
    os.rename(other, engine)
    os.rename(aside, other)
"""
IDS = [1, 2, 3, 250]


@contextmanager
def swapping(engine: Path, other: Path) -> Generator[None]:
    """Another process exchanges two directories all the time."""
    command = [sys.executable, "-c", SWAP, str(engine), str(other), f"{engine}.aside"]
    with subprocess.Popen(command) as process:
        try:
            yield
        finally:
            process.kill()


def loads(target: str, directory: Path, count: int) -> list[str]:
    """What comes of loading an engine that is replaced all the time: hashes or errors."""
    models = [save_model(directory / f"model{seed}", seed=seed) for seed in (0, 1)]
    (models[1] / "tokenizer_config.json").write_text('{"chat_template": "new"}')
    engines = [directory / "old", directory / "new"]
    expected: dict[str, tuple[np.ndarray, bool]] = {}
    for model, engine in zip(models, engines, strict=True):
        compile_model(model, engine, CompileOptions(target=target))
        with load(engine) as made:
            expected[made.manifest.sha256] = made.logits(IDS), engine.name == "new"
    assert len(expected) == 2
    found: list[str] = []
    with swapping(*engines):
        for _ in range(count):
            try:
                made = load(engines[0])
            except EngineError:
                found.append("error")
                continue
            with made:
                logits, chats = expected[made.manifest.sha256]
                np.testing.assert_array_equal(made.logits(IDS), logits)
                assert (made.chat_template is not None) == chats
                found.append(made.manifest.sha256)
    return found


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("null", 20),
        pytest.param("null", 500, marks=pytest.mark.slow),
        pytest.param("onnxruntime", 100, marks=pytest.mark.slow),
    ],
)
def test_never_a_mixture(target: str, count: int, tmp_path: Path) -> None:
    found = loads(target, tmp_path, count)
    assert len(found) == count
    if count >= 100:
        assert len(set(found) - {"error"}) == 2, "both were loaded"


def test_what_never_rests_is_an_error(
    null_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Path(shutil.copytree(null_engine, tmp_path / "engine"))
    chance = random.Random(0)
    monkeypatch.setattr("liquidc.runtime._stamps", lambda path: ((chance.random(),),))
    with pytest.raises(EngineError, match="changed each time while it was loaded"):
        load(engine)
