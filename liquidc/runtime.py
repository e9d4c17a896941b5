"""Running an engine: `liquidc.load(directory)` gives an `Engine`.

The engine generates token by token, says for each token which layers and experts ran, and gives
the logits of every position. All checks of what a caller passes are here; a runner only computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from liquidc.backends.base import Runner, RunnerOptions
from liquidc.backends.registry import TARGETS, get_backend
from liquidc.chat import ChatTemplate, read_chat_template
from liquidc.engine import check_files, list_files, read_manifest
from liquidc.errors import (
    ConfigError,
    EngineError,
    InputError,
    TargetUnavailable,
)
from liquidc.generation import Generation, read_generation
from liquidc.manifest import Manifest
from liquidc.sampling import Sampler
from liquidc.session import DepthControls, Ids, Session, StepResult, check_controls, check_ids
from liquidc.text import is_text
from liquidc.tokenizer import StopFilter, TextStream, Tokenizer
from liquidc.values import integer, integers, items, path_of

NEW_TOKENS = 64
"""How many tokens are generated if nobody says."""
ATTEMPTS = 20
"""How often a directory is read that is replaced while it is read."""


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        id: the token.
        text: the text that became certain with it; may be empty or belong to tokens before.
        logprob: its log-probability under the model.
        layers: the layers that ran to predict it, ascending; ungated layers included.
        experts: by layer, the experts that were used.
    """

    id: int
    text: str
    logprob: float
    layers: tuple[int, ...]
    experts: dict[int, tuple[int, ...]]

    @property
    def depth(self) -> int:
        """Number of layers that ran."""
        return len(self.layers)


def load(
    directory: str | Path,
    *,
    options: RunnerOptions | None = None,
) -> Engine:
    """Load the engine in `directory`.

    The schema, the target and every file's hash are checked before anything is deserialised. If
    the directory is replaced in the meantime, what is there then is loaded.

    Raises:
        EngineError: the engine is damaged, incomplete or too new, or it changes all the time.
        TargetUnavailable: its target can't run here.
    """
    path = path_of(directory, "an engine")
    for _ in range(ATTEMPTS):
        before = _stamps(path)
        try:
            engine = _load(path, options or RunnerOptions())
        except Exception:  # a mixture can fail anyhow
            if _stamps(path) == before:
                raise
            continue
        if before and _stamps(path) == before:
            return engine
        engine.close()
    raise EngineError(f"{path}: changed each time while it was loaded; load it when it is written")


def _load(path: Path, options: RunnerOptions) -> Engine:
    """The engine in `path`, or a mixture if the directory is replaced in the meantime."""
    manifest = read_manifest(path)
    name = manifest.target.get("name", "")
    if name not in TARGETS:
        raise TargetUnavailable(f"{path}: this liquidc has no target {name!r}; update it")
    backend = get_backend(name)
    reason = backend.availability() or backend.refuses(manifest.target)
    if reason is not None:
        raise TargetUnavailable(f"{path}: the target {name} can't run here: {reason}")
    check_files(path, manifest)
    tokenizer = path / "tokenizer.json"
    return Engine(
        manifest,
        backend.runner(path, manifest, options),
        tokenizer=Tokenizer(tokenizer) if tokenizer.exists() else None,
        chat_template=read_chat_template(path),
        generation=_generation(path),
        path=path,
    )


def _stamps(path: Path) -> tuple[tuple[object, ...], ...]:
    """What shows that a directory or a file in it was replaced; empty if there is none.

    A directory that was renamed and came back has another time of change (ctime).
    """
    try:
        found = [(name, (path / name).lstat()) for name in (".", *list_files(path))]
    except (OSError, EngineError):
        return ()
    return tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_ctime_ns) for name, s in found)


class Engine:
    """A loaded engine; use it as a context manager, or `close` it.

    Attributes:
        manifest: what the engine says about itself.
        tokenizer: None if the engine has none; then prompts are token ids.
        chat_template: None if the engine has none; then there is no `chat`.
        generation: how the model wants to be sampled, and what ends a text.
    """

    def __init__(
        self,
        manifest: Manifest,
        runner: Runner,
        *,
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        generation: Generation | None = None,
        path: Path | None = None,
    ) -> None:
        self.manifest = manifest
        self.runner = runner
        self.tokenizer = tokenizer
        self.generation = generation or Generation()
        self.chat_template = chat_template
        self.path = path
        layers: dict[int, list[int]] = {}
        for index, gate in enumerate(manifest.model.gates):
            layers.setdefault(gate.layer, []).append(index)
        self._gates_of = layers

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        """Check that there is an engine to run.

        Raises:
            InputError: it was closed.
        """
        if self.runner.closed:
            raise InputError("the engine was closed; load it again")

    def close(self) -> None:
        """Free the engine's memory and end the process of its chat template.

        Nothing can be computed afterwards; to close it again does nothing.
        """
        self.runner.close()
        if self.chat_template is not None:
            self.chat_template.close()

    def with_runner(self, runner: Runner) -> Engine:
        """This engine on another runner of its target; this one may be closed."""
        return Engine(
            self.manifest,
            runner,
            tokenizer=self.tokenizer,
            generation=self.generation,
            path=self.path,
        )

    def encode(self, prompt: str | Ids) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InputError: it is empty or not made of the engine's tokens, or the engine was closed.
        """
        self._check_open()
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("the engine has no tokenizer: give token ids")
            ids = self.tokenizer.encode(prompt) if prompt else []
        else:
            ids = integers(prompt, "the prompt")
        if not ids:
            raise InputError("the prompt is empty")
        check_ids(self.manifest, ids)
        return ids

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation and of the beginning of the next answer.

        Args:
            messages: each with "role" ("system", "user", "assistant") and "content".

        Raises:
            InputError: the engine has no tokenizer or no chat template, or the template refuses
                the conversation.
        """
        self._check_open()
        if self.tokenizer is None:
            raise InputError("the engine has no tokenizer: give token ids")
        if self.chat_template is None:
            raise InputError("the engine has no chat template: give a prompt")
        ids = self.tokenizer.encode(self.chat_template.render(messages), special=False)
        check_ids(self.manifest, ids)
        return ids

    def generate(
        self,
        prompt: str | Ids,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop: Sequence[str | int] = (),
        gate_bias: float = 0.0,
        min_depth: int = 0,
        gate_force: Sequence[int] | None = None,
    ) -> Iterator[Token]:
        """Continue a prompt.

        It ends after `max_new_tokens`, when the context is full, at an end-of-text token, at a
        token of `stop`, or at a string of `stop`; what ends it is not part of the result. A string
        that is the text of a special token, which no output shows, ends it as that token. Tokens
        whose text may be the beginning of a stop string come once that is decided.

        Args:
            prompt: text or token ids.
            max_new_tokens: 1 or more. This and the next five: None is what the model's
                generation_config.json says, else 64 tokens, taken greedily.
            temperature: 0 is greedy.
            top_p: nucleus; see `Sampler`.
            top_k: see `Sampler`.
            min_p: see `Sampler`.
            repetition_penalty: see `Sampler`.
            seed: of the sampling.
            stop: strings or token ids.
            gate_bias: see `DepthControls`.
            min_depth: see `DepthControls`.
            gate_force: see `DepthControls`.

        Raises:
            InputError: an argument is out of range, the prompt is empty or longer than the
                context, or the engine has no such control.
        """
        ids = self.encode(prompt)
        context = self.manifest.model.context
        if context is not None and len(ids) > context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the context of the model {context}; shorten it"
            )
        wants = self.generation
        if max_new_tokens is None:
            max_new_tokens = wants.max_new_tokens or NEW_TOKENS
            if wants.max_length is not None and wants.max_new_tokens is None:
                max_new_tokens = max(1, min(max_new_tokens, wants.max_length - len(ids)))
        max_new_tokens = integer(max_new_tokens, "max_new_tokens")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
        ends, texts = self._stops(stop)
        force = None if gate_force is None else tuple(integers(gate_force, "gate_force"))
        depth = DepthControls(gate_bias, min_depth, force)
        check_controls(self.manifest, depth)
        sampler = Sampler(
            wants.temperature if temperature is None else temperature,
            wants.top_p if top_p is None else top_p,
            seed,
            top_k=wants.top_k if top_k is None else top_k,
            min_p=wants.min_p if min_p is None else min_p,
            repetition_penalty=(
                wants.repetition_penalty if repetition_penalty is None else repetition_penalty
            ),
        )
        capacity = len(ids) + max_new_tokens - 1
        session = self.session(capacity=capacity if context is None else min(capacity, context))
        return self._generate(ids, max_new_tokens, session, sampler, depth, ends, texts)

    def _stops(self, stop: Sequence[str | int]) -> tuple[frozenset[int], tuple[str, ...]]:
        """Tokens and texts that end a generation; the text of a special token is also a token.

        Raises:
            InputError: an id is not in the vocabulary, or a text can't be found in any output.
        """
        given = items(stop, "stop")
        texts = tuple(text for text in given if isinstance(text, str))
        ids = integers([token for token in given if not isinstance(token, str)], "a stop token")
        check_ids(self.manifest, ids)
        if self.tokenizer is None:
            if texts:
                raise InputError("the engine has no tokenizer: give stop tokens as ids")
            return frozenset(ids), ()
        for text in texts:
            if not text:
                raise InputError("a stop string is empty")
            if not is_text(text):
                raise InputError(f"the stop string {text!r:.80} is not valid Unicode text")
            if (token := self.tokenizer.special_id(text)) is not None:
                ids.append(token)
        return frozenset(ids), texts

    def _generate(
        self,
        ids: Ids,
        count: int,
        session: Session,
        sampler: Sampler,
        depth: DepthControls,
        ends: frozenset[int],
        stop: Sequence[str],
    ) -> Iterator[Token]:
        ends |= self.generation.eos
        decode = self.tokenizer.decode if self.tokenizer is not None else _no_text
        stream = TextStream(decode)
        stops = StopFilter[Token](stop)
        waiting: list[Token] = []
        piece = ""
        seen = set(ids)
        result = session.prefill(ids, depth=depth)
        for made in range(1, count + 1):
            token, logprob = sampler.pick(result.logits[0, -1], seen)
            if token in ends:
                break
            seen.add(token)
            waiting.append(Token(token, "", logprob, *self.ran(result, 0, -1)))
            piece += stream.push(token)
            if not stream.pending:
                yield from _release(stops, waiting, piece)
                waiting, piece = [], ""
                if stops.stopped:
                    return
            if made == count or int(session.lengths[0]) >= session.capacity:
                break
            result = session.step([token], depth=depth)
        yield from _release(stops, waiting, piece + stream.flush())
        if not stops.stopped:
            yield from (replace(token, text=text) for token, text in stops.flush())

    def ran(
        self, result: StepResult, row: int, token: int
    ) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]]:
        """The layers and the experts that one token of a result used."""
        layers = tuple(
            layer
            for layer in range(self.manifest.model.layers)
            if all(result.gates[gate, row, token] for gate in self._gates_of.get(layer, ()))
        )
        experts: dict[int, tuple[int, ...]] = {}
        for info in self.manifest.model.experts if result.experts.size else ():
            chosen = result.experts[info.layer, row, token]
            if (chosen >= 0).any():
                experts[info.layer] = tuple(int(expert) for expert in chosen if expert >= 0)
        return layers, experts

    def logits(self, ids: Ids, *, depth: DepthControls | None = None) -> NDArray[np.float32]:
        """The logits of every position of one sequence: f32[T, V].

        Raises:
            InputError: `ids` is empty, longer than the context, or holds an unknown token.
        """
        return self.evaluate(ids, depth=depth).logits[0]

    def evaluate(self, ids: Ids, *, depth: DepthControls | None = None) -> StepResult:
        """All outputs for every position of one sequence, computed from an empty cache.

        Raises:
            InputError: as `logits`.
        """
        ids = integers(ids, "tokens")
        session = self.session(capacity=max(len(ids), 1))
        return session.prefill(ids, every=True, depth=depth)

    def session(self, batch: int = 1, capacity: int | None = None) -> Session:
        """A cache and the calls that use it.

        Args:
            batch: rows.
            capacity: tokens that each row can hold; default and limit is the model's context.

        Raises:
            InputError: out of range, or the engine was closed.
        """
        return Session(self.manifest, self.runner, batch, capacity)


def _generation(path: Path) -> Generation:
    """Of an engine.

    Raises:
        EngineError: a file in it is damaged.
    """
    try:
        return read_generation(path)
    except ConfigError as error:
        raise EngineError(str(error)) from None


def _release(stops: StopFilter[Token], tokens: Sequence[Token], text: str) -> Iterator[Token]:
    """Pass tokens on to the filter, `text` with the last of them, and yield what is certain."""
    for index, token in enumerate(tokens):
        part = text if index + 1 == len(tokens) else ""
        for item, certain in stops.push(token, part):
            yield replace(item, text=certain)
        if stops.stopped:
            return


def _no_text(ids: Ids) -> str:
    del ids
    return ""
