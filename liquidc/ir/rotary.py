"""Angles of rotary embeddings, and how models with a longer context change them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from liquidc.ir.types import DType, TensorType
from liquidc.ir.weights import Box, WeightExpr, WeightSource

if TYPE_CHECKING:
    import torch

_TEXT = re.compile(r"(?P<kind>\w+)\((?P<numbers>[^()]*)\)")


@dataclass(frozen=True, slots=True)
class Scaling:
    """`llama3(8.0, 1.0, 4.0, 8192.0)`: a rule by its name, and its numbers.

    linear (kaiokendev 2023): factor. llama3 (Llama 3.1): factor, low and high frequency factor,
    original context. yarn (Peng et al. 2023, arXiv 2309.00071): factor, beta_fast, beta_slow,
    original context, 1 if the corners are rounded to whole components, and what sines and cosines
    are multiplied with.

    Raises:
        ValueError: there is no such rule, or its numbers are too many, too few or not finite.
    """

    kind: str
    numbers: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.kind not in _RULES:
            raise ValueError(f"no scaling {self.kind}: {', '.join(_RULES)}")
        wanted = _RULES[self.kind][0]
        if len(self.numbers) != wanted or not all(map(math.isfinite, self.numbers)):
            raise ValueError(f"{self.kind} takes {wanted} finite numbers, not {self.numbers}")
        if self.numbers[0] <= 0:
            raise ValueError(f"{self.kind} by {self.numbers[0]}")

    @classmethod
    def read(cls, text: str) -> Scaling | None:
        """From the text form; None from an empty text.

        Raises:
            ValueError: it has another form.
        """
        if not text:
            return None
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no scaling such as linear(2.0)")
        return cls(found["kind"], tuple(float(n) for n in found["numbers"].split(",")))

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(repr, self.numbers))})"

    @property
    def amplitude(self) -> float:
        """What sines and cosines are multiplied with."""
        return self.numbers[5] if self.kind == "yarn" else 1.0


def yarn_amplitude(factor: float, scale: float = 1.0) -> float:
    """0.1 · scale · ln(factor) + 1; 1 for a factor that makes nothing longer (arXiv 2309.00071)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def rates(theta: float, half: int, scaling: Scaling | None, dtype: torch.dtype) -> torch.Tensor:
    """The angle of each pair of components at position 1, [half]: theta^(-i / half), scaled.

    Computed in float64 and rounded to `dtype`.
    """
    import torch

    plain = [theta ** (-i / half) for i in range(half)]
    if scaling is not None:
        _, rule = _RULES[scaling.kind]
        plain = rule(plain, theta, scaling.numbers)
    return torch.tensor(plain, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Rotation(WeightExpr):
    """`rotation("cos", 10000.0, "", f32[1024, 8])`: cosines or sines by position and pair.

    Element [p, i] is the cosine or sine, rounded to float32, of the float32 product of p and the
    rate of pair i, times the scaling's amplitude: what `semantics.rope` multiplies with.
    """

    part: str
    theta: float
    scaling: str
    table: TensorType

    def __post_init__(self) -> None:
        if self.part not in ("cos", "sin"):
            raise ValueError(f"a table of cos or sin, not of {self.part!r}")
        if self.table.dtype != DType.F32 or self.table.rank != 2:
            raise ValueError(f"a table of positions and pairs is f32 and 2-D, not {self.table}")
        Scaling.read(self.scaling)

    @property
    def type(self) -> TensorType:
        """See `WeightExpr`."""
        return self.table

    @property
    def work(self) -> int:
        """See `WeightExpr`: float32 angles and float64 cosines beside the result."""
        return 6

    def __str__(self) -> str:
        told = f'"{self.part}", {float(self.theta)!r}, {json.dumps(self.scaling)}, {self.table}'
        return f"rotation({told})"

    def sources(self) -> tuple[str, ...]:
        """See `WeightExpr`."""
        return ()

    def read(self, source: WeightSource, box: Box) -> torch.Tensor:
        """See `WeightExpr`."""
        import torch

        scaling, half = Scaling.read(self.scaling), self.sizes[1]
        angle = torch.arange(*box[0])[:, None] * rates(self.theta, half, scaling, torch.float32)
        turned = angle[:, slice(*box[1])].double()
        turned = (turned.cos() if self.part == "cos" else turned.sin()).float()
        return turned if scaling is None else turned * scaling.amplitude


def _linear(plain: list[float], theta: float, numbers: tuple[float, ...]) -> list[float]:
    """Positions closer together."""
    del theta
    return [rate / numbers[0] for rate in plain]


def _llama3(plain: list[float], theta: float, numbers: tuple[float, ...]) -> list[float]:
    """Long waves slower by the factor, short ones as they are, a ramp between.

    There is no ramp where the high frequency factor is not above the low one (Llama 4 Scout).
    """
    del theta
    factor, low, high, context = numbers
    scaled: list[float] = []
    for rate in plain:
        turns = context * rate / (2 * math.pi)
        share = (turns - low) / (high - low) if low < turns < high else float(turns > low)
        scaled.append((1 - share) * rate / factor + share * rate)
    return scaled


def _yarn(plain: list[float], theta: float, numbers: tuple[float, ...]) -> list[float]:
    """Components that turn often within the original context as they are, the others slower."""
    factor, fast, slow, context, whole, _ = numbers
    half = len(plain)

    def corner(turns: float) -> float:
        return half * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = corner(fast), corner(slow)
    if whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    if first == last:
        last += 0.001
    scaled: list[float] = []
    for i, rate in enumerate(plain):
        share = 1 - min(max((i - first) / (last - first), 0.0), 1.0)
        scaled.append((1 - share) * rate / factor + share * rate)
    return scaled


_Rule = Callable[[list[float], float, tuple[float, ...]], list[float]]
_RULES: dict[str, tuple[int, _Rule]] = {
    "linear": (1, _linear),
    "llama3": (4, _llama3),
    "yarn": (6, _yarn),
}
"""How many numbers each rule takes, and the rule."""
