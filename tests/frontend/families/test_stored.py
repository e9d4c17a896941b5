"""Tensors under other names, and heads that are stored although they are tied."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from liquidc.errors import CheckpointError, LiquidWarning
from liquidc.frontend.families import open_model, tensors
from liquidc.frontend.model import LiquidForCausalLM
from tests.frontend.families.cases import CASES
from tests.frontend.families.oracle import EMBEDDING, HEAD

State = dict[str, torch.Tensor]


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A Llama whose head is its embedding, and is not stored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = CASES["llama-tied-llama3-bias"]
        case.model().save_pretrained(tmp_path)
    return tmp_path


def change(directory: Path, by: Callable[[State], State]) -> None:
    """Of the tensors."""
    file = directory / "model.safetensors"
    save_file({name: t.contiguous() for name, t in by(load_file(file)).items()}, file)


def logits(directory: Path) -> torch.Tensor:
    """Of a short prompt."""
    with torch.no_grad():
        return LiquidForCausalLM.from_directory(directory).eval()(torch.arange(6)[None]).logits


def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    """A head made of the embedding."""
    return lambda state: {**state, HEAD: change(state[EMBEDDING].clone())}


def off_in_the_last_row(head: torch.Tensor) -> torch.Tensor:
    head[-1, -1] += 0.5
    return head


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_a_head_that_differs_is_used(
    block: int, tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = logits(tied)
    change(tied, with_head(off_in_the_last_row))
    monkeypatch.setattr(tensors, "BLOCK", block)
    with pytest.warns(LiquidWarning, match=r"but lm_head\.weight differs from model\.embed_tokens"):
        opened = open_model(tied)
    assert not opened.config.tie_word_embeddings
    assert opened.weights[HEAD].sources() == (HEAD,)
    with pytest.warns(LiquidWarning):
        got = logits(tied)
    assert torch.equal(got[..., :-1], want[..., :-1])
    assert not torch.equal(got[..., -1], want[..., -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_that_is_the_embedding_stays_tied(dtype: torch.dtype, tied: Path) -> None:
    want = logits(tied)
    change(tied, with_head(lambda head: head.to(dtype)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_model(tied).config.tie_word_embeddings
        assert torch.equal(logits(tied), want)


def test_a_head_of_another_shape(tied: Path) -> None:
    change(tied, with_head(lambda head: head[:-1]))
    with (
        pytest.warns(LiquidWarning),
        pytest.raises(CheckpointError, match=r"lm_head\.weight has the shape \[96, 32\]"),
    ):
        open_model(tied)


def test_a_head_without_an_embedding(tied: Path) -> None:
    want = logits(tied)
    change(tied, lambda state: {HEAD if n == EMBEDDING else n: t for n, t in state.items()})
    assert torch.equal(logits(tied), want)


def test_our_own_checkpoints_too(tied: Path) -> None:
    config = open_model(tied).config
    LiquidForCausalLM(config).save_directory(tied)
    assert json.loads((tied / "config.json").read_text())["tie_word_embeddings"] is True
    change(tied, with_head(off_in_the_last_row))
    with pytest.warns(LiquidWarning, match="tie_word_embeddings is true, but"):
        assert not open_model(tied).config.tie_word_embeddings


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"model.{name}",
        lambda name: name.removeprefix("model.") if ".1." in name else name,
    ],
    ids=["of the decoder alone", "once more", "mixed"],
)
def test_names(rename: Callable[[str], str], tied: Path) -> None:
    want = logits(tied)
    change(tied, lambda state: {rename(name): t for name, t in state.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(tied), want)


def test_a_missing_tensor_is_named_in_full(tied: Path) -> None:
    change(tied, lambda state: {n: t for n, t in state.items() if n != "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"the tensor model\.norm\.weight is missing"):
        open_model(tied)
