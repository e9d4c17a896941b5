"""report.html as a file: its text, what browsers make of it, and what `inspect` reads in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from liquidc.errors import EngineError
from liquidc.pipeline import CompileOptions, compile_model
from liquidc.report import REPORT, read_report, report_page
from liquidc.runtime import load
from tests.liquidc.conftest import save_model
from tests.liquidc.profiles import HOSTILE
from tests.liquidc.test_cli import call, ok
from tests.liquidc.test_report import report

SECTIONS = (
    "Where the time goes",
    "Depth of each token",
    "Gates",
    "Depth paths",
    "Experts",
    "Cost by depth",
    "What each pass did",
    "Fidelity",
    "Guards",
)


@pytest.fixture(scope="module")
def data(profiled_engine: Path) -> dict[str, Any]:
    return report(profiled_engine)


class Parsed(HTMLParser):
    """Text by the id or class of the innermost element, scripts, and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.scripts: list[str] = []
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append((tag, given))
        if "data-t" in given:
            self.tokens.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag, attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attrs = self.open[-1] if self.open else ("", {})
        if "data-t" in attrs:
            self.tokens[-1] += data
        elif tag == "script":
            self.scripts.append(data)
        elif tag == "h2":
            self.headings.append(data)
        if tag not in ("script", "style"):
            self.text += data


def test_the_page_is_well_formed_and_asks_for_nothing(
    profiled_engine: Path, null_engine: Path
) -> None:
    for directory in (profiled_engine, null_engine):
        page = (directory / REPORT).read_text()
        parsed = Parsed(page)
        assert [tag for tag, _ in parsed.open] == []
        assert parsed.headings == list(SECTIONS)
        assert all(address.startswith("#") for address in parsed.addresses)
        assert not re.search(r"https?:|url\(|@import", page)
        assert "default-src 'none'" in page


def test_tokens_are_text(profiled_engine: Path) -> None:
    """Nothing that a model says becomes markup, or ends the data."""
    parsed = Parsed((profiled_engine / REPORT).read_text())
    assert parsed.tokens == [*HOSTILE[:2], "␀\u202e?⇥", "a⏎\n", " "]
    assert len(parsed.scripts) == 2
    pieces = [piece.replace("\ud800", "?") for piece in HOSTILE]
    assert report(profiled_engine)["sample"]["pieces"] == pieces
    assert json.loads(parsed.scripts[0])["sample"]["pieces"] == pieces


def test_names_are_text(data: dict[str, Any]) -> None:
    """Of a model, of a rule, in facts."""
    evil = "<img src=x onerror=alert(1)>"
    model = data["model"] | {"type": evil}
    passes = [data["passes"][0] | {"name": evil, "fired": {evil: 1}, "facts": {evil: [evil]}}]
    changed = data | {"model": model, "passes": passes, "fidelity": {evil: evil}}
    page = report_page(changed | {"guard": {evil: evil}, "target": {"name": evil}})
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 9


def test_the_same_inputs_give_the_same_bytes(
    profiled_engine: Path, profile_file: Path, tmp_path: Path
) -> None:
    """From a copy of the model and the profile, elsewhere."""
    model = save_model(tmp_path / "another model")
    profile = tmp_path / "another profile.json"
    profile.write_bytes(profile_file.read_bytes())
    options = CompileOptions(target="null", profile=profile, add=("order-experts",))
    compile_model(model, tmp_path / "engine", options)
    assert (tmp_path / "engine" / REPORT).read_bytes() == (profiled_engine / REPORT).read_bytes()
    with load(profiled_engine) as loaded:
        assert REPORT in loaded.manifest.files


def test_without_a_profile_the_page_says_how_to_make_one(null_engine: Path) -> None:
    data = report(null_engine)
    assert (data["profile"], data["sample"], data["experts"]) == (None, None, [])
    assert data["costs"]["expected"] is data["costs"]["quantiles"] is None
    assert data["layers"][1]["expected"] is data["layers"][1]["run_rate"] is None
    assert data["costs"]["worst"]["flops"] > 0
    text = Parsed((null_engine / REPORT).read_text()).text
    assert text.count("liquidc profile MODEL --data TEXT") == 6


def test_a_model_without_layers(tmp_path: Path) -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 10))
    compile_model(model, tmp_path / "engine", CompileOptions(target="null"))
    data = report(tmp_path / "engine")
    assert data["costs"]["worst"] == {"weights": 32 + 360, "cache": 0, "bytes": 392, "flops": 160}
    text = Parsed((tmp_path / "engine" / REPORT).read_text()).text
    assert "The model has no depth gates" in text
    assert "The model has no experts" in text


# ---- inspect


def test_inspect_reads_it(profiled_engine: Path, data: dict[str, Any], null_engine: Path) -> None:
    assert ok("inspect", profiled_engine)["report"] == data
    shown = call("inspect", profiled_engine).stdout
    assert re.search(r"\b1 +68\.8% ", shown)
    assert "with every layer on (128 tokens in the cache)" in shown
    assert "tokens that run it" not in call("inspect", null_engine).stdout
    assert ok("inspect", null_engine)["report"]["profile"] is None


def test_an_engine_without_a_report_and_a_damaged_one(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    for content in (
        b"<html></html>",
        b'<script type="application/json" id="data">{</script>',
        b"\xff",
    ):
        (tmp_path / REPORT).write_bytes(content)
        with pytest.raises(EngineError, match=r"report\.html: not (a report|UTF-8 text)"):
            read_report(tmp_path)


# ---- a browser

CHROMIUM = shutil.which("chromium")


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Headless Chromium without a network."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9",
        f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("profiled", [True, False])
def test_in_a_browser(
    profiled: bool, profiled_engine: Path, null_engine: Path, tmp_path: Path
) -> None:
    page = (profiled_engine if profiled else null_engine) / REPORT
    found = browse(page, tmp_path / "user", "--dump-dom")
    assert "CONSOLE" not in found.stderr, found.stderr
    dom = found.stdout
    for section in SECTIONS:
        assert f">{section}</h2>" in dom
    assert '<div id="tip"' in dom, "the script did not run"
    assert dom.count("<svg") >= 10
    data = report(page.parent)
    if profiled:
        share = data["costs"]["expected"]["bytes"] / data["costs"]["full"]["bytes"]
        assert f"<b>{100 * share:.1f} %</b>" in dom
        assert f"<b>{data['profile']['depth']['mean']:.2f} of 4</b>" in dom
        assert dom.count('class="matrix"') == 8
        assert dom.count("data-t=") == len(HOSTILE)
    picture = tmp_path / "page.png"
    browse(page, tmp_path / "user", f"--screenshot={picture}", "--window-size=400,3000")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 20_000


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_page_with_an_error_would_be_noticed(profiled_engine: Path, tmp_path: Path) -> None:
    """A script that is not the page's own is refused, and the console says so."""
    page = tmp_path / "page.html"
    text = (profiled_engine / REPORT).read_text()
    page.write_text(text.replace("</body>", "<script>document.title = 'x';</script></body>"))
    found = browse(page, tmp_path / "user", "--dump-dom")
    assert "CONSOLE" in found.stderr
    assert "<title>x</title>" not in found.stdout
