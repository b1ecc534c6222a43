"""The inbox: an event that was answered is on the disk, once, until it was acted on."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from ml_backend.inbox import ATTEMPTS, Inbox
from tests.conftest import ROOT


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "inbox.sqlite"


@pytest.fixture
def inbox(path):
    with closing(Inbox(path)) as inbox:
        yield inbox


def body(number=1, size=0):
    return json.dumps({"action": "ANNOTATION_CREATED", "number": number, "rle": [0] * size}).encode()


def aged(path, seconds):
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE events SET touched_s = touched_s - ?, received_s = received_s - ?", (seconds, seconds))
        db.commit()


@pytest.mark.parametrize("content", [body(), body(size=100_000), b"", os.urandom(1000)])
def test_an_event_is_read_as_it_came_until_it_is_done(inbox, content):
    key = inbox.add(content, "ANNOTATION_CREATED")
    event = inbox.read(key)
    assert (event.body, event.action) == (content, "ANNOTATION_CREATED")
    assert abs(event.received_s - time.time()) < 5
    inbox.done(key)
    assert inbox.read(key) is None
    assert inbox.undone(10, 0) == []


def test_the_same_event_five_times_is_one_row_also_once_it_is_done(inbox):
    keys = {inbox.add(body(), "ANNOTATION_CREATED") for _ in range(5)}
    inbox.done(*keys)
    assert {inbox.add(body(), "ANNOTATION_CREATED")} == keys
    assert inbox.counts() == {"undone": 0, "done": 1, "failed": 0}


def test_a_large_event_takes_little_room(inbox, path):
    for number in range(20):
        inbox.add(body(number, size=200_000), "ANNOTATION_CREATED")
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 2e6


def test_what_came_just_now_is_left_to_whoever_brought_it(inbox, path):
    old, new = inbox.add(body(1), "A"), None
    aged(path, 60)
    new = inbox.add(body(2), "A")
    assert inbox.undone(10, 30) == [old]
    assert inbox.undone(10, 0) == [old, new]
    assert inbox.undone(1, 0) == [old]


def test_a_failure_is_tried_again_later_and_later_and_then_given_up_until_someone_asks(inbox, path):
    key = inbox.add(body(), "A")
    for attempt in range(1, ATTEMPTS):
        assert inbox.failed(key, "the image is not there")
        aged(path, 30 * 10**attempt - 5)
        assert inbox.undone(10, 30) == []
        aged(path, 10)
        assert inbox.undone(10, 30) == [key]
    assert not inbox.failed(key, "the image is still not there")
    assert inbox.undone(10, 0) == []
    assert inbox.failures() == [(key, "A", "the image is still not there")]
    assert inbox.retry() == 1
    assert inbox.undone(10, 0) == [key]
    inbox.done(key)
    assert not inbox.failed(key, "too late")
    assert inbox.counts() == {"undone": 0, "done": 1, "failed": 0}


def test_what_failed_lately_can_be_left_out_while_what_is_new_is_not(inbox, path):
    failed, new = inbox.add(body(1), "A"), inbox.add(body(2), "A")
    assert inbox.failed(failed, "the image is not there")
    assert inbox.undone(10, 0, failed_s=20) == [new]
    aged(path, 201)
    assert inbox.undone(10, 0, failed_s=20) == [failed, new]


def test_what_failed_is_tried_once_more_every_six_hours_for_two_weeks(inbox, path):
    key = inbox.add(body(), "A")
    for _ in range(ATTEMPTS):
        inbox.failed(key, "the image is not there")
    assert inbox.try_again() == 0
    for _ in range(2):
        aged(path, 6 * 3600 + 1)
        assert inbox.try_again() == 1
        assert inbox.undone(10, 20) == [key]
        assert not inbox.failed(key, "still not"), "one attempt"
    aged(path, 14 * 86400)
    assert inbox.try_again() == 0
    assert inbox.retry() == 1, "a person can still ask"


def test_what_is_tried_again_comes_a_few_at_a_time_and_is_no_sign_of_a_worker_that_is_gone(inbox, path):
    keys = [inbox.add(body(number), "A") for number in range(25)]
    for key in keys:
        for _ in range(ATTEMPTS):
            inbox.failed(key, "the image is not there")
    aged(path, 7 * 3600)
    assert [inbox.try_again(), inbox.try_again(), inbox.try_again()] == [20, 5, 0]
    assert inbox.oldest_s() is None
    new = inbox.add(body(99), "A")
    assert inbox.oldest_s() == inbox.read(new).received_s


def test_what_ends_those_who_try_it_is_never_tried_again_by_itself(inbox, path):
    key = inbox.add(body(), "A")
    inbox.give_up(key, "three workers died")
    assert inbox.failures() == [(key, "A", "three workers died")]
    aged(path, 7 * 3600)
    assert inbox.try_again() == 0
    assert inbox.retry() == 1
    assert inbox.undone(10, 0) == [key]


def test_regions_are_counted_once_however_often_an_event_is_done(inbox):
    first, second = inbox.add(body(1), "A"), inbox.add(body(2), "A")
    for _ in range(2):
        inbox.done(first, {"accepted": 2, "drawn": 1})
    inbox.done(second, {"drawn": 1}, note="r3: its mask is empty")
    assert inbox.regions() == {"accepted": 2, "drawn": 2}


def test_what_was_done_a_week_ago_is_forgotten_and_nothing_else(inbox, path):
    done, failed, undone = (inbox.add(body(number), "A") for number in range(3))
    inbox.done(done)
    for _ in range(ATTEMPTS):
        inbox.failed(failed, "no")
    assert inbox.prune() == 0
    aged(path, 8 * 86400)
    assert inbox.prune() == 1
    assert inbox.counts() == {"undone": 1, "done": 0, "failed": 1}
    assert inbox.undone(10, 0) == [undone]


def test_threads_and_processes_write_at_once(inbox, path):
    code = (
        "import sys; from pathlib import Path; from ml_backend.inbox import Inbox\n"
        "inbox = Inbox(Path(sys.argv[1]))\n"
        "for n in range(40): inbox.done(inbox.add(f'{sys.argv[2]} {n}'.encode(), 'A'), {'drawn': 1})"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)], cwd=ROOT) for n in range(2)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: inbox.done(inbox.add(f"here {n}".encode(), "A"), {"drawn": 1}), range(40)))
    assert [other.wait(60) for other in others] == [0, 0]
    assert inbox.counts()["done"] == 120
    assert inbox.regions() == {"drawn": 120}


def test_an_event_that_was_accepted_survives_a_kill(path):
    code = (
        "import os, signal, sys; from pathlib import Path; from ml_backend.inbox import Inbox\n"
        "inbox = Inbox(Path(sys.argv[1])); inbox.add(b'{}', 'A'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False).returncode == -9
    with closing(Inbox(path)) as inbox:
        assert inbox.counts()["undone"] == 1


def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(inbox):
    key = inbox.add(body(), "A")
    pages = inbox._db.execute("PRAGMA page_count").fetchone()[0]
    inbox._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        list(map(inbox.add, (os.urandom(2000) for _ in range(1000)), ["A"] * 1000))
    with pytest.raises(sqlite3.OperationalError, match="full"):
        inbox.done(key, {f"kind {number}" * 100: 1 for number in range(1000)})
    assert inbox.read(key) is not None, "rolled back as a whole"
    assert inbox.regions() == {}


def test_a_damaged_file_is_put_aside_and_the_inbox_begins_anew(path, caplog):
    path.parent.mkdir()
    path.write_bytes(os.urandom(5000))
    with closing(Inbox(path)) as inbox:
        inbox.add(body(), "A")
        assert inbox.counts()["undone"] == 1
    assert "is damaged" in caplog.text
    assert len(list(path.parent.glob("inbox.damaged-*"))) == 1
