"""Annotators for a quarter of an hour while a training runs, and clicks at saturation."""

import json
import os
import subprocess
import sys

import numpy as np
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


def working(seconds, share, seed):
    """What jobs take that run one after another for this share of the time, MB at each of these seconds."""
    rng = np.random.default_rng(seed)
    taken, ends_s, job = [], 0.0, False
    for second in seconds:
        while ends_s <= second:
            job = not job
            ends_s += rng.exponential(20 * (share if job else 1 - share))
            height = rng.choice((10, 35, 35, 60, 110)) if job else 0
        taken.append(height)
    return np.array(taken)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_a_leak_is_told_in_a_process_whose_memory_swings_with_its_work_by_more_than_that(share):
    seconds = np.arange(0, 900, 5)
    for seed in range(20):
        sound = 115 + working(seconds, share, seed)
        leaking = sound + 115 * 0.07 * np.maximum(0, seconds - 180) / 720
        assert abs(growth(seconds, sound, 900)) < 2
        assert growth(seconds, leaking, 900) > 5


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
