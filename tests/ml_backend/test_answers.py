"""What we answered, remembered and bounded, so that what becomes of it can be told."""

import dataclasses
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from ml_backend.answers import Answer, AnswerStore


def answer(region_id="r1", digest="d1"):
    return Answer(
        region_id=region_id,
        project="3.1",
        task_id=7,
        image_id="i" * 64,
        digest=digest,
        prompt='{"clicks": []}',
        granularity=0.5,
        model_version="light-1",
        phrase="wheel",
        adapter="light-granularity-1",
        shape=b"rshape",
        parts="r1 r2",
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "answers.sqlite"


@pytest.fixture
def store(path):
    with closing(AnswerStore(path, limit=100)) as store:
        yield store


def test_a_region_that_was_not_ours_is_not_found(store):
    store.remember([answer()])
    assert store.find("r2") is None


def test_an_answer_comes_back_as_it_was_remembered_also_after_a_restart(store, path):
    store.remember([answer()])
    assert store.find("r1") == answer()
    store.close()
    with closing(AnswerStore(path, limit=100)) as again:
        assert again.find("r1") == answer()


def test_a_file_of_the_first_version_is_gone_on_with(path):
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as old:
        old.executescript("""CREATE TABLE answers (
            region_id TEXT PRIMARY KEY, project TEXT, task_id INTEGER, image_id TEXT, digest TEXT NOT NULL,
            prompt TEXT NOT NULL, granularity REAL, model_version TEXT NOT NULL, answered_s REAL NOT NULL
            ) WITHOUT ROWID;
            INSERT INTO answers VALUES ('r0', '3.1', 7, 'i', 'd0', '{}', 0.5, 'light-1', 1.0);""")
    with closing(AnswerStore(path, limit=100)) as store:
        store.remember([answer()])
        old = store.find("r0")
        assert (old.digest, old.adapter, old.phrase, old.shape, old.parts) == ("d0", None, None, None, None)
        assert store.find("r1") == answer()


def test_a_region_answered_again_replaces_itself(store):
    store.remember([answer(digest="old")])
    store.remember([answer(digest="new")])
    assert len(store) == 1
    assert store.find("r1").digest == "new"


def test_the_oldest_answers_are_forgotten(store):
    for n in range(300):
        store.remember([answer(f"r{n}")])
    assert len(store) <= 110
    assert store.find("r299") is not None
    assert store.find("r0") is None


def test_two_processes_share_one_file(store, path):
    with closing(AnswerStore(path, limit=100)) as other, ThreadPoolExecutor(4) as pool:
        both = [store, other] * 20
        list(pool.map(lambda n: both[n].remember([answer(f"r{n}")]), range(40)))
        assert len(store) == len(other) == 40


def test_a_full_disk_costs_an_error_in_the_log_and_no_answer(store, caplog):
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    store.remember([answer(f"r{n}", "d" * 1000) for n in range(200)])
    assert "could not be remembered" in caplog.text
    assert "full" in caplog.text


def test_a_damaged_file_is_put_aside_and_remembering_begins_anew(path, caplog):
    path.parent.mkdir()
    path.write_bytes(os.urandom(5000))
    with closing(AnswerStore(path, limit=100)) as store:
        store.remember([answer()])
        assert store.find("r1") == answer()
    assert "is damaged" in caplog.text
    assert len(list(path.parent.glob("answers.damaged-*"))) == 1


def test_a_table_that_was_lost_meanwhile_is_as_if_nothing_was_remembered(store, path, caplog):
    with closing(sqlite3.connect(path)) as other:
        other.execute("DROP TABLE answers")
    store.remember([answer()])
    assert store.find("r1") is None
    assert "cannot be read" in caplog.text


def test_answers_of_a_task_and_of_its_images_are_forgotten_and_others_are_not(store):
    def of(region, project, task, image):
        return dataclasses.replace(answer(region), project=project, task_id=task, image_id=image)

    store.remember(
        [
            *(of("a", "3.1", 7, "one"), of("b", "3", 7, "two"), of("c", "3.1", 8, "three")),
            *(of("d", "30", 7, "four"), of("e", "4", 1, "one"), of("f", None, None, "five")),
        ]
    )
    assert store.images_of("3", 7) == {"one", "two"}
    assert store.images_of("3", None) == {"one", "two", "three"}
    assert store.forget("3", 7, ["one"]) == 3
    assert [key for key in "abcdef" if store.find(key)] == ["c", "d", "f"]
