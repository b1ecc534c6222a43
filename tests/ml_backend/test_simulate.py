"""A simulated team at a real backend: it clicks, submits, trains, and its clicks are counted before and after."""

import json
import signal
import subprocess
import sys

import psutil
import pytest
from PIL import Image

from active_learning.corrections import CorrectionStore, held_out
from active_learning.scores import Scores
from ml_backend.simulate import Plan, Round, compared, corrections_until, simulate, write_report
from model.annotations import AnnotationSet
from model.types import Refusal
from tests.active_learning.drawn import strip, strip_masks, write_photos
from tests.conftest import ROOT
from tests.ml_backend.conftest import wait_until
from tests.ml_backend.test_supervisor import alive


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> AnnotationSet:
    return write_photos(tmp_path_factory.mktemp("photos"), [strip(number) for number in range(6)], strip_masks())


def test_a_team_annotates_trains_and_is_served_the_new_version(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("GRACO_TRAIN_STEPS", "1")
    monkeypatch.setenv("GRACO_ENCODER", "exact")
    plan = Plan(rounds=(12, 24), budget=2, patience=1, limit=2, orders=("active",), thorough=True)
    arms = simulate(drawn, plan, tmp_path / "data")
    rounds = arms["active"]
    assert [one.corrections for one in rounds] == [0, 12, 12, 24, 24]
    assert [one.thorough for one in rounds] == [False, False, True, False, True]
    assert rounds[2].state in ("published", "kept", "rejected"), "not 'nothing new'"
    assert rounds[4].title == "24 corrections, thorough"
    assert rounds[1].state in ("published", "kept", "rejected")
    assert (rounds[0].version != rounds[1].version) == (rounds[1].state == "published")
    store = CorrectionStore(tmp_path / "data" / "active" / "corrections.sqlite")
    counts, corrections = store.counts("1"), store.snapshot("1").corrections
    store.close()
    assert {one.label for one in corrections} == set(strip_masks()), "labelled as the folder names them"
    assert counts.corrections == 24
    assert counts.kinds["corrected"] + counts.kinds["accepted"] == 24, "regions carry the ids that were offered"
    report = write_report(tmp_path / "report.json", drawn, plan, arms)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["noc85_before"] == rounds[0].holdout.noc85
    assert report["noc90_reference_after"] == rounds[4].reference.noc90
    for name in ("report.png", "report-corrections.png", "report-active.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300


def scores(noc85: float) -> Scores:
    return Scores(objects=1, noc85=noc85, noc90=noc85, misses85=0, misses90=0, iou1=0.5, curve=(0.5,))


def rounds_of(*figures: tuple[int, float]) -> list[Round]:
    return [
        Round(
            corrections=count, version="v", state="", seconds_to_serving=None, holdout=scores(noc), reference=scores(1)
        )
        for count, noc in figures
    ]


def test_orders_are_compared_by_the_corrections_to_the_lowest_figure_that_both_reach():
    random = rounds_of((0, 6.0), (100, 5.0), (200, 4.0))
    active = rounds_of((0, 6.0), (100, 4.0), (200, 4.5), (300, 3.0))
    found = compared({"random": random, "active": active})
    assert found == {"noc85": 4.0, "random": 200, "active": 100, "ratio": 0.5}
    assert corrections_until(active, 3.5) == 250
    assert corrections_until(random, 3.5) is None
    assert compared({"random": random}) is None
    worse = rounds_of((0, 6.0), (100, 7.0))
    assert compared({"random": random, "active": worse}) is None, "nothing was won, so nothing can be compared"


def test_a_folder_without_held_out_photos_is_refused_before_anything_starts(drawn, tmp_path):
    few = [image for image in drawn.images if not held_out(image.digest())]
    with pytest.raises(Refusal, match="more are needed"):
        simulate(AnnotationSet(name="few", licence="", images=tuple(few)), Plan(), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_told_to_end_it_takes_its_backend_along(shared, tmp_path):
    command = [sys.executable, "-m", "ml_backend", "simulate", str(shared / "data" / "penn-fudan")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--report", str(tmp_path / "report.json")], cwd=ROOT, stdout=log, stderr=log
        )
    started: list[psutil.Process] = []
    try:
        below = psutil.Process(process.pid)

        def backend() -> list[psutil.Process]:
            assert process.poll() is None, (tmp_path / "log").read_text()
            found = below.children(recursive=True)
            return found if len(found) > 2 else []

        started = wait_until(backend, limit_s=60)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
        wait_until(lambda: not any(map(alive, started)), limit_s=30)
    finally:
        for one in filter(alive, started):
            one.kill()
        process.kill()
        process.wait()
