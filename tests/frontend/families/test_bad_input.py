"""Directories that can't be read: one line, before anything is traced or written."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from liquidc.cli.main import cli
from liquidc.errors import CheckpointError, ConfigError, LiquidWarning
from liquidc.frontend.families import open_model
from tests.frontend.families.cases import CASES

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral in several shards."""
    directory = tmp_path_factory.mktemp("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CASES["mixtral"].save(CASES["mixtral"].model(), directory)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.fixture
def directory(sharded: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def config(**changes: Any) -> Callable[[Path], None]:
    """Change config.json; None takes a key out."""

    def damage(directory: Path) -> None:
        path = directory / "config.json"
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))

    return damage


def index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    """Change the map from tensors to files."""

    def damage(directory: Path) -> None:
        data = json.loads((directory / INDEX).read_text())
        change(data["weight_map"])
        (directory / INDEX).write_text(json.dumps(data))

    return damage


def without_a_shard(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[1].unlink()


def reshaped(directory: Path) -> None:
    """The second expert of the second layer has another width."""
    name = "model.layers.1.block_sparse_moe.experts.1.w1.weight"
    file = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
    state = load_file(file)
    state[name] = torch.zeros(50, 32)
    save_file(state, file)


GATE = "model.layers.0.block_sparse_moe.gate.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing shard": (without_a_shard, "missing; the checkpoint is incomplete"),
    "a tensor that no file holds": (
        index(lambda m: m.update({"model.layers.9.x": next(iter(m.values()))})),
        "lacks model.layers.9.x",
    ),
    "a path out of the directory": (
        index(lambda m: m.update({GATE: "../model.safetensors"})),
        "which is no plain file name",
    ),
    "wrong shapes": (
        reshaped,
        "block_sparse_moe.experts.1.w1.weight has the shape [50, 32], that of expert 0 [48, 32]",
    ),
    "fewer experts than asked for": (
        config(num_local_experts=6),
        "the tensor model.layers.0.block_sparse_moe.experts.4.w1.weight is missing",
    ),
    "another family": (
        config(model_type="llama"),
        "model.layers.0.mlp.gate_proj.weight is missing",
    ),
    "more layers than tensors": (
        config(num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000",
    ),
    "an unknown family": (config(model_type="mamba2"), "model_type is 'mamba2'; it must be one of"),
    "no family": (config(model_type=None), "model_type is None; it must be one of liquid"),
    "code of its own": (
        config(model_type="mystery", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        "which liquidc never runs",
    ),
    "code for a family that needs none": (
        config(auto_map={"AutoModelForCausalLM": "evil.Model"}),
        "which liquidc never runs",
    ),
    "another activation": (config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "another rule of rotation": (
        config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type is 'longrope'; it must be one of default, linear, llama3, yarn",
    ),
    "quantised in another way": (
        config(quantization_config={"quant_method": "awq"}),
        "quantization_config is",
    ),
}


@pytest.mark.filterwarnings("ignore::liquidc.errors.LiquidWarning")
@pytest.mark.parametrize("name", DAMAGES)
def test_a_clear_refusal(name: str, directory: Path, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    damage(directory)
    output = tmp_path / "engine"
    result = CliRunner().invoke(cli, ["compile", str(directory), "-o", str(output)])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert message in line
    assert str(directory) in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All cases."""
    directories = {name: tmp_path_factory.mktemp(name) for name in CASES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, directory in directories.items():
            CASES[name].save(CASES[name].model(), directory)
    return directories


ODD = st.one_of(
    st.sampled_from([None, True, 0, 1, 2, -1, 3, 2**70, 0.5, 1e999, "", "x", [], {}, [None], [[]]]),
    st.recursive(
        st.integers(-9, 99) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    ),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(CASES)))
def test_any_config_is_read_or_refused(
    data: st.DataObject, name: str, every: dict[str, Path]
) -> None:
    path = every[name] / "config.json"
    whole = path.read_text()
    content = json.loads(whole)
    nested = [k for k, v in content.items() if isinstance(v, dict)]
    section = data.draw(st.sampled_from([None, None, *nested]))
    fields = content if section is None else content[section]
    for field in data.draw(st.lists(st.sampled_from(sorted(fields) or ["x"]), max_size=2)):
        fields[field] = data.draw(ODD)
    path.write_text(json.dumps(content))
    try:
        with warnings.catch_warnings(), suppress(ConfigError, CheckpointError):
            warnings.simplefilter("ignore", LiquidWarning)
            open_model(every[name])
    finally:
        path.write_text(whole)


def test_tensors_that_nobody_reads_are_told(directory: Path) -> None:
    def extra(m: dict[str, str]) -> None:
        m["score.weight"] = "more.safetensors"

    save_file({"score.weight": torch.zeros(2, 2)}, directory / "more.safetensors")
    index(extra)(directory)
    with pytest.warns(LiquidWarning, match=r"1 tensors that the model does not use: score\.weight"):
        open_model(directory)


def test_fields_that_nobody_knows_are_told(directory: Path) -> None:
    config(brand_new=3)(directory)
    with pytest.warns(LiquidWarning, match="change nothing here: brand_new"):
        open_model(directory)
