"""The version, in one place."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__version__ = "0.1.0"


def source_hash() -> str:
    """Hash of liquidc's own code, which tells two states of a checkout apart."""
    digest = hashlib.sha256()
    for directory, below, files in os.walk(Path(__file__).parent, followlinks=True):
        below.sort()
        for name in sorted(name for name in files if name.endswith(".py")):
            digest.update(f"{name}\n".encode() + Path(directory, name).read_bytes())
    return digest.hexdigest()
