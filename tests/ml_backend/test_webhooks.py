"""What Label Studio reports: images encoded ahead, submitted regions counted, everything answered at once."""

import json
import socket
import time

import pytest
import redis

from ml_backend.app import create_app
from ml_backend.jobs import ENCODE
from tests.ml_backend.conftest import ask, click, recorded, recordings, wait_until


def send(client, event):
    return client.post("/webhook", data=json.dumps(event), content_type="application/json")


def kinds(counted):
    return {kind: counted("graco_regions_total", kind=kind) for kind in ("accepted", "corrected", "drawn")}


def submitted(regions, **more):
    annotation = {"id": 1, "result": regions, "was_cancelled": False} | more
    return {"action": "ANNOTATION_CREATED", "annotation": annotation, "project": {"id": 3}}


@pytest.fixture
def regions(client):
    body = ask(click(31, 40, level="0.5"))
    answer = client.post("/predict", data=json.dumps(body)).json
    return [region | {"origin": "manual"} for region in answer["results"][0]["result"]]


def test_our_own_answer_submitted_unchanged_counts_as_accepted(client, regions, counted):
    assert send(client, submitted(regions)).status_code == 201
    assert kinds(counted) == {"accepted": 1, "corrected": 0, "drawn": 0}


def test_our_own_answer_after_an_eraser_counts_as_corrected(client, regions, counted):
    regions[0]["value"] = regions[0]["value"] | {"rle": [*regions[0]["value"]["rle"][:-1], 7]}
    event = submitted(regions) | {"action": "ANNOTATION_UPDATED"}
    assert send(client, event).status_code == 201
    assert kinds(counted) == {"accepted": 0, "corrected": 1, "drawn": 0}


def test_a_region_of_another_id_counts_as_drawn(client, regions, counted):
    drawn = [region | {"id": "by-hand"} for region in regions]
    send(client, submitted(drawn))
    assert kinds(counted) == {"accepted": 0, "corrected": 0, "drawn": 1}


def test_bulk_annotations_are_counted_each(client, regions, counted):
    one = submitted(regions)["annotation"]
    send(client, {"action": "ANNOTATIONS_CREATED", "annotation": [one, one, "none"], "task": []})
    assert kinds(counted)["accepted"] == 2


def test_a_skipped_task_counts_nothing(client, regions, counted):
    assert send(client, submitted(regions, was_cancelled=True)).status_code == 201
    assert send(client, recorded("45")).status_code == 201
    assert kinds(counted) == {"accepted": 0, "corrected": 0, "drawn": 0}


def test_start_training_is_answered_with_a_sentence(client, caplog):
    answer = send(client, recorded("51"))
    assert answer.status_code == 201
    assert "does not train yet" in answer.json["message"]
    assert "job" not in answer.json
    assert "nothing was started" in caplog.text


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
    client = create_app(make_service(start=False, redis_url=redis_url)).test_client()
    event = recorded("03")
    event["tasks"] = [event["tasks"][0] | {"id": n, "data": {"image": f"/data/upload/1/{n}.jpg"}} for n in range(5000)]
    event["tasks"][7]["data"] = {}
    start = time.perf_counter()
    assert send(client, event).json == {"status": "ok", "queued": 4999}
    assert time.perf_counter() - start < 1
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.llen(f"rq:queue:{ENCODE}") == 1
    assert send(client, event).json["queued"] == 4999
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.llen(f"rq:queue:{ENCODE}") == 1, "the same import is the same job"


@pytest.mark.parametrize("url", ["unix:///nowhere/redis.sock", "redis://127.0.0.1:1/0"])
def test_with_redis_gone_imported_tasks_are_encoded_by_the_web_process_and_nobody_waits(make_service, caplog, url):
    service = make_service(redis_url=url)
    client = create_app(service).test_client()
    start = time.perf_counter()
    assert send(client, recorded("03")).json == {"status": "ok", "queued": 1}
    assert time.perf_counter() - start < 1
    assert "Redis does not answer" in caplog.text
    wait_until(lambda: not service._waiting, limit_s=60)
    assert len(service._cache._memory) == 1


def test_a_redis_that_hangs_holds_nobody_up_for_a_second(make_service, monkeypatch):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        service = make_service(start=False, redis_url=f"redis://127.0.0.1:{deaf.getsockname()[1]}/0")
        monkeypatch.setattr(service, "warm", lambda image: True)
        start = time.perf_counter()
        assert send(create_app(service).test_client(), recorded("03")).json["queued"] == 1
        assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "event",
    [
        {"action": "TASKS_CREATED"},
        {"action": "TASKS_CREATED", "project": 5, "tasks": []},
        {"action": "TASKS_CREATED", "project": {"label_config": "<View>"}, "tasks": [{}]},
        {"action": "TASKS_CREATED", "project": {"label_config": ask()["label_config"]}, "tasks": [5, {}, {"data": 1}]},
        {"action": "ANNOTATION_CREATED", "annotation": [1]},
        {"action": "ANNOTATION_CREATED", "annotation": {"result": [{"id": {}}, 5, {"type": "brushlabels", "id": "x"}]}},
        {"action": "ANNOTATIONS_CREATED", "annotation": {"id": 1}},
    ],
    ids=json.dumps,
)
def test_events_of_another_form_are_acknowledged_and_do_nothing(client, event, counted):
    assert send(client, event).status_code == 201
    assert sum(kinds(counted).values()) == 0


def test_a_task_whose_id_is_no_number_is_encoded_all_the_same(make_service, monkeypatch):
    service = make_service(start=False)
    found = []
    monkeypatch.setattr(service, "warm", lambda image: found.append(image) or True)
    event = recorded("03")
    event["tasks"][0]["id"] = {"strange": 1}
    assert send(create_app(service).test_client(), event).json["queued"] == 1
    assert [image.task_id for image in found] == [None]
