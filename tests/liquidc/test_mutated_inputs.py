"""Whatever a file holds, the command ends soon, in little memory, with an answer or a refusal.

A few mutated files of each kind in every run, some 3,000 in the slow one. To see one case:
`python -m tests.liquidc.mutated KIND NUMBER 1`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path

import pytest

from tests.liquidc.mutated import KINDS, MORE, cases
from tests.liquidc.mutated_world import Outcome, World, peak

FEW, MANY = range(8, 16), range(16, 186)
"""Cases of each kind: in every run, where none of them is traced anew, and in the slow one."""
MAX_BYTES = 10**9
"""Limit of the memory that a process takes for its cases, above what it takes before them."""


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """What the first cases of all kinds do, in this process."""
    before = peak()
    world = World(tmp_path_factory.mktemp("mutated"))
    found = [outcome for kind in KINDS for outcome in cases(world, kind, FEW)]
    assert peak() - before < MAX_BYTES
    return found


@cache
def many(kind: str) -> list[Outcome]:
    """What the cases of a kind do, in a process of their own."""
    command = [sys.executable, "-m", "tests.liquidc.mutated", kind, str(MANY.start), str(len(MANY))]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    before, *lines = done.stdout.splitlines()
    found = [Outcome(**json.loads(line)) for line in lines]
    assert done.returncode == 0, f"ended after {found[-1:]}: {done.stderr[-1000:]}"
    assert len({outcome.case for outcome in found}) == len(MANY)
    assert found[-1].peak - int(before) < MAX_BYTES
    return found


def check_answers(outcomes: list[Outcome]) -> None:
    """No outcome is a fault, and some are answers and some refusals."""
    for outcome in outcomes:
        assert not outcome.wrong, f"{outcome.case}: {outcome.args} {outcome.wrong}\n{outcome.trace}"
        if outcome.code in (2, 3):
            assert any(line.startswith("error: ") for line in outcome.output.splitlines())
    assert {0, 2} <= {outcome.code for outcome in outcomes}


def check_lines(outcomes: list[Outcome]) -> None:
    """No line of the output is what a file put there, and nothing in it steers a terminal."""
    for outcome in outcomes:
        lines = outcome.output.split("\n")
        raw = {c for c in outcome.output if unicodedata.category(c) in ("Cc", "Cf")} - set("\n\t")
        assert not raw, f"{outcome.case}: {outcome.args} prints {raw}"
        assert not any(line.startswith("error: forged") for line in lines), outcome


def test_a_few(few: list[Outcome]) -> None:
    check_answers(few)


def test_a_few_forge_nothing(few: list[Outcome]) -> None:
    check_lines(few)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_many(kind: str) -> None:
    check_answers(many(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_many_forge_nothing(kind: str) -> None:
    check_lines(many(kind))
