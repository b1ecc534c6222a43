"""python -m tests.bench [--quick] [--full] [--only NAME ...]: measure, print a table, write docs/benchmarks.md.

Only a whole run writes; --quick and --only print. A figure that is missed is said in the table and is no failure.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from rich.console import Console

from tests.bench import clicks, codec, encoders, example, load, quality, report
from tests.bench.backend import ROOT
from tests.bench.stage import Measure, Stage

_DOCUMENT = ROOT / "docs" / "benchmarks.md"
_MEASURES: dict[str, Measure] = {  # in this order: new images must be new
    "memory": load.new_images,
    "click": clicks.warm_clicks,
    "drafts": clicks.drafts,
    "example": example.against_example,
    "health": load.health,
    "encode": encoders.against_torch,
    "brush": codec.brush_encoding,
    "quality": quality.simulated_annotator,
}
_ON_REQUEST: dict[str, Measure] = {"encoders": encoders.runtimes}


def main() -> None:
    """Run what was asked for."""
    known = _MEASURES | _ON_REQUEST
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repetitions, to see whether it runs")
    parser.add_argument("--full", action="store_true", help="also parts of objects, and all encoder runtimes")
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=f"any of: {', '.join(known)}")
    options = parser.parse_args()
    wanted = {name: known[name] for name in known if name in options.only} if options.only else _MEASURES
    if options.full and not options.only:
        wanted = known

    console = Console()
    average = os.getloadavg()[0]
    rows: list[report.Row] = []
    with Stage(quick=options.quick, full=options.full) as stage:
        for name, measure in wanted.items():
            start = time.perf_counter()
            rows += measure(stage)
            console.print(f"{name}: {time.perf_counter() - start:.0f} s")
        rows += load.highest_memory(stage)
    lines = report.machine(" ".join(["python -m tests.bench", *sys.argv[1:]]), average)
    report.show(rows, console)
    for line in lines:
        console.print(line)
    if options.quick or options.only:
        console.print(f"{_DOCUMENT.relative_to(ROOT)} is left as it is: only a whole run writes it")
    else:
        report.write(_DOCUMENT, rows, lines)
        console.print(f"written: {_DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
