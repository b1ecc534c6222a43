"""How far the scoring of tasks is, as files that another process reads."""

from __future__ import annotations

import os

import pytest

from ml_backend import scoring
from ml_backend.scoring import Progress, due_file, forget_progress, scorings
from ml_backend.settings import Settings


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(data_dir=tmp_path, shared_dir=None, redis_url=None)


def ask(settings: Settings, project: int, asked_s: float) -> None:
    file = due_file(settings, project)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (asked_s, asked_s))


def seen(settings: Settings) -> list[tuple[str, float, int, int]]:
    return [(one.project, one.asked_s, one.looked, one.of) for one in scorings(settings)]


def test_nothing_asked_for_is_nothing(settings):
    assert seen(settings) == []


def test_projects_that_wait_stand_in_the_order_they_were_asked_for_with_how_far_each_is(settings, monkeypatch):
    monkeypatch.setattr(scoring, "_NOTED_S", 0.0)
    ask(settings, 7, 2000.0)
    ask(settings, 3, 1000.0)
    progress = Progress(settings, 7)
    assert seen(settings) == [("3", 1000.0, 0, 0), ("7", 2000.0, 0, 0)]
    progress(0, 40)
    progress(12, 40)
    assert seen(settings) == [("3", 1000.0, 0, 0), ("7", 2000.0, 12, 40)], "the request keeps its time"
    later = Progress(settings, 7)  # a job of its own, which goes on
    later(5, 28)
    assert seen(settings)[1] == ("7", 2000.0, 17, 40)
    forget_progress(settings, 7)
    assert seen(settings)[1] == ("7", 2000.0, 0, 0)
    due_file(settings, 7).unlink()
    forget_progress(settings, 7)
    assert seen(settings) == [("3", 1000.0, 0, 0)]


def test_it_is_noted_once_a_second(settings):
    ask(settings, 3, 1000.0)
    progress = Progress(settings, 3)
    for looked in range(5):
        progress(looked, 5)
    assert seen(settings) == [("3", 1000.0, 0, 5)]


@pytest.mark.parametrize("content", ["", "[1", "{}", '["a", 2]', "[1]", "null"])
def test_a_damaged_note_is_none(settings, content):
    ask(settings, 3, 1000.0)
    due_file(settings, 3).with_suffix(".progress").write_text(content)
    assert seen(settings) == [("3", 1000.0, 0, 0)]


def test_a_disk_that_takes_no_note_stops_nothing(settings):
    Progress(settings, 3)(1, 2)  # its folder is not there
