"""Checkpoints of other families, read as Liquid Transformers: `open_model`.

A family is a file: how its config.json becomes a `LiquidConfig`, and of which tensors each of our
parameters is made, as lazy expressions. Nothing is converted on disk, and no code that comes with a
checkpoint is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from liquidc.errors import CheckpointError, ConfigError, LiquidWarning
from liquidc.ir.types import DType
from liquidc.records import read_object

if TYPE_CHECKING:
    from torch import nn

    from liquidc.frontend.checkpoint import CheckpointSource
    from liquidc.frontend.config import LiquidConfig
    from liquidc.frontend.families.common import Data, Family
    from liquidc.frontend.families.tensors import Tensors
    from liquidc.frontend.model import LiquidForCausalLM
    from liquidc.ir.weights import WeightExpr


_SAVED_IN = {DType.BF16: "bfloat16", DType.F16: "float16"}
"""`dtype` of a config by the element type of the embedding: what theirs says is often not so."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, checked.

    Attributes:
        config: config of the Liquid Transformer that computes the same.
        skeleton: that model on the meta device, without weights.
        weights: the expression that each of its parameters is computed from, by name.
        source: the tensors of the checkpoint.
    """

    config: LiquidConfig
    skeleton: LiquidForCausalLM
    weights: Mapping[str, WeightExpr]
    source: CheckpointSource

    def load(self) -> LiquidForCausalLM:
        """The float32 model with its weights."""
        import torch

        from liquidc.frontend.model import LiquidForCausalLM
        from liquidc.ir.weights import materialize

        model = LiquidForCausalLM(self.config)
        with torch.no_grad():
            for name, parameter in model.state_dict().items():
                parameter.copy_(materialize(self.weights[name], self.source))
        return model


@cache
def families() -> dict[str, Family]:
    """By the `model_type` of config.json."""
    from liquidc.frontend.families.flexidepth import DD_LLAMA, DD_QWEN3
    from liquidc.frontend.families.gpt_oss import GPT_OSS
    from liquidc.frontend.families.granitemoe import GRANITE_MOE, GRANITE_MOE_SHARED
    from liquidc.frontend.families.llama import LLAMA, MISTRAL
    from liquidc.frontend.families.llama4 import LLAMA4
    from liquidc.frontend.families.mixtral import MIXTRAL
    from liquidc.frontend.families.olmoe import OLMOE
    from liquidc.frontend.families.qwen2 import QWEN2
    from liquidc.frontend.families.qwen2_moe import QWEN2_MOE
    from liquidc.frontend.families.qwen3 import QWEN3
    from liquidc.frontend.families.qwen3_moe import QWEN3_MOE

    known = (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        OLMOE,
        GRANITE_MOE,
        GRANITE_MOE_SHARED,
        DD_LLAMA,
        DD_QWEN3,
        GPT_OSS,
        LLAMA4,
    )
    return {name: family for family in known for name in family.model_types}


def open_model(directory: Path) -> Checkpoint:
    """Read config.json and the headers of the weights.

    No weight is read, but for a head that is stored although it is tied: it is compared with the
    embedding, and used if they differ.

    Warns:
        LiquidWarning: tensors or fields that nothing uses, or such a head.

    Raises:
        ConfigError: the family or something in its config is not supported.
        CheckpointError: a tensor is missing, damaged or has another shape.
    """
    from liquidc.frontend.checkpoint import CheckpointSource

    data = read_object(directory / "config.json", ConfigError)
    source = CheckpointSource(directory)
    try:
        return _open(directory, data, source)
    except ConfigError as error:
        raise ConfigError(f"{directory / 'config.json'}: {error}") from None


def _open(directory: Path, data: dict[str, Any], source: CheckpointSource) -> Checkpoint:
    import torch

    from liquidc.frontend.config import LiquidConfig
    from liquidc.frontend.families.common import same
    from liquidc.frontend.families.tensors import Tensors
    from liquidc.frontend.model import LiquidForCausalLM

    kind = data.get("model_type")
    types = source.types()
    if kind == "liquid":
        text, family = data, None
        tensors = Tensors(directory, types)
    else:
        family = _family(data)
        text = data.get(family.section, data) if family.section else data
        found = [p for p in family.prefixes if any(n.startswith(f"{p}model.") for n in types)]
        tensors = Tensors(directory, types, found[0] if found else "")
    _refuse_more_layers_than_tensors(text, len(types))
    if family is None:
        config, read, told = LiquidConfig.from_dict(data), same, data
    else:
        config, read = read_family(family, text, tensors), family.weight
        told = config.to_dict()
    config = _tied_or_not(directory, config, tensors, source)
    with torch.device("meta"):
        model = LiquidForCausalLM(config)
    weights: dict[str, WeightExpr] = {}
    for name in model.state_dict():
        try:
            weights[name] = read(name, tensors, told) or _tensor(name, tensors, config)
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{directory}: tensors don't make up {name}: {error}") from None
    _check(directory, model, weights)
    if family is not None:
        stored = weights[EMBEDDING].type.dtype
        config = replace(config, dtype=_SAVED_IN.get(stored, "float32"))
    _tell_unused(directory, tensors.unused(family.ignored if family else ()))
    return Checkpoint(config, model, weights, source)


def _tied_or_not(
    directory: Path, config: LiquidConfig, tensors: Tensors, source: CheckpointSource
) -> LiquidConfig:
    """The config, not tied if there is a head of other numbers than the embedding.

    Warns:
        LiquidWarning: there is.
    """
    from liquidc.frontend.families.tensors import same_values

    if not (config.tie_word_embeddings and HEAD in tensors and EMBEDDING in tensors):
        return config
    if same_values(tensors[EMBEDDING], tensors[HEAD], source):
        return config
    warnings.warn(
        f"{directory}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}: "
        "both are used, as they are stored",
        LiquidWarning,
        stacklevel=2,
    )
    return replace(config, tie_word_embeddings=False)


def _tensor(name: str, tensors: Tensors, config: LiquidConfig) -> WeightExpr:
    """The tensor of a parameter's name; of two that are tied, the one that is stored."""
    swapped = config.tie_word_embeddings and name == EMBEDDING and name not in tensors
    return tensors[HEAD if swapped and HEAD in tensors else name]


def _refuse_more_layers_than_tensors(text: object, tensors: int) -> None:
    """Before a model of that many layers is made."""
    layers = cast("Data", text).get("num_hidden_layers") if isinstance(text, dict) else None
    if isinstance(layers, int) and layers > tensors:
        raise ConfigError(f"num_hidden_layers is {layers}; the checkpoint has {tensors} tensors")


def _family(data: Mapping[str, Any]) -> Family:
    kind, known = data.get("model_type"), families()
    family = known.get(kind) if isinstance(kind, str) else None
    custom = bool(data.get("auto_map"))
    if custom and (family is None or not family.custom_code):
        raise ConfigError(
            f"model_type {kind!r} brings code of its own (auto_map), which liquidc never runs"
        )
    if family is None:
        raise ConfigError(
            f"model_type is {kind!r:.80}; it must be one of liquid, {', '.join(sorted(known))}"
        )
    return family


def read_family(family: Family, text: object, tensors: Tensors) -> LiquidConfig:
    """A family's config as ours.

    Args:
        family: the family.
        text: the decoded config.json, or its section about the text model.
        tensors: of the checkpoint.

    Warns:
        LiquidWarning: fields that change nothing.

    Raises:
        ConfigError: a field is not supported.
    """
    from liquidc.frontend.config import LiquidConfig
    from liquidc.frontend.families.common import HARMLESS
    from liquidc.frontend.fields import Fields

    data = dict(cast("Data", text)) if isinstance(text, dict) else text
    for alias, name in family.aliases.items():
        if isinstance(data, dict) and alias in data:
            data[name] = data.pop(alias)
    fields = Fields("", data, family.defaults)
    fields.skip(HARMLESS)
    config = LiquidConfig.from_dict(family.read(fields, tensors))
    if idle := fields.without_effect():
        warnings.warn(
            f"{tensors.directory / 'config.json'}: fields that change nothing here: "
            f"{', '.join(idle)}",
            LiquidWarning,
            stacklevel=2,
        )
    return config


def _check(directory: Path, model: nn.Module, weights: Mapping[str, WeightExpr]) -> None:
    """Compare shapes and element types with the parameters.

    Raises:
        CheckpointError: one differs.
    """
    for name, parameter in model.state_dict().items():
        found, tensor = weights[name].type, ", ".join(dict.fromkeys(weights[name].sources()))
        if found.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{directory}: the tensor {tensor:.160} has the shape {list(found.shape)}, "
                f"the config asks for {list(parameter.shape)}"
            )
        if not found.dtype.is_float:
            raise CheckpointError(
                f"{directory}: the tensor {tensor:.160} has elements of {found.dtype}, "
                "not floating-point ones"
            )


def _tell_unused(directory: Path, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        warnings.warn(
            f"{directory}: {len(names)} tensors that the model does not use: {shown}",
            LiquidWarning,
            stacklevel=2,
        )
