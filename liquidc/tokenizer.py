"""Text to token ids and back: thin over `tokenizers`, plus text that arrives token by token."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from liquidc.errors import InputError
from liquidc.files import read_file
from liquidc.records import parse_json, read_object
from liquidc.special_tokens import TOKENIZER_CONFIG, SpecialTokens, read_special_tokens
from liquidc.text import is_text

if TYPE_CHECKING:
    import tokenizers

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are not valid UTF-8 (yet)."""

_WINDOW = 64
"""Tokens after which text is given out although its last bytes are still not valid."""

T = TypeVar("T")


class Tokenizer:
    """A `tokenizer.json`, with the special tokens that the files beside it name.

    Text is encoded as by transformers 5.23: `truncation` and `padding` of the file are ignored, and
    its `post_processor` decides alone which tokens are put around a text (`add_bos_token` and
    `add_eos_token` of tokenizer_config.json have no effect beside a tokenizer.json).

    Attributes:
        named: texts of special tokens by their names, such as `bos_token`.

    Raises:
        InputError: a file can't be read.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        data = read_file(path, InputError)
        special = read_special_tokens(path.parent)
        _refuse_cut_merges(path, data)
        with _guarded(path, "not a tokenizer.json"):
            inner = tokenizers.Tokenizer.from_buffer(data)
            _add_tokens(inner, special)
            inner.no_truncation()
            inner.no_padding()
        if _adds_nothing(special.config, path.with_name("config.json")):
            inner.post_processor = tokenizers.processors.TemplateProcessing(
                single="$A", pair="$A $B"
            )
        self._path, self._inner = path, inner
        self.named, self._config = special.named, special.config
        added = inner.get_added_tokens_decoder().items()
        self._special = {token.content: index for index, token in added if token.special}

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self._inner.get_vocab_size()

    def notes(self) -> list[str]:
        """What tokenizer_config.json asks for and transformers does not do either."""
        around = self.encode("")
        told: list[str] = []
        for kind in ("bos", "eos"):
            asked, token = self._config.get(f"add_{kind}_token"), self.named.get(f"{kind}_token")
            does = token is not None and self._inner.token_to_id(token) in around
            if isinstance(asked, bool) and token is not None and asked != does:
                told.append(
                    f"{self._path.with_name(TOKENIZER_CONFIG)}: add_{kind}_token is "
                    f"{str(asked).lower()}, but the post_processor of {self._path.name} adds "
                    f"{'the token' if does else 'no such token'}; the latter is followed, as by "
                    "transformers"
                )
        return told

    def special_id(self, text: str) -> int | None:
        """The id of the special token with exactly this text, which `decode` leaves out.

        Raises:
            InputError: a special token is only a part of the text.
        """
        if text in self._special:
            return self._special[text]
        if part := max((t for t in self._special if t and t in text), key=len, default=""):
            raise InputError(
                f"{text!r:.80} contains the special token {part!r}, which is not part of any text "
                f"that is generated; give {part!r} alone"
            )
        return None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around it.

        `special` False: without them; those that are written in the text are read either way.

        Raises:
            InputError: the text holds a lone surrogate, so it has no UTF-8, or the tokenizer can't
                encode it.
        """
        return list(self._encoding(text, special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out.

        Raises:
            InputError: the tokenizer can't decode them.
        """
        with _guarded(self._path, "the tokenizer can't decode this"):
            return self._inner.decode(list(ids))

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text, and for each token the byte of the text where it starts.

        Raises:
            InputError: as `encode`.
        """
        encoding = self._encoding(text, True)
        sizes = [len(character.encode()) for character in text]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        return list(encoding.ids), [starts[begin] for begin, _ in encoding.offsets]

    def _encoding(self, text: str, special: bool) -> tokenizers.Encoding:
        if not is_text(text):
            raise InputError(f"{text!r:.80} is not valid Unicode text: it holds a lone surrogate")
        with _guarded(self._path, "the tokenizer can't encode this"):
            return self._inner.encode(text, add_special_tokens=special)


@contextmanager
def _guarded(path: Path, what: str) -> Generator[None]:
    """Turn whatever the library raises into an error of the file.

    Its errors have no narrower class than Exception, and its panics not even that one.

    Raises:
        InputError: it raised something.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise InputError(f"{path}: {what} ({error})") from None


_MARKS_PARTS = re.compile(rb'continuing_subword_prefix"\s*:\s*"[^"]|\\u00[4-7]')
"""Where tokens may mark that they continue a word; an escape can hide the field's name."""


def _refuse_cut_merges(path: Path, data: bytes) -> None:
    """Refuse a merge whose second part lacks the mark that every merge cuts off.

    `tokenizers` 0.23 cuts as many bytes anyway, and aborts the process if that splits a character.

    Raises:
        InputError: there is one.
    """
    if _MARKS_PARTS.search(data) is None:
        return
    told: Any = parse_json(data, str(path), InputError)
    try:
        mark, merges = told["model"]["continuing_subword_prefix"] or "", told["model"]["merges"]
        parts = [m.split(" ")[1] if isinstance(m, str) else m[1] for m in merges]
        cut = not all(part.startswith(mark) for part in parts)
    except (TypeError, KeyError, IndexError, AttributeError):
        return  # another kind of model, or none: the library says so
    if cut:
        raise InputError(f"{path}: not a tokenizer.json (a merge lacks {mark!r:.40})")


def _add_tokens(inner: tokenizers.Tokenizer, special: SpecialTokens) -> None:
    """Add what tokenizer.json lacks, as `TokenizersBackend.__init__` of transformers does."""
    from tokenizers import AddedToken

    known = {token.content: repr(token) for token in inner.get_added_tokens_decoder().values()}
    for token in special.listed:
        made = AddedToken(token.content, **token.flags)
        if repr(made) != known.get(token.content):
            made.special |= token.content in special.named.values()
            inner.add_tokens([made])
    known |= {token.content: "" for token in special.listed}
    for token in special.added:
        if token.content not in known:
            inner.add_tokens([AddedToken(token.content, **token.flags)])


def _adds_nothing(tokenizer_config: Mapping[str, Any], config: Path) -> bool:
    """Whether a model's class of tokenizers replaces the post-processor by one that adds nothing.

    `GPTNeoXTokenizer` of transformers does, and is also the class of OLMoE if none is named.
    """
    model = read_object(config, InputError) if os.path.lexists(config) else {}
    kind = model.get("model_type")
    named = tokenizer_config.get("tokenizer_class") or model.get("tokenizer_class")
    if kind in (
        "mistral",
        "mixtral",
        "qwen2",
    ):  # these have a class of their own, whatever is named
        return False
    if named is None:
        return kind == "olmoe"
    return str(named).removesuffix("Fast") == "GPTNeoXTokenizer"


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
