"""`liquidc targets`."""

from __future__ import annotations

from typing import Any

import click

from liquidc.cli.output import emit_json, json_option, table


@click.command(
    epilog="""\b
Examples:
  liquidc targets
  liquidc targets --json"""
)
@json_option
def command(as_json: bool) -> None:
    """List the targets, and whether this machine can build and run them, or why not."""
    from liquidc.backends.registry import TARGETS, get_backend
    from liquidc.passplan import default_passes

    found: list[dict[str, Any]] = []
    for name in TARGETS:
        backend = get_backend(name)
        reason = backend.availability()
        found.append(
            {
                "name": name,
                "available": reason is None,
                "reason": reason,
                "needs": None if reason else backend.target(),
                "summary": backend.summary,
                "stages": [stage.name for stage in backend.stages],
                "passes": default_passes(backend),
            }
        )
    if as_json:
        emit_json({"targets": found})
        return
    rows = [
        [entry["name"], "yes" if entry["available"] else "no", entry["reason"] or entry["summary"]]
        for entry in found
    ]
    table("", ["target", "here", ""], rows, right=9)
