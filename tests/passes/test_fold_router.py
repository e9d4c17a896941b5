"""fold-router: FileCheck, what it refuses, and what it computes."""

from __future__ import annotations

import pytest
import torch

from liquidc.ir import parse_module
from liquidc.ir.interpreter import Interpreter
from liquidc.passes import fold_router
from liquidc.passes.fold_router import FoldRouter
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

STEP = FoldRouter()
SHAPES = {
    "dec": "[8, 3]",
    "head": "[1, 8]",
    "two": "[2, 8]",
    "twob": "[2]",
    "one": "[1]",
    "db": "[8]",
    "far": "[4, 8]",
    "thin": "[4, 1]",
}
WEIGHTS = "".join(f'weight @r.{n} : f32{s} = tensor("{n}", f32{s})\n' for n, s in SHAPES.items())
READ = "".join(f'\n  %{n} = weight weight="r.{n}" : f32{s}' for n, s in SHAPES.items())
CHAIN = """%h = linear %e, %dec : f32[B, T, 8]
  %z = linear %h, %head : f32[B, T, 1]"""
SCORE = '%s = reshape %z, shape=["B", "T"] : f32[B, T]'
TWO = "%z = linear %x, %two : f32[B, T, 2]"


def slices(of: str = "%z", first: int = 1) -> str:
    """The two logits of a router, and their difference."""
    second = 1 - first
    return f"""%a = slice {of}, dim=2, start={first}, stop={first + 1} : f32[B, T, 1]
  %u = reshape %a, shape=["B", "T"] : f32[B, T]
  %b = slice {of}, dim=2, start={second}, stop={second + 1} : f32[B, T, 1]
  %v = reshape %b, shape=["B", "T"] : f32[B, T]
  %s = sub %u, %v : f32[B, T]"""


def gate(body: str, *, score: str = "%s") -> str:
    """A depth gate on the score %s that `body` computes from %x [B, T, 8] or %e [B, T, 3]."""
    return f"""
module @m
{WEIGHTS}
func @f(%x: f32[B, T, 8], %e: f32[B, T, 3], %valid: bool[B, T], %positions: i64[B, T],
        %force: i8[], %bias: f32[B], %min_depth: i64[B], %executed: i64[B, T])
        -> (m: bool[B, T], p: f32[B, T]) {{{READ}
  {body}
  %m, %p = depth_gate {score}, %valid, %positions, %force, %bias, %min_depth, %executed, layer=0,
      gate=0, remaining=1, threshold=0.5 : bool[B, T], f32[B, T]
  return %m, %p
}}
"""


def test_two_projections_without_anything_between_become_one() -> None:
    text = gate(f"{CHAIN}\n  {SCORE}")
    assert_idempotent(STEP, text)
    run_pass(STEP, text).check("""
        CHECK: weight @r.head.and.r : f32[1, 3] =
        CHECK-SAME: product(tensor("head", f32[1, 8]), tensor("dec", f32[8, 3]))
        CHECK: [[W:%\\w+]] = weight weight="r.head.and.r"
        CHECK-NEXT: %z = linear %e, [[W]] : f32[B, T, 1]
        CHECK-NEXT: %s = reshape %z
        CHECK-NOT: linear
    """)


def test_an_outer_bias_stays() -> None:
    text = gate(CHAIN.replace("%head", "%head, bias=%one") + f"\n  {SCORE}")
    run_pass(STEP, text).check("""
        CHECK: [[W:%\\w+]] = weight weight="r.head.and.r"
        CHECK-NEXT: linear %e, [[W]], bias=%one : f32[B, T, 1]
    """)


@pytest.mark.parametrize("first", [0, 1])
def test_the_difference_of_two_logits_becomes_one(first: int) -> None:
    text = gate(f"%z = linear %x, %two, bias=%twob : f32[B, T, 2]\n  {slices(first=first)}")
    assert_idempotent(STEP, text)
    rows = [
        f"{{{{.*}}}}, 0, {first}, {first + 1})",
        f"{{{{.*}}}}, 0, {1 - first}, {2 - first})], [1.0, -1.0])",
    ]
    run_pass(STEP, text).check(f"""
        CHECK: weight @r.two.difference : f32[1, 8] = mix([slice(tensor("two"{rows[0]}
        CHECK-SAME: slice(tensor("two"{rows[1]}
        CHECK: weight @r.twob.difference : f32[1] = mix([slice(tensor("twob"{rows[0]}
        CHECK-SAME: slice(tensor("twob"{rows[1]}
        CHECK: [[W:%\\w+]] = weight weight="r.two.difference"
        CHECK: [[B:%\\w+]] = weight weight="r.twob.difference"
        CHECK: [[Z:%\\w+]] = linear %x, [[W]], bias=[[B]] : f32[B, T, 1]
        CHECK-NEXT: %s = reshape [[Z]], shape=["B", "T"]
        CHECK-NEXT: depth_gate %s
    """)


def test_a_chain_that_ends_in_two_logits_becomes_one_logit() -> None:
    chain = CHAIN.replace("%head", "%two").replace("T, 1]", "T, 2]")
    rewritten = run_pass(STEP, gate(f"{chain}\n  {slices()}"))
    assert rewritten.statistics.fired == {"fold-linear-chain": 1, "fold-two-logits": 1}
    rewritten.check("""
        CHECK: [[W:%\\w+]] = weight weight="r.two.and.r.difference" : f32[1, 3]
        CHECK-NEXT: linear %e, [[W]] : f32[B, T, 1]
    """)


def experts(first: str, second: str, width: int) -> str:
    """The router of four experts whose logits two projections make of %e [B, T, 3]."""
    return f"""
module @m
{WEIGHTS}
func @f(%e: f32[B, T, 3], %x: f32[B, T, 8], %valid: bool[B, T]) -> (i: i64[B, T, 1]) {{{READ}
  %h = linear {first} : f32[B, T, {width}]
  %z = linear %h, {second} : f32[B, T, 4]
  %i, %w = route %z, %valid, k=1 : i64[B, T, 1], f32[B, T, 1]
  return %i
}}
"""


def test_routers_of_experts_are_folded_too() -> None:
    run_pass(STEP, experts("%e, %dec", "%far", 8)).check("""
        CHECK: linear %e, {{%\\w+}} : f32[B, T, 4]
        CHECK-NEXT: route
    """)


MODEL_TYPE = gate(f"""%d = cast %e, to=bf16 : bf16[B, T, 3]
  %h = linear %d, %dec : bf16[B, T, 8]
  %o = linear %h, %head : bf16[B, T, 1]
  %z = cast %o, to=f32 : f32[B, T, 1]
  {SCORE}""")
for shape in ("8, 3", "1, 8"):
    MODEL_TYPE = MODEL_TYPE.replace(f"f32[{shape}]", f"bf16[{shape}]")
USED = gate(f"""{CHAIN}
  %t = reshape %z, shape=["B", "T"] : f32[B, T]
  %o = max %h, dims=[2] : f32[B, T]
  %s = maximum %t, %o : f32[B, T]""")
COMPUTED = gate(f"%n = neg %dec : f32[8, 3]\n  {CHAIN}\n  {SCORE}".replace("e, %dec", "e, %n"))
ELSEWHERE = gate(f"{CHAIN}\n  {SCORE}\n  %o = max %x, dims=[2] : f32[B, T]", score="%o")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (gate(f"{CHAIN.replace('%dec', '%dec, bias=%db')}\n  {SCORE}"), "before it has a bias"),
        (gate(f"%z = linear %x, %head : f32[B, T, 1]\n  {SCORE}"), "projects is no projection"),
        (experts("%x, %head", "%thin", 1), "takes as many weights as two"),
        (COMPUTED, "a factor is no weight"),
        (USED, "used elsewhere"),
        (ELSEWHERE, "belongs to no router"),
        (MODEL_TYPE, "computes in the model's type"),
    ],
)
def test_a_chain_that_stays(text: str, reason: str) -> None:
    assert reason in assert_unchanged(STEP, text).refused("fold-linear-chain")


def test_a_product_that_takes_too_long_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_router, "LARGEST", 1 * 8 * 3 - 1)
    unchanged = assert_unchanged(STEP, gate(f"{CHAIN}\n  {SCORE}"))
    assert "too large" in unchanged.refused("fold-linear-chain")


SAME = slices().replace("start=0, stop=1", "start=1, stop=2")
SHARED = f"{slices()}\n  %o = max %z, dims=[2] : f32[B, T]".replace("%s = sub", "%w = sub")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{TWO}\n  {SAME}", "not the two logits of one projection"),
        (
            f"{TWO}\n  %y = linear %x, %far : f32[B, T, 4]\n  {slices()}".replace(
                "%b = slice %z", "%b = slice %y"
            ),
            "not the two logits of one projection",
        ),
        (f"%z = linear %x, %far : f32[B, T, 4]\n  {slices()}", "not the two logits"),
        (f"{TWO}\n  {SHARED}\n  %s = maximum %w, %o : f32[B, T]", "the logits are used elsewhere"),
        (f"{TWO}\n  {slices()}".replace("linear %x, %two", "neg %x2"), "come from no projection"),
        (f"{TWO}\n  {slices()}".replace("%u, %v", "%u, %u"), "not the two logits"),
        (
            f"{TWO}\n  {slices()}".replace("%s = sub", "%w = sub")
            + "\n  %s = maximum %w, %u : f32[B, T]",
            "the logits are used elsewhere",
        ),
    ],
)
def test_logits_that_stay_two(body: str, reason: str) -> None:
    body = f"%x2 = slice %x, dim=2, start=0, stop=2 : f32[B, T, 2]\n  {body}"
    assert reason in assert_unchanged(STEP, gate(body)).refused("fold-two-logits")


class Tensors:
    """Random tensors by name."""

    def __init__(self) -> None:
        numbers = torch.Generator().manual_seed(0)
        sizes = {name: [int(n) for n in s.strip("[]").split(",")] for name, s in SHAPES.items()}
        self.tensors = {n: torch.randn(size, generator=numbers) for n, size in sizes.items()}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop]


def inputs() -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(1)
    x, e = (torch.randn(2, 5, width, generator=numbers) for width in (8, 3))
    zero = torch.zeros(2, dtype=torch.int64)
    return {
        "x": x,
        "e": e,
        "valid": torch.ones(2, 5, dtype=torch.bool),
        "positions": torch.arange(5).expand(2, 5),
        "force": torch.tensor(0, dtype=torch.int8),
        "bias": torch.zeros(2),
        "min_depth": zero,
        "executed": zero[:, None].expand(2, 5),
    }


CHAIN_OF_TWO = CHAIN.replace("%head", "%two, bias=%twob").replace("T, 1]", "T, 2]")


@pytest.mark.parametrize("body", [f"{CHAIN}\n  {SCORE}", f"{CHAIN_OF_TWO}\n  {slices()}"])
def test_a_score_moves_by_rounding_alone(body: str) -> None:
    text = gate(body)
    before, after = parse_module(text), run_pass(STEP, text).module
    old = Interpreter(before, Tensors(), exact=True).run("f", inputs())
    new = Interpreter(after, Tensors(), exact=True).run("f", inputs())
    torch.testing.assert_close(new["p"], old["p"], rtol=1e-14, atol=1e-14)
    single = Interpreter(after, Tensors()).run("f", inputs())
    torch.testing.assert_close(single["p"], old["p"].float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(single["m"], old["m"])
    assert 0 < int(old["m"].sum()) < old["m"].numel()


def test_two_equal_logits_stay_a_tie() -> None:
    source = Tensors()
    source.tensors["two"][1] = source.tensors["two"][0]
    module = run_pass(STEP, gate(f"{TWO}\n  {slices()}")).module
    assert torch.all(Interpreter(module, source).run("f", inputs())["p"] == 0.5)
