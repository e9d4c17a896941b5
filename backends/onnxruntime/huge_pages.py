"""Memory of the runtime in pages of 2 MB, which the processor translates with fewer misses.

A decode step reads all weights once, so that with pages of 4 KB it also reads their page tables:
4 to 8 % of its time (docs/facts.md). Linux has larger pages for who asks; ONNX Runtime does not.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

SIZE = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
"""Of Linux: pages to come may be large; those that are there become so, since Linux 6.1."""
MAPS = Path("/proc/self/maps")
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(\[heap\])?", re.ASCII)


@contextmanager
def huge_pages() -> Generator[None]:
    """What is allocated inside is held in large pages, as far as the system has them."""
    if sys.platform != "linux" or not MAPS.exists():
        yield
        return
    before = _regions()
    yield
    libc = ctypes.CDLL(None)
    for start, end in sorted(_regions() - before):
        first, last = -(-start // SIZE) * SIZE, end // SIZE * SIZE
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE) if first < last else ():
            # Only advice: a system that does not take it goes on as before.
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def _regions() -> set[tuple[int, int]]:
    """Where memory that belongs to no file lies."""
    lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    found = map(_ANONYMOUS.fullmatch, lines)
    return {(int(match[1], 16), int(match[2], 16)) for match in found if match}
