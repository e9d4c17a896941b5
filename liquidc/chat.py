"""Chat templates: from messages to the text that a model was trained on.

A template is a program that comes with a checkpoint. It runs in a process of its own
(`liquidc.template_worker`), in a sandbox and under limits of memory and time; the process starts
with the first conversation and serves those that follow.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from liquidc.errors import InputError
from liquidc.files import read_file
from liquidc.inputs import TEMPLATE
from liquidc.special_tokens import TOKENIZER_CONFIG, read_special_tokens

WORKER = Path(__file__).with_name("template_worker.py")
TIMEOUT_SECONDS = 20
"""Seconds to wait for an answer, where a busy machine leaves little CPU time to the process."""
MAX_ANSWER_BYTES = 8 << 20
"""Bytes of an answer: a text of the permitted length as JSON, each character as an escape."""

Message = Mapping[str, Any]


class ChatTemplate:
    """A template; nothing of it runs before `check` or `render`.

    Args:
        text: in Jinja.
        where: its file, for messages.
        tokens: texts of special tokens, by names such as `bos_token`.
    """

    def __init__(self, text: str, where: Path, tokens: Mapping[str, str] | None = None) -> None:
        self._text, self._where, self._tokens = text, where, dict(tokens or {})
        self._worker: _Worker | None = None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens included.

        Args:
            messages: each with "role" and "content", of values that JSON can hold.
            add_generation_prompt: whether the beginning of an answer follows.

        Raises:
            ForbiddenTemplate: the template does what it may not do, or takes too long.
            InputError: it is not a valid template, it refuses the conversation or fails, or a
                message is malformed.
        """
        given = {
            **self._tokens,
            "messages": [_checked(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if self._worker is None:
            self._worker = self._start()
        return self._ask(self._worker, given)

    def check(self) -> None:
        """Render a short conversation; a template may refuse it, but must stay in its sandbox.

        Raises:
            ForbiddenTemplate: it does not.
            InputError: it is no template.
        """
        worker = self._start()
        try:
            self._ask(worker, {**self._tokens, "messages": [{"role": "user", "content": "Hello"}]})
        except ForbiddenTemplate:
            raise
        except InputError:
            return
        finally:
            worker.close()

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _start(self) -> _Worker:
        worker = _SPARE.pop() if _SPARE else _Worker()
        try:
            self._ask(worker, {"template": self._text})
        except InputError:
            worker.close()
            raise
        return worker

    def _ask(self, worker: _Worker, request: Mapping[str, Any]) -> str:
        """The text that the process answers.

        Raises:
            InputError: see `render`.
        """
        try:
            answer = worker.ask(request)
        except _Ended as ended:
            worker.close()
            self._worker = None
            answer = {"kind": "forbidden", "error": str(ended)}
        if "text" in answer:
            return answer["text"]
        error, kind = answer["error"], answer["kind"]
        if kind == "forbidden":
            raise ForbiddenTemplate(
                f"{self._where}: the chat template does what it may not do ({error})"
            )
        if kind == "none":
            raise InputError(f"{self._where}: the chat template is none ({error})")
        raise InputError(f"{self._where}: the chat template fails ({error})")


def start_early() -> None:
    """Start the process of the next template now: it takes 50 ms, in which an engine is loaded."""
    if not _SPARE:
        _SPARE.append(_Worker())


class ForbiddenTemplate(InputError):
    """A template that does what it may not do."""


class _Ended(Exception):
    """The process gave no answer; the message says why."""


class _Worker:
    """The process of a template.

    It gets no environment but the time zone and the directories in which Python finds Jinja.
    """

    def __init__(self) -> None:
        path = os.pathsep.join(entry for entry in sys.path if os.path.isabs(entry))
        environment = {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8:surrogatepass"}
        if (zone := os.environ.get("TZ")) is not None:
            environment["TZ"] = zone
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-B", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # so that Ctrl-C reaches us alone
        )
        self.close = weakref.finalize(self, _end, process)
        self._requests = cast("IO[bytes]", process.stdin)
        self._answers = cast("IO[bytes]", process.stdout).fileno()

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """The answer to one request.

        Raises:
            _Ended: there is none.
        """
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            raise _Ended(self._reason()) from None
        return cast("dict[str, str]", json.loads(self._line()))

    def _line(self) -> bytes:
        until = time.monotonic() + TIMEOUT_SECONDS
        poll = select.poll()
        poll.register(self._answers, select.POLLIN | select.POLLHUP)
        pieces: list[bytes] = []
        size = 0
        while not (pieces and pieces[-1].endswith(b"\n")):
            if not poll.poll(max(until - time.monotonic(), 0) * 1000):
                raise _Ended(f"no answer after {TIMEOUT_SECONDS} seconds")
            piece = os.read(self._answers, 1 << 16)
            size += len(piece)
            if not piece or size > MAX_ANSWER_BYTES:
                raise _Ended(self._reason())
            pieces.append(piece)
        return b"".join(pieces)

    def _reason(self) -> str:
        """Why the process is gone, or is to go."""
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "its answer is too long"
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "it takes too long"
        return f"its process ended with {code}"


_SPARE: list[_Worker] = []
"""The process that `start_early` started, until a template takes it."""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and free what belongs to it."""
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()
    process.wait()


def _checked(message: object) -> dict[str, Any]:
    """One message.

    Raises:
        InputError: it is no mapping, or holds what JSON can't.
    """
    if not isinstance(message, Mapping):
        raise InputError(f"a message is a mapping with role and content, not {message!r:.80}")
    made = dict(cast("Mapping[str, Any]", message))
    try:
        json.dumps(made)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"a message holds what JSON can't ({error})") from None
    return made


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
            raise InputError(f"{alone}: can't be read ({error})") from None
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
