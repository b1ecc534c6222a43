"""Who is let in where, with what; what is counted against whom; where secrets come from."""

import base64
import errno
import io
import itertools
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
import urllib.request

import pytest
from pydantic import ValidationError

from ml_backend.app import create_app
from ml_backend.auth import OPEN
from ml_backend.credentials import SECRET_HEADER, open_secrets
from ml_backend.limits import FAILURES, Limits
from ml_backend.settings import Settings
from ml_backend.simulate import free_port
from model.types import Refusal
from tests.conftest import ROOT
from tests.ml_backend.conftest import ask, click, recorded, wait_until

PASSWORD, SECRET, ADMIN = "password-of-ls", "secret-of-webhooks", "password-of-admin"


def basic(user, password):
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


LABEL_STUDIO, ADMINS, WEBHOOK = basic("label-studio", PASSWORD), basic("admin", ADMIN), {SECRET_HEADER: SECRET}
WRONG = {
    "nothing": {},
    "a wrong password": basic("label-studio", PASSWORD[:-1]),
    "a wrong user": basic("label_studio", PASSWORD),
    "an empty password": basic("label-studio", ""),
    "the admin's password for Label Studio's user": basic("label-studio", ADMIN),
    "a wrong admin's password": basic("admin", PASSWORD),
    "a wrong webhook secret": {SECRET_HEADER: SECRET + "x"},
    "an empty webhook secret": {SECRET_HEADER: ""},
    "a bearer": {"Authorization": f"Bearer {PASSWORD}"},
    "no base64": {"Authorization": "Basic ???"},
    "no ASCII": {"Authorization": "Basic \xff\xfe"},
    "letters of elsewhere": {
        "Authorization": "Basic " + base64.b64encode("ü:\udcff".encode("utf-8", "replace")).decode()
    },
    "a made-up session": {"Cookie": "graco_admin=eyJhZG1pbiI6IngifQ.aaaaaa.bbbbbb"},
}


@pytest.fixture
def guarded(make_service):
    """Make an app with auth on."""

    def make(**chosen):
        known = {"password": PASSWORD, "webhook_secret": SECRET, "admin_password": ADMIN, "auth": "on"}
        return create_app(make_service(start=False, **known | chosen))

    return make


@pytest.fixture
def client(guarded):
    return guarded().test_client()


def routes(app):
    """Path (with something for its variables), method and endpoint of everything the app answers."""
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(\w+:)?\w+>", lambda match: "1", rule.rule)
        for method in rule.methods - {"OPTIONS", "HEAD"}:
            yield path, method, rule.endpoint


def wanted(path):
    """What opens a route."""
    if path.startswith("/admin"):
        return {"admin": ADMINS}
    if path == "/webhook":
        return {"label studio": LABEL_STUDIO, "webhook": WEBHOOK}
    return {"label studio": LABEL_STUDIO, "admin": ADMINS}


# --- S5 ---


def test_every_route_answers_401_without_its_own_credentials_and_not_with_them(guarded):
    app = guarded()
    app.get("/route-of-tomorrow")(lambda: "hello")
    client = app.test_client()
    addresses = (f"10.{n // 65536}.{n // 256 % 256}.{n % 256}" for n in itertools.count())
    every = {"label studio": LABEL_STUDIO, "admin": ADMINS, "webhook": WEBHOOK}
    unlike = []
    asked = [*routes(app), ("/nowhere", "GET", None), ("/health", "POST", None), ("/admin/nowhere", "GET", None)]
    assert {"/predict", "/setup", "/webhook", "/train", "/versions", "/metrics", "/", "/route-of-tomorrow"} <= {
        path for path, _, _ in asked
    }
    for path, method, endpoint in asked:
        if endpoint in OPEN:
            continue
        right = wanted(path)
        for name, headers in {**WRONG, **{n: h for n, h in every.items() if n not in right}}.items():
            place = {"REMOTE_ADDR": next(addresses)}
            answer = client.open(path, method=method, headers=headers, environ_base=place)
            if answer.status_code != 401 or "WWW-Authenticate" not in answer.headers or len(answer.json["error"]) < 20:
                unlike.append((method, path, name, answer.status_code))
        for name, headers in right.items():
            place = {"REMOTE_ADDR": next(addresses)}
            answer = client.open(path, method=method, headers=headers, environ_base=place)
            if answer.status_code in (401, 429):
                unlike.append((method, path, name, answer.status_code))
    assert not unlike


def test_what_is_open_is_liveness_the_login_form_and_its_style(guarded):
    app = guarded()
    assert {rule.endpoint for rule in app.url_map.iter_rules()} | {"admin.static"} >= OPEN
    assert {"health", "auth.form", "auth.log_in", "admin.static"} == OPEN
    assert app.test_client().get("/health").status_code == 200
    assert app.test_client().get("/admin/login").status_code == 200


def test_switched_off_nothing_is_asked_for_but_the_admins_forms_keep_their_tokens(guarded):
    client = guarded(auth="off", password=None, webhook_secret=None, admin_password=None).test_client()
    assert client.get("/versions").status_code == 200
    assert client.post("/admin/logout").status_code == 403


def test_label_studios_requests_pass_and_its_webhook_only_with_the_header(guarded):
    app = guarded()
    client = app.test_client()
    assert client.post("/setup", json=recorded("60"), headers=LABEL_STUDIO).status_code == 200
    plain = client.post("/webhook", json=recorded("62"))
    assert plain.status_code == 401
    assert "python -m ml_backend connect" in plain.json["error"]
    for headers in (WEBHOOK, LABEL_STUDIO):
        assert client.post("/webhook", json=recorded("63"), headers=headers).status_code == 201


# --- guessing ---


def ask_versions(client, headers, address="10.0.0.1"):
    return client.get("/versions", headers=headers, environ_base={"REMOTE_ADDR": address})


def test_after_ten_wrong_passwords_the_right_one_has_to_wait_too(client):
    for _ in range(FAILURES):
        assert ask_versions(client, WRONG["a wrong password"]).status_code == 401
    late = ask_versions(client, LABEL_STUDIO)
    assert late.status_code == 429
    assert 1 <= int(late.headers["Retry-After"]) <= 60
    assert ask_versions(client, LABEL_STUDIO, "10.0.0.2").status_code == 200, "another address is not concerned"
    assert ask_versions(client, ADMINS).status_code == 200, "nor is another password"


def test_a_project_with_an_old_password_shuts_out_neither_the_others_nor_their_webhooks(client):
    assert ask_versions(client, LABEL_STUDIO).status_code == 200
    for _ in range(2 * FAILURES):
        ask_versions(client, WRONG["a wrong password"])
        client.post("/webhook", json={}, environ_base={"REMOTE_ADDR": "10.0.0.1"})  # without any: not a guess
    assert ask_versions(client, LABEL_STUDIO).status_code == 200
    told = client.post("/webhook", json=recorded("62"), headers=WEBHOOK, environ_base={"REMOTE_ADDR": "10.0.0.1"})
    assert told.status_code == 201


def test_the_admins_password_is_not_guessed_on_from_an_address_that_knew_it(client):
    assert ask_versions(client, ADMINS).status_code == 200
    for _ in range(FAILURES):
        assert ask_versions(client, basic("admin", "x")).status_code == 401
    assert ask_versions(client, ADMINS).status_code == 429
    assert client.get("/admin/", headers=ADMINS, environ_base={"REMOTE_ADDR": "10.0.0.1"}).status_code == 429


# --- limits ---


def test_ten_annotators_and_fifty_webhooks_a_second_stay_far_below_the_limit_of_one_address():
    limits = Limits(Settings())
    minute = 60 * (50 + 10 * 2)
    assert not any(limits.count_request("10.0.0.1") for _ in range(2 * minute))


def test_an_address_that_asks_too_often_gets_429_and_liveness_goes_on(guarded):
    client = guarded(requests_per_minute=5).test_client()
    statuses = [ask_versions(client, LABEL_STUDIO).status_code for _ in range(6)]
    if statuses[-1] != 429:  # a new minute had begun
        statuses = [ask_versions(client, LABEL_STUDIO).status_code for _ in range(6)]
    assert statuses == [200] * 5 + [429]
    late = ask_versions(client, LABEL_STUDIO)
    assert 1 <= int(late.headers["Retry-After"]) <= 60
    assert "GRACO_REQUESTS_PER_MINUTE" in late.json["error"]
    assert client.get("/health", environ_base={"REMOTE_ADDR": "10.0.0.1"}).status_code == 200
    assert ask_versions(client, LABEL_STUDIO, "10.0.0.2").status_code == 200


def test_behind_a_named_proxy_the_address_it_reports_is_the_one_that_counts(guarded):
    client = guarded(requests_per_minute=2, proxies=1).test_client()
    for address in ("192.0.2.1", "192.0.2.2", "192.0.2.3"):
        for _ in range(2):
            headers = LABEL_STUDIO | {"X-Forwarded-For": f"203.0.113.9, {address}"}
            assert client.get("/versions", headers=headers).status_code == 200


def fast(answer):
    """What `answer` gives, if it takes no longer than a few seconds on a busy machine."""
    start = time.perf_counter()
    given = answer()
    assert time.perf_counter() - start < 5
    return given


class Unread(io.BytesIO):
    """A body of 250 MB that nobody may read."""

    def read(self, *_):
        raise AssertionError("the body was read")


@pytest.mark.parametrize(("headers", "status"), [(LABEL_STUDIO, 413), ({}, 401)], ids=["let in", "not let in"])
def test_too_large_a_body_is_refused_before_any_of_it_is_read(client, headers, status):
    large = {"wsgi.input": Unread(), "CONTENT_LENGTH": str(250 * 2**20 + 1)}
    assert fast(lambda: client.post("/predict", environ_overrides=large, headers=headers)).status_code == status


@pytest.mark.parametrize("path", ["/admin/login", "/admin/training/start"])
def test_too_large_a_form_is_told_the_limit_of_the_admins_pages(client, path):
    large = {"wsgi.input": Unread(), "CONTENT_LENGTH": str(2**20 + 1)}
    form = {"Content-Type": "application/x-www-form-urlencoded", **ADMINS}
    for accept in ("application/json", "text/html"):
        told = client.post(path, environ_overrides=large, headers=form | {"Accept": accept})
        assert (told.status_code, told.mimetype) == (413, accept)
        assert "larger than 1 MB" in told.text
        assert "GRACO_REQUEST_MAX_MB" not in told.text


@pytest.mark.parametrize("kind", ["tasks", "clicks"])
def test_ten_thousand_tasks_and_a_hundred_thousand_clicks_are_422_at_once(client, kind):
    body = ask(click(31, 40))
    if kind == "tasks":
        body["tasks"] *= 10**4
    else:
        body["params"]["context"]["result"] *= 10**5
    data = json.dumps(body)
    answer = fast(lambda: client.post("/predict", data=data, headers=LABEL_STUDIO))
    assert answer.status_code == 422
    assert "at most" in answer.json["error"]


# --- the admin's login ---


def token_of(answer):
    return re.search(r'name="csrf_token" value="([\w-]+)"', answer.text)[1]


def log_in(client, password=ADMIN, **fields):
    token = token_of(client.get("/admin/login"))
    return client.post("/admin/login", data={"csrf_token": token, "password": password, **fields})


def opens(client):
    """Whether the admin's pages open; there is none of this name, so that 404 says so."""
    return client.get("/admin/nowhere").status_code == 404


def test_the_login_opens_the_admins_pages_in_this_browser_until_the_logout(guarded):
    app = guarded()
    client = app.test_client()
    assert not opens(client)
    done = log_in(client, next="/admin/trainings?line=project-3")
    assert (done.status_code, done.location) == (303, "/admin/trainings?line=project-3")
    cookie = done.headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/admin"} <= {part.strip() for part in cookie.split(";")}
    assert "Secure" not in cookie
    assert opens(client)
    assert not opens(app.test_client()), "another browser"
    token = token_of(client.get("/admin/login"))
    assert client.post("/admin/logout").status_code == 403
    assert client.post("/admin/logout", headers={"X-CSRF-Token": token}).status_code == 303
    assert not opens(client)


def copied(client):
    return client.get_cookie("graco_admin", path="/admin").value


def with_cookie(app, value):
    client = app.test_client()
    client.set_cookie("graco_admin", value, path="/admin")
    return client


def log_out(client):
    return client.post("/admin/logout", headers={"X-CSRF-Token": token_of(client.get("/admin/login"))})


def test_a_logout_ends_the_session_for_copies_of_its_cookie_in_every_process_and_after_a_restart(guarded):
    secret = {"session_secret": "the-same-secret"}
    first, second = guarded(**secret), guarded(**secret)
    client = first.test_client()
    log_in(client)
    cookie = copied(client)
    assert opens(with_cookie(first, cookie))
    assert opens(with_cookie(second, cookie))
    other = second.test_client()
    log_in(other)
    assert log_out(client).status_code == 303
    for app in (first, second, guarded(**secret)):
        assert not opens(with_cookie(app, cookie))
        assert opens(with_cookie(app, copied(other))), "another browser's session goes on"
    assert not opens(client)
    log_in(client)
    assert opens(client)


def test_sessions_that_were_logged_out_are_forgotten_once_they_would_be_over_anyway(guarded, tmp_path):
    app = guarded()
    for _ in range(2):
        client = app.test_client()
        log_in(client)
        assert log_out(client).status_code == 303
        kept = list((tmp_path / "data" / "sessions").iterdir())
        assert len(kept) == 1
        os.utime(kept[0], (time.time() - 12 * 3600 - 1,) * 2)


def test_a_logout_that_cannot_be_written_down_says_so(guarded, tmp_path):
    app = guarded()
    client = app.test_client()
    log_in(client)
    (tmp_path / "data" / "sessions").write_text("in the way")
    told = log_out(client)
    assert told.status_code == 503
    assert "could not be ended" in told.json["error"]
    assert "twelve hours" in told.json["error"]
    assert not opens(client), "at least this browser is logged out"


def test_a_logout_that_is_written_down_is_one_though_the_disk_does_not_confirm_it(guarded, monkeypatch):
    app = guarded()
    client = app.test_client()
    log_in(client)
    cookie = copied(client)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "no answer")))
    assert log_out(client).status_code == 303
    assert not opens(with_cookie(app, cookie))


def test_over_https_the_cookie_is_secure(guarded):
    client = guarded(proxies=1).test_client()
    there = client.get("/admin/login", headers={"X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/graco"})
    assert "Secure" in there.headers["Set-Cookie"]
    assert "Path=/graco/admin" in there.headers["Set-Cookie"]
    assert 'action="/graco/admin/login"' in there.text


@pytest.mark.parametrize("there", ["https://elsewhere.example/", "//elsewhere.example", "/predict", "/admin\\..", ""])
def test_a_login_leads_to_the_admins_pages_only(client, there):
    assert log_in(client, next=there).location == "/admin"


def test_a_wrong_password_says_so_in_the_form_and_ten_make_the_right_one_wait(client):
    for _ in range(FAILURES):
        again = log_in(client, "wrong-password")
        assert again.status_code == 401
        assert "not the admin" in again.text
        assert token_of(again)
    assert log_in(client).status_code == 429
    assert not opens(client)


def test_a_browser_is_told_on_a_page_why_a_form_was_not_taken(client):
    refused = client.post("/admin/login", data={"password": ADMIN}, headers={"Accept": "text/html"})
    assert (refused.status_code, refused.mimetype) == (403, "text/html")
    assert "reload the page" in refused.text
    assert client.post("/admin/login", data={"password": ADMIN}).mimetype == "application/json"


def test_a_login_without_the_forms_token_is_refused(client):
    client.get("/admin/login")
    for data in ({"password": ADMIN}, {"password": ADMIN, "csrf_token": "x"}):
        assert client.post("/admin/login", data=data).status_code == 403
    assert not opens(client)


def test_a_browser_gets_the_form_and_no_dialog_of_its_own_and_a_program_the_challenge(client):
    page = client.get("/admin/versions?line=a", headers={"Accept": "text/html,*/*"})
    assert page.status_code == 401
    assert "Basic" not in page.headers["WWW-Authenticate"]
    assert 'name="next" value="/admin/versions?line=a"' in page.text
    assert client.get("/admin/").headers["WWW-Authenticate"].startswith("Basic realm=")


def test_twelve_hours_after_the_login_a_session_ends_however_often_it_was_used(client):
    log_in(client)
    assert opens(client)
    with client.session_transaction("/admin/") as session:
        session["since"] -= 12 * 3600
    assert not opens(client)


def test_a_new_password_ends_the_sessions_of_the_old_one(guarded):
    first = guarded(session_secret="the-same-secret").test_client()
    log_in(first)
    cookie = first.get_cookie("graco_admin", path="/admin")
    for password, still in ((ADMIN, True), ("another-password", False)):
        client = guarded(session_secret="the-same-secret", admin_password=password).test_client()
        client.set_cookie("graco_admin", cookie.value, path="/admin")
        assert opens(client) is still


# --- headers ---


@pytest.mark.parametrize("path", ["/health", "/versions", "/nowhere", "/admin/", "/admin/login", "/metrics"])
@pytest.mark.parametrize("headers", [{}, ADMINS], ids=["refused", "answered"])
def test_every_answer_has_the_headers_that_keep_browsers_from_misusing_it(client, path, headers):
    answer = client.get(path, headers=headers)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Referrer-Policy"] == "same-origin"
    assert answer.headers["Cache-Control"] == "no-store"
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def test_no_log_line_or_answer_holds_a_secret(client, caplog):
    caplog.set_level("DEBUG")
    log_in(client)
    shown = [log_in(client, "canary-password").text]
    for headers in (LABEL_STUDIO, ADMINS, WEBHOOK, basic("admin", "canary-guess"), {SECRET_HEADER: "canary-secret"}):
        shown += [
            client.open(path, method=method, headers=headers).text
            for path, method in [("/", "GET"), ("/webhook", "POST")]
        ]
    text = "".join(shown) + caplog.text
    assert not any(secret in text for secret in (PASSWORD, SECRET, ADMIN, "canary"))


# --- where secrets come from ---


def test_what_is_not_given_is_made_once_for_its_owner_alone(tmp_path):
    settings = Settings(data_dir=tmp_path / "data", admin_password=ADMIN)
    first = open_secrets(settings)
    assert first == open_secrets(settings)
    assert first.admin_password == ADMIN
    assert len({first.password, first.webhook_secret, first.session_secret}) == 3
    file = tmp_path / "data" / "secrets.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text()).keys() == {"password", "webhook_secret", "session_secret"}
    assert first.password not in repr(first)
    later = open_secrets(Settings(data_dir=tmp_path / "data", password=PASSWORD))
    assert (later.password, later.webhook_secret) == (PASSWORD, first.webhook_secret)
    assert later.admin_password == json.loads(file.read_text())["admin_password"], "made now that none was given"


def test_processes_that_start_at_once_agree(tmp_path):
    code = "from ml_backend import credentials, settings; print(credentials.open_secrets(settings.Settings()).password)"
    environment = os.environ | {"GRACO_DATA_DIR": str(tmp_path / "data")}
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    printed = [process.communicate(timeout=60)[0].strip() for process in started]
    assert len(set(printed)) == 1
    assert len(printed[0]) >= 24
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".secrets.json.lock", "secrets.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"password": 5}'])
def test_a_damaged_file_of_secrets_is_a_sentence(tmp_path, content):
    (tmp_path / "secrets.json").write_text(content)
    with pytest.raises(Refusal, match="or delete it"):
        open_secrets(Settings(data_dir=tmp_path))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"GRACO_PASSWORD": "canary"}, "12 to 200"),
        ({"GRACO_PASSWORD": "canary with spaces"}, "without spaces"),
        ({"GRACO_ADMIN_PASSWORD": "canary-ü-canary"}, "ASCII"),
        ({"GRACO_PASSWORD": "canary-canary", "GRACO_PASSWORD_FILE": "/etc/hostname"}, "unset one"),
        ({"GRACO_WEBHOOK_SECRET_FILE": "/no/such/file"}, "cannot be read"),
        ({"GRACO_SESSION_SECRET_FILE": "relative"}, "whole path"),
        ({"GRACO_USERNAME": "admin"}, "another"),
    ],
)
def test_a_secret_that_will_not_do_is_a_sentence_that_does_not_show_it(monkeypatch, given, word):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=word) as caught:
        Settings()
    assert "canary" not in str(caught.value)


def test_the_first_start_shows_new_secrets_in_the_terminal_once_and_not_in_the_log(tmp_path):
    port = free_port()
    environment = os.environ | {
        **{"GRACO_DATA_DIR": str(tmp_path / "data"), "GRACO_PORT": str(port), "GRACO_ENCODER": "exact"},
        "GRACO_LOG_LEVEL": "DEBUG",
    }
    shown = []
    for start in range(2):
        ours, theirs = pty.openpty()
        with (tmp_path / f"log-{start}").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ml_backend", "run"], cwd=ROOT, env=environment, stdout=theirs, stderr=log
            )
        try:
            wait_until(lambda: answers(port), limit_s=60)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        shown.append(os.read(ours, 2**16).decode() if select.select([ours], [], [], 0)[0] else "")
        os.close(ours)
        os.close(theirs)
    made = json.loads((tmp_path / "data" / "secrets.json").read_text())
    assert all(made[name] in shown[0] for name in ("password", "webhook_secret", "admin_password"))
    assert made["session_secret"] not in shown[0]
    assert "Connect Model" in shown[0]
    logged = "".join((tmp_path / f"log-{start}").read_text() for start in range(2))
    assert not any(secret in shown[1] + logged for secret in made.values())


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
