"""export-hf and what writes checkpoints: the same weights, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from liquidc.errors import InputError
from liquidc.export import export_checkpoint
from liquidc.frontend.checkpoint import CheckpointSource
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.frontend.shards import write_weights
from liquidc.ir.types import DType, TensorType
from liquidc.ir.weights import Stored
from tests.frontend.families.cases import CASES
from tests.liquidc.test_cli import call, names, ok, refused


@pytest.mark.parametrize("shard", [10**9, 40_000])
def test_the_same_weights(model_directory: Path, tmp_path: Path, shard: int) -> None:
    done: list[tuple[int, int]] = []
    made = export_checkpoint(
        model_directory,
        tmp_path / "out",
        shard_bytes=shard,
        report=lambda what, now, total: done.append((now, total)),
    )
    before = LiquidForCausalLM.from_directory(model_directory).state_dict()
    after = LiquidForCausalLM.from_directory(tmp_path / "out").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(made.files) == names(tmp_path / "out")
    assert done[-1][0] == done[-1][1] == made.bytes // 10**6
    weights = [name for name in made.files if name.endswith(".safetensors")]
    assert (len(weights) == 1) == (shard == 10**9)
    for name in weights:
        held = load_file(tmp_path / "out" / name)
        assert sum(t.nbytes for t in held.values()) <= shard or len(held) == 1
    tokenizer = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert tokenizer == (model_directory / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["architectures"] == ["LiquidForCausalLM"]


def test_the_index_is_that_of_transformers(model_directory: Path, tmp_path: Path) -> None:
    export_checkpoint(model_directory, tmp_path / "out", shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    total = 0
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            total += opened.get_tensor(name).nbytes
    assert index["metadata"]["total_size"] == total


def test_the_same_bytes(model_directory: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        export_checkpoint(model_directory, tmp_path / out, shard_bytes=40_000)
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_element_types(model_directory: Path, tmp_path: Path, dtype: str) -> None:
    export_checkpoint(model_directory, tmp_path / "out", dtype=dtype)
    source = load_file(model_directory / "model.safetensors")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert value.dtype == getattr(torch, dtype)
        assert torch.equal(value, source[name].to(value.dtype))


def test_mixed_element_types_are_aligned(tmp_path: Path) -> None:
    class Source:
        def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            dtype = {"a": torch.bool, "b": torch.bfloat16, "c": torch.float32}[name]
            return torch.arange(1, 4).to(dtype)[start:stop]

    types = {"a": DType.BOOL, "b": DType.BF16, "c": DType.F32}
    weights = {n: Stored(n, TensorType(dtype, (3,))) for n, dtype in types.items()}
    write_weights(tmp_path, weights, Source())
    (tmp_path / "config.json").write_text("{}")
    held = load_file(tmp_path / "model.safetensors")
    source = CheckpointSource(tmp_path)
    for name in types:
        assert torch.equal(held[name], Source().read_rows(name, 0, 3))
        assert torch.equal(held[name], source.read(name))
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[n]["data_offsets"][0] % dtype.bytes == 0 for n, dtype in types.items())


@pytest.mark.parametrize("name", ["llama", "qwen2-moe", "gpt-oss"])
def test_families(tmp_path: Path, name: str) -> None:
    chosen = next(case for key, case in CASES.items() if key.startswith(name))
    chosen.save(chosen.model(), tmp_path / "hf")
    export_checkpoint(tmp_path / "hf", tmp_path / "out")
    before = LiquidForCausalLM.from_directory(tmp_path / "hf")
    after = LiquidForCausalLM.from_directory(tmp_path / "out")
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)


def test_a_family_keeps_its_element_type(tmp_path: Path) -> None:
    case = CASES["llama"]
    case.save(case.model().bfloat16(), tmp_path / "hf")
    made = export_checkpoint(tmp_path / "hf", tmp_path / "out")
    assert made.config.dtype == "bfloat16"
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in held.values()} == {torch.bfloat16}


def test_the_command(model_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = ok("export-hf", model_directory, "-o", out, "--dtype", "bfloat16")
    assert (made["dtype"], made["files"]) == ("bfloat16", names(out))
    refused("--force replaces it", "export-hf", model_directory, "-o", out)
    shown = call("export-hf", model_directory, "-o", out, "--force", "--max-shard-size", "40kB")
    assert shown.exit_code == 0
    assert "AutoModelForCausalLM" in shown.stdout
    assert len(names(out)) > 4
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-shard-size", "big"), "is not a size"),
        (("--max-shard-size", "0"), "holds nothing"),
        (("--dtype", "int8"), "int8"),
    ],
)
def test_refused_options(
    model_directory: Path, tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    result = call("export-hf", model_directory, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert names(tmp_path) == []


def test_only_checkpoints_of_ours_are_replaced(model_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no checkpoint of model_type liquid"):
        export_checkpoint(model_directory, out, force=True)
    (out / "config.json").write_text('{"model_type": "liquid"}')
    with pytest.raises(InputError, match=r"thesis\.txt is not part of a checkpoint"):
        export_checkpoint(model_directory, out, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a directory"):
        export_checkpoint(model_directory, tmp_path / "file" / "out")
    with pytest.raises(InputError, match="no checkpoint"):
        export_checkpoint(model_directory, tmp_path / "file", force=True)
    assert names(out) == ["config.json", "thesis.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_what_was(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    export_checkpoint(model_directory, tmp_path / "out", shard_bytes=40_000)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("liquidc.export.canonical", fail)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        export_checkpoint(model_directory, tmp_path / "out", force=True)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        export_checkpoint(model_directory, tmp_path / "new" / "deeper")
    assert names(tmp_path) == ["out"]
    assert before == {n: (tmp_path / "out" / n).read_bytes() for n in names(tmp_path / "out")}
