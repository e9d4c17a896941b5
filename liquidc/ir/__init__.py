"""The intermediate representation: types, ops, verifier, text, rewriter, interpreter.

docs/ir.md describes it on one page. `liquidc.ir.interpreter` needs torch and is imported apart.
"""

from liquidc.ir import ops
from liquidc.ir.core import Block, Function, Location, Module, Op, Value
from liquidc.ir.parser import parse_module
from liquidc.ir.printer import print_module, print_op
from liquidc.ir.types import Dim, DType, TensorType
from liquidc.ir.verifier import verify

__all__ = [
    "Block",
    "DType",
    "Dim",
    "Function",
    "Location",
    "Module",
    "Op",
    "TensorType",
    "Value",
    "ops",
    "parse_module",
    "print_module",
    "print_op",
    "verify",
]
