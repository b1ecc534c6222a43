"""What the connecting command says when Label Studio declines; how it goes when all is well, tests/e2e shows."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from ml_backend.__main__ import app
from ml_backend.connect import SSRF, Wish, connect, default_url
from ml_backend.label_config import make_config
from ml_backend.settings import Settings
from model.types import Refusal
from tests.ml_backend.conftest import TOKEN

URL = "http://127.0.0.1:9090"
LABELS = make_config(["Car"])


class Studio:
    """Label Studio's API as far as connecting goes: a project, no backend, and what it says to one that is added."""

    def __init__(self):
        self.project = {"id": 7, "title": "Cars", "label_config": LABELS, "total_annotations_number": 0}
        self.connections, self.hooks = [], []
        self.said, self.changed = (201, {}), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                status, answer = outer.answer(self.command, urlsplit(self.path).path.rstrip("/"), body)
                if self.headers.get("Authorization") != f"Token {TOKEN}":
                    status, answer = 401, {"detail": "Invalid token."}
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PATCH = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,)).start()

    def answer(self, method, path, body):
        if method != "GET":
            self.changed.append((method, path, body))
        match method, path:
            case (("GET" | "PATCH"), "/api/projects/7"):
                self.project |= body or {}
                return 200, self.project
            case "GET", "/api/projects":
                return 200, {"results": [self.project], "next": None}
            case "GET", "/api/ml":
                return 200, self.connections
            case "GET", "/api/webhooks":
                return 200, self.hooks
            case "POST", "/api/ml":
                if self.said[0] == 201:
                    self.connections.append(body | {"id": 1, "state": "CO", "model_version": "light-1a2b3c4d"})
                return self.said
            case "POST", "/api/webhooks":
                self.hooks.append(body | {"id": 1})
                return 201, self.hooks[-1]
        return 404, {"detail": "Not found."}


@pytest.fixture
def studio():
    server = Studio()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def settings(studio, tmp_path):
    def make(**chosen):
        return Settings(
            **{"data_dir": tmp_path, "label_studio_url": studio.url, "label_studio_api_key": TOKEN} | chosen
        )

    return make


def run(settings, **wish):
    return list(connect(settings, Wish(**{"url": URL, "project": 7} | wish)))


def test_a_project_gets_the_password_the_webhooks_secret_and_the_version_that_serves(studio, settings, tmp_path):
    lines = run(settings())
    made = json.loads((tmp_path / "secrets.json").read_text())
    (connection,), (hook,) = studio.connections, studio.hooks
    assert (connection["basic_auth_user"], connection["basic_auth_pass"]) == ("label-studio", made["password"])
    assert connection["is_interactive"] is True
    assert hook["headers"] == {"X-Graco-Secret": made["webhook_secret"]}
    assert studio.project["model_version"] == connection["title"]
    assert lines[-1] == f"reached: Label Studio gets light-1a2b3c4d from {URL}"
    assert not any(secret in "".join(lines) for secret in made.values())
    before = len(studio.changed)
    run(settings())
    assert len(studio.changed) == before


def test_without_auth_no_secret_is_made_or_sent(studio, settings, tmp_path):
    run(settings(auth="off"))
    assert studio.connections[0]["auth_method"] == "NONE"
    assert "basic_auth_pass" not in studio.connections[0]
    assert studio.hooks[0]["headers"] == {}
    assert not (tmp_path / "secrets.json").exists()


def test_a_project_that_shows_no_predictions_or_another_models_is_left_so(studio, settings):
    studio.project |= {"show_collab_predictions": False, "model_version": ""}
    run(settings())
    assert (studio.project["show_collab_predictions"], studio.project["model_version"]) == (False, "")
    studio.project |= {"show_collab_predictions": True, "model_version": "imported"}
    run(settings())
    assert studio.project["model_version"] == "imported"
    studio.project |= {"sampling": "Uncertainty sampling", "model_version": "light-1a2b3c4d+granularity-5e6f7a8b"}
    run(settings())
    assert studio.project["model_version"] == "light-1a2b3c4d+granularity-5e6f7a8b"
    studio.project |= {"sampling": "Sequential sampling"}
    run(settings())
    assert studio.project["model_version"] == "GraCo", "a version of ours would stay although another serves"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ((403, {"detail": "URL resolves to a reserved network address (block: 127.0.0.0/8)"}), SSRF),
        (
            (400, {"validation_errors": {"non_field_errors": ["Can't connect to ML backend, health check failed."]}}),
            "--url http://HOST:PORT",
        ),
        (
            (400, {"validation_errors": {"non_field_errors": ["Reason: 401 Client Error: UNAUTHORIZED for url: ..."]}}),
            "GRACO_DATA_DIR",
        ),
        ((400, {"validation_errors": {"non_field_errors": ["Reason: 429 Client Error: TOO MANY"]}}), "in a minute"),
        ((400, {"validation_errors": {"url": ["<b>odd</b> thing"]}}), "odd thing"),
        ((500, {}), "no reason"),
    ],
    ids=["reserved", "not reached", "other secrets", "locked", "anything else", "broken"],
)
def test_what_label_studio_declines_is_a_sentence_with_the_remedy(studio, settings, said, words):
    studio.said = said
    with pytest.raises(Refusal) as caught:
        run(settings(password="canary-password"))
    assert words in str(caught.value)
    assert "canary" not in str(caught.value)


def test_a_connection_that_stops_working_is_told(studio, settings):
    studio.connections.append({"id": 1, "url": f"{URL}/", "title": "GraCo", "is_interactive": True, "state": "CO"})
    with pytest.raises(Refusal, match="404"):  # it has no password yet, and may not be changed here
        run(settings())
    studio.connections[0] |= {"auth_method": "BASIC_AUTH", "basic_auth_user": "label-studio"}
    assert any("is there" in line for line in run(settings()))


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"project": 8}, "no such project"),
        ({"project": None, "create": "Bikes"}, "needs labels"),
        ({"url": "127.0.0.1:9090"}, "with its scheme"),
        ({"label_config": "<View><Image name='i' value='$i'/></View>"}, "not one to click with"),
    ],
)
def test_a_wish_that_cannot_be_met_changes_nothing(studio, settings, wish, words):
    with pytest.raises(Refusal, match=words):
        run(settings(), **wish)
    assert not studio.changed


def test_a_wrong_token_is_told(settings):
    with pytest.raises(Refusal, match="LABEL_STUDIO_API_KEY"):
        run(settings(label_studio_api_key=TOKEN[::-1]))


def test_the_address_is_taken_for_granted_on_this_machine_alone():
    assert default_url(Settings(port=9191, label_studio_url="http://localhost:8080")) == "http://127.0.0.1:9191"
    with pytest.raises(Refusal, match="--url"):
        default_url(Settings(label_studio_url="http://label-studio:8080"))


def test_the_command_wants_one_project_and_prints_what_it_did(studio, monkeypatch, tmp_path):
    monkeypatch.setattr("ml_backend.logs.configure", lambda *args, **kwargs: None)
    monkeypatch.setenv("LABEL_STUDIO_URL", studio.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", TOKEN)
    monkeypatch.setenv("GRACO_DATA_DIR", str(tmp_path))
    assert CliRunner().invoke(app, ["connect"]).exit_code == 2
    assert CliRunner().invoke(app, ["connect", "--project", "7", "--create", "x"]).exit_code == 2
    done = CliRunner().invoke(app, ["connect", "--project", "7", "--classes", "Car, Wheel"])
    assert done.exit_code == 0, done.output
    assert studio.project["label_config"] == make_config(["Car", "Wheel"])
    assert "reached:" in done.stdout
    refused = CliRunner().invoke(app, ["connect", "--project", "8"])
    assert refused.exit_code == 1
    assert "no such project" in refused.stderr
