"""A Liquid Transformer out of a checkpoint without gates: `liquify`.

Gates are added to the middle layers with a bias that lets every token run, so that the new model
computes what the old one did. Then, if asked for, the layers that change their input least are
closed (`influence`), or gates and adapters are trained against a budget (`gate_tuning`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liquidc.corpus import Corpus
from liquidc.directory import check_output
from liquidc.errors import ConfigError, InputError
from liquidc.export import Exported, checkpoint_files, typed, write_checkpoint
from liquidc.frontend.config import DepthGateConfig, LiquidConfig
from liquidc.frontend.families import Checkpoint, open_model
from liquidc.gate_tuning import TRAINED, Measurement, Tuning
from liquidc.heldout import Report
from liquidc.ir.types import DType, TensorType
from liquidc.ir.weights import Stored, WeightExpr, WeightSource, byte_size, materialize
from liquidc.measure import available_memory
from liquidc.records import canonical
from liquidc.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from liquidc.frontend.model import LiquidForCausalLM

RECORD = "liquify.json"
"""What was done, beside the checkpoint's own files."""
WILLING = 1.0
"""Score of a gate that starts to run: sigmoid gives 0.73."""
CLOSED = -10.0
"""Score of a gate that never runs, whatever bias an operator adds within reason."""
SPARED_BELOW, SPARED_ABOVE = 2, 1
"""Layers at both ends that get no gate: published models gate neither (D-LLM, Router-Tuning)."""
INFLUENCE_TOKENS = 65_536
"""Of the text, at most so many tokens go through the model to measure influence."""
HELD_OUT = 10
"""One in so many tokens, at the end of the text, is not trained on but measured."""
MEASURED_WINDOWS = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make of the checkpoint.

    Attributes:
        layers: that get gates; None: all but the first two and the last.
        kv_policy: own, drop or inherit; "" is drop if layers are closed, which then have no cache,
            else own, on which quality depends (FlexiDepth's ablation).
        adapter: width of an adapter for tokens that skip, 0: the default width, None: none.
        skip: close so many gated layers, those of least influence.
        run: train the gates until this share of the gated work is done; None: don't train.
        data: text for both, .jsonl or plain.
        length: tokens of a window.
        tuning: how to train.
    """

    layers: tuple[int, ...] | None = None
    kv_policy: str = ""
    adapter: int | None = None
    skip: int = 0
    run: float | None = None
    data: Path | None = None
    length: int = 256
    tuning: Tuning = field(default_factory=Tuning)

    def check(self) -> None:
        """Find contradictions.

        Raises:
            InputError: there is one.
        """
        if self.run is not None and not 0 < self.run < 1:
            raise InputError(f"the share of the gated work is {self.run}; between 0 and 1 is right")
        if not 0 < self.tuning.rate < math.inf:
            raise InputError(f"the learning rate is {self.tuning.rate}; it must be positive")
        if self.skip and self.run is not None:
            raise InputError("close layers or train their gates: not both at once")
        if self.adapter is not None and self.run is None:
            raise InputError("an adapter must be trained: say how much is to run")
        if (self.skip or self.run is not None) and self.data is None:
            raise InputError("influence and training need a text; give one with --data FILE")


@dataclass(frozen=True, slots=True)
class Liquified:
    """What was made.

    Attributes:
        exported: the checkpoint.
        influence: of each layer, if it was measured.
        closed: layers that never run.
        measured: the trained model on text that it was not trained on.
    """

    exported: Exported
    influence: tuple[float, ...] = ()
    closed: tuple[int, ...] = ()
    measured: Measurement | None = None


def liquify(
    model: Path,
    output: Path,
    recipe: Recipe,
    *,
    force: bool = False,
    report: Report = lambda what, done, total: None,
) -> Liquified:
    """Write a Liquid checkpoint made from the checkpoint directory `model`.

    Args:
        model: of any family that is supported, without gates.
        output: the directory to be.
        recipe: what to do.
        force: replace a checkpoint that is there.
        report: told how far it is.

    Raises:
        InputError: the model has gates, or is not supported; the recipe does not fit it; the text
            is too short; the output can't be written.
    """
    recipe.check()
    check_output(output, force=force)
    if os.path.realpath(model) == os.path.realpath(output):
        raise InputError(f"{output}: is the model itself; write elsewhere")
    files = checkpoint_files(model)
    found = open_model(model)
    config = gated_config(found.config, recipe)
    gates = fresh_gates(config, recipe.tuning.seed)
    influence: list[float] = []
    closed: list[int] = []
    measured = None
    if recipe.skip:
        influence, closed = _close(found, config, gates, recipe, model, report)
    elif recipe.run is not None:
        measured = _tune(found, config, gates, recipe, model, report)
    return Liquified(
        write_checkpoint(
            output,
            config,
            {**typed(found, config.dtype), **_expressions(gates)},
            _Joined(gates, found.source),
            {**files, RECORD: _record(recipe, config, influence, closed, measured)},
            force=force,
            report=report,
        ),
        tuple(influence),
        tuple(closed),
        measured,
    )


def gated_config(config: LiquidConfig, recipe: Recipe) -> LiquidConfig:
    """The config with gates.

    Raises:
        ConfigError: it has gates already, or the recipe does not fit it.
    """
    from liquidc.frontend.loss import depth_at

    if config.num_gates:
        raise ConfigError(f"the model has gates already, in layers {list(config.gated_layers)}")
    layers = recipe.layers
    if layers is None:
        layers = tuple(range(SPARED_BELOW, config.num_hidden_layers - SPARED_ABOVE))
    if not layers:
        raise ConfigError(
            f"of {config.num_hidden_layers} layers none is in the middle; name some with --layers"
        )
    if recipe.skip > len(layers):
        raise ConfigError(f"{recipe.skip} layers can't be closed: only {len(layers)} have gates")
    gate = DepthGateConfig(
        layers=layers,
        router_bias=True,
        kv_policy=recipe.kv_policy or ("drop" if recipe.skip else "own"),
        skip_path="identity" if recipe.adapter is None else "adapter",
        adapter_intermediate_size=recipe.adapter or None,
    )
    gated = LiquidConfig.from_dict(replace(config, depth_gate=gate).to_dict())
    if recipe.run is None:
        return gated
    target = round(depth_at(gated, recipe.run, (recipe.length + 1) / 2), 4)
    return replace(gated, training=replace(gated.training, depth_target=target))


def fresh_gates(config: LiquidConfig, seed: int) -> dict[str, Tensor]:
    """Gates that let every token run, and adapters that add nothing, f32 by parameter name."""
    import torch
    from torch import nn

    from liquidc.frontend.layers import Layer

    gates: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for index in config.gated_layers:
            with torch.device("meta"):
                layer = Layer(config, index)
            for part in TRAINED:
                module = getattr(layer, part)
                if not isinstance(module, nn.Module):
                    continue
                for name, shape in ((n, p.shape) for n, p in module.named_parameters()):
                    last = name.startswith(("proj2.", "down_proj."))
                    value = torch.zeros(shape)
                    if "norm" in name:
                        value = torch.ones(shape)
                    elif name.endswith("weight") and not last:
                        value = torch.randn(shape) * shape[-1] ** -0.5
                    gates[f"model.layers.{index}.{part}.{name}"] = value
            set_score(gates, index, WILLING)
    return gates


def set_score(gates: Mapping[str, Tensor], layer: int, score: float) -> None:
    """Let a fresh gate have this score for every token."""
    gates[f"model.layers.{layer}.depth_gate.proj2.bias"].fill_(score)


def _close(
    found: Checkpoint,
    config: LiquidConfig,
    gates: Mapping[str, Tensor],
    recipe: Recipe,
    model: Path,
    report: Report,
) -> tuple[list[float], list[int]]:
    """Measure influence and close the gates of the layers that have least."""
    from liquidc.influence import block_influence

    tokens = read_tokens(recipe.data, model, config.vocab_size, most=INFLUENCE_TOKENS)
    windows = _windows(tokens, recipe, config, INFLUENCE_TOKENS)[:, :-1]
    influence = block_influence(found, windows, report)
    closed = sorted(sorted(config.gated_layers, key=lambda i: (influence[i], i))[: recipe.skip])
    for layer in closed:
        set_score(gates, layer, CLOSED)
    return influence, closed


def _tune(
    found: Checkpoint,
    config: LiquidConfig,
    gates: dict[str, Tensor],
    recipe: Recipe,
    model: Path,
    report: Report,
) -> Measurement:
    """Train the gates, in place, and measure them."""
    from liquidc.gate_tuning import measure, tune

    tokens = read_tokens(recipe.data, model, config.vocab_size)
    length = min(recipe.length, config.max_position_embeddings)
    split = len(tokens) - max(len(tokens) // HELD_OUT, length + 1)
    if split <= length:
        raise InputError(
            f"{recipe.data}: {len(tokens)} tokens; at least {2 * length + 3} are needed"
        )
    _refuse_if_too_large(model, found)
    network = _network(found, config, gates)
    tune(network, tokens[:split], length, recipe.tuning, report)
    trained = network.state_dict()
    for name in gates:
        gates[name] = trained[name].detach().clone()
    held = tokens[split:].unfold(0, length + 1, length)
    report("windows measured", 0, 1)
    measured = measure(network, held[:: max(1, len(held) // MEASURED_WINDOWS)])
    report("windows measured", 1, 1)
    if not math.isfinite(measured.loss):
        raise InputError(f"the loss is {measured.loss} after training; lower the learning rate")
    return measured


def _network(
    found: Checkpoint, config: LiquidConfig, gates: Mapping[str, Tensor]
) -> LiquidForCausalLM:
    """The model in float32."""
    import torch

    from liquidc.frontend.model import LiquidForCausalLM

    network = LiquidForCausalLM(config)
    with torch.no_grad():
        for name, parameter in network.state_dict().items():
            known = gates.get(name)
            value = materialize(found.weights[name], found.source) if known is None else known
            parameter.copy_(value)
    return network


def read_tokens(data: Path | None, model: Path, vocabulary: int, most: int | None = None) -> Tensor:
    """A text's tokens i64[N], its documents one after the other.

    Raises:
        InputError: it can't be read.
    """
    import torch

    if data is None:
        raise InputError("no text; give one with --data FILE")
    file = model / "tokenizer.json"
    encode = Tokenizer(file).encode if file.exists() else None
    tokens: list[int] = []
    for block in Corpus(data, encode).blocks(1 << 30):
        for ids in block.sequences:
            tokens += ids
        if most is not None and len(tokens) > most:
            break
    worst = max(tokens, key=lambda id: max(id, -1 - id), default=0)
    if not 0 <= worst < vocabulary:
        raise InputError(f"{data}: the id {worst} is beyond the vocabulary of {vocabulary}")
    return torch.tensor(tokens, dtype=torch.int64)


def _windows(tokens: Tensor, recipe: Recipe, config: LiquidConfig, most: int) -> Tensor:
    length = min(recipe.length, config.max_position_embeddings)
    if len(tokens) <= length:
        raise InputError(f"{recipe.data}: {len(tokens)} tokens; at least {length + 1} are needed")
    return tokens.unfold(0, length + 1, length)[: max(1, most // length)]


def _refuse_if_too_large(model: Path, found: Checkpoint) -> None:
    """Training holds the model in float32; say so before memory ends.

    Raises:
        InputError: there is not enough.
    """
    needed = sum(byte_size(e.type.with_dtype(DType.F32)) for e in found.weights.values())
    free = available_memory()
    if needed > free:
        raise InputError(
            f"{model}: training holds the weights in float32, {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; close layers instead (--skip): one is held at a time"
        )


class _Joined:
    """New tensors, and those of the checkpoint; a `WeightSource`."""

    def __init__(self, gates: Mapping[str, Tensor], source: WeightSource) -> None:
        self._gates, self._source = gates, source

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor."""
        if name in self._gates:
            return self._gates[name][start:stop]
        return self._source.read_rows(name, start, stop)


def _expressions(gates: Mapping[str, Tensor]) -> dict[str, WeightExpr]:
    """Gates stay float32: decisions are made in it."""
    return {
        name: Stored(name, TensorType(DType.F32, tuple(value.shape)))
        for name, value in gates.items()
    }


def _record(
    recipe: Recipe,
    config: LiquidConfig,
    influence: Sequence[float],
    closed: Sequence[int],
    measured: Measurement | None,
) -> bytes:
    told: dict[str, Any] = {
        "method": "influence" if closed else "tuning" if measured else "none",
        "gated_layers": list(config.gated_layers),
        "depth_target": config.training.depth_target if measured else None,
        "influence": list(influence),
        "closed": list(closed),
        "steps": recipe.tuning.steps if measured else 0,
        "measured": measured.told() if measured else None,
    }
    return canonical(told)
