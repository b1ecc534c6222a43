"""What webhooks lost is fetched from a server that answers as Label Studio's API does."""

import json
import os
import threading
import time
from contextlib import closing
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from typer.testing import CliRunner

from ml_backend.__main__ import app
from ml_backend.app import create_app
from ml_backend.connections import Connection, is_ours, note_serves, note_told
from ml_backend.fetch import make_fetcher
from ml_backend.ingest import open_intake
from ml_backend.jobs import _fetch_lost, _keep_up
from ml_backend.reconcile import backends_of, reconcile, take_in
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.types import Refusal
from tests.ml_backend.conftest import TOKEN
from tests.ml_backend.test_ingest import CONFIG, annotation, deleted, event, held, mask, photo, region, take

PORT = 9090
VERSION = "light-1a2b3c4d+granularity-5e6f7a8b"


class Studio:
    """Projects with tasks and annotations, behind the routes that reconcile asks."""

    def __init__(self):
        self.projects = {3: {"id": 3, "label_config": CONFIG}, 4: {"id": 4, "label_config": CONFIG}}
        self.backends = {3: [{"url": f"http://localhost:{PORT}"}], 4: [{"url": "http://localhost:1234"}]}
        self.tasks: dict[int, list[dict]] = {3: [], 4: []}
        self.asked: list[str] = []
        self.unseen: set[int] = set()  # annotations that listings leave out although they are there
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                url = urlsplit(self.path)
                outer.asked.append(self.path)
                status, body = outer.answer(url.path.rstrip("/"), {k: v[0] for k, v in parse_qs(url.query).items()})
                if self.headers.get("Authorization") != f"Token {TOKEN}":
                    status, body = 401, {}
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = False

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def answer(self, path, query):
        if path == "/data/upload/3/photo.png":
            return 200, photo()
        if path == "/api/projects":
            return 200, {"results": list(self.projects.values()), "next": None}
        if path.startswith("/api/projects/"):
            found = self.projects.get(int(path.rpartition("/")[2]))
            return (200, found) if found else (404, {})
        if path == "/api/ml":
            return 200, self.backends[int(query["project"])]
        if path.startswith("/api/annotations/"):
            number = int(path.rpartition("/")[2])
            there = number in self.unseen or any(
                one["id"] == number for tasks in self.tasks.values() for task in tasks for one in task["annotations"]
            )
            return (200, {"id": number}) if there else (404, {})
        if path == "/api/tasks":
            tasks = list(self.tasks[int(query["project"])])
            if json.loads(query["query"])["ordering"] == ["-tasks:updated_at"]:
                tasks.sort(key=lambda task: task["updated_at"], reverse=True)
            page, size = int(query["page"]), int(query["page_size"])
            some = tasks[(page - 1) * size : page * size]
            if query["fields"] == "task_only":
                some = [{name: task[name] for name in task if name != "annotations"} for task in some]
            return (200, {"tasks": some, "total": len(tasks)}) if some or page == 1 else (404, {})
        return 404, {}

    def add(self, *annotations, project=3, updated_at="2026-11-21T08:00:00Z"):
        number = len(self.tasks[project]) + 1
        task = {"id": number, "data": {"image": "/data/upload/3/photo.png"}, "updated_at": updated_at}
        self.tasks[project].append(task | {"annotations": [one | {"task": number} for one in annotations]})

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def studio():
    server = Studio()
    yield server
    server.close()


@pytest.fixture
def settings(tmp_path, studio):
    return Settings(
        data_dir=tmp_path / "data", label_studio_url=studio.url, label_studio_api_key=TOKEN, port=PORT, device="cpu"
    )


@pytest.fixture
def intake(settings):
    with closing(open_intake(settings)) as intake:
        yield intake


def compare(settings, intake, **how):
    found = reconcile(settings, intake, **how)
    take_in(intake)
    return found.added, found.deleted


def connected(**what):
    """A connection that Label Studio gets through to."""
    return {"url": "https://graco.example.org", "state": "CO", "model_version": VERSION} | what


def test_a_project_that_we_told_our_version_is_ours_behind_a_proxy_too(settings, intake, studio):
    studio.add(annotation(id=1))
    studio.backends[3] = [connected(url="https://other.example.org", model_version="yolo-8"), connected()]
    assert compare(settings, intake) == (0, 0), "nobody asked us about it"
    with closing(Service(settings.model_copy(update={"auth": "off"}))) as service:
        setup = create_app(service).test_client().post("/setup", json={"project": "3.1795250578"})
    studio.backends[3][1]["model_version"] = setup.json["model_version"]
    assert [one.url for one in backends_of(make_fetcher(settings), settings, 3)] == ["https://graco.example.org"]
    assert compare(settings, intake) == (1, 0)


@pytest.fixture
def ours(settings):
    return lambda project, **what: is_ours(settings, project, msgspec.convert(connected(**what), Connection))


def test_another_backend_on_our_port_is_not_us_and_we_are_found_while_we_are_away(settings, ours):
    here = f"http://elsewhere:{PORT}"
    note_told(settings, 3, VERSION)
    assert ours(3)
    assert ours(3, model_version=f"{VERSION.partition('+')[0]}+project-3-v0001-5e6f7a8b"), "another adapter of the base"
    assert ours(3, state="DI")
    assert not ours(3, url=here, model_version="yolo-8")
    assert not ours(4, url=here), "the same version, told by a backend of another team"
    assert not ours(4, url=here, state="DI", model_version="yolo-8")
    assert not ours(4, state="DI"), "another team's, which is away just now"
    for none in (None, ""):
        assert not ours(4, url=here, model_version=none), "it got through to another: we would have heard it"
        assert ours(4, url=here, state="DI", model_version=none), "it never got through"
        assert not ours(4, state="DI", model_version=none)
        assert ours(3, model_version=none), "auto_update=false: what we told is not kept there"
        assert ours(3, url=here, state="ER", model_version=none)


def test_a_project_that_was_moved_to_another_backend_of_the_same_base_is_ours_for_a_day(settings, ours):
    note_told(settings, 3, VERSION)
    (file,) = (settings.shared / "told").glob("*.txt")
    earlier_s = time.time() - 2 * 86400
    os.utime(file, (earlier_s, earlier_s))
    assert not ours(3), "Label Studio has just asked another"
    assert not ours(3, model_version="")
    assert ours(3, state="DI"), "it asked nobody: we are away"
    note_told(settings, 3, VERSION)
    assert ours(3), "asked again, for the same version"


def test_before_we_have_told_any_project_the_version_of_our_base_is_enough_where_nobody_gets_through(settings, ours):
    assert not ours(3, state="DI"), "not even we know our version"
    with closing(Service(settings.model_copy(update={"auth": "off"}))) as service:
        create_app(service)
        base = service.version(None).partition("+")[0]
    assert ours(3, state="DI", model_version=f"{base}+project-3-v0001-5e6f7a8b")
    assert ours(3, state="ER", model_version=base)
    assert not ours(3, state="DI", model_version="yolo-8")
    assert not ours(3, model_version=base), "it got through to another"
    note_serves(settings, VERSION)
    assert ours(3, state="DI"), "the web process started anew, with other weights"
    note_told(settings, 4, VERSION)
    assert not ours(3, state="DI"), "Label Studio finds us: this one is another's"


def test_a_worker_that_finds_no_project_of_its_own_says_so_once_and_looks_again(settings, studio, monkeypatch, caplog):
    studio.backends[3] = [connected(model_version="yolo-8")]
    told = settings.model_copy(update={"redis_url": "unix:///nowhere", "reconcile_minutes": 1e-9})
    monkeypatch.setattr("ml_backend.jobs._look_after", lambda *_, **__: None)
    said = []
    stop = SimpleNamespace(wait=lambda _: said.append(caplog.text.count("no project of Label Studio")) or len(said) > 3)
    _keep_up(told, stop)
    assert said == [0, 1, 1, 1], "at first the web process may still be starting"
    assert sum(path.startswith("/api/ml?project=3") for path in studio.asked) == 4
    assert "connect --project ID" in caplog.text


def test_a_project_that_a_look_missed_is_looked_at_whole_when_it_is_found(settings, intake, studio, monkeypatch):
    studio.add(annotation(id=1))
    studio.add(annotation(id=2), project=4)
    told = settings.model_copy(update={"redis_url": "unix:///nowhere", "reconcile_minutes": 1e-9})
    monkeypatch.setattr("ml_backend.jobs._look_after", lambda *_, **__: None)
    found = []

    def wait(_):
        found.append(intake.inbox.counts()["undone"])
        studio.backends[4] = studio.backends[3]  # Label Studio reaches us for this one, too
        return len(found) == 3

    _keep_up(told, SimpleNamespace(wait=wait))
    assert found == [1, 2, 2]
    orders = [path.rpartition("query=")[2] for path in studio.asked if path.startswith("/api/tasks?project=4")]
    assert ["updated_at" in order for order in orders] == [False, True], "whole, then what changed"


def test_a_change_of_classes_that_no_webhook_brought_is_known_afterwards(settings, intake, studio):
    studio.add(annotation(id=1))
    compare(settings, intake)
    assert intake.corrections.strays("3") == {}
    studio.projects[3] |= {"label_config": CONFIG.replace("Object", "Thing"), "updated_at": "2126-01-01T00:00:00Z"}
    compare(settings, intake)
    assert intake.corrections.strays("3") == {"3": {"Object": 1}}


def test_annotations_that_no_webhook_brought_are_taken_in(settings, intake, studio):
    for number in range(1, 121):
        studio.add(annotation(id=number))
    studio.add(annotation(id=500), project=4)
    assert compare(settings, intake) == (120, 0)
    assert {number for number, _ in held(intake)} == set(range(1, 121))
    assert held(intake, "4") == {}, "that project is not connected to us"
    assert compare(settings, intake) == (0, 0)
    assert compare(settings, intake, project=4) == (1, 0), "unless someone asks for it"


def test_a_third_of_the_webhooks_dropped_leaves_the_same_ledger_in_the_end(settings, intake, studio):
    for number in range(1, 31):
        studio.add(annotation(region(mask(right=30)), id=number, minute=2, completed_by={"id": 2, "email": "a@b"}))
        if number % 3:
            take(intake, event(annotation(id=number)))
        if number % 4:
            take(intake, event(annotation(region(mask(right=30)), id=number, minute=2), action="ANNOTATION_UPDATED"))
    take(intake, event(annotation(id=77)), deleted(78))
    studio.add(annotation(id=79, was_cancelled=True))
    assert compare(settings, intake)[1] == 1
    assert held(intake) == {(number, "r1"): mask(right=30).sum() for number in range(1, 31)}
    assert {c.annotator for c in intake.corrections.corrections("3")} == {2}


def test_only_what_label_studio_says_is_not_there_is_deleted(settings, intake, studio):
    for number in (1, 2, 3):
        take(intake, event(annotation(id=number)))
    studio.add(annotation(id=1))
    studio.unseen = {2}
    assert compare(settings, intake) == (0, 1)
    assert set(held(intake)) == {(1, "r1"), (2, "r1")}


@pytest.mark.parametrize("trouble", ["no annotations", "fewer tasks"])
def test_nothing_is_deleted_after_an_incomplete_listing(settings, intake, studio, monkeypatch, trouble):
    take(intake, event(annotation(id=1)))
    studio.add(annotation(id=2))
    whole = studio.answer

    def partial(path, query):
        status, body = whole(path, query)
        if path == "/api/tasks":
            body = body | {"total": 2} if trouble == "fewer tasks" else {"tasks": [{"id": 1, "data": {}}], "total": 1}
        return status, body

    monkeypatch.setattr(studio, "answer", partial)
    compare(settings, intake)
    assert (1, "r1") in held(intake)


def test_between_full_looks_only_tasks_that_changed_are_asked_for(settings, intake, studio):
    now = datetime.now(UTC).isoformat()
    for number in range(1, 201):
        studio.add(annotation(id=number), updated_at=now if number > 190 else "2026-11-21T08:00:00Z")
    take(intake, event(annotation(id=999)))
    studio.asked.clear()
    assert compare(settings, intake, since_s={3: time.time() - 60}) == (64, 0), "one page"
    assert {number for number, _ in held(intake)} >= set(range(191, 201)) | {999}
    assert sum(path.startswith("/api/tasks") for path in studio.asked) == 1


def test_a_page_that_is_too_large_is_halved_and_a_task_that_is_too_large_alone_is_left_out_by_name(
    settings, intake, studio, monkeypatch, caplog
):
    for number in range(1, 101):
        studio.add(annotation(id=number))
    large = studio.tasks[3][69]
    large["annotations"][0]["result"] *= 60
    take(intake, event(annotation(id=999)))
    monkeypatch.setattr("ml_backend.fetch._MAX_API_ANSWER", len(json.dumps(studio.tasks[3][:40])))
    assert compare(settings, intake) == (99, 0)
    assert {number for number, _ in held(intake)} == set(range(1, 101)) - {70} | {999}, "nothing is deleted"
    assert "task 70 of project 3 is not compared" in caplog.text
    assert "GRACO_IMAGE_MAX_MB" not in caplog.text
    pages = [parse_qs(urlsplit(path).query) for path in studio.asked if path.startswith("/api/tasks")]
    sizes = [int(page["page_size"][0]) for page in pages]
    assert sizes[:3] == [64, 32, 32]
    assert len(pages) < 30, "pages grow again behind it"


def test_what_failed_stays_failed_until_someone_asks(settings, intake, studio, monkeypatch):
    studio.add(annotation(id=1) | {"task": 1})
    studio.tasks[3][0]["data"]["image"] = "/data/upload/3/gone.png"
    for _ in range(4):
        reconcile(settings, intake)
        take_in(intake)
    assert intake.inbox.counts() == {"undone": 0, "done": 0, "failed": 1}


def test_a_token_that_is_not_accepted_is_a_sentence(settings, intake):
    with pytest.raises(Refusal, match="401 to a legacy token"):
        reconcile(
            settings.model_copy(update={"label_studio_api_key": type(settings.label_studio_api_key)("f" * 40)}), intake
        )


def test_the_worker_fetches_what_was_lost_and_queues_it(settings, intake, studio, redis_url):
    studio.add(annotation(id=1))
    _fetch_lost(settings.model_copy(update={"redis_url": redis_url}), {})
    assert intake.inbox.counts()["undone"] == 1


@pytest.fixture
def environment(settings, studio, monkeypatch):
    monkeypatch.setattr("ml_backend.logs.configure", lambda *args, **kwargs: None)
    for name, value in {
        **{"GRACO_DATA_DIR": str(settings.data_dir), "LABEL_STUDIO_URL": studio.url, "LABEL_STUDIO_API_KEY": TOKEN},
        "GRACO_PORT": str(PORT),
    }.items():
        monkeypatch.setenv(name, value)


def run(*words):
    return CliRunner().invoke(app, list(words))


@pytest.mark.usefixtures("environment")
def test_the_commands_take_in_show_count_and_export(intake, studio, tmp_path):
    studio.add(annotation(id=1))
    studio.add(annotation(region(), region(mask(right=30), id="r2"), id=2))
    done = run("reconcile")
    assert (done.exit_code, done.stdout) == (0, "1 projects: 2 annotations were missing, 0 are gone\n")

    listed = run("corrections", "list", "--project", "3", "--kind", "drawn", "--since", "2026-11-20")
    assert listed.exit_code == 0
    assert all(word in listed.stdout for word in ("2026-11-21 08:01", "r2", "Object", "drawn"))
    assert "no corrections yet" in run("corrections", "list", "--kind", "accepted").stdout
    shown = run("corrections", "show", "2", "--project", "3")
    assert "40 x 30 pixels" in shown.stdout
    assert run("corrections", "show", "9", "--project", "3").exit_code == 1
    counted = run("corrections", "counts").stdout
    assert "3 corrections in 2 annotations on 1 images" in counted
    assert "2 done in the last week" in counted
    exported = run("corrections", "export", str(tmp_path / "out"))
    assert "3 corrections are in" in exported.stdout
    assert len(json.loads((tmp_path / "out" / "annotations.json").read_text())["annotations"]) == 3
    assert run("corrections", "export", str(tmp_path / "out")).exit_code == 1


@pytest.mark.usefixtures("environment")
def test_reconcile_tries_again_what_was_given_up_when_told_to(intake, studio):
    key = intake.inbox.add(json.dumps(event(annotation(id=1))).encode(), "ANNOTATION_CREATED")
    for _ in range(3):
        intake.inbox.failed(key, "the image was away")
    studio.add()
    done = run("reconcile", "--project", "3")
    assert "1 were given up" in done.stderr
    assert "the image was away" in done.stderr
    assert held(intake) == {}
    assert run("reconcile", "--project", "3", "--retry").exit_code == 0
    assert set(held(intake)) == {(1, "r1")}
