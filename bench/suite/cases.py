"""What is timed: cases (how many tokens, rows, cached), levels (which gates are on), bounds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

LEVELS = ("100 %", "75 %", "50 %", "25 %", "0 %", "learnt", "alternating", "random")
"""Gates on: so many of them, what the router decides, every other one in turn, a coin for each."""


@dataclass(frozen=True, slots=True)
class Case:
    """What every row of a table does.

    Attributes:
        kind: decode or prefill.
        tokens: cached before decoding, or of the prompt.
        batch: rows.
    """

    kind: str
    tokens: int
    batch: int = 1

    def __str__(self) -> str:
        if self.kind == "prefill":
            return f"prefill of {self.tokens}"
        rows = "" if self.batch == 1 else f", batch {self.batch}"
        return f"decode, {self.tokens} cached{rows}"


CASES = (
    Case("decode", 16),
    Case("decode", 1000),
    Case("decode", 4000),
    Case("decode", 16, 4),
    Case("prefill", 128),
    Case("prefill", 512),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one level.

    Attributes:
        contender: its name.
        level: of `LEVELS`.
        reference: the contender that this one's times are divided by, at level 100 %.
        optional: whether it is left out of all but the first case.
    """

    contender: str
    level: str
    reference: str
    optional: bool = False

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.contender}, {self.level}"


def rows(contenders: list[str]) -> list[Row]:
    """Rows of the contenders that there are."""
    ours, four, eight = "liquidc", "liquidc int4", "liquidc int8"
    wanted = [Row(ours, level, ours, level in LEVELS[5:]) for level in LEVELS]
    wanted += [Row("liquidc without gates", "100 %", ours)]
    wanted += [Row("PyTorch eager", level, ours) for level in ("100 %", "50 %")]
    for peer in ("torch.compile", "plain export", "OpenVINO", "llama.cpp F32"):
        wanted.append(Row(peer, "100 %", ours))
    for mine, peer in ((four, "llama.cpp Q4_0"), (eight, "llama.cpp Q8_0")):
        wanted += [Row(mine, level, mine) for level in ("100 %", "50 %")]
        wanted.append(Row(peer, "100 %", mine))
    return [row for row in wanted if row.contender in contenders]


def applies(row: Row, case: Case) -> bool:
    """Whether a row makes sense for a case; a prompt's tokens all get the same forced gates."""
    if case.batch > 1 and "llama" in row.contender:
        return False
    if case.kind == "prefill":
        return row.level in ("100 %", "learnt", "0 %") and row.reference != "liquidc int8"
    return not row.optional or case == CASES[0]


def forces(level: str, gates: int, steps: int, seed: int = 0) -> list[list[int]]:
    """What each gate is forced to at each step: -1, 0 or 1."""
    if level == "learnt":
        return [[0] * gates for _ in range(steps)]
    if level == "alternating":
        return [[1 if (g + s) % 2 else -1 for g in range(gates)] for s in range(steps)]
    if level == "random":
        coin = random.Random(seed)
        return [[coin.choice((-1, 1)) for _ in range(gates)] for _ in range(steps)]
    share = int(level.removesuffix(" %"))
    one = [1 if (g + 1) * share // 100 > g * share // 100 else -1 for g in range(gates)]
    return [one for _ in range(steps)]


@dataclass(frozen=True, slots=True)
class Bound:
    """What a ratio should be, for engines of random weights with all layers gated.

    Attributes:
        shape, policy: of the model; "" is any.
        case: which cases it is for.
        row: name of the row.
        least, most: of its median ratio.
    """

    shape: str
    policy: str
    case: Callable[[Case], bool]
    row: str
    least: float = 0.0
    most: float = float("inf")

    def text(self) -> str:
        """The limit alone."""
        return f"≤ {self.most:g}" if self.least == 0.0 else f"≥ {self.least:g}"


def _decode(case: Case) -> bool:
    return case.kind == "decode" and case.batch == 1


def _short_or_long(case: Case) -> bool:
    return _decode(case) and case.tokens in (16, 4000)


def _prompt(case: Case) -> bool:
    return case == Case("prefill", 512)


PEERS = ("PyTorch eager", "torch.compile", "plain export", "OpenVINO", "llama.cpp F32")
BOUNDS = (
    Bound("dense", "drop", _short_or_long, "liquidc, 50 %", most=0.54),
    Bound("dense", "own", _short_or_long, "liquidc, 50 %", most=0.60),
    Bound("dense", "drop", _short_or_long, "liquidc, 0 %", most=0.04),
    Bound("dense", "own", _short_or_long, "liquidc, 0 %", most=0.10),
    Bound("dense", "", _decode, "liquidc without gates, 100 %", least=1 / 1.05),
    *(Bound("", "", _decode, f"{peer}, 100 %", least=1.0) for peer in PEERS),
    Bound("", "", _decode, "llama.cpp Q4_0, 100 %", least=1.0),
    Bound("", "", _decode, "llama.cpp Q8_0, 100 %", least=1.0),
    Bound("sample", "", _decode, "PyTorch eager, 100 %", least=2.0),
    Bound("dense", "drop", _prompt, "liquidc, learnt", most=0.52),
    Bound("dense", "own", _prompt, "liquidc, learnt", most=0.58),
)
"""What issue 6 asks for. Ratios are to our engine with every layer on, so a peer's is 1 or more
where it is not faster; on prompts the learnt gates of random models let half of the tokens run."""
