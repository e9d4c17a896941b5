"""Run a liquidc engine with ONNX Runtime alone: python samples/run_with_onnxruntime.py ENGINE TEXT.

The inputs, outputs and the cache are those of docs/engine-onnx.md. Nothing of liquidc is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


def generate(engine: Path, prompt: str, new_tokens: int) -> str:
    """The prompt's greedy continuation; prints how many layers each token ran."""
    manifest = json.loads((engine / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(engine / "tokenizer.json"))
    tokenizer.no_truncation()  # what the file asks for here is for training
    tokenizer.no_padding()
    session = ort.InferenceSession(str(engine / manifest["artifact"]["model"]))
    takes = {node.name for node in session.get_inputs()}
    ids = tokenizer.encode(prompt).ids
    if "kv_len" not in takes:
        sys.exit(f"{engine} has no cache: it computes the logits of whole sequences only")

    # The cache: one buffer for each layer's keys and values, bound as past and as present. Layers
    # that a compile with a budget removed have none.
    model, cache = manifest["model"], manifest["cache"]
    slots = min(len(ids) + new_tokens, model["context"] or sys.maxsize)
    if len(ids) > slots:
        sys.exit(f"the prompt has {len(ids)} tokens, the context of the model {slots}")
    sizes = {"B": 1, "S": slots}
    shape = [sizes.get(size, size) for size in cache["shape"]]
    dtype = {"f32": np.float32, "i8": np.int8}[cache["dtype"]]
    buffers = {
        f"{layer}.{part}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
        for layer in range(cache["layers"])
        for part in ("key", "value")
        if layer not in cache["absent"]
    }
    kv_len = np.zeros((cache["layers"], 1), np.int64)

    made: list[int] = []
    position, new = 0, ids
    while len(made) < new_tokens and position + len(new) <= slots:
        binding = session.io_binding()
        inputs: dict[str, Any] = {
            "input_ids": np.array([new], np.int64),
            "lengths": np.array([len(new)], np.int64),
            "position_start": np.array([position], np.int64),
            "logit_index": np.array([[len(new) - 1]], np.int64),
            "gate_force": np.zeros(len(model["gates"]), np.int8),
            "gate_bias": np.zeros(1, np.float32),
            "min_depth": np.zeros(1, np.int64),
            "kv_len": kv_len,
        }
        for name in takes & inputs.keys():  # engines without gates take no controls
            binding.bind_cpu_input(name, inputs[name])
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(f"past.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        rest = [o.name for o in session.get_outputs() if o.name[8:] not in buffers]
        for name in rest:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound: the caches first.
        values = binding.get_outputs()[len(buffers) :]
        out = {name: value.numpy() for name, value in zip(rest, values, strict=True)}
        kv_len = out["present.kv_len"]
        position += len(new)
        new = [int(out["logits"][0, 0].argmax())]
        made += new
        skipped = {
            gate["layer"]
            for index, gate in enumerate(model["gates"])
            if not out["gates"][index, 0, -1]
        }
        depth = model["layers"] - len(skipped)
        print(f"{tokenizer.decode(new)!r} after {depth} of {model['layers']} layers")
    return tokenizer.decode(made)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(generate(Path(sys.argv[1]), sys.argv[2], 32))
