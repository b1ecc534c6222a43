"""The description of our routes: nothing is missing from it, and nothing sent by it breaks a real server."""

import json
import os
import re
import subprocess
import sys

import pytest

from ml_backend.app import create_app
from ml_backend.auth import OPEN
from ml_backend.credentials import SECRET_HEADER
from tests.ml_backend.running import ADMIN, SECRET, running


def test_every_route_of_the_app_is_described_and_says_what_it_is_for(make_service):
    app = create_app(make_service(start=False))
    document = app.test_client().get("/openapi.json").json
    assert document["openapi"] == "3.1.0"
    for rule in app.url_map.iter_rules():
        if rule.endpoint.endswith("static"):
            continue
        path = re.sub(r"<(?:\w+(?:\([^)]*\))?:)?(\w+)>", r"{\1}", rule.rule)
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            operation = document["paths"][path][method.lower()]
            assert len(operation["summary"]) > 5
            told = "admin" not in path or path in ("/admin/login", "/admin/logout")
            assert not told or len(operation["summary"]) > 15, "what it is for, not only its name"
            named = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
            assert named == rule.arguments
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)


def test_what_opens_each_route_is_described_as_it_is(make_service):
    app = create_app(make_service(start=False))
    document = app.test_client().get("/openapi.json").json
    schemes = document["components"]["securitySchemes"]
    assert schemes["webhook"] == schemes["webhook"] | {"type": "apiKey", "in": "header", "name": SECRET_HEADER}
    assert (schemes["session"]["in"], schemes["session"]["name"]) == ("cookie", app.config["SESSION_COOKIE_NAME"])
    opened = {}
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+(?:\([^)]*\))?:)?(\w+)>", r"{\1}", rule.rule)
        for method in rule.methods - {"HEAD", "OPTIONS"} if path in document["paths"] else ():
            needs = document["paths"][path][method.lower()].get("security", document["security"])
            assert {name for one in needs for name in one} <= schemes.keys()
            opened[method, path] = [set(one) for one in needs]
            assert (needs == []) == (rule.endpoint in OPEN and method == "GET")
            if path.startswith("/admin") and method == "POST":
                assert all("form" in one for one in needs)
    assert opened["POST", "/webhook"] == [{"webhook"}, {"basic"}]
    assert opened["POST", "/predict"] == [{"basic"}]
    assert opened["GET", "/admin/versions"] == [{"session"}, {"basic"}]
    assert opened["POST", "/admin/login"] == [{"session", "form"}]
    assert opened["POST", "/admin/logout"] == [{"session", "form"}, {"basic", "form"}]
    form = document["paths"]["/admin/login"]["post"]["requestBody"]["content"]["application/x-www-form-urlencoded"]
    assert {"password", "csrf_token"} <= form["schema"]["properties"].keys()


def test_bodies_are_described_as_they_are_read(make_service):
    document = create_app(make_service(start=False)).test_client().get("/openapi.json").json
    read = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert read == {"$ref": "#/components/schemas/PredictBody"}
    schemas = document["components"]["schemas"]
    assert schemas["PredictBody"]["required"] == ["tasks"]
    assert schemas["TaskBody"]["properties"]["id"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 2**63 - 1,
    }
    text = json.dumps(document)
    for reference in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert reference in schemas


@pytest.fixture(scope="module")
def backend(tmp_path_factory, label_studio):
    with running(tmp_path_factory.mktemp("fuzzed"), label_studio.url) as found:
        yield found


def fuzz(backend, folder, seconds):
    """Send what the description allows and what it does not, and return what went wrong."""
    hooks = folder / "unbroken.py"
    hooks.write_text(
        "import schemathesis\n\n\n"
        "@schemathesis.check\n"
        "def unbroken(ctx, response, case):\n"
        "    asked_ready = case.path == '/health' and 'ready' in (case.query or {})\n"  # liveness never is 503
        "    not_ready = asked_ready and response.status_code == 503\n"
        "    assert response.status_code < 500 or not_ready, 'a server error'\n"
        "    assert b'Traceback' not in response.content and b'internal error' not in response.content\n"
    )
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{backend.port}/openapi.json"),
        *(
            "--auth",
            f"admin:{ADMIN}",
            "--header",
            f"{SECRET_HEADER}: {SECRET}",
            "--max-time",
            str(seconds),
            "--phases",
            "coverage,fuzzing",
            "--no-color",
        ),
        *("--checks", "unbroken", "--max-failures", "5", "--seed", "1", "--workers", "2"),
        *("--suppress-health-check", "all", "--request-timeout", "60", "--exclude-path", "/admin/login"),
    ]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "unbroken", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def assert_unbroken(backend, folder, seconds):
    status, said = fuzz(backend, folder, seconds)
    assert status == 0, said[-6000:]
    assert backend.health()["status"] == "UP"
    lines = [json.loads(line) for line in backend.log().splitlines() if line.startswith("{")]
    assert sum(line["logger"] == "ml_backend.access" for line in lines) > 50, said[-3000:]
    assert [line for line in lines if line["level"] in ("ERROR", "CRITICAL")] == []


def test_no_request_made_from_the_description_breaks_the_server(backend, tmp_path):
    assert_unbroken(backend, tmp_path, 25)


@pytest.mark.soak
def test_ten_minutes_of_requests_made_from_the_description_do_not_break_the_server(backend, tmp_path):
    assert_unbroken(backend, tmp_path, 600)
