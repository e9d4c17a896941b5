"""The command line: exit codes, messages, JSON, what bad input gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from liquidc.cli.main import VERBS, cli
from liquidc.manifest import MANIFEST, SCHEMA
from liquidc.version import __version__
from tests.liquidc.conftest import CONFIG, save_model
from tests.liquidc.test_manifest import sealed


def call(*args: object, input: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], input=input)


def ok(*args: object, input: str | None = None) -> dict[str, Any]:
    """The JSON of a verb that succeeds."""
    result = call(*args, "--json", input=input)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert (content["schema"], content["liquidc"]) == (1, __version__)
    return content


def refused(message: str, *args: object, code: int = 2) -> None:
    """The verb ends with `code` and one line that says `message`, as text and as JSON."""
    result = call(*args)
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith("error: ")
    assert message in line
    assert result.stderr.endswith(line + "\n")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    result = call(*args, "--json")
    assert result.exit_code == code
    content = json.loads(result.stdout)
    assert message in content["error"]
    assert content["exit_code"] == code
    assert (content["schema"], content["liquidc"]) == (1, __version__)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def model(model_directory: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(model_directory, tmp_path / "model"))


@pytest.fixture
def engine(null_engine: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil, with its build log."""
    shutil.copy(null_engine.with_name("tiny.build.json"), tmp_path / "engine.build.json")
    return Path(shutil.copytree(null_engine, tmp_path / "engine"))


# ---- the command itself


@pytest.mark.parametrize(("chosen", "policy"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_threads_of_pytorch_do_not_spin(chosen: str | None, policy: str, null_engine: Path) -> None:
    """Unless the user wants it; OpenMP itself says what it was told."""
    environment = {**os.environ, "OMP_DISPLAY_ENV": "true"}
    environment.pop("OMP_WAIT_POLICY", None)
    if chosen is not None:
        environment["OMP_WAIT_POLICY"] = chosen
    command = [
        sys.executable,
        "-m",
        "liquidc.cli.main",
        "run",
        str(null_engine),
        "-p",
        "a",
        "-n",
        "1",
        "--traceback",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


def test_help_lists_the_verbs() -> None:
    for arguments in ([], ["--help"], ["-h"]):
        result = call(*arguments)
        assert result.exit_code == 0
        for verb, summary in VERBS.items():
            assert verb in result.stdout
            assert summary in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_examples_and_json(verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert "--json" in result.stdout


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = """
import sys
from liquidc.cli.main import cli
try:
    cli.main(["--help"])
except SystemExit:
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "rich", "tokenizers", "jinja2", "scipy"}
    print(*heavy & set(sys.modules), file=sys.stderr, end="")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_version() -> None:
    assert call("--version").stdout.strip() == f"liquidc, version {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bake"], "No such command 'bake'"),
        (["run"], "Missing argument 'ENGINE'"),
        (["compile", "x", "--bogus"], "No such option"),
        (["compile", "x"], "Missing option '-o'"),
        (["run", "x", "-n", "many"], "'many' is not a valid integer"),
        (["run", "x", "-p", "a", "--ids", "1"], "Give --prompt or --ids"),
        (["run", "x", "--ids", "1,b"], "is not a list of numbers"),
        (["bench", "x", "--levels", "all"], "is not a list of numbers"),
        (["verify", "x", "--windows", "0"], "must be 1 or more"),
        (["compile", "x", "-o", "y", "--start-from", "trace"], "is not STAGE=FILE"),
    ],
)
def test_wrong_usage_is_2(arguments: list[str], message: str) -> None:
    refused(message, *arguments)


def test_an_internal_error_is_4_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import liquidc.engine

    def fault(path: Path) -> None:
        raise ZeroDivisionError("division by\nzero")

    monkeypatch.setattr(liquidc.engine, "read_manifest", fault)
    refused("ZeroDivisionError: division by zero (a fault of liquidc", "inspect", "x", code=4)
    monkeypatch.setenv("LIQUIDC_DEBUG", "1")
    result = call("inspect", "x")
    assert result.exit_code == 4
    assert "Traceback" in result.stderr


def test_a_closed_pipe_is_quiet(null_engine: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    code = f"from liquidc.cli.main import cli; cli.main(['inspect', {str(null_engine)!r}])"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


# ---- compile


def test_compile_and_its_json(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = ok("compile", model, "-o", output, "--target", "null", "--stats")
    assert result["engine"] == str(output)
    assert [stage["name"] for stage in result["stages"]][:3] == ["hash", "trace", "passes"]
    assert result["seconds"] > 0
    assert result["peak_rss_bytes"] > 0
    assert len(result["sha256"]) == 64
    assert ok("inspect", output)["sha256"] == result["sha256"]
    assert result["rules"]


def test_compile_says_what_it_did(model: Path, tmp_path: Path) -> None:
    result = call("compile", model, "-o", tmp_path / "out", "--target", "null", "--stats")
    assert result.exit_code == 0
    assert "trace" in result.stderr
    assert "sha256" in result.stdout
    assert "fired" in result.stdout


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = names(tmp_path)
    plan = ok("compile", model, "-o", tmp_path / "out", "--target", "null", "--dry-run")
    assert plan["stages"] == ["trace", "passes", "link", "engine"]
    assert plan["model_type"] == "liquid"
    assert plan["copied"] == ["config.json", "tokenizer.json"]
    assert plan["bytes_to_resume"] == 0
    result = call("compile", model, "--target", "null", "--dry-run", "--no-pass", "compact-tokens")
    assert result.exit_code == 0
    assert "nothing was written" in result.stdout
    assert "compact-tokens" not in result.stdout
    assert names(tmp_path) == before


def change_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    config = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps(config))


def spoil(model: Path, what: str) -> None:
    """Damage a model directory in one of the ways that are expected."""
    weights = model / "model.safetensors"
    match what:
        case "no directory":
            shutil.rmtree(model)
        case "no config":
            (model / "config.json").unlink()
        case "config is not JSON":
            (model / "config.json").write_text("{")
        case "config is a list":
            (model / "config.json").write_text("[]")
        case "unknown type":
            change_config(model, model_type="solid")
        case "contradiction":
            change_config(model, num_key_value_heads=3)
        case "no weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "pickle":
            weights.rename(model / "pytorch_model.bin")
        case "wrong shape":
            change_config(model, intermediate_size=64, moe=CONFIG["moe"], hidden_size=64)
        case "NaN":
            _rewrite(weights, float("nan"))
        case "wrong dtype":
            _rewrite(weights, None)
        case "tokenizer":
            (model / "tokenizer.json").write_text("{}")
        case _:
            raise ValueError(what)


def _rewrite(weights: Path, value: float | None) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    name = "model.norm.weight"
    if value is None:
        tensors[name] = tensors[name].to(torch.int64)
    else:
        tensors[name][3] = value
    save_file(tensors, weights)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no directory", "no such directory"),
        ("no config", "config.json: missing"),
        ("config is not JSON", "not valid JSON"),
        ("config is a list", "must be a JSON object"),
        ("unknown type", "model_type"),
        ("contradiction", "num_key_value_heads"),
        ("no weights", "model.safetensors"),
        ("truncated", "model.safetensors"),
        ("pickle", "pytorch_model.bin"),
        ("wrong shape", "weight"),
        ("wrong dtype", "model.norm.weight"),
        ("NaN", "model.norm.weight"),
        ("tokenizer", "tokenizer.json"),
    ],
)
def test_a_model_that_is_wrong_is_2_and_leaves_nothing(
    model: Path, tmp_path: Path, what: str, message: str
) -> None:
    spoil(model, what)
    before = names(tmp_path)
    refused(message, "compile", model, "-o", tmp_path / "out", "--target", "null")
    assert names(tmp_path) == before


def test_an_output_that_exists_needs_force(model: Path, engine: Path, tmp_path: Path) -> None:
    before = names(tmp_path)
    refused("--force replaces it", "compile", model, "-o", engine, "--target", "null")
    refused("no engine of liquidc", "compile", model, "-o", model, "--target", "null", "--force")
    assert names(tmp_path) == before
    ok("compile", model, "-o", engine, "--target", "null", "--force", "--no-pass", "fuse-linear")
    assert names(tmp_path) == before


def test_an_output_that_can_t_be_written(model: Path) -> None:
    refused("can't be written", "compile", model, "-o", "/proc/engine", "--target", "null")


# ---- engines that are wrong, for every verb that loads one

LOADING = (["run", "-p", "a"], ["verify"], ["bench"], ["inspect"])


@pytest.mark.parametrize("verb", LOADING, ids=lambda verb: verb[0])
@pytest.mark.parametrize("what", ["missing", "changed", "extra", "newer", "no engine"])
def test_an_engine_that_is_wrong_is_2(engine: Path, verb: list[str], what: str) -> None:
    weights = engine / "weights.bin"
    message = "weights.bin"
    match what:
        case "missing":
            weights.unlink()
        case "changed":
            data = bytearray(weights.read_bytes())
            data[len(data) // 2] ^= 1
            weights.write_bytes(data)
        case "extra":
            (engine / "surprise").touch()
            message = "surprise"
        case "newer":
            (engine / MANIFEST).write_bytes(sealed({"schema": 99}))
            message = f"schema 99 is newer than {SCHEMA}"
        case _:
            shutil.rmtree(engine)
            message = "no such engine"
    refused(message, verb[0], engine, *verb[1:])


@pytest.mark.parametrize("verb", LOADING[:3], ids=lambda verb: verb[0])
def test_an_engine_of_a_target_that_is_not_here_is_3(engine: Path, verb: list[str]) -> None:
    manifest = engine / MANIFEST
    body = json.loads(manifest.read_bytes())
    for target, message in (
        ({"name": "abacus"}, "no target 'abacus'"),
        ({"name": "null", "format": "99"}, "it has format 99"),
    ):
        manifest.write_bytes(sealed({**body, "target": target}, drop="seal"))
        # no file is read before that: with one missing it is still 3
        (engine / "weights.bin").unlink(missing_ok=True)
        refused(message, verb[0], engine, *verb[1:], code=3)


# ---- run


def test_run(null_engine: Path) -> None:
    result = ok("run", null_engine, "-p", "The", "-n", 5)
    assert len(result["tokens"]) == 5
    assert result["text"] == "".join(token["text"] for token in result["tokens"])
    token = result["tokens"][0]
    assert token["depth"] == len(token["layers"])
    assert set(token["layers"]) >= {0, 3}
    assert all(len(chosen) == 2 for chosen in token["experts"].values())
    plain = call("run", null_engine, "-p", "The", "-n", 5)
    assert plain.stdout == result["text"] + "\n"
    assert ok("run", null_engine, "--ids", "84,104,101", "-n", 5)["text"] == result["text"]
    assert ok("run", null_engine, "-n", 5, input="The\n")["text"] == result["text"]


def test_run_deeper_and_shallower(null_engine: Path) -> None:
    deep = ok("run", null_engine, "-p", "a", "-n", 4, "--min-depth", 4)
    assert {token["depth"] for token in deep["tokens"]} == {4}
    flat = ok("run", null_engine, "-p", "a", "-n", 4, "--depth-bias", -100)
    assert {token["depth"] for token in flat["tokens"]} == {2}


def test_run_shows_depth(null_engine: Path) -> None:
    result = call("run", null_engine, "-p", "The", "-n", 8, "--show-depth")
    assert result.exit_code == 0
    assert "layers run" in result.stdout
    assert "of 4 over 8 tokens" in result.stdout
    assert any(bar in result.stdout for bar in "▁▂▃▄▅▆▇█")


def in_terminal(stream: str, *args: object) -> tuple[int, str]:
    """Exit code, and what the verb writes to a `stream` that is a terminal."""
    main, terminal = os.openpty()
    command = [sys.executable, "-m", "liquidc.cli.main", *map(str, args)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100"}
    with subprocess.Popen(command, env=env, **(quiet | {stream: terminal})) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                data = os.read(main, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            shown += data
    os.close(main)
    return process.returncode, shown.decode()


def test_tokens_are_coloured_in_a_terminal(null_engine: Path) -> None:
    code, shown = in_terminal("stdout", "run", null_engine, "-p", "The", "-n", 6, "--show-depth")
    assert code == 0
    assert shown.count("\x1b[38;2;") >= 6
    assert "of 4 over 6 tokens" in shown


def test_a_bar_in_a_terminal(model: Path, tmp_path: Path) -> None:
    code, shown = in_terminal(
        "stderr", "compile", model, "-o", tmp_path / "out", "--target", "null"
    )
    assert code == 0
    assert "\x1b[" in shown
    assert "trace" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", ""], "the prompt is empty"),
        (["--ids", "300"], "token 300 is not in the vocabulary"),
        (["-p", "x" * 129], "the prompt has 129 tokens, the context of the model 128"),
        (["-p", "a", "-n", "0"], "max_new_tokens"),
        (["-p", "a", "--temperature", "-1"], "temperature"),
        (["-p", "a", "--top-p", "2"], "top_p"),
        (["-p", "a", "--min-depth", "9"], "min_depth must be from 0 to 4"),
    ],
)
def test_prompts_and_values_that_are_wrong_are_2(
    null_engine: Path, arguments: list[str], message: str
) -> None:
    refused(message, "run", null_engine, *arguments)


# ---- verify, bench, inspect, targets, opt

QUICK = ("--windows", 2, "--window", 64, "--prompts", 3, "--new-tokens", 8)


def test_verify_passes(engine: Path) -> None:
    result = ok("verify", engine, *QUICK)
    assert result["passed"]
    for key in ("gate_agreement", "expert_overlap", "greedy_match", "top1_agreement"):
        assert result[key] == 1.0
    assert result["logits_max_rel"] < 1e-5
    assert result["kl_nats"] < 1e-9
    assert result["bits_per_byte"] == pytest.approx(result["bits_per_byte_reference"], rel=1e-5)
    assert 0 < result["layers_run_by_gates"] < result["layers_offered"]
    assert result["layers_run_by_gates"] == result["layers_run_by_trace"]
    assert result["experts_traced_layers"] == [0, 1, 2, 3]
    assert result["experts_run_by_routes"] == result["experts_run_by_trace"]
    plain = call("verify", engine, *QUICK)
    assert plain.exit_code == 0
    assert plain.stdout.strip().endswith("passed")
    assert "layers run, by trace" in plain.stdout


def test_verify_fails_over_a_threshold(engine: Path) -> None:
    result = call("verify", engine, *QUICK, "--min-greedy-match", 1.1, "--json")
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["passed"]
    assert "error" not in json.loads(result.stdout)
    plain = call("verify", engine, *QUICK, "--min-greedy-match", 1.1)
    assert plain.exit_code == 1
    assert "failed: greedy_match is 1, at least 1.1 is needed" in plain.stdout


def test_work_on_skipped_tokens_is_declared(model: Path, tmp_path: Path) -> None:
    """Without compaction the profiler sees rows that the gates skipped, as the lowering says."""
    options = ("--target", "null", "--no-pass", "compact-tokens")
    ok("compile", model, "-o", tmp_path / "masked", *options)
    result = call("verify", tmp_path / "masked", *QUICK, "--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content["layers_run_by_trace"] == content["layers_computed"]
    assert content["layers_run_by_trace"] > content["layers_run_by_gates"]
    assert content["gate_agreement"] == 1.0


def test_verify_needs_its_reference(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "engine.build.json").unlink()
    refused("no reference", "verify", engine)
    other = save_model(tmp_path / "other", seed=1)
    refused("not the model that the engine was compiled from", "verify", engine, "--model", other)
    refused("no held-out text", "verify", engine, "--model", tmp_path)


def test_bench(null_engine: Path) -> None:
    options = ("--steps", 2, "--turns", 2, "--prompt", 4, "--cached", 4)
    result = ok("bench", null_engine, *options)
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        assert {"name", "shape", "ms_median", "ms_min", "ms_max"} <= row.keys()
        assert {"bytes_per_token", "bandwidth_share"} <= row.keys()
    plain = call("bench", null_engine, *options)
    assert plain.exit_code == 0
    assert "decode, 50 % on" in plain.stdout


def test_inspect(null_engine: Path) -> None:
    result = ok("inspect", null_engine)
    assert result["target"] == {"name": "null", "format": "1"}
    assert result["model"]["layers"] == 4
    assert result["engine_schema"] == SCHEMA
    plain = call("inspect", null_engine)
    assert plain.exit_code == 0
    for part in ("weights.bin", "@prefill", "gate_force", "2 of 4", "p > 0.5", "always runs"):
        assert part in plain.stdout


def test_targets() -> None:
    found = {entry["name"]: entry for entry in ok("targets")["targets"]}
    assert found["null"]["available"]
    assert found["null"]["reason"] is None
    assert call("targets").exit_code == 0


IR = """module @m

func @f(%x: f32[B]) -> (y: f32[B]) {
  %a = neg %x : f32[B]
  %b = neg %x : f32[B]
  %c = add %a, %b : f32[B]
  %unused = neg %c : f32[B]
  return %c
}
"""


def test_opt(tmp_path: Path) -> None:
    file = tmp_path / "m.ir"
    file.write_text(IR)
    assert call("opt", file).stdout == IR
    assert call("opt", "-", input=IR).stdout == IR
    result = call("opt", file, "--passes", "eliminate-dead,eliminate-common", "--verify-each")
    assert result.exit_code == 0
    assert result.stdout.count("neg") == 1
    stats = call("opt", file, "--passes", "eliminate-dead", "--stats", "-o", tmp_path / "out.ir")
    assert "eliminate-dead" in stats.stderr
    assert stats.stdout == ""
    assert "unused" not in (tmp_path / "out.ir").read_text()
    content = ok("opt", file, "--passes", "eliminate-dead")
    assert content["rules"]["eliminate-dead"] == 1
    listed = ok("opt", "--list")["passes"]
    assert {"name", "summary"} <= listed[0].keys()
    assert "eliminate-dead" in call("opt", "--list").stdout


def test_opt_explains_a_rule(tmp_path: Path) -> None:
    file = tmp_path / "m.ir"
    file.write_text(IR)
    refused("was not tried by these passes", "opt", file, "--explain", "no-such-rule")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", ":1:1:"),
        (IR.replace("add %a", "add %z"), "m.ir:6:"),
        (IR.replace("%a, %b : f32[B]", "%a, %b : f32[C]"), "m.ir:6:3: add yields f32[B]"),
    ],
)
def test_ir_that_is_wrong_is_2(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "m.ir"
    file.write_text(text)
    result = call("opt", file)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert call("opt", tmp_path / "none.ir").exit_code == 2
