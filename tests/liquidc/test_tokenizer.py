"""Text that arrives token by token, and what holds it back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquidc.errors import InputError
from liquidc.tokenizer import StopFilter, TextStream, Tokenizer


def lossy(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


PIECES = st.lists(
    st.one_of(st.text(max_size=5).map(str.encode), st.binary(max_size=3)), max_size=12
).map(b"".join)


@given(PIECES)
def test_pieces_join_to_the_whole(data: bytes) -> None:
    stream = TextStream(lossy)
    text = "".join(stream.push(byte) for byte in data) + stream.flush()
    assert text == lossy(data)


def test_valid_text_comes_as_soon_as_it_can() -> None:
    stream = TextStream(lossy)
    assert [stream.push(byte) for byte in "aä€".encode()] == ["a", "", "ä", "", "", "€"]
    assert not stream.pending


def test_bytes_that_stay_invalid_are_given_out_after_a_while() -> None:
    stream = TextStream(lossy)
    pieces = [stream.push(0xFF) for _ in range(200)]
    assert sum(map(len, pieces)) >= 128


def test_a_decoder_that_strips_the_first_space() -> None:
    words = {0: "Hello", 1: "world", 2: "again"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(f" {words[i]}" for i in ids).lstrip()

    stream = TextStream(decode)
    assert [stream.push(i) for i in (0, 1, 2)] == ["Hello", " world", " again"]


@given(
    st.lists(st.text("abc", max_size=3), max_size=10),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_the_filter_cuts_at_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    filter_ = StopFilter[int](stops)
    out: list[tuple[int, str]] = []
    for index, piece in enumerate(pieces):
        out += filter_.push(index, piece)
        if filter_.stopped:
            break
    else:
        out += filter_.flush()
    text = "".join(pieces)
    ends = [text.index(stop) for stop in stops if stop in text]
    got = "".join(part for _, part in out)
    if ends:
        # the filter stops at the first piece that completes a stop string
        assert filter_.stopped
        assert text.startswith(got)
        assert not any(stop in got for stop in stops)
    else:
        assert got == text
        assert [index for index, _ in out] == list(range(len(pieces)))


def test_no_tokenizer_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer(path)
