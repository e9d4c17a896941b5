"""The module of docs/protocol.md, taken from the page: traced, interpreted and compiled."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import liquidc
from liquidc.frontend import protocol

PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
IDS = torch.tensor(np.random.default_rng(3).integers(0, 64, (1, 20)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page's model: with seed 0, its gates decide both ways."""
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path_factory.mktemp("page") / "page_model.py"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        page = importlib.import_module("page_model")
        torch.manual_seed(0)
        yield page.Model().eval()
        del sys.modules["page_model"]


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_the_example_compiles(target: str, model: Any, tmp_path: Path) -> None:
    """Prefill, chunks and decode give the logits of PyTorch's whole sequence."""
    with torch.no_grad():
        want = model(IDS)[0].numpy()
    engine = liquidc.compile(model, tmp_path / "engine", target=target)
    ids = IDS[0].tolist()
    whole = engine.session(capacity=len(ids)).prefill(ids, every=True)
    session = engine.session(capacity=len(ids))
    parts = [session.prefill(ids[:9], every=True, chunk=4)]
    parts += [session.step([token]) for token in ids[9:]]
    assert all(0 < gate.mean() < 1 for gate in whole.gates)
    assert (whole.experts >= 0).any()
    for logits in (whole.logits, np.concatenate([part.logits for part in parts], 1)):
        np.testing.assert_allclose(logits[0], want, rtol=1e-5, atol=1e-5)
    gates = np.concatenate([part.gates for part in parts], 2)
    np.testing.assert_array_equal(gates, whole.gates)


def test_the_example_trains(model: Any) -> None:
    """Gradients reach every parameter, the gates' by the straight-through estimate."""
    model.zero_grad()
    model(IDS).logsumexp(-1).sum().backward()
    without = [n for n, t in model.named_parameters() if t.grad is None or not t.grad.any()]
    assert without == []


def test_every_call_is_on_the_page() -> None:
    """The functions that a layer may call, and no other, are in the page's table."""
    listed = set(re.findall(r"^\| `(?:step\.)?(\w+)\(", PAGE.read_text(encoding="utf-8"), re.M))
    calls = listed - {"embed", "head", "new_cache"}
    assert all(hasattr(protocol, name) or hasattr(protocol.Step, name) for name in calls)
    hidden = {"is_exporting", "straight_through", "attend_sequence"}
    public = {
        name
        for name, value in vars(protocol).items()
        if callable(value) and getattr(value, "__module__", "") == protocol.__name__
        if not isinstance(value, type) and not name.startswith("_")
    }
    assert public - hidden == calls - {"depth_gate"}
