"""The admin's pages: what they show, what they change, and what they refuse. How they look: tests/e2e."""

import html
import io
import os
import re
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import redis
from PIL import Image
from pydantic import ValidationError
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer

from active_learning.corrections import CorrectionStore
from active_learning.registry import AdapterRegistry
from ml_backend.app import create_app
from ml_backend.inbox import ATTEMPTS
from ml_backend.jobs import CORRECTIONS
from ml_backend.metrics import cache_counts
from ml_backend.scoring import Progress, due_file
from ml_backend.settings import Settings
from ml_backend.trainings import folder_of
from tests.active_learning.corrected import correction
from tests.conftest import ROOT
from tests.ml_backend.conftest import TOKEN, wait_until
from tests.ml_backend.filled import HEIGHT, WIDTH, fill, publish

PAGES = ("/admin", "/admin/corrections", "/admin/training", "/admin/versions")
NOWHERE = "redis://:hidden-word@127.0.0.1:1/0"


@pytest.fixture
def two(registry, trained, tmp_path):
    """Two versions of project 3: the first serves, the second is better."""
    first = publish(registry, trained[0], tmp_path / "one", clicks=4)
    second = publish(registry, trained[1], tmp_path / "two", clicks=2, parent=first.id)
    registry.activate("project-3", first.id)
    return first, second


@pytest.fixture
def make_admin(make_service):
    """A client of the admin's pages over the data folder of `make_service`."""

    def make(**chosen):
        service = make_service(**{"redis_url": NOWHERE} | chosen)
        return create_app(service).test_client(), service

    return make


def page(client, path, status=200):
    answer = client.get(path, follow_redirects=True)
    assert answer.status_code == status, answer.text
    return html.unescape(answer.text)


def send(client, page_path, path, **fields):
    """Send a form as the page at `page_path` has it, and return the page that comes next."""
    token = re.search(r'name="csrf_token" value="([^"]+)"', client.get(page_path).text)[1]
    answer = client.post(path, data={"csrf_token": token} | fields)
    assert answer.status_code == 303, answer.text
    return page(client, answer.location)


@pytest.mark.parametrize("path", PAGES)
def test_with_nothing_there_yet_no_redis_and_a_model_that_does_not_load_pages_say_so(make_admin, monkeypatch, path):
    def fail(*args, **kwargs):
        raise RuntimeError("the weights are gone")

    monkeypatch.setattr("ml_backend.families.load_segmenter", fail)
    client, service = make_admin(start=False)
    loading = page(client, path)
    assert service.failure is None
    service.start()
    wait_until(lambda: service.failure)
    failed = page(client, path)
    if path == "/admin":
        assert "The model is being loaded" in loading
        assert "could not be loaded: the weights are gone" in " ".join(re.sub("<[^>]+>", " ", failed).split())
        assert "does not answer (ConnectionError)" in failed
    assert "hidden-word" not in loading + failed
    assert TOKEN not in loading + failed


def test_the_overview_shows_queues_workers_with_their_heartbeat_and_what_serves(make_admin, redis_url, registry, two):
    with redis.Redis.from_url(redis_url) as connection:
        queue = Queue(CORRECTIONS, connection=connection, serializer=JSONSerializer)
        queue.enqueue_call(print, job_id="ingest-1")
        worker = SimpleWorker([queue], connection=connection, serializer=JSONSerializer, name="worker-1")
        worker.register_birth()
        client, _ = make_admin(redis_url=redis_url)
        text = page(client, "/admin")
        rows = [
            re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", row)).strip() for row in re.findall("<tr>.*?</tr>", text, re.S)
        ]
        assert any(re.fullmatch(rf"{CORRECTIONS} 1 \d+ s 0 0", row) for row in rows), rows
        assert any(row.startswith("worker-1 corrections ✓ ok") and row.endswith("s ago") for row in rows), rows
        assert any(row.startswith(f"project-3 {two[0].id} light-") for row in rows), rows
        worker.register_death()


def test_the_overview_shows_how_far_the_scoring_of_tasks_is(make_admin, redis_url):
    client, service = make_admin(redis_url=redis_url)
    assert "to be scored" not in page(client, "/admin")
    file = due_file(service.settings, 3)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert "not begun" in page(client, "/admin")
    Progress(service.settings, 3)(12, 40)
    assert "Tasks of project 3 are to be scored" in page(client, "/admin")
    assert "12 of 40 images looked at" in page(client, "/admin")


def test_the_overview_shows_hits_and_misses_of_encoded_images_in_one_process(make_admin):
    client, service = make_admin()
    wait_until(lambda: service.ready)
    before = cache_counts()
    for _ in range(3):
        service.encode_kept("a" * 64, lambda: np.zeros((32, 32, 3), np.uint8))
    found = cache_counts()
    grown = {name: count - before[name] for name, count in found.items()}
    assert grown == {"memory": 2, "disk": 0, "encoded": 1, "repeated": 0}
    text = page(client, "/admin")
    assert f"{found['memory']} found in memory, {found['disk']} on disk; {found['encoded']} missed and encoded" in text


def test_the_overview_adds_the_hits_and_misses_of_all_processes_that_one_run_started(make_admin, tmp_path, monkeypatch):
    count = "from ml_backend.metrics import EMBEDDINGS as e; e.labels('memory').inc(35); e.labels('encoded').inc(4)"
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for _ in range(2):
        subprocess.run([sys.executable, "-c", count], cwd=ROOT, check=True)
    client, _ = make_admin(start=False)
    assert "70 found in memory, 0 on disk; 8 missed and encoded" in page(client, "/admin")


def test_missing_workers_are_told_with_what_starts_them_and_rq_dashboard_is_linked_where_it_is_named(
    make_admin, redis_url
):
    client, _ = make_admin(redis_url=redis_url, rq_dashboard_url='https://host/rq?a="><b>')
    text = client.get("/admin").text
    for command in ("python -m ml_backend worker", "python -m ml_backend trainer"):
        assert "has reported lately" in text
        assert command in text
    assert 'href="https://host/rq?a=&#34;&gt;&lt;b&gt;"' in text


@pytest.mark.parametrize("address", ["javascript:alert(1)", "//host/rq", "data:text/html,x", "/ rq", "ftp://host"])
def test_rq_dashboard_is_an_http_address_or_a_path_of_this_host(address):
    with pytest.raises(ValidationError):
        Settings(rq_dashboard_url=address)


def test_the_doctors_checks_are_made_in_the_background_and_can_be_asked_for(make_admin):
    client, _ = make_admin()
    page(client, "/admin")
    wait_until(lambda: "data directory" in page(client, "/admin"))
    assert "The checks have been started" in send(client, "/admin", "/admin/checks")
    text = wait_until(lambda: (found := page(client, "/admin")) and "Looked" in found and found)
    assert "the newest task" not in text
    assert TOKEN not in text


def test_failed_events_are_shown_and_tried_again(make_admin):
    client, service = make_admin()
    key = service.inbox.add(b'{"action": "ANNOTATION_CREATED"}', "ANNOTATION_CREATED")
    for _ in range(ATTEMPTS):
        service.inbox.failed(key, "Refusal: <b>no such project</b>")
    raw = client.get("/admin").text
    assert "&lt;b&gt;no such project&lt;/b&gt;" in raw
    assert "1 events will be tried again" in send(client, "/admin", "/admin/inbox/retry")
    assert service.inbox.state(key) == "undone"


def test_corrections_are_counted_and_shown_in_pages_newest_first(make_admin, tmp_path):
    kept = fill(tmp_path / "data", photos=12)
    fill(tmp_path / "data", project="4", photos=1)
    client, _ = make_admin()
    text = page(client, "/admin/corrections?project=3")
    assert "24 corrections in 12 annotations on 12 photos" in text
    assert re.search(r'<th scope="row">drawn</th><td>15</td>', text)
    assert re.search(r'<th scope="row">1</th><td>8</td>', text)
    shown = re.findall(r"annotation (\d+)<br>", text)
    assert shown == [str(number) for number in range(111, 105, -1) for _ in "ab"]
    assert re.findall(r"annotation (\d+)<br>", page(client, "/admin/corrections?project=3&page=2"))[0] == "105"
    assert "annotation 100" in page(client, "/admin/corrections")
    assert {one.annotation for one in kept} == set(range(100, 112))


def test_a_picture_shows_what_was_added_and_taken_away(make_admin, tmp_path):
    fill(tmp_path / "data", photos=1)
    client, _ = make_admin()
    answer = client.get("/admin/corrections/3/100/0.jpg")
    assert answer.content_type == "image/jpeg"
    drawn = np.asarray(Image.open(io.BytesIO(answer.data)).convert("RGB")).astype(int)
    assert drawn.shape == (HEIGHT, WIDTH, 3)
    y = round(0.4 * HEIGHT)
    left, right = round(0.31 * WIDTH - 0.18 * HEIGHT) + 3, round(0.31 * WIDTH + 0.18 * HEIGHT) + 6
    added, gone, kept, wall = (
        drawn[y - 6 : y + 6, x - 2 : x + 2].mean((0, 1)) for x in (left, right, round(0.31 * WIDTH), WIDTH // 2)
    )
    assert kept[2] > kept[1] + 10  # of red, green and blue: the disc is red, and blue what stands as proposed
    assert added[1] > kept[1] + 5 > added[2] + 5
    assert gone[1] < wall[1] - 20
    again = client.get("/admin/corrections/3/100/0.jpg", headers={"If-None-Match": answer.headers["ETag"]})
    assert again.status_code == 304


def test_a_label_with_markup_is_shown_as_text(make_admin, tmp_path):
    fill(tmp_path / "data", photos=1, label='<script>alert("x")</script>"><img src=x onerror=alert(1)>')
    client, _ = make_admin()
    raw = client.get("/admin/corrections").text
    assert "&lt;script&gt;alert" in raw
    assert raw.count("<script") == 1  # our own
    assert "<img src=x" not in raw


@pytest.mark.parametrize(
    "path",
    [
        "/admin/corrections/..%2f..%2fsecrets/1/0.jpg",
        "/admin/corrections/3/100/99.jpg",
        "/admin/corrections/3/99999999999999999999999/0.jpg",
        "/admin/corrections/x'%20OR%201=1/100/0.jpg",
        "/admin/corrections?project=../../etc",
        "/admin/versions/..%2f..%2f/v0001-1a2b3c4d",
        "/admin/versions/project-3/..%2f..%2fcorrections.sqlite",
        "/admin/versions/project-3/{version}/card.json",
        "/admin/versions/project-3/{version}/..%2fcard.json",
        "/admin/versions/project-3/{version}/adapter.safetensors",
        "/admin/versions/..%2fproject-3/compare?first={version}&second={version}",
        "/admin/versions/project-3/compare?first=..%2f..%2f&second={version}",
        "/admin/versions/project-3/compare/{version}/..%2f../0.png",
        "/admin/static/..%2fadmin.py",
        "/admin/static/../settings.py",
        "/admin/nothing",
    ],
)
def test_what_names_no_correction_version_or_picture_is_not_found(make_admin, tmp_path, two, path):
    fill(tmp_path / "data", photos=1)
    client, _ = make_admin()
    answer = client.get(path.format(version=two[0].id), follow_redirects=True)  # // becomes /
    assert answer.status_code == 404
    assert b"SQLite" not in answer.data
    assert str(tmp_path).encode() not in answer.data


def test_a_picture_that_is_a_link_out_of_its_version_is_not_shown(make_admin, tmp_path, registry, two):
    (tmp_path / "secret").write_text("canary-1f3c")
    name = "sheet.png"
    path = registry.path(two[0]).with_name(name)
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "secret")
    client, _ = make_admin()
    answer = client.get(f"/admin/versions/project-3/{two[0].id}/{name}")
    assert (answer.status_code, b"canary" in answer.data) == (404, False)


def test_a_change_without_the_forms_token_is_refused(make_admin, registry, two):
    client, _ = make_admin()
    page(client, "/admin/versions")
    for path, fields in (
        ("/admin/versions/project-3/activate", {"version": two[1].id}),
        ("/admin/versions/project-3/rollback", {"serves": two[0].id}),
        ("/admin/versions/project-3/prune", {"keep": "0"}),
        ("/admin/training/start", {"line": "project-3"}),
        ("/admin/inbox/retry", {}),
    ):
        assert client.post(path, data=fields | {"csrf_token": "guessed"}).status_code == 403
    assert registry.active_id("project-3") == two[0].id
    assert len(registry.versions("project-3")) == 2


def test_a_version_is_activated_and_rolled_back_and_answers_within_a_second(make_admin, registry, two):
    client, service = make_admin()

    def serves():
        return client.get("/versions?project=3").json["versions"][0].rpartition("+")[2]

    wait_until(lambda: serves() == f"project-3-{two[0].id}")
    client.post("/setup", json={"project": "3"})
    text = send(client, "/admin/versions", "/admin/versions/project-3/activate", version=two[1].id)
    changed_s = time.monotonic()
    assert f"Version {two[1].id} serves project-3" in text
    due = due_file(service.settings, 3)
    assert due.exists(), "tasks are scored by what serves now"
    due.unlink()
    wait_until(lambda: serves() == f"project-3-{two[1].id}", limit_s=3)
    assert time.monotonic() - changed_s < 1.5
    text = send(client, "/admin/versions", "/admin/versions/project-3/rollback", serves=two[1].id)
    assert f"{two[1].id} was rolled back: {two[0].id} serves project-3" in text
    assert due.exists()
    wait_until(lambda: serves() == f"project-3-{two[0].id}", limit_s=3)

    # sent twice by a nervous finger: the second changes nothing
    text = send(client, "/admin/versions", "/admin/versions/project-3/rollback", serves=two[1].id)
    assert "another version serves by now" in text
    assert registry.active_id("project-3") == two[0].id
    send(client, "/admin/versions", "/admin/versions/project-3/activate", version="configured")
    assert registry.active_id("project-3") is None


def test_one_goes_back_from_a_version_without_its_card_past_a_damaged_one(make_admin, registry, trained, two):
    registry.activate("project-3", two[1].id)
    last = registry.publish("project-3", trained[2], card={"recipe": "drawn"}, activate=True)
    registry.path(last).with_name("card.json").unlink()
    registry.path(two[1]).write_bytes(b"torn")
    client, _ = make_admin()
    assert f"Roll back to {two[0].id}" in page(client, "/admin/versions")
    text = send(client, "/admin/versions", "/admin/versions/project-3/rollback", serves=last.id)
    assert f"{last.id} was rolled back: {two[0].id} serves project-3." in text
    assert f"Passed over: adapter project-3 {two[1].id} is damaged" in text
    assert registry.active_id("project-3") == two[0].id


def test_a_rejected_version_is_activated_only_with_its_box_ticked(make_admin, registry, trained, two):
    rejected = registry.publish(
        "project-3", trained[2], card={"accepted": False, "note": "It is worse.", "recipe": "drawn"}, activate=False
    )
    client, _ = make_admin()
    target = "/admin/versions/project-3/activate"
    assert "It is worse." in send(client, "/admin/versions", target, version=rejected.id)
    assert registry.active_id("project-3") == two[0].id
    send(client, "/admin/versions", target, version=rejected.id, force="yes")
    assert registry.active_id("project-3") == rejected.id


def test_pruning_shows_first_what_would_go(make_admin, registry, trained, two):
    third = registry.publish("project-3", trained[2], card={"recipe": "drawn"}, activate=True)
    client, _ = make_admin()
    asked = page(client, "/admin/versions/project-3/prune?keep=1")
    assert f"<code>{two[1].id}</code>" in asked
    assert two[0].id not in asked  # the one to go back to
    assert len(registry.versions("project-3")) == 3
    text = send(client, "/admin/versions/project-3/prune?keep=1", "/admin/versions/project-3/prune", keep="1")
    assert f"Removed 1 versions of project-3: {two[1].id}" in text
    assert [version.id for version in registry.versions("project-3")] == [two[0].id, third.id]


def test_a_training_is_started_watched_cancelled_and_tried_again(make_admin, tmp_path):
    data = tmp_path / "data"
    client, service = make_admin()
    text = send(client, "/admin/training", "/admin/training/start", line="shared")
    assert "there are no corrections yet" in text
    fill(data, photos=2)
    assert "is queued" in send(client, "/admin/training", "/admin/training/start", line="project-3")
    folder = folder_of(service.settings, "project-3")
    status = folder.pending()
    assert status.reason == "asked for on the admin page"
    assert "one is queued already" in send(client, "/admin/training", "/admin/training/start", line="project-3")

    folder.note(status, state="running", step=40, steps=160, loss=0.5, left_s=300.0, masks=4)
    for step, loss in ((10, 1.2), (20, 0.9), (40, 0.5)):
        folder.note_loss(step, loss)
    text = page(client, "/admin/training")
    assert "40 of 160 (25 %), about 5 min left" in text
    assert "From 1.2 at 10 to 0.5 at 40." in text
    with folder.alone():  # as the trainer does
        cancelled = send(client, "/admin/training", "/admin/training/cancel", line="project-3")
    assert "will stop at its next step" in cancelled
    assert folder.cancelled

    folder.end(folder.pending(), "failed", "memory <ran> out")
    raw = client.get("/admin/training").text
    assert "4 new corrections since the last training that neither failed nor was cancelled" in raw
    assert "memory &lt;ran&gt; out" in raw
    assert "Try it again" in raw
    assert "is queued" in send(client, "/admin/training", "/admin/training/start", line="project-3")

    waiting = folder.pending()
    cancelled = send(client, "/admin/training", "/admin/training/cancel", line="project-3")
    assert f"Training {waiting.id} is cancelled" in cancelled, "nobody works on it: no trainer has to come by"
    assert "is queued" in send(client, "/admin/training", "/admin/training/start", line="project-3")
    assert folder.pending().id != waiting.id
    assert not folder.pending().thorough
    assert folder.losses() == []
    assert folder.pending().id != status.id


def test_what_was_learned_from_may_be_learned_thoroughly_once(make_admin, tmp_path):
    client, service = make_admin()
    fill(tmp_path / "data", photos=2)
    folder = folder_of(service.settings, "project-3")
    folder.end(folder.ask("a test"), "published", "it wins")
    raw = page(client, "/admin/training")
    assert "A quick training would bring nothing now: nothing was corrected since the last training" in raw
    assert "Start a thorough training of project-3" in raw
    form = {"line": "project-3", "kind": "thorough"}
    assert "is queued" in send(client, "/admin/training", "/admin/training/start", **form)
    assert folder.pending().thorough
    assert "asked for on the admin page (thorough)" in page(client, "/admin/training")
    folder.end(folder.pending(), "published", "it wins")
    assert "Start a thorough training of project-3" not in page(client, "/admin/training")
    text = send(client, "/admin/training", "/admin/training/start", **form)
    assert "No training of project-3 was started: nothing was corrected since the last thorough training" in text


def test_a_training_is_offered_without_new_corrections_where_the_version_that_should_serve_cannot(
    make_admin, tmp_path, registry, two
):
    fill(tmp_path / "data", photos=2)
    client, service = make_admin()
    folder = folder_of(service.settings, "project-3")
    folder.end(folder.ask("a test", now_s=time.time() + 1), "published", "it won", version=two[0].id)
    text = page(client, "/admin/training")
    assert "A quick training would bring nothing now: nothing was corrected since the last training." in text
    registry.path(two[0]).write_bytes(b"torn")
    assert "Start a training of project-3" in page(client, "/admin/training")


def test_the_page_on_trainings_reads_an_adapter_once_and_only_where_it_matters(
    make_admin, tmp_path, registry, two, monkeypatch
):
    read = []
    intact = AdapterRegistry.intact
    monkeypatch.setattr(
        AdapterRegistry, "intact", lambda self, version: read.append(version.id) or intact(self, version)
    )
    fill(tmp_path / "data", photos=2)
    client, service = make_admin()
    read.clear()
    page(client, "/admin/training")
    assert read == [], "there are new corrections, so a training would bring something in any case"
    folder = folder_of(service.settings, "project-3")
    folder.end(folder.ask("a test", now_s=time.time() + 1), "published", "it won", version=two[0].id)
    for _ in range(3):
        page(client, "/admin/training")
    assert read == [registry.active_id("project-3")]


def test_versions_are_compared_on_the_objects_that_both_were_judged_on_and_live_on_photos(make_admin, tmp_path, two):
    fill(tmp_path / "data", photos=6)
    client, service = make_admin()
    first, second = (version.id for version in two)
    path = f"/admin/versions/project-3/compare?first={first}&second={second}"
    text = " ".join(re.sub("<[^>]+>", " ", page(client, path)).split())
    assert "hold-out 12 NoC@85 5.000 3.000 -2.00 -40.0 % (-4" in text
    assert "reference set 12 NoC@90 5.000 3.000 -2.00" in text
    wait_until(lambda: service.ready)
    answer = send(client, path, "/admin/versions/project-3/compare", first=first, second=second)
    assert "Both versions are asked now" in answer
    text = wait_until(lambda: "6 photos answered." in (found := page(client, path)) and found, limit_s=240)
    pictures = re.findall(r'<img src="(/admin/versions/project-3/compare/[^"]+)"', text)
    assert len(pictures) == 6
    with client.get(pictures[0]) as answer:
        cells = Image.open(io.BytesIO(answer.data))
    assert cells.width > 2 * cells.height  # photo, first, second
    assert "hold-out" in text


def test_a_comparison_leaves_no_library_of_the_commands_in_the_process_that_serves_clicks(tmp_path):
    code = """if True:
        import sys, time
        from ml_backend.comparisons import CONFIGURED, Comparisons
        from ml_backend.service import Service
        from ml_backend.settings import Settings
        service = Service(Settings())
        comparisons = Comparisons(service)
        comparisons.ask("shared", CONFIGURED, CONFIGURED)
        while (found := comparisons.get("shared", CONFIGURED, CONFIGURED)).state == "running":
            time.sleep(0.2)
        print(found.state, len(found.answers), *sorted({"scipy", "matplotlib", "peft"} & set(sys.modules)))
        service.close()"""
    environment = os.environ | {"GRACO_DATA_DIR": str(tmp_path), "GRACO_ENCODER": "exact", "GRACO_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done 6", done.stderr


def test_pages_are_quick_with_ten_thousand_corrections(make_admin, tmp_path, two):
    with closing(CorrectionStore(tmp_path / "data" / "corrections.sqlite")) as store:
        for number in range(200):
            found = [
                correction(f"r{n}", annotation=number, project="3", image=f"{50 * number + n:064x}") for n in range(50)
            ]
            store.replace("3", number, found, updated_s=1.7e9 + number * 36000)
    client, service = make_admin()
    wait_until(lambda: service.ready)
    for path in (*PAGES, "/admin/corrections?page=800"):
        page(client, path)
        start_s = time.thread_time()  # of this thread alone, which is the one that answers
        page(client, path)
        took_s = time.thread_time() - start_s
        assert took_s < 0.2, (path, took_s)
