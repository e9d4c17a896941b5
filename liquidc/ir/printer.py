"""The text form of the IR, written. `parser` reads it back exactly; docs/ir.md shows it."""

from __future__ import annotations

import json
import math

from liquidc.ir.core import Attribute, Block, Field, Function, Module, Op, Value
from liquidc.ir.types import DType, TensorType

INDENT = "  "


def print_module(module: Module) -> str:
    """The whole module, ending in a newline."""
    lines = [f"module @{module.name}"]
    if module.attributes:
        facts = ", ".join(f"{k} = {_attribute(v)}" for k, v in sorted(module.attributes.items()))
        lines[0] += f" {{{facts}}}"
    for name, expr in module.weights.items():
        lines.append(f"weight @{name} : {expr.type} = {expr}")
    for function in module.functions.values():
        lines.append("")
        lines += print_function(function)
    return "\n".join(lines) + "\n"


def print_function(function: Function) -> list[str]:
    """The lines of one function."""
    names = _Names()
    args = ", ".join(f"%{names.define(arg)}: {arg.type}" for arg in function.args)
    returned = zip(function.result_names, function.returned, strict=True)
    signature = ", ".join(f"{name}: {value.type}" for name, value in returned)
    lines = [f"func @{function.name}({args}) -> ({signature}) {{"]
    lines += _block(function.body, names, INDENT)
    return [*lines, "}"]


def print_op(op: Op) -> str:
    """One op for messages: nested blocks as `{...}`, values by their name hints."""
    return _head(op, _Names(strict=False)) + "".join(" {...}" for _ in op.regions)


class _Names:
    """Unique names of the values of one function, from their hints."""

    def __init__(self, *, strict: bool = True) -> None:
        self.strict = strict
        self.of: dict[Value, str] = {}
        self.taken: set[str] = set()
        self.next: dict[str, int] = {}

    def define(self, value: Value) -> str:
        hint = value.name
        name = hint
        while not name or name in self.taken:
            number = self.next.get(hint, 0 if not hint else 1)
            self.next[hint] = number + 1
            name = f"{hint}_{number}" if hint else str(number)
        self.taken.add(name)
        self.of[value] = name
        return name

    def use(self, value: Value) -> str:
        if value not in self.of:
            if self.strict:
                return f"<{value.name or 'value'} out of scope>"
            return f"%{value.name}" if value.name else "%?"
        return f"%{self.of[value]}"


def _block(block: Block, names: _Names, indent: str) -> list[str]:
    lines: list[str] = []
    for op in block.ops:
        lines += _op(op, names, indent)
    return lines


def _op(op: Op, names: _Names, indent: str) -> list[str]:
    regions = list(op.regions.values())
    head = _head(op, names, define=not regions)
    location = f" loc({json.dumps(op.loc.file)}:{op.loc.line})" if op.loc else ""
    if not regions:
        return [f"{indent}{head}{location}"]
    lines: list[str] = []
    for i, block in enumerate(regions):
        args = ", ".join(f"%{names.define(arg)}: {arg.type}" for arg in block.args)
        opening = (f"({args}) " if args else "") + "{"
        if i:
            lines[-1] += f" else {opening}"
        else:
            lines.append(opening)
        lines += _block(block, names, indent + INDENT)
        lines.append(f"{indent}}}")
    results = "".join(f"%{names.define(v)}, " for v in op.results)[:-2]
    first = f"{results} = {head}" if results else head
    lines[0] = f"{indent}{first} {lines[0]}"
    lines[-1] += location
    return lines


def _head(op: Op, names: _Names, *, define: bool = True) -> str:
    parts: list[str] = []
    for f in op.fields:
        if f.name in op.segments:
            values = [names.use(v) for v in op.operands[op.segments[f.name]]]
            if f.kind == "operand":
                parts += values
            elif f.kind == "optional" and values:
                parts.append(f"{f.name}={values[0]}")
            elif f.kind == "variadic":
                parts += values if op.terminator else [f"[{', '.join(values)}]"]
        elif f.kind == "attribute" and op.attributes[f.name] != f.default:
            parts.append(_named_attribute(f, op.attributes[f.name]))
    text = " ".join([op.op_name, ", ".join(parts)]).rstrip()
    if op.results:
        text += " : " + ", ".join(str(v.type) for v in op.results)
        if define:
            text = ", ".join(f"%{names.define(v)}" for v in op.results) + " = " + text
    return text


def _named_attribute(f: Field, value: Attribute) -> str:
    return f"{f.name}={_attribute(value)}"


def _attribute(value: Attribute) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case DType() | TensorType():
            return str(value)
        case str():
            return json.dumps(value, ensure_ascii=False)
        case float():
            return _float(value)
        case tuple():
            return f"[{', '.join(_attribute(item) for item in value)}]"
        case _:
            return str(value)


def _float(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
