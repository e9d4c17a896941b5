"""A function of tensors as a graph of `torch.export`, traced with sizes as symbols."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx.traceback import annotate_fn, preserve_node_meta

from liquidc.errors import InputError, UnsupportedError
from liquidc.frontend.functional import functional
from liquidc.frontend.sizes import Sizes
from liquidc.frontend.trace_errors import reason

R = TypeVar("R")


class Traced(nn.Module):
    """What is exported: `call` as a module whose forward tells the tracer what it needs to know.

    Attributes:
        sizes: what was found out about sizes while it was traced.
        limits: the largest sizes that the engine will serve, by the names of dimensions.
    """

    def __init__(self) -> None:
        super().__init__()
        # An object, since torch.export takes back what forward assigns to attributes.
        self.sizes = Sizes()
        self.limits: dict[str, int] = {}

    def forward(self, args: tuple[Any, ...]) -> Any:
        """What `call(*args)` returns."""
        self.sizes.note(args)
        return self.call(*args)

    def call(self, *args: Any) -> Any:
        """The function."""
        raise NotImplementedError


def export(part: Traced, args: tuple[Any, ...], shapes: Any) -> torch.export.ExportedProgram:
    """The graph of `part`, functional, which keeps the semantic operators whole.

    Args:
        part: what is traced.
        args: example arguments.
        shapes: `dynamic_shapes` of `torch.export.export`.

    Raises:
        SizeLimits: the graph is right up to some sizes only.
        UnsupportedError: the model can't be traced, or is wrong.
    """
    part.sizes = Sizes()
    try:
        # Without preserve_node_meta nodes in the arms of torch.cond lose their source lines.
        with torch.no_grad(), preserve_node_meta(), warnings.catch_warnings(), part.sizes.watched():
            warnings.simplefilter("ignore")
            program = torch.export.export(part, args, dynamic_shapes=shapes, strict=False)
            program = functional(program)
    except InputError:
        raise
    except Exception as error:
        if (told := _told(error)) is not None:
            raise told from None
        part.sizes.check_guards(shapes)
        raise UnsupportedError(reason(error)) from error
    part.sizes.check_guards(shapes)
    part.sizes.check_decisions(shapes, part.limits)
    return program


def _told(error: BaseException | None) -> InputError | None:
    """The error of ours in whose place PyTorch raised `error` while it cleaned up."""
    while error is not None and not isinstance(error, InputError):
        error = error.__context__
    return error


def traced(function: Callable[..., R]) -> Callable[..., R]:
    """`function`, traced with its lines; `torch.export` keeps those of `forward` alone."""
    return annotate_fn({})(function)
