"""`liquidc profile MODEL|ENGINE`, `liquidc profile merge`, `liquidc profile show`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from liquidc.cli.output import counting, emit_json, json_option, say, table

if TYPE_CHECKING:
    from liquidc.observers import Observer
    from liquidc.profile import Profile


class _Verb(click.Group):
    """A group whose first argument may be a model instead of a subcommand."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """`profile X …` is `profile of X …` unless X names a subcommand."""
        given = args if args[0] in self.commands else ["of", *args]
        return super().resolve_command(ctx, given)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Options may come before the model."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["of", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options of a run, then the subcommands."""
        with formatter.section("Options"):
            formatter.write_dl([r for p in of.get_params(ctx) if (r := p.get_help_record(ctx))])
        self.format_commands(ctx, formatter)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """What follows the verb."""
        return ["MODEL|ENGINE --data FILE -o PROFILE"]


@click.group(
    cls=_Verb,
    epilog="""\b
Examples:
  liquidc profile samples/tiny-liquid --data corpus.txt -o profile.json
  liquidc profile engine --data chats.jsonl -o profile.json --max-tokens 100000
  liquidc profile samples/tiny-liquid --data corpus.txt -o profile.json --resume
  liquidc profile merge monday.json tuesday.json -o both.json
  liquidc profile show both.json""",
)
def command() -> None:
    """Run a corpus through a model or an engine and count what its gates and experts decide.

    A profile says, per layer, how often it ran and how clear the decisions were; which depth paths
    tokens took; and which experts were used together. The passes that specialise a model need it.
    Profiles of one model add up: merge them in any order.
    """


@command.command(hidden=True)
@click.argument("model", metavar="MODEL|ENGINE", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help='UTF-8 text, or .jsonl with "text" or "ids" in each line.',
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Profile to write."
)
@click.option("--window", default=512, show_default=True, help="Tokens run at a time.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Stop after about so many.")
@click.option("--no-sample", is_flag=True, help="Keep no text for the report's picture.")
@click.option("--resume", is_flag=True, help="Go on where a run stopped.")
@click.option("--force", is_flag=True, help="Replace the profile if there is one.")
@json_option
def of(
    model: Path,
    data: Path,
    output: Path,
    window: int,
    max_tokens: int | None,
    no_sample: bool,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Profile a checkpoint directory or an engine.

    A model directory also tells how sure its expert routers are and how much each expert
    contributes, which an engine does not show. If the run stops, what was counted stays in
    PROFILE.partial for --resume; without --resume the next run starts anew.
    """
    from liquidc.profiling import ProfileOptions, check_output, profile_corpus

    options = ProfileOptions(window, max_tokens, not no_sample, resume, force)
    check_output(output, options)
    with contextlib.ExitStack() as stack:
        observer = _observer(model, stack)
        report = stack.enter_context(counting(quiet=as_json))
        profile = profile_corpus(observer, data, output, options, report)
    _tell(profile, output, as_json=as_json)


@command.command()
@click.argument("profiles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Profile to write."
)
@click.option("--force", is_flag=True, help="Replace the profile if there is one.")
@json_option
def merge(profiles: tuple[Path, ...], output: Path, force: bool, as_json: bool) -> None:
    """Add PROFILES of one model up."""
    from liquidc.durable import check_file, replace_file, writing
    from liquidc.profile import merge as add
    from liquidc.profile import read_profile

    check_file(output, "a profile", force=force)
    total = read_profile(profiles[0])
    for path in profiles[1:]:
        other = read_profile(path)
        other.check_model(total.model.sha256, str(path))
        total = add([total, other])
    with writing(output):
        replace_file(output, total.to_bytes())
    _tell(total, output, as_json=as_json)


@command.command()
@click.argument("profile", type=click.Path(path_type=Path))
@json_option
def show(profile: Path, as_json: bool) -> None:
    """Show what PROFILE says."""
    from liquidc.profile import read_profile

    _tell(read_profile(profile), profile, as_json=as_json)


def _observer(path: Path, stack: contextlib.ExitStack) -> Observer:
    from liquidc.manifest import MANIFEST
    from liquidc.observers import EngineObserver, ModelObserver

    if (path / MANIFEST).exists():
        from liquidc.runtime import load

        return EngineObserver(stack.enter_context(load(path)))
    from liquidc.pipeline import open_model

    opened = open_model(path)
    tokenizer = path / "tokenizer.json"
    return ModelObserver(opened, tokenizer if tokenizer.exists() else None)


def summary(profile: Profile) -> dict[str, Any]:
    """The profile in numbers that mean something by themselves."""
    from liquidc.profile import UNIT

    count = profile.tokens
    return {
        "tokens": count,
        "model": profile.model.sha256,
        "depth_mean": profile.model.layers
        - len({gate.layer for gate in profile.gates})
        + sum(profile.rate(gate) for gate in range(len(profile.gates))),
        "gates": [
            {
                "layer": gate.layer,
                "run_rate": gate.run / count,
                "margin_mean": gate.margin / UNIT / count,
                "margin_below_0.01": sum(gate.margins[:3]) / count,
                "entropy_bits": gate.entropy / UNIT / count,
            }
            for gate in profile.gates
        ],
        "paths_different": len(profile.paths.counts),
        "paths": [{"path": path, "share": n / count} for path, n in profile.paths.top(8)],
        "experts": [
            {
                "layer": e.layer,
                "tokens": e.tokens,
                "load": [n / max(sum(e.load), 1) for n in e.load],
                "router_entropy_bits": None
                if e.entropy is None or not e.tokens
                else e.entropy / UNIT / e.tokens,
            }
            for e in profile.experts
        ],
    }


def _tell(profile: Profile, path: Path, *, as_json: bool) -> None:
    facts = summary(profile)
    if as_json:
        emit_json({"profile": str(path), **facts})
        return
    say(
        f"{path}: {profile.tokens:,} tokens of model {profile.model.sha256[:12]}…, "
        f"{facts['depth_mean']:.2f} of {profile.model.layers} layers run"
    )
    rows = [
        [
            str(g["layer"]),
            f"{g['run_rate']:.1%}",
            f"{g['margin_mean']:.3f}",
            f"{g['margin_below_0.01']:.2%}",
            f"{g['entropy_bits']:.3f}",
        ]
        for g in facts["gates"]
    ]
    if rows:
        columns = ["gated layer", "run", "mean |p - τ|", "|p - τ| < 0.01", "entropy, bits"]
        table("", columns, rows)
        rows = [[p["path"], f"{p['share']:.1%}"] for p in facts["paths"]]
        table(f"{facts['paths_different']} depth paths", ["gates that ran", "tokens"], rows)
    rows = [
        [
            str(e["layer"]),
            f"{e['tokens']:,}",
            f"{max(e['load']):.1%}",
            f"{min(e['load']):.1%}",
            "not shown" if e["router_entropy_bits"] is None else f"{e['router_entropy_bits']:.2f}",
        ]
        for e in facts["experts"]
    ]
    if rows:
        columns = ["experts of layer", "tokens", "most used", "least used", "router entropy, bits"]
        table("", columns, rows)
