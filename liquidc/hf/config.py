"""The config of a Liquid Transformer as `transformers` wants one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig, __version__

from liquidc.frontend.config import LiquidConfig

SHARED = {"dtype", "rope_scaling"}
"""Fields that transformers has too, with other values."""
FIELDS = frozenset(field.name for field in fields(LiquidConfig)) - SHARED
"""Top-level fields of config.json that are attributes under their own names."""


class LiquidHfConfig(PreTrainedConfig):
    """config.json of `model_type` "liquid": the fields of `LiquidConfig`, as attributes.

    Raises:
        ConfigError: a field of ours is not supported or contradicts another one.
    """

    model_type = "liquid"
    keys_to_ignore_at_inference = ["past_key_values", "gates"]  # noqa: RUF012 (theirs is a list)

    def __init__(self, **given: Any) -> None:
        rope = ("rope_scaling", "rope_parameters", "liquid_version")
        ours = {name: given.pop(name) for name in (*FIELDS, *rope) if name in given}
        super().__init__(**given)
        if ours:
            told = LiquidConfig.from_dict({"model_type": "liquid", **ours}).to_dict()
            for name in FIELDS:
                setattr(self, name, told[name])
            self.rotary_rule = told["rope_scaling"]

    def to_liquid(self) -> LiquidConfig:
        """The config that the rest of liquidc knows.

        Raises:
            ConfigError: an attribute was set to something that is not supported.
        """
        known = {name: getattr(self, name) for name in FIELDS if hasattr(self, name)}
        known["rope_scaling"] = getattr(self, "rotary_rule", "")
        known["dtype"] = str(self.dtype or "float32").removeprefix("torch.")
        return LiquidConfig.from_dict({"model_type": "liquid", **known})

    def standardize_rope_params(self) -> None:
        """Nothing: the rule is `rotary_rule`, the text of a `liquidc.ir.rotary.Scaling`."""

    def validate_rope(self, *given: Any, **more: Any) -> None:
        """Nothing: `LiquidConfig` has checked it."""

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: every field of ours, none of transformers' defaults."""
        if not hasattr(self, "vocab_size"):
            return {"model_type": "liquid"}
        told = {**self.to_liquid().to_dict(), "transformers_version": __version__}
        return {**told, "architectures": self.architectures} if self.architectures else told

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: what is at its default is written too."""
        return self.to_dict()
