"""generate of transformers and the engine's: the same greedy tokens, and what else it can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

import liquidc
import liquidc.hf
from liquidc.export import export_checkpoint
from tests.frontend.families.cases import CASES

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "tiny-liquid"
PROMPTS = ("The with statement", "12+7=", "Lists are ", "x")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(SAMPLE)


def text(prompt: str) -> torch.Tensor:
    return torch.tensor([list(prompt.encode())])


def greedy(model: Any, prompt: str, count: int = 24) -> list[int]:
    out = model.generate(text(prompt), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_the_engine_says_the_same(model: Any, tmp_path: Path) -> None:
    with liquidc.compile(SAMPLE, tmp_path / "engine") as engine:
        for prompt in PROMPTS:
            said = [token.id for token in engine.generate(prompt, max_new_tokens=24, temperature=0)]
            assert said == greedy(model, prompt)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_exported_families_and_their_engines(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    theirs = case.model()
    case.save(theirs, tmp_path / "hf")
    export_checkpoint(tmp_path / "hf", tmp_path / "out")
    exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    start = torch.tensor([[5, 9, 11, 20]])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = theirs.generate(start, **options)
    found = exported.generate(start, **options)
    assert found.tolist() == expected.tolist()
    with liquidc.compile(tmp_path / "out", tmp_path / "engine") as engine:
        said = [t.id for t in engine.generate(start[0].tolist(), max_new_tokens=20, temperature=0)]
    stop = next((i + 1 for i, t in enumerate(found[0, 4:].tolist()) if t == 2), 20)
    assert said[:stop] == found[0, 4 : 4 + stop].tolist()[: len(said)]


def test_a_batch_with_padding_in_front(model: Any) -> None:
    width = max(map(len, PROMPTS))
    rows = [[0] * (width - len(p)) + list(p.encode()) for p in PROMPTS]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    out = model.generate(
        torch.tensor(rows), attention_mask=mask, max_new_tokens=24, do_sample=False
    )
    for row, prompt in zip(out.tolist(), PROMPTS, strict=True):
        assert row[width:] == greedy(model, prompt)


def test_without_a_cache(model: Any) -> None:
    out = model.generate(text("Lists"), max_new_tokens=8, do_sample=False, use_cache=False)
    assert out[0, 5:].tolist() == greedy(model, "Lists", 8)


def test_beams(model: Any) -> None:
    """The best of several beams is at least as probable as the greedy text."""

    def log_probability(tokens: torch.Tensor) -> float:
        with torch.no_grad():
            scores = model(tokens).logits[:, :-1].log_softmax(-1)
        return float(scores.gather(2, tokens[:, 1:, None])[:, 4:].sum())

    one = model.generate(text("Lists"), max_new_tokens=10, do_sample=False)
    many = model.generate(text("Lists"), max_new_tokens=10, do_sample=False, num_beams=4)
    assert many.shape == one.shape
    assert log_probability(many) > log_probability(one)


def test_sampling(model: Any) -> None:
    torch.manual_seed(0)
    out = model.generate(text("The"), max_new_tokens=12, do_sample=True, num_return_sequences=3)
    assert len({tuple(row) for row in out.tolist()}) == 3


def test_controls_reach_the_gates(model: Any) -> None:
    plain = greedy(model, "The with")
    force = torch.full((6,), -1, dtype=torch.int8)
    out = model.generate(text("The with"), max_new_tokens=24, do_sample=False, gate_force=force)
    assert out[0, 8:].tolist() != plain


def test_a_pipeline(model: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(SAMPLE / "tokenizer.json"))
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (made,) = write("The with statement", max_new_tokens=12, do_sample=False)
    expected = bytes(greedy(model, "The with statement", 12)).decode("latin-1")
    assert made["generated_text"] == "The with statement" + expected
