"""A profile that was made up, for the model of the conftest."""

from __future__ import annotations

import json
from pathlib import Path

from liquidc.profile import (
    FORMAT,
    UNIT,
    ExpertProfile,
    GateProfile,
    Paths,
    Profile,
    ProfiledModel,
    Sample,
)
from liquidc.records import to_json

PATHS = {"00": 2, "01": 3, "10": 4, "11": 7}
TOKENS = 16
HOSTILE = ("</script><script>alert(1)</script>", '<b title="x">&', "\x00\u202e\ud800\t", "a\n", " ")
TOGETHER = ((0, 1, 4, 2), (1, 0, 3, 5), (4, 3, 0, 1), (2, 5, 1, 0))


def made_profile(sha256: str) -> Profile:
    """16 tokens of a model with two gates and four experts, as if measured."""
    runs = [sum(n for path, n in PATHS.items() if path[gate] == "1") for gate in range(2)]
    margins = (1, 2, 0, 0, 0, 3, 0, 0, 0, 10)
    gates = tuple(
        GateProfile(layer, 0.5, run, margins, 6 * UNIT, 4 * UNIT)
        for layer, run in zip((1, 2), runs, strict=True)
    )
    experts = tuple(
        ExpertProfile(layer, 2, 16, (7, 9, 8, 8), TOGETHER, 24 * UNIT, (1, 2, 3, 4))
        for layer in range(4)
    )
    return Profile(
        model=ProfiledModel(sha256, "liquid", 4),
        tokens=TOKENS,
        data={"0" * 64: TOKENS},
        gates=gates,
        transitions=(tuple(PATHS.values()),),
        paths=Paths(2, PATHS),
        experts=experts,
        sample=Sample(HOSTILE, ("00", "01", "10", "11", "11")),
    )


def write_profile(profile: Profile, path: Path) -> Path:
    """The file; unlike `to_bytes` this also writes characters that no text has."""
    path.write_text(json.dumps({"format": FORMAT, **to_json(profile)}))
    return path
