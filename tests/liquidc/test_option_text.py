"""The parser of names with options, and options that would do nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquidc.errors import InputError
from liquidc.option_text import Named, parse_named, split_list
from liquidc.passes.fix_gates import FixGates
from liquidc.passes.quantize import Quantize
from liquidc.plan import CompileOptions, make_plan
from tests.liquidc.test_cli import call, refused

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
VALUES = st.from_regex(r"[A-Za-z0-9_.-]{1,8}", fullmatch=True)
NAMED = st.builds(Named, NAMES, st.dictionaries(NAMES, VALUES, max_size=3))
FILE = Path("file")


@given(st.lists(NAMED, max_size=4))
def test_what_is_written_is_read_back(parts: list[Named]) -> None:
    text = ", ".join(map(str, parts))
    assert [parse_named(part, "pass") for part in split_list(text)] == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4{", "a brace is not closed; write int4{option=value}"),
        ("int4{block=64", "a brace is not closed"),
        ("int4{block=64}}", "a brace is not closed"),
        ("int4{{block=64}", "a brace is not closed"),
        ("int4{block=64}x", "a brace is not closed"),
        ("int4}", "is not a scheme"),
        ("", "is not a scheme"),
        ("INT4", "is not a scheme"),
        ("int4{}", "'' is not option=value"),
        ("int4{block=64,}", "'' is not option=value"),
        ("int4{block}", "'block' is not option=value"),
        ("int4{block=}", "'block=' is not option=value"),
        ("int4{=64}", "'=64' is not option=value"),
        ("int4{block=6=4}", "'block=6=4' is not option=value"),
        ("int4{block=64,block=32}", "block is given twice"),
        ("int4{scheme=int8}", "the scheme is int4 already"),
        ("int4{bits=3}", "the pass quantize has no option 'bits'"),
        ("int4{block=1_6}", "block must be of type int, not '1_6'"),
        ("int4{symmetric=maybe}", "symmetric must be of type bool"),
        ("int4{symmetric=true,symmetric=false}", "symmetric is given twice"),
        ("int3", "scheme is int8"),
    ],
)
def test_a_scheme_is_read_strictly(text: str, message: str) -> None:
    if text:
        with pytest.raises(InputError) as error:
            make_plan(CompileOptions("null", quantize=text))
    else:
        with pytest.raises(InputError) as error:
            parse_named(text, "scheme")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["a,,b", ",a", "a,", " , "])
def test_a_list_has_no_empty_names(text: str) -> None:
    with pytest.raises(InputError, match="a name is missing"):
        split_list(text)
    assert split_list(" ") == ()


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "1_0", "0x1", "half"])
def test_numbers_of_passes_are_numbers(value: str) -> None:
    with pytest.raises(InputError, match="ratio must be of type float"):
        make_plan(CompileOptions("null", profile=FILE, add=(f"prune-experts{{ratio={value}}}",)))


NOTHING_LOSSY = "nothing here is lossy"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0.1}, NOTHING_LOSSY),
        ({"max_kl": 0.1, "profile": FILE, "specialize": "exact"}, NOTHING_LOSSY),
        ({"max_kl": float("nan"), "quantize": "int8"}, "--max-kl is 0 nats or more, not nan"),
        ({"max_kl": -1.0, "quantize": "int8"}, "--max-kl is 0 nats or more, not -1.0"),
        ({"data": FILE}, NOTHING_LOSSY),
        ({"data": FILE, "profile": FILE}, NOTHING_LOSSY),
        ({"portable_weights": True}, "nothing is quantized: give --quantize"),
        ({"fused_experts": True}, "nothing is quantized: give --quantize"),
        ({"calibration": FILE}, "nothing calibrates"),
        ({"calibration": FILE, "quantize": "int4"}, "nothing calibrates"),
        ({"recipe": FILE}, "are for --quantize mixed"),
        ({"target_size": 9, "quantize": "int8"}, "are for --quantize mixed"),
        ({"target_size": 9, "recipe": FILE, "quantize": "mixed"}, "give one of them"),
        ({"quantize": "mixed"}, "--quantize mixed needs --target-size, --max-kl or --recipe"),
        ({"machine": FILE}, "the pass choose-lowering, which does not run"),
        ({"specialize": "exact"}, "to specialise a model takes a profile"),
        ({"specialize": "all", "profile": FILE}, "specialize is exact or budget, not 'all'"),
        ({"without": ("merge-experts",)}, "--no-pass merge-experts: it would not run anyway"),
        ({"without": ("fuse-linear",) * 2}, "--no-pass fuse-linear: it would not run anyway"),
        ({"without": ("quantize",), "quantize": "int8"}, "leaves out what another option asks"),
        ({"without": ("fix-gates",), "add": ("fix-gates{gates=1}",)}, "leaves out what another"),
        ({"quantize": "int8", "add": ("quantize",)}, "the pass quantize is asked for twice"),
        (
            {"specialize": "budget", "profile": FILE, "add": ("fix-gates{gates=1}",)},
            "the pass fix-gates is asked for twice",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        make_plan(replace(CompileOptions("onnxruntime"), **options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "int8"},
        {"max_kl": 0.1},
        {"passes": ("fuse-linear",)},
        {"without": ("fuse-linear",)},
        {"add": ("fuse-linear",)},
        {"data": FILE},
        {"machine": FILE},
    ],
)
def test_passes_are_not_configured_behind_their_results(
    options: dict[str, Any], tmp_path: Path
) -> None:
    start = tmp_path / "after.ir"
    start.touch()
    with pytest.raises(InputError, match="does nothing when a compile starts from the stage pass"):
        make_plan(replace(CompileOptions("null", start=("passes", start)), **options))
    assert make_plan(CompileOptions("null", start=("passes", start))).passes == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantize("fp8", method="gptq"), "fp8 is rounded to the nearest"),
        (lambda: Quantize("mixed", head="float"), "leave head= out"),
        (lambda: Quantize("int8", head="int4"), "head=int4 has no more bits than int8"),
        (lambda: FixGates(gates="1", never=0.1), "leave never= and always= out"),
    ],
)
def test_options_of_passes_that_would_do_nothing(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--quantize int4{", "a brace is not closed"),
        ("--add-pass fix-gates{gates=0,gates=1}", "gates is given twice"),
        ("--passes a,,b", "a name is missing"),
        ("--max-kl 0.1", NOTHING_LOSSY),
        ("--add-pass fix-gates{gates=0000}", "4 digits for 2 gates"),
        ("--add-pass fix-gates{gates=..}", "the pass fix-gates would change nothing"),
        ("--quantize int8 --dump-dir MODEL/config.json", "not a directory; dump elsewhere"),
        ("--quantize int4{method=gptq} --calibration /none.txt", "/none.txt"),
        ("--quantize int4 --data /none.txt", "/none.txt"),
        ("--quantize mixed --recipe MODEL/config.json", "not TOML"),
        ("--quantize mixed --target-size 1kB", "with int4 everywhere the weights still take"),
        ("--profile MODEL/config.json", "not a profile of liquidc"),
        ("--start-from trace=MODEL/config.json", "config.json"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_dry_run_says_what_the_compile_would_say(
    arguments: str, message: str, dry: bool, model_directory: Path, tmp_path: Path
) -> None:
    words = arguments.replace("MODEL", str(model_directory)).split()
    out = ("-o", tmp_path / "engine", "--target", "null")
    result = call("compile", model_directory, *out, *words, *["--dry-run"] * dry)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_an_empty_scheme(model_directory: Path) -> None:
    refused("a scheme is missing", "compile", model_directory, "--dry-run", "--quantize", "")
