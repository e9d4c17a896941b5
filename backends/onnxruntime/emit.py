"""@prefill as one ONNX graph, which serves prefill and decode; the weights lie beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import helper

from liquidc.backends.base import Choices
from liquidc.backends.onnxruntime import (
    emit_attend,
    emit_cache,
    emit_experts,
    emit_nn,
    emit_quantised,
    emit_rope,
    emit_route,
    emit_tensor,
)
from liquidc.backends.onnxruntime.graph import (
    CONTRIB,
    ELEMENT,
    IR_VERSION,
    OPSET,
    Graph,
    Shared,
)
from liquidc.backends.onnxruntime.nodes import mark, mark_witness
from liquidc.backends.onnxruntime.settle import settle, stored, weight_name
from liquidc.backends.onnxruntime.tidy import tidy
from liquidc.errors import UnsupportedError
from liquidc.ir import Block, DType, Function, Module, Op, TensorType, Value, ops, parse_module
from liquidc.ir.experts import layers_of_experts
from liquidc.ir.regions import is_commit, regions_of
from liquidc.ir.types import dim_names
from liquidc.ir.weights import WeightExpr, byte_size, sizes

PARTS = (
    emit_tensor,
    emit_nn,
    emit_rope,
    emit_quantised,
    emit_route,
    emit_experts,
    emit_cache,
    emit_attend,
)
EMIT = {kind: emit for part in PARTS for kind, emit in part.EMIT.items()}


@dataclass(frozen=True)
class Lowered:
    """An ONNX model without its weights, and the weights that it names, in the order stored."""

    model: onnx.ModelProto
    weights: Mapping[str, WeightExpr]


def lower(
    module: Module,
    name: str = "prefill",
    *,
    branching: bool = True,
    choices: Choices | None = None,
) -> Lowered:
    """One function of a module.

    Args:
        module: the IR.
        name: of the function.
        branching: whether experts may be conditionals; without, an expert that no token chose is
            computed on no rows.
        choices: lowerings that were asked for.

    Raises:
        UnsupportedError: an op has no lowering; names it and the line of the model.
    """
    function = module.functions[name]
    shared = Shared(
        module,
        emit_block,
        branching,
        choices or Choices(),
        layers=layers_of_experts(function),
        witnesses={r.witness: r.key for r in regions_of(function) if r.witness is not None},
    )
    graph = Graph(shared)
    inputs = [_info(arg.name, arg.type) for arg in function.args]
    for arg in function.args:
        graph.names[arg] = arg.name
    _sizes(graph, function)
    graph.wanted = _wanted(function)
    emit_block(graph, function.body)
    outputs = [
        _output(graph, name, value)
        for name, value in zip(function.result_names, function.returned, strict=True)
    ]
    weights = [_external(name, expr, shared) for name, expr in shared.weights.items()]
    proto = helper.make_graph(
        graph.nodes, module.name, inputs, outputs, [*shared.initializers, *weights]
    )
    tidy(proto)
    settle(proto)
    model = helper.make_model(
        proto,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        ir_version=IR_VERSION,
        producer_name="liquidc",
    )
    return Lowered(model, dict(shared.weights))


def place(lowered: Lowered, file: str, offsets: Mapping[str, int]) -> onnx.ModelProto:
    """The model whose weights are at `offsets` of `file`."""
    model = onnx.ModelProto()
    model.CopyFrom(lowered.model)
    for tensor in stored(model.graph):
        name = weight_name(tensor)
        length = byte_size(lowered.weights[name].type)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", offsets[name]), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    return model


def read_lowered(model: onnx.ModelProto) -> Lowered:
    """A model that `lower` made: its weights are the expressions in their documentation.

    Raises:
        IRError: one of them can't be read.
    """
    named = {weight_name(tensor): tensor.doc_string for tensor in stored(model.graph)}
    text = "".join(f"weight @{name} : {told}\n" for name, told in named.items())
    return Lowered(model, parse_module(f"module @lowered\n{text}", "the model's weights").weights)


def readers(model: onnx.ModelProto) -> list[str]:
    """Operators of a model that read codes, by name."""

    def kinds(graph: onnx.GraphProto) -> set[str]:
        found = {node.op_type for node in graph.node}
        arms = (attribute.g for node in graph.node for attribute in node.attribute)
        return found.union(*(kinds(arm) for arm in arms if arm.node))

    return sorted(kinds(model.graph) & {"MatMulNBits", "DequantizeLinear", "QMoE"})


def _external(name: str, expr: WeightExpr, shared: Shared) -> onnx.TensorProto:
    """An initialiser without data, documented by the expression that says what it holds."""
    plain = (ELEMENT[expr.type.dtype], sizes(expr.type.shape))
    element, shape = shared.forms.get(name, plain)
    tensor = onnx.TensorProto(name=name, data_type=element)
    tensor.doc_string = f"{expr.type} = {expr}"
    tensor.dims.extend(shape)
    return tensor


def _info(name: str, type: TensorType) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENT[type.dtype], list(type.shape))


def _sizes(graph: Graph, function: Function) -> None:
    """Where each named dimension's size is read: from the first input that has it."""
    for arg in function.args:
        for axis, dim in enumerate(arg.shape):
            if dim_names([dim]) and dim not in graph.dims:
                shape = graph.op("Shape", [arg.name], start=axis, end=axis + 1)
                graph.dims[str(dim)] = shape


def _wanted(function: Function) -> dict[Value, str]:
    """Names that results have from the start, so that caches need no copy."""
    wanted: dict[Value, str] = {}
    for name, value in zip(function.result_names, function.returned, strict=True):
        if value.op is not None and value not in wanted:
            wanted[value] = name
    return wanted


def _output(graph: Graph, name: str, value: Value) -> onnx.ValueInfoProto:
    if graph.names.get(value) != name:
        graph.op("Identity", [graph.name(value)], outputs=[name])
    return _info(name, value.type)


def emit_block(graph: Graph, block: Block) -> None:
    """Add the nodes of a block's ops, except its terminator."""
    for op in block.ops[:-1]:
        if isinstance(op, ops.Weight):
            continue
        if isinstance(op, ops.If):
            _conditional(graph, op)
            continue
        emit = EMIT.get(type(op))
        if emit is None:
            raise UnsupportedError(f"onnxruntime: no lowering of {_where(op)}")
        before = len(graph.nodes)
        names = emit(graph, op)
        if op in graph.shared.witnesses:
            mark_witness(graph.nodes[before:], *graph.shared.witnesses[op])
        if isinstance(op, ops.Embed) and op.ids.name == "input_ids":
            mark(graph.nodes[-1], "tokens")
        for value, name in zip(op.results, names, strict=False):
            graph.names[value] = name


def _where(op: Op) -> str:
    return f"{op.op_name} at {op.loc}" if op.loc else op.op_name


def _conditional(graph: Graph, op: ops.If) -> None:
    label = op.label or "if"
    arms: list[Graph] = []
    for block, part in ((op.then, "run"), (op.otherwise, "skip")):
        arm = graph.arm(f"{label}/{part}")
        emit_block(arm, block)
        yielded = zip(op.results, block.terminator.operands, strict=True)
        arm.finish(
            [
                arm.flat(arm.name(value), value.shape)
                if _in_rows(graph, result)
                else arm.name(value)
                for result, value in yielded
            ]
        )
        arms.append(arm)
    names = [
        graph.wanted.get(v) or graph.shared.unique(f"{label}:{i}") for i, v in enumerate(op.results)
    ]
    graph.conditional(graph.name(op.cond), arms[0], arms[1], len(names), outputs=names)
    if op.role:
        role = "commit" if is_commit(op) else op.role
        numbers = {"gate": (op.gate, op.region), "expert": (op.layer, op.expert)}
        mark(graph.nodes[-1], role, *numbers.get(role, ()))
    for value, name in zip(op.results, names, strict=True):
        rows = _in_rows(graph, value)
        graph.names[value] = graph.unflat(name, value.shape) if rows else name


def _in_rows(graph: Graph, result: Value) -> bool:
    """Whether a conditional yields rows: hidden states, which products and norms read so."""
    hidden = result.type.rank == 3 and result.dtype is DType.F32
    return hidden and isinstance(result.shape[-1], int) and result not in graph.wanted
