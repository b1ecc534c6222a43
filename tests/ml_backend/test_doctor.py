import base64
import contextlib
import dataclasses
import io
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import redis
from PIL import Image
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer

from ml_backend import doctor, families
from ml_backend.connections import note_told
from ml_backend.fetch import Fetcher
from ml_backend.label_config import make_config
from ml_backend.service import serving_version
from ml_backend.settings import Settings
from ml_backend.supervisor import redis_server
from ml_backend.trainings import TRAINING
from model.adapter import read_adapter, write_adapter
from model.segmenter import digest_of, load_segmenter
from model.types import Refusal
from tests.conftest import missing

TOKEN = "0123456789abcdef0123456789abcdef01234567"
VERSION = serving_version(Settings())
PORT = 9  # nobody answers there


def jwt(**claims):
    def part(value):
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256'})}.{part(claims)}.c2lnbmF0dXJl"


PERSONAL = jwt(token_type="refresh", exp=8_000_000_000)
ACCESS = jwt(token_type="access", exp=8_000_000_000, iat=7_999_999_700)


def picture():
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "green").save(file, "PNG")
    return file.getvalue()


class Server:
    """Answers GET and POST by `routes`: path -> a value sent as JSON, bytes, a status, or (status, headers)."""

    def __init__(self):
        self.routes, self.accepted, self.exchanged = {}, None, {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = urlsplit(self.path).path
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = outer.routes.get(path, 404)
                open_to_all = path in ("/api/version", "/health", "/api/token/refresh")
                if outer.accepted and not open_to_all and self.headers.get("Authorization") != outer.accepted:
                    answer = 401
                if path == "/api/token/refresh" and outer.exchanged:
                    access = outer.exchanged.get(json.loads(body)["refresh"])
                    answer = {"access": access} if access else 401
                with contextlib.suppress(OSError):
                    self.answer(answer)

            do_POST = do_GET

            def answer(self, answer):
                status, headers, body = 200, {}, answer
                if callable(answer):
                    return answer()
                if isinstance(answer, int):
                    status, body = answer, b""
                elif isinstance(answer, tuple):
                    (status, headers), body = answer, {"release": "1.23.2"}
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response_only(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = False

            def handle_error(self, request, client_address):
                pass

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def servers():
    started = []

    def start():
        started.append(Server())
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def backend(servers):
    """What runs on our port."""
    server = servers()
    server.routes["/health"] = {"status": "UP", "model_version": VERSION, "model_loaded": True}
    return server


@pytest.fixture
def studio(servers, backend):
    """A Label Studio in which nothing is to be mended: one project that has this backend."""
    server = servers()
    server.accepted = f"Token {TOKEN}"
    server.connection = {
        **{"url": backend.url, "state": "CO", "title": "GraCo", "is_interactive": True, "error_message": None},
        "model_version": VERSION,
    }
    server.webhook = {
        **{"url": f"{backend.url}/webhook", "is_active": True, "send_payload": True},
        **{"send_for_all_actions": True, "actions": []},
    }
    server.project = {"id": 7, "title": "Cars", "label_config": make_config(["Car"]), "model_version": None}
    server.task = {"id": 4, "data": {"image": "/data/upload/7/a.png"}}
    server.routes |= {
        "/api/version": {"release": "1.23.2"},
        "/api/current-user/whoami": {"email": "ann@example.com"},
        "/api/projects": {"results": [server.project]},
        "/api/ml": [server.connection],
        "/api/webhooks": [server.webhook],
        "/api/tasks": {"tasks": [server.task]},
        "/data/upload/7/a.png": picture(),
    }
    return server


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    """Loading the model takes seconds; the tests of the weights do it for real."""
    monkeypatch.setattr(
        families, "load_segmenter", lambda *_, **__: SimpleNamespace(version=VERSION, adapter="an-adapter")
    )
    proxies = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")
    for name in ("LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY", "GRACO_REDIS_URL", *proxies):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def settings(tmp_path, studio, backend):
    def make(**given):
        base = {"data_dir": tmp_path / "data", "port": backend.port, "label_studio_url": studio.url}
        made = Settings(**base | {"label_studio_api_key": TOKEN} | given)
        note_told(made, 7, VERSION)
        return made

    return make


def check(settings, name):
    """The one check of this name (the worst of them), with everything it says in one string."""
    found = [c for c in doctor.examine(settings) if c.name == name]
    assert found, name
    return min(found, key=lambda c: ["error", "warning", "skipped", "ok"].index(c.status))


def test_where_all_is_well_nothing_but_the_idle_redis_is_mentioned(settings, capsys):
    checks = doctor.examine(settings())
    assert {c.name: c.status for c in checks if c.status != "ok"} == {"Redis": "warning"}
    assert doctor.show(checks)
    shown = capsys.readouterr().out
    assert "64 x 48 pixels" in shown
    assert "ann@example.com" in shown
    assert TOKEN not in shown


def test_a_failed_check_makes_the_whole_fail(settings, studio, capsys):
    studio.routes["/api/webhooks"] = []
    assert not doctor.show(doctor.examine(settings()))
    assert "1 failed" in capsys.readouterr().out


def test_checks_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        doctor.Check("a", "ok", "b").name = "c"


# --- this machine ---


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "HTTP_PROXY", "https_proxy"])
def test_a_forward_proxy_which_is_passed_over_is_told_without_its_password(settings, monkeypatch, name):
    assert "forward proxy" not in {c.name for c in doctor.examine(settings(), quickly=True)}
    monkeypatch.setenv(name, "http://ann:s3cret@proxy.example:3128")
    found = check(settings(), "forward proxy")
    assert found.status == "warning"
    assert f"{name.upper()} is set, which the backend passes over" in found.seen
    assert "pre-signed URLs" in found.remedy
    assert "s3cret" not in found.seen + found.remedy


def test_a_data_directory_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("")
    found = check(settings(data_dir=tmp_path / "file"), "data directory")
    assert found.status == "error"
    assert "GRACO_DATA_DIR" in found.remedy


@pytest.mark.parametrize(("free_mb", "status"), [(1000, "warning"), (50, "error")])
def test_a_disk_nearly_full(settings, monkeypatch, free_mb, status):
    usage = namedtuple("usage", "total used free")(10**12, 0, free_mb * 2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    found = check(settings(), "data directory")
    assert found.status == status
    assert "GRACO_EMBEDDING_DISK_MB" in found.remedy


def weights(tmp_path, monkeypatch, data, card=None):
    file = tmp_path / "light.safetensors"
    file.write_bytes(data)
    file.with_suffix(".md").write_text(digest_of(data) if card is None else card)
    monkeypatch.setattr(families, "BUNDLED", file)
    monkeypatch.setattr(families, "load_segmenter", load_segmenter)
    return next(doctor._weights(Settings()))


def test_the_bundled_weights_are_well(monkeypatch):
    monkeypatch.setattr(families, "load_segmenter", load_segmenter)
    assert next(doctor._weights(Settings())).status == "ok"


def test_missing_weights(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "BUNDLED", tmp_path / "light.safetensors")
    found = check(settings(), "weights")
    assert found.status == "error"
    assert "git checkout -- model/weights/light.safetensors" in found.remedy


def test_weights_of_another_digest_or_cut_short(tmp_path, monkeypatch):
    whole = families.BUNDLED.read_bytes()
    for data, card, word in [(whole[:-1], "2b565ddf", "model card"), (whole[:5000], None, "damaged")]:
        found = weights(tmp_path, monkeypatch, data, card)
        assert found.status == "error"
        assert word in found.seen
        assert "git checkout" in found.remedy


def adapter(path, monkeypatch, choice=None):
    """The doctor's check of an adapter file, in the bundled one's place or as the operator's own."""
    monkeypatch.setattr(families, "load_segmenter", load_segmenter)
    if choice is None:
        monkeypatch.setattr(doctor, "BUNDLED_ADAPTER", path)
        monkeypatch.setattr(families, "BUNDLED_ADAPTER", path)
    return next(doctor._adapter(Settings(adapter=choice or "bundled")))


def test_the_bundled_adapter_is_well(monkeypatch):
    found = adapter(families.BUNDLED_ADAPTER, monkeypatch)
    assert found.status == "ok"
    assert "light-granularity-" in found.seen


def test_a_damaged_adapter_has_a_remedy_that_fits_whose_it_is(tmp_path, monkeypatch):
    path = tmp_path / "light-granularity.safetensors"
    path.write_bytes(families.BUNDLED_ADAPTER.read_bytes()[:5000])
    own = adapter(path, monkeypatch, choice=path)
    assert (own.status, "unset GRACO_ADAPTER" in own.remedy) == ("error", True)
    bundled = adapter(path, monkeypatch)
    assert (bundled.status, "git checkout -- model/weights/" in bundled.remedy) == ("error", True)
    assert "cannot be read" in bundled.seen


def test_an_adapter_of_another_base_says_which(tmp_path, monkeypatch):
    file = read_adapter(families.BUNDLED_ADAPTER)
    path = tmp_path / "other.safetensors"
    write_adapter(path, card=file.card | {"base": "0123456789abcdef"}, plain=file.plain, lora=file.lora)
    found = adapter(path, monkeypatch, choice=path)
    assert found.status == "error"
    assert "base 0123456789ab" in found.seen


def test_without_an_adapter_nothing_is_wrong_and_it_says_what_is_missing(settings):
    assert check(settings(adapter="none"), "adapter").status == "ok"
    assert check(settings(adapter="none"), "phrases").status == "skipped"


def test_a_phrase_encoder_that_is_not_installed_has_the_command_for_it(settings, monkeypatch):
    def absent():
        raise Refusal("phrases need the package x==1, which is not installed; install it: pip install --no-deps x==1")

    monkeypatch.setattr(doctor, "load_phrase_encoder", absent)
    found = check(settings(), "phrases")
    assert (found.status, found.remedy) == ("error", "install it: pip install --no-deps x==1")


def test_cuda_asked_for_where_there_is_none(settings, monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    found = check(settings(device="cuda"), "encoder")
    assert found.status == "error"
    assert "GRACO_DEVICE=auto" in found.remedy


@pytest.mark.parametrize(("choice", "status"), [("auto", "warning"), ("fast", "error"), ("exact", "ok")])
def test_an_openvino_that_cannot_be_imported(settings, monkeypatch, choice, status):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = check(settings(encoder=choice), "encoder")
    assert found.status == status
    assert "GRACO_ENCODER" in found.remedy


# --- Redis ---


@pytest.fixture(scope="module")
def redis_url():
    server = redis_server()
    if server is None:
        missing("no Redis server is installed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "redis.sock"
        command = [server, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            for _ in range(100):
                if path.exists():
                    break
                time.sleep(0.05)
            yield f"unix://{path}"
            process.terminate()


@pytest.fixture
def queue(redis_url):
    with contextlib.closing(redis.Redis.from_url(redis_url)) as connection:
        connection.flushall()
        yield Queue("encode", connection=connection, serializer=JSONSerializer)
        connection.flushall()


@pytest.fixture
def working(queue):
    worker = SimpleWorker([queue], connection=queue.connection, serializer=JSONSerializer)
    worker.register_birth()
    yield worker
    worker.register_death()


def refuse():
    raise Refusal("task 4 has no image; import it again")


def break_down():
    raise RuntimeError("secret-of-somebody")


def test_redis_and_worker_at_work(settings, redis_url, working):
    assert check(settings(redis_url=redis_url), "Redis").status == "ok"
    assert check(settings(redis_url=redis_url), "encode worker").status == "ok"


def test_a_redis_without_a_worker(settings, redis_url, queue):
    found = check(settings(redis_url=redis_url), "encode worker")
    assert found.status == "warning"
    assert "python -m ml_backend worker" in found.remedy


def test_a_trainer_that_nobody_has_heard_of_is_told_with_the_command_that_starts_one(settings, redis_url, working):
    found = check(settings(redis_url=redis_url), "trainer")
    assert found.status == "warning"
    assert "python -m ml_backend trainer" in found.remedy
    queue = Queue(TRAINING, connection=working.connection, serializer=JSONSerializer)
    trainer = SimpleWorker([queue], connection=queue.connection, serializer=JSONSerializer)
    trainer.register_birth()
    assert check(settings(redis_url=redis_url), "trainer").status == "ok"


def test_where_the_ledger_is_elsewhere_the_trainer_has_to_be_started_there(settings, redis_url, working, tmp_path):
    found = check(settings(redis_url=redis_url, shared_dir=tmp_path, ledger="elsewhere"), "trainer")
    assert found.remedy == "on the machine that keeps the ledger: python -m ml_backend trainer"


def test_a_redis_that_cannot_be_looked_into_is_not_taken_for_one_with_a_trainer(settings, redis_url, working):
    working.connection.set(f"rq:queue:{TRAINING}", "no queue")
    found = check(settings(redis_url=redis_url), "trainer")
    assert found.status == "warning"
    assert "cannot be told" in found.seen


def test_a_queue_that_stands_still(settings, redis_url, queue, working):
    job = queue.enqueue_call(refuse)
    job.enqueued_at = datetime.now(UTC) - timedelta(hours=1)
    job.save()
    found = check(settings(redis_url=redis_url), "encode worker")
    assert found.status == "warning"
    assert "60 min" in found.seen
    assert "python -m ml_backend worker" in found.remedy


@pytest.mark.parametrize(("job", "why"), [(refuse, "task 4 has no image"), (break_down, "RuntimeError")])
def test_failed_jobs_say_why_and_how_to_run_them_again(settings, redis_url, queue, working, job, why):
    queue.enqueue_call(job, failure_ttl=600)
    burst = SimpleWorker([queue], connection=queue.connection, serializer=JSONSerializer)
    burst.log.disabled = True
    burst.work(burst=True, logging_level="CRITICAL")
    found = check(settings(redis_url=redis_url), "failed jobs")
    assert found.status == "warning"
    assert why in found.seen
    assert "secret-of-somebody" not in found.seen
    assert "rq requeue --all --queue encode" in found.remedy


def test_a_configured_redis_that_is_not_there(settings):
    found = check(settings(redis_url=f"redis://ann:hunter2@127.0.0.1:{PORT}/0"), "Redis")
    assert found.status == "error"
    assert "GRACO_REDIS_URL" in found.remedy
    assert "hunter2" not in found.seen


@pytest.mark.parametrize("url", ["redis://{0}", "redis://nowhere:x", "unix:///nowhere.sock"])
def test_a_configured_redis_that_is_none(settings, backend, url):
    found = check(settings(redis_url=url.format(f"127.0.0.1:{backend.port}")), "Redis")
    assert found.status == "error"
    assert "GRACO_REDIS_URL" in found.remedy


def test_the_bundled_redis_does_not_run_or_is_not_there(settings, monkeypatch):
    assert "make run" in check(settings(), "Redis").remedy
    monkeypatch.setattr(doctor, "redis_server", lambda: None)
    found = check(settings(), "Redis")
    assert found.status == "warning"
    assert "apt-get install redis-server" in found.remedy


# --- this backend ---


def test_a_backend_that_does_not_run(settings):
    found = check(settings(port=PORT), "this backend")
    assert found.status == "warning"
    assert f"GRACO_PORT={PORT} make run" in found.remedy


@pytest.mark.parametrize("answer", [b"<html>", 404, {"status": "UP"}, []])
def test_something_else_on_our_port(settings, backend, answer):
    backend.routes["/health"] = answer
    found = check(settings(), "this backend")
    assert found.status == "error"
    assert f"GRACO_PORT={backend.port + 1}" in found.remedy


def test_a_backend_whose_model_did_not_load_or_is_another(settings, backend):
    backend.routes["/health"] = {"status": "FAILED", "model_version": VERSION, "error": "weights are damaged"}
    found = check(settings(), "this backend")
    assert (found.status, "weights are damaged" in found.seen, "make run" in found.remedy) == ("error", True, True)
    backend.routes["/health"] = {"status": "UP", "model_version": "light-00000000"}
    found = check(settings(), "this backend")
    assert (found.status, "light-00000000" in found.seen, "make run" in found.remedy) == ("warning", True, True)


def test_the_address_to_type_depends_on_where_label_studio_is(settings):
    near = check(settings(), "its address")
    assert near.status == "ok"
    assert "http://localhost:" in near.seen
    assert "host.docker.internal" in near.remedy
    far = check(settings(label_studio_url="http://label-studio.invalid:8080"), "its address")
    assert far.status == "warning"
    assert "GRACO_HOST=0.0.0.0" in far.remedy
    assert "host.docker.internal" in far.remedy
    everywhere = check(settings(host="0.0.0.0"), "its address")
    assert everywhere.status == "ok"
    assert socket.gethostname() in everywhere.seen
    assert "localhost is the container itself" in everywhere.seen


# --- Label Studio and the token ---


def test_label_studio_not_configured(settings):
    checks = {c.name: c for c in doctor.examine(settings(label_studio_url=None))}
    assert checks["Label Studio"].status == "warning"
    assert "LABEL_STUDIO_URL=" in checks["Label Studio"].remedy
    assert checks["token"].status == checks["projects"].status == "skipped"


@pytest.mark.parametrize("url", [f"http://127.0.0.1:{PORT}", "http://nowhere.invalid", "http://[::", "http://a:b@c"])
def test_a_label_studio_that_cannot_be_reached(settings, url):
    checks = {c.name: c for c in doctor.examine(settings(label_studio_url=url))}
    assert checks["Label Studio"].status == "error"
    assert checks["Label Studio"].remedy
    assert checks["token"].status == checks["projects"].status == "skipped"


def test_a_label_studio_that_does_not_answer_in_time(settings, studio, monkeypatch):
    monkeypatch.setitem(Fetcher.ask.__kwdefaults__, "timeout_s", 0.2)
    studio.routes["/api/version"] = lambda: time.sleep(0.5)
    found = check(settings(), "Label Studio")
    assert found.status == "error"
    assert "0.2 s" in found.seen


@pytest.mark.parametrize("answer", [b"<html>nginx</html>", {}, [], 404, 502])
def test_something_that_is_not_label_studio(settings, studio, answer):
    studio.routes["/api/version"] = answer
    found = check(settings(), "Label Studio")
    assert found.status == "error"
    assert ("log" if answer == 502 else "LABEL_STUDIO_URL") in found.remedy


def test_redirects_name_the_address_to_set(settings, studio):
    studio.routes["/api/version"] = 302, {"Location": "/label-studio/api/version?token=s3cret"}
    found = check(settings(), "Label Studio")
    assert found.status == "error"
    assert found.remedy == f"set LABEL_STUDIO_URL={studio.url}/label-studio"
    studio.routes["/api/version"] = 302, {"Location": "https://login.example.com/oauth?state=s3cret"}
    found = check(settings(), "Label Studio")
    assert (found.status, "log in" in found.seen, "s3cret" in found.seen) == ("error", True, False)


def test_a_clock_that_is_off(settings, studio):
    studio.routes["/api/version"] = 200, {"Date": format_datetime(datetime.now(UTC) - timedelta(hours=2))}
    found = check(settings(), "Label Studio")
    assert found.status == "warning"
    assert "behind" in found.seen
    assert "timedatectl" in found.remedy
    studio.routes["/api/version"] = 200, {"Date": "yesterday"}
    assert check(settings(), "Label Studio").status == "ok"


@pytest.mark.parametrize("token", [None, "", "  "])
def test_no_token(settings, token):
    found = check(settings(label_studio_api_key=token), "token")
    assert found.status == "error"
    assert "LABEL_STUDIO_API_KEY" in found.remedy


def test_a_legacy_token_that_is_refused(settings, studio):
    studio.accepted = "Bearer only"
    checks = {c.name: c for c in doctor.examine(settings())}
    assert checks["token"].status == "error"
    assert "API Tokens Settings" in checks["token"].remedy
    assert "personal access token into LABEL_STUDIO_API_KEY" in checks["token"].remedy
    assert checks["projects"].status == "skipped"


def test_a_personal_access_token_is_exchanged(settings, studio):
    studio.accepted, studio.exchanged = f"Bearer {ACCESS}", {PERSONAL: ACCESS}
    checks = doctor.examine(settings(label_studio_api_key=PERSONAL))
    assert not [c for c in checks if c.status == "error"]
    assert "personal access token" in next(c.seen for c in checks if c.name == "token")


def test_a_personal_access_token_that_was_revoked(settings, studio):
    studio.exchanged = {"other": "token"}
    found = check(settings(label_studio_api_key=PERSONAL), "token")
    assert found.status == "error"
    assert "Personal Access Token" in found.remedy


@pytest.mark.parametrize(
    ("token", "word"), [(ACCESS, "300 s"), ("not-a-token", "a kind we do not know"), (f"Token {TOKEN}", "spaces")]
)
def test_a_token_of_the_wrong_kind(settings, token, word):
    found = check(settings(label_studio_api_key=token), "token")
    assert found.status == "error"
    assert word in found.seen
    assert "LABEL_STUDIO_API_KEY" in found.remedy or "copy the token again" in found.remedy


# --- projects ---


@pytest.mark.parametrize("projects", [[], [{"id": 7}]])
def test_no_project_has_this_backend(settings, studio, backend, projects):
    studio.routes |= {"/api/projects": {"results": projects}, "/api/ml": []}
    found = check(settings(), "projects")
    assert found.status == "warning"
    assert backend.url in found.remedy
    assert "LABEL_STUDIO_ML_BLOCK_LOCAL_IP=false" in found.remedy
    assert "LABEL_STUDIO_SSRF_PROTECTION_ENABLED=false" in found.remedy


def test_a_backend_of_others_is_not_ours(settings, studio, backend):
    studio.connection |= {"url": "http://127.0.0.1:9", "model_version": "sam-1"}
    assert check(settings(), "projects").status == "warning"
    studio.connection |= {"url": backend.url}  # on our port of another machine, and well
    assert check(settings(), "projects").status == "warning"
    studio.connection |= {"state": "DI", "model_version": None}  # it never said whose it is
    assert check(settings(), "project 7").status == "error"


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"state": "DI", "error_message": "connection refused"}, "curl http://127.0.0.1:"),
        ({"state": "ER", "error_message": None}, "/health"),
        (
            {"state": "ER", "error_message": "URL resolves to a reserved network address"},
            "LABEL_STUDIO_ML_BLOCK_LOCAL_IP=false and LABEL_STUDIO_SSRF_PROTECTION_ENABLED=false",
        ),
        ({"is_interactive": False}, "Interactive preannotations"),
        (
            {"state": "ER", "error_message": "401 Client Error: UNAUTHORIZED for url: http://x/setup"},
            "python -m ml_backend connect --project 7 --url http://127.0.0.1:",
        ),
    ],
)
def test_a_connection_that_does_not_serve_clicks(settings, studio, change, remedy):
    studio.connection |= change
    found = check(settings(), "project 7")
    assert found.status == "error"
    assert remedy in found.remedy


def test_a_webhook_has_to_carry_the_secret_once_there_is_one(settings, studio):
    known = {"password": "password-of-ls", "webhook_secret": "secret-of-webhooks"}
    assert check(settings(), "project 7 webhook").status == "ok", "this backend was never started"
    for headers, status in [
        ({}, "error"),
        ({"X-Graco-Secret": "secret-of-yesterday"}, "error"),
        ({"x-graco-secret": "secret-of-webhooks"}, "ok"),
        ({"Authorization": "Basic bGFiZWwtc3R1ZGlvOnBhc3N3b3JkLW9mLWxz"}, "ok"),
        ({"Authorization": "Basic bGFiZWwtc3R1ZGlvOnBhc3N3b3JkLW9mLWxz", "X-Graco-Secret": "other"}, "error"),
    ]:
        studio.webhook["headers"] = headers
        found = check(settings(**known), "project 7 webhook")
        assert found.status == status, headers
        assert ("python -m ml_backend connect --project 7" in found.remedy) == (status == "error")
        assert not any(secret in found.seen + found.remedy for secret in known.values())
    assert check(settings(auth="off"), "project 7 webhook").status == "ok"


def test_auth_that_is_off_and_secrets_that_others_can_read_are_warnings(settings, tmp_path):
    off = check(settings(auth="off", host="0.0.0.0"), "auth")
    assert (off.status, "unset GRACO_AUTH" in off.remedy) == ("warning", True)
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "secrets.json").write_text('{"password": "x"}')
    (tmp_path / "data" / "secrets.json").chmod(0o644)
    assert check(settings(), "auth").remedy.startswith("chmod 600 ")
    (tmp_path / "data" / "secrets.json").write_text("{")
    (tmp_path / "data" / "secrets.json").chmod(0o600)
    assert check(settings(), "auth").status == "error"
    (tmp_path / "data" / "secrets.json").write_text('{"password": "x"}')
    assert check(settings(), "auth").seen.endswith("secrets.json")
    given = {"password": "password-of-ls", "admin_password": "password-of-admin"}
    assert check(settings(**given), "auth").seen == "on; Label Studio's user is label-studio"


def test_a_title_in_place_of_the_model_version_is_a_hint(settings, studio):
    studio.project["model_version"] = "GraCo"
    found = check(settings(), "project 7")
    assert found.status == "ok"
    assert f'PATCH /api/projects/7 {{"model_version": "{VERSION}"}}' in found.remedy


def test_a_missing_webhook_names_both_settings_and_the_way_to_register_it(settings, studio):
    studio.routes["/api/webhooks"] = [{"url": "http://elsewhere/webhook"}]
    found = check(settings(), "project 7 webhook")
    assert found.status == "error"
    assert "LABEL_STUDIO_ML_BLOCK_LOCAL_IP=false" in found.remedy
    assert "LABEL_STUDIO_SSRF_PROTECTION_ENABLED=false" in found.remedy
    assert "delete the backend and add it again" in found.remedy


@pytest.mark.parametrize(
    ("change", "status", "remedy"),
    [
        ({"is_active": False}, "error", "Settings > Webhooks"),
        ({"send_payload": False}, "error", "Send payload"),
        ({"send_for_all_actions": False, "actions": ["TASKS_CREATED"]}, "warning", "Send for all actions"),
    ],
)
def test_a_webhook_that_tells_too_little(settings, studio, change, status, remedy):
    studio.webhook |= change
    found = check(settings(), "project 7 webhook")
    assert found.status == status
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("config", "status"),
    [
        ("<View>", "error"),
        (None, "error"),
        ('<View><Image name="image" value="$image"/></View>', "error"),
        (make_config(["Car"]).replace('smartOnly="true"', ""), "warning"),
    ],
)
def test_a_label_config_to_be_mended(settings, studio, config, status):
    studio.project["label_config"] = config
    found = check(settings(), "project 7 labels")
    assert found.status == status
    assert "python -m ml_backend label-config" in found.remedy


def test_an_image_on_a_private_host_is_refused_without_its_query(settings, studio, servers):
    private = servers()
    private.routes["/a.png"] = picture()
    studio.task["data"]["image"] = f"{private.url}/a.png?signature=s3cret"
    found = check(settings(), "project 7 image")
    assert found.status == "error"
    assert "GRACO_ALLOW_HOSTS" in found.remedy
    assert "s3cret" not in found.seen + found.remedy
    assert check(settings(allow_hosts="127.0.0.1"), "project 7 image").status == "ok"


@pytest.mark.parametrize(("answer", "word"), [(404, "404"), (b"<html>", "web page"), (b"\x89PNG\r\n\x1a\n", "damaged")])
def test_an_image_that_cannot_be_had(settings, studio, answer, word):
    studio.routes["/data/upload/7/a.png"] = answer
    found = check(settings(), "project 7 image")
    assert found.status == "error"
    assert word in found.seen
    assert found.remedy


def test_a_task_without_the_image_and_a_project_without_tasks(settings, studio):
    studio.task["data"] = {"picture": "x"}
    assert check(settings(), "project 7 image").status == "error"
    studio.routes["/api/tasks"] = {"tasks": []}
    assert check(settings(), "project 7 image").status == "skipped"


def test_projects_for_which_no_time_is_left_are_skipped(settings, monkeypatch):
    monkeypatch.setattr(doctor, "_PROJECTS_LIMIT_S", -1.0)
    assert check(settings(), "project 7").status == "skipped"


# --- bad answers, secrets ---

ROUTES = ("/api/version", "/api/current-user/whoami", "/api/projects", "/api/ml", "/api/webhooks", "/api/tasks")
GARBAGE = {
    **{"empty": b"", "null": None, "number": 7, "list": [[]], "string": "x", "html": b"<html>", "bytes": b"\xff\xfe\0"},
    **{"deep": b"[" * 100_000, "500": 500, "403": 403, "204": 204, "redirect": (302, {"Location": "http://[::"})},
    "strange": {"results": [{"id": "x"}], "tasks": [7], "release": {}, "email": None},
    "no task": {"results": [{"id": 7, "label_config": ""}], "tasks": [{}], "release": "9", "email": "?"},
}


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
def test_garbage_never_raises(settings, studio, garbage):
    answer = GARBAGE[garbage]
    kept = dict(studio.routes)
    for route in ROUTES:
        studio.routes = kept | {route: answer}
        checks = doctor.examine(settings())
        assert all(c.remedy for c in checks if c.status in ("error", "warning"))
        assert "error of its own" not in " ".join(c.seen for c in checks)


def test_a_fault_of_our_own_is_reported_as_one_and_stops_no_other_check(settings, monkeypatch):
    monkeypatch.setattr(doctor, "check_config", lambda _: 1 / 0)
    checks = {c.name: c for c in doctor.examine(settings())}
    assert "ZeroDivisionError" in checks["project 7 labels"].seen
    assert checks["project 7 image"].status == "ok"


def test_no_token_password_or_query_is_ever_shown(settings, studio, capsys):
    studio.routes["/api/current-user/whoami"] = {"email": f"\x1b[2J{TOKEN}"}
    studio.connection["error_message"] = f"Token {TOKEN} refused [bold]"
    studio.connection["state"] = "ER"
    studio.task["data"]["image"] = "http://127.0.0.1:9/a.png?X-Amz-Signature=s3cret"
    doctor.show(doctor.examine(settings(redis_url=f"redis://:hunter2@127.0.0.1:{PORT}/0?password=hunter2")))
    doctor.show(doctor.examine(settings(label_studio_url="http://ann:hunter2@127.0.0.1:9/ls?x=s3cret")))
    doctor.show(doctor.examine(settings(label_studio_api_key=ACCESS)))
    shown = "".join(capsys.readouterr().out.split())
    assert "[bold]" in shown
    assert not any(word in shown for word in (TOKEN, "hunter2", "s3cret", ACCESS, "\x1b[2J"))
