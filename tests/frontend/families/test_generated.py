"""Generated configs of every family; transformers 5.23 is the oracle: 0 silent differences.

What transformers runs is computed the same, or refused by a field that `REFUSED` lists; the latter
must be rare.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers import AutoConfig

from liquidc.frontend.families import families
from tests.frontend.families.generated import BASES, RICH, changed, checkpoints
from tests.frontend.families.oracle import NOT_RUN, SAME, Stored, outcome


def outcomes(kind: str, directory: Path, examples: int, *seeds: int) -> Counter[str]:
    """How often each outcome was seen on examples of a model type; the same every time."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(stored=checkpoints(kind))
    def check(stored: Stored) -> None:
        seen[outcome(stored, directory)] += 1

    for number in seeds:
        seed(number)(check)()
    return seen


def share_refused(seen: Counter[str]) -> float:
    """Of those that transformers runs."""
    run = seen.total() - seen[NOT_RUN]
    return 1 - seen[SAME] / run


def test_every_model_type_is_generated() -> None:
    assert BASES.keys() == RICH.keys() == families().keys() - {"ddllama", "ddqwen3"}


def test_generated_configs(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    for number, kind in enumerate(BASES):
        seen += outcomes(kind, tmp_path / kind, 4, number)
    assert seen[SAME] >= 40
    assert share_refused(seen) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASES)
def test_many_generated_configs(kind: str, tmp_path: Path) -> None:
    seen = outcomes(kind, tmp_path / "model", 12, *range(100, 106))
    assert seen[SAME] >= 40
    assert share_refused(seen) <= 0.1


def defaults(kind: str) -> dict[str, Any]:
    """Fields of transformers' class, with their defaults."""
    text = "llama4_text" if kind == "llama4" else kind
    return {field.name: field.default for field in fields(AutoConfig.for_model(text))}


def whole(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of a model type."""
    if kind == "llama4":
        config = {"text_config": {**config, "model_type": "llama4_text"}}
    return {"model_type": kind, **config}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASES)
def test_every_key_left_out_null_and_changed(kind: str, tmp_path: Path) -> None:
    config, seen = {**BASES[kind], **RICH[kind]}, Counter[str]()
    assert outcome(Stored(whole(kind, config)), tmp_path / "model") == SAME
    for key, default in {**dict.fromkeys(config), **defaults(kind)}.items():
        for other in changed(config, key, default):
            seen[outcome(Stored(whole(kind, other)), tmp_path / "model")] += 1
    assert seen[SAME] >= 60
    assert share_refused(seen) <= 0.1
