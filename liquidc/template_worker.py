"""The process in which a chat template runs: a program that came with a checkpoint.

`liquidc.chat` starts it as a script, and it imports nothing of liquidc. The template runs in the
immutable sandbox of Jinja: no files, no imports, no attributes of Python's own. Around the sandbox
the operating system limits memory, CPU time, writes and new processes (`resource`), since a single
call such as `'a'|center(3000000000)` can ask for gigabytes or minutes.

One JSON object a line. The first line on standard input is `{"template": TEXT}`; each further one
holds the variables of a conversation. Every line is answered by `{"text": TEXT}` or by
`{"error": LINE, "kind": KIND}`, where KIND is `none` (it is no template), `fails` (the template
raised an error) or `forbidden`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import resource
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, cast

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 1 << 20
"""Characters that a template may write."""
MAX_MEMORY_BYTES = 512 << 20
"""Bytes of address space; Python and Jinja take about 40 MiB of it."""
MAX_CPU_SECONDS = 1
"""CPU time of one conversation, up to one more; an honest one takes about a millisecond."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """What is forbidden is an error, not empty."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """See the base class.

        Raises:
            SecurityError: always.
        """
        raise SecurityError(f"{attribute} of {type(obj).__name__} is not for templates")


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


def compiled(text: str) -> Template:
    """The template.

    Raises:
        Exception: it is none. Jinja writes Python, and what Python refuses (a `break` outside of a
            loop, too many nested loops) is not a TemplateError.
    """
    return _environment().from_string(text)


def rendered(template: Template, given: Mapping[str, Any]) -> str:
    """What the template writes.

    Raises:
        SecurityError: it writes too much, or does what the sandbox forbids.
        Exception: whatever the template raises.
    """
    pieces: list[str] = []
    size = 0
    for piece in template.generate(given):
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise SecurityError(f"writes over {MAX_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


def limit_process() -> None:
    """Limit what this process may take; a limit that a system does not have is left out."""
    for kind, most in (
        ("RLIMIT_AS", MAX_MEMORY_BYTES),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_CORE", 0),
    ):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, kind), (most, most))


def limit_seconds() -> None:
    """Let the system end this process after `MAX_CPU_SECONDS` of CPU time, or up to one later."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + MAX_CPU_SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _answer(request: str, template: Template | None) -> tuple[dict[str, str], Template | None]:
    """The answer to one line, and the template that further lines use."""
    given = json.loads(request)
    try:
        if template is None:
            return {"text": ""}, compiled(given["template"])
        return {"text": rendered(template, given)}, template
    except (SecurityError, OverflowError, MemoryError, RecursionError) as error:
        return {"error": _line(error), "kind": "forbidden"}, template
    except Exception as error:  # a template can raise anything
        kind = "none" if template is None else "fails"
        return {"error": _line(error), "kind": kind}, template


def main() -> None:
    """Answer lines until there are no more."""
    limit_process()
    template: Template | None = None
    while line := sys.stdin.readline():
        limit_seconds()
        answer, template = _answer(line, template)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
