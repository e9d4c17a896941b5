"""Every compile option on models with and without gates and experts: it works, or says why not.

A case names the models on which it works; on all others it is refused in one line, with exit code
2, by a dry run too. An option without a case fails the first test.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import liquidc
from liquidc.cli.compile import command
from liquidc.cli.main import cli
from liquidc.frontend.families import open_model
from liquidc.frontend.trace import trace_checkpoint
from liquidc.ir import print_module
from liquidc.machine import DEFAULT
from liquidc.plan import CompileOptions
from liquidc.reference import Reference
from liquidc.report import read_report
from liquidc.verify import VerifyOptions, read_held_out, verify
from tests.liquidc.conftest import CONFIG, save_model

GATED, SPARSE = ("gated-sparse", "gated-dense"), ("gated-sparse", "sparse")
SHAPES = (*GATED, "sparse", "dense")
SOME = ("gated-sparse", "dense")
NO_GATES, NO_EXPERTS = (
    "is about depth gates, and the model has none",
    "is about experts, and the model",
)
NEITHER = "a profile tells of gates and experts, and the model has neither"
WEIGHT = "model.layers.0.self_attn.o_proj.weight"
SMALL = VerifyOptions(
    windows=1, window=16, prompts=1, prompt=4, new_tokens=3, traced=1, traced_tokens=2
)


@dataclass(frozen=True)
class Case:
    """Arguments of a compile; names in capitals are files of `Place`.

    Attributes:
        arguments: besides model and output.
        works: models on which it works.
        message: what the others are told.
        exact: whether the engine passes `verify`.
        on: the models to try; all, unless the option has nothing to do with the model.
        target: of the compile.
    """

    arguments: str
    works: tuple[str, ...] = SHAPES
    message: str = ""
    exact: bool = True
    on: tuple[str, ...] = SHAPES
    target: str = "null"


def lossy(arguments: str, works: tuple[str, ...] = SHAPES, message: str = "", **more: Any) -> Case:
    return Case(arguments, works, message, exact=False, **more)


PROFILED = "--profile PROFILE "
GRID: dict[str, tuple[Case, ...]] = {
    "output": (Case(""),),
    "target": (Case("", target="onnxruntime"), Case("", target="onnxruntime-fixed")),
    "passes": (Case("--passes stack-experts,group-experts,eliminate-dead", on=SOME),),
    "no_pass": (Case("--no-pass compact-tokens", on=SOME),),
    "add_pass": (
        lossy(PROFILED + "--add-pass prune-experts{ratio=0.5}", SPARSE, NO_EXPERTS),
        lossy(PROFILED + "--add-pass merge-experts{keep=2}", SPARSE, NO_EXPERTS),
        lossy("--add-pass fix-gates{gates=0}", GATED, NO_GATES),
        Case(PROFILED + "--add-pass order-experts", SPARSE, NO_EXPERTS),
        Case(PROFILED + "--add-pass specialize-depth{hot=0}", GATED, NO_GATES),
        Case("--add-pass choose-lowering", GATED, NO_GATES, target="onnxruntime"),
    ),
    "specialize": (
        Case(PROFILED + "--specialize exact", GATED, NO_GATES),
        lossy(PROFILED + "--specialize budget --max-kl 9", GATED, NO_GATES),
    ),
    "max_kl": (lossy("--quantize int8 --max-kl 9"),),
    "data": (
        lossy("--quantize int4 --data DATA"),
        Case(
            PROFILED + "--data DATA",
            GATED,
            "--data measures depth paths, and the model has no gates",
            target="onnxruntime-fixed",
        ),
    ),
    "profile": (Case(PROFILED, ("gated-sparse", "gated-dense", "sparse"), NEITHER),),
    "quantize": (
        lossy("--quantize int8-dynamic", on=SOME),
        lossy("--quantize fp8", on=SOME),
        lossy("--quantize mixed --max-kl 0.05", on=SOME),
    ),
    "quantize_cache": (lossy("--quantize-cache int8 --calibration CALIBRATION"),),
    "calibration": (lossy("--quantize int4{block=16,method=gptq} --calibration CALIBRATION"),),
    "target_size": (lossy("--quantize mixed --target-size 100kB"),),
    "recipe": (lossy("--quantize mixed --recipe RECIPE"),),
    "portable_weights": (lossy("--quantize int8 --portable-weights", target="onnxruntime"),),
    "fused_experts": (
        lossy(
            "--quantize int8{block=16} --fused-experts", SPARSE, NO_EXPERTS, target="onnxruntime"
        ),
    ),
    "machine": (Case(PROFILED + "--machine MACHINE", GATED, NO_GATES, target="onnxruntime"),),
    "verify_each": (Case("--verify-each", on=SOME),),
    "dump_dir": (Case("--dump-dir DUMPS", on=SOME),),
    "start_from": (Case("--start-from trace=TRACE", on=SOME),),
    "stats": (Case("--stats", on=SOME),),
    "dry_run": (Case("--dry-run", on=SOME),),
    "force": (Case("--force", on=SOME),),
    "resume": (Case("--resume", on=SOME),),
    "as_json": (Case("--json", on=SOME),),
}
FIELDS = {
    "no_pass": "without",
    "add_pass": "add",
    "dump_dir": "dump",
    "start_from": "start",
}
"""Fields of `CompileOptions` that have another name than their option."""
NO_FIELDS = {"output", "stats", "dry_run", "as_json"}
CASES = [
    pytest.param(case, shape, id=f"{option}-{number}-{shape}")
    for option, cases in GRID.items()
    for number, case in enumerate(cases)
    for shape in case.on
]


class Place:
    """The models, and for each the files that options name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for shape in SHAPES:
            config = dict(CONFIG) | {"num_hidden_layers": 2, "max_position_embeddings": 32}
            config["depth_gate"] = {"layers": [1], "kv_policy": "drop"}
            if shape not in GATED:
                del config["depth_gate"]
            if shape not in SPARSE:
                del config["moe"]
            directory = save_model(path / shape, config)
            (directory / "heldout.txt").write_text("12 + 30 = 42, and the end of it all.\n" * 4)
            files = self.files(shape)
            corpus = path / "corpus.txt"
            corpus.write_text("What a profile counts: tokens, gates, experts. " * 4)
            call("profile", directory, "--data", corpus, "-o", files["PROFILE"])
            files["TRACE"].write_text(print_module(trace_checkpoint(open_model(directory))))
            files["DATA"].write_text(
                "Other words that nobody has seen before today, or has he? " * 3
            )
            files["CALIBRATION"].write_text("Words of a third kind, to calibrate on. " * 8)
            files["RECIPE"].write_text(f'[weights]\n"{WEIGHT}" = "int4"\n')
            shutil.copy(DEFAULT, files["MACHINE"])

    def files(self, shape: str) -> dict[str, Path]:
        names = ("PROFILE", "DATA", "CALIBRATION", "RECIPE", "MACHINE", "TRACE", "DUMPS")
        return {name: self.path / f"{shape}-{name.lower()}" for name in names}

    def arguments(self, case: Case, shape: str) -> list[object]:
        files = self.files(shape)
        words = [files.get(word, word) for word in case.arguments.split()]
        words = [f"trace={files['TRACE']}" if word == "trace=TRACE" else word for word in words]
        return ["compile", self.path / shape, "--target", case.target, *words]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("grid"))


@cache
def reference(directory: Path) -> Reference:
    from liquidc.frontend.checkpoint import CheckpointSource

    return Reference.load(directory, CheckpointSource(directory).sha256)


def test_every_option_has_its_place_in_the_grid() -> None:
    given = [p for p in command.params if isinstance(p, click.Option) and p.expose_value]
    options = {p.name for p in given}
    assert set(GRID) == options
    assert {FIELDS.get(name, name) for name in options - NO_FIELDS} == {
        field.name for field in fields(CompileOptions)
    }


@pytest.mark.parametrize(("case", "shape"), CASES)
def test_it_works_or_says_why_not(case: Case, shape: str, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    arguments = [*place.arguments(case, shape), "-o", out]
    planned = call(*arguments, "--dry-run")
    assert not out.exists()
    if shape not in case.works:
        assert case.message
        for result in (planned, call(*arguments)):
            assert result.exit_code == 2, result.output
            (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
            assert case.message in line
        assert list(tmp_path.iterdir()) == []
        return
    assert planned.exit_code == 0, planned.output
    assert "peak memory" in planned.stdout or "peak_memory_bytes" in planned.stdout
    if "--dry-run" in case.arguments:
        return
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    check_engine(out, place.path / shape, exact=case.exact)


def check_engine(out: Path, model: Path, *, exact: bool) -> None:
    """It loads, runs, verifies, and every page about it can be made."""
    with liquidc.load(out) as engine:
        assert len(list(engine.generate("12 + 30", 3))) == 3
        told = verify(engine, reference(model), read_held_out(model / "heldout.txt", engine), SMALL)
        assert told["passed"] or not exact, told["failures"]
        weights = [line for line in told["failures"] if line.startswith("weight")]
        proof = [line for line in told["failures"] if "profiler" in line]
        assert (weights, proof) == ([], [])
        fidelity = engine.manifest.fidelity
    if not exact:
        assert fidelity is not None
        assert 0 <= fidelity["kl_nats"] < 9
        assert (fidelity["gate_flips"] is None) == (not engine.manifest.model.gates)
    shown = call("inspect", out, "--explain")
    assert shown.exit_code == 0, shown.output
    assert read_report(out)["fidelity"] == fidelity


@pytest.mark.parametrize("shape", SHAPES)
def test_the_other_verbs_on_a_measured_engine(shape: str, place: Place, tmp_path: Path) -> None:
    """Every verb takes an engine with or without gates, as text and as JSON."""
    out, model = tmp_path / "engine", place.path / shape
    data, profile = place.files(shape)["DATA"], tmp_path / "profile.json"
    common = ("--target", "onnxruntime", "--quantize", "int8", "--data", data)
    compiled = call("compile", model, "-o", out, *common)
    assert compiled.exit_code == 0, compiled.output
    assert ("gates decide otherwise" in compiled.stdout) == (shape in GATED)
    turns = ("--cached", 4, "--steps", 2, "--turns", 1)
    verbs: tuple[tuple[object, ...], ...] = (
        ("profile", out, "--data", data, "-o", profile, "--force"),
        ("profile", "show", profile),
        ("run", out, "--prompt", "12 + 30", "--max-new-tokens", 2, "--show-depth"),
        ("inspect", out, "--explain"),
        ("bench", out, *turns, "--prompt", 4),
        ("verify", out, "--windows", 1, "--prompts", 1, "--new-tokens", 2),
    )
    for arguments in verbs:
        for more in ((), ("--json",)):
            result = call(*arguments, *more)
            # rounding may cost a random model more than verify allows
            assert result.exit_code in ((0, 1) if arguments[0] == "verify" else (0,)), result.output
            assert "error" not in result.stderr
            if more:
                assert "schema" in json.loads(result.stdout)
    swept = call("bench", out, *turns, "--depth-bias", "0", "--data", data)
    assert swept.exit_code == (0 if shape in GATED else 2), swept.output
