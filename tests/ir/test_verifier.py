"""One negative test for each rule of the verifier, asserting the message."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

from liquidc.errors import IRError
from liquidc.ir import Block, DType, Module, Op, TensorType, ops, parse_module, verify
from liquidc.ir import verifier as verifier_module

HEAD = 'module @m\nweight @w : f32[4, 4] = tensor("w", f32[4, 4])\n\n'

GOOD = """func @f(%x: f32[B, 4], %c: bool[]) -> (y: f32[B, 4]) {
  %w = weight weight="w" : f32[4, 4]
  %h = linear %x, %w : f32[B, 4]
  %y = if %c, label="layer0" : f32[B, 4] {
    %a = relu %h : f32[B, 4]
    yield %a
  } else {
    yield %x
  }
  return %y
}
"""

TEXTS = {
    "use of a value of the other arm": (
        GOOD.replace("    yield %x", "    yield %a"),
        "%a is not visible here",
    ),
    "use of a value of an arm after it": (
        GOOD.replace("return %y", "return %a"),
        "%a is not visible here",
    ),
    "use before definition": (
        GOOD.replace("linear %x, %w", "linear %y, %w"),
        "%y is not visible here",
    ),
    "arms that yield different types": (
        GOOD.replace("    %a = relu %h : f32[B, 4]\n    yield %a", "    yield %c"),
        "if yields bool[], not what is declared",
    ),
    "a condition that is no bool": (
        GOOD.replace("if %c,", "if %h,"),
        "the condition must be bool[], not f32[B, 4]",
    ),
    "a role that is not known": (
        GOOD.replace('label="layer0"', 'role="layer"'),
        "role is one of gate, expert, path, form, not 'layer'",
    ),
    "a gate's region without its number": (
        GOOD.replace('label="layer0"', 'role="gate", gate=0, layer=0'),
        "role 'gate' needs a region",
    ),
    "a gate's number without the role": (
        GOOD.replace('label="layer0"', "gate=0"),
        "role '' has no gate",
    ),
    "an expert's region that is also a gate's": (
        GOOD.replace('label="layer0"', 'role="expert", expert=0, gate=0'),
        "role 'expert' has no gate",
    ),
    "a result type that is not inferred": (
        GOOD.replace("%h = linear %x, %w : f32[B, 4]", "%h = linear %x, %w : f32[B, 5]"),
        "linear yields f32[B, 4], not what is declared",
    ),
    "inputs rounded for a weight without codes": (
        GOOD.replace("linear %x, %w", "linear %x, %w, input_block=4"),
        "inputs are rounded where they meet codes; this weight has none",
    ),
    "blocks of inputs that fill no row": (
        GOOD.replace("linear %x, %w", "linear %x, %w, input_block=3"),
        "blocks of 3 don't fill the rows of f32[4, 4]",
    ),
    "a dimension from nowhere": (
        GOOD.replace("  %h = linear", '  %q = broadcast %c, shape=["Q"] : bool[Q]\n  %h = linear'),
        "dimension Q is not known here",
    ),
    "a dimension introduced twice": (
        "func @f(%m: bool[B, T]) -> (y: i64[N]) {\n"
        '  %a = rows %m, dim="N" : i64[N]\n  %y = rows %m, dim="N" : i64[N]\n  return %y\n}\n',
        "dimension N is introduced twice",
    ),
    "an introduced dimension that an argument has": (
        "func @f(%m: bool[B, T]) -> (y: i64[T]) {\n"
        '  %y = rows %m, dim="T" : i64[T]\n  return %y\n}\n',
        "dimension T is introduced twice",
    ),
    "a weight that does not exist": (
        GOOD.replace('weight="w"', 'weight="v"'),
        "there is no such weight",
    ),
    "a weight of another type": (
        GOOD.replace('weight weight="w" : f32[4, 4]', 'weight weight="w" : f32[4, 2]'),
        "f32[B, 4] does not meet a weight f32[4, 2]",
    ),
    "an attribute of another kind": (
        GOOD.replace("relu %h", "cumsum %h, dim=1.5"),
        "dim can't be 1.5",
    ),
    "two results of one name": (
        GOOD.replace("(y: f32[B, 4])", "(y: f32[B, 4], y: f32[B, 4])").replace(
            "return %y", "return %y, %x"
        ),
        "two results have the same name",
    ),
}


def test_the_good_one_is_good() -> None:
    verify(parse_module(HEAD + GOOD))


@pytest.mark.parametrize("rule", TEXTS)
def test_text_that_breaks_a_rule(rule: str) -> None:
    text, message = TEXTS[rule]
    with pytest.raises(IRError, match=re.escape(message)):
        verify(parse_module(HEAD + text))


def find(module: Module, kind: type[Op]) -> Any:
    return next(op for op in module.walk() if isinstance(op, kind))


def unnamed_function(m: Module) -> None:
    m.functions = {"g": m.functions["f"]}


def two_arguments_of_one_name(m: Module) -> None:
    first, second = m.functions["f"].args
    second.name = first.name


def unnamed_result(m: Module) -> None:
    m.functions["f"].result_names = ()


def repeated_result(m: Module) -> None:
    f = m.functions["f"]
    f.body.terminator.set_operands([f.returned[0]] * 2)
    f.result_names = ("y", "y")


def wrong_end(m: Module) -> None:
    arm = find(m, ops.If).then
    arm.ops[-1] = ops.Return(list(arm.terminator.operands))
    arm.ops[-1].parent = arm


def lost_parent(m: Module) -> None:
    find(m, ops.Linear).parent = None


def end_in_the_middle(m: Module) -> None:
    body = m.functions["f"].body
    early = ops.Return([m.functions["f"].args[0]])
    early.parent = body
    body.ops.insert(1, early)


def value_of_the_other_arm(m: Module) -> None:
    cond = find(m, ops.If)
    cond.otherwise.terminator.set_operands([find(m, ops.ReLU).y])


def forgotten_use(m: Module) -> None:
    find(m, ops.Linear).x.uses.clear()


def other_result_type(m: Module) -> None:
    find(m, ops.ReLU).y.type = TensorType(DType.F32, ("B", 5))


def other_condition(m: Module) -> None:
    cond = find(m, ops.If)
    cond.set_operands([find(m, ops.Linear).y])


def other_weight_type(m: Module) -> None:
    find(m, ops.Weight).y.type = TensorType(DType.F32, (4, 2))


def missing_weight(m: Module) -> None:
    m.weights.clear()


def wrong_attribute(m: Module) -> None:
    find(m, ops.If).attributes["label"] = 3


def unknown_dimension(m: Module) -> None:
    body = m.functions["f"].body
    cond = m.functions["f"].args[1]
    body.insert_before(body.ops[0], ops.Broadcast(cond, shape=("Q",)))


def dimension_again(m: Module) -> None:
    body = m.functions["f"].body
    cond = m.functions["f"].args[1]
    mask = body.insert_before(body.ops[0], ops.Broadcast(cond, shape=("B", 4)))
    for _ in range(2):
        body.insert_before(body.ops[1], ops.Rows(mask.y, dim="N"))


def no_effect(m: Module) -> None:
    body = m.functions["f"].body
    arms = [Block(), Block()]
    for arm in arms:
        arm.append(ops.Yield([]))
    cond = ops.If(m.functions["f"].args[1], label="", then=arms[0], otherwise=arms[1])
    body.insert_before(body.ops[0], cond)


def empty_weight(m: Module) -> None:
    text = 'module @m\nweight @w : f32[0, 4] = tensor("w", f32[0, 4])\n'
    m.weights = parse_module(text).weights


BROKEN: dict[str, tuple[Callable[[Module], None], ...]] = {
    "is empty or has named dimensions": (empty_weight,),
    "the function is not known under its name": (unnamed_function,),
    "two arguments are named ": (two_arguments_of_one_name,),
    "every result needs a name": (unnamed_result,),
    "two results have the same name": (repeated_result,),
    "a block must end in ": (wrong_end,),
    "the op does not know its block": (lost_parent,),
    " may only end a block": (end_in_the_middle,),
    " is not visible here": (value_of_the_other_arm,),
    " does not know this use": (forgotten_use,),
    " is introduced twice": (dimension_again,),
    "the result types are not the inferred ones (": (other_result_type,),
    "the condition must be bool[], not f32[B, 4]": (other_condition,),
    "there is no such weight": (missing_weight,),
    "the weight has the type ": (other_weight_type,),
    " can't be ": (wrong_attribute,),
    " is not known here": (unknown_dimension,),
    "an op without results has no effect": (no_effect,),
}


@pytest.mark.parametrize(("message", "breaks"), [(m, b) for m, bs in BROKEN.items() for b in bs])
def test_module_that_breaks_a_rule(message: str, breaks: Callable[[Module], None]) -> None:
    module = parse_module(HEAD + GOOD)
    breaks(module)
    with pytest.raises(IRError, match=re.escape(message)):
        verify(module)


def test_every_message_of_the_verifier_is_met() -> None:
    """Each message in its source contains, or is contained in, a message asserted here."""
    tree = ast.parse(inspect.getsource(verifier_module))
    told = {
        part.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("self.fail", "ValueError")
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and len(part.value) > 8
    }
    asserted = {*BROKEN, *(message for _, message in TEXTS.values() if message)}
    assert len(told) >= 14
    for message in told:
        assert any(message in known or known in message for known in asserted), message
