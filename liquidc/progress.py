"""What a compile tells about itself while it runs."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told what a compile is doing."""

    def stage(self, name: str, total: int) -> None:
        """A stage begins; `total` bytes of weights will be written, 0 if none."""
        ...

    def advance(self, amount: int) -> None:
        """So many bytes more were written."""
        ...

    def part(self, what: str, done: int, total: int) -> None:
        """Of `total` parts of a stage that writes nothing, so many are done."""
        ...

    def note(self, text: str) -> None:
        """A message for the person waiting."""
        ...

    def done(self, name: str, seconds: float) -> None:
        """The stage is over."""
        ...


class Silent:
    """Progress that nobody sees."""

    def stage(self, name: str, total: int) -> None:
        """Nothing."""

    def advance(self, amount: int) -> None:
        """Nothing."""

    def part(self, what: str, done: int, total: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def done(self, name: str, seconds: float) -> None:
        """Nothing."""
