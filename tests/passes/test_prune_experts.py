"""prune-experts: FileCheck, what it refuses and says, and what it computes."""

from __future__ import annotations

import pytest
import torch

from liquidc.errors import InputError
from liquidc.ir import parse_module
from liquidc.ir.interpreter import Interpreter
from liquidc.ir.rewriter import Statistics
from liquidc.passes.base import PassContext
from liquidc.passes.prune_experts import PruneExperts
from liquidc.passplan import plan_passes
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass
from tests.passes.routed import GROUPED, INPUTS, LOGITS, MAPPED, Tensors, layer, profiled

LOAD = (100, 40, 0, 10)
SCORES = (0.5, 0.25, 0.0, 0.125)
CONTEXT = profiled(LOAD, SCORES)
STEP = PruneExperts()


def test_the_expert_that_contributes_least_goes_with_its_row_of_the_router() -> None:
    assert_idempotent(STEP, layer(), CONTEXT)
    run_pass(STEP, layer(), CONTEXT).check("""
        CHECK-DAG: weight @r.kept : f32[3, 8] = take(tensor("r", f32[4, 8]), 0, [0, 1, 3])
        CHECK-DAG: weight @gu.kept : f32[3, 12, 8] = take(tensor("gu", {{.*}}), 0, [0, 1, 3])
        CHECK-DAG: weight @d.kept : f32[3, 8, 6] = take(tensor("d", {{.*}}), 0, [0, 1, 3])
        CHECK: [[R:%\\w+]] = weight weight="r.kept"
        CHECK-NEXT: %l = linear %x, [[R]] : f32[B, T, 3]
        CHECK-NEXT: %i, %s = route %l, %m, k=2
        CHECK-NEXT: [[GU:%\\w+]] = weight weight="gu.kept"
        CHECK-NEXT: [[D:%\\w+]] = weight weight="d.kept"
        CHECK-NEXT: %y = grouped_experts %x, %i, %s, [[GU]], [[D]]
    """)


def test_biases_of_every_kind_are_cut() -> None:
    logits = """%l0 = linear %x, %r, bias=%rb : f32[B, T, 4]
  %l1 = reshape %l0, shape=["B*T", 4] : f32[B*T, 4]
  %l2 = add %b, %l1 : f32[B*T, 4]
  %l = reshape %l2, shape=["B", "T", 4] : f32[B, T, 4]"""
    text = layer(logits=logits, route="selection_bias=%e, k=2", holder=MAPPED)
    run_pass(STEP, text, CONTEXT).check("""
        CHECK: [[R:%\\w+]] = weight weight="r.kept"
        CHECK: [[B:%\\w+]] = weight weight="rb.kept"
        CHECK: %l0 = linear %x, [[R]], bias=[[B]] : f32[B, T, 3]
        CHECK-NEXT: %l1 = reshape %l0, shape=["B*T", 3] : f32[B*T, 3]
        CHECK: [[A:%\\w+]] = weight weight="b.kept" : f32[3]
        CHECK: %l2 = add [[A]], %l1 : f32[B*T, 3]
        CHECK-NEXT: %l = reshape %l2, shape=["B", "T", 3] : f32[B, T, 3]
        CHECK: [[E:%\\w+]] = weight weight="e.kept" : f32[3]
        CHECK: route %l, %m, selection_bias=[[E]], k=2
        CHECK: [[D:%\\w+]] = weight weight="d.kept" : f32[3, 8, 6]
        CHECK: map_experts %x, %i, %s, {{\\[}}[[D]]{{\\]}}
    """)


def test_keep_says_how_many_stay_and_what_was_removed_is_said() -> None:
    rewritten = run_pass(PruneExperts(keep=2, least=11), layer(), CONTEXT)
    assert rewritten.statistics.facts["prune-experts"] == {
        "layers": [
            {
                "layer": 0,
                "kept": [0, 1],
                "removed": [
                    {"expert": 2, "score": 0.0, "tokens": 0},
                    {"expert": 3, "score": 0.125, "tokens": 10},
                ],
                "starved": [2, 3],
            }
        ]
    }


def test_every_group_keeps_as_many() -> None:
    text = layer(route="k=2, n_group=2, topk_group=2")
    rewritten = run_pass(PruneExperts(keep=2), text, profiled((9, 9, 9, 9), (1.0, 2.0, 0.2, 0.1)))
    (said,) = rewritten.statistics.facts["prune-experts"]["layers"]
    assert said["kept"] == [1, 2]


def test_an_expert_without_tokens_goes_before_one_that_adds_nothing() -> None:
    rewritten = run_pass(STEP, layer(), profiled((9, 9, 9, 0), (1.0, 0.0, 1.0, 0.0)))
    (said,) = rewritten.statistics.facts["prune-experts"]["layers"]
    assert [removed["expert"] for removed in said["removed"]] == [3]


COMPUTED = "%n = neg %gu : f32[4, 12, 8]\n  " + GROUPED.replace("%gu", "%n")
UNUSED = "%u = expert_mask %i, expert=0 : bool[B, T]\n  " + GROUPED
MASKED = (
    UNUSED.replace("%y", "%z")
    + """
  %v = reshape %u, shape=["B", "T", 1] : bool[B, T, 1]
  %y = where %v, %z, %x : f32[B, T, 8]"""
)


@pytest.mark.parametrize(
    ("text", "context", "keep", "reason"),
    [
        (layer(), profiled((1, 1, 1), (1.0, 1.0, 1.0)), 0, "is of 3 experts, not 4"),
        (layer(route="k=2"), CONTEXT, 4, "no experts to spare"),
        (layer(route="k=2, n_group=2, topk_group=2"), CONTEXT, 3, "3 experts don't fill 2 groups"),
        (layer(route="k=2, n_group=2"), CONTEXT, 0, "no experts to spare"),
        (layer(holder=MASKED), CONTEXT, 0, "not in one op: run group-experts"),
        (layer(holder=COMPUTED), CONTEXT, 0, "or of the experts is computed"),
        (
            layer(logits="%l = slice %x, dim=2, start=0, stop=4 : f32[B, T, 4]"),
            CONTEXT,
            0,
            "come from no linear",
        ),
        (layer(logits=f"{LOGITS}\n  %n = neg %l : f32[B, T, 4]"), CONTEXT, 0, "used elsewhere"),
        (
            layer(holder="%q = neg %s : f32[B, T, 2]\n  " + GROUPED.replace("%s", "%q")),
            CONTEXT,
            0,
            "weights are not the router's",
        ),
    ],
)
def test_a_layer_that_is_not_understood_keeps_its_experts(
    text: str, context: PassContext, keep: int, reason: str
) -> None:
    rewritten = assert_unchanged(PruneExperts(keep=keep), text, context)
    assert reason in rewritten.refused("prune-experts")
    (said,) = rewritten.statistics.facts["prune-experts"]["layers"]
    assert reason in said["reason"]


@pytest.mark.parametrize(
    ("context", "keep", "message"),
    [
        (PassContext(), 0, "needs a profile"),
        (profiled(LOAD), 0, "profile the model directory, not an engine"),
        (profiled(LOAD, SCORES, layers=2), 0, "has 2 layers with experts, @f has 1"),
        (CONTEXT, 1, "keep=1 leaves a token of layer 0 less than the 2 experts"),
    ],
)
def test_what_can_not_be_meant_is_an_error(context: PassContext, keep: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PruneExperts(keep=keep).run(parse_module(layer()), Statistics(), context)


def test_what_other_passes_left_unused_does_not_matter() -> None:
    assert run_pass(STEP, layer(holder=UNUSED), CONTEXT).statistics.fired["prune-experts"] == 1


@pytest.mark.parametrize("options", ["keep=-1", "ratio=0", "ratio=1"])
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(InputError, match="prune-experts: keep is a number of experts"):
        plan_passes([f"prune-experts{{{options}}}"], ())


@pytest.mark.parametrize("holder", [GROUPED, MAPPED])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_an_expert_that_no_token_chooses_is_not_missed(holder: str, score: str) -> None:
    text = layer(route=f'selection_bias=%e, k=2, score="{score}"', holder=holder)
    source = Tensors()
    source.tensors["e"] = torch.tensor([0.0, -100.0, 0.0, 0.0])
    before = parse_module(text)
    old = Interpreter(before, source, exact=True).run("f", INPUTS)
    load = [int((old["experts"] == e).sum()) for e in range(4)]
    assert load[1] == 0
    assert min(load[0], load[2], load[3]) > 0
    after = run_pass(STEP, text, profiled(load, [1.0] * 4)).module
    new = Interpreter(after, source, exact=True).run("f", INPUTS)
    torch.testing.assert_close(new["y"], old["y"], rtol=1e-12, atol=1e-12)
    numbers = torch.tensor([0, 2, 3, -1])
    assert torch.equal(numbers[new["experts"]], old["experts"])
