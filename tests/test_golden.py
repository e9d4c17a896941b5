"""IR and ONNX graphs of a few models, as text, beside `tests/golden`.

A change that is meant to keep them shows no difference here; one that is not shows what it does:
`pytest tests/test_golden.py --update-golden`, then `git diff`.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import liquidc
from liquidc.frontend.trace import trace
from liquidc.ir import print_module
from liquidc.ir.rewriter import Statistics
from liquidc.passes.registry import DEFAULT_PIPELINE, PASSES
from tests.oracle.engines import model
from tests.oracle.grid import edge_cases, grid

GOLDEN = Path(__file__).parent / "golden"
CASES = {case.name: case for case in (*grid(), *edge_cases())}
SOME = ("drop-attn_ffn-ffn-dense", "one-layer", "ungated-mixtral")


def compare(name: str, text: str, update: bool) -> None:
    """Assert that `text` is what the golden file holds, or write it there."""
    path = GOLDEN / name
    if update:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{name} differs: see --update-golden"


def graph_text(path: Path) -> str:
    """An ONNX graph; what its weights hold stands in another file."""
    loaded = onnx.load(path, load_external_data=False)
    return onnx.printer.to_text(loaded) + "\n"


@pytest.mark.parametrize("name", SOME)
def test_ir_and_graph_are_the_golden_ones(name: str, tmp_path: Path, update_golden: bool) -> None:
    built = model(CASES[name])
    module = trace(built)
    for op in module.walk():
        op.loc = None  # lines of the model's code move
    compare(f"{name}.traced.ir", print_module(module), update_golden)
    for step in DEFAULT_PIPELINE:
        PASSES[step]().run(module, Statistics())
    compare(f"{name}.passes.ir", print_module(module), update_golden)
    liquidc.compile(built, tmp_path / "engine").close()
    compare(f"{name}.onnx.txt", graph_text(tmp_path / "engine" / "model.onnx"), update_golden)
