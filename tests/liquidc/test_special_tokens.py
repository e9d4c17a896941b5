"""Special tokens, and what is put around a text, as AutoTokenizer of transformers has it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, processors

from liquidc.chat import read_chat_template
from liquidc.engine import sha256_file
from liquidc.errors import InputError
from liquidc.inputs import DirectoryInput
from liquidc.manifest import MANIFEST
from liquidc.runtime import load
from liquidc.special_tokens import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, read_special_tokens
from liquidc.tokenizer import Tokenizer
from tests.liquidc.test_cli import ok, refused
from tests.liquidc.test_manifest import sealed

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
ADDED = ("<s>", "</s>", "<|turn|>")
KNOWN = ("<sep>", "<pad>")
"""In the vocabulary, but not among the added tokens of tokenizer.json."""
TEXT = "<s>a <sep>  b<|turn|> c<pad></s> <new>d"
PROCESSORS = {
    "none": None,
    "bytes": processors.ByteLevel(trim_offsets=False),
    "bos": processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)]),
    "both": processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    ),
}


def save(directory: Path, processor: str = "none", **files: dict[str, Any]) -> Path:
    """A tokenizer of bytes with special tokens, and the files beside it by their names."""
    vocabulary = {token: i for i, token in enumerate([*BYTES, *ADDED, *KNOWN])}
    inner = Inner(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(ADDED))
    if PROCESSORS[processor] is not None:
        inner.post_processor = PROCESSORS[processor]
    directory.mkdir(exist_ok=True)
    inner.save(str(directory / "tokenizer.json"))
    for name in ("config", "tokenizer_config", "special_tokens_map"):
        path = directory / f"{name}.json"
        path.unlink(missing_ok=True)
        if name in files:
            path.write_text(json.dumps(files[name]))
    return directory


def theirs(directory: Path) -> Any:
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(directory)


def agree(directory: Path) -> None:
    """Ids with and without what is put around, names, and the text without special tokens."""
    want, got = theirs(directory), Tokenizer(directory / "tokenizer.json")
    assert got.encode(TEXT) == want(TEXT)["input_ids"]
    bare = want(TEXT, add_special_tokens=False)["input_ids"]
    assert got.encode(TEXT, special=False) == bare
    assert got.decode(bare) == want.decode(bare, skip_special_tokens=True)
    assert read_special_tokens(directory).named == want.special_tokens_map


def added(content: str, **flags: object) -> dict[str, object]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **plain, **flags}


TOKEN = st.sampled_from([*ADDED, *KNOWN, "<new>"])
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "image_token")
FLAGS = st.fixed_dictionaries({"lstrip": st.booleans(), "rstrip": st.booleans()})
LISTED = st.builds(added, TOKEN, lstrip=st.booleans(), special=st.booleans())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(TOKEN, FLAGS),
    st.dictionaries(st.sampled_from(NAMES), st.none() | TOKEN),
    st.none() | st.dictionaries(st.sampled_from(NAMES[:-1]), TOKEN),
    st.sampled_from(["extra_special_tokens", "additional_special_tokens"]),
    st.none() | st.lists(TOKEN, max_size=2, unique=True),
    st.none() | st.dictionaries(st.integers(256, 270).map(str), LISTED, max_size=3),
)
def test_special_tokens_are_those_of_transformers(
    tmp_path: Path,
    flags: dict[str, dict[str, bool]],
    named: dict[str, str | None],
    mapped: dict[str, str] | None,
    key: str,
    extra: list[str] | None,
    listed: dict[str, Any] | None,
) -> None:
    def shown(token: str | None, **more: str) -> object:
        return token if token not in flags else {**more, **added(token, **flags[token])}

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {name: shown(token, __type="AddedToken") for name, token in named.items()}
    config |= {} if extra is None else {key: extra}
    config |= {} if listed is None else {"added_tokens_decoder": listed}
    files = {"tokenizer_config": config, "config": {"model_type": "llama"}}
    if mapped is not None:
        files["special_tokens_map"] = {name: shown(token) for name, token in mapped.items()}
    agree(save(tmp_path / "model", **files))


CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizerFast")


@pytest.mark.parametrize("processor", PROCESSORS)
def test_what_is_put_around_a_text_is_as_in_transformers(processor: str, tmp_path: Path) -> None:
    """`add_bos_token` and `add_eos_token` do nothing beside a tokenizer.json, in any class."""
    for kind in ("llama", "qwen2", "olmoe", "mistral", "gpt_oss"):
        for name in (*CLASSES, None):
            for flags in ({}, {"add_bos_token": processor == "none", "add_eos_token": True}):
                config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": name} | flags
                files = {"tokenizer_config": config, "config": {"model_type": kind}}
                directory = save(tmp_path / "model", processor, **files)
                want = theirs(directory)("a b")["input_ids"]
                got = Tokenizer(directory / "tokenizer.json").encode("a b")
                assert got == want, (kind, name, flags)


def test_contradictions_are_told(tmp_path: Path) -> None:
    def notes(processor: str, **config: object) -> list[str]:
        directory = save(tmp_path / "model", processor, tokenizer_config=config)
        return Tokenizer(directory / "tokenizer.json").notes()

    names = {"bos_token": "<s>", "eos_token": "</s>"}
    assert notes("bos", **names, add_bos_token=True, add_eos_token=False) == []
    assert notes("none", add_bos_token=True) == []
    (told,) = notes("none", **names, add_bos_token=True)
    assert "add_bos_token is true, but the post_processor of tokenizer.json adds no such" in told
    (told,) = notes("both", **names, add_eos_token=False)
    assert "add_eos_token is false, but the post_processor of tokenizer.json adds the tok" in told


@pytest.mark.parametrize("length", [4, 300])
def test_truncation_and_padding_are_not_followed(length: int, tmp_path: Path) -> None:
    directory = save(tmp_path / "model", "both", config={"model_type": "llama"})
    inner = Inner.from_file(str(directory / "tokenizer.json"))
    inner.enable_truncation(length)
    inner.enable_padding(length=length, pad_id=7, pad_token="<pad>")
    inner.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer(directory / "tokenizer.json")
    assert tokenizer.encode("a" * 50) == theirs(directory)("a" * 50)["input_ids"]
    assert len(tokenizer.encode("a" * 50)) == 52
    ids, starts = tokenizer.spans("a" * 50)
    assert len(ids) == len(starts) == 52


def test_templates_know_the_tokens_of_either_file(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{{ sep_token }}{{ messages[0].content }}{{ eos_token }}{{ image_token }}"
    )
    config = {"chat_template": template, "bos_token": "<old>", "image_token": "<img>"}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    mapped = {"bos_token": added("<s>"), "eos_token": "</s>", "sep_token": "<sep>"}
    files = {"tokenizer_config": config, "special_tokens_map": mapped}
    directory = save(tmp_path / "model", config={"model_type": "llama"}, **files)
    message = [{"role": "user", "content": "x"}]
    made = read_chat_template(directory)
    assert made is not None
    text = theirs(directory).apply_chat_template(message, tokenize=False)
    assert made.render(message) == text == "<s><sep>x</s><img>"


WRONG = {
    TOKENIZER_CONFIG: ["[]", '{"added_tokens_decoder": []}', '{"added_tokens_decoder": {"1": 2}}'],
    SPECIAL_TOKENS_MAP: ["{", "3", '{"bos_token": "\\ud800"}'],
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    directory = save(tmp_path / "model")
    for content in WRONG[name]:
        (directory / name).write_text(content)
        with pytest.raises(InputError) as caught:
            Tokenizer(directory / "tokenizer.json")
        assert str(directory) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def engine(null_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small engine, with another tokenizer: half of its tokens are special."""
    path = Path(shutil.copytree(null_engine, tmp_path_factory.mktemp("special") / "engine"))
    inner = Inner.from_file(str(path / "tokenizer.json"))
    names = {inner.id_to_token(i): i for i in range(128)} | {f"<|{i}|>": i for i in range(128, 256)}
    made = Inner(models.BPE(names, []))
    made.pre_tokenizer, made.decoder = inner.pre_tokenizer, inner.decoder
    made.add_special_tokens([f"<|{i}|>" for i in range(128, 256)])
    made.save(str(path / "tokenizer.json"))
    (path / SPECIAL_TOKENS_MAP).write_text('{"bos_token": "<|130|>"}')
    (path / TOKENIZER_CONFIG).write_text('{"chat_template": "{{ bos_token }}x"}')
    body = json.loads((path / MANIFEST).read_bytes())
    for name in ("tokenizer.json", SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG):
        size = (path / name).stat().st_size
        body["files"][name] = {"bytes": size, "sha256": sha256_file(path / name)}
    (path / MANIFEST).write_bytes(sealed(body, drop="seal"))
    return path


def test_the_map_is_copied(model_directory: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model_directory, tmp_path / "model"))
    (model / SPECIAL_TOKENS_MAP).write_text("{}")
    assert DirectoryInput(model).files()[SPECIAL_TOKENS_MAP] == b"{}"


def test_an_engine_knows_its_special_tokens(engine: Path) -> None:
    with load(engine) as loaded:
        assert loaded.chat([{"role": "user", "content": "y"}]) == [130, ord("x")]


def test_stops_that_are_tokens(engine: Path) -> None:
    sampled = ("run", engine, "-p", "Hello", "-n", 24, "--temperature", 3, "--seed", 1)
    free = [token["id"] for token in ok(*sampled)["tokens"]]
    place = next(i for i, token in enumerate(free) if i > 2 and token >= 128)
    for stop in (("--stop", f"<|{free[place]}|>"), ("--stop-id", free[place])):
        stopped = ok(*sampled, *stop, "--stop", "not there")["tokens"]
        assert [token["id"] for token in stopped] == free[: free.index(free[place])]
    refused("contains the special token '<|200|>'", *sampled, "--stop", "x<|200|>")
    refused("token 256 is not in the vocabulary of 256", *sampled, "--stop-id", 256)
    refused("token -1 is not in the vocabulary", *sampled, "--stop-id", -1)
