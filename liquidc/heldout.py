"""Held-out text in windows, and the interpreter's logits for them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from liquidc.errors import InputError
from liquidc.files import read_utf8
from liquidc.ir import Module
from liquidc.ir.interpreter import Interpreter, first_call
from liquidc.ir.weights import WeightSource
from liquidc.profile import Profile
from liquidc.records import parse_json
from liquidc.tokenizer import Tokenizer

WINDOW = 256
"""Tokens that are run at a time, from an empty cache."""
MOST = 64
"""Windows that are run, unless more are asked for."""
Report = Callable[[str, int, int], None]
"""Told what is under way, how much is done and how much there is."""


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """Windows of text, and the bytes that the tokens after the first of each stand for.

    Ids that were given as such stand for no bytes: then `bytes` is empty.
    """

    sha256: str
    windows: tuple[tuple[int, ...], ...]
    bytes: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes by window; 0 for each window of ids."""
        return self.bytes or (0,) * len(self.windows)

    def half(self, number: int) -> HeldOutText:
        """Every other window, from `number` on."""
        return HeldOutText(self.sha256, self.windows[number::2], self.bytes[number::2])


def read_text(
    path: Path,
    tokenizer: Tokenizer | None,
    context: int | None,
    profile: Profile | None,
    most: int = MOST,
) -> HeldOutText:
    """Held-out text in at most so many windows, spread evenly over it; or ids, from a `.json`.

    Raises:
        InputError: it can't be read, is too short, or the profile was made with it.
    """
    text = held_out_text(path)
    data = text.encode()
    starts = list[int]()
    if path.suffix == ".json":
        ids = parse_ids(path, text)
    elif tokenizer is not None:
        ids, starts = tokenizer.spans(text)
    else:
        raise InputError(f"{path}: the model has no tokenizer to read it with; give token ids")
    sha256 = hashlib.sha256(data).hexdigest()
    if profile is not None and sha256 in profile.data:
        raise InputError(f"{path}: the profile was made with it; give text that is held out")
    size = min(WINDOW, context or WINDOW)
    places = [range(at, at + size) for at in range(0, len(ids) - size + 1, size)]
    if len(places) < 2:
        raise InputError(f"{path}: {len(ids)} tokens; at least {2 * size} are needed")
    chosen = (
        [places[i * len(places) // most] for i in range(most)] if len(places) > most else places
    )
    ends = [*starts, len(data)]
    return HeldOutText(
        sha256,
        tuple(tuple(ids[i] for i in place) for place in chosen),
        tuple(ends[place.stop] - starts[place.start + 1] for place in chosen if starts),
    )


def held_out_text(path: Path) -> str:
    """The text in a file of held-out data.

    Raises:
        InputError: there is none, it can't be read, or is not UTF-8.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: no held-out text; give one with --data FILE")
    return read_utf8(path, InputError)


def parse_ids(path: Path, text: str) -> list[int]:
    """The token ids in a JSON file.

    Raises:
        InputError: it is no list of ids.
    """
    ids = parse_json(text, str(path), InputError)
    if not isinstance(ids, list) or not all(type(i) is int for i in cast(list[Any], ids)):
        raise InputError(f"{path}: must be a list of token ids")
    return cast(list[int], ids)


class Scorer:
    """Logits of whole windows."""

    def __init__(self, module: Module, source: WeightSource) -> None:
        self._interpreter = Interpreter(module, source)
        self._args = module.functions["prefill"].args

    def logits(self, ids: Sequence[int], force: Sequence[int] = ()) -> NDArray[np.float32]:
        """f32[T, V]; `force` as `gate_force`."""
        return self.decided(ids, force)[0]

    def decided(
        self, ids: Sequence[int], force: Sequence[int] = ()
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The same, and the gates' decisions: bool[G, T], G being 0 in a model without gates."""
        inputs = first_call(self._args, ids)
        inputs["logit_index"] = torch.arange(len(ids))[None]
        if force:
            inputs["gate_force"] = torch.tensor(list(force), dtype=torch.int8)
        found = self._interpreter.run("prefill", inputs)
        gates = found["gates"][:, 0].numpy() if "gates" in found else np.zeros((0, len(ids)), bool)
        return found["logits"][0].numpy(), gates

    @contextmanager
    def replaced(self, weights: Mapping[str, torch.Tensor]) -> Generator[None]:
        """Other values for some weights."""
        known = self._interpreter.weights
        kept = {name: self._interpreter.weight(name) for name in weights}
        known |= weights
        try:
            yield
        finally:
            known |= kept
