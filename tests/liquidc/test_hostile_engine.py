"""An engine that somebody else wrote, its manifest sealed: nothing outside of it is opened."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from liquidc.errors import EngineError
from liquidc.manifest import MANIFEST
from liquidc.pipeline import CompileOptions, compile_model
from liquidc.records import canonical
from liquidc.runtime import load


@pytest.fixture(scope="module")
def onnx_engine(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engines") / "onnx"
    compile_model(model_directory, output, CompileOptions(target="onnxruntime"))
    return output


def forged(engine: Path, directory: Path, **artifact: Any) -> Path:
    """A copy whose manifest says something else about its files; a value None removes one."""
    copy = Path(shutil.copytree(engine, directory / "engine"))
    body = json.loads((copy / MANIFEST).read_bytes())
    body.pop("seal")
    told = body["artifact"] | artifact
    body["artifact"] = {key: value for key, value in told.items() if value is not None}
    for name, info in body["files"].items():
        data = (copy / name).read_bytes()
        info |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    seal = hashlib.sha256(canonical(body)).hexdigest()
    (copy / MANIFEST).write_bytes(canonical({**body, "seal": seal}))
    return copy


NAMES = ["../outside.onnx", "sub/../../outside.onnx", "/etc/passwd", "other.onnx", "", "."]


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_elsewhere(name: str, onnx_engine: Path, tmp_path: Path) -> None:
    shutil.copy(onnx_engine / "model.onnx", tmp_path / "outside.onnx")
    shutil.copy(onnx_engine / "weights.bin", tmp_path / "weights.bin")
    with pytest.raises(EngineError, match="which it does not list"):
        load(forged(onnx_engine, tmp_path, model=name))


@pytest.mark.parametrize("name", NAMES)
def test_a_module_elsewhere(name: str, null_engine: Path, tmp_path: Path) -> None:
    shutil.copy(null_engine / "module.ir", tmp_path / "outside.onnx")
    with pytest.raises(EngineError, match="which it does not list"):
        load(forged(null_engine, tmp_path, module=name))


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        ({"model": 3}, r"artifact\.model must be a string, not 3"),
        ({"model": None}, r"artifact\.model is missing"),
        ({"guard": "x"}, r"artifact\.guard must be an object"),
        ({"more": 1}, r"artifact\.more is not a known field"),
    ],
)
def test_wrong_types(
    artifact: dict[str, Any], message: str, onnx_engine: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=message):
        load(forged(onnx_engine, tmp_path, **artifact))


def test_weights_beyond_the_file(null_engine: Path, tmp_path: Path) -> None:
    body = json.loads((null_engine / MANIFEST).read_bytes())
    index = body["artifact"]["weights"]
    name = next(iter(index))
    index[name] = {**index[name], "offset": 2**62}
    with pytest.raises(EngineError, match=r"does not lie in it"):
        load(forged(null_engine, tmp_path, weights=index))


@pytest.mark.parametrize("location", ["../weights.bin", "sub/../../weights.bin", "/{}/weights.bin"])
def test_weights_elsewhere(location: str, onnx_engine: Path, tmp_path: Path) -> None:
    """ONNX Runtime 1.32 itself refuses external data outside of the directory of the graph."""
    engine = Path(shutil.copytree(onnx_engine, tmp_path / "changed"))
    shutil.copy(onnx_engine / "weights.bin", tmp_path / "weights.bin")
    graph = onnx.load(engine / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.format(str(tmp_path).lstrip("/"))
    (engine / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(EngineError, match="ONNX Runtime refuses it"):
        load(forged(engine, tmp_path))
