"""Trainings as files: one at a time for a line, none lost."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from active_learning.status import TrainingFolder, lines_in


@pytest.fixture
def trainings(tmp_path) -> TrainingFolder:
    return TrainingFolder(tmp_path, "project-3")


def test_while_a_training_is_pending_asking_again_returns_that_one(trainings):
    first = trainings.ask("the button")
    assert trainings.ask("50 new corrections") == first
    assert first.id.startswith("train-project-3-")


def test_of_many_who_ask_at_once_all_get_the_same_training(trainings):
    with ThreadPoolExecutor(16) as pool:
        ids = {status.id for status in pool.map(lambda n: trainings.ask(f"asker {n}"), range(64))}
    pending = trainings.pending()
    assert pending is not None
    assert ids == {pending.id}


def test_after_the_end_another_can_be_asked_for_and_the_first_is_in_the_history(trainings):
    first = trainings.note(trainings.ask("the button", now_s=1000.0), state="running", step=5, steps=10)
    trainings.end(first, "failed", "no memory")
    assert trainings.pending() is None
    second = trainings.ask("the button", now_s=2000.0)
    assert second.id != first.id
    assert [(status.id, status.state, status.said) for status in trainings.history()] == [
        (first.id, "failed", "no memory")
    ]


def test_after_the_end_nothing_is_left_of_what_it_worked_with_nor_of_one_killed_at_its_end(trainings):
    (trainings.folder / "train-project-3-999" / "views").mkdir(parents=True)
    status = trainings.ask("the button", now_s=1000.0)
    (trainings.work(status) / "views").mkdir(parents=True)
    trainings.end(status, "failed", "no memory")
    assert not [path for path in trainings.folder.iterdir() if path.is_dir()]
    assert len(trainings.history()) == 1


def test_a_pending_training_tells_how_far_it_is(trainings):
    status = trainings.note(trainings.ask("the button"), state="running", step=5, steps=10, loss=0.5)
    assert trainings.pending() == status
    assert trainings.status() == status


def test_cancelling_reaches_the_pending_training_only(trainings):
    assert trainings.cancel() is None
    status = trainings.ask("the button", now_s=1.0)
    assert trainings.cancel() == status
    assert trainings.cancelled
    trainings.end(status, "cancelled", "it was cancelled")
    assert not trainings.cancelled
    trainings.ask("the button", now_s=2.0)
    assert not trainings.cancelled


def test_asking_after_a_cancel_asks_for_another_training(trainings):
    first = trainings.ask("the button", now_s=1000.0)
    trainings.cancel()
    second = trainings.ask("the button again", thorough=True, now_s=2000.0)
    assert second.id != first.id
    assert second.thorough
    assert not trainings.cancelled
    assert trainings.pending() == second
    assert [(status.id, status.state) for status in trainings.history()] == [(first.id, "cancelled")]


def test_a_cancelled_training_that_is_worked_on_is_left_to_who_works_on_it(trainings):
    first = trainings.ask("the button", now_s=1000.0)
    trainings.cancel()
    with trainings.alone() as ours:
        assert ours
        assert not trainings.end_cancelled()
        assert trainings.ask("the button again", now_s=2000.0).id == first.id
        assert trainings.cancelled, "it ends at its next step"
        assert not trainings.history()
    assert trainings.end_cancelled()
    assert not trainings.end_cancelled(), "once"


def test_a_cancel_that_came_too_late_stops_no_later_training(trainings):
    first = trainings.ask("the button", now_s=1000.0)
    trainings.cancel()
    left = (trainings.folder / "cancel").read_text()
    trainings.end(first, "published", "better")
    second = trainings.ask("the button", now_s=2000.0)
    (trainings.folder / "cancel").write_text(left)  # whoever cancelled wrote it only now
    assert not trainings.cancelled
    assert not trainings.end_cancelled()
    assert trainings.pending() == second
    assert trainings.cancel() == second
    assert trainings.cancelled


def test_the_lock_of_a_killed_process_is_free_at_once(trainings):
    code = (
        "import sys, time; from pathlib import Path; from active_learning.status import TrainingFolder\n"
        "with TrainingFolder(Path(sys.argv[1]), 'project-3').alone() as ours:\n"
        "    print(ours, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(trainings.folder.parent)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline() == "True\n"
        with trainings.alone() as ours:
            assert not ours
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    with trainings.alone() as ours:
        assert ours


def test_half_a_line_in_the_history_hides_no_other(trainings):
    trainings.end(trainings.ask("a", now_s=1.0), "rejected", "worse")
    path = trainings.folder / "history.jsonl"
    path.write_text(path.read_text() + '{"id": "tra')
    trainings.end(trainings.ask("b", now_s=2.0), "published", "better")
    assert [status.state for status in trainings.history()] == ["rejected", "published"]


def test_a_status_written_by_a_later_version_is_read_for_what_is_known(trainings):
    status = trainings.ask("the button", now_s=time.time())
    path = trainings.folder / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "green"}))
    assert trainings.status() == status


def test_lines_are_those_with_a_folder(tmp_path, trainings):
    assert lines_in(tmp_path / "none") == []
    trainings.ask("the button")
    assert lines_in(tmp_path) == ["project-3"]


def test_a_request_that_a_crash_left_empty_blocks_nothing(trainings):
    trainings.ask("the button")
    (trainings.folder / "request.json").write_text("")
    assert trainings.pending() is None
    status = trainings.ask("the button again")
    assert trainings.pending() == status


def test_losses_are_kept_by_step_once_each_until_the_next_training_is_asked_for(trainings):
    assert trainings.losses() == []
    status = trainings.ask("the button", now_s=1.0)
    for step, loss in ((10, 1.5), (20, 1.0), (10, 1.25)):  # killed, and gone on from a checkpoint
        trainings.note_loss(step, loss)
    with (trainings.folder / "losses.jsonl").open("a") as file:
        file.write("[30, 0.")
    assert trainings.losses() == [(10, 1.25), (20, 1.0)]
    trainings.end(status, "failed", "no memory")
    assert len(trainings.losses()) == 2
    trainings.ask("the button", now_s=2.0)
    assert trainings.losses() == []
