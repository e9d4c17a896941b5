"""fold-constants, by FileCheck."""

from __future__ import annotations

import pytest

from liquidc.passes.fold_constants import MAX_ELEMENTS, FoldConstants
from tests.passes.filecheck import Rewritten, assert_idempotent, assert_unchanged, run_pass

FOLD = FoldConstants()


def function(args: str, result: str, body: str, weights: str = "") -> str:
    """A module with one function that returns %y."""
    return f"module @m\n{weights}\nfunc @f({args}) -> (y: {result}) {{\n{body}\n  return %y\n}}\n"


def folded(args: str, result: str, body: str, weights: str = "") -> Rewritten:
    text = function(args, result, body, weights)
    assert_idempotent(FOLD, text)
    return run_pass(FOLD, text)


@pytest.mark.parametrize(
    "op",
    [
        "reshape %x, shape=[2, 3] : i64[2, 3]",
        "broadcast %x, shape=[2, 3] : i64[2, 3]",
        "transpose %x, perm=[0, 1] : i64[2, 3]",
        "slice %x, dim=1, start=0, stop=3 : i64[2, 3]",
        "cast %x, to=i64 : i64[2, 3]",
        "sum %x, dims=[] : i64[2, 3]",
        "add %x, %zero : i64[2, 3]",
        "add %zero, %x : i64[2, 3]",
        "sub %x, %zero : i64[2, 3]",
        "mul %one, %x : i64[2, 3]",
    ],
)
def test_an_op_that_changes_nothing_is_its_operand(op: str) -> None:
    body = f"""
      %zero = constant value=[0] : i64[]
      %one = constant value=[1] : i64[]
      %y = {op}"""
    folded("%x: i64[2, 3]", "i64[2, 3]", body).check("""
        CHECK: func @f(%x: i64[2, 3])
        CHECK: return %x
    """)


@pytest.mark.parametrize(
    ("op", "neutral", "dtype"),
    [("and", "true", "bool"), ("or", "false", "bool"), ("mul", "1.0", "f32")],
)
def test_a_neutral_operand_goes(op: str, neutral: str, dtype: str) -> None:
    body = f"""
      %c = constant value=[{neutral}] : {dtype}[]
      %b = broadcast %c, shape=["B"] : {dtype}[B]
      %y = {op} %x, %b : {dtype}[B]"""
    folded(f"%x: {dtype}[B]", f"{dtype}[B]", body).check("CHECK: return %x")


@pytest.mark.parametrize(
    ("op", "number", "type"),
    [
        ("add %x, %c", "0.0", "f32[2]"),
        ("sub %x, %c", "-0.0", "f32[2]"),
        ("sub %c, %x", "0", "i64[2]"),
        ("div %c, %x", "1.0", "f32[2]"),
    ],
)
def test_a_number_that_changes_a_bit_stays(op: str, number: str, type: str) -> None:
    dtype = type.partition("[")[0]
    body = f"  %c = constant value=[{number}] : {dtype}[]\n  %y = {op} : {type}"
    refused = assert_unchanged(FOLD, function(f"%x: {type}", type, body))
    assert refused.refused("skip-identity") == "no operand is neutral"


def test_an_operand_that_would_be_broadcast_is_not_the_result() -> None:
    body = """
      %c = constant value=[1.0] : f32[]
      %b = broadcast %c, shape=[3, 2] : f32[3, 2]
      %y = mul %x, %b : f32[3, 2]"""
    refused = assert_unchanged(FOLD, function("%x: f32[2]", "f32[3, 2]", body))
    assert refused.refused("skip-identity") == "the type changes"


def test_reshapes_and_transposes_merge() -> None:
    body = """
      %a = reshape %x, shape=[6] : f32[6]
      %b = reshape %a, shape=[3, 2] : f32[3, 2]
      %c = transpose %b, perm=[1, 0] : f32[2, 3]
      %d = reshape %c, shape=[1, 2, 3] : f32[1, 2, 3]
      %e = transpose %d, perm=[2, 0, 1] : f32[3, 1, 2]
      %y = transpose %e, perm=[1, 0, 2] : f32[1, 3, 2]"""
    folded("%x: f32[2, 3]", "f32[1, 3, 2]", body).check("""
        CHECK: [[B:%\\w+]] = reshape %x, shape=[3, 2]
        CHECK-NEXT: [[C:%\\w+]] = transpose [[B]], perm=[1, 0]
        CHECK-NEXT: [[D:%\\w+]] = reshape [[C]]
        CHECK: [[Y:%\\w+]] = transpose [[D]], perm=[0, 2, 1] : f32[1, 3, 2]
        CHECK: return [[Y]]
    """)


def test_where_with_a_known_mask_is_one_side() -> None:
    body = """
      %t = constant value=[true] : bool[]
      %f = constant value=[false] : bool[]
      %p = where %t, %x, %z : f32[2]
      %q = where %f, %x, %p : f32[2]
      %y = where %m, %q, %q : f32[2]"""
    folded("%x: f32[2], %z: f32[2], %m: bool[2]", "f32[2]", body).check("CHECK: return %x")


def test_where_that_broadcasts_its_side_keeps_the_shape() -> None:
    body = "%t = constant value=[true] : bool[]\n %y = where %t, %s, %x : f32[2]"
    folded("%x: f32[2], %s: f32[]", "f32[2]", body).check("""
        CHECK: [[Y:%\\w+]] = broadcast %s, shape=[2] : f32[2]
        CHECK-NEXT: return [[Y]]
    """)


def test_an_unknown_mask_is_refused() -> None:
    text = function(
        "%x: f32[2], %m: bool[2]", "f32[2]", "%n = neg %x : f32[2]\n%y = where %m, %x, %n : f32[2]"
    )
    assert assert_unchanged(FOLD, text).refused("fold-where") == "the mask is not known"


def test_ops_on_constants_are_computed() -> None:
    body = """
      %a = constant value=[1.0, 2.0] : f32[2]
      %b = constant value=[0.5, 4.0] : f32[2]
      %c = add %a, %b : f32[2]
      %d = gt %c, %a : bool[2]
      %e = sum %c, dims=[0] : f32[]
      %y = where %m, %e, %c : f32[2]"""
    folded("%m: bool[2]", "f32[2]", body).check("""
        CHECK: %c = constant value=[1.5, 6.0] : f32[2]
        CHECK-NEXT: constant value=[true, true] : bool[2]
        CHECK-NEXT: %e = constant value=[7.5] : f32[]
        CHECK-NEXT: %y = where %m, %e, %c
    """)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("%c = constant value=[1.0] : f32[]\n %y = add %x, %c : f32[2]", "an operand is not"),
        ("%c = constant value=[1.0] : f32[]\n %y = broadcast %c, shape=[2] : f32[2]", "repeat"),
    ],
)
def test_what_is_not_known_or_only_repeats_is_not_computed(body: str, reason: str) -> None:
    refused = assert_unchanged(FOLD, function("%x: f32[2]", "f32[2]", body))
    assert reason in refused.refused("fold-operation")


def test_a_size_that_is_not_known_is_refused() -> None:
    body = '  %c = constant value=[1.0] : f32[]\n  %y = broadcast %c, shape=["B"] : f32[B]'
    refused = assert_unchanged(FOLD, function("%x: f32[B]", "f32[B]", body))
    assert refused.refused("fold-operation") == "a size is not known"


def test_large_constants_are_not_written_out() -> None:
    count = MAX_ELEMENTS + 1
    numbers = ", ".join(["1.5"] * count)
    body = f"%c = constant value=[{numbers}] : f32[{count}]\n  %y = neg %c : f32[{count}]"
    refused = assert_unchanged(FOLD, function("%x: f32[1]", f"f32[{count}]", body))
    assert refused.refused("fold-operation") == f"more than {MAX_ELEMENTS} elements"


WEIGHTS = """
weight @a : f32[4, 2] = tensor("a", f32[4, 2])
weight @m.b.weight : f32[4, 2] = tensor("m.b.weight", f32[4, 2])
weight @a.t10 : f32[4, 2] = tensor("odd", f32[4, 2])
"""


def test_layouts_of_weights_stay_lazy() -> None:
    body = """
      %a = weight weight="a" : f32[4, 2]
      %b = weight weight="m.b.weight" : f32[4, 2]
      %t = transpose %a, perm=[1, 0] : f32[2, 4]
      %s = slice %b, dim=0, start=1, stop=3 : f32[2, 2]
      %h = cast %s, to=f16 : f16[2, 2]
      %f = cast %h, to=f32 : f32[2, 2]
      %y = concat [%t, %f], dim=1 : f32[2, 6]"""
    folded("%x: f32[1]", "f32[2, 6]", body, WEIGHTS).check("""
        CHECK: weight @a.t10.2 : f32[2, 4] = transpose(tensor("a", f32[4, 2]), [1, 0])
        CHECK: slice(tensor("m.b.weight", f32[4, 2]), 0, 1, 3)
        CHECK: concat([transpose({{.*}}), cast(cast(slice({{.*}}), f16), f32)], 1)
        CHECK: func
        CHECK-NOT: transpose
        CHECK-NOT: slice
        CHECK-NOT: concat
        CHECK: %y = weight weight="a.t10.2.and.f16"
        CHECK-NEXT: return %y
    """)


def test_weights_without_a_dot_in_their_names_are_joined() -> None:
    body = """
      %a = weight weight="a" : f32[2]
      %b = weight weight="b" : f32[2]
      %y = concat [%a, %b], dim=0 : f32[4]"""
    weights = '\nweight @a : f32[2] = tensor("a", f32[2])\nweight @b : f32[2] = tensor("b", f32[2])'
    folded("%x: f32[1]", "f32[4]", body, weights).check('CHECK: weight weight="a.and.b" : f32[4]')


def test_a_cast_to_bool_and_computed_tensors_are_no_weights() -> None:
    body = '  %a = weight weight="a" : f32[4, 2]\n  %y = cast %a, to=bool : bool[4, 2]'
    weights = 'weight @a : f32[4, 2] = tensor("a", f32[4, 2])'
    refused = assert_unchanged(FOLD, function("%x: f32[2]", "bool[4, 2]", body, weights))
    assert refused.refused("fold-weight") == "not to bool"
    body = "  %y = transpose %x, perm=[1, 0] : f32[2, 4]"
    refused = assert_unchanged(FOLD, function("%x: f32[4, 2]", "f32[2, 4]", body))
    assert refused.refused("fold-weight") == "an operand is no weight"
