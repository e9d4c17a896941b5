"""Depth gates, routing, experts, token compaction.

B rows of T tokens; E experts, k of which a token uses. `...` are the tokens'
dimensions: [B, T], or [N] after compaction.
"""

from __future__ import annotations

from liquidc.ir.core import Block, Op, Value, attribute, operand, optional, region, result, variadic
from liquidc.ir.ops.nn import expect_blocks
from liquidc.ir.ops.tensor import same_dtype
from liquidc.ir.types import Dim, DType, TensorType


def expect(value: Value, what: str, dtype: DType, *shape: Dim) -> None:
    """Check a type.

    Raises:
        ValueError: it is another one.
    """
    if value.type != TensorType(dtype, shape):
        raise ValueError(f"{what} must be {TensorType(dtype, shape)}, not {value.type}")


class DepthGate(Op, name="depth_gate"):
    """Which tokens run a layer, and the probability p = sigmoid(score) (model spec 5.1).

    The router decides by `sigmoid(score + bias) > threshold` (`ge`: ≥); then, each stronger than
    the one before: a token runs when the layers that remain (`remaining`, this one included) are
    no more than `min_depth - executed`; the first `reserved` positions run; `force` 1 runs all and
    -1 none; a token that is not valid does not run. p never contains the bias.
    """

    score: Value = operand()
    valid: Value = operand()
    positions: Value = operand()
    force: Value = operand()
    bias: Value = operand()
    min_depth: Value = operand()
    executed: Value = operand()
    layer: int = attribute()
    gate: int = attribute()
    remaining: int = attribute()
    threshold: float = attribute()
    compare: str = attribute(default="gt")
    reserved: int = attribute(default=0)
    mask: Value = result()
    p: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """bool[B, T] and f32[B, T]."""
        return (self.score.type.with_dtype(DType.BOOL), self.score.type)

    def verify(self) -> None:
        """Operand types; `compare` is known."""
        if self.score.type.rank != 2 or self.score.dtype != DType.F32:
            raise ValueError(f"the score must be f32[B, T], not {self.score.type}")
        rows, tokens = self.score.shape
        expect(self.valid, "valid", DType.BOOL, rows, tokens)
        expect(self.positions, "positions", DType.I64, rows, tokens)
        expect(self.force, "force", DType.I8)
        expect(self.bias, "bias", DType.F32, rows)
        expect(self.min_depth, "min_depth", DType.I64, rows)
        expect(self.executed, "executed", DType.I64, rows, tokens)
        if self.compare not in ("gt", "ge"):
            raise ValueError(f'compare is "gt" or "ge", not "{self.compare}"')


class FixedGate(Op, name="fixed_gate"):
    """A depth gate that was decided at compile time: all tokens run, or none.

    With `run` the mask is `valid` and p is 1, else the mask is false and p is 0. `threshold`,
    `compare` and `reserved` are those of the gate that stood here.
    """

    valid: Value = operand()
    layer: int = attribute()
    gate: int = attribute()
    run: bool = attribute()
    threshold: float = attribute()
    compare: str = attribute(default="gt")
    reserved: int = attribute(default=0)
    mask: Value = result()
    p: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """bool[B, T] and f32[B, T]."""
        return (self.valid.type, self.valid.type.with_dtype(DType.F32))

    def verify(self) -> None:
        """The type of `valid`."""
        if self.valid.dtype != DType.BOOL or self.valid.type.rank != 2:
            raise ValueError(f"valid must be bool[B, T], not {self.valid.type}")


class Route(Op, name="route", tokenwise=True):
    """The k experts of each token and their weights (the generic router of model spec 2.1).

    `logits` [..., E]; where `mask` [...] is false the indices are -1 and the weights 0. Equal
    scores: the lowest index wins.
    """

    logits: Value = operand()
    mask: Value = operand()
    selection_bias: Value | None = optional()
    k: int = attribute()
    score: str = attribute(default="softmax")
    post: str = attribute(default="renorm")
    renorm_eps: float = attribute(default=0.0)
    n_group: int = attribute(default=1)
    topk_group: int = attribute(default=1)
    group_score: str = attribute(default="max")
    group_fill: str = attribute(default="neg_inf")
    scaling: float = attribute(default=1.0)
    index: Value = result()
    weight: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """i64[..., k] and f32[..., k]."""
        shape = (*self.logits.shape[:-1], self.k)
        return (TensorType(DType.I64, shape), TensorType(DType.F32, shape))

    def verify(self) -> None:
        """Operand types and known formulas."""
        *tokens, experts = self.logits.shape
        expect(self.logits, "logits", DType.F32, *tokens, experts)
        expect(self.mask, "mask", DType.BOOL, *tokens)
        if self.selection_bias is not None:
            expect(self.selection_bias, "selection_bias", DType.F32, experts)
        if not isinstance(experts, int) or not 0 < self.k <= experts:
            raise ValueError(f"can't choose {self.k} of {experts} experts")
        for name, known in (
            ("score", ("softmax", "sigmoid", "identity")),
            ("post", ("none", "renorm", "softmax_k", "sigmoid")),
            ("group_score", ("max", "top2sum")),
            ("group_fill", ("zero", "neg_inf")),
        ):
            if self.attributes[name] not in known:
                raise ValueError(
                    f"{name} is one of {', '.join(known)}, not {self.attributes[name]}"
                )
        if self.n_group < 1 or experts % self.n_group or not 0 < self.topk_group <= self.n_group:
            raise ValueError(f"{self.topk_group} of {self.n_group} groups of {experts} experts")


class Renumber(Op, name="renumber", tokenwise=True):
    """Other numbers for experts: `table[index]` for `index` [...]; a negative number stays."""

    index: Value = operand()
    table: tuple[int, ...] = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As the index."""
        return (self.index.type,)

    def verify(self) -> None:
        """An index; a table of numbers."""
        if self.index.dtype != DType.I64:
            raise ValueError(f"the index must be i64, not {self.index.type}")
        if not self.table or min(self.table) < 0:
            raise ValueError(f"the table must hold the numbers of experts, not {self.table}")


class ExpertMask(Op, name="expert_mask", tokenwise=True):
    """Whether a token with the experts `index` [..., k] uses one expert: bool[...]."""

    index: Value = operand()
    expert: int = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """bool[...]."""
        return (TensorType(DType.BOOL, self.index.shape[:-1]),)


class ExpertWeight(Op, name="expert_weight", tokenwise=True):
    """The weight that a token gives one expert, 0 if it does not use it: f32[...]."""

    index: Value = operand()
    weight: Value = operand()
    expert: int = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """f32[...]."""
        expect(self.weight, "weight", DType.F32, *self.index.shape)
        return (TensorType(DType.F32, self.index.shape[:-1]),)


class MapExperts(Op, name="map_experts", tokenwise=True):
    """`y = Σ_slots weight · body(x, params of the slot's expert)`.

    x [..., D], index and weight [..., k]; each of `params` has the experts in front. A number that
    is no expert's, such as -1, adds nothing. `body` takes x and one expert's params and is
    tokenwise. With `apply` "input" the weight multiplies x.
    """

    x: Value = operand()
    index: Value = operand()
    weight: Value = operand()
    params: list[Value] = variadic()
    apply: str = attribute(default="output")
    body: Block = region()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """What the body yields."""
        return tuple(value.type for value in self.body.terminator.operands)

    def verify(self) -> None:
        """Argument types of the body; one result."""
        _check_experts(self.x, self.index, self.weight, self.params, self.apply)
        expected = [self.x.type, *(p.type.with_shape(*p.shape[1:]) for p in self.params)]
        given = [arg.type for arg in self.body.args]
        if given != expected:
            raise ValueError(f"the body takes ({_types(given)}) instead of ({_types(expected)})")
        if len(self.results) != 1 or self.y.shape[:-1] != self.x.shape[:-1]:
            raise ValueError("the body must yield one tensor of the tokens' shape")


class GroupedExperts(Op, name="grouped_experts", tokenwise=True):
    """All experts as one op: `down_e · (silu(gate_e x) · up_e x)`, weighted and summed.

    `gate_up` [E, 2I, D] holds the gate's rows, then the up projection's; `down` [E, D, I]. With
    `input_block` and `inner_block`, each block of so many elements of what the first product and
    the second one read is first rounded to 8 bits.
    """

    x: Value = operand()
    index: Value = operand()
    weight: Value = operand()
    gate_up: Value = operand()
    down: Value = operand()
    activation: str = attribute(default="silu_glu")
    apply: str = attribute(default="output")
    input_block: int = attribute(default=0)
    inner_block: int = attribute(default=0)
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As x."""
        return (self.x.type,)

    def verify(self) -> None:
        """Shapes of the weights; a known activation."""
        expect_blocks(self.gate_up, self.input_block)
        expect_blocks(self.down, self.inner_block)
        _check_experts(self.x, self.index, self.weight, [self.gate_up, self.down], self.apply)
        experts, width, hidden = self.gate_up.shape[0], self.x.shape[-1], self.down.shape[-1]
        if not isinstance(hidden, int):
            raise ValueError(f"{self.down.type} has no known width")
        expect(self.gate_up, "gate_up", self.x.dtype, experts, 2 * hidden, width)
        expect(self.down, "down", self.x.dtype, experts, width, hidden)
        if self.activation != "silu_glu":
            raise ValueError(f'activation is "silu_glu", not "{self.activation}"')


class TakeTokens(Op, name="take_tokens"):
    """Tokens of x [B, T, ...] by position in their row, `index` [B, P]: [B, P, ...]."""

    x: Value = operand()
    index: Value = operand()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """[B, P, ...]."""
        if self.index.dtype != DType.I64 or self.index.shape[:1] != self.x.shape[:1]:
            raise ValueError(f"the index {self.index.type} does not meet {self.x.type}")
        return (self.x.type.with_shape(*self.index.shape, *self.x.shape[2:]),)


class Rows(Op, name="rows"):
    """The tokens where `mask` [B, T] holds, as b · T + t in rising order: i64[N]."""

    mask: Value = operand()
    dim: str = attribute()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """i64[N]; N is `dim`."""
        if self.mask.dtype != DType.BOOL or self.mask.type.rank != 2:
            raise ValueError(f"the mask must be bool[B, T], not {self.mask.type}")
        return (TensorType(DType.I64, (self.dim,)),)

    def introduces(self) -> tuple[str, ...]:
        """The number of rows."""
        return (self.dim,)


class GatherRows(Op, name="gather_rows"):
    """The tokens `rows` [N] of x [B, T, ...]: [N, ...]."""

    x: Value = operand()
    rows: Value = operand()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """[N, ...]."""
        if self.x.type.rank < 2 or self.rows.type.rank != 1:
            raise ValueError(f"needs [B, T, ...] and [N], not {self.x.type} and {self.rows.type}")
        return (self.x.type.with_shape(*self.rows.shape, *self.x.shape[2:]),)


class ScatterRows(Op, name="scatter_rows"):
    """`base` [B, T, ...] with the tokens `rows` [N] replaced by `update` [N, ...]."""

    base: Value = operand()
    rows: Value = operand()
    update: Value = operand()
    y: Value = result()

    def infer(self) -> tuple[TensorType, ...]:
        """As the base."""
        expect(self.update, "update", self.base.dtype, *self.rows.shape, *self.base.shape[2:])
        return (self.base.type,)


def _check_experts(x: Value, index: Value, weight: Value, params: list[Value], apply: str) -> None:
    if index.shape[:-1] != x.shape[:-1] or index.dtype != DType.I64:
        raise ValueError(f"the index {index.type} does not meet {x.type}")
    expect(weight, "weight", DType.F32, *index.shape)
    if not params or len({p.shape[:1] for p in params}) != 1:
        raise ValueError("every parameter must have the experts in front")
    if apply not in ("output", "input"):
        raise ValueError(f'apply is "output" or "input", not "{apply}"')
    merges = isinstance(index.op, Renumber) and len(set(index.op.table)) < len(index.op.table)
    if apply == "input" and merges and index.shape[-1] != 1:
        raise ValueError("shares multiply what experts read, so no two numbers may become one")
    same_dtype(x, *params)


def _types(types: list[TensorType]) -> str:
    return ", ".join(map(str, types))
