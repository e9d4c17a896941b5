"""Engine and Session over a runner whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from liquidc.errors import EngineError, InputError
from liquidc.generation import Generation
from liquidc.runtime import Engine, Token
from liquidc.session import DepthControls
from liquidc.tokenizer import Tokenizer
from tests.liquidc.fakes import CONTEXT, FakeRunner, manifest


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_of = {character: index for index, character in enumerate(_byte_order(alphabet))}
    inner = Inner(models.BPE(vocab=bytes_of, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    inner.save(str(path))
    return Tokenizer(path)


def _byte_order(alphabet: list[str]) -> list[str]:
    """The characters that stand for the bytes 0 to 255, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    order = [chr(byte) if byte in plain else chr(next(shifted)) for byte in range(256)]
    assert sorted(order) == alphabet
    return order


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    return Engine(manifest(), FakeRunner(), tokenizer=tokenizer)


def text_of(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


def test_greedy_text_and_what_ran(engine: Engine) -> None:
    tokens = list(engine.generate("abc", 3))
    assert text_of(tokens) == "def"
    assert [token.id for token in tokens] == [100, 101, 102]
    # "d" was predicted from "c" (99): odd, not above 99
    assert tokens[0].layers == (0, 3)
    assert tokens[1].layers == (0, 1, 2, 3)
    assert tokens[2].layers == (0, 2, 3)
    assert [token.depth for token in tokens] == [2, 4, 3]
    assert tokens[0].experts == {3: (3, 0)}
    assert tokens[0].logprob == pytest.approx(-np.log(1 + 255 * np.exp(-8.0)), rel=1e-6)


def test_ids_in_place_of_text() -> None:
    engine = Engine(manifest(), FakeRunner())
    tokens = list(engine.generate([7], 2))
    assert [(token.id, token.text) for token in tokens] == [(8, ""), (9, "")]
    with pytest.raises(InputError, match="no tokenizer: give token ids"):
        engine.generate("text", 2)
    with pytest.raises(InputError, match="no tokenizer: give stop tokens"):
        engine.generate([7], 2, stop=["x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [256]}, "token 256 is not in the vocabulary of 256"),
        ({"prompt": [-1]}, "token -1 is not"),
        ({"prompt": "x" * (CONTEXT + 1)}, "33 tokens, the context of the model 32"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, not 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"min_depth": 5}, "min_depth must be from 0 to 4, not 5"),
        ({"gate_bias": float("inf")}, "gate_bias must be finite"),
        ({"gate_force": [1]}, "gate_force must be 2 numbers, each -1, 0 or 1"),
        ({"gate_force": [1, 2]}, "gate_force must be 2 numbers"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    engine: Engine, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate(**({"prompt": "a", "max_new_tokens": 4} | arguments))  # pyright: ignore
    assert isinstance(engine.runner, FakeRunner)
    assert not engine.runner.calls


def test_controls_are_refused_without_gates() -> None:
    from dataclasses import replace

    plain = manifest()
    prefill = plain.functions["prefill"]
    fewer = replace(prefill, inputs=prefill.inputs[:4])
    plain = replace(plain, model=replace(plain.model, gates=()), functions={"prefill": fewer})
    engine = Engine(plain, FakeRunner())
    for name, value in (("gate_bias", 1.0), ("min_depth", 1), ("gate_force", ())):
        with pytest.raises(InputError, match=f"no depth gates to control: leave out {name}"):
            engine.generate([1], 1, **{name: value})  # pyright: ignore


def test_controls_reach_the_engine(engine: Engine) -> None:
    list(engine.generate("ab", 2, gate_bias=0.5, min_depth=3, gate_force=[-1, 1]))
    assert isinstance(engine.runner, FakeRunner)
    for call in engine.runner.calls:
        assert call["gate_force"].tolist() == [-1, 1]
        assert call["gate_force"].dtype == np.int8
        assert call["gate_bias"].tolist() == [0.5]
        assert call["min_depth"].tolist() == [3]


def test_a_prompt_that_fills_the_context_gets_one_token(engine: Engine) -> None:
    assert len(list(engine.generate("x" * CONTEXT, 10))) == 1
    assert len(list(engine.generate("x" * (CONTEXT - 3), 10))) == 4


def test_end_of_text_ends_it(tokenizer: Tokenizer) -> None:
    engine = Engine(
        manifest(),
        FakeRunner(),
        tokenizer=tokenizer,
        generation=Generation(eos=frozenset({ord("d")})),
    )
    assert text_of(list(engine.generate("a", 10))) == "bc"


def test_stop_strings_and_stop_tokens(engine: Engine) -> None:
    assert text_of(list(engine.generate("a", 10, stop=["ef"]))) == "bcd"
    assert text_of(list(engine.generate("a", 10, stop=["zz", "d"]))) == "bc"
    assert text_of(list(engine.generate("a", 10, stop=[ord("e")]))) == "bcd"
    # the beginning of a stop string at the very end is not lost
    assert text_of(list(engine.generate("a", 3, stop=["dx"]))) == "bcd"


def test_text_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    answer = "ä€😀".encode()
    runner = FakeRunner(lambda token, position: (answer + b"!!!")[position])
    engine = Engine(manifest(), runner, tokenizer=tokenizer)
    tokens = list(engine.generate("a", len(answer)))
    assert [token.text for token in tokens] == ["", "ä", "", "", "€", "", "", "", "😀"]
    # cut in the middle of a character: replacement, as decoding at once gives
    tokens = list(engine.generate("a", 4))
    assert text_of(tokens) == "ä\ufffd"


def test_sampling_is_reproducible_and_follows_its_seed(tokenizer: Tokenizer) -> None:
    engine = Engine(manifest(), FakeRunner(), tokenizer=tokenizer)

    def ids(seed: int) -> list[int]:
        return [t.id for t in engine.generate("a", 20, temperature=5.0, top_p=0.9, seed=seed)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_logits_of_every_position_come_in_chunks(engine: Engine) -> None:
    ids = list(range(50, 80))
    logits = engine.logits(ids)
    assert logits.shape == (30, 256)
    assert logits.dtype == np.float32
    assert logits.argmax(-1).tolist() == list(range(51, 81))
    session = engine.session()
    result = session.prefill(ids, every=True, chunk=7)
    np.testing.assert_array_equal(result.logits[0], logits)
    assert isinstance(engine.runner, FakeRunner)
    starts = [int(call["position_start"][0]) for call in engine.runner.calls[-5:]]
    assert starts == [0, 7, 14, 21, 28]
    assert result.gates.shape == (2, 1, 30)
    with pytest.raises(InputError, match="no tokens to run"):
        engine.logits([])


def test_ragged_rows_keep_their_own_lengths(engine: Engine) -> None:
    session = engine.session(batch=3, capacity=16)
    result = session.prefill([[1, 2, 3, 4, 5], [7], [9, 10]], chunk=2)
    assert result.logits.shape == (3, 1, 256)
    assert result.logits[:, 0].argmax(-1).tolist() == [6, 8, 11]
    assert session.lengths.tolist() == [5, 1, 2]
    assert result.experts[3, 1, 1:].tolist() == [[-1, -1]] * 4
    result = session.step([6, 8, 0], active=[True, True, False])
    assert result.logits[:2, 0].argmax(-1).tolist() == [7, 9]
    assert session.lengths.tolist() == [6, 2, 2]
    assert session.kv_len[0].tolist() == [6, 2, 2]


def test_sessions_refuse_what_does_not_fit(engine: Engine) -> None:
    with pytest.raises(InputError, match=r"33 tokens asked for; .* at most the context"):
        engine.session(capacity=CONTEXT + 1)
    with pytest.raises(InputError, match="batch must be 1 or more"):
        engine.session(batch=0)
    session = engine.session(capacity=3)
    session.prefill([1, 2])
    with pytest.raises(InputError, match="row 0 holds 2 of 3 tokens; 2 more don't fit"):
        session.prefill([3, 4])
    with pytest.raises(InputError, match="tokens for 2 rows, the session has 1"):
        session.prefill([[1], [2]])
    with pytest.raises(InputError, match="2 tokens for 1 rows"):
        session.step([1, 2])


def test_an_engine_without_cache_only_evaluates() -> None:
    engine = Engine(manifest(cache=None), FakeRunner())
    assert engine.logits([1, 2, 3]).shape == (3, 256)
    session = engine.session(capacity=8)
    session.prefill([1, 2])
    with pytest.raises(InputError, match="the engine has no cache"):
        session.step([3])


def test_logits_that_are_not_finite_are_reported(engine: Engine) -> None:
    class Broken(FakeRunner):
        def step(self, inputs, cache):  # pyright: ignore
            out = super().step(inputs, cache)  # pyright: ignore
            return out | {"logits": out["logits"] * np.nan}

    broken = engine.with_runner(Broken())
    with pytest.raises(EngineError, match="not finite"):
        list(broken.generate("a", 1))


def test_close_frees_the_runner() -> None:
    runner = FakeRunner()
    with Engine(manifest(), runner) as engine:
        assert engine.session(depth := 1)
        assert depth == 1
    assert runner.closed


def test_depth_controls_default_is_nothing() -> None:
    assert DepthControls() == DepthControls(0.0, 0, None)
