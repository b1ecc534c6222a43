"""The backend as a user starts it, and one annotator's requests to it, as Label Studio sends them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import requests

from ml_backend.label_config import make_config
from ml_backend.simulate import free_port
from model.types import Click
from tests.bench.photos import HEIGHT, WIDTH

ROOT = Path(__file__).resolve().parents[2]
_START_LIMIT_S = 300
_MEMORY_EVERY_S = 0.05
_DRAFTS = "DRAFTS"
_CREDENTIALS = ("label-studio", "password-of-the-bench")


class Backend:
    """`python -m ml_backend run` in a process of its own, with all its children."""

    def __init__(self, label_studio_url: str, data_dir: Path) -> None:
        """Start it, and wait until its model is loaded.

        Raises:
            RuntimeError: it ended, or took too long.
        """
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GRACO_")}
        environment |= {"GRACO_PORT": str(self.port), "GRACO_DATA_DIR": str(data_dir)}
        environment |= {"LABEL_STUDIO_URL": label_studio_url, "GRACO_PASSWORD": _CREDENTIALS[1]}
        self._log = data_dir / "bench.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ml_backend", "run"], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        try:
            self._wait()
            self.web = self._find_web()
        except BaseException:
            self.close()
            raise
        self._memory: list[int] = []
        self._closing = threading.Event()
        threading.Thread(target=self._watch_memory, daemon=True).start()

    def _wait(self) -> None:
        deadline_s = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            try:
                if requests.get(f"{self.url}/health", timeout=1).json()["model_loaded"]:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the backend did not start; {self.log_end()}")

    def _find_web(self) -> psutil.Process:
        """Return gunicorn's worker: the process whose parent is gunicorn too."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            parent = process.parent()
            if parent is not None and all("gunicorn" in " ".join(p.cmdline()) for p in (process, parent)):
                return process
        raise RuntimeError("the web process was not found among the backend's children")

    def _watch_memory(self) -> None:
        while not self._closing.wait(_MEMORY_EVERY_S):
            try:
                self._memory.append(self.memory())
            except psutil.Error:
                return

    def log_end(self) -> str:
        """Return the last lines of its log, for an error message."""
        return f"the end of its log:\n{self._log.read_text()[-2000:]}"

    def memory(self) -> int:
        """Return the bytes of memory that the web process holds (RSS)."""
        return int(self.web.memory_info().rss)

    def peak_memory(self, *, since: int = 0) -> int:
        """Return the most it held, of all samples or of those after the first `since`."""
        return max(self._memory[since:], default=self.memory())

    @property
    def memory_samples(self) -> int:
        """How many samples of memory were taken so far, to ask for the peak since now."""
        return len(self._memory)

    def metrics(self) -> dict[str, float]:
        """Return /metrics as one number a line, such as `graco_step_seconds_sum{step="decode"}`."""
        text = requests.get(f"{self.url}/metrics", timeout=10, auth=_CREDENTIALS).text
        return {m[1]: float(m[2]) for m in re.finditer(r"^(graco_\S+) (\S+)$", text, re.MULTILINE)}

    def close(self) -> None:
        """End it and its children."""
        if hasattr(self, "_closing"):
            self._closing.set()
        if self._process.poll() is None:
            children = psutil.Process(self._process.pid).children(recursive=True)
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                for process in (*children, self._process):
                    process.kill()


class Annotator:
    """One annotator's connection, kept alive, with the seconds of each answer."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._session = requests.Session()
        self._session.auth = _CREDENTIALS
        self._config = make_config(["Object"])

    def body(self, uri: str, clicks: Sequence[Click] | None, *, drafts: str = "[]") -> bytes:
        """Return a request: clicks in pixels of the photo (None: the task is opened), drafts as JSON."""
        context = None if clicks is None else {"result": [_region(n, click) for n, click in enumerate(clicks)]}
        task = {
            "id": _task_id(uri),
            "data": {"image": uri},
            "meta": {},
            "created_at": "2026-11-21T08:42:58.796062Z",
            "updated_at": "2026-11-21T08:42:58.796087Z",
            "inner_id": 1,
            "total_annotations": 0,
            "cancelled_annotations": 0,
            "total_predictions": 0,
            "project": 1,
            "annotations": [],
            "predictions": [],
            "drafts": _DRAFTS,
        }
        request = {
            "tasks": [task],
            "project": "1.1795250578",
            "label_config": self._config,
            "params": {"login": None, "password": None, "context": context},
        }
        return json.dumps(request).replace(f'"{_DRAFTS}"', drafts, 1).encode()

    def ask(self, body: bytes) -> tuple[dict[str, Any], float]:
        """Return the answer's first result and the seconds it took, from sending to parsed.

        Raises:
            RuntimeError: the answer is no result.
        """
        start = time.perf_counter()
        response = self._session.post(
            f"{self._backend.url}/predict", data=body, headers={"Content-Type": "application/json"}
        )
        answer = response.json()
        seconds = time.perf_counter() - start
        if response.status_code != 200 or not answer.get("results"):
            raise RuntimeError(
                f"/predict answered {response.status_code} {response.text[:300]}; {self._backend.log_end()}"
            )
        result: dict[str, Any] = answer["results"][0]
        return result, seconds

    def click(self, uri: str, clicks: Sequence[Click], *, drafts: str = "[]") -> tuple[dict[str, Any], float]:
        """Return the mask's region and the seconds it took.

        Raises:
            RuntimeError: there is no mask in the answer.
        """
        result, seconds = self.ask(self.body(uri, clicks, drafts=drafts))
        if not result["result"]:
            raise RuntimeError(f"no mask for {clicks} on {uri}: {result}; {self._backend.log_end()}")
        region: dict[str, Any] = result["result"][0]
        return region, seconds


def _task_id(uri: str) -> int:
    return int(re.sub(r"\D", "", uri.rpartition("/")[2]))


def _region(number: int, click: Click) -> dict[str, Any]:
    return {
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "image_rotation": 0,
        "value": {
            "x": click.x / WIDTH * 100,
            "y": click.y / HEIGHT * 100,
            "width": 0.35,
            "keypointlabels": ["Object"],
        },
        "is_positive": click.positive,
        "id": f"click-{number:04}",
        "from_name": "click",
        "to_name": "image",
        "type": "keypointlabels",
        "origin": "manual",
    }
