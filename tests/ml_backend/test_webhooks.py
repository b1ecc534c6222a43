"""What Label Studio reports: written down and answered at once, imported images encoded ahead."""

import json
import socket
import time

import pytest
import redis
from rq import Queue
from rq.serializers import JSONSerializer

from ml_backend import webhooks
from ml_backend.app import create_app
from ml_backend.jobs import CORRECTIONS, ENCODE
from ml_backend.trainings import folder_of
from tests.ml_backend.conftest import ask, recorded, recordings, wait_until


def send(client, event):
    return client.post("/webhook", data=json.dumps(event), content_type="application/json")


def kept(service):
    """Actions and bodies of what waits in the inbox."""
    events = [service.inbox.read(key) for key in service.inbox.undone(100, 0)]
    return [(event.action, json.loads(event.body)) for event in events]


@pytest.fixture
def quiet(make_service):
    return make_service(start=False)


@pytest.fixture
def quiet_client(quiet):
    return create_app(quiet).test_client()


@pytest.mark.parametrize(
    "name", [n for n in recordings("webhook") if n.split("_")[0] in ("40", "41", "42", "44", "45")]
)
def test_what_annotators_did_is_in_the_inbox_as_it_came_when_it_is_answered(quiet, quiet_client, name):
    event = recorded(name)
    answer = send(quiet_client, event)
    assert (answer.status_code, answer.json) == (201, {"status": "ok"})
    assert kept(quiet) == [(event["action"], event)]


def test_the_same_event_five_times_is_kept_once(quiet, quiet_client):
    for _ in range(5):
        assert send(quiet_client, recorded("40")).status_code == 201
    assert quiet.inbox.counts()["undone"] == 1


@pytest.mark.parametrize("name", ["03", "51"])
def test_what_annotators_did_not_do_is_not_kept(quiet, quiet_client, name):
    assert send(quiet_client, recorded(name)).status_code == 201
    assert kept(quiet) == []


def test_of_a_changed_project_its_configuration_is_kept_and_nothing_secret(quiet, quiet_client):
    event = recorded("04")
    assert send(quiet_client, event).json == {"status": "ok"}
    ((action, body),) = kept(quiet)
    assert action == "PROJECT_UPDATED"
    assert set(body["project"]) == {"id", "label_config", "updated_at"}
    assert body["project"]["label_config"] == event["project"]["label_config"]


def test_an_import_is_kept_when_it_carries_annotations(quiet, quiet_client, monkeypatch):
    monkeypatch.setattr(quiet, "warm", lambda image: True)
    event = recorded("03")
    event["tasks"][0]["annotations"] = [recorded("40")["annotation"]]
    assert send(quiet_client, event).json == {"status": "ok", "queued": 1}
    assert [action for action, _ in kept(quiet)] == ["TASKS_CREATED"]


def test_the_annotations_of_an_import_are_written_down_before_its_images_are_thought_of(
    quiet, quiet_client, monkeypatch
):
    held = []
    monkeypatch.setattr(webhooks, "read_config", lambda text: held.append(quiet.inbox.counts()["undone"]) or 1 / 0)
    event = recorded("03")
    event["tasks"][0]["annotations"] = [recorded("40")["annotation"]]
    send(quiet_client, event)
    assert held == [1]


def test_an_event_is_handed_to_the_worker_under_a_name_that_tells_its_work(make_service, redis_url):
    service = make_service(start=False, redis_url=redis_url)
    send(create_app(service).test_client(), recorded("40"))
    with redis.Redis.from_url(redis_url) as connection:
        waiting = Queue(CORRECTIONS, connection=connection, serializer=JSONSerializer)
        (job_id,) = wait_until(waiting.get_job_ids)
        (key,) = service.inbox.undone(1, 0)
        assert job_id == f"ingest-{key}"
        assert waiting.fetch_job(job_id).args == [key]


@pytest.mark.parametrize("kind", ["gone", "deaf"])
def test_a_redis_that_is_gone_or_hangs_costs_a_webhook_nothing(make_service, caplog, kind):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        url = f"redis://127.0.0.1:{deaf.getsockname()[1] if kind == 'deaf' else 1}/0"
        service = make_service(start=False, redis_url=url)
        client = create_app(service).test_client()
        event = recorded("40")
        start = time.perf_counter()
        for number in range(10):
            event["annotation"]["id"] = number
            assert send(client, event).status_code == 201
        assert time.perf_counter() - start < 3, "ten attempts to connect take four"
        wait_until(lambda: "wait in the inbox" in caplog.text)
        assert service.inbox.counts()["undone"] == 10


def test_an_event_that_cannot_be_written_down_is_not_acknowledged(quiet, quiet_client, caplog):
    pages = quiet.inbox._db.execute("PRAGMA page_count").fetchone()[0]
    quiet.inbox._db.execute(f"PRAGMA max_page_count = {pages}")
    answers = [send(quiet_client, recorded("41") | {"number": number}) for number in range(50)]
    refused = [answer for answer in answers if answer.status_code != 201]
    assert {answer.status_code for answer in refused} == {507}
    assert "is full, so nothing of this was kept: make room there" in refused[0].json["error"]
    assert "reconcile" in refused[0].json["error"]
    assert "is full" in caplog.text
    assert "Traceback" not in caplog.text
    assert quiet_client.get("/health").status_code == 200


def test_what_the_worker_took_in_is_among_the_metrics(quiet, quiet_client):
    key = quiet.inbox.add(b"{}", "ANNOTATION_CREATED")
    quiet.inbox.done(key, {"accepted": 2, "predicted-changed": 1})
    text = quiet_client.get("/metrics").text
    assert 'graco_regions_total{kind="accepted"} 2.0' in text
    assert 'graco_regions_total{kind="predicted-changed"} 1.0' in text
    assert 'graco_events{state="done"} 1.0' in text


def test_start_training_is_answered_with_the_id_of_the_job_and_pressed_twice_it_is_one(quiet, quiet_client):
    answers = [send(quiet_client, recorded("51")) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    pending = folder_of(quiet.settings, "project-3").pending()
    assert pending is not None
    assert [answer.json["job"] for answer in answers] == [pending.id] * 2


def test_start_training_without_a_project_is_refused_with_a_sentence(quiet_client):
    answer = send(quiet_client, {"action": "START_TRAINING"})
    assert answer.status_code == 422
    assert "which project" in answer.json["error"]


@pytest.mark.parametrize("action", ["LABEL_LINK_CREATED", "TASKS_DELETED", "SOMETHING_NEW"])
def test_an_action_we_do_not_know_is_acknowledged(client, action):
    assert send(client, {"action": action, "project": {}}).json == {"status": "ok"}


@pytest.mark.parametrize("name", recordings("webhook"))
def test_every_recorded_event_is_answered_within_label_studios_second(client, name):
    event = recorded(name)
    start = time.perf_counter()
    assert send(client, event).status_code == 201
    assert time.perf_counter() - start < 1


def test_imported_tasks_are_queued_in_redis_by_one_write(make_service, redis_url):
    service = make_service(start=False, redis_url=redis_url, embedding_disk_mb=30_000)
    client = create_app(service).test_client()
    event = recorded("03")
    event["tasks"] = [event["tasks"][0] | {"id": n, "data": {"image": f"/data/upload/1/{n}.jpg"}} for n in range(5000)]
    event["tasks"][7]["data"] = {}
    start = time.perf_counter()
    assert send(client, event).json == {"status": "ok", "queued": 4999}
    assert time.perf_counter() - start < 1
    assert send(client, event).json["queued"] == 4999
    send(client, recorded("40"))  # handed over after these
    with redis.Redis.from_url(redis_url) as connection:
        wait_until(lambda: connection.llen(f"rq:queue:{CORRECTIONS}") == 1)
        assert connection.llen(f"rq:queue:{ENCODE}") == 1, "the same import is the same job"


@pytest.mark.parametrize("url", ["unix:///nowhere/redis.sock", "redis://127.0.0.1:1/0"])
def test_with_redis_gone_imported_tasks_are_encoded_by_the_web_process_and_nobody_waits(make_service, caplog, url):
    service = make_service(redis_url=url)
    client = create_app(service).test_client()
    start = time.perf_counter()
    assert send(client, recorded("03")).json == {"status": "ok", "queued": 1}
    assert time.perf_counter() - start < 1
    wait_until(lambda: service._cache is not None and service._cache._memory, limit_s=60)
    assert len(service._cache._memory) == 1
    assert "Redis does not answer" in caplog.text


def test_a_redis_that_hangs_holds_no_import_up(make_service, monkeypatch):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        service = make_service(start=False, redis_url=f"redis://127.0.0.1:{deaf.getsockname()[1]}/0")
        warmed, client, event = [], create_app(service).test_client(), recorded("03")
        monkeypatch.setattr(service, "warm", lambda image: warmed.append(image) or True)
        event["tasks"][0]["annotations"] = [recorded("40")["annotation"]]
        start = time.perf_counter()
        for number in range(10):
            event["tasks"][0]["id"] = number
            assert send(client, event).json["queued"] == 1
        assert time.perf_counter() - start < 3, "ten attempts to connect take four"
        assert service.inbox.counts()["undone"] == 10
        wait_until(lambda: len(warmed) == 10)


@pytest.mark.parametrize(
    "event",
    [
        {"action": "TASKS_CREATED"},
        {"action": "TASKS_CREATED", "project": 5, "tasks": []},
        {"action": "TASKS_CREATED", "project": {"label_config": "<View>"}, "tasks": [{}]},
        {"action": "TASKS_CREATED", "project": {"label_config": ask()["label_config"]}, "tasks": [5, {}, {"data": 1}]},
        {"action": "ANNOTATION_CREATED", "annotation": [1]},
        {"action": "TASKS_CREATED", "project": {"id": 1}, "tasks": [{"annotations": [5]}]},
        {"action": "ANNOTATIONS_CREATED", "annotation": {"id": 1}},
        {"action": "ANNOTATIONS_DELETED"},
        {"action": "PROJECT_UPDATED", "project": 5},
    ],
    ids=json.dumps,
)
def test_events_of_another_form_are_acknowledged(quiet_client, event):
    assert send(quiet_client, event).status_code == 201


def test_a_task_whose_id_is_no_number_is_encoded_all_the_same(make_service, monkeypatch):
    service = make_service(start=False)
    found = []
    monkeypatch.setattr(service, "warm", lambda image: found.append(image) or True)
    event = recorded("03")
    event["tasks"][0]["id"] = {"strange": 1}
    assert send(create_app(service).test_client(), event).json["queued"] == 1
    assert [image.task_id for image in found] == [None]
