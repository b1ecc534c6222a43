"""The command that connects, against a real Label Studio and our backend with its password on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests

from ml_backend import doctor
from ml_backend.connections import note_told
from ml_backend.label_config import make_config
from tests.conftest import ROOT
from tests.e2e.label_studio_server import CREDENTIALS, SECRETS, LabelStudio, Project
from tests.e2e.photos import Photo
from tests.e2e.servers import get_text

pytestmark = pytest.mark.e2e


def connect(label_studio: LabelStudio, backend: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run our command as an operator would."""
    own = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token, **SECRETS}
    command = [sys.executable, "-m", "ml_backend", "connect", "--url", backend, *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=False)


def held(label_studio: LabelStudio, project: int) -> list[object]:
    """All that connecting could change."""
    hooks = label_studio.api("GET", f"/api/webhooks/?project={project}")
    (connection,) = label_studio.api("GET", f"/api/ml?project={project}")
    found = label_studio.api("GET", f"/api/projects/{project}/")
    parts = ("label_config", "model_version", "show_collab_predictions", "sampling")
    return [hooks, connection["auth_method"], connection["basic_auth_user"], *(found[part] for part in parts)]


def events_of(backend: str) -> float:
    """How many webhooks were taken in and acted on, or will be."""
    text = get_text(f"{backend}/metrics", auth=CREDENTIALS) or ""
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("graco_events{"))


def test_one_command_makes_a_project_that_is_let_in_and_a_second_run_changes_nothing(
    label_studio: LabelStudio, backend: str
) -> None:
    first = connect(label_studio, backend, "--create", "made by connect", "--classes", "Car,Wheel")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "is made" in first.stdout
    assert "is added" in first.stdout
    assert f"from {backend}" in first.stdout
    projects = label_studio.api("GET", "/api/projects?page_size=100")["results"]
    (project,) = [one["id"] for one in projects if one["title"] == "made by connect"]
    before = held(label_studio, project)
    (hook,) = before[0]
    assert hook["headers"] == {"X-Graco-Secret": SECRETS["GRACO_WEBHOOK_SECRET"]}
    assert (hook["url"], hook["send_for_all_actions"]) == (f"{backend}/webhook", True)
    assert before[1:5] == ["BASIC_AUTH", CREDENTIALS[0], make_config(["Car", "Wheel"]).strip(), "GraCo"]

    again = connect(label_studio, backend, "--create", "made by connect", "--classes", "Car,Wheel")
    assert again.returncode == 0, again.stderr
    assert not any(word in again.stdout for word in ("is made", "is added", "is set"))
    assert held(label_studio, project) == before


def test_label_studio_itself_tells_who_connects_without_the_password(label_studio: LabelStudio, backend: str) -> None:
    wanted = {"title": "no password", "label_config": make_config(["Object"])}
    project = label_studio.api("POST", "/api/projects", json=wanted)["id"]
    said = label_studio.session.post(f"{label_studio.url}/api/ml", json={"project": project, "url": backend})
    assert said.status_code == 400
    assert "401" in said.text


def test_a_webhook_without_the_secret_is_refused_the_doctor_says_so_and_connect_mends_it(
    label_studio: LabelStudio, backend: str, photo: Photo
) -> None:
    project = label_studio.add_project("webhook", make_config(["Object"]), photo, backend)
    (hook,) = label_studio.api("GET", f"/api/webhooks/?project={project.id}")
    assert requests.post(hook["url"], json={"action": "PROJECT_UPDATED"}, timeout=5).status_code == 401
    told = events_of(backend)
    label_studio.api("PATCH", f"/api/webhooks/{hook['id']}/", json={"url": hook["url"], "headers": {"X-Other": "1"}})
    mask = np.zeros((photo.height, photo.width), bool)
    mask[10:60, 10:60] = True
    label_studio.annotate(project, mask)
    check = webhook_check(label_studio, backend, project)
    assert check.status == "error"
    assert "X-Graco-Secret" in check.seen
    assert f"python -m ml_backend connect --project {project.id}" in check.remedy
    assert events_of(backend) == told, "what a stranger tells is not taken in"

    mended = connect(label_studio, backend, "--project", str(project.id))
    assert "set right" in mended.stdout, mended.stderr
    (hook,) = label_studio.api("GET", f"/api/webhooks/?project={project.id}")
    assert hook["headers"] == {"X-Other": "1", "X-Graco-Secret": SECRETS["GRACO_WEBHOOK_SECRET"]}
    assert webhook_check(label_studio, backend, project).status == "ok"
    label_studio.annotate(project, mask)
    deadline_s = time.monotonic() + 30
    while events_of(backend) == told:
        assert time.monotonic() < deadline_s
        time.sleep(0.3)


def webhook_check(label_studio: LabelStudio, backend: str, project: Project) -> doctor.Check:
    here = {"port": urlsplit(backend).port, "data_dir": Path(tempfile.mkdtemp(prefix="graco-doctor-"))}
    settings = label_studio.settings().model_copy(update=here)
    (connection,) = label_studio.api("GET", f"/api/ml?project={project.id}")
    note_told(settings, project.id, connection["model_version"])  # the backend did so in its own folder
    checks = {check.name: check for check in doctor.examine(settings)}
    assert checks[f"project {project.id}"].status == "ok", checks[f"project {project.id}"]
    return checks[f"project {project.id} webhook"]


def test_labels_that_annotations_were_made_with_are_replaced_by_force_alone(
    label_studio: LabelStudio, backend: str, photo: Photo
) -> None:
    project = label_studio.add_project("labelled", make_config(["Object"]), photo, backend)
    label_studio.annotate(project, np.ones((photo.height, photo.width), bool))
    words = ("--project", str(project.id), "--classes", "Object,Part")
    refused = connect(label_studio, backend, *words)
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    assert label_studio.api("GET", f"/api/projects/{project.id}/")["label_config"] == make_config(["Object"]).strip()
    forced = connect(label_studio, backend, *words, "--force")
    assert forced.returncode == 0, forced.stderr
    assert (
        label_studio.api("GET", f"/api/projects/{project.id}/")["label_config"]
        == make_config(["Object", "Part"]).strip()
    )
