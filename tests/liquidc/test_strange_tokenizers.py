"""Tokenizers on which the library panics or gives up: errors of the file, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from liquidc.errors import InputError
from liquidc.tokenizer import Tokenizer
from tests.liquidc.test_bytes_at_the_edges import one_line, process

VOCABULARY = {"a": 0, "b": 1, "ab": 2, "é": 3}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8AAAAA"}
"""It parses, and normalising with it reads beyond the end of a table."""
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "[X]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {},
}


def tokenizer(path: Path, model: dict[str, Any] | None = None, **changes: Any) -> Path:
    bpe: dict[str, Any] = {"type": "BPE", "vocab": VOCABULARY, "merges": []}
    told = {"version": "1.0", "added_tokens": [], "model": bpe | (model or {})}
    path.write_text(json.dumps(told | changes))
    return path


@pytest.mark.parametrize(
    "told",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"merges": ["a b"], "continuing_subword_prefix": "####"}},
        {"model": {"merges": [["a", "é"]], "continuing_subword_prefix": "x"}},
        {"model": {"merges": "a b"}},
        {"model": {"type": "Unigram", "vocab": [["a", "x"]]}},
    ],
    ids=str,
)
def test_what_can_t_be_read(told: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"t\.json: not a tokenizer\.json \(.+\)") as caught:
        Tokenizer(tokenizer(tmp_path / "t.json", **told))
    assert "\n" not in str(caught.value)


def test_an_escape_in_a_name_hides_nothing(tmp_path: Path) -> None:
    path = tokenizer(tmp_path / "t.json", {"merges": ["a é"], "continuing_subword_prefix": "x"})
    path.write_text(path.read_text().replace('"continuing', '"\\u0063ontinuing'))
    with pytest.raises(InputError, match="a merge lacks 'x'"):
        Tokenizer(path)


def test_marks_of_parts_of_words(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "##b": 1, "ab": 2}
    model = {"vocab": vocabulary, "merges": ["a ##b"], "continuing_subword_prefix": "##"}
    assert Tokenizer(tokenizer(tmp_path / "t.json", model)).encode("ab") == [2]


@pytest.mark.parametrize(
    "told",
    [
        {"normalizer": CHARSMAP},
        {"post_processor": TEMPLATE},
        {"model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "[UNK]"}},
        {"model": {"unk_token": "none"}},
    ],
    ids=str,
)
def test_what_can_t_be_used(told: dict[str, Any], tmp_path: Path) -> None:
    made = Tokenizer(tokenizer(tmp_path / "t.json", **told))
    with pytest.raises(InputError, match=r"t\.json: the tokenizer can't encode this") as caught:
        made.encode("a z")
    assert "\n" not in str(caught.value)


def test_a_panic_prints_one_line(model_directory: Path, tmp_path: Path) -> None:
    """The library prints the stack and text of the file itself, to the descriptor."""
    model = Path(shutil.copytree(model_directory, tmp_path / "model"))
    tokenizer(model / "tokenizer.json", normalizer=CHARSMAP | {"precompiled_charsmap": "AAAA"})
    done = process("compile", model, "--target", "null", "--dry-run", env={"RUST_BACKTRACE": "1"})
    assert (done.returncode, done.stdout) == (2, b"")
    one_line(done.stderr, "not a tokenizer.json")
