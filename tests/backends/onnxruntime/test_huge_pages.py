"""Memory that the runtime allocates is advised to be in large pages, and nothing else."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest

from liquidc.backends.onnxruntime import huge_pages as module
from liquidc.backends.onnxruntime.huge_pages import MADV_COLLAPSE, MADV_HUGEPAGE, SIZE, huge_pages

linux = pytest.mark.skipif(not module.MAPS.exists(), reason="there is no /proc/self/maps")


class Libc:
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def madvise(self, address: Any, length: Any, advice: int) -> int:
        self.asked.append((address.value, length.value, advice))
        return -1  # a system that refuses


@linux
def test_only_new_memory_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Libc()
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: libc)  # pyright: ignore
    before = mmap.mmap(-1, 8 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    known = module._regions()  # pyright: ignore[reportPrivateUsage]
    with huge_pages():
        inside = mmap.mmap(-1, 8 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pieces = [
        (address, length) for address, length, advice in libc.asked if advice == MADV_HUGEPAGE
    ]
    assert pieces == [(a, n) for a, n, advice in libc.asked if advice == MADV_COLLAPSE]
    assert pieces
    assert all(address % SIZE == length % SIZE == 0 < length for address, length in pieces)
    regions = {(address, address + length) for address, length in pieces}
    assert not regions & known
    before.close()
    inside.close()


@linux
def test_what_is_held_stays() -> None:
    with huge_pages():
        memory = mmap.mmap(-1, 8 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for place in range(0, 8 * SIZE, 4096):
            memory[place] = place // 4096 % 251
    assert all(memory[place] == place // 4096 % 251 for place in range(0, 8 * SIZE, 4096))
    memory.close()


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "MAPS", tmp_path / "none")
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: pytest.fail("no libc here"))  # pyright: ignore
    with huge_pages():
        pass
