"""What `conftest.py` arranges."""

from __future__ import annotations

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all")
def test_groups_reach_xdist(request: pytest.FixtureRequest) -> None:
    """xdist 3.8 sends groups by an attribute of items that pytest 9.2 no longer reads."""
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@tests/test_conftest.py")
