"""Chat templates: from messages to the text that a model was trained on.

A template is a program that comes with a checkpoint. It runs in Jinja's immutable sandbox, without
files, imports or attributes of Python's own, and with a bound on its work and on what it writes.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn, cast

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from liquidc.errors import InputError
from liquidc.files import read_file
from liquidc.inputs import TEMPLATE
from liquidc.special_tokens import TOKENIZER_CONFIG, read_special_tokens

LARGEST = 1 << 20
"""Characters that a template may write, and items that a product in it may have."""
LINES = 1_000_000
"""Lines of a template's code that may be run for one conversation."""

Message = Mapping[str, Any]


class ChatTemplate:
    """A template, compiled.

    Args:
        text: in Jinja.
        where: its file, for messages.
        tokens: texts of special tokens, by names such as `bos_token`.

    Raises:
        InputError: it is no template.
    """

    def __init__(self, text: str, where: Path, tokens: Mapping[str, str] | None = None) -> None:
        self._where, self._tokens = where, dict(tokens or {})
        try:
            self._template = _environment().from_string(text)
        except (TemplateError, RecursionError, ValueError) as error:
            raise InputError(f"{where}: the chat template is none ({_line(error)})") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens included.

        Args:
            messages: each with "role" and "content".
            add_generation_prompt: whether the beginning of an answer follows.

        Raises:
            InputError: the template refuses the conversation, fails, or does what it may not do.
        """
        given = {
            **self._tokens,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with _bounded():
                return self._write(given)
        except (SecurityError, OverflowError, MemoryError, RecursionError) as error:
            raise ForbiddenTemplate(
                f"{self._where}: the chat template does what it may not do ({_line(error)})"
            ) from None
        except Exception as error:  # a template can raise anything
            raise InputError(f"{self._where}: the chat template fails ({_line(error)})") from None

    def check(self) -> None:
        """Render a short conversation; a template may refuse it, but must stay in its sandbox.

        Raises:
            ForbiddenTemplate: it does not.
        """
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except ForbiddenTemplate:
            raise
        except InputError:
            return

    def _write(self, given: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(given):
            size += len(piece)
            if size > LARGEST:
                raise SecurityError(f"writes over {LARGEST} characters")
            pieces.append(piece)
        return "".join(pieces)


class ForbiddenTemplate(InputError):
    """A template that does what it may not do."""


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """The template of a model or an engine: chat_template.jinja, else of tokenizer_config.json.

    Raises:
        InputError: a file is damaged.
    """
    path, special = directory / TOKENIZER_CONFIG, read_special_tokens(directory)
    config, tokens = special.config, special.named
    alone = directory / TEMPLATE
    if os.path.lexists(alone):
        try:
            return ChatTemplate(read_file(alone, InputError).decode(), alone, tokens)
        except UnicodeDecodeError as error:
            raise InputError(f"{alone}: can't be read ({_line(error)})") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        found = _default(path, cast("list[Any]", found))
    if found is None:
        return None
    if not isinstance(found, str):
        raise InputError(f"{path}: chat_template must be a text, or a list of named ones")
    return ChatTemplate(found, path, tokens)


def _default(path: Path, named: list[Any]) -> object:
    """The template "default" of a list of names and templates."""
    try:
        return {each["name"]: each["template"] for each in named}.get("default")
    except (TypeError, KeyError):
        raise InputError(f"{path}: chat_template must be a list of names and templates") from None


class _Sandbox(ImmutableSandboxedEnvironment):
    """What is forbidden is an error, not empty; products and powers are bounded."""

    intercepted_binops = frozenset({"*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """See the base class.

        Raises:
            SecurityError: always.
        """
        raise SecurityError(f"{attribute} of {type(obj).__name__} is not for templates")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See the base class.

        Raises:
            SecurityError: the result would be too large.
        """
        sizes = [len(x) if isinstance(x, str | list | tuple) else x for x in (left, right)]
        if operator == "**" or any(x is not y for x, y in zip(sizes, (left, right), strict=True)):
            small = all(isinstance(x, int | float) and abs(x) <= LARGEST for x in sizes)
            if operator == "**":
                small = small and abs(sizes[1]) <= 64 and abs(sizes[0]) <= 1 << 16
            elif small:
                small = abs(sizes[0] * sizes[1]) <= LARGEST
            if not small:
                raise SecurityError(f"a result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


class _Marked(Extension):
    """`{% generation %}`: what an assistant said, marked for training; it is written as it is."""

    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Sandbox:
    """With the functions that transformers gives to templates."""
    made = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marked, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    cast("dict[str, Any]", made.globals).update(raise_exception=_refuse, strftime_now=_now)
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


@contextmanager
def _bounded() -> Generator[None]:
    """Count the lines of template code that run.

    Raises:
        SecurityError: there are too many.
    """
    left = LINES
    before = sys.gettrace()

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        del argument
        if event == "call":
            return count if frame.f_code.co_filename == "<template>" else None
        left -= 1
        if left < 0:
            raise SecurityError(f"runs over {LINES} lines")
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
