"""Reads the text form that `printer` writes; errors carry file, line, column and a caret."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from liquidc.errors import IRError
from liquidc.ir.core import OPS, Attribute, Block, Function, Location, Module, Op, Value
from liquidc.ir.types import Dim, DType, TensorType, is_dim
from liquidc.ir.weight_maths import FUNCTIONS
from liquidc.ir.weights import WeightExpr

_TOKEN = re.compile(
    r"""(?:\s+|//[^\n]*)*+
      (?:
        (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<value>%[\w.]+)
      | (?P<symbol>@[\w.]+)
      | (?P<number>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.*])|-inf\b)
      | (?P<word>(?:\d+\*)?[A-Za-z_][\w.]*(?:\*[A-Za-z_]\w*)*)
      | (?P<punct>->|[()\[\]{}:,=])
      | (?P<end>\Z)
      | (?P<unknown>.)
      )""",
    re.VERBOSE,
)
T = TypeVar("T")
MAX_BYTES = 256 * 1024 * 1024
"""Limit of a file of IR."""
MAX_DEPTH = 100
"""Blocks and lists nest at most this deep."""


def parse_module(text: str, file: str = "<text>") -> Module:
    """Read a module.

    Raises:
        IRError: the text is not a module; the message shows the place.
    """
    return _Parser(text, file).module()


@dataclass(slots=True)
class _Token:
    kind: str
    text: str
    start: int


@dataclass(slots=True)
class _Scope:
    """Names visible in a block, through its parents."""

    parent: _Scope | None = None
    values: dict[str, Value] = field(default_factory=dict[str, Value])

    def find(self, name: str) -> Value | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.parent
        return None


class _Parser:
    def __init__(self, text: str, file: str) -> None:
        self.text, self.file = text, file
        self.tokens = self._scan()
        self.at = 0
        self.depth = 0
        self.defined: set[str] = set()

    def _scan(self) -> list[_Token]:
        tokens: list[_Token] = []
        for match in _TOKEN.finditer(self.text):
            kind = match.lastgroup or ""
            start, end = match.span(kind)
            if kind == "unknown":
                raise self.error(f"unexpected character {self.text[start]!r}", start)
            if kind == "end":
                break
            tokens.append(_Token(kind, self.text[start:end], start))
        tokens.append(_Token("end", "end of file", len(self.text)))
        return tokens

    # Reading tokens

    def error(self, message: str, at: int | None = None) -> IRError:
        start = self.tokens[self.at].start if at is None else at
        line = self.text.count("\n", 0, start) + 1
        begin = self.text.rfind("\n", 0, start) + 1
        end = self.text.find("\n", start)
        source = self.text[begin : len(self.text) if end < 0 else end]
        return IRError(message, self.file, line, start - begin + 1, source)

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def take(self, kind: str, what: str) -> str:
        token = self.token
        if token.kind != kind:
            raise self.error(f"expected {what}, found {token.text!r}")
        self.at += 1
        return token.text

    def accept(self, text: str) -> bool:
        token = self.tokens[self.at]
        if token.text == text and token.kind in ("punct", "word"):
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise self.error(f"expected {text!r}, found {self.token.text!r}")

    def many(self, item: Callable[[], T], end: str) -> list[T]:
        """Items between commas up to `end`, which is taken."""
        items: list[T] = []
        if self.accept(end):
            return items
        while True:
            items.append(item())
            if self.accept(end):
                return items
            self.expect(",")

    def nested(self, read: Callable[[], T]) -> T:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH}")
        result = read()
        self.depth -= 1
        return result

    def guarded(self, make: Callable[[], T], at: int) -> T:
        """Run a constructor of the IR; what it finds wrong is an error at `at`."""
        try:
            return make()
        except IRError:
            raise
        except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            raise self.error(str(error), at) from None

    # The grammar

    def module(self) -> Module:
        self.expect("module")
        module = Module(self.take("symbol", "the module's name")[1:])
        if self.accept("{"):
            for name, value in self.many(self.fact, "}"):
                module.attributes[name] = value
        while self.token.kind != "end":
            at = self.token.start
            if self.accept("weight"):
                name = self.take("symbol", "a weight's name")[1:]
                self.expect(":")
                declared = self.type()
                self.expect("=")
                expr = self.weight()
                if name in module.weights:
                    raise self.error(f"weight @{name} is defined twice", at)
                if expr.type != declared:
                    raise self.error(f"the expression has the type {expr.type}", at)
                module.weights[name] = expr
            elif self.accept("func"):
                function = self.function()
                if function.name in module.functions:
                    raise self.error(f"function @{function.name} is defined twice", at)
                module.add(function)
            else:
                raise self.error(f"expected 'weight' or 'func', found {self.token.text!r}")
        return module

    def fact(self) -> tuple[str, Attribute]:
        name = self.take("word", "a name")
        self.expect("=")
        return name, self.attribute()

    def function(self) -> Function:
        name = self.take("symbol", "the function's name")[1:]
        self.expect("(")
        self.defined = set()
        scope = _Scope()
        args = self.many(self.argument, ")")
        function = Function(name, args)
        for value in function.args:
            self.define(scope, value.name, value)
        self.expect("->")
        self.expect("(")
        signature = self.many(self.named_type, ")")
        function.result_names = tuple(name for name, _ in signature)
        at = self.token.start
        self.expect("{")
        self.block(function.body, scope)
        if not function.body.ops:
            raise self.error("a function ends in return", at)
        types = [value.type for value in function.returned]
        if types != [t for _, t in signature]:
            given = ", ".join(map(str, types))
            raise self.error(f"@{name} returns ({given}), not what it declares", at)
        return function

    def argument(self) -> tuple[str, TensorType]:
        name = self.take("value", "an argument")[1:]
        self.expect(":")
        return name, self.type()

    def named_type(self) -> tuple[str, TensorType]:
        name = self.take("word", "a result's name")
        self.expect(":")
        return name, self.type()

    def define(self, scope: _Scope, name: str, value: Value) -> None:
        if name in self.defined:
            raise self.error(f"%{name} is defined twice")
        self.defined.add(name)
        value.name = "" if name.isdigit() else name
        scope.values[name] = value

    def block(self, block: Block, scope: _Scope) -> None:
        """Ops up to the closing brace, which is taken."""

        def body() -> None:
            while not self.accept("}"):
                block.append(self.op(scope))

        self.nested(body)

    def op(self, scope: _Scope) -> Op:
        at = self.token.start
        names = [self.take("value", "a value")[1:]] if self.token.kind == "value" else []
        while names and self.accept(","):
            names.append(self.take("value", "a value")[1:])
        if names:
            self.expect("=")
        here = self.token.start
        word = self.take("word", "an op")
        cls = OPS.get(word)
        if cls is None:
            raise self.error(f"unknown op {word!r}", here)
        given = self.operands(cls, scope)
        types = self.types() if self.accept(":") else []
        for f in cls.fields:
            if f.kind == "region":
                given[f.name] = self.region(f.name == "otherwise", scope)
        loc = self.location()
        if not cls.infers():
            given["result_types"] = types
        op = self.guarded(lambda: cls(**given, loc=loc), at)
        if [value.type for value in op.results] != types:
            found = ", ".join(str(value.type) for value in op.results) or "nothing"
            raise self.error(f"{word} yields {found}, not what is declared", at)
        if len(names) != len(op.results):
            raise self.error(f"{word} has {len(op.results)} results, not {len(names)}", at)
        for name, value in zip(names, op.results, strict=True):
            self.define(scope, name, value)
        return op

    def operands(self, cls: type[Op], scope: _Scope) -> dict[str, Any]:
        """Operands and attributes by field name, up to what ends the list."""
        given: dict[str, Any] = {}
        fields = {f.name: f for f in cls.fields}
        order = [f for f in cls.fields if f.kind in ("operand", "variadic")]
        if cls.terminator:
            values: list[Value] = []
            while self.token.kind == "value":
                values.append(self.use(scope))
                if not self.accept(","):
                    break
            return {order[0].name: values}
        while self.token.kind in ("value", "word") or self.token.text == "[":
            at = self.token.start
            if self.token.kind == "word":
                name = self.take("word", "a name")
                f = fields.get(name)
                if f is None or f.kind not in ("optional", "attribute") or name in given:
                    raise self.error(f"{cls.op_name} takes no {name!r} here", at)
                self.expect("=")
                given[name] = self.use(scope) if f.kind == "optional" else self.attribute()
            elif not order:
                raise self.error(f"too many operands for {cls.op_name}", at)
            elif order[0].kind == "operand":
                given[order.pop(0).name] = self.use(scope)
            else:
                self.expect("[")
                given[order.pop(0).name] = self.many(lambda: self.use(scope), "]")
            if not self.accept(","):
                break
        return given

    def use(self, scope: _Scope) -> Value:
        at = self.token.start
        name = self.take("value", "a value")[1:]
        value = scope.find(name)
        if value is None:
            hidden = " (it is defined in a block that has ended)" if name in self.defined else ""
            raise self.error(f"%{name} is not visible here{hidden}", at)
        return value

    def region(self, second: bool, scope: _Scope) -> Block:
        if second:
            self.expect("else")
        args = self.many(self.argument, ")") if self.accept("(") else []
        block, inner = Block(args), _Scope(scope)
        for value in block.args:
            self.define(inner, value.name, value)
        at = self.token.start
        self.expect("{")
        self.block(block, inner)
        if not block.ops or not block.terminator.terminator:
            raise self.error("a block ends in yield", at)
        return block

    def location(self) -> Location | None:
        if not (self.token.text == "loc" and self.token.kind == "word"):
            return None
        self.at += 1
        self.expect("(")
        file = self.string()
        self.expect(":")
        line = int(self.integer())
        self.expect(")")
        return Location(file, line)

    def types(self) -> list[TensorType]:
        types = [self.type()]
        while self.accept(","):
            types.append(self.type())
        return types

    def type(self) -> TensorType:
        at = self.token.start
        word = self.take("word", "a type")
        if word not in set(DType):
            raise self.error(f"unknown element type {word!r}", at)
        self.expect("[")
        return TensorType(DType(word), tuple(self.many(self.dim, "]")))

    def dim(self) -> Dim:
        at = self.token.start
        if self.token.kind == "number":
            size = int(self.integer())
            if size < 0:
                raise self.error("a size is not negative", at)
            return size
        name = self.take("word", "a size or a dimension's name")
        if not is_dim(name):
            raise self.error(f"{name!r} is no dimension", at)
        return name

    def integer(self) -> str:
        at = self.token.start
        text = self.take("number", "an integer")
        if not re.fullmatch(r"-?\d{1,18}", text):
            raise self.error(f"expected an integer, found {text!r}", at)
        return text

    def string(self) -> str:
        at = self.token.start
        text = self.take("string", "a string")
        return self.guarded(lambda: str(json.loads(text)), at)

    def attribute(self) -> Attribute:
        token = self.token
        if token.kind == "string":
            return self.string()
        if token.kind == "number":
            self.at += 1
            if re.fullmatch(r"-?\d+", token.text):
                return self.guarded(lambda: int(token.text), token.start)
            return float(token.text)
        if self.accept("["):
            items: list[Any] = self.nested(lambda: self.many(self.attribute, "]"))
            return tuple(items)
        word = self.take("word", "a value")
        if word in ("true", "false"):
            return word == "true"
        if word in ("nan", "inf"):
            return float(word)
        if word in set(DType):
            if self.token.text == "[":
                self.at -= 1
                return self.type()
            return DType(word)
        raise self.error(f"expected an attribute, found {word!r}", token.start)

    def weight(self) -> WeightExpr:
        at = self.token.start
        name = self.take("word", "an expression over weights")
        make = FUNCTIONS.get(name)
        if make is None:
            raise self.error(f"unknown weight expression {name!r}", at)
        self.expect("(")
        args = self.nested(lambda: self.many(self.weight_argument, ")"))
        return self.guarded(lambda: make(*args), at)

    def weight_argument(self) -> Any:
        token = self.token
        if token.kind == "word" and token.text in FUNCTIONS:
            return self.weight()
        if self.accept("["):
            return self.nested(lambda: self.many(self.weight_argument, "]"))
        return self.attribute()
