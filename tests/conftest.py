"""One thread per test process, which keeps exports and runs all tests of a case of the grid."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator

import pytest
import torch

from liquidc.frontend.parts import PartTracer
from tests import traces
from tests.oracle.grid import edge_cases, grid

torch.set_num_threads(1)
gc.set_threshold(20_000, 10, 10)  # as `liquidc.cli.main.main` does
atexit.register(gc.freeze)


@pytest.fixture(scope="session", autouse=True)
def _kept_traces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartTracer, "export", traces.kept)
        yield


SPREAD = ("generator/test_properties", "passes/test_mutations")
"""Files whose tests share nothing and take long: they go to any process."""
FIRST = ("test_readme", "test_pages", "test_same_bytes", "test_smollm2")
"""Files with single tests that take a minute: at the end, one process would wait for the other."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups for `--dist loadgroup`: the tests of a case of the grid, else those of a file.

    The long ones come first, if the groups keep their order (`--no-loadscope-reorder`).
    """
    cases = {case.name for case in (*grid(), *edge_cases())}
    for item in items:
        call = getattr(item, "callspec", None)
        values = call.params.values() if call else ()
        named = [value for value in values if isinstance(value, str) and value in cases]
        path = item.nodeid.partition("::")[0]
        if not any(name in path for name in SPREAD):
            item.add_marker(pytest.mark.xdist_group(named[0] if named else path))
    items.sort(key=lambda item: not any(name in item.nodeid for name in FIRST))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden`."""
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden anew; see git diff"
    )


@pytest.fixture
def update_golden(pytestconfig: pytest.Config) -> bool:
    """Whether golden files are written instead of compared."""
    return bool(pytestconfig.getoption("--update-golden"))
