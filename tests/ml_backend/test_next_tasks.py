import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
from rq import Queue
from rq.serializers import JSONSerializer
from typer.testing import CliRunner

from active_learning.registry import AdapterRegistry
from ml_backend import jobs, next_tasks
from ml_backend.__main__ import app
from ml_backend.jobs import connect, enqueue_scores
from ml_backend.label_config import make_config
from ml_backend.next_tasks import SAMPLING, wants_scores
from ml_backend.scoring import ask_for_lines_scores, ask_for_scores
from model.segmenter import BUNDLED_ADAPTER
from model.types import Refusal
from tests.conftest import ROOT
from tests.ml_backend.conftest import SIZES, TOKEN, picture, settings_for

score_tasks = functools.partial(next_tasks.score_tasks, clicks=1)  # one is quick, and enough to order three photos
EARLIER = "light-00000000+granularity-11111111"


class Studio:
    """Label Studio 1.23 as far as a project's tasks, predictions and label stream go."""

    def __init__(self):
        self.project = {"id": 3, "label_config": make_config(["Car"]), "model_version": "GraCo"}
        self.project["sampling"] = "Sequential sampling"
        self.files = {f"/data/upload/3/{name}.png": picture(*size) for name, size in SIZES.items()}
        self.tasks = {n: {"image": uri} for n, uri in enumerate(self.files, 1)}
        self.annotators, self.predictions = [1], {}
        self.annotated = []  # tasks, the one annotated last at the end
        self.backends = [{"id": 1, "url": "http://localhost:9090", "title": "GraCo"}]
        self.asked, self.broken = Counter(), set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                url = urlsplit(self.path)
                outer.asked[f"{self.command} {url.path}"] += 1
                status, answer = outer.answer(self.command, url, json.loads(content or b"null"))
                if self.headers.get("Authorization") != f"Token {TOKEN}":
                    status, answer = 401, {}
                if any(f"{self.command} {url.path}".startswith(path) for path in outer.broken):
                    status, answer = 500, {}
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            do_POST = do_PATCH = do_DELETE = do_GET

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def answer(self, method, url, content):
        match method, url.path.strip("/").split("/"):
            case "GET", ["data", *_] if url.path in self.files:
                return 200, self.files[url.path]
            case "GET", ["api", "projects", "3"]:
                return 200, self.project
            case "PATCH", ["api", "projects", "3"]:
                known = {p["model_version"] for p in self.predictions.values()} | {"GraCo"}
                if content["model_version"] not in known:
                    return 400, {}
                self.project |= content
                return 200, self.project
            case "GET", ["api", "ml"]:
                return 200, self.backends
            case "GET", ["api", "projects", "3", "annotators"]:
                return 200, [{"id": n} for n in self.annotators]
            case "GET", ["api", "tasks"]:
                return self._page(parse_qs(url.query))
            case "POST", ["api", "predictions"]:
                return 201, self.predict(**content)
            case "PATCH", ["api", "predictions", number] if int(number) in self.predictions:
                self.predictions[int(number)] |= content
                return 200, self.predictions[int(number)]
            case "DELETE", ["api", "predictions", number] if int(number) in self.predictions:
                del self.predictions[int(number)]
                return 204, b""
        return 404, {}

    def _page(self, query):
        (item,) = json.loads(query["query"][0])["filters"]["items"]
        assert (item["filter"], query["resolve_uri"]) == ("filter:tasks:total_annotations", ["false"])
        if item["operator"] == "greater":
            assert json.loads(query["query"][0])["ordering"] == ["-tasks:completed_at"]
            wanted = self.annotated[::-1]
        else:
            wanted = [n for n in sorted(self.tasks) if n not in self.annotated]
        page, size = int(query["page"][0]), int(query["page_size"][0])
        shown = []
        for n in wanted[(page - 1) * size : page * size]:
            task = {"id": n, "data": self.tasks[n]}
            if query["fields"] == ["all"]:
                task["predictions"] = self.of(n)
            shown.append(task)
        return 200, {"total": len(wanted), "tasks": shown}

    def predict(self, *, task, model_version, score, result):
        number = 1 + max(self.predictions, default=0)
        made = {"id": number, "task": task, "model_version": model_version, "score": score, "result": result}
        self.predictions[number] = made
        return made

    def of(self, task):
        return [p for p in self.predictions.values() if p["task"] == task]

    def next_task(self):
        """The next task of a label stream by uncertainty sampling; None: one at random."""
        assert self.project["sampling"] == SAMPLING
        version = self.project["model_version"]
        left = [p for p in self.predictions.values() if p["task"] not in self.annotated]
        found = sorted((p["score"], p["task"]) for p in left if p["model_version"] == version)
        return found[0][1] if found else None

    def wrote(self):
        return sum(n for what, n in self.asked.items() if not what.startswith("GET"))

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def label_studio():
    studio = Studio()
    yield studio
    studio.close()


def scores(studio, version):
    return {p["task"]: p["score"] for p in studio.predictions.values() if p["model_version"] == version}


def test_the_label_stream_follows_the_scores_once_the_sampling_is_set(label_studio, make_service):
    outcome = score_tasks(make_service(), 3, set_sampling=True)
    assert (outcome.looked, outcome.refused, outcome.left, outcome.scored, outcome.advice) == (3, 0, 0, 3, "")
    given = scores(label_studio, outcome.version)
    assert sorted(given.values()) == pytest.approx([0, 1 / 3, 2 / 3])
    assert all(p["result"] == [] for p in label_studio.predictions.values())
    for task in sorted(given, key=given.get):
        assert label_studio.next_task() == task
        label_studio.annotated.append(task)
    assert label_studio.next_task() is None


def test_unless_asked_to_it_says_what_to_set_and_leaves_the_project_alone(label_studio, make_service):
    before = dict(label_studio.project)
    outcome = score_tasks(make_service(), 3)
    assert label_studio.project == before
    assert "--set-sampling" in outcome.advice
    assert f'PATCH /api/projects/3 {{"model_version": "{outcome.version}"' in outcome.advice
    assert outcome.advice in str(outcome)


def test_a_second_run_goes_on_where_the_first_was_limited_and_a_third_changes_nothing(label_studio, make_service):
    told = []
    first = score_tasks(make_service(), 3, limit=2, report=lambda looked, of: told.append((looked, of)))
    assert told == [(n, first.looked) for n in range(first.looked)]
    assert (first.looked, first.left, first.scored) == (2, 1, 2)
    second = score_tasks(make_service(), 3)
    assert (second.looked, second.left, second.scored) == (1, 0, 3)
    written, files = label_studio.wrote(), sum(n for what, n in label_studio.asked.items() if "/data/" in what)
    assert score_tasks(make_service(), 3).looked == 0
    assert label_studio.wrote() == written
    assert sum(n for what, n in label_studio.asked.items() if "/data/" in what) == files
    assert len(label_studio.predictions) == 3


def test_a_run_that_was_killed_while_it_wrote_is_gone_on_with(label_studio, make_service, tmp_path):
    label_studio.broken.add("POST /api/predictions")
    with pytest.raises(Refusal, match="answered 500"):
        score_tasks(make_service(), 3)
    for file in (tmp_path / "data" / "selection").iterdir():
        file.write_bytes(file.read_bytes()[:-100])  # the last line ends in its middle
    label_studio.broken.clear()
    outcome = score_tasks(make_service(), 3)
    assert (outcome.looked, outcome.scored) == (1, 3)
    assert score_tasks(make_service(), 3).looked == 0


def test_a_replaced_image_is_looked_at_anew_and_a_lost_one_costs_the_others_nothing(label_studio, make_service):
    score_tasks(make_service(), 3)
    label_studio.tasks[2] = label_studio.tasks[1]
    label_studio.tasks[3] = {"image": "/data/upload/3/lost.png"}
    outcome = score_tasks(make_service(), 3)
    assert (outcome.looked, outcome.refused, outcome.scored) == (2, 1, 2)


def test_ours_of_before_are_replaced_and_what_holds_regions_or_is_not_ours_stays(label_studio, make_service):
    service = make_service()
    region = [{"type": "brushlabels", "value": {}}]
    now = service.version(3)
    for version, result in ((EARLIER, []), (EARLIER, region), ("yolo-8", []), (now, region)):
        label_studio.predict(task=1, model_version=version, score=0, result=result)
    label_studio.predict(task=1, model_version=now, score=0, result=[])  # as answered to a batch
    outcome = score_tasks(service, 3)
    kept = [(p["model_version"], bool(p["result"])) for p in label_studio.of(1)]
    assert kept == [(EARLIER, True), ("yolo-8", False), (outcome.version, True)]
    assert len(scores(label_studio, outcome.version)) == 3
    assert sorted(scores(label_studio, outcome.version).values()) == pytest.approx([0, 1 / 3, 2 / 3])


def test_where_several_annotate_only_the_most_useful_tasks_are_in_the_draw(label_studio, make_service):
    label_studio.annotators = [1, 2]
    every = scores(label_studio, score_tasks(make_service(), 3).version)
    outcome = score_tasks(make_service(), 3, best=1)
    assert outcome.scored == 1
    assert scores(label_studio, outcome.version) == {min(every, key=every.get): 0}
    assert "several people annotate" in str(outcome)


def test_what_was_corrected_already_is_looked_at_for_its_likeness_alone(label_studio, make_service, tmp_path):
    label_studio.annotated.append(1)
    label_studio.tasks[4] = dict(label_studio.tasks[1])  # the same image once more
    outcome = score_tasks(make_service(), 3)
    assert outcome.looked == 4
    assert set(scores(label_studio, outcome.version)) == {2, 3, 4}
    features, looks = sorted((tmp_path / "data" / "selection").iterdir(), key=lambda path: "features" not in path.name)
    assert kept_tasks(features) == {1, 2, 3, 4}
    assert kept_tasks(looks) == {2, 3, 4}


def test_of_what_was_corrected_the_annotated_last_are_looked_at_once_and_not_again_by_each_version(
    label_studio, make_service, tmp_path, monkeypatch, registry
):
    monkeypatch.setattr(next_tasks, "MOST", 2)
    label_studio.tasks |= {n: {"image": label_studio.tasks[1]["image"] + f"?{n}"} for n in range(4, 8)}
    label_studio.annotated = [6, 4, 7, 5]  # in this order
    first = score_tasks(make_service(), 3)
    assert first.looked == 3 + 2
    (features,) = (tmp_path / "data" / "selection").glob("3-features-*.jsonl")
    assert kept_tasks(features) == {1, 2, 3, 5, 7}
    written = features.read_bytes()
    registry.publish("project-3", BUNDLED_ADAPTER, card={}, activate=True)
    second = score_tasks(make_service(), 3)
    assert second.version != first.version
    assert (second.looked, set(scores(label_studio, second.version))) == (3, {1, 2, 3})
    assert features.read_bytes() == written


def kept_tasks(file):
    return {json.loads(line)["task"] for line in file.read_text().splitlines()}


def test_where_tasks_are_prelabelled_the_scored_prediction_holds_the_regions(label_studio, make_service):
    label_studio.tasks = {1: label_studio.tasks[1]}
    score_tasks(make_service(prelabel=True), 3)
    (made,) = label_studio.predictions.values()
    assert made["result"]
    assert made["score"] == 0


def test_a_project_that_is_not_there_is_refused_with_what_to_check(label_studio, make_service):
    with pytest.raises(Refusal, match="no such project"):
        score_tasks(make_service(start=False), 8)


def test_a_family_without_embeddings_is_refused_before_anything_is_asked(
    label_studio, make_service, tmp_path, monkeypatch
):
    service = make_service(start=False)
    monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"family": "graco"}))
    with pytest.raises(Refusal, match="GRACO_FAMILY=graco has none of; serve light"):
        score_tasks(service, 3)
    assert not label_studio.asked
    assert not service.ready


def test_the_command_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("GRACO_DATA_DIR", str(tmp_path))
    result = CliRunner().invoke(app, ["next-tasks", "--project", "3"])
    assert result.exit_code == 1
    assert "LABEL_STUDIO_URL is not set" in result.output


# --- by itself ---


def worker(settings, label_studio, redis_url, **more):
    """Run a worker until no job is left."""
    environment = {
        **os.environ,
        **{"GRACO_REDIS_URL": redis_url, "GRACO_DATA_DIR": str(settings.data_dir), "GRACO_ENCODER": "exact"},
        **{"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": TOKEN, "GRACO_DEVICE": "cpu"},
        **more,
    }
    command = [sys.executable, "-m", "ml_backend", "worker", "--burst"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


def due(settings):
    return [path.name for path in (settings.data_dir / "selection").glob("*.due")]


def test_a_published_version_has_the_worker_score_the_tasks_and_move_the_projects_version(
    label_studio, tmp_path, redis_url, segmenter
):
    settings = settings_for(tmp_path / "data", label_studio, redis_url=redis_url)
    label_studio.project |= {"sampling": SAMPLING, "model_version": EARLIER}
    label_studio.predict(task=1, model_version=EARLIER, score=0.5, result=[])
    registry = AdapterRegistry(settings.data_dir / "adapters", base=segmenter.digest)
    version = registry.publish("project-3", BUNDLED_ADAPTER, card={}, activate=True)
    ask_for_lines_scores(settings, "project-3")
    assert due(settings) == ["3.due"]
    said = worker(settings, label_studio, redis_url)
    served = label_studio.project["model_version"]
    assert served.endswith(f"+project-3-{version.id}"), said
    assert sorted(scores(label_studio, served).values()) == pytest.approx([0, 1 / 3, 2 / 3])
    assert label_studio.next_task() == min(scores(label_studio, served), key=scores(label_studio, served).get)
    assert scores(label_studio, EARLIER) == {}
    assert due(settings) == []
    wrote = label_studio.wrote()
    worker(settings, label_studio, redis_url)
    assert label_studio.wrote() == wrote, "nothing was asked for again"


def test_asked_for_again_while_it_waits_the_scoring_is_one_job_and_none_where_it_is_switched_off(
    label_studio, tmp_path, redis_url
):
    settings = settings_for(tmp_path / "data", label_studio, redis_url=redis_url)
    off = settings.model_copy(update={"next_tasks": "off"})
    ask_for_scores(off, 3)
    assert not (settings.data_dir / "selection").exists()
    ask_for_scores(settings, 3)
    with connect(redis_url) as connection:
        queue = Queue(jobs.CORRECTIONS, connection=connection, serializer=JSONSerializer)
        enqueue_scores(off, connection)
        assert queue.count == 0
        for _ in range(3):
            enqueue_scores(settings, connection)
        (job_id,) = queue.get_job_ids()
        assert job_id.startswith("next-tasks-3-")
        assert queue.fetch_job(job_id).timeout == 600


@pytest.mark.parametrize(
    ("changed", "backends", "wanted"),
    [
        ({"sampling": SAMPLING, "model_version": "GraCo"}, None, True),
        ({"sampling": SAMPLING, "model_version": EARLIER}, None, True),
        ({"sampling": SAMPLING, "model_version": ""}, None, True),
        ({"sampling": SAMPLING, "model_version": "yolo-8"}, None, False),
        ({"model_version": EARLIER}, None, False),
        ({"sampling": SAMPLING}, [{"url": "http://localhost:1234", "title": "GraCo"}], False),
    ],
)
def test_a_projects_version_is_moved_where_it_is_ours_and_label_studio_samples_by_it(
    label_studio, make_service, changed, backends, wanted
):
    label_studio.project |= changed
    label_studio.backends = backends or label_studio.backends
    service = make_service()
    assert wants_scores(service.settings, 3) == wanted
    before = dict(label_studio.project)
    outcome = score_tasks(service, 3)
    moved = label_studio.project == before | {"model_version": outcome.version}
    assert (moved, label_studio.project == before) == (wanted, not wanted)


def test_a_run_that_is_limited_in_time_goes_on_in_the_next_and_writes_once_all_was_looked_at(
    label_studio, make_service
):
    service = make_service()
    slow = functools.partial(score_tasks, service, 3, limit_s=0.2, pause=lambda: time.sleep(0.25))
    first = slow()
    assert (first.looked, first.left, first.scored, first.finished) == (1, 2, 0, False)
    assert label_studio.predictions == {}
    runs = [first]
    while not runs[-1].finished:
        runs.append(slow())
    assert len(runs) <= 4
    assert len(scores(label_studio, first.version)) == 3


def test_a_task_without_an_image_is_not_tried_again_in_a_run_that_goes_on(label_studio, make_service):
    label_studio.tasks[2] = {"image": "/data/upload/3/lost.png"}
    refused = set()
    assert score_tasks(make_service(), 3, refused=refused).refused == 1
    asked = label_studio.asked["GET /data/upload/3/lost.png"]
    again = score_tasks(make_service(), 3, refused=refused)
    assert (again.refused, again.finished, label_studio.asked["GET /data/upload/3/lost.png"]) == (0, True, asked)


def test_a_scoring_that_fails_for_whatever_reason_is_not_begun_again_by_itself(
    label_studio, tmp_path, monkeypatch, caplog
):
    settings = settings_for(tmp_path / "data", label_studio)
    label_studio.project["sampling"] = SAMPLING
    ask_for_scores(settings, 3)

    def fail(*args, **more):
        raise KeyError("embedding")

    monkeypatch.setattr(jobs, "Settings", lambda: settings)
    monkeypatch.setattr(jobs, "_scorer", functools.cache(lambda: SimpleNamespace(close=lambda: None)))
    monkeypatch.setattr(next_tasks, "score_tasks", fail)
    jobs.score(3)
    assert "tasks of project 3 are not scored until they are asked for again" in caplog.text
    assert "KeyError: 'embedding'" in caplog.text
    assert due(settings) == []


def test_where_label_studio_is_away_the_scoring_is_given_up_with_a_sentence(label_studio, tmp_path, redis_url):
    settings = settings_for(tmp_path / "data", label_studio, redis_url=redis_url)
    ask_for_scores(settings, 3)
    label_studio.broken.add("GET /api/projects")
    said = worker(settings, label_studio, redis_url)
    assert "tasks of project 3 are not scored until they are asked for again: Label Studio answered 500" in said
    assert due(settings) == []
