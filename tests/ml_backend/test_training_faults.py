"""Trainings whose machine fails them: the worker is killed, memory runs out, the disk is full. Real processes all."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from active_learning.corrections import CorrectionStore
from active_learning.images import ImageStore
from active_learning.registry import AdapterRegistry
from ml_backend.jobs import connect
from ml_backend.settings import Settings
from ml_backend.supervisor import _heap
from ml_backend.trainings import folder_of, lacks_room, request, requeue
from tests.active_learning.test_cycle import fill
from tests.conftest import ROOT
from tests.ml_backend.conftest import wait_until
from tests.ml_backend.test_trainings import children, environment, trainer

BACK_S = 120  # from a kill until somebody works again


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Path:
    """Photos as they are encoded: each once for all tests here."""
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture
def settings(tmp_path, redis_url, encoded) -> Settings:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "embeddings").symlink_to(encoded)
    return Settings(data_dir=tmp_path / "data", redis_url=redis_url)


def corrected(settings: Settings) -> None:
    store = CorrectionStore(settings.data_dir / "corrections.sqlite")
    fill(store, ImageStore(settings.data_dir / "images"), photos=3)
    store.close()


def end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def logged_trainer(settings: Settings, log: Path, changes: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ml_backend", "trainer", "--once"]
    with log.open("wb") as file:
        there = environment(settings) | changes
        return subprocess.Popen(command, cwd=ROOT, env=there, start_new_session=True, stderr=file)


def versions(settings: Settings, segmenter) -> list[str]:
    registry = AdapterRegistry(settings.data_dir / "adapters", base=segmenter.digest)
    return [version.id for version in registry.versions("project-3")]


def test_a_worker_killed_in_a_training_leaves_no_orphan_and_the_next_takes_it_up_and_publishes_once(
    settings, segmenter
):
    corrected(settings)
    status, trainings = request(settings, "project-3", "the button"), folder_of(settings, "project-3")
    first = trainer(settings)
    try:
        wait_until(lambda: trainings.status().state == "running", limit_s=120)
        (child,) = children(first.pid)
        first.kill()
        first.wait()
        killed_s = time.monotonic()
        wait_until(lambda: not Path(f"/proc/{child}").exists(), limit_s=10)
        second = trainer(settings)  # as `run` starts it again
        try:
            wait_until(lambda: trainings.status().attempts == 2, limit_s=BACK_S)
            assert time.monotonic() - killed_s < BACK_S
            assert second.wait(240) == 0
        finally:
            end(second)
    finally:
        end(first)
    ended = trainings.status()
    assert (ended.id, ended.state, ended.errors) == (status.id, "published", 0)
    assert versions(settings, segmenter) == [ended.version]


@contextlib.contextmanager
def little_memory(mb: int):
    """A control group of this much memory: its processes are added through the file that is given."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"graco-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(mb * 2**20))
        except OSError:
            group.rmdir()
            continue
        try:
            yield group / "cgroup.procs"
        finally:
            wait_until(lambda group=group: not (group / "cgroup.procs").read_text().strip())
            group.rmdir()
        return
    pytest.skip("no control group may be made here")


def test_a_training_that_the_system_ends_for_its_memory_says_so_and_goes_on_with_smaller_steps(
    settings, segmenter, tmp_path
):
    corrected(settings)
    request(settings, "project-3", "the button")
    trainings = folder_of(settings, "project-3")
    process = logged_trainer(settings, tmp_path / "log", {"GRACO_TRAIN_STEPS": "60"})
    try:
        with little_memory(24) as procs:
            wait_until(lambda: trainings.status().step > 0, limit_s=120)
            (child,) = children(process.pid)
            procs.write_text(str(child))
            wait_until(lambda: trainings.status().said, limit_s=60)
        assert trainings.status().said.startswith("memory ran out: the system ended its process, which held ")
        assert process.wait(300) == 0
    finally:
        end(process)
    ended = trainings.status()
    assert (ended.state, ended.attempts, ended.errors) == ("published", 2, 0)
    assert "memory ran out: training begins anew with 1 clicks a step" in (tmp_path / "log").read_text()
    assert versions(settings, segmenter) == [ended.version]


def test_a_training_that_may_not_have_the_memory_it_takes_fails_with_what_to_do(settings, tmp_path):
    corrected(settings)
    request(settings, "project-3", "the button")
    trainings = folder_of(settings, "project-3")
    process = logged_trainer(
        settings, tmp_path / "log", _heap("trainer") | {"GRACO_TRAIN_STEPS": "60", "GRACO_TRAIN_MEMORY_MB": "500"}
    )
    try:
        assert process.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        end(process)
    (ended,) = trainings.history()
    assert (ended.state, ended.errors) == ("failed", 0)
    assert ended.said.startswith(
        "memory does not suffice to learn from one click at a time; raise GRACO_TRAIN_MEMORY_MB"
    )
    assert re.search(
        r"memory ran out \(.*\): training begins anew with 1 clicks a step", (tmp_path / "log").read_text()
    )


def test_a_training_on_a_full_disk_says_so_and_goes_on_where_it_was_once_there_is_room(settings, segmenter, tmp_path):
    corrected(settings)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=320m tmpfs "$1" || exit 77; cp -a "$2/." "$1"; exec "$3" -m ml_backend trainer'
    request(settings, "project-3", "the button")
    with (tmp_path / "log").open("wb") as log:
        command = ["unshare", "--mount", "sh", "-c", mount, "sh", str(disk), str(settings.data_dir), sys.executable]
        there = environment(settings) | {"GRACO_TRAIN_STEPS": "90", "GRACO_DATA_DIR": str(disk)}
        process = subprocess.Popen(command, cwd=ROOT, env=there, start_new_session=True, stderr=log)
    seen = settings.model_copy(update={"data_dir": Path(f"/proc/{process.pid}/root{disk}")})
    trainings = folder_of(seen, "project-3")

    def step() -> int:
        if process.poll() is not None:
            said = (tmp_path / "log").read_text()
            assert process.returncode == 77 or said.startswith("unshare:"), said
            pytest.skip("a disk of our own may not be mounted here")
        now = trainings.status()
        return 0 if now is None else now.step

    try:
        wait_until(lambda: step() >= 60, limit_s=600)  # one checkpoint is written
        ballast = seen.data_dir / "ballast"
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(2**16))
        wait_until(lambda: not trainings.locked, limit_s=60)
        assert trainings.pending() is not None
        assert lacks_room(seen)
        os.truncate(ballast, ballast.stat().st_size - 2**20)
        wait_until(lambda: trainings.status().said, limit_s=30)
        assert trainings.status().said == f"waits until 128 MB are free on the disk of {disk}: make room there"
        assert trainings.status().state == "queued"
        ballast.unlink()
        assert wait_until(lambda: (ended := trainings.history()) and ended[0], limit_s=500).state == "published"
        (ended,) = trainings.history()
        registry = AdapterRegistry(seen.data_dir / "adapters", base=segmenter.digest)
        assert [version.id for version in registry.versions("project-3")] == [ended.version]
    finally:
        end(process)
    assert (ended.attempts, ended.errors) == (2, 0)
    said = (tmp_path / "log").read_text()
    assert "going on from step" in said
    assert "checkpoint.pt.draft" not in said


def test_where_the_disk_lacks_room_nothing_is_queued_and_the_reason_is_told_once(settings, monkeypatch, caplog):
    corrected(settings)
    request(settings, "project-3", "the button")
    monkeypatch.setattr("ml_backend.trainings._ROOM_MB", 10**9)
    with connect(str(settings.redis_url)) as connection:
        assert requeue(settings, connection) == requeue(settings, connection) == []
        assert caplog.text.count("make room there") == 1
        monkeypatch.undo()
        assert [one.line for one in requeue(settings, connection)] == ["project-3"]
