"""Real Redis, real worker: imported images are encoded ahead, into the files every web process reads."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
import redis
from rq import Queue, SimpleWorker
from rq.job import JobStatus
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

import ml_backend.jobs
import ml_backend.scoring
from ml_backend.app import create_app
from ml_backend.images import TaskImage
from ml_backend.inbox import Inbox
from ml_backend.ingest import open_intake
from ml_backend.jobs import (
    CORRECTIONS,
    ENCODE,
    connect,
    drain,
    encode_later,
    enqueue_encoding,
    enqueue_ingest,
    requeue_abandoned,
    spread,
    work,
)
from tests.conftest import ROOT
from tests.ml_backend.conftest import TOKEN, ask, click, picture, recorded, settings_for, wait_until


@pytest.fixture
def connection(redis_url):
    with connect(redis_url) as connection:
        yield connection


def queue(connection, name=ENCODE):
    return Queue(name, connection=connection, serializer=JSONSerializer)


def worker(folder, label_studio, redis_url):
    """Run a worker until no job is left."""
    environment = {
        **os.environ,
        **{"GRACO_REDIS_URL": redis_url, "GRACO_DATA_DIR": str(folder), "GRACO_ENCODER": "exact"},
        **{"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": TOKEN, "GRACO_DEVICE": "cpu"},
    }
    return subprocess.run(
        [sys.executable, "-m", "ml_backend", "worker", "--burst"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_an_import_is_encoded_by_the_worker_and_the_first_click_of_the_next_service_is_warm(
    make_service, label_studio, redis_url, connection, counted
):
    data = picture(64, 48, shade=3)
    uris = [label_studio.add(f"/data/upload/8/{n}-imported.png", data) for n in range(2)]
    web = make_service(start=False, redis_url=redis_url, encoder="exact")
    event = recorded("03")
    event["tasks"] = [event["tasks"][0] | {"id": n, "data": {"image": uri}} for n, uri in enumerate(uris)]
    event["tasks"].append(event["tasks"][0] | {"id": 9, "data": {"image": "/data/upload/8/nowhere.png"}})
    answer = create_app(web).test_client().post("/webhook", json=event)
    assert answer.json["queued"] == 3
    wait_until(lambda: queue(connection).count == 1)
    done = worker(web.settings.data_dir, label_studio, redis_url)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "task 9 is not encoded ahead: " in done.stderr
    assert "with adapter none is loaded" in done.stderr, "embeddings are the base's"
    assert TOKEN not in done.stderr
    assert len(list(web.settings.data_dir.glob("embeddings/*/*/*.safetensors"))) == 1, "one image, two tasks"
    assert queue(connection).count == 0
    assert FailedJobRegistry(ENCODE, connection=connection, serializer=JSONSerializer).count == 0

    body = ask(click(31, 40, size=(64, 48)), image=uris[0], task=0)
    result = create_app(make_service()).test_client().post("/predict", json=body).json["results"][0]
    assert result["result"]
    assert counted("graco_embeddings_total", source="encoded") == 0
    assert counted("graco_embeddings_total", source="disk") == 1


def test_the_same_images_are_queued_once(connection):
    images = [TaskImage(1, "/data/upload/1/a.jpg"), TaskImage(None, "s3://b/c.png")]
    enqueue_encoding(connection, images)
    enqueue_encoding(connection, images)
    assert queue(connection).count == 1
    enqueue_encoding(connection, images[:1])
    assert queue(connection).count == 2


def test_a_spread_makes_one_job_per_image_and_jobs_carry_json(connection, redis_url, monkeypatch):
    monkeypatch.setenv("GRACO_REDIS_URL", redis_url)
    pairs = [(1, "/data/upload/1/a.jpg"), (2, "/data/upload/1/b.jpg"), (1, "/data/upload/1/a.jpg")]
    spread(pairs)
    jobs = queue(connection).jobs
    assert [job.args for job in jobs] == [[1, "/data/upload/1/a.jpg"], [2, "/data/upload/1/b.jpg"]]
    assert all(job.timeout == 120 and job.id.startswith("encode-") for job in jobs)


def test_a_full_redis_is_a_redis_that_does_not_answer(make_service, redis_url, connection, monkeypatch, caplog):
    service = make_service(start=False, redis_url=redis_url)
    warmed = []
    monkeypatch.setattr(service, "warm", lambda image: warmed.append(image) or True)
    connection.config_set("maxmemory", 1)
    try:
        assert encode_later(service, [TaskImage(1, "/data/upload/1/a.jpg")]) == 1
        wait_until(lambda: warmed)
    finally:
        connection.config_set("maxmemory", 0)
    assert "Redis does not answer" in caplog.text
    assert queue(connection).count == 0


def test_an_import_that_the_worker_cannot_be_told_of_is_encoded_here(
    make_service, redis_url, connection, monkeypatch, caplog
):
    service = make_service(start=False, redis_url=redis_url)
    warmed = []
    monkeypatch.setattr(service, "warm", lambda image: warmed.append(image) or True)
    monkeypatch.setattr(ml_backend.jobs, "_digest", lambda _: 1 / 0)
    encode_later(service, [TaskImage(1, "/data/upload/1/a.jpg")])
    wait_until(lambda: warmed)
    assert "the worker could not be told (ZeroDivisionError): images are encoded by this process" in caplog.text
    assert "inbox" not in caplog.text, "an import does not wait there"


def test_a_process_that_ends_says_which_imports_it_leaves(make_service, redis_url, connection, monkeypatch, caplog):
    service = make_service(start=False, redis_url=redis_url)
    begun, go_on = threading.Event(), threading.Event()

    def hang(*_, **__):
        begun.set()
        go_on.wait(10)

    monkeypatch.setattr(ml_backend.jobs, "enqueue_encoding", hang)
    for number in range(3):
        encode_later(service, [TaskImage(number, "/data/upload/1/a.jpg")])
    service.hand_over.put("k")
    assert begun.wait(10)
    end = threading.Thread(target=service.hand_over.close)
    end.start()
    wait_until(lambda: "2 imports are not encoded ahead, since this process ends" in caplog.text)
    go_on.set()
    end.join()


def test_of_more_images_than_the_disk_holds_the_first_are_encoded_ahead(make_service, redis_url, connection, caplog):
    service = make_service(start=False, redis_url=redis_url, embedding_disk_mb=22)
    images = [TaskImage(n, f"/data/upload/1/{n}.jpg") for n in range(30)]
    assert encode_later(service, images[:4]) == 4
    assert "not encoded ahead" not in caplog.text
    assert encode_later(service, images) == 4
    assert "26 of 30 images are not encoded ahead, since GRACO_EMBEDDING_DISK_MB=22 holds some 4" in caplog.text
    wait_until(lambda: queue(connection).count == 1)
    assert queue(connection).jobs[0].args == [[[n, f"/data/upload/1/{n}.jpg"] for n in range(4)]]


def test_without_files_to_hand_over_by_nothing_is_queued(make_service, redis_url, connection, monkeypatch):
    service = make_service(start=False, redis_url=redis_url, embedding_disk_mb=0)
    warmed = []
    monkeypatch.setattr(service, "warm", lambda image: warmed.append(image) or True)
    assert encode_later(service, [TaskImage(1, "/data/upload/1/a.jpg")]) == 1
    assert warmed == [TaskImage(1, "/data/upload/1/a.jpg")]
    assert queue(connection).count == 0


def test_an_image_that_cannot_be_had_is_a_sentence_and_no_failed_job(make_service, monkeypatch, caplog):
    monkeypatch.setattr(ml_backend.jobs, "_service", make_service)
    ml_backend.jobs.encode(4, "/data/upload/1/nowhere.png")
    assert "task 4 is not encoded ahead: " in caplog.text


@pytest.fixture
def inbox(tmp_path):
    with closing(Inbox(tmp_path / "data" / "inbox.sqlite")) as inbox:
        yield inbox


def test_the_worker_takes_in_what_waits_in_the_inbox_and_nobody_had_queued(
    tmp_path, label_studio, redis_url, inbox, connection
):
    for number in ("40", "41", "44"):
        event = recorded(number)
        inbox.add(json.dumps(event).encode(), event["action"])
    bulk = recorded("40") | {"action": "ANNOTATIONS_CREATED"}
    bulk["annotation"], bulk["task"] = [bulk["annotation"] | {"id": 8}, bulk["annotation"] | {"id": 9}], [bulk["task"]]
    inbox.add(json.dumps(bulk).encode(), bulk["action"])
    done = worker(tmp_path / "data", label_studio, redis_url)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert inbox.counts() == {"undone": 0, "done": 6, "failed": 0}
    with closing(open_intake(settings_for(tmp_path / "data", label_studio))) as intake:
        assert {c.annotation for c in intake.corrections.corrections("3")} == {1, 8, 9}
    assert queue(connection, CORRECTIONS).count == 0


def test_a_drain_queues_what_is_undone_and_nobody_is_at(tmp_path, label_studio, inbox, connection):
    settings = settings_for(tmp_path / "data", label_studio)
    queued, failed, lost, new = (inbox.add(f"{number}".encode(), "ANNOTATION_CREATED") for number in range(4))
    enqueue_ingest(settings, connection, keys=[queued, failed, lost])
    corrections = queue(connection, CORRECTIONS)
    corrections.fetch_job(f"ingest-{failed}").set_status(JobStatus.FAILED)
    for key in (failed, lost):  # as if popped by a worker that went no further
        connection.lrem(corrections.key, 0, f"ingest-{key}")
    assert drain(settings, connection, inbox=inbox, older_than_s=60) == 0, "too young"
    assert drain(settings, connection, inbox=inbox, older_than_s=0) == 3
    assert sorted(corrections.get_job_ids()) == sorted(f"ingest-{key}" for key in (queued, failed, lost, new))
    assert drain(settings, connection, inbox=inbox, older_than_s=0) == 0


def test_a_failed_event_of_another_machine_that_redis_has_dropped_holds_up_no_other(
    tmp_path, label_studio, inbox, connection
):
    settings = settings_for(tmp_path / "data", label_studio)
    corrections = queue(connection, CORRECTIONS)
    failed = corrections.failed_job_registry
    connection.zadd(failed.key, {"receive-dropped": time.time(), "receive-kept": time.time() + 1})
    corrections.create_job(ml_backend.jobs.receive, args=["ANNOTATION_CREATED", ""], job_id="receive-kept").save()
    key = inbox.add(b"1", "ANNOTATION_CREATED")
    assert drain(settings, connection, inbox=inbox, older_than_s=0) == 1
    assert corrections.get_job_ids() == ["receive-kept", f"ingest-{key}"]


@pytest.mark.parametrize(
    ("pid", "host", "age_s", "again"),
    [(None, None, 0, 0), (0, None, 0, 1), (None, "elsewhere", 0, 0), (0, "elsewhere", 0, 0), (0, "elsewhere", 500, 1)],
)
def test_a_job_is_taken_from_a_worker_that_is_gone_and_from_no_other(
    tmp_path, label_studio, inbox, connection, monkeypatch, pid, host, age_s, again
):
    settings = settings_for(tmp_path / "data", label_studio)
    enqueue_ingest(settings, connection, keys=["k"])
    corrections = queue(connection, CORRECTIONS)
    other = SimpleWorker([corrections], connection=connection, serializer=JSONSerializer)
    other.register_birth()
    if pid is not None:  # of a process that has ended
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        connection.hset(other.key, "pid", ended.pid)
    if host is not None:
        connection.hset(other.key, "hostname", host)
    job = corrections.fetch_job(connection.lpop(corrections.key).decode())
    other.prepare_execution(job)
    other.prepare_job_execution(job)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + age_s)
    assert requeue_abandoned(settings, connection, inbox=inbox) == again
    assert corrections.get_job_ids() == ["ingest-k"] * again
    assert len(corrections.started_job_registry.get_job_ids(cleanup=False)) == 1 - again


def test_a_worker_whose_number_went_to_a_later_process_is_gone_as_in_a_container_that_starts_again(
    tmp_path, label_studio, inbox, connection
):
    settings = settings_for(tmp_path / "data", label_studio)
    enqueue_ingest(settings, connection, keys=["k"])
    corrections = queue(connection, CORRECTIONS)
    other = ml_backend.jobs._Worker([corrections], connection=connection, serializer=JSONSerializer)
    other.register_birth()
    job = corrections.fetch_job(connection.lpop(corrections.key).decode())
    other.prepare_execution(job)
    other.prepare_job_execution(job)
    assert requeue_abandoned(settings, connection, inbox=inbox) == 0
    assert connection.hget(other.key, "process").decode() == ml_backend.jobs._mark_of(os.getpid())
    connection.hset(other.key, "process", ml_backend.jobs._mark_of(1))
    assert requeue_abandoned(settings, connection, inbox=inbox) == 1
    assert corrections.get_job_ids() == ["ingest-k"]


def test_what_tells_a_process_from_a_later_one_is_its_own_and_none_where_it_cannot_be_told():
    marks = [ml_backend.jobs._mark_of(pid) for pid in (1, os.getpid(), os.getpid())]
    assert marks[0] != marks[1] == marks[2]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert ml_backend.jobs._mark_of(ended.pid) is None


def die_at(connection, name, job_id):
    """Leave a job as a worker does that is killed at it."""
    jobs = queue(connection, name)
    dead = SimpleWorker([jobs], connection=connection, serializer=JSONSerializer)
    connection.lrem(jobs.key, 0, job_id)
    job = jobs.fetch_job(job_id)
    dead.prepare_execution(job)  # it was never born: nothing is known of it
    dead.prepare_job_execution(job)


def test_an_event_that_kills_its_worker_three_times_is_given_up_with_a_reason(
    tmp_path, label_studio, inbox, connection, caplog
):
    settings = settings_for(tmp_path / "data", label_studio)
    corrections = queue(connection, CORRECTIONS)
    deadly, good = (inbox.add(f"{number}".encode(), "ANNOTATION_CREATED") for number in range(2))
    enqueue_ingest(settings, connection, keys=[good, deadly])
    for waiting in ([deadly, good], [good, deadly], [good]):
        die_at(connection, CORRECTIONS, f"ingest-{deadly}")
        drain(settings, connection, inbox=inbox, older_than_s=0)
        assert corrections.get_job_ids() == [f"ingest-{key}" for key in waiting]
    assert inbox.counts() == {"undone": 1, "done": 0, "failed": 1}
    assert f"3 workers died at job ingest-{deadly}: out of memory" in inbox.failures()[0][2]
    assert corrections.fetch_job(f"ingest-{deadly}") is None
    assert "run 'reconcile --retry'" in caplog.text


def test_other_jobs_that_kill_their_workers_are_dropped_and_what_they_brought_is_kept(
    tmp_path, label_studio, inbox, connection, redis_url, monkeypatch, caplog
):
    settings = settings_for(tmp_path / "data", label_studio)
    monkeypatch.setenv("GRACO_REDIS_URL", redis_url)
    spread([(1, "/data/upload/1/a.jpg")])
    ml_backend.scoring.ask_for_scores(settings, 3)
    ml_backend.jobs.enqueue_scores(settings, connection)
    away = Inbox(tmp_path / "away.sqlite")
    away.add(b"of another machine", "ANNOTATION_CREATED")
    ml_backend.jobs.send_events(settings, connection, inbox=away)
    away.close()
    ids = {name: queue(connection, name).get_job_ids() for name in (CORRECTIONS, ENCODE)}
    assert [len(some) for some in ids.values()] == [2, 1]
    for again in (3, 3, 0):
        for name, some in ids.items():
            for job_id in some:
                die_at(connection, name, job_id)
        assert requeue_abandoned(settings, connection, inbox=inbox) == again
    drain(settings, connection, inbox=inbox, older_than_s=0)
    ml_backend.jobs.enqueue_scores(settings, connection)
    assert [queue(connection, name).count for name in ids] == [0, 0]
    assert inbox.counts() == {"undone": 0, "done": 0, "failed": 1}
    assert (
        f"3 workers died at job {ids[ENCODE][0]}: out of memory, or a crash in a library; it is dropped" in caplog.text
    )


def test_a_worker_without_a_redis_says_what_to_do(tmp_path, label_studio):
    with pytest.raises(SystemExit, match="GRACO_REDIS_URL is not set"):
        work(settings_for(tmp_path, label_studio))


def test_no_connection_stays_open(make_service, redis_url, connection):
    service = make_service(start=False, redis_url=redis_url)
    before = len(connection.client_list())
    encode_later(service, [TaskImage(1, "/data/upload/1/a.jpg")])
    wait_until(lambda: queue(connection).count == 1)
    service.hand_over.close()
    with redis.Redis.from_url(redis_url):
        wait_until(lambda: len(connection.client_list()) == before, limit_s=5)  # Redis may learn a moment later
