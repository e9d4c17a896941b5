"""order-experts: FileCheck, what it refuses and says, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from liquidc.errors import InputError
from liquidc.ir import parse_module
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import PassContext
from liquidc.passes.order_experts import OrderExperts, groups_per_token
from liquidc.passplan import plan_passes
from liquidc.profile import ExpertProfile
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass
from tests.passes.routed import GROUPED, INPUTS, LOGITS, MAPPED, Tensors, layer, profiled

LOAD = (30, 20, 30, 20)
CONTEXT = profiled(LOAD, pairs={(0, 2): 28, (1, 3): 18, (0, 1): 2, (2, 3): 2})
STEP = OrderExperts()


def test_experts_that_are_used_together_lie_together_and_keep_their_numbers() -> None:
    assert_idempotent(STEP, layer(), CONTEXT)
    run_pass(STEP, layer(), CONTEXT).check("""
        CHECK-DAG: weight @r.ordered : f32[4, 8] = take(tensor("r", {{.*}}), 0, [0, 2, 1, 3])
        CHECK-DAG: weight @gu.ordered : f32[4, 12, 8] = take(tensor("gu", {{.*}}), 0, [0, 2, 1, 3])
        CHECK-DAG: weight @d.ordered : f32[4, 8, 6] = take(tensor("d", {{.*}}), 0, [0, 2, 1, 3])
        CHECK: [[R:%\\w+]] = weight weight="r.ordered"
        CHECK-NEXT: %l = linear %x, [[R]] : f32[B, T, 4]
        CHECK-NEXT: %i, %s = route %l, %m, k=2
        CHECK-NEXT: [[J:%\\w+]] = renumber %i, table=[0, 2, 1, 3] : i64[B, T, 2]
        CHECK-NEXT: [[GU:%\\w+]] = weight weight="gu.ordered"
        CHECK-NEXT: [[D:%\\w+]] = weight weight="d.ordered"
        CHECK-NEXT: %y = grouped_experts %x, %i, %s, [[GU]], [[D]]
        CHECK-NEXT: return %y, [[J]]
    """)


def test_what_moves_the_numbers_on_their_way_is_there_for_both() -> None:
    moved = """%q = reshape %i, shape=["B", "T", 2] : i64[B, T, 2]
  %n = constant value=[-1] : i64[]
  %g = reshape %m, shape=["B", "T", 1] : bool[B, T, 1]
  %j = where %g, %q, %n : i64[B, T, 2]
  """
    text = layer(holder=moved + GROUPED.replace("%i", "%j")).replace(
        "return %y, %i", "return %y, %j"
    )
    run_pass(STEP, text, CONTEXT).check("""
        CHECK: %i, %s = route
        CHECK-NEXT: [[O:%\\w+]] = renumber %i
        CHECK-DAG: [[R:%\\w+]] = reshape %i, shape=["B", "T", 2]
        CHECK-DAG: [[P:%\\w+]] = reshape [[O]], shape=["B", "T", 2]
        CHECK-DAG: [[J:%\\w+]] = where %g, [[R]], %n
        CHECK-DAG: [[K:%\\w+]] = where %g, [[P]], %n
        CHECK: grouped_experts %x, [[J]], %s
        CHECK: return %y, [[K]]
    """)


def test_biases_of_every_kind_are_ordered() -> None:
    logits = """%l0 = linear %x, %r, bias=%rb : f32[B, T, 4]
  %l = add %l0, %b : f32[B, T, 4]"""
    text = layer(logits=logits, route="selection_bias=%e, k=2", holder=MAPPED)
    run_pass(STEP, text, CONTEXT).check("""
        CHECK: [[R:%\\w+]] = weight weight="r.ordered"
        CHECK: [[B:%\\w+]] = weight weight="rb.ordered"
        CHECK: linear %x, [[R]], bias=[[B]] : f32[B, T, 4]
        CHECK: [[A:%\\w+]] = weight weight="b.ordered"
        CHECK: %l = add %l0, [[A]] : f32[B, T, 4]
        CHECK: [[E:%\\w+]] = weight weight="e.ordered"
        CHECK: route %l, %m, selection_bias=[[E]], k=2
        CHECK: [[D:%\\w+]] = weight weight="d.ordered"
        CHECK: map_experts %x, %i, %s, {{\\[}}[[D]]{{\\]}}
    """)


def test_what_is_said() -> None:
    (said,) = run_pass(STEP, layer(), CONTEXT).statistics.facts["order-experts"]["layers"]
    assert said == {
        "layer": 0,
        "order": [0, 2, 1, 3],
        "group_size": 2,
        "cut": {"before": 46, "after": 4},
        "groups_per_token": {"before": pytest.approx(1.92), "after": pytest.approx(1.08)},
    }


def test_a_router_with_groups_keeps_them() -> None:
    text = layer(route="k=2, n_group=2, topk_group=2")
    for four, eight in (("[4", "[8"), ("T, 4]", "T, 8]")):
        text = text.replace(four, eight)
    pairs = {(0, 4): 50, (1, 5): 40, (0, 3): 30, (1, 2): 20, (4, 7): 10, (5, 6): 10}
    context = profiled((80, 60, 20, 30, 60, 50, 10, 10), pairs=pairs)
    (said,) = run_pass(STEP, text, context).statistics.facts["order-experts"]["layers"]
    assert said["order"] == [0, 3, 1, 2, 4, 7, 5, 6]
    run_pass(STEP, text, context).check("CHECK: route %l, %m, k=2, n_group=2, topk_group=2")


def test_groups_of_a_token_are_counted_exactly_for_two_experts_and_bounded_for_more() -> None:
    numbers = torch.Generator().manual_seed(0)
    for k in (1, 2, 3):
        chosen = torch.stack(
            [torch.randperm(8, generator=numbers)[:k].sort().values for _ in range(200)]
        )
        used = torch.nn.functional.one_hot(chosen, 8).sum(1)
        together = used.T @ used
        load = tuple(together.diagonal().tolist())
        together.fill_diagonal_(0)
        profile = ExpertProfile(0, k, 200, load, tuple(map(tuple, together.tolist())))
        parts = [[0, 3, 4, 6], [1, 2, 5, 7]]
        touched = sum(float((used[:, part].sum(1) > 0).double().mean()) for part in parts)
        bound = groups_per_token(profile, parts)
        assert bound == pytest.approx(touched) if k < 3 else 0.9 * touched < bound <= touched


OWN = '%k = constant value=[1] : i64[]\n  %g = reshape %m, shape=["B", "T", 1] : bool[B, T, 1]\n'
OWN += "  %j = where %g, %i, %k : i64[B, T, 2]\n  " + GROUPED.replace("%i", "%j")


@pytest.mark.parametrize(
    ("text", "context", "groups", "reason"),
    [
        (layer(), profiled((1, 1, 1)), 2, "is of 3 experts, not 4"),
        (layer(), CONTEXT, 3, "4 experts don't make 3 equal groups"),
        (layer(), CONTEXT, 4, "4 groups of 4 experts have one each"),
        (layer(), profiled(LOAD), 2, "no order is better than the one that it has"),
        (layer(logits=f"{LOGITS}\n  %n = neg %l : f32[B, T, 4]"), CONTEXT, 2, "used elsewhere"),
        (layer(holder=OWN), CONTEXT, 2, "it uses experts that no router chose"),
    ],
)
def test_a_layer_that_stays(text: str, context: PassContext, groups: int, reason: str) -> None:
    rewritten = assert_unchanged(OrderExperts(groups=groups), text, context)
    assert reason in rewritten.refused("order-experts")
    (said,) = rewritten.statistics.facts["order-experts"]["layers"]
    assert reason in said["reason"]


@pytest.mark.parametrize(
    ("context", "message"),
    [(PassContext(), "needs a profile"), (profiled(LOAD, layers=2), "has 2 layers with experts")],
)
def test_a_profile_that_does_not_fit(context: PassContext, message: str) -> None:
    with pytest.raises(InputError, match=message):
        STEP.run(parse_module(layer()), Statistics(), context)


def test_one_group_is_no_order() -> None:
    with pytest.raises(InputError, match="order-experts: groups is 2 or more"):
        plan_passes(["order-experts{groups=1}"], ())


@pytest.mark.parametrize("holder", [GROUPED, MAPPED])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_same_is_computed_and_the_same_experts_reported(holder: str, score: str) -> None:
    text = layer(route=f'selection_bias=%e, k=2, score="{score}"', holder=holder)
    after = run_pass(STEP, text, CONTEXT)
    assert after.statistics.fired == {"order-experts": 1}
    source = Tensors()
    source.tensors["e"] *= 0.1
    old = Interpreter(parse_module(text), source, exact=True).run("f", INPUTS)
    new = Interpreter(after.module, source, exact=True).run("f", INPUTS)
    torch.testing.assert_close(new["y"], old["y"], rtol=1e-12, atol=1e-12)
    assert torch.equal(new["experts"], old["experts"])
    assert {-1, 0, 1, 2, 3} == set(old["experts"].unique().tolist())


def test_of_two_experts_that_tie_another_may_win() -> None:
    source = Tensors()
    source.tensors["r"][:] = source.tensors["r"][0]
    module = run_pass(STEP, layer(), CONTEXT).module
    old = Interpreter(parse_module(layer()), source).run("f", INPUTS)["experts"]
    new = Interpreter(module, source).run("f", INPUTS)["experts"]
    assert old[0, 0].tolist() == [0, 1]
    assert new[0, 0].tolist() == [0, 2]
