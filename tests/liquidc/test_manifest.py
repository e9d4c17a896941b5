"""manifest.json: round trip, seal, schema, shape, file names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from liquidc.errors import EngineError
from liquidc.manifest import FileInfo, is_safe_name, parse_manifest
from liquidc.records import canonical, from_json, to_json
from tests.liquidc.fakes import manifest


def sealed(change: dict[str, Any], drop: str = "") -> bytes:
    """A manifest with changed entries and a seal that fits."""
    import hashlib

    body = json.loads(manifest().to_bytes())
    body.pop("seal")
    body.update(change)
    body.pop(drop, None)
    return canonical({**body, "seal": hashlib.sha256(canonical(body)).hexdigest()})


MODEL, CACHE = (json.loads(manifest().to_bytes())[name] for name in ("model", "cache"))


def test_round_trip() -> None:
    original = manifest(files={"weights.bin": FileInfo(3, "0" * 64)}, fidelity={"kl_nats": 0.5})
    again = parse_manifest(original.to_bytes(), "m")
    assert again == original
    assert again.to_bytes() == original.to_bytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not the manifest of a liquidc engine"),
        (b"{}", "not the manifest of a liquidc engine"),
        (b"[" * 100000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (sealed({"schema": 3}), "schema 3 is newer than 2, the newest that this liquidc reads"),
        (sealed({"schema": 1}), "schema 1 is older than 2, the only one that this liquidc reads"),
        (sealed({"schema": 0}), "schema must be 2, not 0"),
        (sealed({"schema": "1"}), "schema must be 2, not '1'"),
        (sealed({}, drop="model"), "model is missing"),
        (sealed({"surprise": 1}), "surprise is not a known field"),
        (sealed({"tools": {"torch": 2}}), "tools.torch must be a string, not 2"),
        (
            sealed({"cost": {"always": 1.5, "run": [], "skip": []}}),
            "cost.always must be an integer",
        ),
        (sealed({"passes": [{"name": 1}]}), r"passes\[0\].name must be a string"),
        (sealed({"files": {"../x": {"bytes": 1, "sha256": ""}}}), "leads out of the engine"),
        (sealed({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}), "leads out"),
        (sealed({})[:-1], "changed after it was written"),
        (sealed({}).replace(b"1000", b"NaN"), "changed after it was written"),
        (sealed({}).replace(b"1000", b"1e999"), "changed after it was written"),
        (sealed({}).replace(b"1000", b"[" * 100 + b"]" * 100), "nested deeper than 64"),
        (sealed({"cost": {"always": 2**63, "run": [], "skip": []}}), "an integer of 64 bits"),
        (sealed({"functions": {}}), "functions have no prefill"),
        (sealed({"cost": {"always": 1, "run": [1], "skip": [1]}}), "an entry for each gate"),
        (sealed({"cache": CACHE | {"shape": ["B", "X"]}}), "cache.shape is not of B, S and sizes"),
        (sealed({"cache": CACHE | {"layers": -1}}), "cache.layers is not from 0"),
        (sealed({"model": MODEL | {"layers": 10**9}}), "model.layers, .* is out of range"),
        (sealed({"model": MODEL | {"vocabulary": 0}}), "model.vocabulary or .* is out of range"),
        (sealed({"model": MODEL | {"layers": 2}}), r"model.gates\[1\] is not a gate"),
        (
            sealed({"model": MODEL | {"experts": [{"layer": 9, "experts": 4, "per_token": 2}]}}),
            r"model.experts\[0\] are not experts of this model",
        ),
        (sealed({}).replace(b'"schema": 2', b'"schema":  2'), "changed after it was written"),
    ],
)
def test_refused(data: bytes, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        parse_manifest(data, "m")


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("weights.bin", True),
        ("kernels/a.cubin", True),
        ("", False),
        (".", False),
        ("..", False),
        ("a/../b", False),
        ("/a", False),
        ("a//b", False),
        ("a\\b", False),
        ("c:a", False),
        ("a\0b", False),
        ("manifest.json", False),
    ],
)
def test_file_names(name: str, safe: bool) -> None:
    assert is_safe_name(name) is safe


@dataclass(frozen=True)
class Inner:
    number: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner
    size: int | str
    table: dict[str, Inner]
    maybe: Inner | None = None
    flag: bool = False


def test_records_round_trip() -> None:
    value = Outer(Inner(1.5, ("a",)), "B", {"x": Inner(2.0)}, None, True)
    assert from_json(Outer, json.loads(json.dumps(to_json(value)))) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {"number": "1"}}, 'inner.number must be a number, not "1"'),
        ({"inner": {"number": 10**400}}, "inner.number must be a finite number"),
        ({"inner": {"number": float("inf")}}, "inner.number must be a finite number"),
        ({"size": 10**30}, "size must be an integer of 64 bits"),
        ({"inner": {"number": True}}, "inner.number must be a number, not true"),
        ({"size": 1.5}, "size can't be 1.5"),
        ({"flag": 1}, "flag must be true or false, not 1"),
        ({"table": []}, r"table must be an object, not \[\]"),
        ({"table": {"x": {}}}, "table.x.number is missing"),
        ({"inner": {"number": 1, "names": ["a", 2]}}, r"inner.names\[1\] must be a string"),
        ({"maybe": 3}, "maybe must be an object"),
        ({"size": "x" * 100, "flag": "y" * 100}, 'flag must be true or false, not "yyy'),
    ],
)
def test_records_refuse_other_types(change: dict[str, Any], message: str) -> None:
    value = {"inner": {"number": 1}, "size": 1, "table": {}} | change
    with pytest.raises(ValueError, match=message):
        from_json(Outer, value)
