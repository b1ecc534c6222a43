"""What /metrics tells: counts and times, no image, no user, no text of anybody's.

Counts are made where things happen, and add up over all processes of this machine where PROMETHEUS_MULTIPROC_DIR names
a folder (`run` does so). What stands in files and in Redis is read when it is asked for: see `StateCollector`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from threading import Lock

from prometheus_client import (
    PROCESS_COLLECTOR,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_KEEP_S = 3.0
_CAUSES = {  # the module that refused, to what was wrong
    "ml_backend.app": "request",
    "ml_backend.fetch": "image_fetch",
    "ml_backend.images": "image",
    "ml_backend.label_config": "label_config",
    "ml_backend.label_studio": "prompt",
    "ml_backend.brush": "mask",
    "ml_backend.outlines": "mask",
    "ml_backend.predictions": "nothing_found",
    "ml_backend.service": "model",
    "ml_backend.serving": "model",
    "ml_backend.webhooks": "event",
    "ml_backend.auth": "credentials",
    "ml_backend.admin": "admin",
}

REQUESTS = Counter("graco_requests_total", "requests answered, by route and HTTP status", ["route", "status"])
LATENCY = Histogram("graco_request_seconds", "time to answer a request, by route", ["route"], buckets=_STEPS)
STEP = Histogram(
    "graco_step_seconds",
    "time of one step: read, fetch, encode, decode, shape, remember; load_adapter; ingest",
    ["step"],
    buckets=_STEPS,
)
PREDICTIONS = Counter(
    "graco_predictions_total", "predictions by outcome: answered, nothing_asked, refused, failed", ["outcome"]
)
REFUSALS = Counter(
    "graco_refusals_total",
    "what was not done, by cause: busy, too_large, credentials, rate, request, label_config, prompt, image, "
    "image_fetch, mask, nothing_found, model, event, admin, other",
    ["cause"],
)
RATE_LIMITED = Counter("graco_rate_limited_total", "requests answered 429, by route", ["route"])
EMBEDDINGS = Counter("graco_embeddings_total", "where an embedding came from: memory, disk, encoded", ["source"])
EMBEDDING_BYTES = Gauge(
    "graco_embedding_memory_bytes", "embeddings held in memory, by all processes", multiprocess_mode="livesum"
)
REPEATED = Counter("graco_repeated_answers_total", "prompts answered from memory, no decoder run")
PHRASES = Counter(
    "graco_phrases_total",
    "phrases typed: known, part (taken as a level), unknown (answered as if there were none)",
    ["outcome"],
)
ADAPTER_FAILURES = Counter("graco_adapter_load_failures_total", "adapter versions that could not be served")


for _metric, _values in (  # from zero, so that the first of a kind is an increase
    (PREDICTIONS, ("answered", "nothing_asked", "refused", "failed")),
    (REFUSALS, ("busy", "too_large", "credentials", "rate", "other", *_CAUSES.values())),
    (EMBEDDINGS, ("memory", "disk", "encoded")),
    (PHRASES, ("known", "part", "unknown")),
    (STEP, ("read", "fetch", "encode", "decode", "shape", "remember", "load_adapter", "ingest")),
):
    for _value in _values:
        _metric.labels(_value)


def cause_of(error: BaseException) -> str:
    """Return why a request was refused, as one of a few words: told by the module that raised, never by its sentence.

    >>> cause_of(ValueError("no module of ours raised it"))
    'other'
    """
    cause, traceback = "other", error.__traceback__
    while traceback is not None:  # the innermost that is known; what it calls into has no cause of its own
        cause = _CAUSES.get(traceback.tb_frame.f_globals.get("__name__", ""), cause)
        traceback = traceback.tb_next
    return cause


class StateCollector:
    """What is read anew for each scrape, and kept for some seconds: a scrape costs the same however often it comes."""

    def __init__(self, read: Callable[[], Iterable[Metric]], *, keep_s: float = _KEEP_S) -> None:
        """Take what reads it; it must not take long."""
        self._read = read
        self._keep_s = keep_s
        self._lock = Lock()
        self._found: list[Metric] = []
        self._found_s = -float("inf")

    def describe(self) -> Iterator[Metric]:
        """Return nothing: names are known when it is read."""
        return iter(())

    def collect(self) -> list[Metric]:
        """Return the metrics, read at most so many seconds ago."""
        with self._lock:
            if time.monotonic() - self._found_s > self._keep_s:
                self._found = list(self._read())
                self._found_s = time.monotonic()
            return self._found


def cache_counts() -> dict[str, int]:
    """Return embeddings by source, and prompts answered from memory (repeated), over all that `exposition` counts."""
    registry = CollectorRegistry()
    try:
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    except ValueError:
        registry = REGISTRY
    counts = {"memory": 0, "disk": 0, "encoded": 0, "repeated": 0}
    for sample in (sample for metric in registry.collect() for sample in metric.samples):
        if sample.name in ("graco_embeddings_total", "graco_repeated_answers_total"):
            counts[sample.labels.get("source", "repeated")] += int(sample.value)
    return counts


def exposition(state: StateCollector) -> bytes:
    """Return everything in Prometheus' text format: the counts of this process, or of all where they share a folder."""
    registry = CollectorRegistry()
    registry.register(state)
    try:
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    except ValueError:  # one process, no folder
        return generate_latest(REGISTRY) + generate_latest(registry)
    registry.register(PROCESS_COLLECTOR)
    return generate_latest(registry)
