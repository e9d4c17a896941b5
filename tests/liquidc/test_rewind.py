"""A session goes back to an earlier moment and on from there as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import liquidc
from liquidc.errors import InputError
from liquidc.pipeline import compile_model
from liquidc.plan import CompileOptions


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_what_was_fed_since_is_forgotten(
    target: str, model_directory: Path, tmp_path: Path
) -> None:
    compile_model(model_directory, tmp_path / "engine", CompileOptions(target=target))
    with liquidc.load(tmp_path / "engine") as engine:
        session = engine.session(batch=2, capacity=32)
        session.prefill([[1, 2, 3], [4, 5, 6, 7]])
        mark = session.mark()
        first = [session.step([token, token + 1]) for token in (8, 9)]
        held = session.kv_len
        session.rewind(mark)
        assert session.lengths.tolist() == [3, 4]
        session.prefill([[200] * 5, [100] * 3])
        session.rewind(mark)
        again = [session.step([token, token + 1]) for token in (8, 9)]
        assert np.array_equal(session.kv_len, held)
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.logits, other.logits)
        assert np.array_equal(one.gates, other.gates)


def test_only_backwards_and_only_in_its_own_session(null_engine: Path) -> None:
    with liquidc.load(null_engine) as engine:
        session, other = engine.session(capacity=32), engine.session(batch=2, capacity=32)
        session.prefill([1, 2, 3])
        later = session.mark()
        fresh = engine.session(capacity=32)
        for wrong, mark in ((fresh, later), (other, later)):
            with pytest.raises(InputError, match="not of an earlier moment"):
                wrong.rewind(mark)
