"""What /metrics tells: counts and times, no image, no user, no text of anybody's."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, Info

_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30)

REQUESTS = Counter("graco_requests_total", "requests answered, by route and HTTP status", ["route", "status"])
LATENCY = Histogram("graco_request_seconds", "time to answer a request, by route", ["route"], buckets=_STEPS)
STEP = Histogram(
    "graco_step_seconds", "time of one step of a prediction: fetch, encode, decode, shape", ["step"], buckets=_STEPS
)
PREDICTIONS = Counter(
    "graco_predictions_total", "predictions by outcome: answered, nothing_asked, refused, failed", ["outcome"]
)
EMBEDDINGS = Counter("graco_embeddings_total", "where an embedding came from: memory, disk, encoded", ["source"])
EMBEDDING_BYTES = Gauge("graco_embedding_memory_bytes", "embeddings held in memory")
REPEATED = Counter("graco_repeated_answers_total", "prompts answered from memory, no decoder run")
REGIONS = Gauge(  # of all processes, as the inbox counts them
    "graco_regions_total",
    "regions in submitted annotations: accepted, corrected, drawn, predicted, predicted-changed",
    ["kind"],
)
EVENTS = Gauge("graco_events", "events in the inbox: undone, done, failed", ["state"])
PHRASES = Counter(
    "graco_phrases_total",
    "phrases typed: known, part (taken as a level), unknown (answered as if there were none)",
    ["outcome"],
)
MODEL = Info("graco_model", "base weights and adapter that are loaded")
READY = Gauge("graco_model_loaded", "1 once the model is loaded and images can be encoded")
