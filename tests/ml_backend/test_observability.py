"""What an operator sees of a real backend with two web processes: figures, log lines, one version, no secret."""

import base64
import concurrent.futures
import io
import json
import os
import re
import signal
import socket
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from active_learning.registry import AdapterRegistry
from active_learning.status import TrainingFolder
from ml_backend import brush
from ml_backend.fetch import make_fetcher
from ml_backend.label_config import read_config
from ml_backend.metrics import StateCollector, cause_of
from ml_backend.settings import Settings
from ml_backend.state import read_state
from model.types import Refusal
from tests.conftest import ROOT
from tests.ml_backend.conftest import ask, click, wait_until
from tests.ml_backend.running import ADMIN, PASSWORD, SECRET, running
from tests.model.random_adapter import write_random_adapter

PROJECT = "3.1795250578"
CANARY = "canary-5f0c"
"""Stands in everything that no log may hold."""


@pytest.fixture(scope="module")
def backend(tmp_path_factory, label_studio):
    with running(
        tmp_path_factory.mktemp("observed"), label_studio.url, GRACO_WEB_PROCESSES="2", GRACO_LOG_LEVEL="DEBUG"
    ) as found:
        wait_until(lambda: all_loaded(found), limit_s=240)
        yield found


def all_loaded(backend):
    """Whether both web processes have said so themselves; a request is often answered by the same one."""
    told = {line["process"] for line in entries(backend) if "is loaded after" in line["message"]}
    return len(told & {one.pid for one in webs(backend)}) == 2


def at_once(act, count=24):
    """What many calls at a time give: all processes get some of them."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return [done.result() for done in [pool.submit(act) for _ in range(count)]]


def entries(backend):
    """Its log lines: all that is not Redis's own is JSON."""
    lines = [line for line in backend.log().splitlines() if not re.match(r"[0-9]+:[A-Z] ", line)]
    return [json.loads(line) for line in lines]


def served_by(backend, request_id):
    """The processes that logged something of these requests."""
    return {line["process"] for line in entries(backend) if line["request"].startswith(request_id)}


# --- figures ---


def test_two_processes_count_together_and_a_dead_one_takes_no_counts_with_it(backend):
    name = 'graco_requests_total{route="/setup",status="200"}'
    before = backend.metrics().get(name, 0.0)
    sent = 0
    while len(served_by(backend, "count.1")) < 2:
        sent += len(at_once(lambda: backend.post("/setup", {"project": "90.1"}, headers={"X-Request-Id": "count.1"})))
    assert [found[name] - before for found in at_once(backend.metrics)] == [sent] * 24

    wait_until(lambda: len(webs(backend)) == 2)
    dead = webs(backend)[0]
    dead.send_signal(signal.SIGKILL)
    wait_until(lambda: len(fresh := webs(backend)) == 2 and dead.pid not in {one.pid for one in fresh}, limit_s=60)
    wait_until(lambda: None not in at_once(backend.health))
    assert backend.metrics()[name] - before == sent
    wait_until(lambda: not list(metrics_folder(backend).glob(f"gauge_live*_{dead.pid}.db")))
    wait_until(lambda: all_loaded(backend), limit_s=240)


def webs(backend):
    (master, *_) = sorted(backend.children("gunicorn"), key=lambda one: one.create_time())
    return [child for child in master.children() if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def metrics_folder(backend):
    (master, *_) = sorted(backend.children("gunicorn"), key=lambda one: one.create_time())
    return Path(master.environ()["PROMETHEUS_MULTIPROC_DIR"])


def test_the_dashboard_and_the_alerts_name_only_figures_that_a_run_gives(backend):
    backend.post("/predict", ask(click(31, 40)))
    line = TrainingFolder(backend.folder / "data" / "trainings", "project-77")
    line.end(line.ask("for the figures"), "published", "")
    wanted = {"graco_model_info", "graco_training_success_age_seconds"}  # of a process that has just loaded its model
    given = wait_until(lambda: wanted <= (found := exported(backend)) and found, limit_s=120)
    dashboard = json.loads((ROOT / "docker" / "grafana" / "graco-dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(asked) > 30
    rules = yaml.safe_load((ROOT / "docker" / "prometheus-alerts.yml").read_text())["groups"][0]["rules"]
    asked += [rule["expr"] for rule in rules]
    for expression in asked:
        for name in re.findall(r"\b(?:graco|process)_\w+", expression):
            assert name in given, f"{name} of {expression}"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    scrape = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["basic_auth"]["username"] == "label-studio"


def exported(backend):
    """The names of all figures; those that only a refused crowd brings about are there as soon as it came."""
    return {re.match(r"\w+", name)[0] for name in backend.metrics()} | {"graco_rate_limited_total"}


def test_figures_tell_queues_workers_inbox_trainings_versions_and_disk(backend):
    figures = wait_until(  # what is read is kept for seconds, from before a process had loaded its model, too
        lambda: (
            (found := backend.metrics()).get('graco_workers{queue="corrections"}')
            and found["graco_model_loaded"] == 1
            and found
        )
    )
    assert figures["graco_redis_up"] == 1
    assert figures['graco_queue_jobs{queue="training"}'] == 0
    assert figures["graco_inbox_oldest_seconds"] < 600
    assert figures['graco_disk_free_bytes{place="data"}'] > 0
    assert any(name.startswith('graco_serving_info{line="configured",version="light-') for name in figures)
    assert any(name.startswith("graco_model_info{") for name in figures)


def test_state_is_read_in_bounded_time_though_redis_hangs_and_once_for_many_scrapes(make_service, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        service = make_service(start=False, redis_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        service.inbox.add(b'{"a": 1}', "ANNOTATION_CREATED")
        trainings = TrainingFolder(service.settings.shared / "trainings", "project-3")
        trainings.note(trainings.ask("test"), state="running", step=5, steps=20)
        reads = []
        state = StateCollector(lambda: reads.append(1) or read_state(service))
        start_s = time.monotonic()
        found = {(s.name, *sorted(s.labels.items())): s.value for m in state.collect() for s in m.samples}
        assert time.monotonic() - start_s < 2
        assert found["graco_redis_up",] == 0
        assert 0 < found["graco_inbox_oldest_seconds",] < 60
        assert found["graco_training_percent", ("line", "project-3")] == 25
        assert found["graco_training_state", ("line", "project-3"), ("state", "running")] == 1
        assert found["graco_training_state", ("line", "project-3"), ("state", "none")] == 0
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: state.collect(), range(40)))
        assert len(reads) == 1


def test_a_refusal_is_counted_by_where_it_was_raised_and_its_words_are_not():
    acts = {
        "label_config": lambda: read_config(f"<{CANARY}"),
        "image_fetch": lambda: make_fetcher(Settings()).fetch(f"gopher://{CANARY}/x", None),
        "mask": lambda: brush.decode([1, 2, 3], height=4, width=4),
    }
    for cause, act in acts.items():
        with pytest.raises(Refusal) as caught:
            act()
        assert cause_of(caught.value) == cause


# --- log lines ---


def test_a_requests_id_is_taken_over_if_it_is_a_plain_word_and_follows_its_event_into_the_worker(backend, label_studio):
    event = {
        "action": "ANNOTATION_CREATED",
        "project": {"id": 3, "label_config": ask(click(31, 40))["label_config"]},
        "task": {"id": 5, "data": {"image": "/data/upload/3/nowhere-to-be-found.png"}},
        "annotation": {"id": 11, "task": 5, "result": [], "updated_at": "2026-11-21T08:41:52Z"},
    }
    event["annotation"]["result"] = backend.post("/predict", ask(click(31, 40)))["results"][0]["result"]
    status, headers, _ = backend.ask("POST", "/webhook", event, headers={"X-Request-Id": "trace.1-a"})
    assert (status, headers["X-Request-Id"]) == (201, "trace.1-a")
    wait_until(lambda: len(served_by(backend, "trace.1-a")) >= 2, limit_s=60)  # a web process, and the worker
    for odd in ("two words", "x" * 65, "a;b", "\u00e9", ""):
        _, headers, _ = backend.ask("GET", "/health", headers={"X-Request-Id": odd.encode("latin-1").decode("latin-1")})
        assert re.fullmatch(r"[0-9a-f]{8}", headers["X-Request-Id"])


def test_each_request_is_one_line_with_method_route_status_and_time_and_nothing_else_of_it(backend):
    backend.ask("GET", f"/versions?project=3&token={CANARY}", headers={"X-Request-Id": "line.1"})
    backend.ask("GET", f"/nowhere/{CANARY}?token={CANARY}", headers={"X-Request-Id": "line.2"})
    found = wait_until(
        lambda: len(lines := [one for one in entries(backend) if one["logger"] == "ml_backend.access"]) and lines
    )
    (first,) = [one for one in found if one["request"] == "line.1"]
    assert (first["method"], first["route"], first["status"]) == ("GET", "/versions", 200)
    assert 0 < first["ms"] < 60_000
    (second,) = [one for one in found if one["request"] == "line.2"]
    assert (second["route"], second["status"]) == ("unknown", 404)


# --- two processes, one version ---


def test_both_processes_serve_a_new_version_within_a_second_and_no_answer_mixes_two(backend, segmenter, tmp_path):
    registry = AdapterRegistry(backend.folder / "data" / "adapters", base=segmenter.digest)
    files = [write_random_adapter(tmp_path / f"{n}.safetensors", segmenter, seed=n) for n in (1, 2)]
    old, new = (
        registry.publish("project-3", file, card={"recipe": "drawn", "accepted": True}, activate=False)
        for file in files
    )
    registry.activate("project-3", old.id)
    body = ask(click(31, 40, level="0.5")) | {"project": PROJECT}
    body["tasks"] = [body["tasks"][0] | {"id": n} for n in (7, 8, 9)]

    def versions(request_id):
        results = backend.post("/predict", body, headers={"X-Request-Id": request_id})["results"]
        assert len(results) == 3
        return [result["model_version"].rpartition("project-3-")[2] for result in results]

    wait_until(lambda: all(set(found) == {old.id} for found in at_once(lambda: versions("old.1"))), limit_s=60)
    registry.activate("project-3", new.id)
    switched_s = time.monotonic()
    seen = []
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        while time.monotonic() - switched_s < 4:
            began_s = time.monotonic() - switched_s
            seen += [(began_s, found) for found in pool.map(versions, [f"new.{began_s:.2f}"] * 4)]
    assert all(len(set(found)) == 1 for _, found in seen), "no answer mixes two versions"
    allowed_s = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # a busy machine takes longer
    late = [(began_s, found) for began_s, found in seen if began_s > allowed_s and set(found) != {new.id}]
    assert not late, late
    assert seen[-1][1] == [new.id] * 3
    assert len(served_by(backend, "new.")) == 2, "both processes were asked"


# --- no secret anywhere ---


def damaged_image():
    file = io.BytesIO()
    Image.fromarray(np.zeros((300, 451, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()[:200]


def test_no_token_password_phrase_or_pixel_is_in_a_log_a_figure_or_an_error(backend, label_studio):
    said = []

    def tell(method, path, body=None, **kwargs):
        status, headers, content = backend.ask(method, path, body, **kwargs)
        if status >= 400 or b'"reason"' in content or path in ("/metrics", "/health", "/openapi.json"):
            said.append(f"{status}: {content.decode(errors='replace')} {headers}")
        return status, content

    label_studio.add(f"/data/upload/9/damaged.png?token={CANARY}-query", damaged_image())
    good = ask(click(31, 40, level="0.5"))
    odd = []
    for address in (
        f"{label_studio.url}/data/upload/9/damaged.png?token={CANARY}-query",
        f"/data/upload/9/damaged.png?token={CANARY}-query",
        f"/data/upload/3/forbidden.png?X-Amz-Signature={CANARY}-signature",
        f"http://me:{CANARY}-basic@127.0.0.1:1/a.png",
        f"http://{CANARY}-user:secret@unknown.invalid/a.png?key={CANARY}-key",
        f"data:image/png;base64,{base64.b64encode(f'{CANARY}-inline'.encode()).decode()}",
        f"data:image/png;base64,{CANARY}-notbase64",
        f"gopher://host/x?{CANARY}-scheme",
    ):
        odd.append(ask(click(31, 40), image=address))
    phrased = ask(click(31, 40))
    first = phrased["params"]["context"]["result"][0]
    phrased["params"]["context"]["result"].append(
        first | {"type": "textarea", "from_name": "phrase", "value": {"text": [f"{CANARY}-phrase"]}}
    )
    hidden = good | {"params": good["params"] | {"login": f"{CANARY}-login", "password": f"{CANARY}-pw"}}
    hidden["tasks"] = [good["tasks"][0] | {"meta": {"note": f"{CANARY}-meta"}}]
    hidden["tasks"][0]["data"] = hidden["tasks"][0]["data"] | {"text": f"{CANARY}-data"}
    broken_mask = {
        **{"id": "region-1", "type": "brushlabels", "from_name": "mask", "to_name": "image"},
        **{"original_width": 451, "original_height": 300, "origin": "manual"},
        "value": {"format": "rle", "rle": [1, 2, 3], "brushlabels": [f"{CANARY}-label"]},
    }
    event = {
        "action": "ANNOTATION_CREATED",
        "project": {"id": 3, "label_config": good["label_config"], "token": f"{CANARY}-project"},
        "task": {"id": 5, "data": {"image": f"/data/upload/9/damaged.png?token={CANARY}-query"}},
        "annotation": {
            **{"id": 12, "task": 5, "result": [broken_mask], "updated_at": "2026-11-21T08:41:52Z"},
            **{"completed_by": {"email": f"{CANARY}@example.org"}},
        },
    }
    pixels = json.loads(tell("POST", "/predict", good)[1])["results"][0]["result"][0]["value"]["rle"]
    for body in (hidden, phrased, *odd):
        tell("POST", "/predict", body)
    batch = good | {"params": {}, "tasks": [one["tasks"][0] | {"id": n} for n, one in enumerate(odd)]}
    tell("POST", "/predict", batch)
    for body in (
        event,
        event | {"annotation": event["annotation"] | {"id": 13, "result": f"{CANARY}-no-list"}},
        {"action": f"{CANARY}-action"},
        {"action": "START_TRAINING", "project": {"id": f"{CANARY}-id"}},
        {"action": "TASKS_CREATED", "project": event["project"], "tasks": [event["task"], {"data": f"{CANARY}-t"}]},
        {"action": "PROJECT_UPDATED", "project": event["project"] | {"access_token": f"{CANARY}-access"}},
    ):
        tell("POST", "/webhook", body)
        tell("POST", "/webhook", body, user=None, headers={"X-Graco-Secret": SECRET})
    tell("POST", "/webhook", event, user=None, headers={"X-Graco-Secret": f"{CANARY}-wrong-secret"})
    for path in ("/setup", "/train", "/predict", "/webhook"):
        tell("POST", path, f'{{"project": "{CANARY}-cut'.encode())
        tell("POST", path, {"project": [f"{CANARY}-list"], "schema": {f"{CANARY}-schema": 1}, "tasks": f"{CANARY}-x"})
        tell("POST", path, {"project": "3.1", "schema": f"<{CANARY}-xml"}, password=f"{CANARY}-wrong-password")
        tell("POST", path, {"project": "3.1", "schema": f"<View {CANARY}-xml", "access_token": f"{CANARY}-access"})
    for path in ("/", "/health", "/metrics", "/openapi.json", "/versions", "/admin", "/admin/login"):
        for user, password in (("label-studio", PASSWORD), ("admin", ADMIN), (f"{CANARY}-user", f"{CANARY}-pw")):
            tell("GET", f"{path}?token={CANARY}-query", user=user, password=password)
    tell("POST", "/admin/login", f"password={CANARY}-typed".encode())
    tell("GET", f"/{CANARY}-path/x")
    tell("GET", f"/{CANARY}-path/x", user=None)
    tell("BREW", "/predict", good)
    wait_until(lambda: backend.metrics()["graco_inbox_oldest_seconds"] < 60, limit_s=30)
    with closing(sqlite3.connect(backend.folder / "data" / "inbox.sqlite")) as db:
        db.execute("DROP TABLE events")  # an error of our own, with a traceback in the log
    assert tell("POST", "/webhook", event)[0] == 500
    assert "Traceback" in backend.log()
    time.sleep(2)  # the worker's lines

    everything = {"log": backend.log(), "metrics": json.dumps(backend.metrics()), "answers": "\n".join(said)}
    runs = ", ".join(map(str, pixels[8:24]))
    encoded = base64.b64encode(f"{CANARY}-inline".encode()).decode()[:14]
    for place, text in everything.items():
        found = re.findall(rf".{{0,120}}(?:{CANARY}|{encoded}|{PASSWORD}|{SECRET}|{ADMIN}).{{0,40}}", text)
        found += re.findall(r".{0,80}0123456789abcdef0123456789abcdef01234567", text)
        assert not found, f"{place}: {found[:12]}"
        assert runs not in text
        assert runs.replace(" ", "") not in text
        if place != "log":
            assert "Traceback" not in text
