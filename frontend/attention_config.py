"""The section `attention` of config.json: what a layer's attention has beyond the Llama part."""

from __future__ import annotations

from dataclasses import dataclass

from liquidc.frontend.fields import Fields


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Attention that differs from layer to layer, or from Llama's. `layers` are indices or "all".

    Attributes:
        output_bias: a bias of the output projection; None as `attention_bias`.
        scale: of the scores; None is 1 / sqrt(head_dim).
        sliding_window: slots that a query of a sliding layer sees, its own included.
        sliding_layers: the layers that slide.
        chunk_size: queries of `chunk_layers` see their own chunk alone.
        chunk_layers: None for the layers with rotary embedding.
        no_rope_layers: layers without rotary embedding.
        clip_qkv: queries, keys and values are clamped to this magnitude after queries and keys are
            normed and before they are rotated; None leaves them.
        l2_norm: queries and keys are divided by their root mean square after they were rotated.
        temperature_floor, temperature_scale: queries of layers without rotary embedding are
            multiplied with 1 + scale · ln(1 + floor((position + 1) / floor)); 0 leaves them.
        sinks: every head has a score that takes its part of the softmax.
    """

    output_bias: bool | None = None
    scale: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | str = "all"
    chunk_size: int | None = None
    chunk_layers: tuple[int, ...] | None = None
    no_rope_layers: tuple[int, ...] = ()
    l2_norm: bool = False
    temperature_floor: int = 0
    temperature_scale: float = 0.0
    clip_qkv: float | None = None
    sinks: bool = False

    @classmethod
    def read(cls, data: object) -> AttentionConfig:
        """Read the `attention` section.

        Raises:
            ConfigError: an unknown field, an unsupported value, or a contradiction.
        """
        f = Fields("attention.", data)
        every = f.get("sliding_layers", "all") == "all"
        biased = f.get("output_bias", None)
        chunked = f.get("chunk_layers", None)
        made = cls(
            output_bias=None if biased is None else f.boolean("output_bias", False),
            scale=f.optional_number("scale", above=0.0),
            sliding_window=f.optional_integer("sliding_window"),
            sliding_layers="all" if every else f.indices("sliding_layers"),
            chunk_size=f.optional_integer("chunk_size"),
            chunk_layers=None if chunked is None else f.indices("chunk_layers"),
            no_rope_layers=f.indices("no_rope_layers"),
            l2_norm=f.boolean("l2_norm", False),
            temperature_floor=f.integer("temperature_floor", 0, least=0),
            temperature_scale=f.number("temperature_scale", 0.0, least=0.0),
            clip_qkv=f.optional_number("clip_qkv", above=0.0),
            sinks=f.boolean("sinks", False),
        )
        f.finish()
        f.refuse_if(
            not every and made.sliding_window is None,
            "sliding_layers",
            "all without a sliding_window",
        )
        f.refuse_if(
            made.sliding_window is not None and made.chunk_size is not None,
            "chunk_size",
            "null with a sliding_window",
        )
        f.refuse_if(
            made.chunk_layers is not None and made.chunk_size is None,
            "chunk_layers",
            "null without a chunk_size",
        )
        return made

    def window(self, layer: int) -> int:
        """Slots that a query of a layer sees; 0 for all."""
        chosen = self.sliding_layers
        slides = isinstance(chosen, str) or layer in chosen
        return self.sliding_window or 0 if slides else 0

    def chunk(self, layer: int) -> int:
        """Slots of the chunks of a layer; 0 without chunks."""
        chosen = self.chunk_layers
        whole = layer in self.no_rope_layers if chosen is None else layer not in chosen
        return 0 if whole else self.chunk_size or 0
