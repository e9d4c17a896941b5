"""Checkpoint directories: what is written is read back, and what is wrong is refused by name."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file, save_file

from liquidc.errors import CheckpointError, LiquidWarning
from liquidc.frontend.checkpoint import DTYPES, INDEX, SINGLE, CheckpointSource
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


FORMAT_DTYPES = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8}
FORMAT_DTYPES |= {"F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16}
FORMAT_DTYPES |= {"U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64}
FORMAT_DTYPES |= {"F64": 64, "I64": 64, "U64": 64}
"""Bits of an element, by the names of safetensors 0.8."""


def write_raw(path: Path, header: dict[str, object], body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def with_more(directory: Path, dtype: str, bits: int) -> None:
    """Add the tensor `more` of 8 elements, of any type, to the only file."""
    tensors = load_file(directory / SINGLE)
    header: dict[str, object] = {}
    body = b""
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        places = [len(body), len(body) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": places}
        body += data
    header["more"] = {"dtype": dtype, "shape": [8], "data_offsets": [len(body), len(body) + bits]}
    write_raw(directory / SINGLE, header, body + bytes([0xFF]) * bits)


@pytest.mark.parametrize("dtype", [*FORMAT_DTYPES, "Q3_K", "F128"])
def test_unused_tensors_may_have_any_element_type(dtype: str, directory: Path) -> None:
    before = LiquidForCausalLM.from_directory(directory).state_dict()
    with_more(directory, dtype, FORMAT_DTYPES.get(dtype, 5))
    with pytest.warns(LiquidWarning, match=r"1 tensors that the model does not use: more"):
        after = LiquidForCausalLM.from_directory(directory).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    source = CheckpointSource(directory)
    assert "more" in source.types()
    assert len(source.types()) == len(list(source.types())) == len(before) + 1
    if dtype not in DTYPES:
        with pytest.raises(CheckpointError, match=f"the tensor more has elements of {dtype}; liqu"):
            source.types()["more"]


def test_the_element_types_are_those_of_the_library() -> None:
    """Its error names all of them: one that is added shows here."""
    empty = json.dumps({"a": {"dtype": "?", "shape": [], "data_offsets": [0, 0]}}).encode()
    with pytest.raises(SafetensorError) as caught:
        deserialize(struct.pack("<Q", len(empty)) + empty)
    assert set(re.findall(r"`(\w+)`", str(caught.value))) - {"?"} == set(FORMAT_DTYPES)


@pytest.mark.parametrize("file", ["../a.safetensors", "/a.safetensors", "a/b.safetensors", "..", 3])
def test_the_index_stays_in_its_directory(file: object, directory: Path) -> None:
    places: dict[str, object] = dict(shard(directory))
    places[NAME] = file
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"no plain file name|is not \.safetensors"):
        CheckpointSource(directory)


def into_blobs(directory: Path) -> None:
    """Make every file a link, as in the cache of the Hugging Face hub."""
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))


@pytest.mark.parametrize("sharded", [False, True])
def test_links_are_followed(sharded: bool, directory: Path) -> None:
    places = shard(directory) if sharded else {}
    plain = CheckpointSource(directory)
    want = (plain.sha256, plain.types(), plain.read(NAME).tolist())
    into_blobs(directory)
    linked = CheckpointSource(directory)
    assert (linked.sha256, linked.types(), linked.read(NAME).tolist()) == want
    assert torch.equal(
        LiquidForCausalLM.from_directory(directory).state_dict()[NAME].data, plain.read(NAME)
    )
    (directory / (places[NAME] if sharded else SINGLE)).resolve().unlink()
    with pytest.raises(CheckpointError, match="the link leads to no file"):
        CheckpointSource(directory)


def no_file(path: Path, kind: str) -> None:
    """Put something that is no file in the place of one."""
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "socket":
            with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)  # the path of a socket is at most 108 bytes long


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "loop", "socket"])
def test_nothing_but_files_is_opened(kind: str, directory: Path) -> None:
    """A FIFO would wait for a writer, and a device may never end."""
    single = (directory / SINGLE).read_bytes()
    part = shard(directory)[NAME]
    for name in (part, INDEX):
        kept = (directory / name).read_bytes()
        no_file(directory / name, kind)
        with pytest.raises(CheckpointError, match=rf"{name}: can't be read \(") as caught:
            CheckpointSource(directory)
        assert "\n" not in str(caught.value)
        shutil.rmtree(directory / name) if kind == "directory" else (directory / name).unlink()
        (directory / name).write_bytes(kept)
    (directory / SINGLE).write_bytes(single)
    no_file(directory / SINGLE, kind)
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: can't be read \("):
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


def by_library(data: bytes) -> bool:
    try:
        deserialize(data)
    except SafetensorError:
        return False
    return True


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_headers_are_judged_as_by_the_library(tmp_path: Path, data: st.DataObject) -> None:
    """What it accepts is accepted; what is accepted beside that has an element type of its own."""
    draw = data.draw
    header: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(st.sampled_from("abc"), max_size=3, unique=True)):
        dtype = draw(st.sampled_from(["F32", "BF16", "BOOL", "C64", "F8_E4M3", "I3"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        size = math.prod(shape) * FORMAT_DTYPES.get(dtype, 8) // 8
        size = max(0, size + draw(st.sampled_from([0] * 8 + [1, -1])))
        begin = max(0, at + draw(st.sampled_from([0] * 8 + [1, -1])))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        at = begin + size
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    body = bytes(max(0, at + draw(st.sampled_from([0] * 8 + [1, -1]))))
    write_raw(tmp_path / SINGLE, header, body)
    theirs = by_library((tmp_path / SINGLE).read_bytes())
    try:
        CheckpointSource(tmp_path)
        ours = True
    except CheckpointError:
        ours = False
    unread = {entry["dtype"] for n, entry in header.items() if n[0] != "_"} - DTYPES.keys()
    assert ours == theirs or (ours and unread)
