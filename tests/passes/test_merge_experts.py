"""merge-experts: FileCheck, what it refuses and says, and what it computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from liquidc.errors import InputError, IRError
from liquidc.ir import parse_module, verify
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import PassContext
from liquidc.passes.merge_experts import MergeExperts
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass
from tests.passes.routed import GROUPED, INPUTS, MAPPED, Tensors, layer, profiled

LOAD = (100, 10, 20, 60)
STEP = MergeExperts(keep=2)


def context(source: Tensors, load: tuple[int, ...] = LOAD) -> PassContext:
    return replace(profiled(load), source=source)


def alike() -> Tensors:
    """The rows of the router of experts 0 and 2, and of 1 and 3, point in similar directions."""
    source = Tensors()
    rows = source.tensors["r"]
    rows[2], rows[1] = 3 * rows[0] + 0.01 * rows[2], rows[3] + 0.01 * rows[1]
    return source


def permuted(source: Tensors, expert: int, of: int) -> None:
    """Make an expert the same as another one, its neurons in another order."""
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    gate_up, down = source.tensors["gu"], source.tensors["d"]
    gate_up[expert] = gate_up[of][torch.cat([order, order + 6])]
    down[expert] = down[of][:, order]


def test_others_join_the_dominant_expert_with_the_most_similar_row() -> None:
    source = alike()
    assert_idempotent(STEP, layer(), context(source))
    rewritten = run_pass(STEP, layer(), context(source))
    rewritten.check("""
        CHECK: weight @gu.merged : f32[2, 12, 8] = 
        CHECK-SAME: concat([mix([slice(tensor("gu", f32[4, 12, 8]), 0, 0, 1),
        CHECK-SAME: take(slice(tensor("gu", f32[4, 12, 8]), 0, 2, 3), 1, [{{[0-9, ]+}}])],
        CHECK-SAME: [0.8333333333333334, 0.16666666666666666]), mix([
        CHECK: weight @d.merged : f32[2, 8, 6] = 
        CHECK-SAME: concat([mix([slice(tensor("d", f32[4, 8, 6]), 0, 0, 1),
        CHECK-SAME: take(slice(tensor("d", f32[4, 8, 6]), 0, 2, 3), 2, [{{[0-9, ]+}}])]
        CHECK: %i, %s = route %l, %m, k=2
        CHECK-NEXT: [[J:%\\w+]] = renumber %i, table=[0, 1, 0, 1]
        CHECK-NEXT: [[GU:%\\w+]] = weight weight="gu.merged"
        CHECK-NEXT: [[D:%\\w+]] = weight weight="d.merged"
        CHECK-NEXT: %y = grouped_experts %x, [[J]], %s, [[GU]], [[D]]
        CHECK-NEXT: return %y, %i
    """)
    assert rewritten.statistics.facts["merge-experts"] == {
        "layers": [{"layer": 0, "groups": [[0, 2], [3, 1]], "starved": [1, 2]}]
    }


def test_merging_the_same_expert_with_its_neurons_in_another_order_changes_nothing() -> None:
    source = alike()
    permuted(source, 2, of=0)
    permuted(source, 1, of=3)
    old = Interpreter(parse_module(layer()), source, exact=True).run("f", INPUTS)
    after = run_pass(STEP, layer(), context(source)).module
    new = Interpreter(after, source, exact=True).run("f", INPUTS)
    # Merged weights are rounded to float32 once; weights and inputs are of size 1.
    torch.testing.assert_close(new["y"], old["y"], rtol=1e-5, atol=1e-5)
    assert torch.equal(new["experts"], old["experts"])
    torch.testing.assert_close(
        Interpreter(after, source).weight("gu.merged"), source.tensors["gu"][[0, 3]]
    )


def test_merged_weights_are_the_mean_by_tokens_in_the_order_of_the_dominant_expert() -> None:
    source = alike()
    permuted(source, 2, of=0)
    source.tensors["d"][2] += 1.0
    after = run_pass(STEP, layer(), context(source)).module
    down = Interpreter(after, source, exact=True).weight("d.merged")[0]
    expected = source.tensors["d"][0] + 20 / 120
    torch.testing.assert_close(down, expected.double(), rtol=1e-6, atol=1e-6)


def test_a_token_may_use_a_merged_expert_twice() -> None:
    source = alike()
    for name in ("gu", "d"):
        source.tensors[name][:] = source.tensors[name][:1].clone()
    old = Interpreter(parse_module(layer()), source, exact=True).run("f", INPUTS)
    after = run_pass(MergeExperts(keep=1), layer(), context(source)).module
    new = Interpreter(after, source, exact=True).run("f", INPUTS)
    torch.testing.assert_close(new["y"], old["y"], rtol=1e-5, atol=1e-5)


def test_an_expert_without_tokens_adds_nothing() -> None:
    rewritten = run_pass(STEP, layer(), context(alike(), (100, 10, 0, 60)))
    (said,) = rewritten.statistics.facts["merge-experts"]["layers"]
    assert said["groups"] == [[0, 2], [3, 1]]
    rewritten.check("""
        CHECK: weight @gu.merged : f32[2, 12, 8] = 
        CHECK-SAME: concat([slice(tensor("gu", f32[4, 12, 8]), 0, 0, 1), mix([
    """)


def test_numbers_that_become_one_can_not_weigh_what_experts_read() -> None:
    """f(x s) + f(x t) is not f(x (s + t)): the shares of one expert add up behind it only."""
    for table, apply in (
        ((0, 0, 1, 1), "output"),
        ((1, 0, 3, 2), "input"),
        ((0, 0, 1, 1), "input"),
    ):
        holder = (
            f"%r2 = renumber %i, table={list(table)} : i64[B, T, 2]\n"
            f'  %y = grouped_experts %x, %r2, %s, %gu, %d, apply="{apply}" : f32[B, T, 8]'
        )
        if apply == "output" or len(set(table)) == 4:
            verify(parse_module(layer(holder=holder)))
            continue
        with pytest.raises(IRError, match="no two numbers may become one"):
            verify(parse_module(layer(holder=holder)))


@pytest.mark.parametrize(
    ("text", "keep", "reason"),
    [
        (layer(holder=MAPPED), 2, "not grouped: run group-experts"),
        (layer(), 4, "no experts to spare"),
        (
            layer(holder=GROUPED.replace("%gu, %d", '%gu, %d, apply="input"')),
            2,
            "its shares multiply what experts read",
        ),
        (
            layer(
                holder="%r2 = renumber %i, table=[3, 2, 1, 0] : i64[B, T, 2]\n  "
                "%y = grouped_experts %x, %r2, %s, %gu, %d : f32[B, T, 8]"
            ),
            2,
            "numbers already",
        ),
    ],
)
def test_a_layer_that_is_not_understood_keeps_its_experts(
    text: str, keep: int, reason: str
) -> None:
    rewritten = assert_unchanged(MergeExperts(keep=keep), text, context(alike()))
    assert reason in rewritten.refused("merge-experts")


@pytest.mark.parametrize(
    ("given", "message"),
    [(PassContext(), "needs a profile"), (profiled(LOAD), "needs the model's weights")],
)
def test_without_a_profile_or_weights_it_is_refused(given: PassContext, message: str) -> None:
    with pytest.raises(InputError, match=message):
        STEP.run(parse_module(layer()), Statistics(), given)
