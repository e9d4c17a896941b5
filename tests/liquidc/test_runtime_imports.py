"""An engine is run by what it needs, not by what compiled it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from liquidc.pipeline import compile_model
from liquidc.plan import CompileOptions


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-fixed"])
def test_running_an_engine_imports_no_compiler(
    target: str, model_directory: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    compile_model(model_directory, engine, CompileOptions(target=target))
    code = (
        "import sys, liquidc\n"
        f"with liquidc.load({str(engine)!r}) as engine:\n"
        "    tokens = list(engine.generate('The end', max_new_tokens=4))\n"
        "print(len(tokens), *{'torch', 'onnx', 'networkx', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"
