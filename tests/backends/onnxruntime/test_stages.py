"""The stages of the target: what each writes can be read back, and gives the same engine."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from liquidc.backends.onnxruntime.backend import MODEL, load_lowered
from liquidc.errors import InputError
from liquidc.pipeline import CompileOptions, compile_model
from tests.liquidc.conftest import save_model


def test_any_stage_is_a_start(tmp_path: Path) -> None:
    model, dumps = save_model(tmp_path / "model"), tmp_path / "dumps"
    compile_model(model, tmp_path / "whole", CompileOptions(dump=dumps))
    stages = {path.stem.split("-", 1)[1]: path for path in sorted(dumps.iterdir())}
    starts = [("trace", stages["trace"]), ("passes", stages["eliminate-dead"])]
    for start in (*starts, ("lower", stages["lower"])):
        output = tmp_path / f"from-{start[0]}"
        compile_model(model, output, CompileOptions(start=start))
        for name in (MODEL, "weights.bin"):
            assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    onnx.checker.check_model(str(tmp_path / "whole" / MODEL))


@pytest.mark.parametrize("content", [b"", b"\x08", b"nonsense" * 9])
def test_what_is_no_model(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lowered.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"lowered\.onnx: (not an ONNX model|.*without outputs)"):
        load_lowered(path)
