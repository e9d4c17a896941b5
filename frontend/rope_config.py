"""The rotary part of a config.json: `rope_theta`, `rope_scaling`, `rope_parameters`.

transformers 4 writes the first two, transformers 5 the last one; the rules are those of
`liquidc.ir.rotary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from liquidc.errors import ConfigError
from liquidc.frontend.fields import Fields
from liquidc.ir.rotary import Scaling, yarn_amplitude


def read_rope(f: Fields, positions: int, theta: float = 10000.0) -> tuple[float, str]:
    """The base of the angles, and the text of their scaling (empty: none).

    Args:
        f: the config.
        positions: `max_position_embeddings`, the original context where none is given.
        theta: the default of `rope_theta`.

    Raises:
        ConfigError: a rule that is not supported, or two fields that contradict each other.
    """
    told = f.number("rope_theta", theta, above=0.0)
    scaling, parameters = f.get("rope_scaling", None), f.get("rope_parameters", None)
    if isinstance(scaling, str):  # as liquidc writes it
        try:
            return told, str(Scaling.read(scaling) or "")
        except ValueError as error:
            raise ConfigError(f"rope_scaling is {scaling!r:.80}: {error}") from None
    if parameters is None:
        return told, _scaling("rope_scaling", scaling, positions)
    inner = Fields("rope_parameters.", parameters)
    nested = inner.number("rope_theta", told, above=0.0)
    f.refuse_if("rope_theta" in f and nested != told, "rope_theta", f"{nested} as rope_parameters")
    rest = {k: v for k, v in cast(Mapping[str, Any], parameters).items() if k != "rope_theta"}
    return nested, _scaling("rope_parameters", rest, positions)


def _scaling(name: str, data: object, positions: int) -> str:
    """The text of a rule as transformers writes it; None and the type default are none."""
    if data is None:
        return ""
    f = Fields(f"{name}.", data)
    kinds = ("default", "linear", "llama3", "yarn")
    old = f.choice("type", *kinds)
    kind = f.choice("rope_type", *kinds) if "rope_type" in f else old
    f.get("rope_type", None)
    f.only("partial_rotary_factor", 1.0)
    if kind == "default":
        f.skip(("factor",))
        f.finish()
        return ""
    f.get("factor")
    numbers = [f.number("factor", 1.0, least=1.0)]
    if kind != "linear":
        original = f.optional_integer("original_max_position_embeddings") or positions
        numbers += _bands(f, kind, original, numbers[0])
    f.finish()
    return str(Scaling(kind, tuple(numbers)))


def _bands(f: Fields, kind: str, original: int, factor: float) -> list[float]:
    """The numbers of llama3 and yarn after the factor."""
    if kind == "llama3":
        low = f.number("low_freq_factor", 1.0, above=0.0)
        high = f.number("high_freq_factor", 4.0, above=0.0)
        f.refuse_if(high <= low, "high_freq_factor", f"above low_freq_factor ({low})")
        return [low, high, float(original)]
    given = f.get("attention_factor", None)
    scales = [f.get("mscale", None), f.get("mscale_all_dim", None)]
    amplitude = yarn_amplitude(factor)
    if given is not None:
        amplitude = f.number("attention_factor", 1.0, above=0.0)
    elif all(scales):
        one, other = (f.number(n, 1.0) for n in ("mscale", "mscale_all_dim"))
        amplitude = yarn_amplitude(factor, one) / yarn_amplitude(factor, other)
    fast = f.number("beta_fast", 32.0, above=0.0) if f.get("beta_fast", None) is not None else 32.0
    slow = f.number("beta_slow", 1.0, above=0.0) if f.get("beta_slow", None) is not None else 1.0
    whole = f.boolean("truncate", True)
    return [fast, slow, float(original), float(whole), amplitude]
