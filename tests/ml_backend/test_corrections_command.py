"""What `corrections counts` suggests, and what `corrections forget` leaves of a photo."""

import dataclasses
from contextlib import closing

import pytest
from typer.testing import CliRunner

from active_learning.corrections import CorrectionStore
from active_learning.images import ImageStore
from active_learning.snapshots import usual_level
from ml_backend.__main__ import app
from ml_backend.answers import AnswerStore
from tests.active_learning.corrected import box, correction, image
from tests.ml_backend.test_answers import answer


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


@pytest.fixture
def photos(store, tmp_path):
    """Task 3 of project 1 is on photos a, b and (answered only) d, task 4 on c; task 3 of project 2 is on b."""
    corrected = [("1", 7, 3, "a"), ("1", 8, 3, "b"), ("1", 9, 4, "c"), ("2", 7, 3, "b")]
    for project, number, task, name in corrected:
        one = correction(project=project, annotation=number, task=task, image=image(name))
        store.replace(project, number, [one], updated_s=1000.0)
    store.retire("1", 8, updated_s=2000.0)
    for name in "abcd":
        ImageStore(tmp_path / "images").put(image(name), name.encode())
        folder = tmp_path / "embeddings" / "light-1" / image(name)[:2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{image(name)}.safetensors").write_bytes(b"")
    with closing(AnswerStore(tmp_path / "answers.sqlite", limit=100)) as answers:
        answers.remember(
            dataclasses.replace(answer(name), project="1.5", task_id=task, image_id=image(name))
            for name, task in (("a", 3), ("d", 3), ("c", 4))
        )
    (tmp_path / "admin" / "compare" / "project-1_a_b").mkdir(parents=True)
    return tmp_path


def kept(folder):
    """Return names of photos that have a file in images/ and in embeddings/; the same in both."""
    images = {name for name in "abcd" if ImageStore(folder / "images").path(image(name))}
    encoded = {name for name in "abcd" if list((folder / "embeddings").rglob(f"{image(name)}.safetensors"))}
    assert images == encoded
    with closing(AnswerStore(folder / "answers.sqlite", limit=100)) as answers:
        return "".join(sorted(images)), "".join(name for name in "abcd" if answers.find(name))


def forget(*words, typed=""):
    return CliRunner().invoke(app, ["corrections", "forget", "--project", "1", *words], input=typed)


def test_a_task_is_forgotten_with_all_photos_that_nothing_else_names(store, photos):
    done = forget("--task", "3", "--yes")
    assert done.exit_code == 0, done.output
    assert "task 3 of project 1: 2 corrections on 2 photos" in done.output
    assert "1 photos stay" in done.output
    assert kept(photos) == ("bc", "c"), "b is in project 2, too"
    assert not (photos / "admin" / "compare").exists()
    assert set(store.known("1")) == {9}
    assert set(store.known("2")) == {7}
    late = correction(annotation=11, image=image("a"))
    assert not store.replace("1", 11, [late], updated_s=3000.0), (
        "an annotation of this task that comes later is ignored"
    )


def test_a_whole_project_is_forgotten_without_a_task(store, photos):
    assert forget("--yes").exit_code == 0
    assert kept(photos) == ("b", "")
    assert store.known("1") == {}
    assert set(store.known("2")) == {7}


def test_nothing_is_forgotten_without_a_yes(store, photos):
    before = kept(photos)
    for typed in ("n\n", ""):
        done = forget("--task", "3", typed=typed)
        assert done.exit_code == 1
        assert "cannot be undone" in done.output
    assert kept(photos) == before
    assert set(store.known("1")) == {7, 8, 9}
    assert forget("--task", "3", typed="y\n").exit_code == 0
    assert set(store.known("1")) == {9}


def test_what_could_not_be_deleted_is_found_again_by_the_next_attempt(store, photos, monkeypatch):
    def fail(*_):
        raise OSError("read-only")

    with monkeypatch.context() as broken:
        broken.setattr(ImageStore, "delete", fail)
        done = forget("--task", "3", "--yes")
        assert done.exit_code == 1
        assert "run this again" in done.output
    assert set(store.known("1")) == {7, 8, 9}
    assert forget("--task", "3", "--yes").exit_code == 0
    assert kept(photos) == ("bc", "c")
