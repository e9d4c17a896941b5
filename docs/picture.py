"""Draws docs/depth.svg from a real run: python docs/picture.py ENGINE."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

PROMPT = "The with statement"
COMMAND = ["run", sys.argv[1], "--prompt", PROMPT, "--max-new-tokens", "160", "--show-depth"]


def main() -> None:
    """Run the engine in colour and keep what the terminal shows."""
    environment = {"FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm", "COLORTERM": "truecolor"}
    done = subprocess.run(
        [sys.executable, "-m", "liquidc.cli.main", *COMMAND],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).resolve().parent.parent,
    )
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(Text("$ liquidc " + " ".join(COMMAND).replace(PROMPT, f'"{PROMPT}"')))
    console.print(Text.from_ansi(done.stdout))
    svg = console.export_svg(title="liquidc", unique_id="depth")
    (Path(__file__).parent / "depth.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
