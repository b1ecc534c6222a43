"""The routes, asked as Label Studio asks them, and as it never would."""

import contextlib
import copy
import hashlib
import json
import logging
import statistics
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_backend import brush
from ml_backend.app import create_app, without_masks
from ml_backend.label_config import make_config
from tests.ml_backend.conftest import TOKEN, ask, box, click, picture, recorded, recordings

GOOD = ask(click(31, 40))
INTERACTIVE = [name for name in recordings("") if name[:1] in "123" and not name.startswith("37")]
BATCHES = recordings("predict_batch") + recordings("predict_on_task_open")
WEBHOOKS = recordings("webhook")


def post(client, body, route="/predict"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(route, data=data, content_type="application/json")


def one(response):
    """The only result of an answer."""
    assert response.status_code == 200, response.text
    (result,) = response.json["results"]
    return result


def assert_declined(client, caplog, body, *words, route="/predict"):
    """A 4xx or an empty result, a sentence with `words` in answer and log, no traceback, and the next click works."""
    caplog.clear()
    response = post(client, body, route)
    if response.status_code == 200:
        results = response.json["results"]
        assert all(result["result"] == [] for result in results)
        sentences = [result["reason"] for result in results]
    else:
        assert 400 <= response.status_code < 500, response.text
        sentences = [response.json["error"]]
    for word in words:
        assert all(word in sentence for sentence in sentences), sentences
        assert word in caplog.text
    assert all(len(sentence) > 15 for sentence in sentences)
    assert caplog.records
    for text in (response.text, caplog.text):
        assert "Traceback" not in text
        assert "internal error" not in text
    assert one(post(client, GOOD))["result"], "the next request works"


# --- what is recorded is answered ---


@pytest.mark.parametrize("name", INTERACTIVE)
def test_recorded_clicks_are_answered_with_a_mask_of_the_image(client, name):
    body = recorded(name)
    result = one(post(client, body))
    first = body["params"]["context"]["result"][0]
    mask = result["result"][0]
    assert mask["type"] == "brushlabels"
    assert (mask["original_width"], mask["original_height"]) == (first["original_width"], first["original_height"])
    assert brush.decode(mask["value"]["rle"], height=mask["original_height"], width=mask["original_width"]).any()
    assert 0 < result["score"] <= 1
    assert result["model_version"].startswith("light-")


def test_an_empty_context_gets_an_empty_result(client):
    assert one(post(client, recorded("37"))) == {"result": [], "score": 0.0, "model_version": one_version(client)}


def one_version(client):
    return client.get("/health").json["model_version"]


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_gets_one_result_per_task(client, name):
    body = recorded(name)
    results = post(client, body).json["results"]
    assert [result["result"] for result in results] == [[] for _ in body["tasks"]]


@pytest.mark.parametrize("name", WEBHOOKS)
def test_recorded_webhooks_are_acknowledged(client, name):
    assert post(client, recorded(name), "/webhook").status_code == 201


@pytest.mark.parametrize("name", recordings("setup"))
def test_setup_answers_the_version_that_predictions_carry(client, name):
    assert post(client, recorded(name), "/setup").json == {"model_version": one_version(client)}


def test_a_click_with_basic_auth_configured_is_answered_like_any(client):
    assert post(client, recorded("61")).status_code == 200


def test_a_configuration_from_setup_serves_requests_that_bring_none(client):
    body = GOOD | {"label_config": None, "project": "77.1"}
    assert post(client, body).status_code == 422
    post(client, {"project": "77.1", "schema": GOOD["label_config"]}, "/setup")
    assert one(post(client, body))["result"]


def test_a_configuration_that_an_earlier_version_kept_is_found(client, service):
    folder = service.settings.data_dir / "schemas"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(b"78.1").hexdigest()[:32]
    (folder / f"{name}.xml").write_text(GOOD["label_config"], encoding="utf-8")
    assert one(post(client, GOOD | {"label_config": None, "project": "78.1"}))["result"]


def test_identical_requests_get_identical_bodies_and_another_click_on_the_same_spot_another_region(client):
    first, again = post(client, GOOD), post(client, GOOD)
    assert first.data == again.data
    other = one(post(client, ask(click(31, 40, region="c9"))))["result"]
    mine = first.json["results"][0]["result"]
    assert [r["id"] for r in other] != [r["id"] for r in mine]
    assert [r["value"] for r in other] == [r["value"] for r in mine]


# --- small routes ---


def test_the_front_page_names_the_routes(client):
    assert {"/predict", "/setup", "/webhook", "/health"} <= set(client.get("/").json["routes"])


def test_versions_is_the_one_version_there_is(client):
    answer = client.get("/versions", json={"project": "3.1"})
    assert answer.json == {"versions": [one_version(client)]}


def test_an_old_servers_train_is_answered_like_start_training(client):
    assert post(client, {"project": "3.1", "annotations": []}, "/train").json["job"].startswith("train-project-3-")


def test_metrics_count_requests_predictions_and_steps(client, counted):
    post(client, GOOD)
    post(client, ask())
    post(client, b"{")
    text = client.get("/metrics").text
    assert 'graco_requests_total{route="/predict",status="200"}' in text
    assert counted("graco_requests_total", route="/predict", status="200") == 2
    assert counted("graco_requests_total", route="/predict", status="422") == 1
    assert counted("graco_predictions_total", outcome="answered") == 1
    assert counted("graco_predictions_total", outcome="nothing_asked") == 1
    assert counted("graco_request_seconds_count", route="/predict") == 3
    assert "graco_model_loaded 1.0" in text


def test_unknown_routes_and_methods_are_4xx_with_a_sentence(client, counted):
    assert client.get("/nowhere").status_code == 404
    assert client.get("/predict").status_code == 405
    assert "error" in client.get("/predict").json
    assert counted("graco_requests_total", route="unknown", status="404") == 1


def test_an_error_of_our_own_costs_one_empty_result_its_id_is_in_answer_and_log_and_no_traceback_goes_out(
    client, service, monkeypatch, caplog, counted
):
    def broken(image):
        raise ZeroDivisionError("secret of the house")

    monkeypatch.setattr(service, "identify", broken)
    response = post(client, GOOD)
    request_id = response.headers["X-Request-Id"]
    assert one(response)["result"] == []
    assert request_id in one(response)["reason"]
    assert "secret of the house" not in response.text
    assert "ZeroDivisionError" in caplog.text
    assert counted("graco_predictions_total", outcome="failed") == 1


def test_an_error_outside_of_a_task_is_a_500_with_an_id_and_no_traceback(client, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("secret of the house")

    monkeypatch.setattr("ml_backend.app.predict_tasks", broken)
    response = post(client, GOOD)
    assert response.status_code == 500
    assert response.headers["X-Request-Id"] in response.json["error"]
    assert "secret" not in response.text
    assert "ZeroDivisionError" in caplog.text


# --- bad input ---


def changed(path, value, body=GOOD):
    """`body` with the value at `path` replaced."""
    body = copy.deepcopy(body)
    *parents, last = path
    place = body
    for key in parents:
        place = place[key]
    place[last] = value
    return body


RESULT = ("params", "context", "result")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(b"{", ["not JSON"], id="broken"),
        pytest.param(b"", ["not JSON"], id="empty"),
        pytest.param(b'{"tasks": [], "x": "\xff\xfe"}', [], id="invalid UTF-8, skipped"),
        pytest.param(b'{"tasks": [{"data": {"image": "\xff\xfe"}}]}', ["not JSON"], id="invalid UTF-8"),
        pytest.param(json.dumps(changed((*RESULT, 0, "value", "x"), float("nan"))).encode(), ["not JSON"], id="NaN"),
        pytest.param(b'{"tasks": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["expects"], id="deep"),
        pytest.param(b'{"unknown": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["too deep"], id="deep, skipped"),
        pytest.param(b"[]", ["expects"], id="a list"),
        pytest.param(b"null", ["expects"], id="null"),
        pytest.param(b"{}", ["tasks"], id="no tasks key"),
        pytest.param(changed(("tasks",), []), ["names no task"], id="no task"),
        pytest.param(changed(("tasks",), None), ["expects"], id="tasks null"),
        pytest.param(changed(("tasks",), {"id": 1}), ["expects"], id="tasks an object"),
        pytest.param(changed(("tasks", 0), 7), ["expects"], id="a task a number"),
        pytest.param(changed(("tasks", 0, "id"), "seven"), ["expects"], id="task id a word"),
        pytest.param(changed(("tasks", 0, "id"), 2**70), ["expects"], id="task id beyond all"),
        pytest.param(changed(("project",), 2**70), ["expects"], id="project beyond all"),
        pytest.param(changed(("tasks", 0, "data"), {}), ["has no image"], id="no data"),
        pytest.param(changed(("tasks", 0, "data"), "x"), ["expects"], id="data a word"),
        pytest.param(changed(("tasks", 0, "data", "image"), 5), ["address of an image"], id="image a number"),
        pytest.param(changed(("tasks", 0, "data", "image"), ""), ["address of an image"], id="image empty"),
        pytest.param(changed(("label_config",), ""), ["no label_config"], id="no config"),
        pytest.param(changed(("label_config",), "<View>"), [], id="config no XML"),
        pytest.param(changed(("label_config",), 5), ["expects"], id="config a number"),
        pytest.param(changed(("label_config",), "<View><Text name='t' value='$t'/></View>"), ["<Image"], id="no image"),
        pytest.param(changed(("params",), []), ["expects"], id="params a list"),
        pytest.param(changed(("params", "context"), "click"), ["expects"], id="context a word"),
        pytest.param(changed(RESULT, {}), ["expected a list"], id="result an object"),
        pytest.param(changed((*RESULT, 0), "click"), ["each an object"], id="a region a word"),
        pytest.param(changed((*RESULT, 0, "value"), None), ["expected an object"], id="value null"),
        pytest.param(changed((*RESULT, 0, "value", "x"), "ten"), ["expected a number"], id="x a word"),
        pytest.param(changed((*RESULT, 0, "value", "x"), -5), ["outside the image"], id="left of the image"),
        pytest.param(changed((*RESULT, 0, "value", "y"), 101), ["outside the image"], id="below the image"),
        pytest.param(changed((*RESULT, 0, "value", "y"), 10**400), [], id="y beyond all"),
        pytest.param(changed((*RESULT, 0, "original_width"), 450), ["450 x 300"], id="wrong width"),
        pytest.param(changed((*RESULT, 0, "original_height"), 0), ["whole pixels"], id="no height"),
        pytest.param(changed((*RESULT, 0, "original_width"), None), ["original_width"], id="width missing"),
        pytest.param(changed((*RESULT, 0, "is_positive"), "yes"), ["true or false"], id="sign a word"),
        pytest.param(changed((*RESULT, 0, "is_positive"), False), ["click the object first"], id="negative only"),
        pytest.param(changed((*RESULT, 0, "to_name"), "img"), ["'img'"], id="unknown image tag"),
        pytest.param(changed((*RESULT, 0, "image_rotation"), 90), ["rotated"], id="rotated"),
        pytest.param(ask(*(click(31, 40, region=f"c{n}") for n in range(10_000))), ["10000 clicks"], id="10000 clicks"),
        pytest.param(ask(box(20, 20, 0, 0)), ["empty"], id="empty box"),
    ],
)
def test_bad_input_is_declined_with_a_sentence_and_the_next_request_works(client, caplog, body, words):
    assert_declined(client, caplog, body, *words)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("/data/upload/3/nowhere.png", ["404"]),
        ("/data/upload/3/forbidden.png", ["403"]),
        ("/data/upload/9/large.bin", ["GRACO_IMAGE_MAX_MB"]),
        ("/data/upload/9/text.png", ["not an image"]),
        ("http://127.0.0.1:1/x.png", ["127.0.0.1"]),
        ("http://unknown.invalid/x.png", ["unknown.invalid"]),
        ("file:///etc/passwd", []),
        ("../../etc/passwd", []),
        ("s3://bucket/x.png", ["404"]),
        ("\x00", []),
        ("data:image/png;base64,AAAA", []),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isprintable() else "",
)
def test_an_image_that_cannot_be_had_is_a_sentence(client, caplog, label_studio, uri, words):
    label_studio.add("/data/upload/9/large.bin", bytes(3 * 2**20))
    label_studio.add("/data/upload/9/text.png", b"no image at all")
    assert_declined(client, caplog, ask(click(31, 40), image=uri), *words)


def test_an_image_of_too_many_pixels_is_declined_before_it_is_decoded(
    client, caplog, service, monkeypatch, label_studio
):
    uri = label_studio.add("/data/upload/9/wide.png", picture(300, 200))
    monkeypatch.setattr(service.images, "_max_pixels", 50_000)
    assert_declined(client, caplog, ask(click(31, 40, size=(300, 200)), image=uri), "GRACO_IMAGE_MAX_MEGAPIXELS")


def test_unknown_tags_and_labels_around_a_click_are_passed_over(client):
    stranger = {"id": "z", "type": "hologram", "from_name": "holo", "to_name": "image", "value": {"depth": 3}}
    assert one(post(client, ask(click(31, 40, label="Nobody knows"), [stranger])))["result"]


def test_a_body_over_the_limit_is_413_with_the_setting_to_raise(make_service, caplog):
    client = create_app(make_service(start=False, request_max_mb=1)).test_client()
    response = post(client, b" " * (2**20 + 1))
    assert response.status_code == 413
    assert "GRACO_REQUEST_MAX_MB" in response.json["error"]
    assert "GRACO_REQUEST_MAX_MB" in caplog.text


@pytest.mark.parametrize("drafts", [5, None, {}, [5], [{"result": 7}], [{"result": [{"type": None}]}], "x"])
def test_drafts_that_are_none_do_not_matter(client, drafts):
    config = GOOD["label_config"].replace(
        "</View>", '<Number name="n" toName="image" min="0" max="1" defaultValue="0.5"/></View>', 1
    )
    assert one(post(client, changed(("tasks", 0, "drafts"), drafts, ask(click(31, 40), config=config))))["result"]


@pytest.mark.parametrize("route", ["/setup", "/webhook", "/train"])
@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"null", b"5", b'"\xff"', b"[" * 100_000], ids=repr)
def test_other_routes_decline_what_is_no_object(client, caplog, route, body):
    assert_declined(client, caplog, body[:200_000], route=route)


@pytest.mark.parametrize(
    "event",
    [
        {"action": None},
        {"action": ["TASKS_CREATED"]},
        {},
    ],
    ids=str,
)
def test_an_event_without_an_action_is_declined(client, caplog, event):
    assert_declined(client, caplog, event, "action", route="/webhook")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.sampled_from(["image", "click", "$image", "brushlabels", "\ud800", "999" * 30, "-1"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for key, inner in items:
        if key not in ("parsed_label_config", "rle"):
            yield from paths(inner, (*path, key))


@pytest.mark.parametrize(
    ("route", "names"),
    [
        ("/predict", [*INTERACTIVE[:12], *BATCHES]),
        ("/webhook", WEBHOOKS),
        ("/setup", recordings("setup")),
    ],
    ids=str,
)
def test_no_change_to_a_recorded_request_makes_an_error_of_our_own(client, route, names):
    bodies = [recorded(name) for name in names]
    places = [list(paths(body)) for body in bodies]

    @settings(
        max_examples=150,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def mutate(data):
        which = data.draw(st.integers(0, len(bodies) - 1))
        body = copy.deepcopy(bodies[which])
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from(places[which]))
            value = data.draw(VALUES)
            with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
                body = changed(path, value, body) if path else value
        text = json.dumps(body).encode()
        cut = data.draw(st.sampled_from([None, None, None, len(text) // 2]))
        response = post(client, text[:cut], route)
        assert response.status_code < 500, response.text
        assert "internal error" not in response.text

    mutate()
    assert one(post(client, GOOD))["result"]


# --- drafts and logs ---


@pytest.mark.parametrize("numbered", [False, True], ids=["drafts not needed", "drafts hold the level"])
def test_two_hundred_regions_in_the_drafts_do_not_slow_a_click(client, numbered):
    rng = np.random.default_rng(3)
    mask = np.zeros((1500, 1000), bool)
    for y, x in rng.integers(0, 900, (12, 2)):
        mask[y : y + 60, x : x + 60] ^= rng.random((60, 60)) < 0.9
    region = {
        **{"id": "r", "type": "brushlabels", "from_name": "mask", "to_name": "image"},
        "value": {"format": "rle", "rle": brush.encode(mask), "brushlabels": ["Object"]},
    }
    config = GOOD["label_config"]
    if numbered:
        config = config.replace("<Header", '<Number name="n" toName="image" min="0" max="1"/><Header', 1)
    few = json.dumps(ask(click(31, 40), config=config, drafts=["REGIONS"])).encode()
    draft = b'{"id": 1, "updated_at": "2026-11-21T08:41:52Z", "result": [%s]}'
    many = few.replace(b'"REGIONS"', draft % b",".join([json.dumps(region).encode()] * 200))
    few = few.replace(b'"REGIONS"', draft % b"")
    assert len(many) > 4 * 2**20
    times = {few: [], many: []}
    for _ in range(9):
        for body, taken in times.items():
            start = time.perf_counter()
            assert one(post(client, body))["result"]
            taken.append(time.perf_counter() - start)
    added_s = statistics.median(times[many]) - statistics.median(times[few])
    assert added_s < 0.025 * len(many) / 2**20, "no more than skipping over the bytes"


def test_no_token_body_or_pixel_is_ever_logged(make_service, caplog, label_studio):
    caplog.set_level(logging.DEBUG)
    service = make_service(log_level="DEBUG")
    client = create_app(service).test_client()
    canary = "canary-7f3a"
    body = ask(click(31, 40, label="Object"))
    body["tasks"][0]["data"]["note"] = canary
    body["tasks"][0]["meta"] = {"text": canary}
    body["params"]["login"] = body["params"]["password"] = canary
    body["params"]["context"]["result"].append(
        body["params"]["context"]["result"][0]
        | {"type": "textarea", "from_name": "phrase", "value": {"text": [canary]}}
    )
    answer = one(post(client, body))
    assert answer["result"]
    post(client, {"project": "3.1", "schema": make_config(["A"]), "access_token": canary, "hostname": "h"}, "/setup")
    post(client, {"action": "ANNOTATION_CREATED", "annotation": {"id": 1, "result": answer["result"]}}, "/webhook")
    post(client, {"action": "PROJECT_UPDATED", "project": {"token": canary}}, "/webhook")
    post(client, ask(click(31, 40), image=f"/data/upload/3/nowhere.png?signature={canary}"))
    post(client, ask(click(31, 40), image=f"data:image/png;base64,{canary}"))
    assert len(caplog.records) >= 5
    for record in caplog.records:
        line = record.getMessage() + str(record.exc_info) + str(record.args)
        assert canary not in line, line
        assert TOKEN not in line
        assert str(answer["result"][0]["value"]["rle"][:12])[1:-1] not in line


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (b'{"value": {"rle": [0, 255, 7], "x": 1}}', {"value": {"rle": [], "x": 1}}),
        (b'{"rle":[1,2],"y":{"rle"\n:\t[3]}}', {"rle": [], "y": {"rle": []}}),
        (b'{"text": "\\"rle\\": [1, 2]", "rle": []}', {"text": '"rle": [1, 2]', "rle": []}),
        (b'{"rle": ["a]b", 1], "rle ": [1]}', {"rle": ["a]b", 1], "rle ": [1]}),
        (b'{"a": ["rle", [1, 2]], "rle": 5, "b": [3]}', {"a": ["rle", [1, 2]], "rle": 5, "b": [3]}),
        (b'{"rle": [[1], 2], "b": "rle"}', {"rle": [[1], 2], "b": "rle"}),
    ],
)
def test_masks_are_emptied_before_a_body_is_read_and_nothing_else_is_touched(body, left):
    assert json.loads(without_masks(body)) == left


@pytest.mark.parametrize("body", [b'{"rle": [1, 2', b'"rle"', b'"rle":[', b"", b'{"rle" [1]}'])
def test_a_broken_body_is_left_as_it_is(body):
    assert without_masks(body) == body
