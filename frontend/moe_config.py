"""The section `moe` of config.json: experts and their router."""

from __future__ import annotations

from dataclasses import dataclass

from liquidc.frontend.fields import Fields


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """The experts and their generic router (model spec 2.1). `num_experts` 0 means dense.

    `num_zero_experts` identity experts follow: one that is chosen gives back its input. The
    activation clamped_glu is that of GPT-OSS (see `frontend.moe`).
    """

    num_experts: int = 0
    num_zero_experts: int = 0
    num_experts_per_tok: int = 2
    layers: tuple[int, ...] | str = "all"
    moe_intermediate_size: int | None = None
    score: str = "softmax"
    post: str = "renorm"
    renorm_eps: float = 0.0
    router_bias: bool = False
    selection_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    group_fill: str = "neg_inf"
    routed_scaling_factor: float = 1.0
    apply: str = "output"
    shared_intermediate_size: int = 0
    shared_gate: str = "none"
    expert_act: str = "silu_glu"
    expert_bias: bool = False

    @classmethod
    def read(cls, data: object) -> MoeConfig:
        """Read the `moe` section.

        Raises:
            ConfigError: an unknown field, an unsupported value, or a contradiction.
        """
        f = Fields("moe.", data)
        every = f.get("layers", "all") == "all"
        moe = cls(
            num_experts=f.integer("num_experts", 0, least=0),
            num_zero_experts=f.integer("num_zero_experts", 0, least=0),
            num_experts_per_tok=f.integer("num_experts_per_tok", 2, least=1),
            layers=f.choice("layers", "all") if every else f.indices("layers"),
            moe_intermediate_size=f.optional_integer("moe_intermediate_size"),
            score=f.choice("score", "softmax", "sigmoid", "identity"),
            post=f.choice("post", "renorm", "none", "softmax_k", "sigmoid"),
            renorm_eps=f.number("renorm_eps", 0.0, least=0.0),
            router_bias=f.boolean("router_bias", False),
            selection_bias=f.boolean("selection_bias", False),
            n_group=f.integer("n_group", 1, least=1),
            topk_group=f.integer("topk_group", 1, least=1),
            group_score=f.choice("group_score", "max", "top2sum"),
            group_fill=f.choice("group_fill", "neg_inf", "zero"),
            routed_scaling_factor=f.number("routed_scaling_factor", 1.0),
            apply=f.choice("apply", "output", "input"),
            shared_intermediate_size=f.integer("shared_intermediate_size", 0, least=0),
            shared_gate=f.choice("shared_gate", "none", "sigmoid"),
            expert_act=f.choice("expert_act", "silu_glu", "clamped_glu"),
            expert_bias=f.boolean("expert_bias", False),
        )
        f.finish()
        if moe.num_experts:
            moe._check(f)
        else:
            f.refuse_if(not every, "layers", "all with num_experts 0, which has no experts")
            f.refuse_if(
                moe.shared_intermediate_size > 0, "shared_intermediate_size", "0 with num_experts 0"
            )
            f.refuse_if(moe.num_zero_experts > 0, "num_zero_experts", "0 with num_experts 0")
        return moe

    @property
    def num_choices(self) -> int:
        """How many experts the router chooses among, identity experts included."""
        return self.num_experts + self.num_zero_experts

    def _check(self, f: Fields) -> None:
        experts, groups = self.num_choices, self.n_group
        named = "num_experts + num_zero_experts" if self.num_zero_experts else "num_experts"
        f.refuse_if(
            not self.layers,
            "layers",
            f"all, or one layer at least, with num_experts {self.num_experts}",
        )
        f.refuse_if(
            self.num_experts_per_tok > experts,
            "num_experts_per_tok",
            f"at most {named} ({experts})",
        )
        f.refuse_if(experts % groups != 0, "n_group", f"a divisor of {named} ({experts})")
        f.refuse_if(self.topk_group > groups, "topk_group", f"at most n_group ({groups})")
        f.refuse_if(
            self.num_experts_per_tok > experts // groups * self.topk_group,
            "topk_group",
            f"enough groups to hold num_experts_per_tok ({self.num_experts_per_tok}) experts",
        )
        f.refuse_if(
            self.group_score == "top2sum" and experts // groups < 2,
            "group_score",
            "max with one expert in a group",
        )
        f.refuse_if(
            self.post != "renorm" and self.renorm_eps != 0.0, "renorm_eps", "0.0 without renorm"
        )
        f.refuse_if(
            self.shared_gate != "none" and not self.shared_intermediate_size,
            "shared_gate",
            "none with shared_intermediate_size 0",
        )
