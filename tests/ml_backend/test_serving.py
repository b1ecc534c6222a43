"""Which version answers whom, and how one takes the other's place while people click."""

import itertools
import json
import os
import statistics
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ml_backend.serving
from ml_backend import brush, doctor, families
from ml_backend.__main__ import app
from ml_backend.app import create_app
from ml_backend.embeddings import EmbeddingCache
from ml_backend.label_config import read_config
from ml_backend.label_studio import read_ask
from ml_backend.serving import lines_of
from ml_backend.settings import Settings
from ml_backend.supervisor import web_command
from model.adapter import read_adapter
from model.segmenter import digest_of, predict
from tests.conftest import ROOT
from tests.ml_backend.conftest import SIZES, TOKEN, ask, click, picture, settings_for, wait_until
from tests.ml_backend.test_supervisor import free_port

PROJECT = "3.1795250578"


def publish(registry, line, file, *, activate=True, **card):
    return registry.publish(line, file, card={"recipe": "drawn", "accepted": True} | card, activate=activate)


def name(registry, version):
    return f"light-{registry.base[:8]}+{version.line}-{version.id}"


def answer(client, *, project=PROJECT, place=(31, 40)):
    """What one click with a level is answered."""
    body = ask(click(*place, level="0.5")) | {"project": project}
    response = client.post("/predict", json=body)
    assert response.status_code == 200
    (result,) = response.json["results"]
    assert result["result"], result
    return result


def mask_of(result, size=SIZES["chelsea"]):
    return brush.decode(result["result"][0]["value"]["rle"], height=size[1], width=size[0])


def setup(client, project=PROJECT):
    return client.post("/setup", json={"project": project}).json["model_version"]


def test_a_project_is_served_by_its_own_version_else_by_the_shared_one_else_by_the_configured_adapter(
    make_service, registry, trained
):
    mine, shared = publish(registry, "project-3", trained[0]), publish(registry, "shared", trained[1])
    service = make_service()
    client = create_app(service).test_client()
    asked = {
        project: (answer(client, project=project)["model_version"], setup(client, project))
        for project in (PROJECT, "3", "4.17952", "no id")
    }
    ours, theirs = name(registry, mine), name(registry, shared)
    assert asked == {PROJECT: (ours,) * 2, "3": (ours,) * 2, "4.17952": (theirs,) * 2, "no id": (theirs,) * 2}
    assert client.get("/health").json["model_version"] == theirs
    registry.activate("shared", None)
    assert setup(client, "4.1") == answer(client, project="4.1")["model_version"]
    assert "+granularity-" in setup(client, "4.1")
    assert setup(client) == ours

    together = create_app(make_service(adapter_line="shared")).test_client()
    assert "+granularity-" in answer(together)["model_version"]


def test_versions_names_the_one_that_answers_and_those_it_could_be(make_service, registry, trained):
    first, second = (publish(registry, "project-3", file) for file in trained[:2])
    shared = publish(registry, "shared", trained[2], activate=False)
    publish(registry, "project-4", trained[2])
    registry.activate("project-3", first.id)
    service = make_service()
    client = create_app(service).test_client()
    told = client.get("/versions", json={"project": PROJECT}).json["versions"]
    assert told[:3] == [name(registry, first), name(registry, second), name(registry, shared)]
    assert (len(told), "+granularity-" in told[3]) == (4, True)
    assert client.get(f"/versions?project={PROJECT}").json["versions"] == told
    assert len(client.get("/versions").json["versions"]) == 2


def test_each_answer_is_exactly_what_the_version_it_names_gives_also_from_the_caches(make_service, registry, trained):
    """The caches are shared: a click that one version has answered is asked of the other."""
    first, second = (publish(registry, "project-3", file) for file in trained[:2])
    service = make_service()
    client = create_app(service).test_client()
    body = ask(click(31, 40, level="0.5"), click(36, 44, region="c2", level="0.5"))
    alone = {}
    for version in (first, second, first, second):
        registry.activate("project-3", version.id)
        wait_until(lambda version=version: setup(client) == name(registry, version))
        (result,) = client.post("/predict", json=body).json["results"]
        assert result["model_version"] == name(registry, version)
        assert all(region["id"] for region in result["result"])
        assert alone.setdefault(version.id, result) == result
        remembered = service.answers.find(result["result"][0]["id"])
        assert remembered.model_version == name(registry, version)
        assert remembered.adapter == f"adapter-{version.digest[:8]}"
    assert not np.array_equal(mask_of(alone[first.id]), mask_of(alone[second.id]))
    assert alone[first.id]["result"][0]["id"] != alone[second.id]["result"][0]["id"]


def test_clicks_are_answered_by_the_old_version_while_the_new_one_is_loaded(
    make_service, registry, trained, segmenter, monkeypatch
):
    first = publish(registry, "project-3", trained[0])
    client = create_app(make_service()).test_client()
    answer(client)
    go, load = threading.Event(), type(segmenter).with_adapter

    def slow(self, adapter):
        go.wait(30)
        return load(self, adapter)

    monkeypatch.setattr(type(segmenter), "with_adapter", slow)
    second = publish(registry, "project-3", trained[1])
    for place in range(5):
        assert answer(client, place=(30, 40 + place))["model_version"] == setup(client) == name(registry, first)
    third = publish(registry, "project-3", trained[2])
    go.set()
    wait_until(lambda: answer(client)["model_version"] == name(registry, third))
    assert name(registry, second) != setup(client) == name(registry, third)


def test_a_first_version_is_loaded_without_a_click_or_setup_that_asks_for_it(make_service, registry, trained):
    service = make_service()
    client = create_app(service).test_client()
    assert "+granularity-" in answer(client)["model_version"]
    first = publish(registry, "project-3", trained[0])
    wait_until(lambda: "project-3" in (lines := service._active._lines) and lines["project-3"].version == first.id)
    assert answer(client)["model_version"] == name(registry, first)


def spoil(registry, version, how):
    """Damage a version where it is kept, past what publish and activate would let through."""
    path = registry.path(version)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "bit flipped":
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)
    elif how == "not a number":
        tensors, card = load_file(path), json.dumps(read_adapter(path).card)
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, path, {"card": card})
        told = path.with_name("card.json")
        told.write_text(told.read_text().replace(version.digest, digest_of(path.read_bytes())))
    elif how == "of another base":
        told = path.with_name("card.json")
        told.write_text(told.read_text().replace(registry.base, "ab" * 32))
    elif how == "gone":
        path.unlink()
    (path.parent.parent / "ACTIVE").write_text(f"{version.id if how != 'not named' else 'nonsense'}\n")


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "not a number", "of another base", "gone", "not named"])
def test_a_version_that_cannot_be_loaded_is_told_once_and_the_old_one_serves_on(
    make_service, registry, trained, monkeypatch, caplog, how
):
    monkeypatch.setattr(ml_backend.serving, "_RETRY_S", 0.1)
    bad = publish(registry, "project-3", trained[1], activate=False)
    good = publish(registry, "project-3", trained[0])
    client = create_app(make_service()).test_client()
    before = answer(client)
    spoil(registry, bad, how)
    warning = wait_until(lambda: client.get("/health").json.get("warning"))
    time.sleep(0.8)
    assert answer(client) == before
    assert setup(client) == before["model_version"] == name(registry, good)
    health = client.get("/health")
    assert (health.status_code, health.json["status"]) == (200, "UP")
    assert "line project-3" in warning
    assert "python -m ml_backend adapters activate project-3" in warning
    assert caplog.text.count("line project-3: ") == 1
    registry.activate("project-3", good.id)
    wait_until(lambda: "warning" not in client.get("/health").json)


def test_a_process_that_starts_with_a_damaged_version_is_served_by_the_next_line(make_service, registry, trained):
    shared, bad = publish(registry, "shared", trained[0]), publish(registry, "project-3", trained[1])
    spoil(registry, bad, "truncated")
    client = create_app(make_service()).test_client()
    assert answer(client)["model_version"] == name(registry, shared)
    assert "damaged" in client.get("/health").json["warning"]


def test_a_process_that_starts_with_a_damaged_version_is_served_by_the_one_before_it(
    make_service, registry, trained, monkeypatch
):
    monkeypatch.setattr(ml_backend.serving, "_RETRY_S", 0.1)
    publish(registry, "shared", trained[2])
    good, bad = (publish(registry, "project-3", trained[n]) for n in range(2))
    whole = registry.path(bad).read_bytes()
    spoil(registry, bad, "truncated")
    client = create_app(make_service()).test_client()
    assert answer(client)["model_version"] == name(registry, good)
    time.sleep(0.8)  # it is tried again meanwhile
    assert setup(client) == answer(client)["model_version"] == name(registry, good)
    warning = client.get("/health").json["warning"]
    assert "damaged" in warning
    assert "what served before goes on" in warning
    registry.path(bad).write_bytes(whole)
    wait_until(lambda: answer(client)["model_version"] == name(registry, bad))
    wait_until(lambda: "warning" not in client.get("/health").json)


def test_versions_used_longest_ago_are_forgotten_and_loaded_again(make_service, registry, trained, monkeypatch):
    monkeypatch.setattr(ml_backend.serving, "_KEPT", 2)
    versions = [publish(registry, f"project-{n}", trained[n % 3]) for n in range(1, 5)]
    service = make_service()
    client = create_app(service).test_client()
    for n in (1, 2, 3, 4, 1, 4):
        assert answer(client, project=str(n))["model_version"] == name(registry, versions[n - 1])
        assert len(service._active._loaded) <= 2


def test_of_a_line_that_goes_on_the_version_that_serves_and_the_one_before_stay_in_memory(
    make_service, registry, trained
):
    first = publish(registry, "project-3", trained[0])
    service = make_service()
    client = create_app(service).test_client()
    assert answer(client)["model_version"] == name(registry, first)
    for adapter in (trained[1], trained[2]):
        before, version = registry.active("project-3"), publish(registry, "project-3", adapter)
        wait_until(lambda version=version: answer(client)["model_version"] == name(registry, version))
        assert set(service._active._loaded) == {("project-3", before.id), ("project-3", version.id)}
    registry.activate("project-3", first.id)
    wait_until(lambda: answer(client)["model_version"] == name(registry, first))


@pytest.mark.parametrize(
    ("project", "lines"),
    [
        (PROJECT, ("project-3", "shared")),
        (3, ("project-3", "shared")),
        ("003", ("project-3", "shared")),
        (None, ("shared",)),
        ("../3", ("shared",)),
        ("3.x", ("shared",)),
    ],
)
def test_a_projects_line_is_read_from_what_label_studio_sends(project, lines):
    assert lines_of(Settings(), project) == lines
    assert lines_of(Settings(adapter_line="shared"), project) == ("shared",)


# --- two web processes ---


@pytest.fixture
def web(tmp_path, label_studio):
    """Start a web process over one data folder, as the supervisor does; gives its address."""
    started = []

    def start():
        settings = settings_for(tmp_path / "data", label_studio, port=free_port())
        environment = os.environ | {
            **{"GRACO_DATA_DIR": str(settings.data_dir), "GRACO_ENCODER": "exact", "GRACO_DEVICE": "cpu"},
            "GRACO_AUTH": "off",
            **{"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": TOKEN, "GRACO_COMPUTE_THREADS": "1"},
        }
        log = (tmp_path / f"web-{len(started)}.log").open("wb")
        process = subprocess.Popen(web_command(settings), cwd=ROOT, env=environment, stdout=log, stderr=log)
        log.close()
        started.append(process)
        return f"http://127.0.0.1:{settings.port}"

    yield start
    for process in started:
        process.terminate()
        process.wait(30)


def post(url, path, body):
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=100) as response:
        return json.load(response)


def loaded(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return json.load(response)["model_loaded"]
    except OSError:
        return False


def asked_directly(segmenter, cache, body):
    """The mask that a version gives, and no service in between."""
    read = read_ask(*(read_config(body["label_config"]), body["tasks"][0], body["params"]["context"]))
    encoded = cache.get(digest_of(picture(*SIZES["chelsea"])))
    return predict(segmenter, encoded, segmenter.understood(read.prompt)).best.mask


@pytest.fixture
def _one_thread():
    """Sums in one order, as in the web processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_two_processes_switch_ten_times_while_people_click_and_each_answer_is_of_the_version_it_names(
    web, registry, trained, segmenter, tmp_path
):
    publish(registry, "project-3", trained[0])
    urls = [web(), web()]
    wait_until(lambda: all(loaded(url) for url in urls), limit_s=180)
    places = itertools.product((25, 31, 37, 70), ("0.2", "0.5", "0.9"))
    bodies = [ask(click(x, 42, level=level)) for x, level in places]
    config = {"project": PROJECT, "schema": bodies[0]["label_config"]}
    post(urls[0], "/predict", bodies[0])  # the picture is encoded

    cache = EmbeddingCache(tmp_path / "data" / "embeddings" / segmenter.encoding, memory_bytes=2**24, disk_bytes=2**30)
    adapted = [segmenter.with_adapter(file) for file in trained[:2]]
    pairs = [[asked_directly(one, cache, body) for one in adapted] for body in bodies]
    told = [place for place, (a, b) in enumerate(pairs) if a.any() and b.any() and not np.array_equal(a, b)]
    assert len(told) >= 3, "these prompts tell the versions apart"
    bodies = [bodies[place] for place in told]
    masks = [[pairs[place][n] for place in told] for n in (0, 1)]
    expected = {name(registry, registry.active("project-3")): masks[0]}
    versions = []
    for n in range(1, 11):  # each is loaded anew, though there are but two adapters
        versions.append(publish(registry, "project-3", trained[n % 2], activate=False, snapshot=str(n)))
        expected[name(registry, versions[-1])] = masks[n % 2]

    stop, wrong, answered = threading.Event(), [], []

    def annotate(url, seed):
        for index in np.random.default_rng(seed).integers(len(bodies), size=100_000):
            if stop.is_set():
                return
            try:
                (result,) = post(url, "/predict", bodies[index])["results"]
                same = np.array_equal(mask_of(result), expected[result["model_version"]][index])
            except Exception as error:
                wrong.append(error)
                continue
            answered.append((url, result["model_version"]))
            if not same:
                wrong.append((int(index), result["model_version"]))

    waits = []
    with ThreadPoolExecutor(6) as pool:
        people = [pool.submit(annotate, url, seed) for seed, url in enumerate(urls * 2)]
        try:
            for version in versions:
                registry.activate("project-3", version.id)
                start, new = time.perf_counter(), name(registry, version)
                wait_until(lambda new=new: all(post(u, "/setup", config)["model_version"] == new for u in urls))
                waits.append(time.perf_counter() - start)
                wait_until(lambda new=new: {(url, new) for url in urls} <= set(answered) or wrong)
        finally:
            stop.set()
        for person in people:
            person.result(60)
    assert wrong == []
    others = os.getloadavg()[0] / (os.cpu_count() or 1)  # a busy machine takes longer, and says nothing
    assert statistics.median(waits) < max(1.0, others), waits
    assert "ERROR" not in "".join(path.read_text() for path in tmp_path.glob("web-*.log"))


# --- commands and doctor ---


@pytest.fixture
def adapters(tmp_path, monkeypatch):
    monkeypatch.setenv("GRACO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr("ml_backend.logs.configure", lambda *args, **kwargs: None)
    monkeypatch.setenv("COLUMNS", "220")

    def run(*words):
        return CliRunner().invoke(app, ["adapters", *map(str, words)])

    return run


def test_an_admin_lists_compares_activates_goes_back_and_prunes(adapters, registry, trained, tmp_path):
    def asked_for_scores():
        files = list((tmp_path / "data" / "selection").glob("*.due"))
        for file in files:
            file.unlink()
        return [file.name for file in files]

    assert "no version is kept yet" in adapters("list").output
    scores = [{"reference": {"noc90": noc, "curve": [0.1, 0.2]}} for noc in (4.0, 3.5, 6.0)]
    first, second = (publish(registry, "project-3", trained[n], scores=scores[n], seed=n) for n in (0, 1))
    worse = publish(registry, "project-3", trained[2], accepted=False, activate=False, scores=scores[2], note="it lost")
    listed = adapters("list", 3).output
    assert [line.count("serves") for line in listed.splitlines() if "project-3" in line] == [0, 1, 0]
    compared = adapters("compare", "project-3", 1, 2).output
    assert all(word in compared for word in (first.id, second.id, "reference noc90", "4.000", "3.500", "-0.500"))
    assert json.loads(adapters("show", 3, worse.id).output.partition("\n/")[0])["note"] == "it lost"

    refused = adapters("activate", 3, worse.id)
    assert (refused.exit_code, "was rejected: it lost" in refused.output) == (2, True)
    assert registry.active("project-3") == second
    assert asked_for_scores() == []
    assert f"{second.id} -> {worse.id}" in adapters("activate", 3, 3, "--force").output
    assert registry.active("project-3") == worse
    assert asked_for_scores() == ["3.due"]
    assert f"{worse.id} -> {second.id}" in adapters("rollback", 3).output
    assert asked_for_scores() == ["3.due"]
    assert f"removed {worse.id}" in adapters("prune", 3, "--keep", 0).output
    assert registry.versions("project-3") == [first, second]
    assert "none of its own" in adapters("activate", 3, "none").output
    assert registry.active("project-3") is None
    assert asked_for_scores() == ["3.due"]


def test_an_admin_goes_back_from_a_version_without_its_card_past_a_damaged_one(adapters, registry, trained):
    good, damaged, serving = (publish(registry, "project-3", trained[n], seed=n) for n in range(3))
    registry.path(serving).with_name("card.json").unlink()
    registry.path(damaged).write_bytes(b"torn")
    done = adapters("rollback", 3)
    assert f"project-3: {serving.id} -> {good.id}" in done.output
    assert f"passed over: adapter project-3 {damaged.id} is damaged" in done.output
    assert registry.active("project-3") == good


def test_a_version_is_exported_and_imported_by_command(adapters, registry, trained, tmp_path):
    version = publish(registry, "shared", trained[0])
    assert adapters("export", "shared", 1, tmp_path / "out.zip").exit_code == 0
    done = adapters("import", 7, tmp_path / "out.zip")
    (found,) = registry.versions("project-7")
    assert f"adapters activate 7 {found.id}" in done.output
    assert found.digest == version.digest


@pytest.mark.parametrize(
    "words",
    [
        ("show", "shared", "v0009-1a2b3c4d"),
        ("show", "shared", "9"),
        ("activate", "nonsense", "1"),
        ("rollback", "shared"),
        ("prune", "project-8"),
        ("import", "shared", "/no/such/file.zip"),
        ("export", "shared", "1", "/no/such/folder/out.zip"),
        ("compare", "shared", "1", "2"),
    ],
)
def test_what_a_command_cannot_do_is_a_sentence(adapters, registry, trained, words):
    publish(registry, "shared", trained[0], activate=False)
    done = adapters(*words)
    assert done.exit_code == 2
    (sentence,) = done.stderr.splitlines()
    assert len(sentence) > 20


def test_a_wrong_setting_is_a_line_naming_it(adapters, monkeypatch):
    monkeypatch.setenv("GRACO_ADAPTER_LINE", "mine")
    done = adapters("list")
    assert done.exit_code == 2
    assert done.stderr.startswith("GRACO_ADAPTER_LINE: ")


def test_the_doctor_says_which_version_serves_each_line_and_which_does_not_load(
    registry, trained, label_studio, tmp_path, segmenter, monkeypatch
):
    monkeypatch.setattr(families, "load_segmenter", lambda *args, **kwargs: segmenter)
    settings = settings_for(tmp_path / "data", label_studio)

    def look():
        (check,) = doctor._guarded("adapter versions", doctor._versions, settings)
        return check

    assert (look().status, "the configured adapter serves" in look().seen) == ("ok", True)
    good, bad = publish(registry, "shared", trained[0]), publish(registry, "project-3", trained[1])
    assert look().seen == f"served: shared by {good.id}, project-3 by {bad.id}"
    spoil(registry, bad, "bit flipped")
    found = look()
    assert (found.status, "project-3: " in found.seen, "damaged" in found.seen) == ("error", True, True)
    assert "adapters activate project-3 VERSION" in found.remedy
