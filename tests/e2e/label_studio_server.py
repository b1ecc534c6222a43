"""A real Label Studio: installed once in an environment of its own, started on empty data, driven by its API.

Source of the settings: what Label Studio 1.23 needs to accept a backend on a local address and a legacy token.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from ml_backend import brush
from ml_backend import connect as ours
from ml_backend.settings import Settings
from model.types import Mask
from tests.e2e.photos import Photo
from tests.e2e.servers import Server, free_port, serve

VERSION = "1.23.2"
EMAIL, PASSWORD, TOKEN = "admin@example.com", "probe-pass-1", "0123456789abcdef0123456789abcdef01234567"
SECRETS = {  # of our backend, as variables
    "GRACO_USERNAME": "journey",
    "GRACO_PASSWORD": "password-of-the-journey",
    "GRACO_WEBHOOK_SECRET": "secret-of-the-journey",
    "GRACO_ADMIN_PASSWORD": "password-of-the-admin",
    "GRACO_SESSION_SECRET": "secret-of-the-sessions",
}
CREDENTIALS = SECRETS["GRACO_USERNAME"], SECRETS["GRACO_PASSWORD"]
"""User and password of our backend."""
_INSTALL_S = 1800
_START_S = 240  # the first start runs all migrations: 40 s on an idle machine


class NotInstallable(RuntimeError):
    """Label Studio cannot be had on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A project with one task and our backend connected."""

    id: int
    task: int
    backend: int
    webhooks: tuple[str, ...]  # addresses told of everything that happens in it


@dataclass(frozen=True, slots=True)
class LabelStudio:
    """A running Label Studio and its only user."""

    url: str
    session: requests.Session
    email: str = EMAIL
    password: str = PASSWORD
    token: str = TOKEN

    def api(self, method: str, path: str, *, status: int | None = None, **content: Any) -> Any:
        """Return the JSON of one API call; any status but the expected one (200 or 201) is an error with the body."""
        response = self.session.request(method, self.url + path, timeout=120, **content)
        wanted = (status,) if status else (200, 201)
        if response.status_code not in wanted:
            raise AssertionError(f"{method} {path}: {response.status_code} {response.text[:500]}")
        return response.json() if response.content else None

    def add_project(self, title: str, label_config: str, photo: Photo, backend: str) -> Project:
        """Return a new project with a labelling configuration, our backend connected by our command, and one photo.

        Predictions are not shown of themselves: opening the task would ask for one and prefill the annotation.
        """
        wanted = {"title": title, "label_config": label_config, "show_collab_predictions": False}
        project = self.api("POST", "/api/projects", json=wanted, status=201)["id"]
        for line in ours.connect(self.settings(), ours.Wish(project=project, url=backend)):
            print(line)
        (connection,) = self.api("GET", f"/api/ml?project={project}")
        files = {"file": (f"{photo.name}.jpg", photo.data, "image/jpeg")}
        self.api("POST", f"/api/projects/{project}/import", files=files)
        webhooks = self.api("GET", f"/api/webhooks/?project={project}")
        return Project(
            id=project,
            task=self.api("GET", f"/api/tasks?project={project}")["tasks"][0]["id"],
            backend=connection["id"],
            webhooks=tuple(hook["url"] for hook in webhooks if hook["send_payload"] and hook["is_active"]),
        )

    def settings(self) -> Settings:
        """Return the settings of a command of ours that talks to this Label Studio."""
        known = {name.removeprefix("GRACO_").lower(): value for name, value in SECRETS.items()}
        return Settings(label_studio_url=self.url, label_studio_api_key=self.token, **known)  # type: ignore[arg-type]

    def ask(self, project: Project, context: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the results of an interactive request for the project's task, as the editor would send it."""
        body = {"task": project.task, "context": {"result": context}}
        path = f"/api/ml/{project.backend}/interactive-annotating"
        return list(self.api("POST", path, json=body)["data"]["result"])

    def stop_webhooks(self, project: Project) -> None:
        """Have nothing reported of what happens in the project."""
        for hook in self.api("GET", f"/api/webhooks/?project={project.id}"):
            self.api("DELETE", f"/api/webhooks/{hook['id']}/", status=204)

    def annotate(self, project: Project, mask: Mask) -> None:
        """Submit an annotation with a mask drawn by hand, bool H, W."""
        height, width = mask.shape
        region = {
            **{"original_width": width, "original_height": height, "image_rotation": 0, "origin": "manual"},
            **{"id": "byhand0001", "from_name": "mask", "to_name": "image", "type": "brushlabels"},
            "value": {"format": "rle", "rle": brush.encode(mask), "brushlabels": ["Object"]},
        }
        self.api("POST", f"/api/tasks/{project.task}/annotations/", json={"result": [region]}, status=201)

    def start_training(self, project: Project) -> None:
        """Press Start Training."""
        self.api("POST", f"/api/ml/{project.backend}/train")

    def annotation(self, project: Project) -> dict[str, Any]:
        """Return the only annotation of the project's task."""
        (annotation,) = self.api("GET", f"/api/tasks/{project.task}/annotations/")
        return dict(annotation)


@contextmanager
def connect(url: str) -> Iterator[LabelStudio]:
    """Use a running Label Studio that knows our user and token."""
    with requests.Session() as session:
        session.trust_env = False  # loopback requests never go through a proxy
        session.headers["Authorization"] = f"Token {TOKEN}"
        yield LabelStudio(url, session)


@contextmanager
def start_label_studio(folder: Path, cache: Path) -> Iterator[Server]:
    """Start Label Studio with all its data under `folder`, installing it under `cache` when need be.

    Raises:
        NotInstallable: pip could not install it.
    """
    environment = _find_environment(cache)
    url = f"http://127.0.0.1:{(port := free_port())}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(environment / "bin" / "label-studio"), "start", "--no-browser", "--internal-host", "127.0.0.1"]
    with serve(
        [*command, "--port", str(port)],
        url=url,
        environment=_settings(url, folder),
        cwd=folder,
        log=folder / "label-studio.log",
        limit_s=_START_S,
    ) as server:
        yield server


def _settings(url: str, folder: Path) -> dict[str, str]:
    files = folder / "files"
    files.mkdir(exist_ok=True)
    settings = {
        "USERNAME": EMAIL,
        "PASSWORD": PASSWORD,
        "USER_TOKEN": TOKEN,
        "ENABLE_LEGACY_API_TOKEN": "true",  # otherwise "Authorization: Token" is refused for a new organisation
        "HOST": url,
        "BASE_DATA_DIR": str(folder / "data"),
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "LOCAL_FILES_SERVING_ENABLED": "true",
        "LOCAL_FILES_DOCUMENT_ROOT": str(files),
        "ML_BLOCK_LOCAL_IP": "false",  # otherwise a backend on a loopback address is refused
        "SSRF_PROTECTION_ENABLED": "false",  # otherwise its webhook is silently not registered
    }
    return {f"LABEL_STUDIO_{name}": value for name, value in settings.items()} | {
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
    }


def _find_environment(cache: Path) -> Path:
    """Return a virtual environment that holds Label Studio in our version, made now if there is none."""
    own = cache / f"label-studio-{VERSION}"
    if _version(own) == VERSION:
        return own
    cache.mkdir(parents=True, exist_ok=True)
    _install([sys.executable, "-m", "venv", "--clear", str(own)])
    pip = [str(own / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _install([*pip, f"label-studio=={VERSION}"])  # about 2 minutes, 1 GB
    return own


def _version(environment: Path) -> str | None:
    python = environment / "bin" / "python"
    if not os.access(python, os.X_OK):
        return None
    code = "import importlib.metadata as m; print(m.version('label-studio'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _install(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_INSTALL_S)
    except subprocess.TimeoutExpired as error:
        raise NotInstallable(f"Label Studio {VERSION} was not installed after {_INSTALL_S} s") from error
    if done.returncode:
        raise NotInstallable(f"Label Studio {VERSION} cannot be installed here: {done.stderr.strip()[-800:]}")
