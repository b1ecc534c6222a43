"""Fixtures of the backend's tests, and the figures of long runs at the end of the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from rich.console import Console

from tests.bench.report import Row, show
from tests.ml_backend.conftest import _plain_environment, label_studio

__all__ = ["_plain_environment", "label_studio"]
_ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Callable[[Sequence[Row]], None]:
    """Show these figures in the summary: report(rows)."""
    return pytestconfig.stash.setdefault(_ROWS, []).extend


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was measured."""
    if rows := config.stash.get(_ROWS, None):
        terminalreporter.section("figures")
        show(rows, Console(width=160))
