"""The configuration of a Liquid Transformer: `config.json` with `model_type` "liquid".

Fields and defaults are those of model spec 5.2. Nothing is ignored silently: a field that is not
known, a value that is not supported and two fields that contradict each other are `ConfigError`s
that name the field, the value and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from liquidc.errors import ConfigError
from liquidc.frontend.attention_config import AttentionConfig
from liquidc.frontend.fields import Fields
from liquidc.frontend.moe_config import MoeConfig
from liquidc.frontend.rope_config import read_rope
from liquidc.records import read_object

IGNORED = frozenset(
    "_name_or_path architectures auto_map model_type liquid_version transformers_version use_cache "
    "tokenizer_class".split()
)
"""Top-level keys of Hugging Face configs that change nothing here, or are read on their own."""

FIXED: Mapping[str, object] = {
    "attention_dropout": 0.0,
    "early_exit": None,
    "hidden_act": "silu",
    "mlp_bias": False,
    "pretraining_tp": 1,
    "sliding_window": None,
}
"""Top-level keys that are accepted at one value only: others would change the model."""


@dataclass(frozen=True, slots=True)
class DepthGateConfig:
    """The depth gates (model spec 5.1). `None` stands for the default that a method computes."""

    layers: tuple[int, ...] = ()
    scope: str = "layer"
    input: str = "post_norm"
    router_type: str = "bottleneck"
    router_hidden_size: int | None = None
    router_norm: bool = True
    router_act: str = "tanh"
    router_bias: bool = False
    router_num_logits: int = 1
    router_exec_index: int = 1
    router_dtype: str = "float32"
    threshold: float = 0.5
    compare: str = "gt"
    exec_scale: str = "none"
    exec_scale_alpha: float = 1.0
    scale_target: str = "ffn"
    skip_path: str = "identity"
    adapter_intermediate_size: int | None = None
    skip_scale: str = "one"
    kv_policy: str = "own"
    reserved_initial_tokens: int = 0

    @classmethod
    def read(cls, data: object) -> DepthGateConfig:
        """Read the `depth_gate` section.

        Raises:
            ConfigError: an unknown field, an unsupported value, or a contradiction.
        """
        f = Fields("depth_gate.", data)
        f.only("level", "token")
        f.only("decision", "router")
        f.only("phases", "both")
        f.only("block_size", 1)
        router_type = f.choice("router_type", "bottleneck", "linear", "mlp")
        linear = router_type == "linear"
        gate = cls(
            layers=f.indices("layers"),
            scope=f.choice("scope", "layer", "attn", "ffn", "attn_ffn"),
            input=f.choice("input", "post_norm", "residual"),
            router_type=router_type,
            router_hidden_size=f.optional_integer("router_hidden_size"),
            router_norm=f.boolean("router_norm", not linear),
            router_act=f.choice("router_act", *(["none"] * linear), "tanh", "silu", "relu"),
            router_bias=f.boolean("router_bias", False),
            router_num_logits=f.integer("router_num_logits", 1, least=1, most=2),
            router_exec_index=f.integer("router_exec_index", 1, least=0, most=1),
            router_dtype=f.choice("router_dtype", "float32", "model"),
            threshold=f.number("threshold", 0.5, above=0.0, below=1.0),
            compare=f.choice("compare", "gt", "ge"),
            exec_scale=f.choice("exec_scale", "none", "prob", "logit"),
            exec_scale_alpha=f.number("exec_scale_alpha", 1.0),
            scale_target=f.choice("scale_target", "ffn", "both", "delta"),
            skip_path=f.choice("skip_path", "identity", "adapter"),
            adapter_intermediate_size=f.optional_integer("adapter_intermediate_size"),
            skip_scale=f.choice("skip_scale", "one", "one_minus_prob"),
            kv_policy=f.choice("kv_policy", "own", "drop", "inherit"),
            reserved_initial_tokens=f.integer("reserved_initial_tokens", 0, least=0),
        )
        f.finish()
        gate._check(f)
        return gate

    def _check(self, f: Fields) -> None:
        if self.router_type == "linear":
            why = "with router_type linear, which has no hidden layer"
            f.refuse_if(self.router_norm, "router_norm", f"false {why}")
            f.refuse_if(self.router_hidden_size is not None, "router_hidden_size", f"null {why}")
            f.refuse_if(self.router_act != "none", "router_act", f"none {why}")
        f.refuse_if(
            self.router_num_logits == 1 and self.router_exec_index != 1,
            "router_exec_index",
            "1 with router_num_logits 1",
        )
        f.refuse_if(
            self.exec_scale == "none" and self.exec_scale_alpha != 1.0,
            "exec_scale_alpha",
            "1.0 with exec_scale none",
        )
        if self.skip_path == "identity":
            f.refuse_if(
                self.adapter_intermediate_size is not None,
                "adapter_intermediate_size",
                "null with skip_path identity",
            )
            f.refuse_if(self.skip_scale != "one", "skip_scale", "one with skip_path identity")
        f.refuse_if(
            self.skip_path == "adapter" and self.scope == "attn",
            "skip_path",
            "identity with scope attn, which never skips the feed-forward",
        )


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The weights of the training loss (model spec 5.5)."""

    depth_target: float = 0.6
    depth_loss: str = "l1_flops"
    depth_coef: float = 1.0
    router_aux_coef: float = 0.01
    router_z_coef: float = 0.0

    @classmethod
    def read(cls, data: object) -> TrainingConfig:
        """Read the `training` section.

        Raises:
            ConfigError: an unknown field or an unsupported value.
        """
        f = Fields("training.", data)
        training = cls(
            depth_target=f.number("depth_target", 0.6, least=0.0, most=1.0),
            depth_loss=f.choice("depth_loss", "l1_flops"),
            depth_coef=f.number("depth_coef", 1.0, least=0.0),
            router_aux_coef=f.number("router_aux_coef", 0.01, least=0.0),
            router_z_coef=f.number("router_z_coef", 0.0, least=0.0),
        )
        f.finish()
        return training


@dataclass(frozen=True, slots=True)
class LiquidConfig:
    """A Liquid Transformer: the Llama part, its depth gates and its experts."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: str = ""
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: str = "none"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    initializer_range: float = 0.02
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    depth_gate: DepthGateConfig = field(default_factory=DepthGateConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LiquidConfig:
        """Read a config from the decoded JSON of `config.json`.

        Raises:
            ConfigError: a field is missing, unknown, unsupported or contradicts another one.
        """
        f = Fields("", data)
        f.skip(IGNORED)
        f.require("model_type", "liquid")
        f.only("liquid_version", 1)
        for name, value in FIXED.items():
            f.only(name, value)
        hidden = f.integer("hidden_size", least=1)
        heads = f.integer("num_attention_heads", least=1)
        head_dim = f.optional_integer("head_dim")
        f.refuse_if(
            head_dim is None and hidden % heads != 0,
            "num_attention_heads",
            f"a divisor of hidden_size ({hidden}), or head_dim must be given",
        )
        vocab = f.integer("vocab_size", least=1)
        positions = f.integer("max_position_embeddings", 2048, least=1)
        rope = read_rope(f, positions)
        config = cls(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=f.integer("num_hidden_layers", least=1),
            num_attention_heads=heads,
            num_key_value_heads=f.integer("num_key_value_heads", heads, least=1),
            head_dim=head_dim or hidden // heads,
            intermediate_size=f.optional_integer("intermediate_size"),
            rms_norm_eps=f.number("rms_norm_eps", 1e-6, above=0.0),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            max_position_embeddings=rope.positions,
            tie_word_embeddings=f.boolean("tie_word_embeddings", False),
            attention_bias=f.boolean("attention_bias", False),
            qk_norm=f.choice("qk_norm", "none", "head", "full"),
            embedding_multiplier=f.number("embedding_multiplier", 1.0),
            residual_multiplier=f.number("residual_multiplier", 1.0),
            logits_scaling=f.number("logits_scaling", 1.0, above=0.0),
            initializer_range=f.number("initializer_range", 0.02, above=0.0),
            dtype=_dtype(f),
            bos_token_id=f.token("bos_token_id", vocab),
            eos_token_id=f.tokens("eos_token_id", vocab),
            pad_token_id=f.token("pad_token_id", vocab),
            attention=AttentionConfig.read(f.get("attention", {})),
            depth_gate=DepthGateConfig.read(f.get("depth_gate", {})),
            moe=MoeConfig.read(f.get("moe", {})),
            training=TrainingConfig.read(f.get("training", {})),
        )
        f.finish()
        config._check(f)
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> LiquidConfig:
        """Read `config.json` (or the one in the directory `path`).

        Raises:
            ConfigError: the file is missing, is not JSON, or `from_dict` refuses it.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        data = read_object(file, ConfigError)
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_dict` reads back an equal config."""
        data: dict[str, Any] = {"model_type": "liquid", "liquid_version": 1, **asdict(self)}
        return json.loads(json.dumps(data))

    def _check(self, f: Fields) -> None:
        layers, kv = self.num_hidden_layers, self.num_key_value_heads
        f.refuse_if(
            self.num_attention_heads % kv != 0,
            "num_key_value_heads",
            f"a divisor of num_attention_heads ({self.num_attention_heads})",
        )
        f.refuse_if(self.head_dim % 2 != 0, "head_dim", "even, for rotary embeddings")
        slides = self.attention.sliding_layers
        chosen = {
            "depth_gate.layers": self.gated_layers,
            "moe.layers": self.moe_layers,
            "attention.sliding_layers": () if isinstance(slides, str) else slides,
            "attention.no_rope_layers": self.attention.no_rope_layers,
            "attention.chunk_layers": self.attention.chunk_layers or (),
        }
        for name, indices in chosen.items():
            if any(i >= layers for i in indices):
                raise ConfigError(
                    f"{name} is {list(indices)!s:.80}; with num_hidden_layers {layers} "
                    f"it must be 0 to {layers - 1}"
                )
        f.refuse_if(
            self.intermediate_size is None
            and (len(self.moe_layers) < layers or self.moe.moe_intermediate_size is None),
            "intermediate_size",
            "given: a dense feed-forward or the experts take their width from it",
        )
        f.refuse_if(
            self.depth_gate.reserved_initial_tokens > self.max_position_embeddings,
            "max_position_embeddings",
            "at least depth_gate.reserved_initial_tokens",
        )

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have gates."""
        return self.depth_gate.layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose feed-forward is a set of experts."""
        if not self.moe.num_experts:
            return ()
        chosen = self.moe.layers
        return tuple(range(self.num_hidden_layers)) if isinstance(chosen, str) else chosen

    def gates_per_layer(self, layer: int) -> int:
        """0, 1, or 2 (scope attn_ffn: first attention, then feed-forward)."""
        if layer not in self.gated_layers:
            return 0
        return 2 if self.depth_gate.scope == "attn_ffn" else 1

    @property
    def num_gates(self) -> int:
        """G: all gates, in the order of the layers."""
        return sum(self.gates_per_layer(layer) for layer in self.gated_layers)

    @property
    def expert_width(self) -> int:
        """I of the experts: `moe_intermediate_size`, by default `intermediate_size`."""
        return self.moe.moe_intermediate_size or self.intermediate_size or 0

    @property
    def router_width(self) -> int:
        """R, the hidden width of a depth gate's router: by default D / 16, at least 1."""
        return self.depth_gate.router_hidden_size or max(1, self.hidden_size // 16)

    @property
    def adapter_width(self) -> int:
        """Width of the skip path's adapter: by default F / 16, at least 1.

        F is `intermediate_size`, or the experts' width where there is no dense one.
        """
        width = self.intermediate_size or self.expert_width
        return self.depth_gate.adapter_intermediate_size or max(1, width // 16)


def _dtype(f: Fields) -> str:
    """`dtype` or `torch_dtype`: the type the checkpoint was saved in; compute is float32."""
    names = ("float32", "bfloat16", "float16")
    old = f.choice("torch_dtype", *names)
    new = f.choice("dtype", *names)
    f.refuse_if("dtype" in f and "torch_dtype" in f and old != new, "dtype", f"{old} (torch_dtype)")
    return new if "dtype" in f else old
