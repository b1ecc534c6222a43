"""Log lines: for people, or one JSON object each, with the request they belong to."""

import json
import logging
import os
import time
from urllib.parse import quote

import pytest

from ml_backend import logs
from ml_backend.app import create_app
from ml_backend.label_config import make_config
from tests.ml_backend.conftest import TOKEN, ask, click


@pytest.fixture
def configure(capsys):
    """Configure the root logger and put it back; gives the lines written to standard error."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    chatty = {name: logging.getLogger(name).level for name in ("httpx", "httpcore", "PIL", "openvino", "rq.worker")}

    def configured(level, *, as_json):
        logs.configure(level, as_json=as_json)
        return lambda: capsys.readouterr().err.splitlines()

    yield configured
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in chatty.items():
        logging.getLogger(name).setLevel(before)


def test_json_lines_parse_and_carry_time_level_logger_request_and_message(configure):
    lines = configure("INFO", as_json=True)
    token = logs.request_id.set("0a1b2c3d")
    try:
        logging.getLogger("ml_backend.test").warning('two\nlines, "quotes", %s', "ümlaut")
    finally:
        logs.request_id.reset(token)
    (line,) = map(json.loads, lines())
    assert line.pop("time").endswith("Z")
    assert line.pop("process") == os.getpid()
    assert line == {
        "level": "WARNING",
        "logger": "ml_backend.test",
        "request": "0a1b2c3d",
        "message": 'two\nlines, "quotes", ümlaut',
    }


def test_a_traceback_stays_inside_its_json_line(configure):
    lines = configure("INFO", as_json=True)
    try:
        raise ZeroDivisionError("oh")
    except ZeroDivisionError:
        logging.getLogger("ml_backend.test").exception("failed")
    (line,) = map(json.loads, lines())
    assert "ZeroDivisionError: oh" in line["traceback"]
    assert line["request"] == "-"


def test_readable_lines_name_level_logger_and_request(configure):
    lines = configure("INFO", as_json=False)
    logging.getLogger("ml_backend.test").info("hello")
    logging.getLogger("ml_backend.test").debug("not shown")
    (line,) = lines()
    assert "INFO    ml_backend.test [-] hello" in line


def test_all_lines_of_a_prediction_carry_the_id_that_the_answer_names(configure, make_service):
    lines = configure("DEBUG", as_json=True)
    service = make_service()
    response = create_app(service).test_client().post("/predict", json=ask(click(31, 40), click(99, 99, region="c2")))
    assert response.json["results"][0]["result"]
    parsed = [json.loads(line) for line in lines()]
    ours = [line for line in parsed if line["logger"] == "ml_backend.predictions"]
    assert ours
    assert {line["request"] for line in ours} == {response.headers["X-Request-Id"]}
    assert TOKEN not in json.dumps(parsed)


@pytest.mark.parametrize("as_json", [True, False])
def test_addresses_lose_passwords_and_queries_and_named_secrets_are_blotted_out_also_in_a_traceback(configure, as_json):
    lines = configure("INFO", as_json=as_json)
    logs.hide(["canary-hidden", "short"])
    ours = logging.getLogger("ml_backend.test")
    ours.info("GET http://me:canary-pw@host/a.png?sig=canary-query and /data/x.png?d=canary-path, not and/or?")
    ours.info("image %s", "data:image/png;base64,canarybytes")
    try:
        raise ValueError("canary-hidden at https://host/?canary-inside")
    except ValueError:
        ours.exception("it was short")
    text = "\n".join(lines())
    assert "canary" not in text
    assert "http://***@host/a.png?*** and /data/x.png?*** not and/or?" in text
    assert "it was short" in text
    assert "ValueError: *** at https://host/?***" in text


def test_a_line_of_any_length_is_cut_and_searched_in_little_time(configure):
    lines = configure("INFO", as_json=True)
    start_s = time.perf_counter()
    for text in ("/-" * 50_000, "a://" * 25_000, "data:" * 20_000, "http://" + "x" * 100_000):
        logging.getLogger("ml_backend.test").info(text)
    took_s = time.perf_counter() - start_s
    assert all(len(line) < 25_000 for line in lines())
    assert took_s < 5


def test_configuring_twice_writes_each_line_once(configure):
    configure("INFO", as_json=True)
    lines = configure("INFO", as_json=True)
    logging.getLogger("ml_backend.test").info("once")
    assert len(lines()) == 1


FORGED = "7\n12:00:00 INFO    ml_backend.access [-] GET /forged\r\x1b[2J\x85\u2028\u202e"


@pytest.mark.parametrize("as_json", [True, False])
def test_no_value_of_a_request_begins_a_line_of_its_own_or_steers_a_terminal(configure, make_service, as_json):
    lines = configure("DEBUG", as_json=as_json)
    client = create_app(make_service()).test_client()
    config = make_config(["Object"]).replace("Object", "Ob&#10;ject")
    client.post("/setup", json={"project": FORGED, "schema": "<View>" + FORGED})
    client.post("/setup", json={"project": FORGED, "schema": "<View><Image name='a&#10;b' value='$x'/></View>"})
    client.post("/webhook", json={"action": FORGED, "project": {"id": FORGED}, "annotation": {"id": FORGED}})
    client.post("/webhook", json={"action": "START_TRAINING", "project": {"id": FORGED}})
    client.post("/train", json={"project": FORGED})
    for changes in (
        {"project": FORGED},
        {"image": FORGED},
        {"image": f"http://host/{FORGED}"},
        {"config": config},
    ):
        project = changes.pop("project", "3.1")
        region = click(31, 40, region=FORGED, label=FORGED, level=FORGED, to_name=FORGED)
        client.post("/predict", json=ask(region, **changes) | {"project": project})
        client.post("/predict", json=ask(click(31, 40, region=FORGED), **changes) | {"project": project})
    client.get("/versions", query_string={"project": FORGED}, headers={"X-Request-Id": "a b"})
    client.post(f"/{quote(FORGED)}")
    logging.getLogger(FORGED).error("%s", FORGED)
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("ml_backend.test").exception("failed: %s", FORGED)
    found = lines()
    assert sum("GET /forged" in line for line in found) >= 5, "it is logged in several places"
    for line in found:
        assert not line.startswith("12:00:00 INFO    ml_backend.access [-] GET /forged")
        assert line.isprintable()
