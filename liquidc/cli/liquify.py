"""`liquidc liquify MODEL -o OUT`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from liquidc.cli.output import bytes_text, counting, emit_json, json_option, say, table

if TYPE_CHECKING:
    from liquidc.gate_tuning import Measurement
    from liquidc.liquify import Liquified
MAX_COUNT = 2**31 - 1
"""Limit of steps and seeds."""
MAX_SIZE = 65_536
"""Limit of what takes memory: widths, rows, tokens of a window."""


@click.command(
    epilog="""\b
Examples:
  liquidc liquify llama -o liquid-llama
  liquidc liquify llama -o shorter --skip 4 --data text.txt
  liquidc liquify tiny -o deep-or-not --run 0.6 --data text.txt --steps 500
  liquidc liquify tiny -o with-adapters --run 0.5 --adapter --data text.txt --layers 2-6"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to write."
)
@click.option(
    "--layers",
    metavar="LIST",
    help="Layers that get gates: 2-6 or 2,4,6.  [default: all but the first two and the last]",
)
@click.option(
    "--skip",
    type=click.IntRange(min=1),
    metavar="N",
    help="Close the N gates whose layers change their input least (block influence, ShortGPT).",
)
@click.option(
    "--run",
    type=float,
    metavar="SHARE",
    help="Train the gates until this share of the gated layers' work is done; all else is frozen.",
)
@click.option("--adapter", is_flag=True, help="With --run: train an adapter for tokens that skip.")
@click.option(
    "--adapter-width", type=click.IntRange(1, MAX_SIZE), help="Width of it.  [default: F / 16]"
)
@click.option(
    "--data", type=click.Path(path_type=Path), help='Text, or .jsonl with "text" or "ids" a line.'
)
@click.option("--steps", type=click.IntRange(1, MAX_COUNT), default=300, show_default=True)
@click.option(
    "--rows",
    type=click.IntRange(1, MAX_SIZE),
    default=8,
    show_default=True,
    help="Windows of a step.",
)
@click.option(
    "--length",
    type=click.IntRange(8, MAX_SIZE),
    default=256,
    show_default=True,
    help="Tokens of a window.",
)
@click.option("--rate", type=float, default=1e-2, show_default=True, help="Learning rate.")
@click.option("--seed", type=click.IntRange(0, MAX_COUNT), default=0, show_default=True)
@click.option(
    "--kv-policy",
    type=click.Choice(["own", "drop", "inherit"]),
    help="Keys and values of tokens that skip.  [default: own; drop with --skip]",
)
@click.option("--force", is_flag=True, help="Replace the checkpoint if there is one.")
@json_option
def command(
    model: Path,
    output: Path,
    layers: str | None,
    skip: int | None,
    run: float | None,
    adapter: bool,
    adapter_width: int | None,
    data: Path | None,
    steps: int,
    rows: int,
    length: int,
    rate: float,
    seed: int,
    kv_policy: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make a Liquid Transformer out of the checkpoint directory MODEL, which has no gates.

    Without --skip and --run the gates are there and let every token run: the model computes what it
    did, and can be trained further. --run needs the whole model in memory, in float32; it is for
    small models. One token in ten of the text is not trained on, but measured.
    """
    from liquidc.gate_tuning import Tuning
    from liquidc.liquify import Recipe, liquify

    recipe = Recipe(
        layers=None if layers is None else _indices(layers),
        kv_policy=kv_policy or "",
        adapter=adapter_width or (0 if adapter else None),
        skip=skip or 0,
        run=run,
        data=data,
        length=length,
        tuning=Tuning(steps=steps, rows=rows, rate=rate, seed=seed),
    )
    with counting(quiet=as_json) as report:
        made = liquify(model, output, recipe, force=force, report=report)
    if as_json:
        emit_json(_result(made))
        return
    if made.influence:
        _show_influence(made)
    if made.measured is not None:
        _show_measured(made.measured)
    config = made.exported.config
    say(
        f"{made.exported.directory}: {bytes_text(made.exported.bytes)}, "
        f"{config.num_gates} of {config.num_hidden_layers} layers gated, "
        f"policy {config.depth_gate.kv_policy}"
    )


def _indices(text: str) -> tuple[int, ...]:
    """`2-4,7` -> 2, 3, 4, 7."""
    from liquidc.manifest import MAX_LAYERS

    found: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            if int(last or first) > MAX_LAYERS:
                raise ValueError("no model has so many")
            found |= set(range(int(first), int(last or first) + 1))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list such as 2-6 or 2,4,6") from None
    return tuple(sorted(found))


def _result(made: Liquified) -> dict[str, Any]:
    return {
        "checkpoint": str(made.exported.directory),
        "files": list(made.exported.files),
        "bytes": made.exported.bytes,
        "gated_layers": list(made.exported.config.gated_layers),
        "influence": list(made.influence),
        "closed": list(made.closed),
        "measured": None if made.measured is None else made.measured.told(),
    }


def _show_influence(made: Liquified) -> None:
    gated = made.exported.config.gated_layers
    rows = [
        [
            str(layer),
            f"{value:.4f}",
            "never" if layer in made.closed else "always" if layer in gated else "no gate",
        ]
        for layer, value in enumerate(made.influence)
    ]
    table("", ["layer", "influence", "runs"], rows)


def _show_measured(found: Measurement) -> None:
    rows = [
        [name, f"{loss / math.log(2):.4f}", f"{(loss - found.loss_all) / math.log(2):+.4f}"]
        for name, loss in (
            ("every layer run, as it was", found.loss_all),
            ("by the gates", found.loss),
            ("as many tokens, at random", found.loss_random),
        )
    ]
    table(f"{found.tokens:,} tokens of held-out text", ["", "bits per token", "more"], rows)
    rates = " ".join(f"{rate:.2f}" for rate in found.gates)
    say(f"{found.skipped:.1%} of the gated work skipped; each gate runs for: {rates}")
