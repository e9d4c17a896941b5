"""Text to token ids and back: thin over `tokenizers`, plus text that arrives token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from liquidc.errors import InputError

if TYPE_CHECKING:
    import tokenizers

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are not valid UTF-8 (yet)."""

_WINDOW = 64
"""Tokens after which text is given out although its last bytes are still not valid."""

T = TypeVar("T")


class Tokenizer:
    """A `tokenizer.json`.

    Raises:
        InputError: the file can't be read.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._inner: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise InputError(f"{path}: not a tokenizer.json ({error})") from None

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self._inner.get_vocab_size()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around it.

        `special` False: without them; those that are written in the text are read either way.
        """
        return list(self._inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._inner.decode(list(ids))

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text, and for each token the byte of the text where it starts."""
        encoding = self._inner.encode(text)
        sizes = [len(character.encode()) for character in text]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        return list(encoding.ids), [starts[begin] for begin, _ in encoding.offsets]


class TextStream:
    """Turns tokens into text as they come; bytes of an unfinished character are held back.

    The texts that `push` and `flush` return, joined, are what `decode` gives for all tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._window: list[int] = []
        self._given = ""

    @property
    def pending(self) -> bool:
        """Whether tokens wait for the rest of a character."""
        return bool(self._window)

    def push(self, token: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._window.append(token)
        text = self._text()
        unfinished = text.endswith(REPLACEMENT) and len(self._window) < _WINDOW
        certain = text.rstrip(REPLACEMENT) if unfinished else text
        piece, self._given = certain[len(self._given) :], certain
        if not unfinished:
            self._restart()
        return piece

    def flush(self) -> str:
        """The rest, with replacement characters for bytes that never became valid."""
        piece = self._text()[len(self._given) :]
        self._restart()
        return piece

    def _text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._window)[len(before) :]

    def _restart(self) -> None:
        """Start anew, keeping a few tokens before: some decoders strip the space of the first."""
        self._context = (self._context + self._window)[-4:]
        while self._context and REPLACEMENT in self._decode(self._context):
            self._context.pop(0)
        self._window = []
        self._given = ""


class StopFilter(Generic[T]):
    """Holds back what may be the beginning of a stop string, and cuts at the first one found.

    Works on items with a text: `push` returns the pairs (item, text) that are certain.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held: list[tuple[T, str]] = []
        self.stopped = False

    def push(self, item: T, text: str) -> list[tuple[T, str]]:
        """Take one item; `stopped` is set when a stop string was found."""
        self._held.append((item, text))
        joined = "".join(part for _, part in self._held)
        found = [at for stop in self._stops if (at := joined.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found), cut=True)
        kept = max((_overlap(joined, stop) for stop in self._stops), default=0)
        return self._release(len(joined) - kept, cut=False)

    def flush(self) -> list[tuple[T, str]]:
        """Everything that is still held."""
        return self._release(sum(len(text) for _, text in self._held), cut=False)

    def _release(self, length: int, *, cut: bool) -> list[tuple[T, str]]:
        """The items whose text lies within the first `length` characters.

        With `cut`, an item that crosses the border is released with what lies before it.
        """
        done: list[tuple[T, str]] = []
        while self._held and len(self._held[0][1]) <= length:
            item, text = self._held.pop(0)
            length -= len(text)
            if cut and not text and not length:
                continue
            done.append((item, text))
        if cut and length and self._held:
            item, text = self._held[0]
            done.append((item, text[:length]))
        return done


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
