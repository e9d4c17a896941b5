"""What a module's trace depends on, as a key by which traces are shared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from torch import nn


class Identity:
    """An object as a key: equal to itself alone, and kept alive so that its id stays its own."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def fingerprint(module: nn.Module) -> Hashable:
    """What a module's trace depends on: classes, attributes, shapes, ties; not its weights.

    Two modules with equal fingerprints are traced once. An attribute that is neither plain data nor
    a tensor of the module is compared by identity.
    """
    first: dict[int, int] = {}
    named = (module.named_parameters, module.named_buffers)
    tensors = [t for tensors in named for _, t in tensors(remove_duplicate=False)]
    ties = tuple(first.setdefault(id(t), i) for i, t in enumerate(tensors))
    return (_of_module(module), ties)


def _of_module(module: nn.Module) -> Hashable:
    own = attributes(module)
    own |= {k: tuple(vars(module)[k].values()) for k in _HOOKS}
    kept = tuple((k, plain(own[k])) for k in sorted(own))
    tensors = [
        (name, tuple(t.shape), t.dtype)
        for named in (module.named_parameters, module.named_buffers)
        for name, t in named(recurse=False)
    ]
    absent = tuple(name for name, t in module._parameters.items() if t is None)  # pyright: ignore
    children = tuple((name, _of_module(child)) for name, child in module.named_children())
    return (type(module), kept, tuple(tensors), absent, children)


def attributes(module: nn.Module) -> dict[str, Any]:
    """What the model itself keeps in a module, apart from parameters, buffers and children."""
    return {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}


def plain(value: Any, other: Callable[[Any], Hashable] = Identity) -> Hashable:
    """A key that is equal for equal plain data; for anything else, `other` of the object."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return (type(value).__name__, repr(value))
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        return (type(items).__name__, *(plain(item, other) for item in items))
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return ("dict", *((plain(k, other), plain(v, other)) for k, v in items))
    if is_dataclass(value) and not isinstance(value, type):
        told = ((f.name, plain(getattr(value, f.name), other)) for f in fields(value))
        return (type(value), *told)
    return other(value)
