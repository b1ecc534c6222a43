"""Annotators for a quarter of an hour while a training runs, and clicks at saturation."""

import json
import os
import subprocess
import sys

import pytest

from tests.bench.report import Row
from tests.conftest import ROOT
from tests.soak.memory import growth


def run(module, folder, *arguments):
    """Run a command that writes a report, and give that."""
    written = folder / "report.json"
    command = [sys.executable, "-m", f"tests.soak.{module}", *arguments, "--report", str(written)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"COLUMNS": "160"}, capture_output=True, text=True)
    assert written.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(written.read_text())


def test_a_leak_is_told_from_a_filled_cache_a_spike_and_noise():
    seconds = range(0, 900, 5)
    filled = [min(1000, 600 + 4 * s) + s % 3 for s in seconds]
    spiky = [value + 500 * (n % 20 == 0) for n, value in enumerate(filled)]
    leaking = [value + s / 10 for s, value in zip(seconds, filled, strict=True)]
    assert abs(growth(seconds, filled, 900)) < 0.2
    assert abs(growth(seconds, spiky, 900)) < 0.2
    assert growth(seconds, leaking, 900) > 6
    assert growth(seconds[:90], filled[:90], 900) is None, "it ended half way: not judged"


@pytest.mark.soak
def test_ten_annotators_for_fifteen_minutes_while_a_training_runs_meet_no_error_no_delay_and_no_leak(tmp_path, report):
    found = run("annotators", tmp_path, "--annotators", "10", "--minutes", "15", "--think", "2", "--training")
    report([Row(**row) for row in found["rows"]])
    assert found["passed"], json.dumps({key: found[key] for key in ("rows", "first_errors", "log", "queues")}, indent=1)


@pytest.mark.soak
def test_clicks_at_saturation_reach_most_of_what_the_decoder_alone_does(tmp_path, report):
    found = run("saturation", tmp_path)
    report([Row(**row) for row in found["rows"]])
    assert found["passed"], json.dumps(found["rows"], indent=1)
