"""Where everything stands, as metrics: queues, workers, inbox, trainings, versions, disk.

Read from files and Redis while Prometheus waits, so each look is short: a Redis that does not answer is one failed
attempt of less than a second, and says so (`graco_redis_up`).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

from active_learning.status import TrainingFolder, TrainingStatus, lines_in
from ml_backend.queues import look
from ml_backend.trainings import folder_of

if TYPE_CHECKING:
    from ml_backend.service import Service

log = logging.getLogger(__name__)

_REGIONS = ("accepted", "corrected", "drawn", "predicted", "predicted-changed")
_STATES = ("none", "queued", "running", "judging")
_VERDICTS = ("published", "kept", "rejected", "failed", "cancelled", "nothing new")


def read_state(service: Service) -> Iterator[Metric]:
    """Return the metrics of a service's data folders and Redis."""
    yield from _model(service)
    yield from _inbox(service)
    yield from _redis(service)
    yield from _trainings(service)
    yield from _disks(service)


def _model(service: Service) -> Iterator[Metric]:
    loaded = GaugeMetricFamily("graco_model_loaded", "1 once the model is loaded and images can be encoded")
    loaded.add_metric([], float(service.ready))
    yield loaded
    model = InfoMetricFamily("graco_model", "base weights and adapter that are loaded")
    if (names := service.loaded) is not None:
        model.add_metric([], {"base": names[0], "adapter": names[1] or "none"})
    yield model
    serving = InfoMetricFamily("graco_serving", "what answers, by line of adapters", labels=["line"])
    for line, version in service.lines().items():
        serving.add_metric([line], {"version": version})
    yield serving
    failing = GaugeMetricFamily("graco_adapter_lines_failing", "lines whose active version cannot be loaded")
    failing.add_metric([], len(service.warnings))
    yield failing


def _inbox(service: Service) -> Iterator[Metric]:
    try:
        counts, regions, oldest_s = service.inbox.counts(), service.inbox.regions(), service.inbox.oldest_s()
    except sqlite3.Error as error:
        log.warning("the inbox cannot be read for /metrics: %s", error)
        return
    events = GaugeMetricFamily("graco_events", "events in the inbox: undone, done, failed", labels=["state"])
    for state, count in counts.items():
        events.add_metric([state], count)
    yield events
    yield _age("graco_inbox_oldest_seconds", "age of the oldest event that is not taken in; 0: none waits", oldest_s)
    kinds = CounterMetricFamily(
        "graco_regions",
        "regions in submitted annotations: accepted, corrected, drawn, predicted, predicted-changed",
        labels=["kind"],
    )
    for kind, count in (dict.fromkeys(_REGIONS, 0) | regions).items():
        kinds.add_metric([kind], count)
    yield kinds


def _age(name: str, text: str, since_s: float | None) -> Metric:
    gauge = GaugeMetricFamily(name, text)
    gauge.add_metric([], 0.0 if since_s is None else max(0.0, time.time() - since_s))
    return gauge


def _redis(service: Service) -> Iterator[Metric]:
    found = look(service.settings.redis_url)
    up = GaugeMetricFamily("graco_redis_up", "1 when Redis answers; 0: it does not, or there is none")
    up.add_metric([], float(found.error is None))
    yield up
    waiting = GaugeMetricFamily("graco_queue_jobs", "jobs that wait, by queue", labels=["queue"])
    failed = GaugeMetricFamily("graco_queue_failed_jobs", "jobs that failed lately, by queue", labels=["queue"])
    oldest = GaugeMetricFamily(
        "graco_queue_oldest_seconds", "age of the oldest job that waits, by queue; 0: none", labels=["queue"]
    )
    workers = GaugeMetricFamily("graco_workers", "workers that reported lately, by queue", labels=["queue"])
    for queue in found.queues:
        waiting.add_metric([queue.name], queue.waiting)
        failed.add_metric([queue.name], queue.failed)
        oldest.add_metric([queue.name], queue.oldest_s or 0.0)
        alive = sum(worker.alive and queue.name in worker.queues for worker in found.workers)
        workers.add_metric([queue.name], alive)
    yield from (waiting, failed, oldest, workers)


def _trainings(service: Service) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "graco_training_state",
        "1 for where a line's training stands: none, queued, running, judging",
        labels=["line", "state"],
    )
    percent = GaugeMetricFamily("graco_training_percent", "steps done of the training that is pending", labels=["line"])
    verdict = GaugeMetricFamily(
        "graco_training_verdict", "1 for how a line's last training ended", labels=["line", "verdict"]
    )
    since = GaugeMetricFamily(
        "graco_training_success_age_seconds", "time since a line's last published one", labels=["line"]
    )
    for line in lines_in(service.settings.shared / "trainings"):
        pending, ended = _stands(folder_of(service.settings, line))
        now = "none" if pending is None else pending.state
        for name in _STATES:
            state.add_metric([line, name], float(name == now))
        percent.add_metric([line], 100.0 * pending.step / pending.steps if pending and pending.steps else 0.0)
        for name in _VERDICTS:
            verdict.add_metric([line, name], float(bool(ended) and ended[-1].state == name))
        published = [one for one in ended if one.state == "published"]
        if published:
            since.add_metric([line], max(0.0, time.time() - published[-1].asked_s))
    yield from (state, percent, verdict, since)


def _stands(folder: TrainingFolder) -> tuple[TrainingStatus | None, list[TrainingStatus]]:
    try:
        return folder.pending(), folder.history()
    except OSError as error:
        log.warning("trainings of %s cannot be read for /metrics: %s", folder.line, error)
        return None, []


def _disks(service: Service) -> Iterator[Metric]:
    free = GaugeMetricFamily("graco_disk_free_bytes", "room left where the data is: data, shared", labels=["place"])
    size = GaugeMetricFamily("graco_disk_size_bytes", "size of the disk where the data is", labels=["place"])
    for place, folder in (("data", service.settings.data_dir), ("shared", service.settings.shared)):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(folder)
            free.add_metric([place], usage.free)
            size.add_metric([place], usage.total)
    yield from (free, size)
