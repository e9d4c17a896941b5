"""Measures the table that choose-lowering reads: python bench/machine_table.py --output FILE.

Each part of a gated layer is timed alone in ONNX Runtime: products of some rows with weights that
don't fit into the caches, an op with next to nothing to compute, an If, and the gathering and
scattering of rows. All parts take turns; medians are written. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from liquidc.machine import DEFAULT, MachineTable
from liquidc.records import canonical, to_json

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTH = 1024
WEIGHTS = 16
"""Products in a row, each with 4 MiB of weights of its own."""
CHAIN = 64
"""Small ops, conditionals or compactions in a row."""


def session(
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    output: str,
    weights: dict[str, np.ndarray] | None = None,
) -> ort.InferenceSession:
    """A session of a graph that is written down here."""
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info(n, t, shape) for n, (t, shape) in inputs.items()],
        [helper.make_tensor_value_info(output, *inputs["x"])],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def products() -> ort.InferenceSession:
    """One product after the other, with rows as they come."""
    rng = np.random.default_rng(0)
    scale = np.float32(WIDTH**-0.5)
    weights = {
        f"w{i}": rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) * scale
        for i in range(WEIGHTS)
    }
    nodes = [
        helper.make_node("MatMul", ["x" if i == 0 else f"y{i - 1}", f"w{i}"], [f"y{i}"])
        for i in range(WEIGHTS)
    ]
    inputs = {"x": (TensorProto.FLOAT, ["n", WIDTH])}
    return session(nodes, inputs, f"y{WEIGHTS - 1}", weights)


def small_ops() -> ort.InferenceSession:
    """Additions of one row."""
    nodes = [
        helper.make_node("Add", ["x" if i == 0 else f"y{i - 1}", "x"], [f"y{i}"])
        for i in range(CHAIN)
    ]
    return session(nodes, {"x": (TensorProto.FLOAT, [1, WIDTH])}, f"y{CHAIN - 1}")


def conditionals() -> ort.InferenceSession:
    """The same additions, each in the arm of an If; the other arm hands on what was there."""
    nodes: list[Any] = []
    for i in range(CHAIN):
        before = "x" if i == 0 else f"y{i - 1}"
        arms = {
            f"{arm}_branch": helper.make_graph(
                [helper.make_node(kind, given, [f"{arm}{i}"])],
                f"{arm}{i}",
                [],
                [helper.make_tensor_value_info(f"{arm}{i}", TensorProto.FLOAT, [1, WIDTH])],
            )
            for arm, kind, given in (("then", "Add", [before, "x"]), ("else", "Identity", [before]))
        }
        nodes.append(helper.make_node("If", ["on"], [f"y{i}"], **arms))
    inputs = {"x": (TensorProto.FLOAT, [1, WIDTH]), "on": (TensorProto.BOOL, [])}
    return session(nodes, inputs, f"y{CHAIN - 1}")


def compactions() -> ort.InferenceSession:
    """Rows of a mask found, taken and put back."""
    nodes: list[Any] = []
    for i in range(CHAIN):
        before = "x" if i == 0 else f"y{i - 1}"
        nodes += [
            helper.make_node("NonZero", ["mask"], [f"where{i}"]),
            helper.make_node("Transpose", [f"where{i}"], [f"rows{i}"], perm=[1, 0]),
            helper.make_node("GatherND", [before, f"rows{i}"], [f"taken{i}"]),
            helper.make_node("ScatterND", [before, f"rows{i}", f"taken{i}"], [f"y{i}"]),
        ]
    inputs = {"x": (TensorProto.FLOAT, [1, "t", WIDTH]), "mask": (TensorProto.BOOL, [1, "t"])}
    return session(nodes, inputs, f"y{CHAIN - 1}")


def measured(turns: int) -> dict[str, float]:
    """Median seconds of one run of every part."""
    graphs = (products(), small_ops(), conditionals(), compactions())
    product, small, branch, compact = graphs
    x = np.ones((1, WIDTH), np.float32)
    parts: dict[str, Callable[[], object]] = {
        f"rows {n}": lambda n=n: product.run(None, {"x": np.ones((n, WIDTH), np.float32)})
        for n in ROWS
    }
    parts["ops"] = lambda: small.run(None, {"x": x})
    parts["on"] = lambda: branch.run(None, {"x": x, "on": np.array(True)})
    parts["off"] = lambda: branch.run(None, {"x": x, "on": np.array(False)})
    for tokens in (1, 128):
        state, mask = np.ones((1, tokens, WIDTH), np.float32), np.ones((1, tokens), bool)
        parts[f"compact {tokens}"] = lambda s=state, m=mask: compact.run(None, {"x": s, "mask": m})
    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(turns + 2):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def machine_name() -> str:
    """The processor, as the system names it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(turns: int, name: str, threads: int) -> MachineTable:
    """Measure."""
    seconds = measured(turns)
    kib = WEIGHTS * WIDTH * WIDTH * 4 / 1024
    op = seconds["ops"] / CHAIN
    few, many = seconds["compact 1"] / CHAIN, seconds["compact 128"] / CHAIN
    moved = 127 * WIDTH * 4 / 1024
    figures = {
        "product": tuple(seconds[f"rows {n}"] * 1e9 / kib for n in ROWS),
        "conditional": max(0.0, (seconds["on"] + seconds["off"]) / 2 / CHAIN - op / 2) * 1e9,
        "op": op * 1e9,
        "find_rows": few * 1e9,
        "move_row": max(0.0, many - few) / moved * 1e9,
    }
    rounded = {
        key: tuple(round(v, 3) for v in value) if isinstance(value, tuple) else round(value, 3)
        for key, value in figures.items()
    }
    tools = {"onnxruntime": version("onnxruntime")}
    return MachineTable(name=name, tools=tools, threads=threads, rows=ROWS, **rounded)


def main() -> None:
    """Write the file."""
    import os

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=DEFAULT)
    parser.add_argument("--name", help="of the machine (default: its processor)")
    parser.add_argument("--turns", type=int, default=40)
    args = parser.parse_args()
    found = table(args.turns, args.name or machine_name(), os.cpu_count() or 1)
    args.output.write_bytes(canonical(to_json(found)))
    print(canonical(to_json(found)).decode(), end="")


if __name__ == "__main__":
    main()
