"""Clean-up that Ctrl-C, SIGTERM and SIGHUP can't cut short."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to stop; `signum` is its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interruptible:
    """Inside `with`, the first signal raises `Interrupted`; once `hold` is called none does.

    A signal that arrives while it is held is raised by `release`; one that arrives after the last
    `hold` is dropped, for the work is done or undone by then. Outside the main thread, where
    Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._held = False
        self._pending: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def hold(self) -> None:
        """From here on, remember signals instead of raising them."""
        while not self._held:
            try:
                self._held = True
            except Interrupted as stop:
                self._pending = stop.signum

    def release(self) -> None:
        """Raise signals again, at once if one is remembered."""
        self._held = False
        if self._pending is not None:
            signum, self._pending = self._pending, None
            raise Interrupted(signum)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._held:
            self._pending = signum
        else:
            raise Interrupted(signum)
