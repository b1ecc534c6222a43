"""The ledger of corrections: whole or absent, the newest state, deletions final, whatever comes first and is killed."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from active_learning.corrections import CorrectionStore, NotKept, held_out, parents_of
from model.annotations import encode
from tests.active_learning.corrected import annotation, box, correction, image, values
from tests.conftest import ROOT

WRITER = """
import sys
from pathlib import Path
from active_learning.corrections import CorrectionStore
from tests.active_learning.corrected import annotation
store = CorrectionStore(Path(sys.argv[1]))
for pair in sys.argv[2].split():
    number, version = map(int, pair.split(":"))
    if store.replace("1", number, annotation(number, version), updated_s=1000.0 + version):
        print(number, version, flush=True)
"""
ON_A_FULL_DISK = """
import sys
from pathlib import Path
from active_learning.corrections import CorrectionStore, NotKept
from tests.active_learning.corrected import correction
import numpy as np
store = CorrectionStore(Path(sys.argv[1]) / "corrections.sqlite")
rng, kept = np.random.default_rng(7), []
def ragged(n):
    return correction(mask=rng.random((200, 200)) < 0.5, proposed=None, annotation=n)
try:
    for n in range(1000):
        store.replace("1", n, [ragged(n), ragged(n)], updated_s=1000.0)
        kept.append(n)
except NotKept as error:
    print(error)
assert kept and len(kept) < 1000
assert sorted(store.known("1")) == kept
assert all(len(store.get("1", n)) == 2 for n in kept)
assert store.get("1", len(kept)) == []
(Path(sys.argv[1]) / "ballast").unlink()
assert store.replace("1", 5000, [ragged(5000)], updated_s=1000.0)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "corrections.sqlite"


@pytest.fixture
def store(path):
    with closing(CorrectionStore(path)) as store:
        yield store


def writer(path, pairs):
    said = " ".join(f"{number}:{version}" for number, version in pairs)
    command = [sys.executable, "-c", WRITER, str(path), said]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def unsynced(path):
    """A ledger that does not wait for the disk, where a test writes much and nothing is killed."""
    store = CorrectionStore(path)
    store._db.execute("PRAGMA synchronous=OFF")
    return closing(store)


def ledger(store):
    """All that a ledger holds, in one order."""
    found = sorted(store.corrections(None), key=lambda one: (one.project, one.annotation, one.region))
    return [values(one) for one in found], [store.known(project) for project in store.projects()]


def test_a_correction_comes_back_as_it_was_given_also_after_a_restart(store, path):
    given = [
        correction(),
        correction(
            "r2",
            np.random.default_rng(1).random((70, 90)) < 0.5,
            **{"task": None, "label": "", "granularity": None, "phrase": None, "clicks": (), "kind": "drawn"},
            **{"proposed": None, "adapter": None, "annotator": None, "ground_truth": True},
        ),
    ]
    assert store.replace("1", 7, given, updated_s=1000.0, task=3)
    store.close()
    with closing(CorrectionStore(path)) as again:
        found = again.get("1", 7)
    assert [values(one) for one in found] == [values(given[0]), values(given[1]) | {"task": 3}]


def test_adding_twice_is_adding_once(store):
    for _ in range(2):
        assert store.replace("1", 7, [correction(), correction("r2")], updated_s=1000.0)
    assert [one.region for one in store.corrections("1")] == ["r1", "r2"]


def test_an_update_replaces_all_regions_and_an_older_one_that_comes_late_changes_nothing(store):
    assert store.replace("1", 7, annotation(7, 2), updated_s=1002.0)
    assert store.replace("1", 7, annotation(7, 3)[:1], updated_s=1003.0)
    assert not store.replace("1", 7, annotation(7, 2), updated_s=1002.0)
    assert [(one.region, one.label, one.updated_s) for one in store.get("1", 7)] == [("r0", "version 3", 1003.0)]
    assert store.known("1") == {7: 1003.0}


def test_a_correction_of_another_annotation_or_with_a_mask_of_another_size_is_an_error(store):
    with pytest.raises(ValueError, match="region r1 is of annotation 7 in project 1, not of 8 in 1"):
        store.replace("1", 8, [correction()], updated_s=1000.0)
    with pytest.raises(ValueError, match=r"has a mask of size \[40, 60\], but its image is \[60, 40\]"):
        correction(height=60, width=40)
    with pytest.raises(ValueError, match=r"size \[9, 60\]"):
        correction(proposed=encode(box(0, 0, 5, 5)[:9]))
    assert store.known("1") == {}


def test_a_skipped_annotation_is_kept_but_not_used_until_it_is_updated(store):
    store.replace("1", 7, annotation(7, 1), updated_s=1001.0)
    assert store.retire("1", 7, updated_s=1002.0)
    assert (store.get("1", 7), store.corrections("1"), store.snapshot("1").corrections) == ([], [], ())
    assert len(store.get("1", 7, retired=True)) == 3
    assert store.known("1") == {7: 1002.0}
    assert not store.replace("1", 7, annotation(7, 1), updated_s=1001.0)
    assert store.replace("1", 7, annotation(7, 3), updated_s=1003.0)
    assert not store.retire("1", 7, updated_s=1002.0)
    assert {one.label for one in store.get("1", 7)} == {"version 3"}


def test_an_annotation_skipped_before_anything_else_came_stays_unused(store):
    assert store.retire("1", 7, updated_s=1002.0)
    assert not store.replace("1", 7, annotation(7, 1), updated_s=1001.0)
    assert store.get("1", 7, retired=True) == []


def test_whatever_order_events_come_in_and_however_often_the_ledger_ends_the_same(tmp_path):
    events = [
        *(lambda s, v=v: s.replace("1", 7, annotation(7, v), updated_s=1000.0 + v) for v in (1, 2, 4)),
        lambda s: s.retire("1", 7, updated_s=1003.0, task=7),
        *(lambda s, v=v: s.replace("1", 8, annotation(8, v), updated_s=1000.0 + v) for v in (1, 2)),
        lambda s: s.delete("1", [8]),
        *(lambda s, v=v: s.replace("1", 9, annotation(9, v), updated_s=1000.0 + v) for v in (1, 2)),
        lambda s: s.delete_tasks("1", [9]),
        lambda s: s.replace("1", 10, annotation(10, 1), updated_s=1001.0),
        lambda s: s.retire("1", 10, updated_s=1002.0),
    ]
    ends = []
    for seed in range(12):
        order = events * (5 if seed % 2 else 1)
        random.Random(seed).shuffle(order)
        with unsynced(tmp_path / f"{seed}.sqlite") as store:
            for event in order:
                event(store)
            ends.append(ledger(store))
            assert store.known("1") == {7: 1004.0, 10: 1002.0}
            assert {one.label for one in store.corrections("1")} == {"version 4"}
    assert all(end == ends[0] for end in ends)


@pytest.mark.parametrize("first", ["update", "delete", "delete of its task"])
def test_what_comes_before_its_creation_counts_however_often_both_come(store, first):
    for _ in range(5):
        if first == "update":
            store.replace("1", 7, annotation(7, 2), updated_s=1002.0)
        elif first == "delete":
            store.delete("1", [7])
        else:
            store.delete_tasks("1", [7])
    created = [store.replace("1", 7, annotation(7, 1), updated_s=1001.0) for _ in range(5)]
    assert created == [False] * 5
    if first == "update":
        assert [one.label for one in store.get("1", 7)] == ["version 2"] * 3
    else:
        assert (store.get("1", 7, retired=True), store.known("1"), store.projects()) == ([], {}, [])
        assert not store.retire("1", 7, updated_s=2000.0)


def test_a_deleted_task_takes_its_annotations_along_and_only_those_of_its_project(store):
    for project, number, task in (("1", 1, 3), ("1", 2, 3), ("1", 3, 4), ("2", 4, 3)):
        given = correction(project=project, annotation=number, task=task)
        store.replace(project, number, [given], updated_s=1000.0)
    store.delete_tasks("1", [3, 99])
    assert {(one.project, one.annotation) for one in store.corrections(None)} == {("1", 3), ("2", 4)}
    assert not store.replace("1", 5, [], updated_s=1000.0, task=99)
    assert store.projects() == ["1", "2"]


def test_what_a_listing_no_longer_shows_is_deleted_but_not_what_came_since_it_began(path):
    now = [50.0]
    with closing(CorrectionStore(path, clock=lambda: now[0])) as store:
        for number in (1, 2, 3):
            store.replace("1", number, annotation(number, 1), updated_s=1001.0)
        store.replace("2", 9, [], updated_s=1001.0)
        now[0] = 60.0
        store.replace("1", 1, annotation(1, 2), updated_s=1002.0)
        store.replace("1", 4, annotation(4, 1), updated_s=1001.0)
        assert store.delete_missing("1", {2}, before_s=55.0) == [1, 3]
        assert sorted(store.known("1")) == [2, 4]
        assert store.delete_missing("1", {2}, before_s=55.0) == []
        assert store.known("2") == {9: 1001.0}
        assert not store.replace("1", 3, annotation(3, 5), updated_s=1005.0)


def test_corrections_are_chosen_by_project_time_kind_and_annotator_newest_first(store):
    for number, (project, kind, annotator) in enumerate(
        [("1", "accepted", 4), ("1", "drawn", 5), ("1", "corrected", 5), ("2", "drawn", 4)]
    ):
        given = correction(project=project, annotation=number, kind=kind, annotator=annotator)
        store.replace(project, number, [given], updated_s=1000.0 + number)

    def chosen(project, **by):
        return [one.annotation for one in store.corrections(project, **by)]

    assert chosen(None) == [3, 2, 1, 0]
    assert chosen("1") == [2, 1, 0]
    assert chosen(None, since_s=1002.0) == [3, 2]
    assert chosen(None, kinds=["drawn", "accepted"]) == [3, 1, 0]
    assert chosen(None, kinds=[]) == []
    assert chosen("1", annotator=5, kinds={"drawn"}) == [1]
    assert chosen(None, limit=2) == [3, 2]


def test_of_several_annotations_of_a_task_the_ground_truth_is_learned_and_else_the_latest(store):
    def add(number, task, updated_s, **more):
        given = [correction(annotation=number, task=task, **more)] if more.pop("regions", 1) else []
        store.replace("1", number, given, updated_s=updated_s, task=task)

    add(1, 3, 1001.0)
    add(2, 3, 1002.0)
    add(3, 4, 1001.0, ground_truth=True)
    add(4, 4, 1002.0)
    add(5, None, 1001.0)
    add(6, None, 1002.0)
    store.replace("1", 7, [], updated_s=1009.0, task=3)  # holds nothing
    assert [one.annotation for one in store.snapshot("1").corrections] == [2, 3, 5, 6]


def test_a_snapshot_is_named_by_what_it_holds_in_whatever_order_it_came(tmp_path):
    given = [annotation(number, version) for number in range(20) for version in (1, 2)]
    ids = set()
    for seed in range(4):
        random.Random(seed).shuffle(given)
        with unsynced(tmp_path / f"{seed}.sqlite") as store:
            for regions in given:
                regions = random.Random(seed).sample(regions, 3)
                store.replace("1", regions[0].annotation, regions, updated_s=regions[0].updated_s)
            ids.add(store.snapshot("1").id)
            assert store.snapshot(None).id == store.snapshot("1").id != store.snapshot("2").id
    assert len(ids) == 1
    with closing(CorrectionStore(tmp_path / "0.sqlite")) as store:
        store.replace("1", 4, annotation(4, 2), updated_s=1003.0)
        assert {store.snapshot("1").id} == ids  # saved again, unchanged
        moved = [replace(one, granularity=0.4) for one in annotation(4, 2)]
        store.replace("1", 4, moved, updated_s=1004.0)
        assert store.snapshot("1").id not in ids


def test_counts_are_by_kind_annotator_and_day_and_know_the_hold_out(store):
    images = [image(str(number)) for number in range(20)]
    for number, digest in enumerate(images):
        regions = [correction(f"r{place}", annotation=number, task=number, image=digest) for place in range(2)]
        regions[0] = replace(regions[0], kind="drawn", annotator=None)
        store.replace("1", number, regions, updated_s=86400.0 * (1 + number // 15) - 1)
    store.retire("1", 19, updated_s=10**6)
    apart = sum(map(held_out, images[:19]))
    counts = store.counts("1")
    assert 0 < apart < 19
    assert (counts.corrections, counts.annotations, counts.images) == (38, 19, 19)
    assert (counts.held_out, counts.held_out_images) == (2 * apart, apart)
    assert (counts.kinds, counts.annotators) == ({"drawn": 19, "corrected": 19}, {None: 19, 4: 19})
    assert list(counts.days.items()) == [("1970-01-01", 30), ("1970-01-02", 8)]
    assert store.counts("2").corrections == 0
    assert store.counts(None).corrections == 38


def test_the_hold_out_is_a_fifth_fixed_forever_and_grows_with_its_share():
    digests = [image(str(number)) for number in range(5000)]
    assert 0.18 < sum(map(held_out, digests)) / 5000 < 0.22
    assert [number for number in range(40) if held_out(digests[number])] == [6, 11, 17, 18, 20, 35, 39]
    assert all(held_out(digest, 0.3) for digest in digests if held_out(digest))
    assert not any(held_out(digest, 0) for digest in digests)
    assert all(held_out(digest, 1) for digest in digests)


def test_a_part_belongs_to_the_smallest_mask_that_holds_nine_tenths_of_it():
    whole, half, twin = box(0, 0, 40, 40), box(0, 0, 40, 20), box(0, 0, 40, 20)
    inside, nine, eight = box(2, 2, 7, 7), box(31, 0, 41, 2), box(32, 0, 42, 2)
    nothing, apart = box(0, 0, 0, 0), box(50, 30, 60, 40)
    masks = [inside, whole, half, twin, nine, eight, nothing, apart]
    assert parents_of(masks) == [2, None, 1, 1, 2, None, None, None]
    assert parents_of([]) == []
    with pytest.raises(ValueError, match="have one size"):
        parents_of([whole, whole[:9]])


@pytest.mark.parametrize("after", [3, 70, 130, 190, 250])
def test_a_writer_that_is_killed_leaves_every_annotation_whole_and_all_it_had_said(path, after):
    pairs = [(number, version) for version in (1, 2) for number in range(150)]  # 300 annotations, half of them updates
    process = writer(path, pairs)
    said = [process.stdout.readline() for _ in range(after)]
    time.sleep(random.Random(after).uniform(0, 0.01))
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    told = dict(tuple(map(int, line.split())) for line in said if line.endswith("\n"))
    with closing(CorrectionStore(path)) as store:
        for number in range(150):
            found = store.get("1", number)
            versions = {one.label for one in found}
            if found:
                version = int(versions.pop().split()[1])
                assert [values(one) for one in found] == [values(one) for one in annotation(number, version)]
                assert version >= told.get(number, 0)
            else:
                assert number not in told
        assert len(told) <= len(store.known("1")) <= 150
        assert store.replace("1", 149, annotation(149, 3), updated_s=1003.0)


def test_two_processes_that_write_the_same_in_different_orders_end_with_one_ledger(path, tmp_path):
    pairs = [(number, 1) for number in range(200)] + [(number, 2) for number in range(0, 200, 4)]
    with unsynced(tmp_path / "alone.sqlite") as alone:
        for number, version in pairs:
            alone.replace("1", number, annotation(number, version), updated_s=1000.0 + version)
        expected = ledger(alone)
    processes = [writer(path, random.Random(seed).sample(pairs, len(pairs))) for seed in (1, 2)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    with closing(CorrectionStore(path)) as store:
        assert ledger(store) == expected


def test_a_ledger_that_may_not_grow_says_so_and_keeps_what_it_has(store):
    store.replace("1", 1, annotation(1, 1), updated_s=1001.0)
    before = ledger(store)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    ragged = [correction(f"r{n}", np.random.default_rng(n).random((300, 300)) < 0.5, annotation=1) for n in range(3)]
    with pytest.raises(NotKept, match=r"annotation 1 of project 1 could not be kept in .*full.* see that its disk has"):
        store.replace("1", 1, ragged, updated_s=1002.0)
    assert ledger(store) == before
    store._db.execute("PRAGMA max_page_count = 100000")
    assert store.replace("1", 1, ragged, updated_s=1002.0)


def test_a_full_disk_is_said_and_leaves_earlier_rows_readable(tmp_path):
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" || exit 77; head -c 200000 /dev/zero > "$1/ballast"'
    command = ["unshare", "--mount", "sh", "-c", f'{mount}; exec "$2" -c "$3" "$1"', "sh"]
    command += [str(tmp_path), sys.executable, ON_A_FULL_DISK]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip("a disk of our own may not be mounted here")
    assert done.returncode == 0, done.stderr
    assert "could not be kept" in done.stdout


def test_a_damaged_file_is_put_aside_and_the_ledger_begins_anew(path, caplog):
    path.parent.mkdir()
    path.write_bytes(os.urandom(5000))
    with closing(CorrectionStore(path)) as store:
        assert store.replace("1", 7, [correction()], updated_s=1000.0)
    assert "python -m ml_backend reconcile" in caplog.text
    assert len(list(path.parent.glob("corrections.damaged-*"))) == 1


def test_the_log_of_a_damaged_file_is_not_played_into_the_new_one(store, path):
    store.replace("1", 7, annotation(7, 1), updated_s=1001.0)
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.replace("1", 7, annotation(7, 2), updated_s=1002.0)
    with path.open("r+b") as file:
        file.write(os.urandom(100))
    with closing(CorrectionStore(path)) as again:
        assert again.projects() == []
        assert again.replace("1", 8, annotation(8, 1), updated_s=1001.0)
    aside = {found.name.rpartition("-")[2] for found in path.parent.glob("corrections.damaged-*")}
    assert "wal" in aside
    with closing(CorrectionStore(path)) as again:
        assert again.known("1") == {8: 1001.0}


def test_a_ledger_that_another_process_holds_for_good_is_said(path, monkeypatch):
    monkeypatch.setattr("active_learning.corrections._WAIT_S", 0.1)
    with closing(CorrectionStore(path)) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(NotKept, match="locked"):
            store.delete("1", [7])
        other.execute("ROLLBACK")
        store.delete("1", [7])


def test_an_annotation_of_five_large_masks_costs_five_milliseconds_besides_the_disk(store):
    rows, columns = np.mgrid[:1000, :1000]
    waves = 40 * np.sin(rows / 9) + 30 * np.sin(columns / 7)
    masks = [np.hypot(rows - 500, columns - 500) + waves < 200 + 50 * n for n in range(5)]
    regions = [correction(f"r{n}", mask, annotation=1) for n, mask in enumerate(masks)]
    took = []
    for turn in range(30):
        started = time.thread_time()  # the flush waits for the disk, which is busy or not
        store.replace("1", 1, regions, updated_s=1000.0 + turn)
        took.append(time.thread_time() - started)
    assert sorted(took)[len(took) // 2] < 0.005
