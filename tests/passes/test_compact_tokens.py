"""compact-tokens, by FileCheck."""

from __future__ import annotations

import pytest

from liquidc.passes.compact_tokens import CompactTokens
from tests.passes.filecheck import assert_idempotent, assert_unchanged, run_pass

STEP = CompactTokens()
ARGS = (
    "%m: bool[B, T], %v: bool[B, T], %n: i64[B], %pos: i64[B, T], %x: f32[B, T, 4], "
    "%d: f32[4], %row: f32[B, 1, 4], %past: f32[B, 1, S, 4]"
)
ZERO = """
    %k = reshape %m, shape=["B", "T", 1] : bool[B, T, 1]
    %z = constant value=[0.0] : f32[]"""


def arm(
    body: str, result: str = "f32[B, T, 4]", skip: str = "%x", cond: str = "any %m, dims=[0, 1]"
) -> str:
    """A function whose conditional yields %y from `body`, or `skip`."""
    return f"""
module @m
weight @w : f32[4, 4] = tensor("w", f32[4, 4])
func @f({ARGS}) -> (y: {result}) {{
  %w = weight weight="w" : f32[4, 4]
  %c = {cond} : bool[]
  %out = if %c, label="layer1" : {result} {{{body}
    yield %y
  }} else {{
    yield {skip}
  }}
  return %out
}}
"""


def compacted(text: str, checks: str) -> None:
    assert_idempotent(STEP, text)
    run_pass(STEP, text).check(checks)


FEED_FORWARD = f"""{ZERO}
    %a = rms_norm %x, eps=1e-05 : f32[B, T, 4]
    %h = linear %a, %w : f32[B, T, 4]
    %g = where %k, %h, %z : f32[B, T, 4]
    %y = add %x, %g : f32[B, T, 4]"""


def test_masked_work_becomes_work_on_rows_scattered_into_what_is_skipped() -> None:
    compacted(
        arm(FEED_FORWARD),
        r"""
        CHECK: %out = if %c, label="layer1"
        CHECK: [[R:%\w+]] = rows %m, dim="N1" : i64[N1]
        CHECK-NEXT: [[X:%[\w.]+]] = gather_rows %x, [[R]] : f32[N1, 4]
        CHECK-NEXT: [[A:%[\w.]+]] = rms_norm [[X]], eps=1e-05 : f32[N1, 4]
        CHECK-NEXT: [[H:%[\w.]+]] = linear [[A]], %w : f32[N1, 4]
        CHECK-NEXT: [[Y:%[\w.]+]] = add [[X]], [[H]] : f32[N1, 4]
        CHECK-NEXT: [[S:%\w+]] = scatter_rows %x, [[R]], [[Y]] : f32[B, T, 4]
        CHECK-NEXT: yield [[S]]
    """,
    )


def test_an_adapter_is_computed_on_the_other_tokens() -> None:
    body = f"""{ZERO}
    %h = linear %x, %w : f32[B, T, 4]
    %a = silu %x : f32[B, T, 4]
    %y = where %k, %h, %a : f32[B, T, 4]"""
    compacted(
        arm(body),
        r"""
        CHECK: [[NOT:%\w+]] = not %m
        CHECK-NEXT: [[OFF:%\w+]] = rows [[NOT]], dim="N0"
        CHECK: [[XO:%[\w.]+]] = gather_rows %x, [[OFF]] : f32[N0, 4]
        CHECK-NEXT: [[A:%[\w.]+]] = silu [[XO]] : f32[N0, 4]
        CHECK: [[BASE:%[\w.]+]] = scatter_rows {{%\w+}}, [[OFF]], [[A]]
        CHECK-NEXT: [[ON:%\w+]] = rows %m, dim="N1"
        CHECK: [[H:%[\w.]+]] = linear {{%[\w.]+}}, %w : f32[N1, 4]
        CHECK-NEXT: [[Y:%\w+]] = scatter_rows [[BASE]], [[ON]], [[H]]
        CHECK-NEXT: yield [[Y]]
    """,
    )


ATTENTION = f"""{ZERO}
    %k4 = reshape %x, shape=["B", "T", 1, 4] : f32[B, T, 1, 4]
    %q4 = rope %k4, %pos, theta=100.0 : f32[B, T, 1, 4]
    %p = append %past, %q4, %n, MASK : f32[B, 1, S, 4]
    %i = cast MASK, to=i64 : i64[B, T]
    %s = cumsum %i, dim=1 : i64[B, T]
    %n2 = reshape %n, shape=["B", 1] : i64[B, 1]
    %l = add %n2, %s : i64[B, T]
    %o4 = attend %q4, %p, %p, %l, scale=0.5 : f32[B, T, 1, 4]
    %o = reshape %o4, shape=["B", "T", 4] : f32[B, T, 4]
    %g = where %k, %o, %z : f32[B, T, 4]
    %y = add %x, %g : f32[B, T, 4]"""


def test_attention_on_rows_appends_rows_where_only_they_are_cached() -> None:
    compacted(
        arm(ATTENTION.replace("MASK", "%m")),
        r"""
        CHECK: [[R:%\w+]] = rows %m, dim="N1"
        CHECK-DAG: [[P:%[\w.]+]] = gather_rows %pos, [[R]] : i64[N1]
        CHECK-DAG: [[Q:%[\w.]+]] = rope {{%[\w.]+}}, [[P]], theta=100.0 : f32[N1, 1, 4]
        CHECK-DAG: [[C:%[\w.]+]] = append_rows %past, [[Q]], [[R]], %n, %m : f32[B, 1, S, 4]
        CHECK-DAG: [[S:%[\w.]+]] = cumsum {{%[\w.]+}}, dim=1 : i64[B, T]
        CHECK-DAG: [[L:%[\w.]+]] = gather_rows {{%[\w.]+}}, [[R]] : i64[N1]
        CHECK: attend_rows [[Q]], [[C]], [[C]], [[L]], [[R]], %m, scale=0.5 : f32[N1, 1, 4]
    """,
    )


def test_attention_on_rows_appends_all_tokens_where_all_are_cached() -> None:
    compacted(
        arm(ATTENTION.replace("MASK", "%v")),
        r"""
        CHECK-NOT: append_rows
        CHECK: append %past, {{%[\w.]+}}, %n, %v : f32[B, 1, S, 4]
        CHECK-NOT: append_rows
        CHECK: attend_rows
    """,
    )


def test_the_router_knows_that_its_rows_are_shown() -> None:
    body = f"""{ZERO}
    %s = linear %x, %w : f32[B, T, 4]
    %i, %u = route %s, %m, k=2 : i64[B, T, 2], f32[B, T, 2]
    %y = cast %i, to=i64 : i64[B, T, 2]"""
    compacted(
        arm(body, "i64[B, T, 2]", "%none").replace(
            "  %c = any",
            "  %o = constant value=[-1] : i64[]\n"
            '  %none = broadcast %o, shape=["B", "T", 2] : i64[B, T, 2]\n  %c = any',
        ),
        r"""
        CHECK: if
        CHECK: [[S:%[\w.]+]] = linear {{%[\w.]+}}, %w : f32[N1, 4]
        CHECK: [[ONE:%\w+]] = constant value=[true] : bool[]
        CHECK-NEXT: [[ALL:%[\w.]+]] = broadcast [[ONE]], shape=["N1"] : bool[N1]
        CHECK-NEXT: [[I:%[\w.]+]], {{%[\w.]+}} = route [[S]], [[ALL]], k=2 : i64[N1, 2]
        CHECK: [[Y:%[\w.]+]] = cast [[I]]
        CHECK: scatter_rows {{%\w+}}, {{%\w+}}, [[Y]] : i64[B, T, 2]
    """,
    )


def test_a_repeated_number_keeps_its_value() -> None:
    body = f"""{ZERO}
    %three = constant value=[3.0] : f32[]
    %all = broadcast %three, shape=["B", "T", 4] : f32[B, T, 4]
    %h = mul %x, %all : f32[B, T, 4]
    %y = where %k, %h, %x : f32[B, T, 4]"""
    compacted(
        arm(body),
        r"""
        CHECK: constant value=[3.0]
        CHECK: mul {{%[\w.]+}}, {{.*}} f32[N1, 4]
    """,
    )


def refused(body: str, **options: str) -> str:
    return assert_unchanged(STEP, arm(body, **options)).refused("compact-tokens")


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("transpose %x4, perm=[0, 1, 3, 2]", "transpose does not go token by token"),
        ("cumsum %x4, dim=1", "cumsum does not go token by token"),
        ("softmax %x4, dim=1", "softmax does not go token by token"),
        ("max %x4, dims=[1], keep=true", "add does not go token by token"),
        ("mul %x4, %row4", "mul does not go token by token"),
    ],
)
def test_work_that_needs_other_tokens_stays_masked(op: str, reason: str) -> None:
    kept = '"B", 1' if "keep" in op else '"B", "T"'
    shape = "B, 1, 2, 2" if "keep" in op else "B, T, 2, 2"
    body = f"""{ZERO}
    %x4 = reshape %x, shape=["B", "T", 2, 2] : f32[B, T, 2, 2]
    %row4 = reshape %row, shape=["B", 1, 2, 2] : f32[B, 1, 2, 2]
    %h4 = {op} : f32[{shape}]
    %h = reshape %h4, shape=[{kept}, 4] : f32[{shape[:4]}, 4]
    %a = add %x, %h : f32[B, T, 4]
    %y = where %k, %a, %x : f32[B, T, 4]"""
    assert reason in refused(body)


def test_an_arm_without_a_token_mask_stays() -> None:
    body = "\n    %y = silu %x : f32[B, T, 4]"
    assert refused(body, cond="constant value=[true]") == "the condition is not any(mask)"
    text = arm(body, cond="any %m1, dims=[0]").replace(
        "  %c =", '  %m1 = reshape %m, shape=["B*T"] : bool[B*T]\n  %c ='
    )
    assert assert_unchanged(STEP, text).refused("compact-tokens") == "the mask is not [B, T]"


def test_one_token_stays() -> None:
    text = arm(FEED_FORWARD).replace("B, T", "1, 1").replace('"B", "T"', "1, 1")
    text = text.replace("[B", "[1")
    reason = assert_unchanged(STEP, text).refused("compact-tokens")
    assert reason == "there is one token: nothing to compact"


def test_experts_regions_stay() -> None:
    text = arm(FEED_FORWARD).replace('label="layer1"', 'role="expert", expert=0')
    assert not assert_unchanged(STEP, text).statistics.near_misses


def test_what_is_compact_stays() -> None:
    once = run_pass(STEP, arm(FEED_FORWARD)).text
    assert assert_unchanged(STEP, once).refused("compact-tokens") == "it is compact already"


def test_a_conditional_inside_stays_and_its_own_arm_is_compacted() -> None:
    body = f"""{ZERO}
    %h = if %c, label="layer1/ffn" : f32[B, T, 4] {{
      %a = linear %x, %w : f32[B, T, 4]
      %g = where %k, %a, %x : f32[B, T, 4]
      yield %g
    }} else {{
      yield %x
    }}
    %y = where %k, %h, %x : f32[B, T, 4]"""
    rewritten = run_pass(STEP, arm(body))
    assert rewritten.statistics.fired["compact-tokens"] == 1
    assert rewritten.statistics.near_misses["compact-tokens"].reason == (
        "if does not go token by token"
    )
    rewritten.check("CHECK: layer1/ffn\nCHECK: gather_rows\nCHECK: where %k, %h, %x")


def test_a_constant_of_full_rank_is_refused() -> None:
    body = f"""{ZERO}
    %one = reshape %d, shape=[1, 1, 4] : f32[1, 1, 4]
    %all = broadcast %one, shape=["B", "T", 4] : f32[B, T, 4]
    %h = mul %x, %all : f32[B, T, 4]
    %y = where %k, %h, %x : f32[B, T, 4]"""
    assert refused(body) == "broadcast does not go token by token"


def test_names_of_dimensions_are_free_ones() -> None:
    text = arm(FEED_FORWARD).replace("%d: f32[4]", "%d: f32[N1]")
    run_pass(STEP, text).check('CHECK: rows %m, dim="N2" : i64[N2]')


EXPERTS = f"""{ZERO}
    %s = linear %x, %w : f32[B, T, 4]
    %i, %u = route %s, %m, k=2 : i64[B, T, 2], f32[B, T, 2]
    %e = map_experts %x, %i, %u, [%we] : f32[B, T, 4] (%t: f32[B, T, 4], %p: f32[4, 4]) {{
      %f = linear %t, %p : f32[B, T, 4]
      BODY
      yield %o
    }}
    %y = where %k, %e, %x : f32[B, T, 4]"""


def experts(body: str) -> str:
    text = arm(EXPERTS.replace("BODY", body))
    text = text.replace(
        "func @f", 'weight @we : f32[4, 4, 4] = tensor("we", f32[4, 4, 4])\nfunc @f'
    )
    return text.replace("  %c =", '  %we = weight weight="we" : f32[4, 4, 4]\n  %c =')


def test_experts_take_rows() -> None:
    compacted(
        experts("%o = silu %f : f32[B, T, 4]"),
        r"""
        CHECK: map_experts {{%[\w.]+}}, {{%[\w.]+}}, {{%[\w.]+}}, [%we] : f32[N1, 4] (%t: f32[N1, 4]
        CHECK-NEXT: linear %t, %p : f32[N1, 4]
        CHECK-NEXT: silu %f : f32[N1, 4]
    """,
    )


def test_experts_whose_body_names_dimensions_take_rows_too() -> None:
    body = """%c0 = constant value=[2.0] : f32[]
      %b = broadcast %c0, shape=["B", "T", 4] : f32[B, T, 4]
      %g = slice %f, dim=2, start=0, stop=2 : f32[B, T, 2]
      %h = slice %f, dim=2, start=2, stop=4 : f32[B, T, 2]
      %j = concat [%h, %g], dim=2 : f32[B, T, 4]
      %o = mul %j, %b : f32[B, T, 4]"""
    compacted(
        experts(body),
        r"""
        CHECK: map_experts
        CHECK: broadcast {{%\w+}}, shape=["N1", 4] : f32[N1, 4]
        CHECK: slice %f, dim=1, start=0, stop=2 : f32[N1, 2]
        CHECK: concat [{{.*}}], dim=1 : f32[N1, 4]
    """,
    )
