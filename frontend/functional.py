"""Graphs of `torch.export` with fewer operators: nothing in place, and what can be taken apart is.

A graph whose operators all have a translation stays as it is. Else `run_decompositions` replaces
operations in place by functions of tensors, and takes operators apart that have no translation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx

from liquidc.errors import UnsupportedError
from liquidc.frontend.source_lines import place

ASSERTIONS = ("aten._assert_scalar.default", "aten._assert_tensor_metadata.default")
"""Checks that the tracer adds for sizes and dtypes, which the verifier makes again."""

WROTE = "wrote"
"""Key of a node's `meta`: the operator that the model called, where it was taken apart."""


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same computation without operations in place.

    Raises:
        UnsupportedError: the model changes its parameters or buffers, or uses random numbers.
    """
    if not all(_known(node.target) for node in _calls(program.graph_module)):
        program = _decomposed(program)
    for node in _calls(program.graph_module):
        if _known(node.target):
            continue
        origins: list[Any] = node.meta.get("from_node") or [node]
        node.meta[WROTE] = str(origins[-1].target)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise UnsupportedError(
                f"the operator {node.meta[WROTE]} gives random numbers{_at(node)}: an engine gives "
                "the same result for the same input"
            )
    _refuse_state(program)
    return program


def _decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with nothing in place, and with operators taken apart as far as that works."""
    for node in program.graph.nodes:
        node.meta.pop("custom", None)  # annotations of tracing, which the next one repeats
    for arm in program.graph_module.modules():
        if isinstance(arm, fx.GraphModule) and arm is not program.graph_module:
            _fill_constants(arm)
    try:
        return program.run_decompositions(_decompositions())
    except Exception:  # PyTorch's own rules fail in their own ways: keep what can't be taken apart
        return program.run_decompositions({})


def _fill_constants(arm: fx.GraphModule) -> None:
    """Write the single numbers that an arm of a conditional keeps as `full`.

    `run_decompositions` fails where an arm assigns a tensor that it keeps.
    """
    for node in arm.graph.find_nodes(op="get_attr"):
        kept = getattr(arm, str(node.target), None)
        if isinstance(kept, torch.Tensor) and kept.numel() == 1:
            delattr(arm, str(node.target))
            with arm.graph.inserting_before(node):
                full = torch.ops.aten.full.default
                args = (list(kept.shape), kept.item())
                made = arm.graph.call_function(full, args, {"dtype": kept.dtype})
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            arm.graph.erase_node(node)
    arm.recompile()


def _known(target: Any) -> bool:
    """Whether an operator has a translation."""
    from liquidc.frontend.operators import OPERATORS

    name = str(target)
    if not isinstance(target, torch._ops.OperatorBase):  # pyright: ignore[reportPrivateUsage]
        return True  # a function of Python, on sizes
    return name in OPERATORS or name in ASSERTIONS or name.startswith("aten.sym_")


def _calls(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The operators called by a graph and by the arms of its conditionals."""
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            yield from (node for node in inner.graph.nodes if node.op == "call_function")


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """How operators are taken apart that have no translation."""
    from torch._decomp import decomposition_table

    every = {**decomposition_table, **torch.export.default_decompositions()}
    return {op: taken for op, taken in every.items() if not _known(op)}


def _refuse_state(program: torch.export.ExportedProgram) -> None:
    """Refuse a model that changes its parameters or buffers."""
    changed = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.output_specs
        if spec.kind.name in ("BUFFER_MUTATION", "PARAMETER_MUTATION")
    }
    for node in program.graph.nodes:
        if node.name in changed:
            name = str(changed[node.name]).removeprefix("part.")
            raise UnsupportedError(
                f"the model changes its own {name}{_at(node)}: an engine keeps no state from call "
                "to call, except in a protocol.LayerCache"
            )


def results(program: torch.export.ExportedProgram) -> list[fx.Node]:
    """What the exported function returned, without inputs that it changed in place."""
    returned = [
        cast(Any, spec.arg).name
        for spec in program.graph_signature.output_specs
        if spec.kind.name == "USER_OUTPUT"
    ]
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    count = len(cast("tuple[Any, ...]", output.args[0])) - len(returned)
    return list(cast("tuple[fx.Node, ...]", output.args[0])[count:])


def user_inputs(program: torch.export.ExportedProgram) -> list[fx.Node]:
    """The placeholders of tensors that the caller gives."""
    names = set(program.graph_signature.user_inputs)
    return [
        node
        for node in program.graph.nodes
        if node.op == "placeholder"
        and node.name in names
        and isinstance(node.meta.get("val"), torch.Tensor)
    ]


def _at(node: fx.Node) -> str:
    where = place(node.meta.get("stack_trace"))
    return f" at {where}" if where else ""
