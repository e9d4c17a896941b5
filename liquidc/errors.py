"""Every error that liquidc raises on purpose, and the exit code that it means.

    LiquidError                      4
    ├── InputError                   2   something given to us is wrong
    │   ├── ConfigError                  config.json contradicts itself or is not supported
    │   ├── CheckpointError              a weight file is missing, damaged or of another shape
    │   ├── EngineError                  an engine directory is damaged or of another version
    │   ├── IRError                      IR text or an IR module is not valid
    │   └── UnsupportedError             an operation that liquidc can't translate
    ├── CheckFailed                  1   a check ran and failed
    ├── TargetUnavailable            3   the target can't be built or run on this machine
    └── InternalError                4   a fault of ours

A message is one line: what is wrong, where, and what to do.
"""

from __future__ import annotations


class LiquidWarning(UserWarning):
    """Something given to liquidc is suspicious; it goes on."""


class LiquidError(Exception):
    """The base of all of them."""

    exit_code = 4


class InputError(LiquidError):
    """Something given to liquidc is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A config that is not supported or contradicts itself."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged or does not fit its config."""


class EngineError(InputError):
    """An engine directory that is damaged, incomplete or of another version."""


class IRError(InputError):
    """IR text or a module that is not valid.

    Args:
        message: what is wrong.
        file: the text's file; without it the message stands alone.
        line: from 1.
        column: from 1.
        source: the text's line, shown with a caret under the column.

    Attributes:
        lines: of the whole message, one by one: a name of a file may itself hold a newline.
    """

    def __init__(
        self, message: str, file: str = "", line: int = 0, column: int = 0, source: str = ""
    ) -> None:
        self.file, self.line, self.column = file, line, column
        self.lines = (message,)
        if file:
            caret = " " * (column - 1) + "^"
            self.lines = (f"{file}:{line}:{column}: {message}", f"  {source}", f"  {caret}")
        super().__init__("\n".join(self.lines))


class UnsupportedError(InputError):
    """An operation that liquidc can't translate."""


class CheckFailed(LiquidError):
    """A check ran and did not pass."""

    exit_code = 1


class TargetUnavailable(LiquidError):
    """The target can't be built or run here."""

    exit_code = 3


class InternalError(LiquidError):
    """A fault of ours."""
