"""Builds what the contenders load: checkpoints, engines, an exported ONNX file, GGUF files."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.shapes import SAMPLE, random_model, wide, without_gates
from bench.suite.compiles import compiled
from liquidc.frontend.model import LiquidForCausalLM

NEEDS = {
    "torch.compile": "torch",
    "plain export": "onnxscript",
    "OpenVINO": "openvino",
    "llama.cpp F32": "llama_cpp",
    "llama.cpp Q4_0": "llama_cpp",
    "llama.cpp Q8_0": "llama_cpp",
}
"""Packages of contenders that are not liquidc's own."""
QUANTISED = {"liquidc int4": "int4{head=same,block=64}", "liquidc int8": "int8"}
"""Q4_0 has a float16 scale for 32 weights, 4.5 bits a weight: as int4 with a float32 for 64."""


@dataclass(frozen=True, slots=True)
class Contender:
    """What a worker loads: the kind of peer and its file or directory."""

    kind: str
    path: Path


@dataclass(slots=True)
class Built:
    """All contenders of one model.

    Attributes:
        contenders: by name.
        missing: why others are not there, by name.
        compiles: seconds and peak memory of our compiles, by name.
        gates, vocabulary, context: of the model.
    """

    contenders: dict[str, Contender]
    missing: dict[str, str]
    compiles: dict[str, Any]
    gates: int
    vocabulary: int
    context: int


@dataclass(slots=True)
class Builder:
    """Builds in a directory, one contender after the other.

    Args:
        directory: where files go.
        shape, policy, vocabulary: of the model.
        say: told what is being built.
    """

    directory: Path
    shape: str
    policy: str
    vocabulary: int
    say: Callable[[str], None]
    compiles: dict[str, Any] = field(default_factory=dict[str, Any])
    missing: dict[str, str] = field(default_factory=dict[str, str])

    def build(self, wanted: list[str]) -> Built:
        """Those of the contenders that can be had here."""
        checkpoint, static = self.directory / "checkpoint", self.directory / "static"
        model = self._model()
        model.save_directory(checkpoint)
        without_gates(model).save_directory(static)
        config = model.config
        gates = config.num_gates
        limits = (gates, config.vocab_size, config.max_position_embeddings)
        made: dict[str, Contender] = {}
        for name in wanted:
            package = NEEDS.get(name)
            if package is not None and importlib.util.find_spec(package) is None:
                self.missing[name] = f"the package {package} is not installed"
                continue
            self.say(f"building {name}")
            if name in ("plain export", "OpenVINO"):
                path = self.directory / "plain.onnx"
                if not path.exists():
                    export(model, path)
                made[name] = Contender("export" if name == "plain export" else "openvino", path)
            elif name.startswith("llama.cpp"):
                made[name] = Contender("llama", self._gguf(model, name.split()[1]))
            elif name in ("PyTorch eager", "torch.compile"):
                made[name] = Contender("eager" if "eager" in name else "compiled", checkpoint)
            else:
                source = static if name == "liquidc without gates" else checkpoint
                made[name] = Contender("liquid", self._engine(name, source))
        del model
        gc.collect()
        return Built(made, self.missing, self.compiles, *limits)

    def _model(self) -> LiquidForCausalLM:
        if self.shape == "sample":
            return LiquidForCausalLM.from_directory(SAMPLE).eval()
        return random_model(wide(self.shape, self.policy, vocabulary=self.vocabulary))

    def _engine(self, name: str, source: Path) -> Path:
        engine = self.directory / name.replace(" ", "-")
        self.compiles[name] = compiled(source, engine, QUANTISED.get(name))
        return engine

    def _gguf(self, model: LiquidForCausalLM, type: str) -> Path:
        from bench.gguf_model import write

        path = self.directory / f"{type}.gguf"
        write(path, model.config, type)
        return path


def export(model: LiquidForCausalLM, path: Path) -> None:
    """What a user gets from `torch.onnx.export`: no ifs, caches that are concatenated."""
    from torch.export import Dim

    from bench.suite.plain import Exportable

    config = model.config
    heads, width = config.num_key_value_heads, config.head_dim
    count = 2 * config.num_hidden_layers
    past = [torch.zeros(2, heads, 3, width) for _ in range(count)]
    force = torch.ones(max(config.num_gates, 1), dtype=torch.int64)
    batch, tokens, held = (Dim.DYNAMIC for _ in range(3))
    arguments = (torch.zeros(2, 5, dtype=torch.int64), force, past)
    shapes = ({0: batch, 1: tokens}, None, [{0: batch, 2: held}] * count)
    names = ["ids", "force", *(f"past.{i}" for i in range(count))]
    with torch.no_grad():
        torch.onnx.export(
            Exportable(model).eval(),
            arguments,
            str(path),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=names,
            output_names=["logits", *(f"present.{i}" for i in range(count))],
            external_data=True,
            verbose=False,
        )
    sys.stdout.flush()
