"""The rotary part of a config.json: `rope_theta`, `rope_scaling`, `rope_parameters`.

transformers 4 writes the first two, transformers 5 the last one; the rules are those of
`liquidc.ir.rotary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from liquidc.errors import ConfigError
from liquidc.frontend.fields import Fields
from liquidc.ir.rotary import Scaling, yarn_amplitude

RULES = ("default", "linear", "llama3", "yarn")
"""Values of `rope_type`."""
MAX_POSITIONS = 2**31 - 1
"""Tokens of a context that a rule may reach."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embeddings, as fields of a `LiquidConfig`.

    Attributes:
        theta: the base of the angles, `rope_theta`.
        scaling: the text of a `Scaling`, `rope_scaling`; empty for none.
        positions: tokens of the context, `max_position_embeddings`. yarn widens it to its factor
            times the original context.
    """

    theta: float
    scaling: str
    positions: int


def read_rope(
    f: Fields,
    positions: int,
    theta: float = 10000.0,
    *,
    rule: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> Rope:
    """The rotary embedding of a config.

    Fields take precedence as in transformers 5: `rope_scaling` before `rope_parameters`, and
    `rope_theta` in either of them before the one beside them.

    Args:
        f: the config.
        positions: `max_position_embeddings`, the original context where none is given.
        theta: the default of `rope_theta`.
        rule: the default of `rope_parameters`.
        strict: whether keys without effect are refused, or left for `Fields.without_effect`.

    Raises:
        ConfigError: a rule that is not supported, or two fields that contradict each other.
    """
    scaling, parameters = f.get("rope_scaling", None), f.get("rope_parameters", None)
    if isinstance(scaling, str):  # as liquidc writes it
        try:
            text = str(Scaling.read(scaling) or "")
        except ValueError as error:
            raise ConfigError(f"rope_scaling is {scaling!r:.80}: {error}") from None
        return Rope(f.number("rope_theta", theta, above=0.0), text, positions)
    both = scaling and parameters is not None
    f.refuse_if(strict and both, "rope_scaling", "null beside rope_parameters")
    f.idle(*(["rope_parameters"] if both else []))
    name, data = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)
    data = (rule or {}) if data is None else data
    inner = Fields(f"{name}.", data)
    given = cast("Mapping[str, Any]", data)
    f.refuse_if(any(isinstance(v, dict) for v in given.values()), name, "one rule for all layers")
    if "rope_theta" in inner:
        base = inner.number("rope_theta", above=0.0)
        told = f.get("rope_theta", base)
        f.refuse_if(strict and told != base, "rope_theta", f"{base} as rope_parameters")
    else:
        base = f.number("rope_theta", theta, above=0.0)
    kind = _kind(f, inner, strict)
    made = ""
    if kind != "default":
        f.refuse_if(kind == "yarn" and base == 1.0, "rope_theta", "other than 1 with yarn")
        try:
            made, positions = _rule(f, inner, kind, positions, strict)
        except (ValueError, ArithmeticError) as error:
            raise ConfigError(f"{name} is {data!r:.80}: {error}") from None
    if strict:
        inner.skip(("factor",))
        inner.finish()
    f.idle(*(f"{name}.{key}" for key in inner.without_effect()))
    return Rope(base, made, positions)


def _kind(f: Fields, inner: Fields, strict: bool) -> str:
    """The name of the rule. `dynamic` is `default` within the context."""
    name = "rope_type" if "rope_type" in inner else "type"
    kind = inner.choice(name, *RULES) if strict else inner.choice(name, *RULES, "dynamic")
    inner.skip(("type", "rope_type"))
    _check_whole_heads(f, inner, kind, strict)
    if kind == "dynamic":
        inner.number("factor", above=0.0)
        inner.idle(name, "factor")
        return "default"
    return kind


def _check_whole_heads(f: Fields, inner: Fields, kind: str, strict: bool) -> None:
    """Under the rule default, transformers 5 rotates whole heads whatever the share is."""
    name = "partial_rotary_factor"
    place = inner if strict or name in inner else f
    share = place.get(name, None)
    if kind == "default" and not strict:
        place.idle(*([name] if share not in (None, 1) else []))
    elif share is not None:
        place.only(name, 1.0)


def _rule(f: Fields, inner: Fields, kind: str, positions: int, strict: bool) -> tuple[str, int]:
    """The text of a rule that scales, and the context with it."""
    name = "original_max_position_embeddings"
    if kind == "linear":
        return str(Scaling(kind, (inner.number("factor", above=0.0),))), positions
    above = not strict and name in f  # the one beside the rule is the stronger
    original = (f if above else inner).number(name, positions, above=0.0)
    inner.skip((name,))
    if kind == "llama3":
        factor = inner.number("factor", above=0.0)
        low = inner.number("low_freq_factor", 1.0, above=0.0)
        high = inner.number("high_freq_factor", 4.0, above=0.0)
        return str(Scaling(kind, (factor, low, high, original))), positions
    missing = inner.get("factor") is None
    factor = positions / original if missing else inner.number("factor", above=0.0)
    reach = original * factor
    inner.refuse_if(reach > MAX_POSITIONS, "factor", f"at most {MAX_POSITIONS / original:g}")
    return str(_yarn(inner, original, factor)), max(positions, int(reach))


def _yarn(f: Fields, original: float, factor: float) -> Scaling:
    """The rule yarn; a key that is null or 0 is as if it were not given."""
    scales = [f.get("mscale", None), f.get("mscale_all_dim", None)]
    amplitude = yarn_amplitude(factor)
    if f.get("attention_factor", None) is not None:
        amplitude = f.number("attention_factor")
    elif all(scales):
        one, other = (f.number(n) for n in ("mscale", "mscale_all_dim"))
        amplitude = yarn_amplitude(factor, one) / yarn_amplitude(factor, other)
    fast = f.number("beta_fast", above=0.0) if f.get("beta_fast", None) else 32.0
    slow = f.number("beta_slow", above=0.0) if f.get("beta_slow", None) else 1.0
    whole = bool(f.get("truncate", True))
    return Scaling("yarn", (factor, fast, slow, original, float(whole), amplitude))
