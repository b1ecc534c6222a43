"""What `corrections counts` suggests."""

from contextlib import closing

import pytest
from typer.testing import CliRunner

from active_learning.corrections import CorrectionStore
from active_learning.snapshots import usual_level
from ml_backend.__main__ import app
from tests.active_learning.corrected import box, correction, image


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("GRACO_DATA_DIR", str(tmp_path))
    with closing(CorrectionStore(tmp_path / "corrections.sqlite")) as store:
        yield store


def counts():
    done = CliRunner().invoke(app, ["corrections", "counts"])
    assert done.exit_code == 0, done.output
    return done.output


def of_levels(*levels):
    return [
        correction(annotation=n, image=image(str(n)), granularity=level, updated_s=1000.0)
        for n, level in enumerate(levels)
    ]


def test_a_level_that_most_corrections_have_is_proposed_for_clicks_without_one(store, monkeypatch):
    for one in of_levels(*[0.3] * 20, 0.2, *[1.0] * 9):
        store.replace("1", one.annotation, [one], updated_s=1000.0)
    said = counts()
    assert 'most corrections are parts of level about 0.3: write graco="0.3" on the granularity tag' in said
    assert "GRACO_DEFAULT_GRANULARITY=0.3" in said
    monkeypatch.setenv("GRACO_DEFAULT_GRANULARITY", "0.5")
    assert "GRACO_DEFAULT_GRANULARITY" not in counts(), "somebody has decided already"


def test_corrections_of_all_levels_and_few_ones_speak_for_none():
    assert usual_level(of_levels(*[0.3] * 19)) is None
    assert usual_level(of_levels(*[0.3] * 10, *[1.0] * 10)) is None
    assert usual_level(of_levels(*[level / 10 for level in range(1, 11)] * 4)) is None


def test_where_no_level_was_given_that_of_the_mask_in_its_whole_counts():
    wholes = [
        correction("whole", box(0, 0, 40, 40), annotation=n, image=image(str(n)), granularity=None) for n in range(25)
    ]
    assert usual_level(wholes) == 1.0
    parts = [
        correction(f"r{k}", box(20 * k, 0, 20 * k + 10, 32), annotation=n, image=image(str(n)), granularity=None)
        for n in range(25)
        for k in range(2)
    ]
    assert usual_level([*wholes, *parts]) == 0.2


def test_corrections_of_a_class_that_is_gone_are_told(store):
    store.replace("1", 7, [correction(), correction("r2", label="door")], updated_s=1000.0)
    assert "no such class" not in counts()
    store.note_classes("1", ["door", "rim"], updated_s=2000.0)
    assert "project 1 has no such class any more: wheel 1." in counts()
