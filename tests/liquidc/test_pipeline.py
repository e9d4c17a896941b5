"""A compile from directory to engine, with the null target: same bytes, dumps, starts, faults."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

import liquidc
from liquidc.backends.null.backend import NullBackend
from liquidc.errors import InputError, InternalError, TargetUnavailable
from liquidc.ir import Module, ops, parse_module
from liquidc.ir.rewriter import Statistics
from liquidc.option_text import split_list
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.registry import DEFAULT_PIPELINE, PASSES
from liquidc.passplan import plan_passes, run_passes
from liquidc.pipeline import CompileOptions, compile_model, make_plan
from tests.liquidc.conftest import save_model

NULL = CompileOptions(target="null")


def hashes(engine: Path) -> dict[str, str]:
    return {
        path.relative_to(engine).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in engine.rglob("*")
        if path.is_file()
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_two_compiles_are_equal_byte_for_byte(null_engine: Path, tmp_path: Path) -> None:
    """In another process, from a copy of the model in another directory."""
    model = save_model(tmp_path / "copy of the model")
    output = tmp_path / "elsewhere" / "engine"
    script = f"""
        from liquidc.pipeline import CompileOptions, compile_model
        compile_model({str(model)!r}, {str(output)!r}, CompileOptions(target="null"))
    """
    env = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=env)
    assert hashes(output) == hashes(null_engine)
    assert sorted(hashes(output)) == [
        "config.json",
        "manifest.json",
        "module.ir",
        "report.html",
        "tokenizer.json",
        "weights.bin",
    ]


def test_no_file_names_this_machine(null_engine: Path, model_directory: Path) -> None:
    for path in null_engine.rglob("*"):
        data = path.read_bytes()
        assert str(model_directory).encode() not in data
        assert os.uname().nodename.encode() not in data
    log = json.loads(null_engine.with_name("tiny.build.json").read_bytes())
    assert log["source"] == str(model_directory)
    assert [stage["name"] for stage in log["stages"]] == [
        "hash",
        "trace",
        "passes",
        "link",
        "engine",
        "manifest",
        "report",
        "seal",
    ]
    assert all(stage["peak_rss_bytes"] > 1e7 for stage in log["stages"])
    assert log["ops"] > 100


def test_the_manifest_tells_the_model(null_engine: Path) -> None:
    manifest = liquidc.load(null_engine).manifest
    model = manifest.model
    assert (model.type, model.layers, model.vocabulary, model.context) == ("liquid", 4, 256, 128)
    assert [gate.layer for gate in model.gates] == [1, 2]
    assert [(e.layer, e.experts, e.per_token) for e in model.experts] == [
        (layer, 4, 2) for layer in range(4)
    ]
    assert manifest.cache is not None
    assert manifest.cache.policy == "drop"
    assert manifest.cache.shape == ("B", 2, "S", 8)
    assert [p.name for p in manifest.passes] == list(DEFAULT_PIPELINE)
    assert manifest.functions["prefill"].input("gate_force") is not None
    assert manifest.functions["decode"].output("logits") is not None
    assert manifest.tools["torch"] == torch.__version__


def test_the_price_of_a_token(null_engine: Path) -> None:
    """Bytes by hand, for the tied head, attention, router, 2 of 4 experts, gate."""
    cost = liquidc.load(null_engine).manifest.cost
    d, hidden = 32, 16
    attention = (d * d + 2 * 16 * d + d * d) * 4
    layer = attention + 2 * (3 * hidden * d) * 4 + 4 * d * 4 + 2 * d * 4
    assert cost.skip == (0, 0)
    for run in cost.run:
        assert layer - 2 * d * 4 <= run <= layer
    assert 2 * layer + 256 * d * 4 <= cost.always <= 2 * layer + 256 * d * 4 + 6000


def test_dumps_of_every_stage_can_be_started_from(
    null_engine: Path, model_directory: Path, tmp_path: Path
) -> None:
    dumps = tmp_path / "dumps"
    compile_model(model_directory, tmp_path / "engine", CompileOptions(target="null", dump=dumps))
    written = names(dumps)
    assert written[0] == "00-trace.ir"
    assert written[-1] == f"{len(DEFAULT_PIPELINE) + 1:02d}-link.ir"
    assert len(written) == len(DEFAULT_PIPELINE) + 2
    for name in written:
        parse_module((dumps / name).read_text(), name)
    last_pass = dumps / written[-2]
    for stage, file in (
        ("trace", "00-trace.ir"),
        ("passes", last_pass.name),
        ("link", written[-1]),
    ):
        start = (stage, dumps / file)
        output = tmp_path / f"from-{stage}"
        compiled = compile_model(
            model_directory, output, CompileOptions(target="null", start=start)
        )
        for name in ("module.ir", "weights.bin"):
            assert hashes(output)[name] == hashes(null_engine)[name]
        assert compiled.manifest.passes[0].name == "start-from"


def test_a_start_that_is_not_ir(model_directory: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.ir"
    broken.write_text("module @m\n\nfunc @prefill(%x: f32[B]) -> () {\n  %y = nonsense %x\n}\n")
    with pytest.raises(InputError, match=r"broken\.ir:4"):
        compile_model(
            model_directory,
            tmp_path / "engine",
            CompileOptions(target="null", start=("passes", broken)),
        )
    assert names(tmp_path) == ["broken.ir"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "abacus"}, "no target 'abacus'; there are"),
        ({"passes": ("fold",)}, "no pass 'fold'; there are"),
        ({"without": ("fold",)}, "no pass 'fold'; there are"),
        ({"passes": ("eliminate-dead{x=1}",)}, "the pass eliminate-dead has no option 'x'"),
        ({"passes": ("Eliminate Dead",)}, "is not a pass; write name or name"),
        ({"start": ("bake", Path("x"))}, "no stage 'bake'; null has trace, passes, link, engine"),
        ({"start": ("engine", Path("x"))}, "the stage engine can't be started from"),
        ({"start": ("trace", Path("x.ir"))}, "x.ir: no such file to start from"),
    ],
)
def test_options_that_can_t_be(
    model_directory: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compile_model(
            model_directory, tmp_path / "engine", CompileOptions(**({"target": "null"} | options))
        )
    assert names(tmp_path) == []


def test_passes_can_be_chosen(model_directory: Path, tmp_path: Path) -> None:
    options = CompileOptions(
        target="null", passes=("eliminate-common", "eliminate-dead"), without=("eliminate-common",)
    )
    compiled = compile_model(model_directory, tmp_path / "engine", options)
    assert [p.name for p in compiled.manifest.passes] == ["eliminate-dead"]


def test_a_target_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NullBackend, "availability", lambda self: "there is no abacus")
    with pytest.raises(TargetUnavailable, match="can't be built here: there is no abacus"):
        make_plan(NULL)


def test_a_module_in_memory(model_directory: Path, null_engine: Path, tmp_path: Path) -> None:
    from liquidc.frontend.model import LiquidForCausalLM

    model = LiquidForCausalLM.from_directory(model_directory)
    engine = liquidc.compile(model, tmp_path / "engine", target="null")
    with liquidc.load(null_engine) as other:
        assert (engine.logits([1, 2, 3]) == other.logits([1, 2, 3])).all()
    assert engine.tokenizer is None
    assert engine.manifest.model.context == 128


def test_a_module_without_the_protocol_computes_logits_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(10, 8)
            self.out = torch.nn.Linear(8, 10)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(torch.nn.functional.silu(self.embed_tokens(ids)))

    model = Plain()
    engine = liquidc.compile(model, tmp_path / "engine", target="null")
    assert "only @prefill is compiled" in caplog.text
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3]]))[0].numpy()
    assert abs(engine.logits([1, 2, 3]) - expected).max() < 1e-6
    tokens = list(engine.generate([1, 2, 3], 1))
    assert tokens[0].id == int(expected[-1].argmax())
    with pytest.raises(InputError, match="has no cache"):
        list(engine.generate([1, 2, 3], 2))


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 10))
    with torch.no_grad():
        model[1].weight[3, 3] = float("nan")
    with pytest.raises(InputError, match=r"1\.weight holds NaN"):
        liquidc.compile(model, tmp_path / "engine", target="null")
    assert names(tmp_path) == []


def test_a_pass_that_breaks_the_ir_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Breaker(Pass):
        """Uses a value out of scope."""

        name: ClassVar[str] = "break-it"
        contract: ClassVar[Literal["bitwise", "reassociates"]] = "bitwise"

        def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
            body = module.functions["f"].body
            body.ops.insert(0, body.ops.pop(1))

    monkeypatch.setitem(PASSES, "break-it", Breaker)
    text = """module @m

func @f(%x: f32[B]) -> (y: f32[B]) {
  %a = neg %x : f32[B]
  %b = neg %a : f32[B]
  return %b
}
"""
    module = parse_module(text)
    plan = plan_passes(("eliminate-dead", "break-it"), ())
    with pytest.raises(InternalError, match="invalid IR after eliminate-dead → break-it: @f"):
        run_passes(module, plan, Statistics(), verify_each=True)
    assert len([op for op in module.walk() if isinstance(op, ops.Neg)]) == 2


def test_options_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Tuned(Pass):
        """Does nothing."""

        name: ClassVar[str] = "tuned"
        bits: int = 8
        wide: bool = False
        mode: str = "x"

        def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
            pass

    monkeypatch.setitem(PASSES, "tuned", Tuned)
    assert split_list("a, tuned{bits=4,wide=true},b") == ("a", "tuned{bits=4,wide=true}", "b")
    (plan,) = plan_passes(("tuned{bits=4, wide=true}",), ())
    assert plan.options == {"bits": 4, "wide": True, "mode": "x"}
    assert plan.text == "tuned{bits=4,wide=True}"
    assert plan_passes((plan.text,), ())[0].instance == plan.instance
    for text in ("tuned{bits=x}", "tuned{wide=maybe}"):
        with pytest.raises(InputError, match="must be of type"):
            plan_passes((text,), ())


def test_a_disk_that_fills_up(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import liquidc.backends.weights_file as weights_file

    evaluate = weights_file.evaluate

    def full(*given: Any) -> Any:
        yield from evaluate(*given)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights_file, "evaluate", full)
    with pytest.raises(InputError, match=r"No space left on device.*nothing was written"):
        compile_model(model_directory, tmp_path / "engine", NULL)
    assert names(tmp_path) == []


def test_a_real_limit_on_the_size_of_files(model_directory: Path, tmp_path: Path) -> None:
    """The kernel refuses the write itself: a limit on file sizes, set in a process of its own."""
    script = f"""
        import resource, sys
        from liquidc.cli.main import cli
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        cli.main(["compile", {str(model_directory)!r}, "-o", {str(tmp_path / "engine")!r},
                  "--target", "null"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_a_compile_leaves_nothing(
    model_directory: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A signal from outside, while a pass runs."""
    script = f"""
        import os, sys, time
        import liquidc.pipeline as pipeline
        from liquidc.cli.main import cli
        def slow(*given, **more):
            print("now", flush=True)
            time.sleep(60)
        pipeline.run_passes = slow
        cli.main(["compile", {str(model_directory)!r}, "-o", {str(tmp_path / "engine")!r},
                  "--target", "null"])
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        assert names(tmp_path) == ["engine.partial"]
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == "error: interrupted"
    assert names(tmp_path) == []
