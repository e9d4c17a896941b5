"""Runs a module on torch tensors: the oracle of every pass.

Each op has one function, named by its class, written for clarity. A conditional runs only the arm
that is taken. Floating-point maths happens in the dtype of the values, or in float64 throughout
with `exact=True`, which bounds what a pass that reassociates may change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from liquidc.errors import InputError, InternalError
from liquidc.ir import ops, semantics
from liquidc.ir.core import Block, Function, Module, Op, Value
from liquidc.ir.quantised import dequantise, round_inputs
from liquidc.ir.types import Dim, DType, TensorType
from liquidc.ir.weights import WeightSource, materialize, torch_dtype

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class InFloat64:
    """A source whose floats are widened: what is computed with weights is not rounded."""

    source: WeightSource

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `WeightSource`."""
        rows = self.source.read_rows(name, start, stop)
        return rows.double() if rows.is_floating_point() else rows


@dataclass(slots=True)
class Interpreter:
    """Runs the functions of `module`, reading weights from `source` once each.

    Args:
        module: a valid module.
        source: where the weights' tensors are.
        exact: compute in float64 what the module computes in a narrower float.
        ran: filled with the conditionals whose `then` arm ran, in order.
    """

    module: Module
    source: WeightSource | None = None
    exact: bool = False
    ran: list[ops.If] = field(default_factory=list[ops.If])
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def run(self, function: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Call a function.

        Args:
            function: its name.
            inputs: a tensor for every argument, by name.

        Returns:
            The results by name.

        Raises:
            InputError: an input is missing, unknown, or of another dtype or shape.
        """
        body = self.module.functions[function]
        frame = self._bind(body, inputs)
        with torch.no_grad():
            returned = self._block(body.body, frame)
        return dict(zip(body.result_names, returned, strict=True))

    def _bind(self, function: Function, inputs: Mapping[str, Tensor]) -> Frame:
        names = [arg.name for arg in function.args]
        if missing := [name for name in names if name not in inputs]:
            raise InputError(f"@{function.name} needs the input {missing[0]}")
        if unknown := [name for name in inputs if name not in names]:
            raise InputError(f"@{function.name} has no input {unknown[0]}")
        frame = Frame()
        for arg in function.args:
            tensor = inputs[arg.name]
            expected = self.dtype(arg.dtype)
            if tensor.dtype != expected and not (self.exact and tensor.is_floating_point()):
                raise InputError(f"input {arg.name} must be {arg.type}, not {tensor.dtype}")
            if not frame.fits(arg.type, tensor):
                raise InputError(f"input {arg.name} must be {arg.type}, not {list(tensor.shape)}")
            frame.values[arg] = tensor.to(expected)
        return frame

    def dtype(self, dtype: DType) -> torch.dtype:
        """The dtype in which values of type `dtype` are computed."""
        return torch.float64 if self.exact and dtype.is_float else torch_dtype(dtype)

    def weight(self, name: str) -> Tensor:
        """A weight of the module, read once."""
        if name not in self.weights:
            if self.source is None:
                raise InputError(f"weight @{name} needs a checkpoint to be read from")
            expr = self.module.weights[name]
            source = InFloat64(self.source) if self.exact else self.source
            self.weights[name] = materialize(expr, source).to(self.dtype(expr.type.dtype))
        return self.weights[name]

    def _block(self, block: Block, frame: Frame) -> list[Tensor]:
        for op in block.ops[:-1]:
            outputs = self._op(op, frame)
            for value, output in zip(op.results, outputs, strict=True):
                if not frame.fits(value.type, output) or output.dtype != self.dtype(value.dtype):
                    raise InternalError(
                        f"{op!r} computed {output.dtype}{list(output.shape)} for {value.type}"
                    )
                frame.values[value] = output
        return [frame.values[value] for value in block.terminator.operands]

    def _op(self, op: Op, frame: Frame) -> Sequence[Tensor]:
        match op:
            case ops.If():
                if bool(frame.values[op.cond]):
                    self.ran.append(op)
                    return self._block(op.then, frame)
                return self._block(op.otherwise, frame)
            case ops.Weight():
                return [self.weight(op.weight)]
            case ops.Constant():
                flat = torch.tensor(op.value, dtype=self.dtype(op.y.dtype))
                return [flat.reshape(frame.sizes(op.y.shape))]
            case ops.Cast():
                x = frame.values[op.x]
                return [x.ne(0) if op.to == DType.BOOL else x.to(self.dtype(op.to))]
            case ops.FixedGate():
                mask, p = semantics.fixed_gate(frame.values[op.valid], op.run)
                return [mask, p.to(self.dtype(DType.F32))]
            case ops.MapExperts():
                return [self._map_experts(op, frame)]
            case _:
                compute = COMPUTE.get(type(op))
                if compute is None:
                    raise InternalError(f"the interpreter does not know {op.op_name}")
                outputs = compute(op, frame, *(frame.values[value] for value in op.operands))
                return [outputs] if isinstance(outputs, Tensor) else outputs

    def _map_experts(self, op: ops.MapExperts, frame: Frame) -> Tensor:
        """Every expert on every token, masked: the order of sums is that of the regions."""
        x, index, weight = (frame.values[v] for v in (op.x, op.index, op.weight))
        total: Tensor | None = None
        for expert in range(frame.values[op.params[0]].shape[0]):
            share = semantics.expert_weight(index, weight, expert)[..., None].to(x.dtype)
            frame.values[op.body.args[0]] = x * share if op.apply == "input" else x
            for arg, param in zip(op.body.args[1:], op.params, strict=True):
                frame.values[arg] = frame.values[param][expert]
            (y,) = self._block(op.body, frame)
            y = y if op.apply == "input" else y * share
            y = torch.where(semantics.expert_mask(index, expert)[..., None], y, 0.0)
            total = torch.zeros_like(y) + y if total is None else total + y
        if total is None:
            raise InternalError(f"{op!r} has no experts")
        return total


@dataclass(slots=True)
class Frame:
    """Values and sizes of named dimensions during one call."""

    values: dict[Value, Tensor] = field(default_factory=dict[Value, Tensor])
    dims: dict[str, int] = field(default_factory=dict[str, int])

    def size(self, dim: Dim) -> int:
        """The size of a dimension.

        Raises:
            KeyError: a name in it is not bound yet.
        """
        if isinstance(dim, int):
            return dim
        if dim in self.dims:
            return self.dims[dim]
        size = 1
        for part in dim.split("*"):
            size *= int(part) if part.isdigit() else self.dims[part]
        return size

    def sizes(self, shape: Sequence[Dim]) -> tuple[int, ...]:
        """The sizes of a shape."""
        return tuple(self.size(dim) for dim in shape)

    def fits(self, type: TensorType, tensor: Tensor) -> bool:
        """Whether the tensor has that shape; binds names that are met for the first time."""
        shape = tuple(tensor.shape)
        if type.shape == shape:
            return True
        if len(type.shape) != len(shape):
            return False
        for dim, size in zip(type.shape, shape, strict=True):
            if isinstance(dim, str) and "*" not in dim:
                self.dims.setdefault(dim, size)
        return self.sizes(type.shape) == shape


def first_call(args: Sequence[Value], *rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Arguments for sequences of one length on an empty cache, everything else zero."""
    length = len(rows[0])
    named = {"B": len(rows), "T": length, "S": length, "P": 1}
    inputs: dict[str, torch.Tensor] = {}
    for arg in args:
        shape = [dim if isinstance(dim, int) else named[dim] for dim in arg.shape]
        inputs[arg.name] = torch.zeros(shape, dtype=torch_dtype(arg.dtype))
    inputs["input_ids"] = torch.tensor([list(ids) for ids in rows])
    inputs["lengths"] = torch.full([len(rows)], length)
    if "logit_index" in inputs:
        inputs["logit_index"] = torch.full([len(rows), 1], length - 1)
    return inputs


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda op, frame, x: function(x, dim=op.dims, keepdim=op.keep) if op.dims else x


def _where(op: Op, frame: Frame, mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask, a, b)


def _dequantize(
    op: ops.Dequantize, frame: Frame, codes: Tensor, scales: Tensor, zeros: Tensor | None = None
) -> Tensor:
    return dequantise(codes, scales, zeros, op.format).to(scales.dtype)


def _linear(op: ops.Linear, frame: Frame, x: Tensor, *factors: Tensor) -> Tensor:
    return F.linear(_rounded(x, op.input_block), *factors)


def _rounded(x: Tensor, block: int) -> Tensor:
    return round_inputs(x, block) if block else x


def _rms_norm(op: ops.RMSNorm, frame: Frame, x: Tensor, *weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), *weight, eps=op.eps)


def _layer_norm(op: ops.LayerNorm, frame: Frame, x: Tensor, *rest: Tensor) -> Tensor:
    given = iter(rest)
    weight = next(given) if op.weight is not None else None
    bias = next(given) if op.bias is not None else None
    return F.layer_norm(x, (x.shape[-1],), weight, bias, op.eps)


def _slice(op: ops.Slice, frame: Frame, x: Tensor) -> Tensor:
    return x.narrow(op.dim, op.start, op.stop - op.start)


def _gather(op: ops.Gather, frame: Frame, x: Tensor, index: Tensor) -> Tensor:
    shape = (*x.shape[: op.dim], *index.shape, *x.shape[op.dim + 1 :])
    return x.index_select(op.dim, index.reshape(-1)).reshape(shape)


def _max(op: ops.Max, frame: Frame, x: Tensor) -> Tensor:
    return torch.amax(x, dim=op.dims, keepdim=op.keep) if op.dims else x


def _grouped(op: ops.GroupedExperts, frame: Frame, *values: Tensor) -> Tensor:
    x, index, weight, gate_up, down = values

    def swiglu(tokens: Tensor, expert: int) -> Tensor:
        gate, up = F.linear(_rounded(tokens, op.input_block), gate_up[expert]).chunk(2, -1)
        return F.linear(_rounded(F.silu(gate) * up, op.inner_block), down[expert])

    return semantics.map_experts(x, index, weight, gate_up.shape[0], swiglu, op.apply)


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda op, frame, x: function(x)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda op, frame, a, b: function(a, b)


def _semantic(function: Callable[..., Any]) -> Callable[..., Any]:
    """An op whose operands and attributes are the parameters of a function in `semantics`."""

    def compute(op: Op, frame: Frame, *values: Tensor) -> Any:
        given: dict[str, Any] = {
            name: value for name, value in op.attributes.items() if name not in _NAMES_ONLY
        }
        for f in op.fields:
            if f.name in op.segments:
                used = values[op.segments[f.name]]
                given[f.name] = used[0] if used else None
        return function(**given)

    return compute


_NAMES_ONLY = ("layer", "gate", "dim")
"""Attributes that name a place or a dimension and don't change what is computed."""

COMPUTE: dict[type[Op], Callable[..., Any]] = {
    ops.Size: lambda op, frame: torch.tensor(frame.size(op.dim)),
    ops.Iota: lambda op, frame: torch.arange(frame.size(op.dim)),
    ops.Neg: _unary(torch.neg),
    ops.Exp: _unary(torch.exp),
    ops.Log: _unary(torch.log),
    ops.Floor: _unary(torch.floor),
    ops.Sqrt: _unary(torch.sqrt),
    ops.Rsqrt: _unary(torch.rsqrt),
    ops.Sin: _unary(torch.sin),
    ops.Cos: _unary(torch.cos),
    ops.Tanh: _unary(torch.tanh),
    ops.Sigmoid: _unary(torch.sigmoid),
    ops.ReLU: _unary(torch.relu),
    ops.SiLU: _unary(F.silu),
    ops.GELU: lambda op, frame, x: F.gelu(x, approximate=op.approximate),
    ops.Not: _unary(torch.logical_not),
    ops.Add: _binary(torch.add),
    ops.Sub: _binary(torch.sub),
    ops.Mul: _binary(torch.mul),
    ops.Div: _binary(torch.div),
    ops.Maximum: _binary(torch.maximum),
    ops.Minimum: _binary(torch.minimum),
    ops.Eq: _binary(torch.eq),
    ops.Ne: _binary(torch.ne),
    ops.Lt: _binary(torch.lt),
    ops.Le: _binary(torch.le),
    ops.Gt: _binary(torch.gt),
    ops.Ge: _binary(torch.ge),
    ops.And: _binary(torch.logical_and),
    ops.Or: _binary(torch.logical_or),
    ops.Where: _where,
    ops.Reshape: lambda op, frame, x: x.reshape(frame.sizes(op.shape)),
    ops.Broadcast: lambda op, frame, x: x.broadcast_to(frame.sizes(op.shape)),
    ops.AssumeSizes: lambda op, frame, x: x,
    ops.Transpose: lambda op, frame, x: x.permute(op.perm),
    ops.Slice: _slice,
    ops.Concat: lambda op, frame, *xs: torch.cat(xs, op.dim),
    ops.Gather: _gather,
    ops.Sum: _reduce(torch.sum),
    ops.Mean: _reduce(torch.mean),
    ops.Max: _max,
    ops.Any: _reduce(torch.any),
    ops.CumSum: lambda op, frame, x: torch.cumsum(x, op.dim),
    ops.Embed: lambda op, frame, ids, table: F.embedding(ids, table),
    ops.Dequantize: _dequantize,
    ops.Linear: _linear,
    ops.MatMul: _binary(torch.matmul),
    ops.RMSNorm: _rms_norm,
    ops.LayerNorm: _layer_norm,
    ops.Softmax: lambda op, frame, x: torch.softmax(x, op.dim),
    ops.Rope: _semantic(semantics.rope),
    ops.DepthGate: _semantic(semantics.depth_gate),
    ops.Append: _semantic(semantics.append),
    ops.Attend: _semantic(semantics.attend),
    ops.Route: _semantic(semantics.route),
    ops.Renumber: _semantic(semantics.renumber),
    ops.ExpertMask: _semantic(semantics.expert_mask),
    ops.ExpertWeight: _semantic(semantics.expert_weight),
    ops.GroupedExperts: _grouped,
    ops.TakeTokens: _semantic(semantics.take_tokens),
    ops.Rows: _semantic(semantics.rows),
    ops.GatherRows: _semantic(semantics.gather_rows),
    ops.ScatterRows: _semantic(semantics.scatter_rows),
    ops.AppendRows: _semantic(semantics.append_rows),
    ops.AttendRows: _semantic(semantics.attend_rows),
}
"""What each op computes: a function of the op, the frame and the operands' tensors."""
