"""What callers pass from Python: wrong types and closed engines are errors of ours, in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import liquidc
from liquidc.backends.base import THREADS_PER_CORE, RunnerOptions, max_threads
from liquidc.errors import EngineError, InputError
from liquidc.manifest import CacheInfo
from liquidc.pipeline import CompileOptions, compile_model, open_model
from liquidc.runtime import Engine
from liquidc.session import DepthControls
from tests.liquidc.fakes import FakeRunner, manifest

WRONG_IDS = ([1.7], ["1"], [True], [None], [[1]], [np.float32(1)], [1j], None, 3, 1.5, object)


@pytest.fixture(scope="module")
def engine(null_engine: Path) -> Iterator[Engine]:
    with liquidc.load(null_engine) as loaded:
        yield loaded


@pytest.mark.parametrize("ids", WRONG_IDS, ids=str)
def test_tokens_of_other_types(engine: Engine, ids: Any) -> None:
    session = engine.session(capacity=8)
    calls: list[Callable[[Any], object]] = [
        engine.generate,
        engine.encode,
        engine.logits,
        engine.evaluate,
        session.step,
    ]
    if ids != [[1]]:
        calls.append(session.prefill)
    for call in calls:
        with pytest.raises(InputError, match=r"must be (an integer|a list), not ") as caught:
            call(ids)
        assert "\n" not in str(caught.value)


WRONG: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 1.5},
    {"max_new_tokens": "2"},
    {"max_new_tokens": True},
    {"temperature": "hot"},
    {"temperature": True},
    {"temperature": 10**400},
    {"top_p": "x"},
    {"top_k": 1.5},
    {"min_p": [0]},
    {"repetition_penalty": "1"},
    {"seed": "x"},
    {"seed": 1.5},
    {"stop": 3},
    {"stop": "abc"},
    {"stop": [1.5]},
    {"stop": [b"x"]},
    {"gate_bias": "0"},
    {"gate_bias": 10**400},
    {"min_depth": 0.5},
    {"gate_force": [0.5, 1]},
    {"gate_force": "01"},
    {"gate_force": 1},
)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong}"[:40])
def test_options_of_generate_of_other_types(engine: Engine, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        engine.generate([1], **wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"batch": 1.5}, {"batch": "1"}, {"batch": True}, {"capacity": 2.0}, {"capacity": "x"}]
)
def test_sessions_of_other_types(engine: Engine, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be an integer"):
        engine.session(**wrong)
    with pytest.raises(InputError, match="chunk must be"):
        engine.session(capacity=4).prefill([1], chunk=0)


def test_integers_of_libraries_are_taken(engine: Engine) -> None:
    plain = [token.id for token in engine.generate([1, 2], 3)]
    for ids in (
        np.array([1, 2]),
        np.array([1, 2], np.int8),
        torch.tensor([1, 2]),
        (1, np.int32(2)),
    ):
        given: Any = ids
        assert [token.id for token in engine.generate(given, np.int64(3))] == plain  # pyright: ignore
    both: Any = np.array([[1, 2], [1, 2]])
    result = engine.session(np.int64(2), 4).prefill(both)  # pyright: ignore
    np.testing.assert_array_equal(result.logits[0], result.logits[1])


def test_a_cache_that_does_not_fit_is_not_allocated(engine: Engine) -> None:
    with pytest.raises(InputError, match="GB of memory are free"):
        engine.session(batch=10**9)
    many = Engine(manifest(cache=CacheInfo(4, "f3", ("B", "S"), "own")), FakeRunner())
    with pytest.raises(EngineError, match="a cache of 'f3'"):
        many.session()


@pytest.mark.parametrize("threads", [0, -1, 10**9, 10**30, 1.5, "2", True])
def test_threads(threads: Any) -> None:
    with pytest.raises(InputError, match=f"threads must be from 1 to {max_threads()}"):
        RunnerOptions(threads=threads)
    assert RunnerOptions(threads=THREADS_PER_CORE).threads == THREADS_PER_CORE


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_a_closed_engine(target: str, model_directory: Path, tmp_path: Path) -> None:
    compile_model(model_directory, tmp_path / "engine", CompileOptions(target=target))
    engine = liquidc.load(tmp_path / "engine")
    session = engine.session(capacity=8)
    session.prefill([1, 2])
    mark, tokens = session.mark(), engine.generate([1], 8)
    next(tokens)
    engine.close()
    engine.close()
    uses: list[Callable[[], object]] = [
        engine.__enter__,
        engine.session,
        lambda: engine.encode("a"),
        lambda: engine.chat([{"role": "user", "content": "a"}]),
        lambda: engine.generate("a"),
        lambda: engine.logits([1]),
        lambda: engine.evaluate([1]),
        lambda: list(tokens),
        lambda: session.prefill([1]),
        lambda: session.step([1]),
        lambda: session.step([1], depth=DepthControls(1.0)),
        lambda: session.rewind(mark),
        session.mark,
    ]
    for use in uses:
        with pytest.raises(InputError, match="the engine was closed; load it again"):
            use()


def test_models_engines_and_outputs_of_other_types(model_directory: Path) -> None:
    calls: list[Callable[[Any], object]] = [
        liquidc.load,
        open_model,
        lambda value: liquidc.compile(value, "out"),
        lambda value: liquidc.compile(model_directory, value),
    ]
    for call in calls:
        for value in (3, None, b"x", ["x"]):
            with pytest.raises(InputError, match=r"(must be a path|a model is a directory)"):
                call(value)


OPTIONS: dict[str, Any] = {
    "target": 3,
    "passes": "fuse-linear",
    "without": ["x"],
    "add": (1,),
    "profile": "p.json",
    "specialize": None,
    "quantize": 4,
    "portable_weights": 1,
    "target_size": 1.5,
    "max_kl": "0.1",
    "data": b"x",
    "start": ("passes", "x.ir"),
    "dump": 1,
    "resume": "yes",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_compile_options_of_other_types(name: str) -> None:
    with pytest.raises(InputError, match=f"the option {name} must be .*, not "):
        CompileOptions(**{name: OPTIONS[name]})


def test_compile_options_of_their_types() -> None:
    CompileOptions(max_kl=1, target_size=10, start=("passes", Path("x")), passes=("a", "b"))
