"""Every environment variable that liquidc reads.

| variable | values | meaning |
|---|---|---|
| `LIQUIDC_DEBUG` | `1` | an internal error shows its traceback, as `--traceback` does |
"""

from __future__ import annotations

import os


def debug() -> bool:
    """Whether `LIQUIDC_DEBUG` is set to something other than nothing or 0."""
    return os.environ.get("LIQUIDC_DEBUG", "") not in ("", "0")
