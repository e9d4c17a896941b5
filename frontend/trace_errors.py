"""Why a model could not be traced, in one line with the model's own line."""

from __future__ import annotations

import re
import traceback

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from liquidc.frontend.source_lines import place

DATA = (
    "Python needs the value of a tensor, which is known only when the engine runs; "
    "use torch.where, or protocol.gated for a branch"
)

_INNER = re.compile(r"with fake tensors: .* got \w+\((?P<quote>['\"])(?P<text>.+?)(?P=quote)\)")
"""How the tracer of arms tells an operator's own error."""
_CHANGED = re.compile(r"submodule `(?:part\.)?(?P<path>[\w.]+)`: .* is not an instance of")
"""How torch.export fails to restore an attribute of the class that forward assigned to."""


def reason(error: Exception) -> str:
    """The message for an exception of `torch.export`."""
    stack = "".join(traceback.format_tb(error.__traceback__)) + str(error)
    where = place(stack)
    at = f" {where}" if where else ""
    return f"torch.export can't trace{at}: {_why(error)} (docs/protocol.md)"


def _why(error: BaseException) -> str:
    if isinstance(error, GuardOnDataDependentSymNode):
        return DATA
    if "is not functional" in str(error):
        return "an arm of a conditional changes an operand in place: clone it first"
    if changed := _CHANGED.search(str(error)):
        return (
            f"forward changes the attribute {changed['path']}: an engine keeps no state from call "
            "to call; compute it from the inputs"
        )
    if error.__cause__ is not None:
        return _why(error.__cause__)
    if inner := _INNER.search(str(error)):
        return inner["text"]
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith(":")]
    return lines[0].strip() if lines else type(error).__name__
