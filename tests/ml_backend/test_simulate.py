"""A simulated team at a real backend: it clicks, submits, trains, and its clicks are counted before and after."""

import json

import pytest

from active_learning.corrections import CorrectionStore, held_out
from ml_backend.simulate import Plan, simulate, write_report
from model.annotations import AnnotationSet
from model.types import Refusal
from tests.active_learning.drawn import strip, strip_masks, write_photos


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> AnnotationSet:
    return write_photos(tmp_path_factory.mktemp("photos"), [strip(number) for number in range(6)], strip_masks())


def test_a_team_annotates_trains_and_is_served_the_new_version(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("GRACO_TRAIN_STEPS", "1")
    monkeypatch.setenv("GRACO_ENCODER", "exact")
    plan = Plan(rounds=(24,), budget=2, patience=1, limit=2)
    rounds = simulate(drawn, plan, tmp_path / "data")
    assert [one.corrections for one in rounds] == [0, 24]
    assert rounds[1].state in ("published", "rejected")
    assert (rounds[0].version != rounds[1].version) == (rounds[1].state == "published")
    store = CorrectionStore(tmp_path / "data" / "corrections.sqlite")
    counts = store.counts("1")
    store.close()
    assert counts.corrections == 24
    assert counts.kinds["corrected"] + counts.kinds["accepted"] == 24, "regions carry the ids that were offered"
    report = write_report(tmp_path / "report.json", drawn, plan, rounds)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["noc85_before"] == rounds[0].holdout.noc85
    assert report["noc90_reference_after"] == rounds[1].reference.noc90
    assert (tmp_path / "report.png").is_file()


def test_a_folder_without_held_out_photos_is_refused_before_anything_starts(drawn, tmp_path):
    few = [image for image in drawn.images if not held_out(image.digest())]
    with pytest.raises(Refusal, match="more are needed"):
        simulate(AnnotationSet(name="few", licence="", images=tuple(few)), Plan(), tmp_path / "data")
    assert not (tmp_path / "data").exists()
