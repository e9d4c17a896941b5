"""Caches of codes in ONNX Runtime, over the grid of cache policies and gate scopes.

The engine is compared with the interpreter on the same module. Both round keys and values to the
nearest code; where one lies at a tie, the last bit of a float decides, and everything after it may
move by a step. Where all codes are the same, results must be as near as those of float engines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import liquidc
from liquidc.backends.base import RunnerOptions
from liquidc.runtime import Engine
from tests.oracle.drive import CAPACITY, Arrays, controls
from tests.oracle.engines import model
from tests.oracle.grid import VOCAB, Batch, Case, grid
from tests.oracle.reference import tolerance

CASES = {case.name: case for case in grid()}
SOME = list(CASES)[::3]
TIES = 1e-3
"""Codes of the first layer where any differ that may: of elements spread over hundreds of steps,
far fewer lie so near a tie that float32, right to about 1e-6 of a step's hundredfold, rounds them
another way. What such a step moves in later layers is less than a step of theirs."""


def build(case: Case, directory: Path, target: str) -> Engine:
    """An engine with a cache of codes."""
    ids = directory / "ids.json"
    numbers = torch.Generator().manual_seed(1)
    ids.write_text(json.dumps(torch.randint(VOCAB, (256,), generator=numbers).tolist()))
    options: dict[str, Any] = {"quantize_cache": "int8", "calibration": ids}
    liquidc.compile(model(case), directory / target, target=target, **options).close()
    return liquidc.load(directory / target, options=RunnerOptions(threads=1))


def codes(engine: Engine, cache: Any) -> Arrays:
    """The slots that are taken, by cache."""
    found: Arrays = {}
    tensors = cache.buffers if hasattr(cache, "buffers") else cache.tensors
    for name, tensor in tensors.items():
        array = tensor.numpy()
        assert array.dtype == np.int8
        lengths = cache.kv_len[int(name.split(".")[1])]
        taken = np.arange(array.shape[2]) < lengths[:, None]
        found[name] = np.where(taken[:, None, :, None], array, 0)
    assert found or engine.manifest.cache is None
    return found


def drive(engine: Engine, case: Case, batch: Batch, chunk: int | None) -> tuple[Arrays, Arrays]:
    """Logits and decisions of all tokens, and the codes afterwards."""
    cache = engine.runner.new_cache(len(batch.prompts), CAPACITY)
    parts: dict[str, list[Any]] = {"logits": [], "gates": [], "experts": []}
    for piece in [batch] if chunk is None else batch.chunks(chunk):
        outputs = engine.runner.step(controls(case, piece), cache)
        for name, values in parts.items():
            if name in outputs:
                values.append(np.array(outputs[name]))
    joined = {n: np.concatenate(v, 1 if n == "logits" else 2) for n, v in parts.items() if v}
    return joined, codes(engine, cache)


def by_layer(want: Arrays, got: Arrays) -> list[Any]:
    """Steps between codes, of the layers from the first one with a difference."""
    steps: dict[int, list[Any]] = {}
    for name in want:
        apart = np.abs(got[name].astype(int) - want[name])
        steps.setdefault(int(name.split(".")[1]), []).append(apart)
    layers = [np.stack(steps[number]) for number in sorted(steps)]
    first = next((i for i, layer in enumerate(layers) if layer.any()), len(layers))
    return layers[first:]


def compare(name: str, directory: Path) -> tuple[int, int]:
    """Check a case; how many runs had the same codes, and how many there were."""
    case = CASES[name]
    same = total = 0
    with build(case, directory, "null") as oracle, build(case, directory, "onnxruntime") as engine:
        for batch in case.batches():
            valid = np.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
            wanted, want = drive(oracle, case, batch, None)
            for chunk in (None, 3, 1):
                outputs, got = drive(engine, case, batch, chunk)
                assert want.keys() == got.keys()
                total += 1
                if apart := by_layer(want, got):
                    assert np.count_nonzero(apart[0]) <= TIES * apart[0].size, batch.name
                    assert max(layer.max() for layer in apart) == 1, batch.name
                    continue
                same += 1
                for key in ("gates", "experts"):
                    if key in wanted:
                        both = (outputs[key], wanted[key])
                        np.testing.assert_array_equal(*(x[:, valid] for x in both))
                difference = np.abs(outputs["logits"] - wanted["logits"])[valid].max()
                allowed = tolerance(case.config) * np.abs(wanted["logits"][valid]).max()
                assert difference <= allowed, (batch.name, chunk, difference, allowed)
    return same, total


@pytest.mark.parametrize("name", SOME)
def test_whole_chunked_and_token_by_token(name: str, tmp_path: Path) -> None:
    same, total = compare(name, tmp_path)
    assert same > 0.8 * total


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in SOME])
def test_whole_chunked_and_token_by_token_of_the_rest(name: str, tmp_path: Path) -> None:
    same, total = compare(name, tmp_path)
    assert same > 0.8 * total


def test_some_policies_scopes_and_head_sizes_are_among_them() -> None:
    configs = [CASES[name].config for name in SOME]
    gates = [config["depth_gate"] for config in configs if "depth_gate" in config]
    assert {gate["kv_policy"] for gate in gates} == {"own", "drop", "inherit"}
    assert {gate["scope"] for gate in gates} == {"layer", "attn", "ffn", "attn_ffn"}
    assert {config.get("head_dim") for config in configs} >= {16, 12}
