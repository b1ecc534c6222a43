"""Alive is not ready: the model, Redis, and a worker that has been heard of."""

import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from rq import Worker
from werkzeug.serving import make_server

import ml_backend.families
from ml_backend.app import create_app
from ml_backend.health_command import Told, ask_health
from ml_backend.queues import RecentLook, RedisState, look
from ml_backend.readiness import why_no_corrections
from ml_backend.settings import Settings
from tests.conftest import ROOT
from tests.ml_backend.conftest import wait_until


def ask(service, query=""):
    answer = create_app(service).test_client().get(f"/health{query}")
    return answer.status_code, answer.json


@pytest.fixture
def start(redis_url, tmp_path):
    """Start a real process on the tests' Redis, by its name."""
    environment = {"GRACO_REDIS_URL": redis_url, "GRACO_DATA_DIR": str(tmp_path / "data"), "PATH": "/usr/bin:/bin"}
    started = []

    def start(name):
        (tmp_path / "data").mkdir(exist_ok=True)
        started.append(subprocess.Popen([sys.executable, "-m", "ml_backend", name], cwd=ROOT, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(10)


@pytest.fixture
def worker(start):
    """A real corrections worker."""
    return start("worker")


def test_without_a_redis_the_model_alone_makes_ready(make_service):
    service = make_service()
    wait_until(lambda: service.ready)
    status, body = ask(service, "?ready=1")
    assert (status, body["ready"], body["reasons"]) == (200, True, [])
    assert "ready" not in ask(service)[1]


def test_while_the_model_loads_it_is_alive_and_not_ready(make_service, monkeypatch):
    go, load = threading.Event(), ml_backend.families.load_segmenter
    monkeypatch.setattr(ml_backend.families, "load_segmenter", lambda *args, **kw: go.wait(30) and load(*args, **kw))
    service = make_service()
    assert ask(service)[0] == 200
    assert ask(service, "?ready=model") == ask(service, "?ready=1")
    status, body = ask(service, "?ready=1")
    go.set()
    assert (status, body["reasons"]) == (503, ["the model is being loaded"])
    wait_until(lambda: ask(service, "?ready=model")[0] == 200)


def test_a_model_that_cannot_be_loaded_is_told_and_never_ready(make_service, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\0" * 64)
    try:
        service = make_service(adapter=broken)
    except ValueError:  # refused before anything starts is as good
        return
    wait_until(lambda: service.failure)
    assert ask(service)[0] == 200
    status, body = ask(service, "?ready=model")
    assert status == 503
    assert "could not be loaded" in body["reasons"][0]


def test_a_redis_that_is_gone_is_a_reason_and_clicks_do_not_need_it(make_service, tmp_path):
    service = make_service(redis_url=f"unix://{tmp_path}/none.sock")
    wait_until(lambda: service.ready)
    status, body = ask(service, "?ready=1")
    assert status == 503
    assert body["reasons"][0].startswith("Redis: it does not answer")
    assert ask(service, "?ready=model")[0] == 200


def test_ten_quick_questions_cost_one_look_at_redis(make_service, tmp_path, monkeypatch):
    service = make_service(redis_url=f"unix://{tmp_path}/none.sock")
    looks = []

    def slow(url):
        looks.append(url)
        time.sleep(0.2)
        return look(url)

    monkeypatch.setattr("ml_backend.queues.look", slow)
    app = create_app(service)

    def question(_):
        return app.test_client().get("/health?ready=1").status_code

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(question, range(10))) == [503] * 10
    assert len(looks) == 1


def test_what_was_found_of_redis_holds_good_for_a_while_only(monkeypatch):
    looks = []
    monkeypatch.setattr("ml_backend.queues.look", lambda url: looks.append(url) or RedisState(error=str(len(looks))))
    lasting, fleeting = RecentLook("redis://one", keep_s=60), RecentLook("redis://two", keep_s=0)
    assert [lasting.get().error for _ in range(3)] == ["1"] * 3
    assert [fleeting.get().error for _ in range(3)] == ["2", "3", "4"]


def test_ready_follows_the_worker_through_its_life(make_service, redis_url, worker):
    service = make_service(redis_url=redis_url)
    wait_until(lambda: service.ready)
    wait_until(lambda: ask(service, "?ready=1")[0] == 200)
    assert why_no_corrections(look(redis_url), host="another-container") == [
        "no corrections worker on another-container has reported lately; start one: python -m ml_backend worker"
    ]
    worker.send_signal(signal.SIGTERM)
    worker.wait(20)
    assert "no corrections worker" in ask(service, "?ready=1")[1]["reasons"][0]


def test_a_worker_stopped_just_as_it_becomes_known_takes_its_leave(redis_url, tmp_path):
    (tmp_path / "data").mkdir()
    code = """if True:
        import os, signal
        from rq import SimpleWorker
        from ml_backend.jobs import work
        from ml_backend.settings import Settings
        become_known = SimpleWorker.register_birth
        def and_be_stopped(self):
            become_known(self)
            assert self.connection.smembers("rq:workers")
            os.kill(os.getpid(), signal.SIGTERM)
        SimpleWorker.register_birth = and_be_stopped
        work(Settings())
    """
    environment = {"GRACO_REDIS_URL": redis_url, "GRACO_DATA_DIR": str(tmp_path / "data"), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=60, check=False)
    assert ended.returncode == 0
    assert look(redis_url).workers == ()


def test_a_killed_worker_is_forgotten_within_two_minutes(redis_url, worker):
    with redis.Redis.from_url(redis_url) as connection:
        (key,) = wait_until(lambda: Worker.all_keys(connection=connection))
        wait_until(lambda: why_no_corrections(look(redis_url)) == [])
        worker.kill()
        worker.wait(10)
        assert 0 < connection.ttl(key) <= 120
        connection.delete(key)  # what Redis does then
        assert Worker.all_keys(connection=connection) == [key]  # until some worker cleans up
    assert look(redis_url).workers == ()
    assert why_no_corrections(look(redis_url)) != []


def test_a_crowd_of_killed_workers_hides_none_that_lives(redis_url, worker):
    with redis.Redis.from_url(redis_url) as connection:
        connection.sadd("rq:workers", *(f"rq:worker:{number:04}" for number in range(200)))
    wait_until(lambda: why_no_corrections(look(redis_url)) == [])
    assert len(look(redis_url).workers) == 1


def test_a_missing_trainer_is_a_note_that_keeps_nobody_from_being_ready(make_service, redis_url, worker, start):
    service = make_service(redis_url=redis_url)
    wait_until(lambda: service.ready)
    wait_until(lambda: ask(service, "?ready=1")[0] == 200, limit_s=60)
    (note,) = ask(service, "?ready=1")[1]["notes"]
    assert note.endswith("start one: python -m ml_backend trainer")
    trainer = start("trainer")
    wait_until(lambda: ask(service, "?ready=1")[1]["notes"] == [], limit_s=60)
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(20) == 0
    assert ask(service, "?ready=1")[1]["notes"] == [note], "it took its leave"


def test_the_command_tells_reasons_and_notes_apart(make_service, redis_url):
    service = make_service(redis_url=redis_url)
    wait_until(lambda: service.ready)
    server = make_server("127.0.0.1", 0, create_app(service))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        settings = service.settings.model_copy(update={"port": server.port})
        assert ask_health(settings) == Told()
        told = ask_health(settings, ready=True)
    finally:
        server.shutdown()
        thread.join()
    assert [said.partition(" has")[0] for said in told.reasons + told.notes] == ["no corrections worker", "no trainer"]
    assert ask_health(settings).reasons[0].endswith("is the web process running?")


def test_a_waiting_trainer_is_known_to_redis_until_it_is_killed_and_is_told_of_again_where_redis_forgot(
    redis_url, start
):
    trainer = start("trainer")
    with redis.Redis.from_url(redis_url) as connection:
        (key,) = wait_until(lambda: Worker.all_keys(connection=connection), limit_s=60)
        connection.flushall()
        assert wait_until(lambda: Worker.all_keys(connection=connection)) == [key]
        trainer.kill()
        trainer.wait(10)
        assert 0 < connection.ttl(key) <= 120


def test_an_answer_that_breaks_off_or_is_no_http_is_a_reason_and_no_error():
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n{"
    for sent, said in ((whole, "breaks off"), (whole.replace(b"200 OK", b"503 No"), "breaks off"), (b"x\r\n\r\n", "x")):
        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=answer_once, args=[server, sent])
            thread.start()
            (reason,) = ask_health(Settings(port=server.getsockname()[1])).reasons
            thread.join()
        assert said in reason


def answer_once(server, sent):
    connection, _ = server.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(sent)


def test_liveness_alone_is_200_whatever_is_missing(make_service, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such model")

    monkeypatch.setattr(ml_backend.families, "load_segmenter", fail)
    service = make_service(redis_url=f"unix://{tmp_path}/none.sock")
    wait_until(lambda: service.failure)
    for query in ("", "?", "?READY=1", "?model"):
        assert ask(service, query)[0] == 200
    assert ask(service)[1]["status"] == "FAILED"
    for query in ("?ready=1", "?ready=model", "?ready="):
        assert ask(service, query)[0] == 503
