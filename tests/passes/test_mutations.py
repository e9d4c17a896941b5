"""Bugs put into the passes, one at a time: the property tests notice each, on the same modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from liquidc.errors import IRError
from liquidc.ir import Block, Module, Op, Value, ops
from liquidc.ir import weights as lazy
from liquidc.ir.rewriter import Rewriter, Statistics
from liquidc.ir.weight_maths import Product, Take
from liquidc.passes import (
    choose_lowering,
    eliminate_common,
    eliminate_dead,
    fold_constants,
    fold_identity_experts,
    fold_router,
    fuse_linear,
    fuse_shared_experts,
    gate_arms,
    group_experts,
    hoist_common,
    order_experts,
    routed_experts,
    specialize_decode,
    speculate,
    stack_experts,
    stack_results,
    token_rows,
)
from tests.generator.check import STEPS
from tests.generator.test_properties import ALWAYS, check_seeds

Patch = pytest.MonkeyPatch
MUTATIONS: dict[str, Callable[[Patch], None]] = {}


def mutation(step: str) -> Callable[[Callable[[Patch], None]], None]:
    """Registers a bug in the pass `step`."""

    def add(inject: Callable[[Patch], None]) -> None:
        MUTATIONS[f"{step}: {inject.__name__.replace('_', ' ')}"] = inject

    return add


@mutation("fold-constants")
def computes_another_number(patch: Patch) -> None:
    right = fold_constants._compute

    def wrong(op: Op) -> ops.Constant:
        made = right(op)
        if made.y.dtype.is_float:
            made.set_attribute("value", tuple(number + 1.0 for number in made.value))
        return made

    patch.setattr(fold_constants, "_compute", wrong)


@mutation("fold-constants")
def takes_zero_for_one(patch: Patch) -> None:
    right = fold_constants.splat
    patch.setattr(fold_constants, "splat", lambda value: 1 if right(value) == 0.5 else right(value))


@mutation("eliminate-common")
def merges_ops_with_other_attributes(patch: Patch) -> None:
    def wrong(op: Op) -> object:
        return (type(op), tuple(map(id, op.operands)), tuple(v.type for v in op.results))

    patch.setattr(eliminate_common, "signature", wrong)


@mutation("eliminate-common")
def merges_ops_with_operands_in_another_order(patch: Patch) -> None:
    right = eliminate_common.signature

    def wrong(op: Op) -> object:
        return right(op, sorted(op.operands, key=id))

    patch.setattr(eliminate_common, "signature", wrong)


@mutation("eliminate-dead")
def removes_an_op_that_is_used(patch: Patch) -> None:
    right = eliminate_dead.EliminateDead._block

    def wrong(self: Any, block: Block, statistics: Statistics) -> None:
        right(self, block, statistics)
        for op in [op for op in block.ops if isinstance(op, ops.Tanh)]:
            op.y.replace_by(op.x)
            op.detach()

    patch.setattr(eliminate_dead.EliminateDead, "_block", wrong)


@mutation("eliminate-dead")
def keeps_another_result(patch: Patch) -> None:
    right = eliminate_dead.drop_results

    def wrong(op: ops.If, keep: list[int]) -> ops.If:
        for arm in op.regions.values():
            arm.terminator.set_operands(arm.terminator.operands[::-1])
        return right(op, keep)

    patch.setattr(eliminate_dead, "drop_results", wrong)


@mutation("fold-identity-experts")
def forgets_the_last_identity_expert(patch: Patch) -> None:
    right = fold_identity_experts._share
    patch.setattr(fold_identity_experts, "_share", lambda head, last, rw: right(head, last - 1, rw))


@mutation("fold-router")
def takes_the_other_logit(patch: Patch) -> None:
    right = fold_router.FoldTwoLogits._difference

    def wrong(self: Any, name: str, rows: Sequence[Any], rw: Rewriter) -> Value:
        return right(self, name, rows[::-1], rw)

    patch.setattr(fold_router.FoldTwoLogits, "_difference", wrong)


@mutation("fold-router")
def multiplies_the_weights_of_another_input(patch: Patch) -> None:
    def wrong(b: lazy.WeightExpr, a: lazy.WeightExpr) -> lazy.WeightExpr:
        columns = tuple(reversed(range(a.sizes[1])))
        return Product(b, Take(a, 1, columns))

    patch.setattr(fold_router, "Product", wrong)


@mutation("fuse-linear")
def joins_weights_in_another_order(patch: Patch) -> None:
    right = fuse_linear._together

    def wrong(module: Module, rw: Rewriter, used: Sequence[ops.Weight]) -> Value:
        return right(module, rw, used[::-1])

    patch.setattr(fuse_linear, "_together", wrong)


@mutation("fuse-shared-experts")
def takes_the_shared_up_rows_for_the_gate(patch: Patch) -> None:
    right = fuse_shared_experts._pieces
    patch.setattr(fuse_shared_experts, "_pieces", lambda gate, up, width: right(up, gate, width))


@mutation("fuse-shared-experts")
def takes_another_expert_for_the_shared_one(patch: Patch) -> None:
    right = fuse_shared_experts._with_numbers

    def wrong(index: Value, first: int, more: int, rw: Rewriter) -> Value:
        return right(index, first - 1, more, rw)

    patch.setattr(fuse_shared_experts, "_with_numbers", wrong)


@mutation("stack-experts")
def stacks_in_another_order(patch: Patch) -> None:
    right = stack_experts.declare

    def wrong(module: Module, rw: Rewriter, name: str, expr: lazy.WeightExpr) -> Value:
        count = expr.sizes[0]
        turned = lazy.Stack(tuple(lazy.Select(expr, i) for i in reversed(range(count))))
        return right(module, rw, f"{name}.turned", turned)

    patch.setattr(stack_experts, "declare", wrong)


@mutation("group-experts")
def weights_the_other_side(patch: Patch) -> None:
    right = group_experts.GroupSwiglu.rewrite

    def wrong(self: Any, op: ops.MapExperts, rw: Rewriter) -> Sequence[Value]:
        (value,) = right(self, op, rw)
        assert isinstance(value.op, ops.GroupedExperts)
        value.op.set_attribute("apply", "input" if op.apply == "output" else "output")
        return [value]

    patch.setattr(group_experts.GroupSwiglu, "rewrite", wrong)


@mutation("group-experts")
def takes_up_for_gate(patch: Patch) -> None:
    right = group_experts.GroupSwiglu._gate_up

    def wrong(self: Any, gate: Value, up: Value, *rest: Any) -> Value:
        apart = isinstance(gate.op, ops.Linear)
        return right(self, up, gate, *rest) if apart else right(self, gate, up, *rest)

    patch.setattr(group_experts.GroupSwiglu, "_gate_up", wrong)


@mutation("hoist-common")
def hoists_what_depends_on_the_arm(patch: Patch) -> None:
    right = hoist_common.signature
    patch.setattr(hoist_common, "signature", lambda op: right(op, []))


@mutation("order-experts")
def reports_experts_by_other_numbers(patch: Patch) -> None:
    right = order_experts.take_experts

    def wrong(module: Module, found: Any, entries: tuple[int, ...], suffix: str) -> None:
        right(module, found, entries[::-1], suffix)

    patch.setattr(order_experts, "take_experts", wrong)


@mutation("order-experts")
def leaves_the_rows_of_the_router(patch: Patch) -> None:
    right = routed_experts._taken

    def wrong(module: Module, user: Op, value: Value, *rest: Any) -> Value:
        return value if isinstance(user, ops.Linear) else right(module, user, value, *rest)

    patch.setattr(routed_experts, "_taken", wrong)


@mutation("eliminate-dead")
def forgets_how_a_gate_is_lowered(patch: Patch) -> None:
    right = eliminate_dead.drop_results

    def wrong(op: ops.If, keep: list[int]) -> ops.If:
        made = right(op, keep)
        made.set_attribute("lowering", "")
        return made

    patch.setattr(eliminate_dead, "drop_results", wrong)


@mutation("hoist-common")
def forgets_which_region_of_a_gate_it_is(patch: Patch) -> None:
    right = hoist_common.drop_results

    def wrong(op: ops.If, keep: list[int]) -> ops.If:
        made = right(op, keep)
        made.set_attribute("region", 7)
        return made

    patch.setattr(hoist_common, "drop_results", wrong)


@mutation("specialize-decode{batch=1}")
def takes_the_mask_for_the_other(patch: Patch) -> None:
    right = specialize_decode.know_mask

    def wrong(arm: Block, mask: Value, *, known: bool) -> None:
        right(arm, mask, known=not known)

    patch.setattr(specialize_decode, "know_mask", wrong)


@mutation("specialize-decode")
def knows_the_mask_of_several_rows(patch: Patch) -> None:
    right = specialize_decode.SpecializeDecode.apply

    def wrong(self: Any, module: Module, statistics: Statistics, context: Any) -> None:
        right(self, module, statistics, context)
        for op in module.functions["decode"].body.ops:
            if isinstance(op, ops.If) and isinstance(op.cond.op, ops.Any):
                specialize_decode.know_mask(op.then, op.cond.op.x, known=True)

    patch.setattr(specialize_decode.SpecializeDecode, "apply", wrong)


@mutation("fix-depth")
def keeps_the_other_arm(patch: Patch) -> None:
    right = gate_arms.inline_arm

    def wrong(op: ops.If, arm: Block) -> list[Op]:
        return right(op, op.otherwise if arm is op.then else op.then)

    patch.setattr(gate_arms, "inline_arm", wrong)


@mutation("specialize-depth{hot=0}")
def computes_the_path_with_the_other_mask(patch: Patch) -> None:
    right = speculate.know_mask
    patch.setattr(
        speculate, "know_mask", lambda arm, mask, known: right(arm, mask, known=not known)
    )


@mutation("choose-lowering")
def masks_with_the_arm_of_skipped_tokens(patch: Patch) -> None:
    patch.setattr(
        choose_lowering, "inline_arm", lambda op, arm: gate_arms.inline_arm(op, op.otherwise)
    )


@mutation("compact-tokens")
def scatters_to_the_other_tokens(patch: Patch) -> None:
    right = token_rows.ArmRows.side
    patch.setattr(token_rows.ArmRows, "side", lambda self, known: right(self, not known))


@mutation("compact-tokens")
def forgets_what_skipped_tokens_hold(patch: Patch) -> None:
    right = token_rows.Side.simple
    patch.setattr(
        token_rows.Side, "simple", lambda self, value: 0 if self.known else right(self, value)
    )


@mutation("stack-results")
def stacks_in_reverse(patch: Patch) -> None:
    right = stack_results._stack
    patch.setattr(stack_results, "_stack", lambda values, rw: right(values[::-1], rw))


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_property_tests_notice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[name](monkeypatch)
    with pytest.raises((AssertionError, IRError, ValueError)):  # other results, or no valid module
        check_seeds(name.partition(":")[0], range(ALWAYS.stop))


def test_every_pass_has_a_mutation() -> None:
    assert {name.partition(":")[0].partition("{")[0] for name in MUTATIONS} == {
        name.partition("{")[0] for name in STEPS
    }
