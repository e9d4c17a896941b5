"""transformers itself, on the same directory: any config.json, and random weights that fit it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from liquidc.errors import CheckpointError, ConfigError
from liquidc.frontend.families.common import REFUSED
from liquidc.frontend.model import LiquidForCausalLM

TOKENS = 40
CLOSE = 1e-4
"""Of the largest logit. Both compute in float32, in another order: below 1e-5 is what is seen. A
window that is off by one, or a rule that is left out, changes logits by tenths."""
MOST_WEIGHTS = 300_000
"""Of a model that is made. Where a size is left out, transformers means one of billions."""
SAME, NOT_RUN = "same", "not run"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Stored:
    """A checkpoint.

    Attributes:
        config: its config.json.
        original: whether tensors have the names of the Hub, or those of transformers 5 in memory.
        base: whether `model.` is missing before names.
        prefix: before all names.
        head: stored with a tied model: None, or "equal" to or "other" than the embedding.
        more: names of tensors that no model reads.
        seed: of the weights.
    """

    config: Mapping[str, Any]
    original: bool = True
    base: bool = False
    prefix: str = ""
    head: str | None = None
    more: tuple[str, ...] = ()
    seed: int = 0


def outcome(stored: Stored, directory: Path) -> str:
    """`SAME`, `NOT_RUN` (by transformers), or the name of the field that is refused.

    Raises:
        AssertionError: the logits differ, or something is refused that `REFUSED` does not list.
    """
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")
        theirs = load(stored, directory)
        if theirs is None:
            return NOT_RUN
        try:
            ours = LiquidForCausalLM.from_directory(directory).eval()
        except (ConfigError, CheckpointError) as error:
            return NOT_RUN if logits(theirs, TOKENS) is None else refused_field(str(error))
        context = ours.config.max_position_embeddings
        assert context >= theirs.config.max_position_embeddings
        want = logits(theirs, min(TOKENS, context))
        if want is None:
            return NOT_RUN
        with torch.no_grad():
            got = ours(ids(want.shape[1])).logits
    error = (got - want).abs().max()
    assert error <= CLOSE * want.abs().max(), f"logits differ by {error:.2g}: {stored}"
    return SAME


def ids(tokens: int) -> torch.Tensor:
    """A prompt, i64[1, tokens]."""
    return torch.randint(97, (1, TOKENS), generator=torch.Generator().manual_seed(1))[:, :tokens]


def refused_field(message: str) -> str:
    """The field that a message names; it is on the list."""
    found = re.search(r"config\.json: ([\w.]+) is ", message)
    assert found, message
    name = re.sub(r"^rope_parameters", "rope_scaling", found[1])
    name = re.sub(r"\.type$", ".rope_type", name)
    assert name in REFUSED, message
    return name


def load(stored: Stored, directory: Path) -> Any:
    """Write the checkpoint and load it with transformers.

    None if transformers raises, makes up tensors, or would make a model that is too large.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    path = directory / "config.json"
    path.write_text(json.dumps(stored.config))
    try:
        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_WEIGHTS:
            return None
        write_weights(stored, AutoModelForCausalLM.from_config(config), directory)
        path.write_text(json.dumps(stored.config))
        model, told = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    except Exception:  # whatever it raises, it does not run
        return None
    return None if told["missing_keys"] or told["mismatched_keys"] else model.eval()


def logits(model: Any, tokens: int) -> torch.Tensor | None:
    """Of the prompt, f32[1, tokens, V]; None where transformers raises, or one is not finite."""
    try:
        with torch.no_grad():
            made = model(ids(tokens), use_cache=False).logits
    except Exception:  # whatever it raises, it does not run
        return None
    return made if bool(made.isfinite().all()) else None


def write_weights(stored: Stored, model: Any, directory: Path) -> None:
    """Random ones, large enough for every term to matter, under the names that are asked for."""
    numbers = torch.Generator().manual_seed(stored.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if parameter.dim() == 1 else 0.3
            parameter.normal_(std=spread, generator=numbers)
            if "norm" in name:
                parameter.add_(1.0)
    model.save_pretrained(directory, save_original_format=stored.original)
    file = directory / "model.safetensors"
    state = load_file(file)
    if stored.head and HEAD not in state:
        state[HEAD] = state[EMBEDDING].clone()
        if stored.head == "other":
            state[HEAD][-1, -1] += 1.0
    if stored.base:
        state = {name.removeprefix("model."): t for name, t in state.items()}
    state = {stored.prefix + name: t for name, t in state.items()}
    state |= {name: torch.ones(3) for name in stored.more}
    save_file(state, file)


@contextmanager
def one_thread() -> Iterator[None]:
    """Models are so small that threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
