"""The cache of a Liquid Transformer as `generate` wants one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from liquidc.frontend.model import LiquidCache, LiquidForCausalLM
from liquidc.frontend.protocol import LayerCache


class LiquidHfCache(Cache):
    """Keys and values of every layer, each with as many slots taken as its tokens need.

    Rows hold their own tokens without padding, so a row's slots are fewer than the columns that
    went in: under the policy drop, skipped tokens have none.

    Attributes:
        inner: the caches, None before the first tokens.
        columns: how many columns of input_ids went in, padding included.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.inner: LiquidCache | None = None
        self.columns = 0

    @property
    def is_compileable(self) -> bool:
        """Its shapes grow."""
        return False

    def with_room(self, model: LiquidForCausalLM, batch: int, tokens: int) -> LiquidCache:
        """The caches, with slots for so many more tokens; they double when they grow."""
        if self.inner is None:
            self.inner = model.new_cache(batch, tokens)
        needed = max(int(layer.length.max()) for layer in self.inner.layers) + tokens
        slots = self.inner.layers[0].key.shape[2]
        if needed > slots:
            more = max(needed, 2 * slots) - slots
            layers = [
                LayerCache(_longer(key, more), _longer(value, more), length)
                for key, value, length in self.inner.layers
            ]
            self.inner = LiquidCache(layers, self.inner.position)
        return self.inner

    def advance(self, inner: LiquidCache | None, columns: int) -> None:
        """Take the caches after so many columns."""
        self.inner = inner
        self.columns += columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that went in."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.inner, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows beam_idx i64[B] of the batch, for beam search."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._rows(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Not there: what a token wrote under drop can't be told from what others did.

        Raises:
            NotImplementedError: always; assisted generation is not supported.
        """
        raise NotImplementedError("a Liquid cache can't be cropped; generate without an assistant")

    def _rows(self, change: Any) -> None:
        if self.inner is not None:
            layers = [LayerCache(*(change(x) for x in layer)) for layer in self.inner.layers]
            self.inner = LiquidCache(layers, change(self.inner.position))


def _longer(x: Tensor, more: int) -> Tensor:
    """A cache [B, KV, S, hd] with more slots."""
    return torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], dim=2)
