"""`liquidc export-hf MODEL -o OUT`."""

from __future__ import annotations

from pathlib import Path

import click

from liquidc.cli.output import bytes_text, counting, emit_json, json_option, parse_bytes, say
from liquidc.text import printable

HINT = """
    import liquidc.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("{directory}")"""


@click.command(
    epilog="""\b
Examples:
  liquidc export-hf samples/tiny-liquid -o exported
  liquidc export-hf flexidepth-llama -o liquid-llama --dtype bfloat16
  liquidc export-hf mixtral -o liquid-mixtral --max-shard-size 2GB"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to write."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights.  [default: as config.json says]",
)
@click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Of a file of weights: 500MB, 5GB.",
)
@click.option("--force", is_flag=True, help="Replace the checkpoint if there is one.")
@json_option
def command(
    model: Path, output: Path, dtype: str | None, max_shard_size: str, force: bool, as_json: bool
) -> None:
    """Write the checkpoint directory MODEL, of any supported family, as a Liquid checkpoint.

    `import liquidc.hf` teaches transformers to load it: AutoModelForCausalLM, generate, training;
    what it saves, compile reads again. The directory appears whole or not at all.
    """
    from liquidc.export import export_checkpoint

    size = parse_bytes(max_shard_size, "--max-shard-size")
    with counting(quiet=as_json) as report:
        made = export_checkpoint(
            model, output, dtype=dtype, shard_bytes=size, force=force, report=report
        )
    if as_json:
        emit_json(
            {
                "checkpoint": str(made.directory),
                "files": list(made.files),
                "bytes": made.bytes,
                "dtype": made.config.dtype,
            }
        )
        return
    say(
        f"{made.directory}: {bytes_text(made.bytes)} of {made.config.dtype} in "
        f"{sum(name.endswith('.safetensors') for name in made.files)} files of weights"
    )
    click.echo(HINT.format(directory=printable(str(made.directory))))
