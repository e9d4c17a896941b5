"""Our ONNX Runtime engines beside their users' alternatives: python -m bench.suite.

Models: the sample; width 1,024 with 8 layers, dense and with top-2 of 16 experts, all layers gated,
random weights. Every depth is one engine file driven by `gate_force`. Each contender lives in a
process of its own; they take turns in one run. A turn's time is the median of its steps, a ratio
is between two turns of the same round, reported are medians over the rounds with their 95 %
intervals. Before anything is timed, contenders with the same weights must give the same logits.

PyTorch runs eagerly with in-place caches and real ifs; torch.compile is the same; the plain export
is `torch.onnx.export(dynamo=True)`, which can't follow gates, in ONNX Runtime and in OpenVINO;
llama.cpp has random weights of the same shapes and no gates. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bench.shapes import SHAPES
from bench.suite import compiles
from bench.suite.cases import BOUNDS, CASES, Case, Row, applies, forces, rows
from bench.suite.contenders import Builder, Built
from bench.suite.workers import WARM_UP, Decode, Prefill, Timed, Worker
from liquidc.bench import interval, read_bandwidth
from liquidc.measure import machine

OURS = ("liquidc", "liquidc without gates")
PEERS = ("PyTorch eager", "torch.compile", "plain export", "OpenVINO", "llama.cpp F32")
FEW_BITS = ("liquidc int4", "llama.cpp Q4_0", "liquidc int8", "llama.cpp Q8_0")
LARGE = 32_000
"""A vocabulary whose head is a tenth of the model: reported beside, without bounds."""
PAUSE = 0.02
"""Seconds before a turn: threads of the runtime that had the last one no longer wait actively."""
AGREE = 1e-3
"""Of the largest logit: float32 sums in another order differ by less, another model by more."""
PACKAGES = ("torch", "onnxruntime", "openvino", "onnxscript", "llama-cpp-python")


def say(text: str) -> None:
    """Progress, which is no part of the result."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Table:
    """Times of the rows of one case."""

    def __init__(self, case: Case, wanted: list[Row], built: Built, steps: int, seed: int) -> None:
        ids = np.random.default_rng(seed).integers(0, built.vocabulary, (case.batch, case.tokens))
        self.case, self.built, self.steps = case, built, steps
        self.held = [[int(token) for token in row] for row in ids]
        self.rows = [row for row in wanted if applies(row, case)]
        self.times: dict[Row, list[float]] = {row: [] for row in self.rows}
        self.bytes: dict[Row, list[int]] = {row: [] for row in self.rows}
        self.logits: dict[Row, Any] = {}

    def turn(self, row: Row, worker: Worker) -> Timed:
        """One turn of one row."""
        gates = 0 if row.contender == "liquidc without gates" else self.built.gates
        count = self.steps + WARM_UP
        force = forces(row.level, gates, count)
        if self.case.kind == "prefill":
            return worker.run(Prefill(self.held[0], force[0]))
        tokens = [[row[step % len(row)] for row in self.held] for step in range(count)]
        return worker.run(Decode(self.held, tokens, force))

    def round(self, workers: dict[str, Worker], number: int) -> None:
        """Every row's turn; round -1 is not counted."""
        for row in self.rows if number % 2 else self.rows[::-1]:
            time.sleep(PAUSE)
            timed = self.turn(row, workers[row.contender])
            if number < 0:
                self.logits[row] = timed.logits
                continue
            self.times[row].append(float(np.median(timed.seconds)))
            self.bytes[row] += timed.bytes

    def disagreements(self) -> list[str]:
        """Contenders whose logits are not those of our engine, all layers on."""
        by_name = {row.name: logits for row, logits in self.logits.items()}
        ours = by_name.get("liquidc, 100 %")
        found: list[str] = []
        for row, logits in self.logits.items():
            same = row.level == "100 %" and row.reference == "liquidc"
            if ours is None or not same or "llama" in row.contender:
                continue
            error = float(np.abs(logits - ours).max() / np.abs(ours).max())
            if not error <= AGREE:
                found.append(f"{row.name}: logits differ by {error:.1e} of the largest")
        return found

    def report(self, bandwidth: float) -> list[dict[str, Any]]:
        """The rows as JSON."""
        by_name = {row.name: row for row in self.rows}
        told: list[dict[str, Any]] = []
        for row, times in self.times.items():
            reference = self.times[by_name[f"{row.reference}, 100 %"]]
            ratios = [a / b for a, b in zip(times, reference, strict=True)]
            low, high = interval(ratios)
            twin = by_name.get(f"{row.reference}, {row.level}", row)
            sizes = self.bytes[row] or self.bytes[twin]
            size = int(np.median(sizes)) if sizes else None
            seconds = float(np.median(times))
            told.append(
                {
                    "row": row.name,
                    "ratio": float(np.median(ratios)),
                    "ratio_low": low,
                    "ratio_high": high,
                    "reference": f"{row.reference}, 100 %",
                    "ms_median": 1000 * seconds,
                    "ms_interval": [1000 * t for t in interval(times)],
                    "bytes_needed": size,
                    "bandwidth_share": None if size is None else size / seconds / bandwidth,
                }
            )
        return told


def judged(shape: str, policy: str, case: Case, told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bounds of a case, and whether the medians keep them."""
    found: list[dict[str, Any]] = []
    for bound in BOUNDS:
        if bound.shape not in ("", shape) or bound.policy not in ("", policy):
            continue
        for row in told:
            if row["row"] == bound.row and bound.case(case):
                kept = bound.least <= row["ratio"] <= bound.most
                found.append({"row": bound.row, "bound": bound.text(), "kept": kept})
    return found


def groups(shape: str, policy: str, only: list[str] | None) -> list[list[str]]:
    """Contenders that are in memory together: all, or a few of the 2 GB of a mixture of experts."""
    if shape == "sample":
        found = [[*OURS, *PEERS[:-1]]]
    elif policy == "own":
        found = [[*OURS]]
    elif shape == "moe":
        found = [[*OURS, *PEERS[:3]], [OURS[0], *PEERS[3:]], [OURS[0], *FEW_BITS]]
    else:
        found = [[*OURS, *PEERS, *FEW_BITS]]
    if only:
        found = [[name for name in names if name in (OURS[0], *only)] for names in found]
    return [names for names in found if len(names) > 1] or [[OURS[0]]]


def measure(
    shape: str,
    policy: str,
    vocabulary: int,
    cases: list[Case],
    wanted: list[str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Build some contenders of a model and let them take turns in every case."""
    label = f"{shape}, {policy}, vocabulary {vocabulary}"
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        builder = Builder(Path(scratch), shape, policy, vocabulary, lambda t: say(f"{label}: {t}"))
        built = builder.build(wanted)
        room = options.steps + WARM_UP
        cases = [case for case in cases if case.tokens + room <= built.context]
        capacity = max(case.tokens for case in cases) + room
        workers: dict[str, Worker] = {}
        try:
            for name, contender in built.contenders.items():
                say(f"{label}: loading {name}")
                try:
                    workers[name] = Worker(
                        contender.kind, contender.path, options.threads, capacity
                    )
                except RuntimeError as error:
                    built.missing[name] = f"does not load: {error}"
            result = _tables(label, shape, policy, cases, built, workers, options)
        finally:
            for worker in workers.values():
                worker.close()
    result["compiles"] = built.compiles
    result["missing"] = built.missing
    return {"shape": shape, "policy": policy, "vocabulary": vocabulary, **result}


def _tables(
    label: str,
    shape: str,
    policy: str,
    cases: list[Case],
    built: Built,
    workers: dict[str, Worker],
    options: argparse.Namespace,
) -> dict[str, Any]:
    told: list[dict[str, Any]] = []
    for case in cases:
        bandwidth = read_bandwidth()
        table = Table(case, rows(list(workers)), built, options.steps, options.seed)
        for number in range(-1, options.turns):
            say(f"{label}: {case}: round {number + 1} of {options.turns}")
            table.round(workers, number)
            if number < 0 and (wrong := table.disagreements()):
                raise SystemExit("error: not the same model: " + "; ".join(wrong))
        found = table.report(bandwidth)
        bounds = [] if built.vocabulary == LARGE else judged(shape, policy, case, found)
        told.append(
            {
                "case": str(case),
                **asdict(case),
                "read_bandwidth_bytes_per_second": bandwidth,
                "rows": found,
                "bounds": bounds,
            }
        )
        show(label, told[-1])
    memory = {
        name: {
            "weights_bytes": _weights(built, name),
            "loaded_bytes": worker.resident,
            "after_bytes": worker.memory(),
        }
        for name, worker in workers.items()
    }
    show_memory(label, memory)
    return {"cases": told, "memory": memory}


def _weights(built: Built, name: str) -> int | None:
    """Bytes of the weights of an engine of ours."""
    contender = built.contenders[name]
    if contender.kind != "liquid":
        return None
    return (contender.path / "weights.bin").stat().st_size


def show_memory(label: str, memory: dict[str, Any]) -> None:
    """What each process holds, as a Markdown table; ours have a bound before there is a cache."""
    print(f"\n**{label}: resident memory, MB**\n")
    print("| | loaded | bound | after all cases |")
    print("|---|---|---|---|")
    for name, told in memory.items():
        limit = ""
        if told["weights_bytes"] is not None:
            most = 1.15 * told["weights_bytes"] + 150e6
            kept = told["loaded_bytes"] <= most
            limit = f"≤ {most / 1e6:.0f}" + ("" if kept else " missed")
        loaded, after = (f"{told[when] / 1e6:.0f}" for when in ("loaded_bytes", "after_bytes"))
        print(f"| {name} | {loaded} | {limit} | {after} |")
    sys.stdout.flush()


def show(label: str, told: dict[str, Any]) -> None:
    """One case as a Markdown table."""
    print(f"\n**{label}: {told['case']}**\n")
    print("| | ratio, median (95 %) | bound | ms | MB needed | share of bandwidth |")
    print("|---|---|---|---|---|---|")
    limits = {b["row"]: b["bound"] + ("" if b["kept"] else " missed") for b in told["bounds"]}
    for row in told["rows"]:
        ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        size, share = row["bytes_needed"], row["bandwidth_share"]
        both = " | | |" if size is None else f" | {size / 1e6:.1f} | {share:.0%} |"
        limit = limits.get(row["row"], "")
        print(f"| {row['row']} | {ratio} | {limit} | {row['ms_median']:.2f}{both}")
    sys.stdout.flush()


def versions() -> dict[str, str]:
    """Of the packages that are here."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Print tables as they are done; write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m bench.suite --shape dense --policy drop --turns 40\n"
        "  python -m bench.suite --case 0 --only 'PyTorch eager' --json suite.json",
    )
    told = ", ".join(f"{i} {case}" for i, case in enumerate(CASES))
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--policy", choices=["drop", "own"], action="append", help="default: both")
    parser.add_argument("--case", type=int, choices=range(len(CASES)), action="append", help=told)
    others = [OURS[1], *PEERS, *FEW_BITS]
    told_others = "contenders beside ours: " + ", ".join(others)
    parser.add_argument("--only", action="append", choices=others, metavar="NAME", help=told_others)
    parser.add_argument("--turns", type=int, default=20, help="rounds (default 20)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn (default 8)")
    parser.add_argument("--vocabulary", type=int, default=256, help="of random models")
    parser.add_argument("--threads", type=int, default=machine()["cores"])
    parser.add_argument("--compiles", type=int, default=5, help="turns of compiles (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    options = parser.parse_args()
    cases = [CASES[i] for i in options.case or range(len(CASES))]
    found: list[dict[str, Any]] = []
    chosen = {k: v for k, v in vars(options).items() if k != "json"}
    document = {"machine": machine(), "versions": versions(), "options": chosen, "found": found}

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")

    for shape in options.shape or SHAPES:
        for policy in options.policy or ["drop", "own"]:
            if shape == "sample" and policy == "drop":
                continue  # the sample was trained with the policy own
            runs = [(options.vocabulary, cases)]
            if (shape, policy) == ("dense", "drop") and options.vocabulary != LARGE:
                runs.append((LARGE, cases[:1]))
            for vocabulary, chosen_cases in runs:
                for names in groups(shape, policy, options.only):
                    found.append(measure(shape, policy, vocabulary, chosen_cases, names, options))
                    write()
    document["compiles"] = None
    if options.compiles:
        say("compiles of 8 and 32 layers")
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            document["compiles"] = compiles.measure(Path(scratch), options.compiles)
        models = {
            f"{told['shape']}, {told['policy']}, vocabulary {told['vocabulary']}: {name}": log
            for told in found
            for name, log in told["compiles"].items()
        }
        compiles.show(document["compiles"], models)
        write()
    print(f"\n{json.dumps(machine())}\n{json.dumps(versions())}")


if __name__ == "__main__":
    main()
