"""What is compared: each a model that is loaded, holds tokens, and is timed step by step.

Classes import their runtime when they are made, for each lives in a process of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
CHUNK = 512
"""Tokens of a prompt fed at a time where a cache is only filled."""


class Peer(ABC):
    """A loaded model.

    Args:
        path: what it loads.
        threads: of one operation.
        capacity: tokens that a cache has room for.
    """

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        self.path, self.threads, self.capacity = path, threads, capacity

    @abstractmethod
    def fill(self, tokens: list[list[int]]) -> None:
        """Hold these tokens of each row, every layer on; if it held them before, hold no others."""

    @abstractmethod
    def step(self, tokens: list[int], force: list[int]) -> Logits:
        """Logits [B, V] after one more token of each row; force is -1, 0 or 1 for each gate."""

    @abstractmethod
    def prefill(self, tokens: list[int], force: list[int]) -> Logits:
        """Logits [1, V] after a prompt, from an empty cache."""

    def note(self) -> Any:
        """What `touched` has to know of the last step."""
        return None

    def touched(self, note: Any) -> int | None:
        """Bytes of weights and cache that a step had to read, if it is known."""
        return None


class Liquid(Peer):
    """An engine directory of ours."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        super().__init__(path, threads, capacity)
        import liquidc
        from liquidc.backends.base import RunnerOptions

        self.engine = liquidc.load(path, options=RunnerOptions(threads=threads, bench=True))
        self.gates = len(self.engine.manifest.model.gates)
        self.sessions: dict[str, Any] = {}
        self.last: Any = None

    def depth(self, force: list[int]) -> Any:
        """Our controls."""
        from liquidc.session import DepthControls

        if not self.gates or not any(force):
            return DepthControls()
        return DepthControls(gate_force=tuple(force))

    def fill(self, tokens: list[list[int]]) -> None:
        """A session is kept for what it holds, and goes back to that."""
        name = str(tokens)
        if name not in self.sessions:
            session = self.engine.session(batch=len(tokens), capacity=self.capacity)
            session.prefill(tokens, depth=self.depth([1] * self.gates), chunk=CHUNK)
            self.sessions = {name: (session, session.mark())}
        self.session, mark = self.sessions[name]
        self.session.rewind(mark)

    def step(self, tokens: list[int], force: list[int]) -> Logits:
        """See `Peer`."""
        self.last = self.session.step(tokens, depth=self.depth(force))
        return self.last.logits[:, 0]

    def prefill(self, tokens: list[int], force: list[int]) -> Logits:
        """See `Peer`."""
        session = self.engine.session(capacity=len(tokens))
        self.last = session.prefill(tokens, depth=self.depth(force))
        return self.last.logits[:, 0]

    def note(self) -> Any:
        """See `Peer`."""
        return self.last, self.session.kv_len[:, 0]

    def touched(self, note: Any) -> int | None:
        """Of the first row."""
        from liquidc.bench import bytes_read

        return bytes_read(self.engine, *note)


class Eager(Peer):
    """PyTorch as it is, with real Python branches; the path is a checkpoint."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        super().__init__(path, threads, capacity)
        import torch

        from bench.suite.plain import Plain
        from liquidc.frontend.model import LiquidForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch: Any = torch
        self.model = Plain(LiquidForCausalLM.from_directory(path).eval())
        self.count = len(self.model.layers)
        self.timed: Any = self.model
        self.held: dict[str, Any] = {}

    def fill(self, tokens: list[list[int]]) -> None:
        """See `Peer`."""
        name = str(tokens)
        if name not in self.held:
            caches = self.model.caches(len(tokens), self.capacity)
            ids = self.torch.tensor(tokens)
            gates = [1] * (max(self.model.gates) + 1)
            lengths = [0] * self.count
            for start in range(0, ids.shape[1], CHUNK):
                part = ids[:, start : start + CHUNK]
                _, lengths = self.model(part, caches, start, lengths, gates)
            self.held = {name: (caches, ids.shape[1])}
        self.caches, self.start = self.held[name]
        self.lengths = [self.start] * self.count

    def step(self, tokens: list[int], force: list[int]) -> Logits:
        """See `Peer`."""
        ids = self.torch.tensor(tokens).unsqueeze(1)
        logits, self.lengths = self.timed(ids, self.caches, self.start, self.lengths, force)
        self.start += 1
        return logits.numpy()

    def prefill(self, tokens: list[int], force: list[int]) -> Logits:
        """See `Peer`."""
        caches = self.model.caches(1, len(tokens))
        ids = self.torch.tensor([tokens])
        return self.timed(ids, caches, 0, [0] * self.count, force)[0].numpy()


class Compiled(Eager):
    """The same under `torch.compile`, which breaks its graph at every gate."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        super().__init__(path, threads, capacity)
        self.torch._dynamo.config.recompile_limit = 256
        self.timed = self.torch.compile(self.model)


class Exported(Peer):
    """A file of `torch.onnx.export`: caches go in and come out, one slot longer."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        super().__init__(path, threads, capacity)
        self.gates = 0
        self.held: dict[str, Any] = {}

    @abstractmethod
    def run(self, ids: Any, force: list[int], past: list[Any]) -> list[Any]:
        """Logits and caches."""

    @abstractmethod
    def empty(self, batch: int) -> list[Any]:
        """Caches of no token."""

    @abstractmethod
    def array(self, logits: Any) -> Logits:
        """What came out, as numpy has it."""

    def fill(self, tokens: list[list[int]]) -> None:
        """See `Peer`."""
        name = str(tokens)
        if name not in self.held:
            ids, past = np.array(tokens), self.empty(len(tokens))
            for start in range(0, ids.shape[1], CHUNK):
                past = self.run(ids[:, start : start + CHUNK], [1] * self.gates, past)[1:]
            self.held = {name: past}
        self.past = self.held[name]

    def step(self, tokens: list[int], force: list[int]) -> Logits:
        """See `Peer`."""
        logits, *self.past = self.run([[token] for token in tokens], force, self.past)
        return self.array(logits)

    def prefill(self, tokens: list[int], force: list[int]) -> Logits:
        """See `Peer`."""
        return self.array(self.run([tokens], force, self.empty(1))[0])


class PlainExport(Exported):
    """The file in ONNX Runtime; caches stay OrtValues."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        super().__init__(path, threads, capacity)
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        self.value: Any = onnxruntime.OrtValue.ortvalue_from_numpy
        self.session: Any = onnxruntime.InferenceSession(
            str(path), settings, providers=["CPUExecutionProvider"]
        )
        inputs = self.session.get_inputs()
        self.inputs = [node.name for node in inputs]
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.shape = inputs[-1].shape
        self.gates = inputs[1].shape[0] if self.inputs[1] == "force" else 0

    def run(self, ids: Any, force: list[int], past: list[Any]) -> list[Any]:
        """See `Exported`."""
        given = [self.value(np.array(ids, np.int64))]
        if self.gates:
            given.append(self.value(np.array(force, np.int64)))
        binding = self.session.io_binding()
        for name, array in zip(self.inputs, [*given, *past], strict=True):
            binding.bind_ortvalue_input(name, array)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()

    def empty(self, batch: int) -> list[Any]:
        """See `Exported`."""
        none = np.zeros((batch, self.shape[1], 0, self.shape[3]), np.float32)
        return [self.value(none) for _ in self.outputs[1:]]

    def array(self, logits: Any) -> Logits:
        """See `Exported`."""
        return logits.numpy()


class OpenVino(Exported):
    """The same file in OpenVINO, in float32; caches are copied out, as its results are reused."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        super().__init__(path, threads, capacity)
        import openvino

        hints = {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        compiled = openvino.Core().compile_model(str(path), "CPU", hints)
        self.inputs = [port.get_any_name() for port in compiled.inputs]
        self.shape = compiled.inputs[-1].get_partial_shape()
        self.count = len(compiled.outputs)
        self.request: Any = compiled.create_infer_request()
        if "force" in self.inputs:
            self.gates = compiled.inputs[self.inputs.index("force")].shape[0]

    def run(self, ids: Any, force: list[int], past: list[Any]) -> list[Any]:
        """See `Exported`."""
        names = [name for name in self.inputs if name not in ("ids", "force")]
        given = dict(zip(names, past, strict=True)) | {"ids": np.array(ids, np.int64)}
        if self.gates:
            given["force"] = np.array(force, np.int64)
        self.request.infer(given, share_inputs=True)
        return [np.array(self.request.get_output_tensor(i).data) for i in range(self.count)]

    def empty(self, batch: int) -> list[Any]:
        """See `Exported`."""
        shape = (batch, self.shape[1].get_length(), 0, self.shape[3].get_length())
        return [np.zeros(shape, np.float32) for _ in range(self.count - 1)]

    def array(self, logits: Any) -> Logits:
        """See `Exported`."""
        return logits


class Llama(Peer):
    """A GGUF file of random weights in llama.cpp."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        super().__init__(path, threads, capacity)
        from bench.suite.llama import Model

        self.model = Model(path, threads, capacity)
        self.held = ""

    def fill(self, tokens: list[list[int]]) -> None:
        """See `Peer`."""
        (row,) = tokens
        self.model.keep(len(row) if self.held == str(row) else 0)
        if self.held != str(row):
            self.model.feed(row)
            self.held = str(row)

    def step(self, tokens: list[int], force: list[int]) -> Logits:
        """See `Peer`."""
        return self.model.feed(tokens)[None]

    def prefill(self, tokens: list[int], force: list[int]) -> Logits:
        """See `Peer`."""
        self.held = ""
        self.model.keep(0)
        return self.model.feed(tokens)[None]


KINDS: dict[str, type[Peer]] = {
    "liquid": Liquid,
    "eager": Eager,
    "compiled": Compiled,
    "export": PlainExport,
    "openvino": OpenVino,
    "llama": Llama,
}
"""By the name that a worker is asked for."""
