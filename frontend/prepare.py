"""A module made ready to be traced: a copy in float32 whose tensors all have a name."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liquidc.errors import CheckpointError, UnsupportedError
from liquidc.frontend.fingerprint import Identity, attributes, plain
from liquidc.frontend.source_lines import stable_path

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Raises:
        UnsupportedError: it is compiled by TorchScript.
    """
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise UnsupportedError(
                "a TorchScript module can't be traced: give the Python module it was made from"
            )
        inner = model._modules.get("_orig_mod")  # pyright: ignore[reportPrivateUsage]
        if isinstance(model, parallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and tensors that are plain attributes, under each of their names."""
    named = dict[str, Tensor](model.named_parameters(remove_duplicate=False))
    named |= model.named_buffers(remove_duplicate=False)
    for path, child in model.named_modules(remove_duplicate=False):
        for name, value in _plain_tensors(child):
            named[f"{path}.{name}" if path else name] = value
    return named


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose values can't be stored in an engine; those not used count too.

    Raises:
        CheckpointError: a tensor has no values, or a weight is not finite.
    """
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            kind = type(tensor).__name__
            raise CheckpointError(f"{name} is of type {kind}: make it a plain tensor")
        if tensor.device.type == "meta":
            raise CheckpointError(f"{name} is on the meta device and has no values: load it first")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{name} is a sparse or quantized tensor: make it a dense one")
        if tensor.dtype not in _FLOATS:
            continue
        if isinstance(tensor, nn.Parameter) and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"the weight {name} holds NaN or infinity")
        if bool(tensor.isnan().any()):  # infinity has a meaning in masks
            raise CheckpointError(f"the buffer {name} holds NaN")


def prepared(model: nn.Module) -> nn.Module:
    """A copy of the module to trace, in evaluation mode; its tensors are not copied.

    Floating-point tensors are float32, as after `model.float()`, and those that are plain
    attributes are buffers. A module on the meta device that is so already is given back itself.

    Raises:
        UnsupportedError: it can't be copied.
    """
    tensors = named_tensors(model)
    ready = all(t.device.type == "meta" and _single(t) is t for t in tensors.values())
    if ready and not any(m.training or any(_plain_tensors(m)) for m in model.modules()):
        return model
    memo: dict[int, Any] = {id(t): _single(t) for t in tensors.values()}
    try:
        copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(
            f"{type(model).__name__} can't be copied to be traced: {reason}"
        ) from error
    for child in copied.modules():
        for name, value in list(_plain_tensors(child)):
            if not hasattr(type(child), name):  # else the class's attribute would be found first
                delattr(child, name)
                child.register_buffer(name, value, persistent=False)
    return copied.eval()


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield name, value


def _single(tensor: Tensor) -> Tensor:
    """The tensor itself, or an empty one of its shape in float32."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float32:
        return tensor
    empty = torch.empty_like(tensor, dtype=torch.float32, requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


# What forward may not do


class StateCheck:
    """Finds the attributes that a module's forward changes, which an engine can't do.

    Args:
        module: before its forward runs.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = self._state()

    def _state(self) -> dict[tuple[str, str], tuple[nn.Module, Hashable]]:
        state: dict[tuple[str, str], tuple[nn.Module, Hashable]] = {}
        for path, child in self._module.named_modules():
            kept = {name: plain(value, _kind) for name, value in attributes(child).items()}
            kept |= {name: Identity(value) for name, value in child.named_buffers("", False)}
            state |= {(path, name): (child, key) for name, key in kept.items()}
        return state

    def refuse_changes(self) -> None:
        """Compare with the attributes as they were.

        A tensor in a new attribute, or in one that was None, is no change: nothing can have been
        computed with it before.

        Raises:
            UnsupportedError: one has changed; names it and the line that assigns it.
        """
        for (path, name), (child, now) in self._state().items():
            _, before = self._before.get((path, name), (child, plain(None)))
            fresh = before == plain(None) and isinstance(getattr(child, name), Tensor | tuple)
            if now != before and not fresh:
                where = _assignment(type(child), name)
                raise UnsupportedError(
                    f"the forward of {type(child).__name__} changes its attribute {name}{where}: "
                    "an engine keeps no state from call to call; compute it from the inputs"
                )


def _kind(value: Any) -> Hashable:
    return Tensor if isinstance(value, Tensor) else type(value)


def _assignment(cls: type, name: str) -> str:
    """` at model.py:7: `self.n += 1`` for the first line outside __init__ that assigns `name`."""
    assigns = re.compile(rf"\w\.{name}\b(\[[^]]*\])?\s*([-+*/%&|^@]|//|<<|>>|\*\*)?=(?!=)")
    for method, function in vars(cls).items():
        if method == "__init__" or not inspect.isfunction(function):
            continue
        try:
            lines, first = inspect.getsourcelines(function)
            file = stable_path(Path(inspect.getfile(function)))
        except (OSError, TypeError):
            continue
        for number, line in enumerate(lines, first):
            if assigns.search(line):
                return f" at {file}:{number}: `{line.strip()}`"
    return ""
