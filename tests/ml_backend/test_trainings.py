"""Trainings through a real Redis and a real worker: asked for, carried out, killed, gone on with."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rq import Queue, Worker
from rq.job import JobStatus
from rq.serializers import JSONSerializer
from typer.testing import CliRunner

from active_learning.corrections import CorrectionStore
from active_learning.images import ImageStore
from active_learning.registry import AdapterRegistry
from ml_backend.jobs import connect
from ml_backend.queues import look
from ml_backend.readiness import why_no_trainings
from ml_backend.settings import Settings
from ml_backend.training_command import app
from ml_backend.trainings import (
    TRAINING,
    Cores,
    Patience,
    _carry_out,
    _used_by_others_s,
    _Worker,
    ask_when_due,
    cancel,
    folder_of,
    line_of,
    new_for,
    request,
    requeue,
    train,
    why_not,
)
from model.types import Refusal
from tests.active_learning.test_cycle import fill
from tests.conftest import ROOT
from tests.ml_backend.conftest import wait_until


@pytest.fixture
def connection(redis_url):
    with connect(redis_url) as connection:
        yield connection


@pytest.fixture
def settings(tmp_path, redis_url) -> Settings:
    return Settings(data_dir=tmp_path, redis_url=redis_url, train_steps=3, train_too_few="publish")


def environment(settings: Settings) -> dict[str, str]:
    return os.environ | {
        "GRACO_DATA_DIR": str(settings.data_dir),
        "GRACO_REDIS_URL": str(settings.redis_url),
        "GRACO_TRAIN_STEPS": "3",
        "GRACO_TRAIN_TOO_FEW": "publish",
        "GRACO_ENCODER": "exact",
    }


def trainer(settings: Settings) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ml_backend", "trainer", "--once"]
    return subprocess.Popen(command, cwd=ROOT, env=environment(settings), start_new_session=True)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_a_trainer_whose_redis_is_emptied_in_mid_training_is_known_again_afterwards(connection, redis_url):
    queue = Queue(TRAINING, connection=connection, serializer=JSONSerializer)
    worker = _Worker([queue], connection=connection, serializer=JSONSerializer)
    worker.report()
    job = queue.enqueue_call(time.time)
    execution = worker.prepare_execution(job)
    connection.flushall()
    worker.maintain_heartbeats(job, execution)  # as while it trains
    assert connection.hexists(worker.key, "birth")
    worker.report()
    assert why_no_trainings(look(redis_url)) == []
    assert [one.name for one in look(redis_url).workers] == [worker.name]


def test_asking_again_while_a_training_waits_queues_one_job(settings, connection):
    first = request(settings, "project-3", "the button")
    again = request(settings, "project-3", "50 new corrections")
    assert first.id == again.id
    assert [one.id for one in requeue(settings, connection)] == [first.id]
    assert requeue(settings, connection) == []
    assert connection.llen("rq:queue:training") == 1


def test_a_job_that_a_killed_worker_left_is_queued_again_once_it_should_have_begun(settings, connection):
    status = request(settings, "project-3", "the button")
    requeue(settings, connection)
    queue = Queue(TRAINING, connection=connection, serializer=JSONSerializer)
    job = queue.fetch_job(f"{status.id}-1")
    queue.remove(job)  # a worker took it
    job.prepare_for_execution("killed", connection.pipeline())
    job.set_status(JobStatus.STARTED)
    job.started_at = datetime.now(UTC)
    job.save()
    assert requeue(settings, connection) == []
    job.started_at -= timedelta(seconds=61)
    job.save()
    assert [one.id for one in requeue(settings, connection)] == [status.id]
    assert queue.get_job_ids() == [f"{status.id}-1"]


def test_a_job_that_is_in_no_queue_any_more_is_queued_again(settings, connection):
    status = request(settings, "project-3", "the button")
    requeue(settings, connection)
    connection.delete("rq:queue:training")  # taken by a worker that died before it wrote that down
    assert [one.id for one in requeue(settings, connection)] == [status.id]


def test_while_a_process_holds_the_line_nothing_is_queued(settings, connection):
    request(settings, "project-3", "the button")
    with folder_of(settings, "project-3").alone():
        assert requeue(settings, connection) == []


@pytest.mark.parametrize("full", [False, True])
def test_a_queued_training_that_was_cancelled_ends_at_the_trainers_next_look_on_a_full_disk_too(
    settings, connection, monkeypatch, full
):
    monkeypatch.setattr("ml_backend.trainings.lacks_room", lambda settings: full)
    status = request(settings, "project-3", "the button")
    requeue(settings, connection)
    folder = folder_of(settings, "project-3")
    folder.cancel()
    assert requeue(settings, connection) == []
    assert folder.pending() is None
    assert [(one.id, one.state) for one in folder.history()] == [(status.id, "cancelled")]


def test_a_training_that_nobody_works_on_is_cancelled_at_once_and_another_stops_at_its_next_step(settings):
    assert cancel(settings, "project-3") is None
    waiting = request(settings, "project-3", "the button")
    assert cancel(settings, "project-3") == (waiting, True)
    running = request(settings, "project-3", "the button")
    with folder_of(settings, "project-3").alone():
        assert cancel(settings, "project-3") == (running, False)


def test_asking_while_a_cancelled_training_still_ends_says_so(settings):
    status = request(settings, "project-3", "the button")
    folder = folder_of(settings, "project-3")
    folder.cancel()
    with folder.alone(), pytest.raises(Refusal, match=f"{status.id} was cancelled and ends at its next step"):
        request(settings, "project-3", "the button again")
    assert request(settings, "project-3", "and again").id != status.id


def test_an_error_of_our_own_is_tried_three_times_and_then_told(settings, connection, monkeypatch):
    request(settings, "project-3", "the button")
    (settings.data_dir / "corrections.sqlite").mkdir()
    monkeypatch.setenv("GRACO_DATA_DIR", str(settings.data_dir))
    for _ in range(3):
        with pytest.raises(Exception, match="unable to open"):
            train("project-3")
    ended = folder_of(settings, "project-3").status()
    assert ended is not None
    assert (ended.state, ended.errors) == ("failed", 3)
    assert "unable to open" in ended.said
    assert folder_of(settings, "project-3").pending() is None


def test_a_training_whose_process_dies_again_and_again_fails_with_a_sentence(settings, connection):
    trainings = folder_of(settings, "project-3")
    status = trainings.note(trainings.ask("the button"), attempts=40)
    assert requeue(settings, connection) == []
    ended = trainings.status()
    assert ended is not None
    assert (ended.id, ended.state) == (status.id, "failed")
    assert "died 40 times" in ended.said


def test_a_training_that_would_bring_nothing_is_told_why_and_one_that_failed_may_be_tried_again(settings):
    folder = folder_of(settings, "project-3")
    assert why_not(None, 0) == "there are no corrections yet"
    assert why_not(None, 1) is None
    status = folder.ask("the button")
    assert why_not(folder.status(), 5) == "one is queued already"
    folder.end(status, "rejected", "it is worse")
    assert why_not(folder.status(), 0) == "nothing was corrected since the last training"
    assert why_not(folder.status(), 1) is None
    assert why_not(folder.status(), 0, whole=False) is None, "what it gave cannot serve"
    folder.end(folder.ask("the button"), "failed", "no memory")
    assert why_not(folder.status(), 0) is None


@pytest.fixture
def ledger(settings):
    """Three annotations of project 3 that came at second 1000."""
    with closing(CorrectionStore(settings.data_dir / "corrections.sqlite", clock=lambda: 1000.0)) as store:
        fill(store, ImageStore(settings.data_dir / "images"), photos=3)
        yield store


def end(settings, state, *, asked_s, ended_s):
    folder = folder_of(settings, "project-3")
    folder.end(folder.ask("a test", now_s=asked_s), state, "a test", snapshot_s=asked_s, ended_s=ended_s)


@pytest.mark.parametrize("state", ["failed", "cancelled"])
@pytest.mark.parametrize("rule", [{"train_after": 5}, {"train_after": 0, "train_every_hours": 1}])
def test_corrections_of_a_training_that_failed_are_trained_on_again_after_a_rest(settings, ledger, state, rule):
    settings = settings.model_copy(update=rule)
    end(settings, state, asked_s=2000.0, ended_s=9000.0)
    assert new_for(ledger, folder_of(settings, "project-3")) == ledger.counts("3").corrections
    assert ask_when_due(settings, ledger, now_s=9000.0 + 3599) == []
    assert request(settings, "project-3", "the button").state == "queued", "by hand at any time"
    end(settings, state, asked_s=10_000.0, ended_s=20_000.0)
    assert ask_when_due(settings, ledger, now_s=20_000.0 + 7199) == [], "after the second one twice as long"
    (asked,) = ask_when_due(settings, ledger, now_s=20_000.0 + 7200)
    assert "new corrections" in asked.reason


@pytest.mark.parametrize("state", ["published", "kept", "rejected", "nothing new"])
def test_corrections_of_a_training_that_came_to_a_verdict_make_none_due_again(settings, ledger, state):
    settings = settings.model_copy(update={"train_after": 1})
    end(settings, state, asked_s=2000.0, ended_s=3000.0)
    end(settings, "failed", asked_s=4000.0, ended_s=5000.0)
    assert new_for(ledger, folder_of(settings, "project-3")) == 0
    assert ask_when_due(settings, ledger, now_s=1e6) == []


def test_the_hours_of_a_line_that_was_never_trained_begin_with_its_first_correction(settings, ledger):
    settings = settings.model_copy(update={"train_after": 0, "train_every_hours": 2})
    assert ask_when_due(settings, ledger, now_s=1000.0 + 7199) == []
    (asked,) = ask_when_due(settings, ledger, now_s=1000.0 + 7200)
    assert asked.reason.startswith("2 hours without a training")


EVENING_S = 86_400.0 + 22 * 3600


def test_at_night_all_corrections_of_the_day_are_trained_on_thoroughly_learned_from_or_not(settings, ledger):
    settings = settings.model_copy(update={"train_after": 1, "train_at_night": "22-6"})
    folder = folder_of(settings, "project-3")
    end(settings, "published", asked_s=2000.0, ended_s=3000.0)
    assert new_for(ledger, folder) == 0, "by day they were learned from"
    assert ask_when_due(settings, ledger, now_s=EVENING_S - 60) == []
    (asked,) = ask_when_due(settings, ledger, now_s=EVENING_S + 60)
    assert asked.thorough
    assert asked.why.endswith("corrections since the last thorough training (thorough)")
    assert ask_when_due(settings, ledger, now_s=EVENING_S + 90) == [], "it is pending"
    folder.end(asked, "cancelled", "a test", ended_s=EVENING_S + 90)
    folder.end(folder.ask("a test", thorough=True, now_s=EVENING_S + 90), "rejected", "worse", ended_s=EVENING_S + 900)
    assert new_for(ledger, folder, thorough=True) == 0
    assert ask_when_due(settings, ledger, now_s=EVENING_S + 86_400) == [], "nothing came since"
    with closing(CorrectionStore(settings.data_dir / "corrections.sqlite", clock=lambda: EVENING_S + 1000)) as store:
        fill(store, ImageStore(settings.data_dir / "images"), photos=1, project="3")
    (by_number,) = ask_when_due(settings, ledger, now_s=EVENING_S + 2000)
    assert not by_number.thorough, "one a night"
    folder.end(by_number, "published", "better", snapshot_s=EVENING_S + 2000)
    (asked,) = ask_when_due(settings, ledger, now_s=EVENING_S + 86_400)
    assert asked.thorough, "and the next one in the next night"


def test_thorough_trainings_that_fail_do_not_keep_quick_ones_from_being_due(settings, ledger):
    settings = settings.model_copy(update={"train_after": 1, "train_at_night": "22-6"})
    folder = folder_of(settings, "project-3")
    for hour in (0, 2):
        status = folder.ask("a test", thorough=True, now_s=EVENING_S + hour * 3600)
        folder.end(status, "failed", "too slow", ended_s=EVENING_S + hour * 3600 + 60)
    (asked,) = ask_when_due(settings, ledger, now_s=EVENING_S + 3 * 3600)
    assert not asked.thorough
    folder.end(asked, "failed", "a test", ended_s=EVENING_S + 3 * 3600 + 60)
    assert ask_when_due(settings, ledger, now_s=EVENING_S + 4 * 3600) == [], "both rest"
    (asked,) = ask_when_due(settings, ledger, now_s=EVENING_S + 4.5 * 3600)
    assert asked.thorough, "two hours after the second failure"


def test_a_thorough_training_asked_for_by_command_is_one_or_says_that_another_is_pending(settings, monkeypatch):
    monkeypatch.setenv("GRACO_DATA_DIR", str(settings.data_dir))
    monkeypatch.setattr("ml_backend.logs.configure", lambda *_, **__: None)  # its handler would outlive the test
    folder = folder_of(settings, "project-3")
    command = ["start", "--project", "3", "--thorough"]
    assert CliRunner().invoke(app, command).exit_code == 0
    status = folder.pending()
    assert status.thorough
    shown = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["status"]).output
    assert "asked for by command (thorough)" in " ".join(shown.split())
    folder.end(status, "cancelled", "a test")
    request(settings, "project-3", "the button")
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 1
    assert "is not a thorough one" in told.output


def test_a_quick_training_that_is_pending_does_not_stand_for_a_thorough_one(settings, ledger):
    folder = folder_of(settings, "project-3")
    request(settings, "project-3", "the button")
    assert new_for(ledger, folder) == 0
    assert new_for(ledger, folder, thorough=True) == ledger.counts("3").corrections
    assert not request(settings, "project-3", "a command", thorough=True).thorough, "one at a time"


@pytest.mark.parametrize(("thorough", "steps", "views"), [(False, 350, 2), (True, 1400, 8)])
def test_a_thorough_training_takes_four_times_the_steps_and_crops(settings, monkeypatch, thorough, steps, views):
    from active_learning import learn

    model = object.__new__(learn.LightSegmenter)
    model._digest = "0" * 64
    taken = []

    def run(place, trainings, status, *, config, **_):
        taken.append(config)
        return trainings.end(status, "cancelled", "a test")

    monkeypatch.setattr("ml_backend.trainings._limit_memory", lambda wanted: None)
    monkeypatch.setattr("ml_backend.families.load_model", lambda settings, **how: model)
    monkeypatch.setattr("active_learning.cycle.run", run)
    before = torch.get_num_threads()
    settings = settings.model_copy(update={"train_steps": 0})
    status = request(settings, "project-3", "a test", thorough=thorough)
    try:
        _carry_out(settings, folder_of(settings, "project-3"), status)
    finally:
        torch.set_num_threads(before)
    (config,) = taken
    assert config.views == views
    assert config.training(100, rank=8, alpha=16, device="cpu", precision="no").steps == steps


def test_lines_follow_the_setting(settings):
    assert line_of(settings, 3) == "project-3"
    assert line_of(settings.model_copy(update={"adapter_line": "shared"}), 3) == "shared"


def test_training_waits_while_somebody_clicks_but_not_forever(tmp_path):
    clicked = tmp_path / "clicked"
    began_s = time.monotonic()
    Patience(clicked).wait()
    assert time.monotonic() - began_s < 0.1
    clicked.touch()
    Patience(clicked).wait()
    assert 0.3 < time.monotonic() - began_s < 1.5
    os.utime(clicked, (time.time() + 3600,) * 2)  # a clock that was set back must not stop trainings
    began_s = time.monotonic()
    Patience(clicked).wait()
    assert time.monotonic() - began_s < 0.1


def test_the_last_click_is_told_by_its_age(tmp_path):
    clicked = tmp_path / "clicked"
    assert Patience(clicked).quiet_s() == math.inf
    clicked.touch()
    os.utime(clicked, (time.time() - 90,) * 2)
    assert Patience(clicked).quiet_s() == pytest.approx(90, abs=5)
    os.utime(clicked, (time.time() + 3600,) * 2)
    assert Patience(clicked).quiet_s() == math.inf


@pytest.mark.parametrize(("count", "beside", "alone"), [(1, 1, 1), (2, 1, 2), (4, 2, 4), (6, 3, 4), (16, 8, 8)])
def test_a_training_that_is_alone_takes_more_than_half_of_few_cores(monkeypatch, count, beside, alone):
    monkeypatch.setattr("ml_backend.trainings._LOOK_S", 0.0)
    used_s = 0.0
    cores = Cores(count, lambda: used_s)
    assert cores.now(math.inf) == alone
    assert cores.now(3.0) == beside  # somebody clicked three seconds ago
    assert cores.now(100.0) == alone
    used_s += 60.0
    assert cores.now(math.inf) == beside  # others compute
    assert cores.now(math.inf) == alone  # and do so no more


def test_a_training_begins_beside_others_until_it_has_looked():
    assert Cores(2, lambda: 0.0).now(math.inf) == 1


def test_what_the_training_computes_is_none_of_what_others_do(monkeypatch):
    cores = SimpleNamespace(user=50.0, nice=20.0, system=5.0, idle=1000.0, iowait=7.0)
    own = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=30.0, system=1.0))
    monkeypatch.setattr("psutil.cpu_times", lambda: cores)
    monkeypatch.setattr("psutil.Process", lambda: own)
    assert _used_by_others_s() == 44.0


def test_what_another_process_computes_is_seen():
    before_s = _used_by_others_s()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 2: pass"], check=True)
    assert _used_by_others_s() - before_s > 1.5


@pytest.mark.parametrize(("setting", "seen"), [(0, [2, 1, 2]), (3, [3, 3, 3])])
def test_a_training_computes_with_the_threads_that_it_may_take(settings, monkeypatch, setting, seen):
    """Its encoder has both of two cores; it begins with half of them, and a pause may give more; or as many as set."""
    from active_learning import learn  # as the training finds it: another test may have loaded it anew

    model = object.__new__(learn.LightSegmenter)
    model._digest = "0" * 64
    threads = []

    def load(settings, **how):
        threads.append(how["threads"])
        return model

    def run(place, trainings, status, *, pause, **_):
        threads.append(torch.get_num_threads())
        pause()
        threads.append(torch.get_num_threads())
        return trainings.end(status, "cancelled", "a test")

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("ml_backend.trainings.Cores.now", lambda self, quiet_s: 2)
    monkeypatch.setattr("ml_backend.trainings._limit_memory", lambda wanted: None)
    monkeypatch.setattr("ml_backend.families.load_model", load)
    monkeypatch.setattr("active_learning.cycle.run", run)
    before = torch.get_num_threads()
    try:
        trainings = folder_of(settings, "project-3")
        _carry_out(settings.model_copy(update={"train_threads": setting}), trainings, trainings.ask("a test"))
    finally:
        torch.set_num_threads(before)
    assert threads == seen


def test_a_training_is_carried_out_although_its_process_is_killed(settings, connection, segmenter):
    store, images = CorrectionStore(settings.data_dir / "corrections.sqlite"), ImageStore(settings.data_dir / "images")
    fill(store, images, photos=3)
    status = request(settings, "project-3", "the button")
    trainings = folder_of(settings, "project-3")
    process = trainer(settings)
    try:
        wait_until(lambda: trainings.status().state == "running", limit_s=120)
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
        assert process.wait(420) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    ended = trainings.status()
    assert (ended.id, ended.state, ended.attempts) == (status.id, "published", 2)
    registry = AdapterRegistry(settings.data_dir / "adapters", base=segmenter.digest)
    active = registry.active("project-3")
    assert active is not None
    assert active.id == ended.version
    assert active.snapshot == store.snapshot("3").id
    assert not trainings.work(ended).exists()
    store.close()


def test_a_trainer_that_waits_holds_no_torch_also_where_there_are_corrections_to_look_at(settings, connection):
    with closing(CorrectionStore(settings.data_dir / "corrections.sqlite")) as store:
        fill(store, ImageStore(settings.data_dir / "images"), photos=1)
    command = [sys.executable, "-m", "ml_backend", "trainer"]
    chosen = environment(settings) | {"GRACO_TRAIN_AFTER": "1000"}
    with subprocess.Popen(command, cwd=ROOT, env=chosen) as process:
        try:
            wait_until(lambda: Worker.all_keys(connection=connection), limit_s=60)
            (key,) = Worker.all_keys(connection=connection)
            beat = connection.hget(key, "last_heartbeat")
            wait_until(lambda: connection.hget(key, "last_heartbeat") != beat)  # it has looked at the ledger by then
            status = Path(f"/proc/{process.pid}/status").read_text()
            mapped = Path(f"/proc/{process.pid}/maps").read_text()
        finally:
            process.terminate()
        assert process.wait(20) == 0
    assert "libtorch" not in mapped
    assert int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) < 150 * 1024
