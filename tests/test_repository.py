"""The shape of the repository: imports, length of files, pinned and documented dependencies."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("frontend", "passes", "backends", "kernels")
FILES = [
    path
    for top in ("liquidc", *LINKED, "tests", "samples")
    for path in sorted((ROOT / top).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
]
LONGEST = 450
LONGER = {"tests/liquidc/test_cli.py": 600}
"""Lines of files that are long for a reason: one test after the other."""

ALLOWED = {
    "liquidc.ir": {"liquidc.ir", "liquidc.errors"},
    "liquidc.profile": {"liquidc.records", "liquidc.errors"},
    "liquidc.machine": {"liquidc.records", "liquidc.errors"},
    "liquidc.passes": {
        "liquidc.passes",
        "liquidc.ir",
        "liquidc.errors",
        "liquidc.machine",
        "liquidc.profile",
    },
    "liquidc.frontend": {
        "liquidc.frontend",
        "liquidc.ir",
        "liquidc.errors",
        "liquidc.files",
        "liquidc.records",
    },
    "liquidc.backends": {
        "liquidc.backends",
        "liquidc.ir",
        "liquidc.errors",
        "liquidc.manifest",
        "liquidc.records",
        "liquidc.text",
    },
}
"""What each part may import of ours; the rest of `liquidc` may import all of them."""
VENDORS = {"onnx": "backends/onnxruntime", "onnxruntime": "backends/onnxruntime"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("liquidc", *parts) if parts[0] in LINKED else parts)


def imports(path: Path) -> set[str]:
    """Modules that a file imports at run time, wherever it does."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def within(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("part", ALLOWED)
def test_import_direction(part: str) -> None:
    for path in FILES:
        if within(module_name(path), {part}):
            ours = {name for name in imports(path) if within(name, {"liquidc"})}
            wrong = {name for name in ours if name != "liquidc" and not within(name, ALLOWED[part])}
            assert not wrong, f"{path}: {part} may not import {sorted(wrong)}"


def test_vendor_packages_stay_in_their_backend() -> None:
    for path in FILES:
        place = str(path.relative_to(ROOT))
        if place.startswith(("tests/", "samples/")):
            continue
        for vendor, home in VENDORS.items():
            if any(within(name, {vendor}) for name in imports(path)):
                assert place.startswith(home), f"{place} imports {vendor}"


def test_files_are_short() -> None:
    for path in FILES:
        place = str(path.relative_to(ROOT))
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= LONGER.get(place, LONGEST), f"{place} has {lines} lines"


def test_layout() -> None:
    for name in LINKED:
        link = ROOT / "liquidc" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"
        assert (ROOT / name / "__init__.py").is_file()


def test_help_is_light() -> None:
    code = "import sys, liquidc, liquidc.cli.main; print(sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    for heavy in ("torch", "onnx", "onnxruntime", "tokenizers", "numpy", "rich"):
        assert f"'{heavy}'" not in loaded, f"liquidc --help imports {heavy}"


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=! ]", line)[0].lower() for line in requirements} - {"liquidc"}


def test_dependencies_are_documented_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    told = (ROOT / "docs/dependencies.md").read_text()
    pinned = dict(
        line.strip().lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    )
    for name in names(project["dependencies"]) | names([r for e in extras.values() for r in e]):
        assert re.search(rf"\b{name}\b", told), f"docs/dependencies.md says nothing of {name}"
    for name in names(project["dependencies"]) | names(extras["cpu"]) | names(extras["dev"]):
        assert name in pinned, f"constraints.txt does not pin {name}"


def test_links_in_documents_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
