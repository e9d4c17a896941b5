"""The pass `specialize-decode`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from liquidc.errors import InputError
from liquidc.ir import Block, Dim, DType, Function, Module, Op, TensorType, Value, ops
from liquidc.ir.rewriter import Rewriter, Rule, Statistics, apply_rules
from liquidc.ir.types import dim_names, product
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.fold_constants import FoldWhere, SkipIdentity


@dataclass(frozen=True)
class SpecializeDecode(Pass):
    """@decode takes one token a row; with `batch=1` an arm that runs has its mask known.

    Before::

        func @decode(%m: bool[1, 1], ...)
          %y = if any(%m) { %h = ...  yield %x + where(%m, %h, 0) } else { yield %x }

    After::

        %y = if any(%m) { %h = ...  yield %x + %h } else { yield %x }

    With `batch=0` (any number of rows) only sums over the one token are simplified: in a batch,
    some rows may skip what others run.
    """

    batch: int = 0

    name: ClassVar[str] = "specialize-decode"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "bitwise"

    def __post_init__(self) -> None:
        if self.batch not in (0, 1):
            raise InputError(f"batch is 0 (any) or 1, not {self.batch}")

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Specialise @decode, if the module has it."""
        if "decode" not in module.functions:
            return
        bind: dict[str, Dim] = {"T": 1, "B": 1} if self.batch else {"T": 1}
        function = substitute(module.functions["decode"], bind)
        module.functions["decode"] = function
        if self.batch:
            statistics.fired[self.name] += _know_masks(function.body)
        only = Module(module.name, {"decode": function}, module.weights)
        apply_rules(only, [SkipIdentity(), SumOfOne(), FoldWhere()], statistics)


class SumOfOne(Rule):
    """cumsum(x) along one element → x; sum, any or max over one element → reshape(x)."""

    root = (ops.CumSum, ops.Sum, ops.Any, ops.Max)

    def rewrite(self, op: ops.CumSum | ops.Reduce, rw: Rewriter) -> Sequence[Value]:
        """The operand in the result's shape."""
        dims = (op.dim,) if isinstance(op, ops.CumSum) else op.dims
        rw.check(all(op.x.shape[dim] == 1 for dim in dims), "there are several elements")
        if op.x.type == op.results[0].type:
            return [op.x]
        return [rw.emit(ops.Reshape(op.x, shape=op.results[0].shape, loc=op.loc)).y]


def substitute(function: Function, bind: Mapping[str, Dim]) -> Function:
    """A copy of `function` with sizes in the place of named dimensions."""
    copy = Function(function.name, [(a.name, bound(a.type, bind)) for a in function.args])
    mapping = dict(zip(function.args, copy.args, strict=True))
    _copy_block(function.body, copy.body, mapping, bind)
    copy.result_names = function.result_names
    return copy


def bound(type: TensorType, bind: Mapping[str, Dim]) -> TensorType:
    """`type` with sizes in the place of named dimensions."""
    return type.with_shape(*(_bound_dim(dim, bind) for dim in type.shape))


def _bound_dim(dim: Any, bind: Mapping[str, Dim]) -> Any:
    if not isinstance(dim, str) or not dim_names([dim]) & set(bind):
        return dim
    return product(int(part) if part.isdigit() else bind.get(part, part) for part in dim.split("*"))


def _copy_block(
    old: Block, new: Block, mapping: dict[Value, Value], bind: Mapping[str, Dim]
) -> None:
    for op in old.ops:
        copy_bound(op, new, mapping, bind)


def copy_bound(op: Op, new: Block, mapping: dict[Value, Value], bind: Mapping[str, Dim]) -> Op:
    """A copy of `op` at the end of `new`, with sizes in the place of named dimensions.

    Operands are looked up in `mapping`, which gets the results.
    """
    changes: dict[str, Any] = {"result_types": [bound(v.type, bind) for v in op.results]}
    for name in ("shape", "dim"):
        value = op.attributes.get(name)
        if isinstance(value, tuple):
            changes[name] = tuple(_bound_dim(dim, bind) for dim in value)
        elif isinstance(value, str) and isinstance(op, ops.Size | ops.Iota):
            changes[name] = _bound_dim(value, bind)
    operands = {v: mapping[v] for v in op.operands}
    for name, inner in op.regions.items():
        changes[name] = Block([(a.name, bound(a.type, bind)) for a in inner.args])
        mapping.update(zip(inner.args, changes[name].args, strict=True))
        _copy_block(inner, changes[name], mapping, bind)
    copy = new.append(op.clone(operands, **changes))
    mapping.update(zip(op.results, copy.results, strict=True))
    return copy


def _know_masks(block: Block) -> int:
    """Inside the arms of `if any(mask)` over one token, replace the mask; how many arms."""
    count = 0
    for op in block.ops:
        if isinstance(op, ops.If):
            condition = op.cond.op
            while isinstance(condition, ops.Reshape):
                condition = condition.x.op
            if isinstance(condition, ops.Any) and product(condition.x.shape) == 1:
                know_mask(op.then, condition.x, known=True)
                know_mask(op.otherwise, condition.x, known=False)
                count += 2
        for inner in op.regions.values():
            count += _know_masks(inner)
    return count


def know_mask(arm: Block, mask: Value, *, known: bool) -> None:
    """Put a constant in the place of `mask` in an arm, where all tokens have it so."""
    users: list[Op] = [op for op in arm.walk() if mask in op.operands]
    if not users:
        return
    scalar = ops.Constant(value=(known,), result_types=[TensorType(DType.BOOL)])
    whole = ops.Broadcast(scalar.y, shape=mask.shape)
    arm.ops[:0] = [scalar, whole]
    scalar.parent = whole.parent = arm
    for op in users:
        op.set_operands([whole.y if v is mask else v for v in op.operands])
