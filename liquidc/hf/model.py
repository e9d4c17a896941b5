"""A Liquid Transformer as a model of `transformers`: the reference model behind its conventions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from liquidc.frontend import model as reference
from liquidc.frontend.gate_hooks import depth_routers
from liquidc.frontend.loss import budget_loss
from liquidc.frontend.moe import Experts
from liquidc.hf.cache import LiquidHfCache
from liquidc.hf.config import LiquidHfConfig


@dataclass
class LiquidHfOutput(ModelOutput):
    """What a forward yields.

    loss: f32 scalar, with labels; logits f32[B, T, V], or of the last columns (`logits_to_keep`);
    past_key_values, with `use_cache`; gates bool[G, B, T], which tokens ran (false for padding).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: LiquidHfCache | None = None
    gates: Tensor | None = None


class LiquidForCausalLM(PreTrainedModel, GenerationMixin):
    """Loads and saves Liquid checkpoints, trains and generates; names are the checkpoint's.

    The mathematics are those of `liquidc.frontend.model.LiquidForCausalLM`, whose modules are
    this one's too.

    Args:
        config: of the model.
    """

    config_class = LiquidHfConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False

    def __init__(self, config: LiquidHfConfig) -> None:
        super().__init__(config)
        inner = reference.LiquidForCausalLM(config.to_liquid())
        self.model = inner.model
        if inner.lm_head is not None:
            self.lm_head = inner.lm_head
        # Not a module of this one: its modules are, under the checkpoint's names.
        object.__setattr__(self, "reference", inner)
        self.post_init()

    reference: reference.LiquidForCausalLM

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            for name, parameter in module.named_parameters(recurse=False):
                if "bias" in name:
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=self.config.initializer_range)
        # A router has no parameters of its own, so transformers does not come here with one.
        for router in depth_routers(self):
            if router.last is module and not hasattr(module.bias, "_is_hf_initialized"):
                router.favour_running()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another token embedding."""
        self.model.embed_tokens = cast("nn.Embedding", value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where it is the embedding."""
        return self.reference.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Another head."""
        self.lm_head = cast("nn.Linear", new_embeddings)
        self.reference.lm_head = self.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` leaves the cache to `forward`."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        gate_force: Tensor | None = None,
        gate_bias: Tensor | None = None,
        min_depth: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> LiquidHfOutput | tuple[Any, ...]:
        """Logits of input_ids i64[B, T], after the columns that `past_key_values` has seen.

        attention_mask [B, T], or [B, columns so far + T]: 0 marks padding, on any side. labels
        i64[B, T], -100 where there is none: the loss is the cross-entropy of the next tokens; in
        training (`model.train()`), the budget and balance terms of model spec 5.5 are added, with
        the weights in `config.training`. gate_force i8[G], gate_bias f32[B] and min_depth i64[B]
        are those of the reference model.

        Raises:
            ValueError: an argument that is not supported, or one that contradicts another.
        """
        for name, value in (
            ("inputs_embeds", inputs_embeds is not None),
            ("output_attentions", output_attentions),
            ("output_hidden_states", output_hidden_states),
        ):
            if value:
                raise ValueError(f"{name} is not supported by Liquid models; leave it out")
        if input_ids is None:
            raise ValueError("no input_ids were given")
        past = _cache_of(past_key_values)
        wanted = use_cache if use_cache is not None else past is not None or not self.training
        if past is None and wanted and not torch.is_grad_enabled():
            past = LiquidHfCache()
        packed = _pack(input_ids, _new_columns(attention_mask, input_ids, past))
        batch, tokens = input_ids.shape
        cache = None if past is None else past.with_room(self.reference, batch, tokens)
        if position_ids is not None:
            start = 0 if cache is None else cache.position[:, None]
            _check_positions(position_ids, packed, start)
        steps, x, after = self.reference.run(
            packed.ids,
            cache,
            packed.lengths,
            gate_force=gate_force,
            gate_bias=gate_bias,
            min_depth=min_depth,
            dense_estimate=self.training,
        )
        if past is not None:
            past.advance(after, tokens)
        x = packed.unpack(x)
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            kept = logits_to_keep
            x = x[:, slice(-kept, None) if isinstance(kept, int) else kept]
        logits = self.reference.head(x)
        loss = None
        if labels is not None:
            loss = cast(Any, self.loss_function)(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            if self.training:
                loss = loss + budget_loss(self.reference.config, steps)[0]
        masks = [packed.unpack(mask) for step in steps for mask, _ in step.gates]
        output = LiquidHfOutput(
            loss=loss,
            logits=logits,
            past_key_values=past if wanted else None,
            gates=torch.stack(masks) if masks else None,
        )
        return output.to_tuple() if return_dict is False else output


class _Packed(NamedTuple):
    """Rows without padding in front.

    ids i64[B, T]; lengths i64[B]; valid bool[B, T] in the order of the given columns; place
    i64[B, T], where each of those went, None if all stayed.
    """

    ids: Tensor
    lengths: Tensor
    valid: Tensor
    place: Tensor | None

    def unpack(self, x: Tensor) -> Tensor:
        """X [B, T, ...] in the order of the given columns."""
        if self.place is None:
            return x
        place = self.place.reshape(*self.place.shape, *(1,) * (x.dim() - 2)).expand_as(x)
        return x.gather(1, place)


def _pack(ids: Tensor, valid: Tensor) -> _Packed:
    """Move each row's tokens to its front; the reference model knows padding behind them only."""
    lengths = valid.sum(1)
    order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
    if torch.equal(order, torch.arange(ids.shape[1], device=ids.device).expand_as(order)):
        return _Packed(ids, lengths, valid, None)
    return _Packed(ids.gather(1, order), lengths, valid, order.argsort(dim=1))


def _new_columns(mask: Tensor | None, ids: Tensor, past: LiquidHfCache | None) -> Tensor:
    """Which of the new columns are tokens, bool[B, T].

    Raises:
        ValueError: the mask has another shape.
    """
    batch, tokens = ids.shape
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    columns = tokens + (0 if past is None else past.columns)
    if mask.shape not in ((batch, tokens), (batch, columns)):
        raise ValueError(
            f"attention_mask has the shape {list(mask.shape)}; {[batch, columns]} is right: "
            "a number for each column, masks of pairs are not supported"
        )
    return mask[:, -tokens:].to(torch.bool)


def _check_positions(position_ids: Tensor, packed: _Packed, start: Tensor | int) -> None:
    """Positions count a row's tokens; others are refused.

    Raises:
        ValueError: they do something else.
    """
    expected = start + packed.valid.cumsum(1) - 1
    wrong = packed.valid & (position_ids.expand_as(expected) != expected)
    if bool(wrong.any()):
        raise ValueError(
            "position_ids must count each row's tokens from where the cache ends; sequences that "
            "are packed into one row are not supported"
        )


def _cache_of(given: Any) -> LiquidHfCache | None:
    """The cache that was given; an empty one of another kind counts as none.

    Raises:
        ValueError: it is another kind of cache.
    """
    if given is None or isinstance(given, LiquidHfCache):
        return given
    if given.get_seq_length():
        raise ValueError(f"past_key_values is a {type(given).__name__}, not a LiquidHfCache")
    return LiquidHfCache()
