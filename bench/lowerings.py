"""What choose-lowering expects against what is measured: python bench/lowerings.py --profile FILE.

The sample is compiled with every gate as a branch, compact, as a mask, and as the pass chooses
with the machine's table. The engines take turns: a prompt of 128 tokens of held-out text, then 128
tokens one by one. Ratios are to the chosen engine, of medians over the turns. Leave the machine
alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import liquidc
from liquidc.machine import DEFAULT

SAMPLE = Path(__file__).resolve().parent.parent / "samples" / "tiny-liquid"
LOWERINGS = ("branch", "compact", "mask")
TOKENS = 128


def forcing(lowering: str) -> str:
    """A machine on which one lowering is always expected to be the fastest."""
    table = json.loads(DEFAULT.read_text(encoding="utf-8"))
    table |= {"op": 0, "conditional": 0, "find_rows": 0, "move_row": 0}
    table["product"] = [0.0 for _ in table["rows"]]
    match lowering:
        case "branch":
            table["find_rows"], table["product"] = 1e12, [1.0 * n for n in table["rows"]]
        case "compact":
            table["product"] = [1.0 * n for n in table["rows"]]
        case _:
            table["conditional"] = 1e12
    return json.dumps(table)


def run(engine: liquidc.Engine, ids: list[int]) -> dict[str, float]:
    """Seconds of the prompt and of the tokens after it."""
    session = engine.session(capacity=len(ids))
    start = time.perf_counter()
    session.prefill(ids[:TOKENS])
    middle = time.perf_counter()
    for token in ids[TOKENS:]:
        session.step([token])
    end = time.perf_counter()
    return {"prefill": middle - start, "decode": end - middle, "both": end - start}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", type=Path, required=True, help="of the sample")
    parser.add_argument("--machine", type=Path, default=DEFAULT)
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    engines: dict[str, liquidc.Engine] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in (*LOWERINGS, "chosen"):
            table = Path(scratch) / f"{name}.json"
            text = args.machine.read_text(encoding="utf-8") if name == "chosen" else forcing(name)
            table.write_text(text, encoding="utf-8")
            engines[name] = liquidc.compile(
                SAMPLE, Path(scratch) / name, profile=args.profile, machine=table
            )
        text = (SAMPLE / "heldout.txt").read_text(encoding="utf-8")
        ids = engines["chosen"].encode(text[: 8 * TOKENS])[: 2 * TOKENS]
        times: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for turn in range(args.turns + 1):
            order = [*engines][turn % len(engines) :] + [*engines][: turn % len(engines)]
            for name in order:
                found = run(engines[name], ids)
                if turn:
                    times[name].append(found)
        facts = next(
            p.facts for p in engines["chosen"].manifest.passes if p.name == "choose-lowering"
        )
        expected = {
            name: sum(entry["us"].get(name, 0.0) for entry in (facts or {})["gates"])
            for name in LOWERINGS
        }
        used = {
            name: ", ".join(gate.lowering for gate in engine.manifest.model.gates)
            for name, engine in engines.items()
        }
        best = sum(entry["us"][entry["lowering"]] for entry in (facts or {})["gates"])
    print("| lowering | prompt | one by one | both | gated layers alone, expected |")
    print("|---|---|---|---|---|")
    base = {key: statistics.median(t[key] for t in times["chosen"]) for key in times["chosen"][0]}
    for name, found in times.items():
        ratios = [statistics.median(t[key] for t in found) / base[key] for key in base]
        guess = 1.0 if name == "chosen" else expected[name] / best
        print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in (*ratios, guess)) + " |")
    print(f"\n{args.turns} turns; lowerings by gate:")
    for name, lowerings in used.items():
        print(f"- {name}: {lowerings}")


if __name__ == "__main__":
    main()
