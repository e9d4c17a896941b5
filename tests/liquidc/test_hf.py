"""liquidc.hf: what transformers loads, trains, saves and generates is the model that compiles."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import liquidc
import liquidc.hf
from liquidc.errors import ConfigError
from liquidc.export import export_checkpoint
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.loss import budget_loss
from liquidc.frontend.model import LiquidForCausalLM
from liquidc.hf import LiquidHfCache, LiquidHfConfig
from tests.frontend.families.cases import CASES, LLAMA3, YARN
from tests.liquidc.conftest import CONFIG, save_model

POLICIES = ("own", "drop", "inherit")


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def ids(rows: int = 2, tokens: int = 12, seed: int = 3) -> Tensor:
    return torch.randint(256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def variant(path: Path, **changes: Any) -> Path:
    return save_model(path, {**CONFIG, **changes})


def gate(policy: str, **more: Any) -> dict[str, Any]:
    return {"layers": [1, 2], "kv_policy": policy, **more}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_same_logits(tmp_path: Path, policy: str, tied: bool) -> None:
    path = variant(tmp_path / "m", tie_word_embeddings=tied, depth_gate=gate(policy))
    model, reference = load(path), LiquidForCausalLM.from_directory(path)
    found, expected = model(ids()), reference(ids())
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.gates, expected.gates)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in reference.named_parameters()}
    one = model(ids(), logits_to_keep=1).logits
    torch.testing.assert_close(one, expected.logits[:, -1:])


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_padding_on_any_side(tmp_path: Path, policy: str) -> None:
    model = load(variant(tmp_path / "m", depth_gate=gate(policy)))
    rows = ids(1, 9)
    alone = model(rows).logits[0]
    for left in (0, 2, 4):
        padded = torch.full((2, 13), 7)
        padded[0, left : left + 9] = rows[0]
        mask = torch.ones_like(padded)
        mask[0, :left] = mask[0, left + 9 :] = 0
        found = model(padded, attention_mask=mask)
        torch.testing.assert_close(found.logits[0, left : left + 9], alone)
        assert not bool((found.gates[:, 0] & (mask[0] == 0)).any())


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_cache(tmp_path: Path, policy: str) -> None:
    model = load(variant(tmp_path / "m", depth_gate=gate(policy)))
    tokens, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    whole = model(tokens, attention_mask=mask).logits
    cache, parts = None, []
    for start, end in ((0, 5), (5, 6), (6, 12)):
        out = model(
            tokens[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=(mask.cumsum(1) - 1)[:, start:end],
            past_key_values=cache,
        )
        cache = out.past_key_values
        parts.append(out.logits)
    assert cache is not None
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], whole[mask == 1])


def test_config_round_trip(tmp_path: Path) -> None:
    changes = {"rope_parameters": LLAMA3, "eos_token_id": [1, 2]}
    path = variant(tmp_path / "m", depth_gate=gate("own", reserved_initial_tokens=2), **changes)
    config = AutoConfig.from_pretrained(path)
    assert isinstance(config, LiquidHfConfig)
    assert config.to_liquid() == LiquidConfig.from_file(path)
    config.save_pretrained(tmp_path / "again")
    assert LiquidConfig.from_file(tmp_path / "again") == LiquidConfig.from_file(path)
    assert LiquidHfConfig(**config.to_dict()).to_liquid() == config.to_liquid()
    yarn = LiquidHfConfig(**{**CONFIG, "rope_parameters": YARN})
    assert yarn.to_liquid().rope_scaling.startswith("yarn")
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        LiquidHfConfig(**{**CONFIG, "num_key_value_heads": 3})


def test_what_is_saved_compiles(model_directory: Path, tmp_path: Path) -> None:
    model = load(model_directory)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    before = LiquidForCausalLM.from_directory(model_directory)
    after = LiquidForCausalLM.from_directory(tmp_path / "saved")
    assert before.config == after.config
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))
    with liquidc.compile(tmp_path / "saved", tmp_path / "engine") as engine:
        found = [token.id for token in engine.generate([84, 104, 101], max_new_tokens=10)]
    out = model.generate(torch.tensor([[84, 104, 101]]), max_new_tokens=10, do_sample=False)
    assert found == out[0, 3:].tolist()


@torch.no_grad()
def test_element_types(model_directory: Path) -> None:
    half, whole = load(model_directory, dtype=torch.bfloat16), load(model_directory)
    assert half.dtype == torch.bfloat16
    assert half.config.to_liquid().dtype == "bfloat16"
    found, expected = half(ids()).logits, whole(ids()).logits
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert not torch.equal(found, expected)


def test_a_model_from_a_config_starts_as_the_reference_does() -> None:
    gates = {**gate("own"), "router_bias": True}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LiquidHfConfig(**{**CONFIG, "depth_gate": gates}))
    for name, parameter in model.named_parameters():
        if name.endswith("depth_gate.proj2.bias"):
            assert parameter.tolist() == [2.0]
        elif "norm" in name:
            assert bool((parameter == 1).all())
        elif "bias" in name:
            assert bool((parameter == 0).all())
        elif parameter.numel() > 500:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.4), name


def test_loss(tmp_path: Path) -> None:
    path = variant(tmp_path / "m", depth_gate=gate("own"))
    model = load(path)
    tokens = ids(2, 16)
    labels = tokens.clone()
    labels[0, :5] = -100
    logits = model(tokens).logits[:, :-1]
    picked = labels[:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(logits[picked], labels[:, 1:][picked])
    assert float(model(tokens, labels=labels).loss.detach()) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )
    model.train()
    out = model(tokens, labels=labels)
    assert out.past_key_values is None
    steps, _, _ = model.reference.run(tokens, dense_estimate=True)
    extra = float(budget_loss(model.reference.config, steps)[0].detach())
    assert extra > 0.01
    first = float(out.loss.detach())
    assert first == pytest.approx(float(expected.detach()) + extra, rel=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first
    weight = "model.layers.1.depth_gate.proj1.weight"
    before = LiquidForCausalLM.from_directory(path).get_parameter(weight)
    assert not torch.equal(before, model.get_parameter(weight))


def test_controls(model_directory: Path) -> None:
    model = load(model_directory)
    force = torch.tensor([1, -1], dtype=torch.int8)
    gates = model(ids(), gate_force=force).gates
    assert bool(gates[0].all())
    assert not bool(gates[1].any())
    assert bool(model(ids(), gate_bias=torch.full((2,), 100.0)).gates.all())
    assert bool(model(ids(), min_depth=torch.full((2,), 4)).gates.all())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds is not supported"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"output_hidden_states": True}, "output_hidden_states is not supported"),
        ({"position_ids": torch.arange(12).flip(0)[None]}, "position_ids must count"),
        ({"attention_mask": torch.ones(2, 1, 12, 12)}, "masks of pairs"),
    ],
)
def test_refused(model_directory: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(model_directory)(ids(), **given)
    with pytest.raises(ValueError, match="no input_ids"):
        load(model_directory)()


def test_other_caches_are_refused(model_directory: Path) -> None:
    from transformers import DynamicCache

    other = DynamicCache()
    assert isinstance(
        load(model_directory)(ids(), past_key_values=other).past_key_values, LiquidHfCache
    )
    other.update(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), 0)
    with pytest.raises(ValueError, match="not a LiquidHfCache"):
        load(model_directory)(ids(), past_key_values=other)
    with pytest.raises(NotImplementedError, match="cropped"):
        LiquidHfCache().crop(1)


def test_another_head(tmp_path: Path) -> None:
    model = load(variant(tmp_path / "m", tie_word_embeddings=False))
    before = model(ids()).logits
    model.resize_token_embeddings(260)
    after = model(ids()).logits
    assert after.shape[-1] == 260
    torch.testing.assert_close(after[..., :256], before)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@torch.no_grad()
def test_an_exported_family(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    theirs = case.model()
    case.save(theirs, tmp_path / "hf")
    export_checkpoint(tmp_path / "hf", tmp_path / "out")
    tokens = torch.arange(3, 23).reshape(2, 10)
    found, expected = load(tmp_path / "out")(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_liquidc_alone_does_not_import_transformers() -> None:
    code = (
        "import sys, liquidc, liquidc.export, liquidc.liquify; print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    code = "import sys; sys.modules['transformers'] = None\nimport liquidc.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("liquidc.hf needs transformers: pip install 'liquidc[hf]'")


def test_the_config_of_a_checkpoint_is_whole(model_directory: Path) -> None:
    told = AutoConfig.from_pretrained(model_directory).to_dict()
    assert asdict(LiquidConfig.from_file(model_directory)).keys() <= told.keys()
