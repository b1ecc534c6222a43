"""What the end-to-end tests need: a real Label Studio, our backend as a user starts it, a real browser.

GRACO_TEST_CACHE: where Label Studio is installed once. CHROMIUM: the browser.
GRACO_E2E_BACKEND_URL: a running backend to use instead of starting ours, with the secrets of label_studio_server.py;
GRACO_E2E_LABEL_STUDIO_URL: a running Label Studio that knows the user and token there. Together they save two minutes
while writing tests.
GRACO_REQUIRE_E2E=1 (or CI=true): fail where something is missing, instead of skipping.
GRACO_SCREENSHOTS=1: renew docs/images.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from tests.conftest import ROOT
from tests.e2e.editor import VIEWPORT, Editor
from tests.e2e.label_studio_server import SECRETS, LabelStudio, NotInstallable, connect, start_label_studio
from tests.e2e.photos import Photo, drawn, find_photo
from tests.e2e.servers import Server, free_port, get_text, serve

_HEALTHY_S = 60
_LOADED_S = 300  # the very first start compiles the encoder
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SWITCHES = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-proxy-server"),
)
_LARGEST_PICTURE = 200_000  # bytes
_servers: pytest.StashKey[list[Server]] = pytest.StashKey()
_failed: pytest.StashKey[bool] = pytest.StashKey()

StartBackend = Callable[..., AbstractContextManager[str]]


def unavailable(reason: str) -> NoReturn:
    """Skip with the reason; where the journey is required, fail with it."""
    if os.environ.get("CI") == "true" or os.environ.get("GRACO_REQUIRE_E2E") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the end of each server's log with a failure."""
    report = yield
    if report.failed:
        item.stash[_failed] = True
        for server in item.config.stash.get(_servers, []):
            report.sections.append((f"log of {server.url}", server.tail()))
    return report


@contextmanager
def _watched(config: pytest.Config, server: Server) -> Iterator[None]:
    servers = config.stash.setdefault(_servers, [])
    servers.append(server)
    try:
        yield
    finally:
        servers.remove(server)


@pytest.fixture(scope="package")
def label_studio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudio]:
    if given := os.environ.get("GRACO_E2E_LABEL_STUDIO_URL"):
        with connect(given.rstrip("/")) as running:
            yield running
        return
    cache = Path(os.environ.get("GRACO_TEST_CACHE") or Path.home() / ".cache" / "graco-tests").expanduser()
    try:
        with (
            start_label_studio(tmp_path_factory.mktemp("label-studio"), cache) as server,
            _watched(request.config, server),
            connect(server.url) as running,
        ):
            yield running
    except NotInstallable as error:
        unavailable(str(error))


@pytest.fixture(scope="package")
def start_backend(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, label_studio: LabelStudio
) -> StartBackend:
    """Return what starts our backend with settings of its own: `with start_backend(GRACO_PROPOSE="3") as url`."""

    @contextmanager
    def start(**settings: str) -> Iterator[str]:
        port, folder = free_port(), tmp_path_factory.mktemp("backend")
        own = {
            "GRACO_PORT": str(port),
            "GRACO_DATA_DIR": str(folder / "data"),
            "LABEL_STUDIO_URL": label_studio.url,
            "LABEL_STUDIO_API_KEY": label_studio.token,
            **SECRETS,
        }
        command = [sys.executable, "-m", "ml_backend", "run"]
        url, log = f"http://127.0.0.1:{port}", folder / "backend.log"
        with (
            serve(command, url=url, environment=own | settings, cwd=ROOT, log=log, limit_s=_HEALTHY_S) as server,
            _watched(request.config, server),
        ):
            _wait_for_model(server)
            yield url

    return start


def _wait_for_model(server: Server) -> None:
    """Wait until the model is loaded: Label Studio gives up on a first click after 100 s."""
    deadline_s = time.monotonic() + _LOADED_S
    while not json.loads(get_text(f"{server.url}/health") or "{}").get("model_loaded"):
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the model was not loaded after {_LOADED_S} s:\n{server.tail()}")
        time.sleep(0.3)


@pytest.fixture(scope="package")
def backend(start_backend: StartBackend) -> Iterator[str]:
    """The address of our backend with default settings, or of the one that GRACO_E2E_BACKEND_URL names."""
    if given := os.environ.get("GRACO_E2E_BACKEND_URL"):
        yield given.rstrip("/")
        return
    with start_backend() as url:
        yield url


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=_find_browser(), headless=True, args=list(_SWITCHES))
        yield running
        running.close()


def _find_browser() -> str:
    """Return a Chromium: CHROMIUM, one on the PATH, or Debian's, installed now where we may."""
    if given := os.environ.get("CHROMIUM"):
        return given
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["apt-get", "update"], ["apt-get", "install", "--yes", "chromium"]):
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(command, env=environment, capture_output=True, check=False, timeout=900)
        found = shutil.which("chromium")
    return found or unavailable("no Chromium is here: install one, or name it with CHROMIUM=/path/to/chromium")


@pytest.fixture
def editor(
    request: pytest.FixtureRequest, browser: Browser, label_studio: LabelStudio, tmp_path: Path
) -> Iterator[Editor]:
    """The editor in a fresh browser profile, logged in; a picture of it is kept when the test fails."""
    width, height = VIEWPORT
    context = browser.new_context(viewport={"width": width, "height": height})
    opened = Editor(context.new_page(), label_studio.url)
    opened.log_in(label_studio.email, label_studio.password)
    yield opened
    if request.node.stash.get(_failed, False):
        (tmp_path / "failed.png").write_bytes(opened.screenshot())
        print(f"\nthe editor as the test left it: {tmp_path / 'failed.png'}")
    context.close()


@dataclass(frozen=True, slots=True)
class Pictures:
    """Screenshots of the main steps, for the guide of annotators."""

    folder: Path
    taken: list[str] = field(default_factory=list)

    def take(self, name: str, editor: Editor) -> None:
        """Write a screenshot, with as many colours as keep it small."""
        with Image.open(io.BytesIO(editor.screenshot())) as png:
            full = png.convert("RGB")
        for colours in (256, 128, 64, 32):
            with io.BytesIO() as buffer:
                full.quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
                data = buffer.getvalue()
            if len(data) < _LARGEST_PICTURE:
                break
        (self.folder / f"{name}.png").write_bytes(data)
        self.taken.append(name)


@pytest.fixture(scope="package")
def publishing() -> bool:
    """Whether the pictures go into the guide."""
    return os.environ.get("GRACO_SCREENSHOTS") == "1"


@pytest.fixture
def pictures(publishing: bool, tmp_path: Path) -> Pictures:
    folder = ROOT / "docs" / "images" if publishing else tmp_path / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    return Pictures(folder)


@pytest.fixture(scope="package")
def photo(publishing: bool) -> Photo:
    """A real photo; for pictures that are published, one whose licence lets us."""
    return drawn() if publishing else find_photo(ROOT.parent / "shared")
