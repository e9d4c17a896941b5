"""The reference Liquid Transformer: embedding, layers with depth gates, head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquidc.frontend import checkpoint
from liquidc.frontend.config import LiquidConfig
from liquidc.frontend.layers import Layer
from liquidc.frontend.loss import LossParts, total_loss
from liquidc.frontend.moe import Experts
from liquidc.frontend.protocol import LayerCache, Step
from liquidc.frontend.router import DepthRouter
from liquidc.frontend.semantic_ops import at_least_float32


@dataclass
class LiquidCache:
    """The caches of all layers, and the position of the next token of each row, i64[B]."""

    layers: list[LayerCache]
    position: Tensor


@dataclass(frozen=True)
class LiquidOutput:
    """What a forward yields. G gates in the order of the layers (attention before feed-forward).

    logits f32[B, T, V]; cache, None for a forward without one; gates bool[G, B, T], the final
    masks; gate_p f32[G, B, T], sigmoid of gate_score f32[G, B, T], without the bias; experts
    i64[L, B, T, k] with -1 for skipped tokens and dense layers, None in a model without experts.
    """

    logits: Tensor
    cache: LiquidCache | None
    gates: Tensor
    gate_p: Tensor
    gate_score: Tensor
    experts: Tensor | None


class Decoder(nn.Module):
    """What checkpoints call `model`: embedding, layers, final norm."""

    def __init__(self, config: LiquidConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LiquidForCausalLM(nn.Module):
    """A decoder LM whose tokens choose their layers and experts (model spec 5).

    The names of its parameters are the checkpoint's. Run `forward` under `torch.no_grad()` for
    real skipping; with gradients on, every layer is computed and masked.
    """

    def __init__(self, config: LiquidConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    @classmethod
    def from_directory(cls, path: str | Path) -> LiquidForCausalLM:
        """The float32 model of a checkpoint directory, of any family that is supported.

        Raises:
            ConfigError: config.json is not supported.
            CheckpointError: the weights are damaged or don't fit.
        """
        from liquidc.frontend.families import open_model

        return open_model(Path(path)).load()

    def save_directory(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into the directory `path`."""
        checkpoint.save(self, self.config.to_dict(), Path(path))

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers; each is `layer(x, step, cache) -> (x, cache)`."""
        return self.model.layers

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation `initializer_range`, zero biases, unit norms."""
        if self.model.norm.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Experts):
                for name, parameter in module.named_parameters(recurse=False):
                    if "bias" in name:
                        nn.init.zeros_(parameter)
                    else:
                        nn.init.normal_(parameter, std=self.config.initializer_range)
        for module in self.modules():
            if isinstance(module, DepthRouter):
                module.favour_running()

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Ids i64[B, T] -> states [B, T, D]; positions enter in the layers."""
        del positions
        x, scale = self.model.embed_tokens(input_ids), self.config.embedding_multiplier
        return x if scale == 1.0 else x * scale

    def head(self, x: Tensor) -> Tensor:
        """Final norm and logits f32[B, T, V] of states [B, T, D]."""
        x = self.model.norm(x)
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits = at_least_float32(F.linear(x, weight))
        scale = self.config.logits_scaling
        return logits if scale == 1.0 else logits / scale

    def new_cache(self, batch: int, capacity: int) -> LiquidCache:
        """An empty cache of `capacity` slots for `batch` rows."""
        config, like = self.config, self.model.norm.weight
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        start = torch.zeros(batch, dtype=torch.int64, device=like.device)
        layers = [
            LayerCache(like.new_zeros(shape), like.new_zeros(shape), start) for _ in self.layers
        ]
        return LiquidCache(layers, start)

    def forward(
        self,
        input_ids: Tensor,
        cache: LiquidCache | None = None,
        *,
        lengths: Tensor | None = None,
        position_start: Tensor | None = None,
        gate_force: Tensor | None = None,
        gate_bias: Tensor | None = None,
        min_depth: Tensor | None = None,
    ) -> LiquidOutput:
        """Logits of input_ids i64[B, T], and the cache after them.

        lengths i64[B]: tokens beyond are padding (default: none). position_start i64[B]: position
        of the first token (default: where the cache ends, or 0). gate_force i8[G]: -1 skip, 1 run,
        0 the router decides. gate_bias f32[B] is added to the scores. min_depth i64[B]: at least
        so many layers run. Without a cache, a whole sequence from its start.

        Raises:
            InputError: the cache has too few slots.
        """
        steps, x, after = self.run(
            input_ids, cache, lengths, position_start, gate_force, gate_bias, min_depth
        )
        gates = [gate for step in steps for gate in step.gates]
        scores = [score for step in steps for score in step.scores]
        none = x.new_zeros((0, *input_ids.shape), dtype=torch.float32)
        return LiquidOutput(
            logits=self.head(x),
            cache=after,
            gates=torch.stack([m for m, _ in gates]) if gates else none.to(torch.bool),
            gate_p=torch.stack([p for _, p in gates]) if gates else none,
            gate_score=torch.stack(scores) if scores else none,
            experts=self._experts(steps, input_ids),
        )

    def loss(
        self,
        input_ids: Tensor,
        *,
        lengths: Tensor | None = None,
        gate_force: Tensor | None = None,
        gate_bias: Tensor | None = None,
        min_depth: Tensor | None = None,
        dense_estimate: bool = False,
    ) -> LossParts:
        """The training loss (model spec 5.5) of predicting each next token of i64[B, T+1].

        lengths i64[B] counts the predicted tokens of each row (default T); the controls are those
        of `forward`. The gates are straight-through. With dense_estimate the experts compute
        skipped tokens too (masked as ever), so that a gate's gradient knows what skipping them
        lost; without it, only executed tokens are sent to experts, which is faster.
        """
        steps, x, _ = self.run(
            input_ids[:, :-1],
            None,
            lengths,
            None,
            gate_force,
            gate_bias,
            min_depth,
            dense_estimate=dense_estimate,
        )
        return total_loss(self.config, self.head(x), input_ids[:, 1:], steps)

    def run(
        self,
        input_ids: Tensor,
        cache: LiquidCache | None = None,
        lengths: Tensor | None = None,
        position_start: Tensor | None = None,
        gate_force: Tensor | None = None,
        gate_bias: Tensor | None = None,
        min_depth: Tensor | None = None,
        *,
        dense_estimate: bool = False,
    ) -> tuple[list[Step], Tensor, LiquidCache | None]:
        """All layers: what each recorded, the last state [B, T, D], the cache after them.

        See `forward` and `loss`; the head is left to be computed.
        """
        batch, tokens = input_ids.shape
        config, device = self.config, input_ids.device
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        offset = torch.arange(tokens, device=device)
        if position_start is None:
            position_start = zeros if cache is None else cache.position
        positions = position_start.unsqueeze(1) + offset
        valid = offset < (zeros + tokens if lengths is None else lengths).unsqueeze(1)
        force = gate_force
        if force is None:
            force = torch.zeros(config.num_gates, dtype=torch.int8, device=device)
        bias = zeros.to(torch.float32) if gate_bias is None else gate_bias
        floor = zeros if min_depth is None else min_depth
        x = self.embed(input_ids, positions)
        executed, below, first = torch.zeros_like(positions), None, 0
        steps: list[Step] = []
        caches: list[LayerCache] = []
        for index, layer in enumerate(self.layers):
            count = config.gates_per_layer(index)
            step = Step(
                positions,
                valid,
                force[first : first + count],
                bias,
                floor,
                executed,
                remaining=config.num_hidden_layers - index,
                below=below,
                dense_estimate=dense_estimate,
            )
            x, new = layer(x, step, None if cache is None else cache.layers[index])
            executed, below, first = step.executed_after(), step.kv, first + count
            steps.append(step)
            caches += [] if new is None else [new]
        if cache is None:
            return steps, x, None
        return steps, x, LiquidCache(caches, position_start + valid.sum(1))

    def _experts(self, steps: list[Step], input_ids: Tensor) -> Tensor | None:
        if not self.config.moe_layers:
            return None
        none = input_ids.new_full((*input_ids.shape, self.config.moe.num_experts_per_tok), -1)
        return torch.stack([none if s.experts is None else s.experts for s in steps])
