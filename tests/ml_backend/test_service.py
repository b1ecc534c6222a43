"""One model, many threads, two tiers of caches: what is answered depends on the request alone."""

import io
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ImageDraw

import ml_backend.families
import ml_backend.service
from ml_backend import gunicorn_settings
from ml_backend.app import create_app
from ml_backend.images import TaskImage
from ml_backend.label_config import read_config
from ml_backend.predictions import predict_tasks
from ml_backend.service import BoundedCache, Service, serving_version
from ml_backend.settings import Settings
from model.light.segmenter import LightSegmenter
from model.segmenter import BUNDLED_ADAPTER
from model.types import Click, Granularity, Prompt, Refusal
from tests.conftest import ROOT, lawn
from tests.ml_backend.conftest import CHELSEA, SIZES, ask, box, click, picture, wait_until

COFFEE = "/data/upload/3/f4aecc9d-coffee.jpg"
PROMPT = Prompt(clicks=(Click(x=140, y=120, positive=True),))


def answered(service, body):
    config = read_config(body["label_config"])
    return predict_tasks(service, config, body["tasks"], body["params"]["context"], project="3")


def mixed_requests():
    """Different in image, level, clicks, box, output and number of clicks."""
    for image, size in ((CHELSEA, SIZES["chelsea"]), (COFFEE, SIZES["coffee"])):
        for output in ("brush", "bitmask", "polygon", "rectangle"):
            for level in (None, "0.1", "1.0"):
                yield ask(click(31, 40, level=level, size=size), image=image, output=output)
                yield ask(click(75, 50, level=level, size=size, label="Part"), image=image, output=output)
            more = click(75, 50, size=size, positive=False, region="c2")
            yield ask(click(31, 40, size=size), more, image=image, output=output)
            yield ask(box(60, 15, 30, 70, size=size), image=image, output=output)


def test_sixteen_threads_with_200_mixed_requests_each_get_the_answers_computed_one_by_one(make_service, counted):
    alone = make_service(embedding_memory_mb=64)
    requests = list(mixed_requests())
    expected = [json.dumps(answered(alone, request)) for request in requests]
    assert len(set(expected)) == len(requests)
    crowded = make_service(embedding_memory_mb=8)
    crowded.shapes = BoundedCache(250_000)  # so small that answers are forgotten and made again all the while
    crowded._states = BoundedCache(8 * 2**20)  # some six steps
    wrong = []

    def annotate(seed):
        for index in np.random.default_rng(seed).zipf(1.4, 200) % len(requests):
            got = json.dumps(answered(crowded, requests[index]))
            if got != expected[index]:
                wrong.append((seed, int(index), got[:200]))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(annotate, range(16)))
    assert wrong == []
    assert 100 < counted("graco_repeated_answers_total") < 3000, "some answers were kept, some made again"


def test_the_same_request_gets_the_same_answer_cold_warm_after_a_restart_and_after_eviction(
    make_service, counted, segmenter, monkeypatch
):
    monkeypatch.setattr(ml_backend.families, "load_segmenter", lambda *args, **kwargs: segmenter)  # encodes each time
    body = ask(click(31, 40, level="0.5"), click(40, 45, region="c2", positive=False, level="0.5"))
    first = make_service()
    cold = answered(first, body)
    assert cold[0]["result"]
    warm = answered(first, body)
    first.shapes = BoundedCache(1)
    from_states = answered(first, body)
    first._states = BoundedCache(1)
    replayed = answered(first, body)
    encoded = counted("graco_embeddings_total", source="encoded")
    restarted = make_service()
    assert answered(restarted, body) == cold
    assert warm == from_states == replayed == cold
    assert counted("graco_embeddings_total", source="encoded") == encoded, "the disk tier had it"

    evicted = make_service(folder=first.settings.data_dir.parent / "no-disk", embedding_disk_mb=0)
    assert answered(evicted, body) == cold
    evicted._cache._memory.clear()
    evicted.shapes = BoundedCache(1)
    assert answered(evicted, body) == cold
    assert counted("graco_embeddings_total", source="encoded") == encoded + 2


def test_eight_threads_asking_for_one_new_image_encode_it_once(make_service, label_studio, counted, segmenter):
    service = make_service()
    image = TaskImage(1, label_studio.add("/data/upload/9/new.png", picture(120, 90, shade=5)))
    together = threading.Barrier(8)

    def first_click(_):
        together.wait()
        info = service.identify(image)
        prompt = Prompt(clicks=(Click(x=37, y=36, positive=True),))
        return service.answer(service.serving(None).segmenter, image, info, prompt).best.mask

    with ThreadPoolExecutor(8) as pool:
        masks = list(pool.map(first_click, range(8)))
    assert counted("graco_embeddings_total", source="encoded") == 1
    assert label_studio.asked["/data/upload/9/new.png"] == 1, "fetched and decoded once too"
    assert all(np.array_equal(mask, masks[0]) for mask in masks)


def test_health_and_setup_answer_while_the_model_loads_and_the_first_click_waits_for_it(
    make_service, segmenter, monkeypatch
):
    go = threading.Event()

    def slow(*args, **kwargs):
        go.wait(30)
        return segmenter

    monkeypatch.setattr(ml_backend.families, "load_segmenter", slow)
    client = create_app(make_service()).test_client()
    with ThreadPoolExecutor(1) as pool:
        first_click = pool.submit(lambda: post_elsewhere(client, ask(click(31, 40))))
        start = time.perf_counter()
        health = client.get("/health").json
        setup = client.post("/setup", json={"project": "3.1", "schema": ask()["label_config"]})
        assert time.perf_counter() - start < 1
        assert (health["status"], health["model_loaded"]) == ("UP", False)
        assert setup.json == {"model_version": health["model_version"]}
        assert not first_click.done()
        go.set()
        assert first_click.result(60)["results"][0]["result"]
    assert client.get("/health").json["model_loaded"] is True


def test_waiting_clicks_leave_places_for_health_and_one_too_many_is_told_so(make_service, segmenter, monkeypatch):
    go = threading.Event()

    def slow(*args, **kwargs):
        go.wait(30)
        return segmenter

    monkeypatch.setattr(ml_backend.families, "load_segmenter", slow)
    client = create_app(make_service(threads=4)).test_client()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(post_elsewhere, client, ask(click(31, 40 + i))) for i in range(3)]
        while client.get("/health").status_code == 200 and sum(f.running() for f in waiting) < 3:
            time.sleep(0.01)
        time.sleep(0.2)
        refused = post_elsewhere(client, ask(click(20, 20)))["results"][0]
        assert refused["result"] == []
        assert "busy" in refused["reason"]
        go.set()
        assert all(f.result(60)["results"][0]["result"] for f in waiting)
    assert post_elsewhere(client, ask(click(20, 20)))["results"][0]["result"]


def post_elsewhere(client, body):
    return client.application.test_client().post("/predict", json=body).json


def test_a_model_that_cannot_be_loaded_gives_refusals_with_its_reason_and_health_says_failed(make_service, monkeypatch):
    def broken(*args, **kwargs):
        raise Refusal("weights light.safetensors are damaged; restore the file from the repository")

    monkeypatch.setattr(ml_backend.families, "load_segmenter", broken)
    service = make_service()
    client = create_app(service).test_client()
    answer = client.post("/predict", json=ask(click(31, 40)))
    assert answer.status_code == 200
    assert answer.json["results"][0]["result"] == []
    assert "weights light.safetensors are damaged" in answer.json["results"][0]["reason"]
    health = client.get("/health")
    assert (health.status_code, health.json["status"]) == (200, "FAILED")
    assert "damaged" in health.json["error"]
    assert client.post("/setup", json={"project": "3.1"}).status_code == 200


def test_the_bundled_weights_load_by_the_service_itself_and_a_second_start_does_nothing(tmp_path, segmenter):
    settings = ml_backend.service.Settings(data_dir=tmp_path, encoder="exact", device="cpu")
    service = ml_backend.service.Service(settings)
    service.start()
    service.start()
    try:
        wait_until(lambda: service.ready, limit_s=90)
        adapter = service.serving(None).segmenter.adapter
        assert service.version(None) == f"{segmenter.version}+{adapter.removeprefix('light-')}"
        assert service.serving(None).segmenter.version == segmenter.version
    finally:
        service.close()


def test_the_version_names_the_pair_that_serves_before_anything_is_loaded(tmp_path, segmenter):
    assert serving_version(Settings(adapter="none")) == segmenter.version
    own = tmp_path / "cars.safetensors"
    own.write_bytes(BUNDLED_ADAPTER.read_bytes())
    bundled, mine = (serving_version(Settings(adapter=choice)) for choice in ("bundled", own))
    assert bundled.startswith(f"{segmenter.version}+granularity-")
    assert mine.partition("+")[2] == bundled.partition("+granularity-")[2].join(["cars-", ""])


def test_an_adapter_that_does_not_load_is_told_by_health_and_by_each_answer(
    tmp_path, make_service, segmenter, monkeypatch
):
    def load(*args, adapter, **kwargs):
        return segmenter.with_adapter(adapter)

    monkeypatch.setattr(ml_backend.families, "load_segmenter", load)
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(BUNDLED_ADAPTER.read_bytes()[:1000])
    client = create_app(make_service(adapter=wrong)).test_client()
    reason = client.post("/predict", json=ask(click(31, 40))).json["results"][0]["reason"]
    assert f"adapter {wrong} cannot be read" in reason
    health = client.get("/health").json
    assert health["status"] == "FAILED"
    assert f"adapter {wrong} cannot be read" in health["error"]


def test_no_cache_holds_an_answer_of_one_adapter_for_another(make_service, segmenter):
    """As after a change of the adapter while the service runs."""
    service = make_service()
    body = ask(click(31, 40, level="0.3"), click(36, 44, region="c2", level="0.3"))
    with_adapter = shape(answered(service, body))
    service._segmenter = segmenter
    without = shape(answered(service, body))
    base = shape(answered(make_service(adapter="none"), body))
    assert without == base != with_adapter


def shape(results):
    return results[0]["result"][0]["value"]


def test_the_first_click_with_a_level_imports_nothing():
    """What it needs is imported when the model is loaded, not while an annotator waits."""
    code = """if True:
        import sys
        import ml_backend.service
        from model.segmenter import BUNDLED, BUNDLED_ADAPTER, load_segmenter, predict
        from model.types import Click, Granularity, Prompt
        import numpy as np
        segmenter = load_segmenter("light", BUNDLED, adapter=BUNDLED_ADAPTER, device="cpu", encoder="exact")
        before = set(sys.modules)
        encoded = segmenter.encode(np.zeros((48, 64, 3), np.uint8))
        prompt = Prompt(clicks=(Click(x=9, y=9, positive=True),), granularity=Granularity(3))
        predict(segmenter, encoded, prompt)
        print(*(set(sys.modules) - before))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_images_waiting_to_be_encoded_are_bounded_and_each_waits_once(make_service, monkeypatch):
    service = make_service()
    go = threading.Event()
    monkeypatch.setattr(service, "encode_ahead", lambda image: go.wait(30))
    images = [TaskImage(n, f"/data/upload/1/{n}.jpg") for n in range(100)]
    assert sum(service.warm(image) for image in images) == 64
    assert service.warm(images[0]), "it waits already"
    assert not service.warm(images[99])
    go.set()
    wait_until(lambda: not service._waiting)
    assert service.warm(images[99])


def test_earlier_steps_are_kept_by_the_memory_they_take(make_service):
    service = make_service()
    service._states = BoundedCache(5 * 2**20)
    for n in range(6):
        answered(service, ask(click(20 + n, 40, level="0.5")))
    held = [state.nbytes for state, _ in service._states._values.values()]
    assert 1 < len(held) < 6
    assert service._states._held == sum(held) <= 5 * 2**20


@pytest.fixture
def three_clicks(make_service, label_studio, monkeypatch):
    """A service, the request of the fourth click on a small thing, and the threads that looked closer at it so far.

    The first three are answered.
    """
    image = lawn(1200, 1800, (0.02, 0.02, 0.01))
    ImageDraw.Draw(image).ellipse((1180, 780, 1260, 840), fill=(190, 40, 30))
    file = io.BytesIO()
    image.save(file, "PNG")
    uri = label_studio.add("/data/upload/9/far.png", file.getvalue())
    looked, look_at = [], LightSegmenter._look_at

    def noted(*args):
        looked.append(threading.current_thread().name)
        return look_at(*args)

    monkeypatch.setattr(LightSegmenter, "_look_at", noted)
    spots = ((1220, 810), (1240, 800), (1195, 815), (1215, 790))
    regions = [click(x / 18, y / 12, region=f"c{n}", level="1.0", size=(1800, 1200)) for n, (x, y) in enumerate(spots)]

    def begin(service):
        for n in range(1, 4):
            answered(service, ask(*regions[:n], image=uri))
        return service, ask(*regions, image=uri), looked

    return lambda **chosen: begin(make_service(**chosen))


def test_the_fourth_click_on_a_small_thing_finds_it_encoded(three_clicks, monkeypatch, tmp_path):
    service, fourth, looked = three_clicks()
    wait_until(lambda: not service._foreseen)
    assert [name.startswith("warm") for name in looked] == [True]
    foreseen = answered(service, fourth)
    assert len(looked) == 1
    monkeypatch.setattr(ml_backend.service, "foresee", lambda *args: None)
    service, fourth, looked = three_clicks(folder=tmp_path / "other")
    assert json.dumps(answered(service, fourth)) == json.dumps(foreseen)
    assert [name.startswith("warm") for name in looked] == [True, False]


def test_a_click_that_comes_while_it_is_made_ready_waits_and_nothing_is_encoded_twice(three_clicks, monkeypatch):
    go, waiting = threading.Event(), threading.Event()
    make_ready, wait = Service._make_ready, ml_backend.service.wait
    monkeypatch.setattr(Service, "_make_ready", lambda *args: go.wait(30) and make_ready(*args))
    monkeypatch.setattr(ml_backend.service, "wait", lambda futures: waiting.set() or wait(futures))
    try:
        service, fourth, looked = three_clicks()
        wait_until(lambda: any(future.running() for future in service._foreseen.values()))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(answered, service, fourth)
            assert waiting.wait(30)
            go.set()
            assert answer.result(60)[0]["result"]
    finally:
        go.set()
    wait_until(lambda: not service._foreseen)
    assert [name.startswith("warm") for name in looked] == [True]


def test_a_process_that_ends_drops_what_it_would_have_encoded_ahead(make_service, monkeypatch):
    begun, go = [], threading.Event()
    monkeypatch.setattr(Service, "encode_ahead", lambda self, image: begun.append(image) or go.wait(30))
    service = make_service(start=False)
    app = create_app(service)
    images = [TaskImage(number, f"/data/upload/1/{number}.png") for number in range(3)]
    assert all(service.warm(image) for image in images)
    wait_until(lambda: begun)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(gunicorn_settings.worker_exit, None, SimpleNamespace(wsgi=app))
        wait_until(lambda: not service.warm(TaskImage(9, "/data/upload/1/late.png")))
        assert not ended.done(), "what runs is finished"
        go.set()
        ended.result(30)
    assert begun == images[:1]
    gunicorn_settings.worker_exit(None, SimpleNamespace())  # the arbiter, or a process that has loaded nothing


def test_a_click_does_not_wait_for_what_has_not_begun(three_clicks, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(
        Service, "start", lambda self, start=Service.start: start(self) or self._background.submit(go.wait)
    )
    try:
        service, fourth, looked = three_clicks()
        (future,) = service._foreseen.values()
        assert answered(service, fourth)[0]["result"]
        assert future.cancelled()
    finally:
        go.set()
    assert [name.startswith("warm") for name in looked] == [False]


def test_only_the_annotator_who_goes_on_drops_what_was_made_ready_for():
    spots = tuple(Click(x=100.0 + n, y=100, positive=True) for n in range(4))
    old = "image", "adapter", Prompt(clicks=spots[:3], granularity=Granularity(5))
    further = "image", "adapter", Prompt(clicks=spots, granularity=Granularity(5))
    level = "image", "adapter", Prompt(clicks=spots[:3], granularity=Granularity(2))
    assert all(ml_backend.service._goes_on(new, old) for new in (further, level))
    elsewhere = "image", "adapter", Prompt(clicks=spots[1:], granularity=Granularity(5))
    version = "image", "other", further[2]
    assert not any(ml_backend.service._goes_on(new, old) for new in (elsewhere, version))


@pytest.mark.parametrize("since", [0, 3])
def test_nothing_is_made_ready_while_somebody_waits_for_an_image(three_clicks, monkeypatch, since):
    go = threading.Event()
    monkeypatch.setattr(Service, "_warm", lambda self, image: go.wait(30) and self._waiting.discard(image))
    make_ready, images = Service._make_ready, [TaskImage(1, "x")]
    if since:  # asked for before, and begun after
        monkeypatch.setattr(
            Service, "_make_ready", lambda self, make: self._waiting.add(images[0]) or make_ready(self, make)
        )
    else:
        monkeypatch.setattr(Service, "start", lambda self, start=Service.start: start(self) or self.warm(images[0]))
    try:
        service, fourth, looked = three_clicks()
        if since:
            wait_until(lambda: not service._foreseen and service._waiting)
        assert not service._foreseen
        answered(service, fourth)
    finally:
        go.set()
    assert [name.startswith("warm") for name in looked] == [False]


@pytest.mark.parametrize("at_once", [True, False])
def test_what_cannot_be_made_ready_is_a_line_in_the_log_and_the_click_is_answered(
    three_clicks, monkeypatch, caplog, at_once
):
    def fails(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(ml_backend.service, "foresee", fails if at_once else lambda *args: fails)
    service, fourth, looked = three_clicks()
    assert answered(service, fourth)[0]["result"]
    wait_until(lambda: "made ready for the next click" in caplog.text)
    assert [name.startswith("warm") for name in looked] == [False]


def test_an_image_that_cannot_be_warmed_is_a_sentence_in_the_log(make_service, caplog):
    service = make_service()
    assert service.warm(TaskImage(4, "/data/upload/1/nowhere.png"))
    wait_until(lambda: not service._waiting)
    assert "task 4 was not encoded ahead: " in caplog.text
    assert "404" in caplog.text


def test_an_image_replaced_behind_its_address_is_never_answered_under_the_old_ones_name(make_service, label_studio):
    service = make_service(embedding_disk_mb=0)
    image = TaskImage(5, label_studio.add("/data/upload/9/changing.png", picture(100, 80)))
    old = service.identify(image)
    service._cache._memory.clear()
    label_studio.add(image.uri, picture(100, 80, shade=60))
    prompt = Prompt(clicks=(Click(x=31, y=32, positive=True),))
    with pytest.raises(Refusal, match="replaced"):
        service.answer(service.serving(None).segmenter, image, old, prompt)
    new = service.identify(image)
    assert new.id != old.id
    assert service.answer(service.serving(None).segmenter, image, new, prompt).best.mask.shape == (80, 100)


def test_a_bounded_cache_forgets_what_was_used_longest_ago_and_keeps_nothing_heavier_than_itself():
    cache = BoundedCache(10)
    cache.put("a", "A", 4)
    cache.put("b", "B", 4)
    assert cache.get("a") == "A"
    cache.put("c", "C", 4)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == ("A", None, "C")
    cache.put("huge", "H", 11)
    assert cache.get("huge") is None
    cache.put("a", "A2", 10)
    assert (cache.get("a"), cache.get("c")) == ("A2", None)
