"""`liquidc run ENGINE -p PROMPT`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from liquidc.cli.output import decoding, emit_json, json_option, read_stdin, say
from liquidc.files import MAX_BYTES
from liquidc.text import without_controls

if TYPE_CHECKING:
    from rich.style import Style

    from liquidc.runtime import Engine, Token

_BARS = "▁▂▃▄▅▆▇█"


@click.command(
    epilog="""\b
Examples:
  liquidc run engine -p "The with statement"
  liquidc run engine -p "12 + 7 =" --show-depth --max-new-tokens 32
  liquidc run engine --ids 84,104,101 --temperature 0.8 --top-p 0.95 --seed 7
  echo "Lists are" | liquidc run engine --json
  liquidc run engine --chat --system "Answer briefly."
  liquidc run engine --chat -p "What is a list?" """
)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="The text to continue; else it is read from standard input.")
@click.option("--ids", help="The prompt as token ids, separated by commas.")
@click.option("--chat", is_flag=True, help="A conversation, by the model's chat template.")
@click.option("--system", help="With --chat: what the model is told first.")
@click.option(
    "-n", "--max-new-tokens", type=int, help="At most so many.  [default: the model's, or 64]"
)
@click.option(
    "--temperature", type=float, help="0 takes the most probable.  [default: the model's, or 0]"
)
@click.option(
    "--top-p", type=float, help="Draw from this much probability.  [default: the model's, or 1]"
)
@click.option(
    "--top-k", type=int, help="Draw from so many tokens, 0: all.  [default: the model's, or 0]"
)
@click.option(
    "--min-p",
    type=float,
    help="Draw none below this share of the best.  [default: the model's, or 0]",
)
@click.option(
    "--repetition-penalty",
    type=float,
    help="Above 1: fewer repetitions.  [default: the model's, or 1]",
)
@click.option("--seed", default=0, show_default=True, help="Of the sampling.")
@click.option("--stop", multiple=True, help="End before this text or token; repeatable.")
@click.option("--stop-id", type=int, multiple=True, help="End before this token; repeatable.")
@click.option("--depth-bias", default=0.0, show_default=True, help="Above 0 runs more layers.")
@click.option("--min-depth", default=0, show_default=True, help="Layers that every token runs.")
@click.option("--show-depth", is_flag=True, help="Colour tokens by the layers that they ran.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of one operation, at most 16 for each core.",
)
@json_option
def command(
    engine: Path,
    prompt: str | None,
    ids: str | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int,
    stop: tuple[str, ...],
    stop_id: tuple[int, ...],
    depth_bias: float,
    min_depth: int,
    show_depth: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Continue a prompt with the engine in the directory ENGINE, token by token.

    With --chat, answer the prompt, or each line of standard input, as one conversation. What is
    not given is as the model's generation_config.json says.
    """
    from liquidc.backends.base import RunnerOptions
    from liquidc.chat import start_early
    from liquidc.runtime import load

    if prompt is not None and ids is not None:
        raise click.UsageError("Give --prompt or --ids.", click.get_current_context())
    if chat and ids is not None:
        raise click.UsageError("Give --chat or --ids.", click.get_current_context())
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat.", click.get_current_context())
    given: str | list[int] = ""
    if not chat:
        given = _parse_ids(ids) if ids is not None else _read_prompt() if prompt is None else prompt
    if chat:
        start_early()
    with load(engine, options=RunnerOptions(threads=threads)) as loaded:

        def answer(given: str | list[int]) -> dict[str, Any]:
            start = time.perf_counter()
            tokens: list[Token] = []
            show = _Shown(loaded, show_depth=show_depth, silent=as_json)
            for token in loaded.generate(
                given,
                max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop=(*stop, *stop_id),
                gate_bias=depth_bias,
                min_depth=min_depth,
            ):
                tokens.append(token)
                show.token(token)
            show.end(tokens)
            return _result(loaded, given, tokens, time.perf_counter() - start)

        for name in loaded.generation.unsupported:
            say(f"warning: {name} of generation_config.json is not followed", err=True)
        if not chat:
            result = answer(given)
        else:
            lines = _lines(ask=not as_json) if prompt is None else [prompt]
            result = {"turns": _converse(loaded, lines, system, answer)}
        if as_json:
            emit_json(result)


def _converse(
    engine: Engine,
    lines: Iterable[str],
    system: str | None,
    answer: Callable[[list[int]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Answer each line, knowing what was said before."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    turns: list[dict[str, Any]] = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        turn = answer(engine.chat(messages))
        messages.append({"role": "assistant", "content": turn["text"]})
        turns.append({**turn, "prompt": line})
    return turns


def _lines(*, ask: bool) -> Iterator[str]:
    """Lines of standard input that are not empty; with a mark before each, on a terminal."""
    asking = ask and sys.stdin.isatty()
    while True:
        if asking:
            click.echo("> ", nl=False)
        with decoding("standard input"):
            line = sys.stdin.readline(MAX_BYTES)
        if not line:
            return
        if line.strip():
            yield line.strip()


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of numbers", click.get_current_context(), param_hint="--ids"
        ) from None


def _read_prompt() -> str:
    if sys.stdin.isatty():
        raise click.UsageError("Give --prompt or --ids.", click.get_current_context())
    return read_stdin().rstrip("\n")


def _result(
    engine: Engine, prompt: str | list[int], tokens: list[Token], seconds: float
) -> dict[str, Any]:
    guard = engine.runner.guard
    return {
        "prompt": prompt,
        "guard": None if guard is None else {"tried": guard.tried, "missed": guard.missed},
        "text": "".join(token.text for token in tokens),
        "layers": engine.manifest.model.layers,
        "seconds": seconds,
        "tokens": [
            {
                "id": token.id,
                "text": token.text,
                "logprob": token.logprob,
                "depth": token.depth,
                "layers": list(token.layers),
                "experts": {str(layer): list(ids) for layer, ids in token.experts.items()},
            }
            for token in tokens
        ],
    }


class _Shown:
    """Text as it comes, and in the end what the depth of each token was."""

    def __init__(self, engine: Engine, *, show_depth: bool, silent: bool) -> None:
        self._layers = engine.manifest.model.layers
        self._guard = engine.runner.guard
        self._ids_only = engine.tokenizer is None
        self._depth = show_depth
        self._silent = silent
        self._console = None
        if show_depth and not silent:
            from liquidc.cli.output import console

            self._console = console()

    def token(self, token: Token) -> None:
        """Print one token."""
        if self._silent:
            return
        text = f"{token.id} " if self._ids_only else token.text
        if sys.stdout.isatty():
            text = without_controls(text)
        if self._console is None:
            click.echo(text, nl=False)
        else:
            from rich.text import Text

            self._console.print(Text(text, style=self._style(token.depth)), end="")
        sys.stdout.flush()

    def end(self, tokens: list[Token]) -> None:
        """Print the legend and the picture."""
        if self._silent:
            return
        click.echo()
        if self._console is None or not tokens:
            return
        from rich.text import Text

        out = self._console
        depths = [token.depth for token in tokens]
        out.print()
        legend = Text("layers run  ")
        for depth in range(min(depths), max(depths) + 1):
            legend.append(f" {depth} ", style=self._style(depth))
        mean = sum(depths) / len(depths)
        legend.append(f"   mean {mean:.2f} of {self._layers} over {len(depths)} tokens")
        if self._guard is not None:
            tried, missed = self._guard.tried, self._guard.missed
            legend.append(f"; expected path tried {tried} times, wrong {missed}")
        out.print(legend)
        width = max(out.width - 12, 20)
        for first in range(0, len(depths), width):
            line = Text(f"token {first:<5d} ")
            for depth in depths[first : first + width]:
                line.append(self._bar(depth), style=self._style(depth))
            out.print(line)

    def _share(self, depth: int) -> float:
        return depth / self._layers if self._layers else 1.0

    def _bar(self, depth: int) -> str:
        return _BARS[round(self._share(depth) * (len(_BARS) - 1))]

    def _style(self, depth: int) -> Style:
        """From blue (few layers) over green to red (all)."""
        import colorsys

        from rich.color import Color
        from rich.style import Style

        red, green, blue = colorsys.hsv_to_rgb((1 - self._share(depth)) * 0.62, 0.75, 0.95)
        color = Color.from_rgb(red * 255, green * 255, blue * 255)
        return Style(color=color)
