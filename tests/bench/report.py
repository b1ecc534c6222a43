"""What was measured, as a table on the terminal and between two marks in docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

BEGIN = "<!-- measured: written by make bench, changes between the marks are lost -->"
END = "<!-- /measured -->"
_PACKAGES = ("torch", "openvino", "onnxruntime", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. Without `reach` it is information; with one but without `reached` it could not be measured."""

    what: str
    measured: str
    reach: str = ""
    reached: bool | None = None

    @property
    def verdict(self) -> str:
        """The last column."""
        if not self.reach:
            return ""
        return {True: "yes", False: "not reached", None: "not measured"}[self.reached]


def milliseconds(seconds: Sequence[float], *percentiles: int) -> str:
    """Return percentiles as `p50 / p95`, in ms.

    >>> milliseconds([0.1, 0.2, 0.3], 50)
    '200 ms'
    """
    values = [1000 * float(np.percentile(seconds, p)) for p in percentiles]
    return " / ".join(f"{value:.1f}" if value < 20 else f"{value:.0f}" for value in values) + " ms"


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table."""
    table = Table("what", "reach", "measured", "reached", title="Figures", show_lines=True)
    colours = {"yes": "green", "not reached": "red", "not measured": "yellow", "": "default"}
    for row in rows:
        table.add_row(row.what, row.reach, row.measured, f"[{colours[row.verdict]}]{row.verdict}[/]")
    console.print(table)


def machine(command: str, load: float) -> list[str]:
    """Return lines that say when, where and with what was measured; `load` is the load average before."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, `{command}`",
        f"{_processor()}, {cores} cores, {platform.system()}; load average before the run {load:.1f}"
        + (" (others were computing too: take times as upper limits)" if load > 0.7 else ""),
        f"Python {platform.python_version()}, {packages}",
    ]


def write(path: Path, rows: Sequence[Row], lines: Sequence[str]) -> None:
    """Replace what stands between the marks of `path`; all other text stays.

    Raises:
        ValueError: the file lacks a mark.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} lacks the marks {BEGIN!r} and {END!r}; put them where the table belongs")
    table = ["| what | reach | measured | reached |", "|---|---|---|---|"]
    table += [f"| {row.what} | {row.reach} | {row.measured} | {row.verdict} |" for row in rows]
    measured = "\n".join([*(f"- {line}" for line in lines), "", *table])
    draft = path.with_suffix(".draft")
    draft.write_text(f"{before}{BEGIN}\n{measured}\n{END}{after}")
    draft.replace(path)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    """Return the CPU's name: Linux tells it in a file, others by `platform`."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
