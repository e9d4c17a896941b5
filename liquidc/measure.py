"""Time, peak memory and bytes of a piece of work, and what machine this is."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_IO = Path("/proc/self/io")
_MEMORY = Path("/proc/meminfo")


@dataclass(slots=True)
class Measured:
    """What a piece of work took.

    Attributes:
        seconds: on the clock.
        peak_rss_bytes: the largest resident memory while it ran.
        bytes_read: that the process read from files, from the system's cache or the disk; what it
            mapped does not count. 0 where the kernel does not tell.
        bytes_written: to files, likewise.
    """

    seconds: float = 0.0
    peak_rss_bytes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@contextmanager
def measured() -> Generator[Measured]:
    """Measure the block; where the kernel can't reset the peak, it is that since the start."""
    result = Measured()
    _reset_peak()
    read, written = _moved()
    start = time.perf_counter()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - start
        result.peak_rss_bytes = _peak()
        result.bytes_read, result.bytes_written = (
            now - before for now, before in zip(_moved(), (read, written), strict=True)
        )


def available_memory() -> int:
    """Bytes that can be taken without swapping; a large number where the kernel does not tell."""
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return 1 << 62
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 1 << 62


def resident_memory() -> int:
    """Bytes of this process in memory now; what it mapped counts where it was touched."""
    return _status("VmRSS") or _peak()


def _reset_peak() -> None:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def _peak() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    """Bytes that the kernel tells under a name; 0 where it does not."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else 0


def _moved() -> tuple[int, int]:
    """Bytes that the process has read and written so far."""
    try:
        told = dict(line.split(": ") for line in _IO.read_text().splitlines())
        return int(told["rchar"]), int(told["wchar"])
    except (OSError, ValueError, KeyError):
        return 0, 0


def machine() -> dict[str, str | int]:
    """Processor, usable cores, memory in bytes and system, for reports."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
