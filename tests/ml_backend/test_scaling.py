"""Two machines on one Redis and one shared folder: one keeps the ledger, the other only answers clicks."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, closing

import pytest
import redis
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer

from active_learning.corrections import CorrectionStore
from active_learning.registry import AdapterRegistry
from active_learning.status import TrainingFolder
from ml_backend import jobs, trainings
from ml_backend.app import create_app
from ml_backend.inbox import Inbox
from ml_backend.jobs import CORRECTIONS
from ml_backend.settings import Settings
from tests.conftest import ROOT
from tests.ml_backend.conftest import ask, click, wait_until
from tests.ml_backend.running import running
from tests.model.random_adapter import write_random_adapter

PROJECT = "3.1795250578"


def submitted(body, answered, annotation):
    """The event of an annotation that takes an answer as it is."""
    results = [*body["params"]["context"]["result"], *answered]
    return {
        "action": "ANNOTATION_CREATED",
        "project": {"id": 3, "label_config": body["label_config"]},
        "task": {"id": body["tasks"][0]["id"], "data": body["tasks"][0]["data"]},
        "annotation": {
            **{"id": annotation, "task": body["tasks"][0]["id"], "result": results},
            **{"created_at": "2026-11-21T08:41:52Z", "updated_at": "2026-11-21T08:41:52Z"},
        },
    }


@pytest.fixture
def two_machines(tmp_path, label_studio, redis_url):
    """The machine with the ledger, the other one, and the folder both see; each has a data folder of its own."""
    shared = {"GRACO_SHARED_DIR": str(tmp_path / "shared"), "GRACO_REDIS_URL": redis_url}
    with ExitStack() as stack:
        keeper = stack.enter_context(running(tmp_path / "keeper", label_studio.url, **shared))
        other = stack.enter_context(running(tmp_path / "other", label_studio.url, GRACO_LEDGER="elsewhere", **shared))
        for one in (keeper, other):
            wait_until(lambda one=one: one.health().get("model_loaded"), limit_s=240)
        yield keeper, other, tmp_path / "shared"


def test_what_happens_on_one_machine_is_learned_by_the_other_and_a_version_serves_on_both(
    two_machines, tmp_path, segmenter
):
    keeper, other, shared = two_machines
    assert not other.children("ml_backend worker")

    # an import that reaches one machine is encoded by the worker of the other, for both
    body = ask(click(31, 40, level="0.5")) | {"project": PROJECT}
    event = {
        "action": "TASKS_CREATED",
        "project": {"id": 3, "label_config": body["label_config"]},
        "tasks": [{"id": 7, "data": body["tasks"][0]["data"]}],
    }
    assert other.post("/webhook", event)["queued"] == 1
    wait_until(lambda: list((shared / "embeddings").glob("*/??/*.safetensors")), limit_s=120)
    answered = other.post("/predict", body)["results"][0]
    assert answered["result"]
    figures = other.metrics()
    assert figures['graco_embeddings_total{source="disk"}'] == 1
    assert figures['graco_embeddings_total{source="encoded"}'] == 0

    # an annotation that reaches one machine is in the ledger of the other, which knows whose answer it was
    status, _, _ = other.ask("POST", "/webhook", submitted(body, answered["result"], 21))
    assert status == 201
    ledger = keeper.folder / "data" / "corrections.sqlite"

    def learned():
        with closing(CorrectionStore(ledger)) as store:
            return store.get("3", 21)

    (kept,) = wait_until(learned, limit_s=60)
    assert (kept.kind, len(kept.clicks)) == ("accepted", 1), "the answer was handed over, too"
    wait_until(lambda: keeper.metrics()['graco_regions_total{kind="accepted"}'] == 1, limit_s=30)
    assert other.metrics()['graco_events{state="undone"}'] == 0
    assert not (other.folder / "data" / "corrections.sqlite").exists()
    assert list((keeper.folder / "data" / "images").rglob("*"))

    # one ACTIVE file, two machines
    registry = AdapterRegistry(shared / "adapters", base=segmenter.digest)
    file = write_random_adapter(tmp_path / "drawn.safetensors", segmenter, seed=5)
    version = registry.publish("project-3", file, card={"recipe": "drawn", "accepted": True}, activate=True)
    setup = {"project": PROJECT, "schema": body["label_config"]}
    for one in (keeper, other):
        wait_until(lambda one=one: one.post("/setup", setup)["model_version"].endswith(version.id), limit_s=10)
        assert one.post("/predict", body)["results"][0]["model_version"].endswith(version.id)

    # a training asked for on one machine is carried out on the other
    asked = other.post("/webhook", {"action": "START_TRAINING", "project": {"id": 88}})["job"]
    folder = TrainingFolder(shared / "trainings", "project-88")
    ended = wait_until(folder.history, limit_s=120)
    assert ended[-1].id == asked


def test_what_could_not_be_handed_over_waits_and_is_handed_over_when_redis_is_back(make_service, redis_url, tmp_path):
    chosen = {"ledger": "elsewhere", "shared_dir": tmp_path / "shared"}
    away = make_service(start=False, redis_url="unix:///nowhere/redis.sock", **chosen)
    body = json.dumps(submitted(ask(click(31, 40)), [], 5)).encode()
    key = away.inbox.add(body, "ANNOTATION_CREATED")
    away.hand_over.put(key)
    away.hand_over.close()
    assert away.inbox.state(key) == "undone"

    back = make_service(redis_url=redis_url, **chosen)
    wait_until(lambda: back.inbox.state(key) == "done", limit_s=20)
    with redis.Redis.from_url(redis_url) as connection:
        queue = Queue(CORRECTIONS, connection=connection, serializer=JSONSerializer)
        (job,) = queue.get_jobs()
        assert job.id == f"receive-{key}"
        assert "\n" not in job.args[1]


def test_an_event_that_the_ledgers_machine_cannot_write_is_kept_until_it_can(
    make_service, redis_url, tmp_path, monkeypatch
):
    chosen = {"shared_dir": tmp_path / "shared", "redis_url": redis_url}
    away = make_service(ledger="elsewhere", data_dir=tmp_path / "away", **chosen)
    body = json.dumps(submitted(ask(click(31, 40)), [], 5)).encode()
    key = away.inbox.add(body, "ANNOTATION_CREATED")
    away.hand_over.put(key)
    wait_until(lambda: away.inbox.state(key) == "done", limit_s=20)

    in_the_way = tmp_path / "keeper" / "inbox.sqlite"
    in_the_way.mkdir(parents=True)
    settings = Settings(data_dir=in_the_way.parent, **chosen)
    for name, value in (("DATA_DIR", in_the_way.parent), ("SHARED_DIR", settings.shared), ("REDIS_URL", redis_url)):
        monkeypatch.setenv(f"GRACO_{name}", str(value))
    with redis.Redis.from_url(redis_url) as connection:
        queue = Queue(CORRECTIONS, connection=connection, serializer=JSONSerializer)
        worker = SimpleWorker([queue], connection=connection, serializer=JSONSerializer)
        worker.work(burst=True)
        assert queue.failed_job_registry.get_job_ids() == [f"receive-{key}"]
        in_the_way.rmdir()
        with closing(Inbox(in_the_way)) as inbox:
            jobs.drain(settings, connection, inbox=inbox)
            worker.work(burst=True)
            assert inbox.state(key) == "done"
            assert not queue.failed_job_registry.get_job_ids()
    jobs._intake().close()
    jobs._intake.cache_clear()


def test_a_worker_beside_no_ledger_leaves_corrections_alone_and_a_trainer_does_not_start(
    make_service, redis_url, tmp_path
):
    chosen = {"ledger": "elsewhere", "shared_dir": tmp_path / "shared", "redis_url": redis_url}
    service = make_service(**chosen)
    service.hand_over.put(service.inbox.add(b'{"action": "ANNOTATION_CREATED"}', "ANNOTATION_CREATED"))
    wait_until(lambda: service.inbox.counts()["undone"] == 0)
    environment = {
        **{"GRACO_DATA_DIR": str(service.settings.data_dir), "GRACO_SHARED_DIR": str(tmp_path / "shared")},
        **{"GRACO_REDIS_URL": redis_url, "GRACO_LEDGER": "elsewhere"},
    }
    worker = [sys.executable, "-m", "ml_backend", "worker", "--burst"]
    subprocess.run(worker, cwd=ROOT, env=os.environ | environment, check=True, timeout=120)
    with redis.Redis.from_url(redis_url) as connection:
        assert Queue(CORRECTIONS, connection=connection, serializer=JSONSerializer).count == 1
    assert not (service.settings.data_dir / "corrections.sqlite").exists()
    with pytest.raises(SystemExit, match="keeps the ledger"):
        trainings.work(service.settings)


def test_a_ledger_elsewhere_without_a_way_there_stops_the_start(tmp_path):
    with pytest.raises(ValueError, match="GRACO_REDIS_URL and GRACO_SHARED_DIR"):
        Settings(ledger="elsewhere", redis_url="redis://host")
    assert Settings(ledger="elsewhere", redis_url="redis://host", shared_dir=tmp_path).shared == tmp_path
    assert Settings(data_dir=tmp_path).shared == tmp_path


def test_a_configuration_that_one_process_was_sent_serves_the_requests_of_another(make_service, tmp_path):
    first, second = (create_app(make_service()).test_client() for _ in range(2))
    body = ask(click(31, 40)) | {"label_config": None, "project": "76.1"}
    first.post("/setup", json={"project": "76.1", "schema": ask(click(31, 40))["label_config"]})
    assert second.post("/predict", json=body).json["results"][0]["result"]
