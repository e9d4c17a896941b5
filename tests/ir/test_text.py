"""The text form: exact round trips, errors with file, line, column and caret, fuzzed input."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liquidc.errors import IRError
from liquidc.ir import parse_module, print_module, verify

TEXT = """\
module @m {layers = 2, policy = "own", share = 0.5}
weight @w : f32[4, 4] = tensor("model.w", f32[4, 4])
weight @stacked : f32[2, 4, 4] = stack([tensor("model.w", f32[4, 4]), tensor("v", f32[4, 4])])
weight @part : f32[2, 4] = slice(transpose(tensor("model.w", f32[4, 4]), [1, 0]), 0, 1, 3)
weight @both : f32[8, 4] = concat([tensor("a", f32[4, 4]), select(tensor("s", f32[3, 4, 4]), 2)], 0)
weight @half : f32[4] = cast(tensor("h", bf16[4]), f32)
weight @turned : f32[3, 4] = take(tensor("model.w", f32[4, 4]), 0, [2, 0, 2])
weight @mixed : f32[4] = mix([tensor("v", f32[4]), tensor("u", f32[4])], [0.75, -1e-09])
weight @folded : f32[4, 4] = product(tensor("a", f32[4, 4]), tensor("model.w", f32[4, 4]))

func @f(%x: f32[B, T, 4], %mask: bool[B, T], %index: i64[B, T, 2], %share: f32[B, T, 2]) \
-> (y: f32[B, T, 4], z: f32[]) {
  %w = weight weight="w" : f32[4, 4]
  %h = linear %x, %w : f32[B, T, 4] loc("model.py":17)
  %any = any %mask, dims=[0, 1] : bool[]
  %y = if %any, label="layer0", lowering="compact", role="gate", gate=3, layer=1, region=2 : \
f32[B, T, 4] {
    %stacked = weight weight="stacked" : f32[2, 4, 4]
    %e = map_experts %h, %index, %share, [%stacked] : f32[B, T, 4] \
(%t: f32[B, T, 4], %p: f32[4, 4]) {
      %a = linear %t, %p : f32[B, T, 4]
      yield %a
    }
    %inner = if %any, role="expert", layer=1, expert=0 : f32[B, T, 4] {
      yield %e
    } else {
      yield %h
    }
    yield %inner
  } else {
    yield %x
  } loc("a \\"b\\".py":3)
  %z = constant value=[-0.0] : f32[]
  return %y, %z
}
"""


def test_round_trip() -> None:
    module = parse_module(TEXT)
    verify(module)
    assert print_module(module) == TEXT
    assert print_module(module.clone()) == TEXT


@pytest.mark.parametrize(
    "number", ["0.1", "-0.0", "inf", "-inf", "1e-45", "3.4028234663852886e+38", "1e+300", "nan"]
)
def test_numbers_keep_every_bit(number: str) -> None:
    text = f"module @m\n\nfunc @f() -> (y: f64[]) {{\n  %y = constant value=[{number}] : f64[]\n"
    text += "  return %y\n}\n"
    assert print_module(parse_module(text)) == text


ERRORS = {
    "an unknown op": ("linear %x", "linaer %x", 13, 8, "linaer"),
    "an unknown value": ("linear %x, %w", "linear %x, %v", 13, 19, "%v"),
    "a name twice": ("%any = any", "%h = any", 15, 3, "%h"),
    "an unknown type": ("(%x: f32[B", "(%x: f33[B", 11, 13, "f33"),
    "a missing attribute": (", dims=[0, 1]", "", 14, 3, "dims"),
    "an unknown attribute": ("dims=[0, 1]", "dims=[0, 1], deep=3", 14, 34, "deep"),
    "an unclosed string": ('weight="stacked" :', 'weight="stacked :', 16, 30, ""),
    "a missing brace": ("return %y, %z\n}", "return %y, %z\n", 33, 1, ""),
    "an unknown weight expression": ("cast(tensor", "cats(tensor", 6, 25, "cats"),
    "text after the module": ("return %y, %z\n}\n", "return %y, %z\n}\nmore\n", 33, 1, "more"),
    "a negative size": ("[2, 4, 4] = stack", "[-2, 4, 4] = stack", 3, 23, ""),
    "a slice out of range": ("0, 1, 3)", "0, 1, 9)", 4, 0, ""),
    "a row that is not there": ("[2, 0, 2]", "[2, 0, 4]", 7, 0, ""),
    "shares for other tensors": ("[0.75, -1e-09]", "[0.75]", 8, 0, ""),
    "factors that don't fit": (
        'product(tensor("a", f32[4, 4])',
        'product(tensor("a", f32[4, 3])',
        9,
        0,
        "",
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_point_at_the_place(kind: str) -> None:
    old, new, line, column, word = ERRORS[kind]
    assert TEXT.count(old) >= 1
    text = TEXT.replace(old, new, 1)
    with pytest.raises(IRError) as caught:
        parse_module(text, "a.ir")
    first, source, caret = str(caught.value).split("\n")
    place = first.split(": ")[0]
    assert place == f"a.ir:{line}:{column}" or (column == 0 and place.startswith(f"a.ir:{line}:"))
    assert word in first
    shown = text.split("\n")[line - 1] if line <= text.count("\n") else ""
    assert source == f"  {shown}"
    assert caret.index("^") == int(place.split(":")[2]) + 1


TOKENS = [
    "%x",
    "%h",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    ",",
    ":",
    '"',
    "f32",
    "if",
    "yield",
    "-",
    "9" * 30,
]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_fuzzed_text(data: st.DataObject) -> None:
    """Text with parts cut, doubled and replaced is parsed, or refused with our error alone."""
    text = TEXT
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 40)))
        piece = data.draw(
            st.one_of(st.sampled_from(TOKENS), st.text(max_size=5), st.just(text[start:stop] * 2))
        )
        text = text[:start] + piece + text[stop:]
    try:
        module = parse_module(text)
        verify(module)
    except IRError:
        return
    assert print_module(parse_module(print_module(module))) == print_module(module)


def test_deep_nesting_is_refused() -> None:
    deep = "func @f(%c: bool[]) -> (y: bool[]) {\n" + '%y = if %c, label="" : bool[] {\n' * 5000
    with pytest.raises(IRError):
        parse_module("module @m\n\n" + deep)
