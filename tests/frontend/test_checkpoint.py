"""Checkpoint directories: what is written is read back, and what is wrong is refused by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from liquidc.errors import CheckpointError, LiquidWarning
from liquidc.frontend.checkpoint import INDEX, SINGLE, CheckpointSource
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.ir import DType, TensorType

CONFIG = {
    "model_type": "liquid",
    "liquid_version": 1,
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "depth_gate": {"layers": [1], "kv_policy": "drop"},
}
NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LiquidForCausalLM(LiquidConfig.from_dict(CONFIG)).save_directory(tmp_path / "model")
    return tmp_path / "model"


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def shard(directory: Path) -> dict[str, str]:
    """The checkpoint in two files; returns the index's map."""
    tensors = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(places.values())):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    return places


def test_round_trip(directory: Path, tmp_path: Path) -> None:
    model = LiquidForCausalLM.from_directory(directory)
    model.save_directory(tmp_path / "again")
    for name in (SINGLE, "config.json"):
        assert (directory / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert [p.name for p in (tmp_path / "again").iterdir() if p.name.startswith(".")] == []


def test_rows_types_and_hash(directory: Path) -> None:
    source, tensors = CheckpointSource(directory), load_file(directory / SINGLE)
    assert source.types() == {
        name: TensorType(DType.F32, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert torch.equal(source.read_rows(NAME, 2, 5), tensors[NAME][2:5])
    before = source.sha256
    edit(directory, lambda t: t[NAME].add_(1))
    assert CheckpointSource(directory).sha256 != before


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    config = LiquidConfig.from_dict({**CONFIG, "tie_word_embeddings": True})
    LiquidForCausalLM(config).save_directory(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / SINGLE)
    model = LiquidForCausalLM.from_directory(tmp_path)
    x = torch.randn(1, 2, 8)
    embedded = model.model.norm(x) @ model.model.embed_tokens.weight.T
    torch.testing.assert_close(model.head(x), embedded)


def test_reading_maps_no_file(directory: Path) -> None:
    """Pages of a mapped file would count as resident, so that memory grew with the model."""
    source = CheckpointSource(directory)
    for name in source.types():
        source.read(name)
    assert str(directory) not in Path("/proc/self/maps").read_text()


def test_a_file_that_shrinks_while_it_is_read(directory: Path) -> None:
    source, path = CheckpointSource(directory), directory / SINGLE
    path.write_bytes(path.read_bytes()[:-4])
    last = max(source.types(), key=lambda name: source._entries[name].offset)
    with pytest.raises(CheckpointError, match=f"{last} ends early"):
        source.read(last)


def test_shards_are_one_checkpoint(directory: Path) -> None:
    whole = LiquidForCausalLM.from_directory(directory).state_dict()
    shard(directory)
    parts = LiquidForCausalLM.from_directory(directory).state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_other_float_types_are_read(directory: Path) -> None:
    want = load_file(directory / SINGLE)[NAME].to(torch.bfloat16)
    edit(directory, lambda t: t.update({NAME: want}))
    model = LiquidForCausalLM.from_directory(directory)
    assert torch.equal(model.state_dict()[NAME], want.float())


def test_unused_tensors_warn(directory: Path) -> None:
    edit(directory, lambda t: t.update({"more.weight": torch.ones(2)}))
    with pytest.warns(LiquidWarning, match=r"1 tensors that the model does not use: more\.weight"):
        LiquidForCausalLM.from_directory(directory)


TENSORS = {
    "missing": (lambda t: t.pop(NAME), rf"the tensor {NAME} is missing"),
    "shape": (
        lambda t: t.update({NAME: torch.ones(3, 5)}),
        rf"{NAME} has the shape \[3, 5\], the config asks for \[8, 8\]",
    ),
    "integers": (
        lambda t: t.update({NAME: t[NAME].to(torch.int32)}),
        rf"{NAME} has elements of i32, not floating-point ones",
    ),
    "float8": (
        lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)}),
        rf"{NAME} has elements of F8_E4M3; liquidc reads F64, F32",
    ),
    "nan": (lambda t: t[NAME].view(-1)[:1].fill_(torch.nan), rf"{NAME} holds NaN or infinity"),
    "infinity": (lambda t: t[NAME][7].fill_(torch.inf), rf"{NAME} holds NaN or infinity"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit(kind: str, directory: Path) -> None:
    change, message = TENSORS[kind]
    edit(directory, change)
    with pytest.raises(CheckpointError, match=message):
        LiquidForCausalLM.from_directory(directory)


def test_damaged_files(directory: Path) -> None:
    path = directory / SINGLE
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:9], b"", b"\xff" * 8 + whole[8:], whole + b"x"):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            CheckpointSource(directory)


def test_pickles_are_refused(directory: Path) -> None:
    (directory / SINGLE).unlink()
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle can run code.*save_model"):
        CheckpointSource(directory)


def test_no_weights(directory: Path) -> None:
    (directory / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        CheckpointSource(directory)


@pytest.mark.parametrize("file", ["../a.safetensors", "/a.safetensors", "a/b.safetensors", "..", 3])
def test_the_index_stays_in_its_directory(file: object, directory: Path) -> None:
    places: dict[str, object] = dict(shard(directory))
    places[NAME] = file
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"no plain file name|is not \.safetensors"):
        CheckpointSource(directory)


def test_shards_are_no_links_out(directory: Path, tmp_path: Path) -> None:
    file = shard(directory)[NAME]
    (directory / file).rename(tmp_path / "elsewhere.safetensors")
    (directory / file).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=f"{file}: a link out of the directory"):
        CheckpointSource(directory)


def test_what_is_no_directory_or_no_file(directory: Path) -> None:
    for path in (directory / "none", directory / SINGLE):
        with pytest.raises(CheckpointError, match="no such directory"):
            CheckpointSource(path)
    (directory / SINGLE).unlink()
    (directory / INDEX).mkdir()
    with pytest.raises(CheckpointError, match=r"can't be read \(Is a directory\)"):
        CheckpointSource(directory)


def test_the_exit_code() -> None:
    assert CheckpointError("").exit_code == 2


def test_an_index_that_lies(directory: Path) -> None:
    places = shard(directory)
    other = {"part-0.safetensors": "part-1.safetensors"}
    moved = {**places, NAME: other.get(places[NAME], "part-0.safetensors")}
    cases = {
        json.dumps({"weight_map": moved}): f"lacks {NAME}",
        json.dumps({"weight_map": {**places, NAME: "gone.safetensors"}}): "missing; the checkpoint",
        json.dumps({"weight_map": {NAME: "model.bin"}}): r"not \.safetensors",
        json.dumps({"weight_map": []}): "no weight_map",
        "[" * 100_000: "not valid JSON",
        "3": "no weight_map",
    }
    for text, message in cases.items():
        (directory / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            CheckpointSource(directory)


def test_a_tensor_in_two_shards(directory: Path) -> None:
    places = shard(directory)
    for file in set(places.values()):
        tensors = load_file(directory / file)
        save_file({**tensors, "twice": torch.ones(1)}, directory / file)
    with pytest.raises(CheckpointError, match="twice is both in"):
        CheckpointSource(directory)


HEADER = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.sampled_from(["F32", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def mutated(data: st.DataObject) -> bytes:
    """A header with bytes changed, with one field changed, or no header at all."""
    kind = data.draw(st.sampled_from(["bytes", "field", "any"]))
    if kind == "any":
        return data.draw(st.binary(max_size=60))
    header = {"a": dict(HEADER["a"])}
    if kind == "field":
        place = data.draw(st.sampled_from([header, header["a"]]))
        key = data.draw(st.sampled_from([*place, "__metadata__", "b"]))
        place[key] = data.draw(VALUES)
    text = bytearray(json.dumps(header).encode())
    for _ in range(data.draw(st.integers(0, 4)) if kind == "bytes" else 0):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    return bytes(text)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_headers_are_fuzzed(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the bytes, the only error is ours, on one line."""
    text = mutated(data)
    length = data.draw(st.one_of(st.just(len(text)), st.integers(0, 2**64 - 1)))
    body = data.draw(st.one_of(st.just(bytes(24)), st.binary(max_size=40)))
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", length) + text + body)
    message = ""
    try:
        source = CheckpointSource(tmp_path)
        for name in source.types():
            source.read(name)
    except CheckpointError as error:
        message = str(error)
    assert "\n" not in message
