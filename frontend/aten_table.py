"""The table of translations of ATen operators, which `aten` and `aten_shapes` fill."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from liquidc.frontend.importer import Import, Importer
from liquidc.ir import TensorType, Value

TABLE: dict[str, Import] = {}


def translates(*names: str) -> Callable[[Import], Import]:
    """Register a translation for operators, named as `torch.ops` prints them."""

    def register(function: Import) -> Import:
        TABLE.update(dict.fromkeys(names, function))
        return function

    return register


def out_type(imp: Importer, node: fx.Node) -> TensorType:
    """The type of the node's result."""
    return imp.type_of(node.meta["val"])


def dim_of(value: Value, dim: int) -> int:
    """`dim` counted from the front."""
    return dim % max(value.type.rank, 1)
