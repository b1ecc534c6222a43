"""A real backend for tests: `python -m ml_backend run` with its Redis, workers and web processes."""

from __future__ import annotations

import base64
import http.client
import json
import os
import subprocess
import sys
from contextlib import contextmanager

import psutil

from tests.conftest import ROOT
from tests.ml_backend.conftest import TOKEN, wait_until
from tests.ml_backend.test_supervisor import free_port

USER, PASSWORD, SECRET, ADMIN = "label-studio", "canary-password-51c4", "canary-webhook-77ab", "canary-admin-90de"


class Backend:
    """Its address, its process and its log."""

    def __init__(self, process, port, folder, log):
        self.process, self.port, self.folder, self._log = process, port, folder, log

    def ask(self, method, path, body=None, *, user=USER, password=PASSWORD, headers=None):
        """Status, headers and body of one request on a connection of its own; user None: no credentials."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        given = {"Content-Type": "application/json"} | (headers or {})
        if user is not None:
            given["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, given)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def post(self, path, body, **kwargs):
        """The JSON that a POST is answered with."""
        status, _, content = self.ask("POST", path, body, **kwargs)
        assert status < 300, content
        return json.loads(content)

    def metrics(self):
        """The lines of /metrics, by name with labels."""
        status, _, content = self.ask("GET", "/metrics")
        assert status == 200, content
        lines = [line for line in content.decode().splitlines() if line and not line.startswith("#")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def log(self):
        """All that its processes wrote."""
        return self._log.read_text()

    def children(self, word):
        """Its processes with a word in their command line, at any depth."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                found += [child] if word in " ".join(child.cmdline()) else []
            except psutil.NoSuchProcess:
                continue
        return found

    def health(self):
        """What /health says, or None while nothing listens."""
        try:
            return json.loads(self.ask("GET", "/health", user=None)[2])
        except (OSError, http.client.HTTPException):
            return None


@contextmanager
def running(folder, label_studio_url, **environment):
    """Start a backend on a free port, its data under `folder`, wait until it answers, and stop it at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    settings = {
        **{"GRACO_PORT": str(port), "GRACO_DATA_DIR": str(folder / "data"), "GRACO_DEVICE": "cpu"},
        **{"GRACO_ENCODER": "exact", "GRACO_COMPUTE_THREADS": "1", "LABEL_STUDIO_URL": label_studio_url},
        **{"LABEL_STUDIO_API_KEY": TOKEN, "GRACO_PASSWORD": PASSWORD, "GRACO_WEBHOOK_SECRET": SECRET},
        **{"GRACO_ADMIN_PASSWORD": ADMIN, "GRACO_LOG_JSON": "1", "GRACO_RECONCILE_MINUTES": "0"},
        **{"GRACO_REQUESTS_PER_MINUTE": "0", "GRACO_TRAIN_AFTER": "0"},
    }
    log = folder / "run.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "ml_backend", "run"],
            cwd=ROOT,
            env=os.environ | settings | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    backend = Backend(process, port, folder, log)
    try:
        wait_until(lambda: (said := backend.health()) and said.get("status") == "UP", limit_s=120)
        yield backend
    finally:
        everything = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        _, left = psutil.wait_procs(everything, timeout=10)
        for child in left:
            child.kill()
