"""Profiles: what they count, that they add up, and that an interrupted run loses nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liquidc import profiling
from liquidc.corpus import BLOCK, Corpus
from liquidc.durable import PARTIAL
from liquidc.errors import InputError
from liquidc.observers import EngineObserver, ModelObserver, Observation
from liquidc.pipeline import open_model
from liquidc.profile import UNIT, ExpertProfile, Paths, Profile, merge, read_profile
from liquidc.profiling import ProfileOptions, Tally, profile_corpus
from liquidc.runtime import load
from tests.liquidc.conftest import CONFIG, save_model
from tests.liquidc.test_cli import call, ok


@pytest.fixture(scope="module")
def observer(model_directory: Path) -> ModelObserver:
    return ModelObserver(open_model(model_directory), model_directory / "tokenizer.json")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def random_profile(observer: ModelObserver, seed: int, corpus: str) -> Profile:
    """What a tally makes of random observations."""
    rng = np.random.default_rng(seed)
    tally = Tally(observer, corpus)
    for _ in range(rng.integers(1, 4)):
        count = int(rng.integers(1, 9))
        gates = rng.random((2, count)) < 0.5
        experts = np.full((4, count, 2), -1, np.int64)
        for layer in range(4):
            for token in range(count):
                if layer in (0, 3) or gates[layer - 1, token]:
                    experts[layer, token] = rng.choice(4, 2, replace=False)
        p = rng.random((2, count)).astype(np.float32)
        known = {layer: int(rng.integers(1000)) for layer in range(4)}
        sizes = {layer: tuple(rng.integers(1000, size=4).tolist()) for layer in range(4)}
        tally.add(tuple(range(count)), Observation(gates, p, experts, known, sizes), sample=True)
    made = tally.profile()
    assert made is not None
    return made


@settings(max_examples=40, deadline=None)
@given(seeds=st.lists(st.integers(0, 1000), min_size=3, max_size=5), order=st.randoms())
def test_merging_is_associative_and_commutative(
    observer: ModelObserver, seeds: list[int], order: object
) -> None:
    parts = [random_profile(observer, seed, f"corpus{i % 2}") for i, seed in enumerate(seeds)]
    whole = merge(parts)
    left = merge([merge(parts[:2]), *parts[2:]])
    right = merge([parts[0], merge(parts[1:])])
    turned = merge(parts[::-1])
    assert whole.to_bytes() == left.to_bytes() == right.to_bytes() == turned.to_bytes()
    assert whole.tokens == sum(part.tokens for part in parts)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text("01", min_size=6, max_size=6), st.integers(1, 9), max_size=20),
        min_size=3,
        max_size=3,
    )
)
def test_too_many_paths_leave_the_exact_distribution_of_a_beginning(
    tables: list[dict[str, int]],
) -> None:
    def both(a: Paths, b: Paths) -> Paths:
        gates = min(a.gates, b.gates)
        counts = Counter[str]()
        for paths in (a, b):
            for path, count in paths.counts.items():
                counts[path[:gates]] += count
        return Paths.of(gates, dict(counts), limit=5)

    a, b, c = (Paths.of(6, table, limit=5) for table in tables)
    whole = Counter[str]()
    for table in tables:
        whole.update(table)
    direct = Paths.of(6, dict(whole), limit=5)
    assert both(both(a, b), c) == both(a, both(b, c)) == direct
    assert len(direct.counts) <= 5
    for path, count in direct.counts.items():
        assert count == sum(n for full, n in whole.items() if full.startswith(path))


def test_counts_are_those_of_the_engine(
    null_engine: Path, observer: ModelObserver, model_directory: Path, tmp_path: Path
) -> None:
    data = model_directory / "heldout.txt"
    options = ProfileOptions(window=40)
    ours = profile_corpus(observer, data, tmp_path / "a.json", options)
    with load(null_engine) as engine:
        theirs = profile_corpus(EngineObserver(engine), data, tmp_path / "b.json", options)
        ids = engine.encode(data.read_text())
        runs = [engine.evaluate(ids[i : i + 40]) for i in range(0, len(ids), 40)]
    assert read_profile(tmp_path / "a.json") == ours
    blind = tuple(replace(e, entropy=None, saliency=None) for e in ours.experts)
    assert replace(ours, experts=blind) == theirs
    gates = np.concatenate([run.gates[:, 0] for run in runs], 1)
    experts = np.concatenate([run.experts[:, 0] for run in runs], 1)
    p = np.concatenate([run.gate_p[:, 0] for run in runs], 1).astype(np.float64)
    assert ours.tokens == len(ids) == gates.shape[1]
    for index, gate in enumerate(ours.gates):
        assert gate.run == gates[index].sum()
        margin = np.abs(p[index] - 0.5).sum()
        assert gate.margin / UNIT == pytest.approx(margin, abs=len(ids) / UNIT)
        assert sum(gate.margins[:6]) == (np.abs(p[index] - 0.5) < 0.1).sum()
    assert ours.transitions[0] == tuple(
        int(((gates[0] == i) & (gates[1] == j)).sum()) for i in (0, 1) for j in (0, 1)
    )
    assert ours.paths.counts == Counter("".join(map(str, c)) for c in gates.T.astype(int).tolist())
    for info in ours.experts:
        ran = experts[info.layer][(experts[info.layer] >= 0).any(-1)]
        assert info.tokens == len(ran)
        assert info.load == tuple(int((ran == e).sum()) for e in range(4))
        for a in range(4):
            for b in range(4):
                both = (ran == a).any(-1) & (ran == b).any(-1)
                assert info.together[a][b] == (0 if a == b else both.sum())
    gated = next(e for e in ours.experts if e.layer == 1)
    assert gated.tokens == gates[0].sum() < ours.tokens


def test_entropy_and_saliency_are_those_of_the_pytorch_model(
    observer: ModelObserver, model_directory: Path, tmp_path: Path
) -> None:
    import torch

    from liquidc.frontend.model import LiquidForCausalLM

    data = write(tmp_path / "text", "A few words, 1 + 2 = 3.\n")
    seen = profile_corpus(observer, data, tmp_path / "p.json")
    model = LiquidForCausalLM.from_directory(model_directory).eval()
    layer = model.model.layers[0]
    inputs: list[torch.Tensor] = []
    layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([list(data.read_bytes())]))
        x = inputs[0][0].double()
        share = torch.softmax(x @ layer.mlp.gate.weight.double().T, -1)
        weight, index = share.topk(2, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        sums = []
        for expert in range(4):
            up = layer.mlp.experts.gate_up_proj[expert].double()
            gate, value = (x @ up.T).chunk(2, -1)
            y = torch.nn.functional.silu(gate) * value
            y = y @ layer.mlp.experts.down_proj[expert].double().T
            used = torch.where(index == expert, weight, 0.0).sum(-1)
            sums.append(float((used * y.norm(dim=-1)).sum()))
    first = seen.experts[0]
    assert first.saliency is not None
    assert [s / UNIT for s in first.saliency] == pytest.approx(sums, rel=1e-4)
    entropy = float(-(share * share.log2()).sum())
    assert first.entropy is not None
    assert first.entropy / UNIT == pytest.approx(entropy, rel=1e-4)


def test_resumed_after_an_interruption_it_gives_the_same_bytes(
    observer: ModelObserver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {i}: {i * i}\n" for i in range(3 * BLOCK // 14))
    data = write(tmp_path / "text", text)
    whole = tmp_path / "whole.json"
    options = ProfileOptions(window=128)
    few = ModelObserver.observe
    calls = 0

    def quick(self: ModelObserver, ids: tuple[int, ...]) -> Observation:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return few(self, ids[:4]) if len(ids) == 4 else _stretched(few(self, ids[:4]), len(ids))

    monkeypatch.setattr(ModelObserver, "observe", quick)
    stop = 0
    profile_corpus(observer, data, whole, options)
    output = tmp_path / "parts.json"
    stop = 200
    calls = 0
    with pytest.raises(KeyboardInterrupt):
        profile_corpus(observer, data, output, options)
    assert not output.exists()
    left = json.loads((tmp_path / f"parts.json{PARTIAL}").read_bytes())
    assert 0 < left["at"] < data.stat().st_size
    with pytest.raises(InputError, match="of another window"):
        profile_corpus(observer, data, output, ProfileOptions(window=64, resume=True))
    resuming = replace(options, resume=True)
    partial = tmp_path / f"parts.json{PARTIAL}"
    kept = partial.read_bytes()
    for damaged in (
        b"",
        b"[" * 10**5,
        b"[]",
        b"{}",
        kept[:-9],
        kept.replace(b'"at": ', b'"at": 1'),
    ):
        partial.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged .*; without --resume it starts anew"):
            profile_corpus(observer, data, output, resuming)
    partial.write_bytes(kept)
    stop = calls = 0
    profile_corpus(observer, data, output, resuming)
    assert calls < 400
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.json", "text", "whole.json"]
    partial.write_bytes(kept)
    stop, calls = 1, 0
    with pytest.raises(KeyboardInterrupt) as stopped:
        profile_corpus(observer, data, output, replace(options, force=True))
    assert not partial.exists()
    assert not hasattr(stopped.value, "__notes__")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_was_counted_is_kept(
    error: BaseException, observer: ModelObserver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No option is needed for that, and the error says how to go on."""
    data = write(tmp_path / "text", "x" * 99 + "\n")
    output, given = tmp_path / "p.json", profiling.replace_file

    def fail(path: Path, content: bytes) -> None:
        if path == output:
            raise error
        given(path, content)

    monkeypatch.setattr(profiling, "replace_file", fail)
    with pytest.raises(
        (KeyboardInterrupt, InputError), match=r"p\.json\.partial; go on with --res"
    ):
        profile_corpus(observer, data, output, ProfileOptions(window=64))
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json.partial", "text"]
    profile_corpus(observer, data, output, ProfileOptions(window=64, resume=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "text"]


def _stretched(seen: Observation, count: int) -> Observation:
    times = -(-count // 4)
    return Observation(
        np.tile(seen.gates, times)[:, :count],
        np.tile(seen.gate_p, times)[:, :count],
        np.tile(seen.experts, (1, times, 1))[:, :count],
        seen.entropy,
        seen.saliency,
    )


@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
def test_blocks_cover_the_text_and_memory_does_not_grow(tmp_path: Path, size: int) -> None:
    text = ("ä€🙂x" * size)[:size]
    data = write(tmp_path / "text", text)
    corpus = Corpus(data, lambda piece: list(piece.encode()))
    blocks = list(corpus.blocks(100))
    assert b"".join(bytes(s) for b in blocks for s in b.sequences) == text.encode()
    ends = [0, *(block.end for block in blocks)]
    assert max(np.diff(ends)) <= 2 * BLOCK + 3
    again = [s for b in corpus.blocks(100, blocks[0].end) for s in b.sequences]
    assert again == [s for b in blocks[1:] for s in b.sequences]


def test_json_lines(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", '{"text": "ab"}\n\n"cd"\n{"ids": [1, 2, 3, 4]}\n')
    corpus = Corpus(data, lambda text: list(text.encode()))
    (block,) = corpus.blocks(3)
    assert block.sequences == ((97, 98), (99, 100), (1, 2, 3), (4,))


BAD = {
    "empty; give a text": ("a.txt", b""),
    "not UTF-8 text (byte 3)": ("a.txt", b"abc\xff\n"),
    "one token; a profile needs two": ("a.txt", b"x"),
    "no token; a profile needs two": ("a.jsonl", b"\n\n"),
    "is not JSON": ("a.jsonl", b'{"text": \n'),
    'neither "text"': ("a.jsonl", b'{"txt": "a"}\n'),
    "token 999 is not in the vocabulary": ("a.jsonl", b'{"ids": [999]}\n'),
}


@pytest.mark.parametrize("message", BAD)
def test_unusable_data(message: str, model_directory: Path, tmp_path: Path) -> None:
    name, content = BAD[message]
    data = tmp_path / name
    data.write_bytes(content)
    result = call("profile", model_directory, "--data", data, "-o", tmp_path / "p.json")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "p.json").exists()


def test_cli(model_directory: Path, tmp_path: Path) -> None:
    data, out = model_directory / "heldout.txt", tmp_path / "p.json"
    told = ok("profile", model_directory, "--data", data, "-o", out)
    assert told["tokens"] == data.stat().st_size
    assert {gate["layer"] for gate in told["gates"]} == {1, 2}
    assert ok("profile", "show", out) == {**told, "profile": str(out)}
    both = tmp_path / "both.json"
    assert ok("profile", "merge", out, out, "-o", both)["tokens"] == 2 * told["tokens"]
    result = call("profile", "merge", out, out, "-o", both)
    assert (result.exit_code, "--force" in result.stderr) == (2, True)
    shown = call("profile", "show", both)
    assert "gated layer" in shown.stdout
    assert "different" not in shown.stderr
    assert "--resume" in call("profile", "--help").stdout


def test_a_profile_of_another_model_is_refused(model_directory: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", CONFIG, seed=1)
    data = write(tmp_path / "text", "some words")
    for model, name in ((model_directory, "a.json"), (other, "b.json")):
        ok("profile", model, "--data", data, "-o", tmp_path / name)
    result = call(
        "profile", "merge", tmp_path / "a.json", tmp_path / "b.json", "-o", tmp_path / "c"
    )
    assert result.exit_code == 2
    assert "made with another model" in result.stderr
    options = ("--target", "null", "--profile", tmp_path / "b.json", "-o", tmp_path / "engine")
    result = call("compile", model_directory, *options)
    assert result.exit_code == 2
    assert "b.json: made with another model" in result.stderr
    assert not (tmp_path / "engine").exists()


SAMPLE = {"pieces": ["a"], "paths": ["00"]}


def changed(profile: dict[str, Any], part: str, **values: object) -> str:
    """The profile as text, with other values in the first entry of a part."""
    first, *rest = profile[part]
    return json.dumps({**profile, part: [{**first, **values}, *rest]})


def test_profiles_of_other_gates_do_not_add_up(observer: ModelObserver) -> None:
    a = random_profile(observer, 0, "c")
    b = replace(random_profile(observer, 1, "d"), experts=a.experts[:2])
    with pytest.raises(InputError, match="tell of other gates or experts"):
        merge([a, b])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: "[]", "not a profile of liquidc"),
        (lambda p: "{", "not valid JSON"),
        (lambda p: json.dumps({**p, "schema": 9}), "schema 9"),
        (lambda p: json.dumps({**p, "tokens": 1}), "tokens are not those of the data"),
        (lambda p: json.dumps({**p, "more": 1}), "more is not a known field"),
        (lambda p: json.dumps({**p, "tokens": 10**400}), "tokens must be an integer of 64 bits"),
        (lambda p: json.dumps({**p, "liquidc": float("nan")}), "liquidc must be a string"),
        (lambda p: changed(p, "gates", threshold=10**400), "threshold must be a finite number"),
        (lambda p: changed(p, "gates", threshold=float("inf")), "must be a finite number"),
        (lambda p: changed(p, "gates", layer=4), "a gate is not in one of the 4 layers"),
        (lambda p: changed(p, "gates", entropy=-1), "a count is negative"),
        (lambda p: changed(p, "experts", layer=-1), r"experts\[0\] are not those of a layer"),
        (lambda p: changed(p, "experts", per_token=9), r"experts\[0\] are not those of a layer"),
        (lambda p: changed(p, "experts", tokens=-1), r"experts\[0\] have a negative count"),
        (lambda p: json.dumps({**p, "sample": SAMPLE | {"paths": ["0"]}}), "is not 2 digits"),
        (lambda p: json.dumps({**p, "sample": SAMPLE | {"paths": []}}), "a path for each token"),
        (lambda p: json.dumps({**p, "transitions": [[1, 1, 1, 1]]}), "transitions do not count"),
        (lambda p: json.dumps({**p, "paths": {"gates": 2, "counts": {"2x": 624}}}), "paths do not"),
    ],
)
def test_damaged_profiles(
    observer: ModelObserver, tmp_path: Path, change: object, message: str
) -> None:
    made = json.loads(random_profile(observer, 0, "c").to_bytes())
    path = write(tmp_path / "p.json", change(made))  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        read_profile(path)


def test_experts_without_scores_stay_unknown() -> None:
    seen = ExpertProfile(0, 1, 2, (1, 1), ((0, 0), (0, 0)), 5, (1, 1))
    blind = replace(seen, entropy=None, saliency=None)
    from liquidc.profile import _add_experts

    for pair in ((seen, blind), (blind, seen)):
        total = _add_experts(*pair)
        assert (total.entropy, total.saliency, total.tokens) == (None, None, 4)
