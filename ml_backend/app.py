"""The routes Label Studio calls, in a Flask app of our own; see docs/adr/0003-own-server.md for why.

/health and /setup answer at once, whatever the model does. A request we cannot serve is answered with an empty result
and a sentence, since Label Studio shows an annotator nothing of errors; one we cannot read gets a 4xx with a sentence.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
import time
from functools import partial
from typing import Annotated, Any

import msgspec
from flask import Flask, Response, g, request
from prometheus_client import CONTENT_TYPE_LATEST
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from ml_backend import auth, logs, metrics, openapi
from ml_backend.admin import make_admin
from ml_backend.connections import note_serves, note_told
from ml_backend.label_config import read_config
from ml_backend.label_studio import empty_answer
from ml_backend.limits import check_size
from ml_backend.predictions import predict_tasks
from ml_backend.project_texts import ProjectTexts
from ml_backend.queues import RecentLook
from ml_backend.readiness import why_no_clicks, why_no_corrections, why_no_trainings
from ml_backend.service import Service, timed
from ml_backend.state import read_state
from ml_backend.webhooks import EventBody, handle_event, start_training
from model.types import Refusal

log = logging.getLogger(__name__)
access_log = logging.getLogger("ml_backend.access")

_BLANKS = b" \r\n\t"
_BUSY_S = 0.5  # a click waits so long for a place
_CHUNK = 2**20  # bytes
_LOOK_KEPT_S = 2.0  # /health is open to all and not counted, and a Redis that hangs holds a thread up
_OFTEN = ("/health", "/metrics")  # asked for by machines, several times a minute
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_CAUSES = {401: "credentials", 403: "credentials", 413: "too_large", 429: "rate"}
_Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class TaskBody(msgspec.Struct):
    """What we read of a task; the rest, drafts with all their masks above all, is skipped over, not parsed."""

    id: _Id | None = None
    project: _Id | None = None
    data: dict[str, Any] = {}
    drafts: msgspec.Raw = msgspec.field(default_factory=partial(msgspec.Raw, b"[]"))


class ParamsBody(msgspec.Struct):
    """Parameters of a prediction; no context: a batch."""

    context: dict[str, Any] | None = None


class PredictBody(msgspec.Struct):
    """POST /predict."""

    tasks: list[TaskBody]
    label_config: str | None = None
    project: str | _Id | None = None
    params: ParamsBody | None = None


class SetupBody(msgspec.Struct):
    """POST /setup."""

    project: str | _Id | None = None
    schema: str | None = None


class TrainBody(msgspec.Struct):
    """POST /train."""

    project: Any = None


class _DraftResult(msgspec.Struct):
    type: str = ""
    from_name: str = ""
    value: msgspec.Raw = msgspec.Raw(b"{}")


class _Draft(msgspec.Struct):
    result: list[_DraftResult] = []
    updated_at: str = ""


def read_numbers(drafts: msgspec.Raw) -> list[dict[str, Any]]:
    """Return the drafts with nothing but their `number` results; masks are skipped over, and so is what is no draft."""
    try:
        found = msgspec.json.decode(drafts, type=list[_Draft])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("the task's drafts are not looked at for a granularity: %s", error)
        return []
    return [
        {
            "updated_at": draft.updated_at,
            "result": [
                {"type": item.type, "from_name": item.from_name, "value": msgspec.json.decode(item.value)}
                for item in draft.result
                if item.type == "number"
            ],
        }
        for draft in found
    ]


def without_masks(body: bytes) -> bytes:
    """Return a JSON body with its brush masks emptied: drafts carry megabytes of them, and none is read.

    Only lists without strings and lists in them go, what they hold is not looked at. A key cannot be found inside a
    string, where its quotes would be escaped.

    >>> without_masks(b'{"rle": [0, 12], "x": "rle"}')
    b'{"rle":[], "x": "rle"}'
    """
    kept, at = [], 0
    while (key := body.find(b'"rle"', at)) >= 0:
        start = body.find(b"[", key, key + 16) + 1
        end = body.find(b"]", start) if start else -1
        plain = end >= 0 and body.find(b'"', start, end) < 0 and body.find(b"[", start, end) < 0
        if not plain or body[key + 5 : start].translate(None, _BLANKS) != b":[":
            kept.append(body[at : key + 5])
            at = key + 5
        else:
            kept += [body[at:key], b'"rle":[']
            at = end
    return b"".join(kept) + body[at:] if kept else body


def create_app(service: Service) -> Flask:
    """Return the WSGI app over `service`, which is its extension; the caller starts and closes the service."""
    app = Flask("graco", static_folder=None)
    app.extensions[app.name] = service
    note_serves(service.settings, service.version(None))
    app.config["MAX_CONTENT_LENGTH"] = service.settings.request_max_mb * 2**20
    busy_at = service.settings.threads * 3 // 4
    places = threading.BoundedSemaphore(busy_at)
    # For servers that send none with /predict; the suffix is that of files which earlier versions left.
    schemas = ProjectTexts(service.settings.data_dir / "schemas", suffix=".xml")
    recent = RecentLook(service.settings.redis_url, keep_s=_LOOK_KEPT_S)
    state = metrics.StateCollector(lambda: read_state(service))

    @app.before_request
    def begin() -> None:
        g.start = time.perf_counter()
        logs.request_id.set(logs.adopt(request.headers.get("X-Request-Id")))

    @app.after_request
    def finish(response: Response) -> Response:
        took_s = time.perf_counter() - g.get("start", time.perf_counter())
        route, status = _route(), response.status_code
        method = request.method if request.method in _METHODS else "OTHER"
        metrics.REQUESTS.labels(route, str(status)).inc()
        metrics.LATENCY.labels(route).observe(took_s)
        if status in _CAUSES:
            metrics.REFUSALS.labels(_CAUSES[status]).inc()
        if status == 429:
            metrics.RATE_LIMITED.labels(route).inc()
        access_log.log(
            logging.DEBUG if route in _OFTEN and status < 400 else logging.INFO,
            "%s %s: %d in %.0f ms",
            *(method, route, status, took_s * 1000),
            extra={"fields": {"method": method, "route": route, "status": status, "ms": round(took_s * 1000, 1)}},
        )
        response.headers["X-Request-Id"] = logs.request_id.get()
        return response

    @app.teardown_request
    def end(_: BaseException | None) -> None:
        logs.request_id.set("-")  # the thread lives on

    @app.get("/")
    def index() -> Response:
        routes = sorted(rule.rule for rule in app.url_map.iter_rules() if rule.endpoint != "static")
        return _json({"model": "GraCo for Label Studio", "model_version": service.version(None), "routes": routes})

    @app.get("/health")
    def health() -> Response:
        state = "UP" if service.failure is None else "FAILED"
        body = {"status": state, "model_version": service.version(None), "model_loaded": service.ready}
        body |= {"error": service.failure} if service.failure else {}
        body |= {"warning": " | ".join(service.warnings)} if service.warnings else {}
        if (asked := request.args.get("ready")) is None:
            return _json(body)
        reasons, notes, url = why_no_clicks(service), [], service.settings.redis_url
        if asked != "model" and url is not None:  # model: for balancers, since clicks need nothing else
            found = recent.get()
            reasons += why_no_corrections(found)
            notes += why_no_trainings(found)
        return _json(body | {"ready": not reasons, "reasons": reasons, "notes": notes}, 503 if reasons else 200)

    @app.post("/setup")
    def setup() -> Response:
        body = _read(SetupBody)
        service.start()
        if body.schema and body.project is not None:
            schemas.keep(str(body.project), body.schema)
            try:
                read_config(body.schema)
            except Refusal as refusal:
                log.warning("project %s: %s", body.project, refusal)
        version = service.version(body.project)
        if body.project is not None:
            note_told(service.settings, body.project, version)
        return _json({"model_version": version})

    @app.post("/predict")
    def predict() -> Response:
        with timed("read"):
            body = _decode(without_masks(_body()), PredictBody)
        if not body.tasks:
            raise Refusal("the request names no task: send at least one in 'tasks'")
        context = body.params.context if body.params else None
        check_size(len(body.tasks), context, service.settings)
        project = None if body.project is None else str(body.project)
        config_text = body.label_config or schemas.find(project or "")
        if not config_text:
            raise Refusal("the request has no label_config and no /setup came before it for this project")
        config = read_config(config_text)
        tasks = [
            {"id": task.id, "project": task.project, "data": task.data}
            | ({"drafts": read_numbers(task.drafts)} if config.task_numbers and context is not None else {})
            for task in body.tasks
        ]
        if not places.acquire(timeout=_BUSY_S):  # Label Studio gives /health and webhooks one second
            log.warning("busy: %d predictions are being made, one more is refused", busy_at)
            metrics.REFUSALS.labels("busy").inc()
            reason = "the backend is busy with other predictions; click again"
            return _json({"results": [empty_answer(service.version(project), reason) for _ in tasks]})
        if context is not None:
            service.note_click()
        try:
            return _json({"results": predict_tasks(service, config, tasks, context, project=project)})
        finally:
            places.release()

    @app.post("/webhook")
    def webhook() -> Response:
        body = _body()
        return _json(handle_event(service, _decode(body, EventBody), body), 201)

    @app.post("/train")
    def train() -> Response:  # servers before 1.8 post here instead of sending START_TRAINING
        return _json(start_training(service, _read(TrainBody).project), 201)

    @app.get("/versions")
    def versions() -> Response:
        body = _body()  # Label Studio sends one with this GET
        project = _decode(body, SetupBody).project if body else request.args.get("project")
        return _json({"versions": service.versions(project)})

    @app.get("/metrics")
    def expose() -> Response:
        return Response(metrics.exposition(state), content_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json")
    def describe() -> Response:
        bodies = {"/predict": PredictBody, "/setup": SetupBody, "/webhook": EventBody, "/train": TrainBody}
        return _json(openapi.describe(app.url_map, app.view_functions, bodies))

    @app.errorhandler(Refusal)
    def refuse(refusal: Refusal) -> Response:
        metrics.REFUSALS.labels(metrics.cause_of(refusal)).inc()
        log.warning("%s refused: %s", _route(), refusal)
        return _json({"error": str(refusal)}, 422)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(_: RequestEntityTooLarge) -> Response:
        if auth.is_admins(request.path):
            return auth.say(413, f"the form is larger than {auth.ADMIN_BODY // 2**20} MB, the most that is taken here")
        limit = service.settings.request_max_mb
        return auth.say(413, f"the request is larger than {limit} MB; raise GRACO_REQUEST_MAX_MB to allow it")

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        log.warning("%s: %s", _route(), error.name)
        return _json({"error": f"{error.name}: {error.description}"}, error.code or 500)

    @app.errorhandler(Exception)
    def broken(error: Exception) -> Response:
        if _is_full(error):
            where = getattr(error, "filename", None) or service.settings.data_dir.resolve()
            log.error("%s could not write (%s): the disk of %s is full", _route(), error, where)
            said = f"the disk of {where} is full, so nothing of this was kept: make room there"
            if _route() == "/webhook":
                said += "; annotations so missed are fetched by: python -m ml_backend reconcile"
            return _json({"error": said}, 507)
        log.error("%s failed with an error of our own", _route(), exc_info=error)
        return _json({"error": f"internal error {logs.request_id.get()}; the log has the details under this id"}, 500)

    app.register_blueprint(make_admin(service))
    auth.install(app, service)
    return app


def _route() -> str:
    """Return the rule that a request fell under; its path may hold anything."""
    return request.url_rule.rule if request.url_rule else "unknown"


def _is_full(error: Exception) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL  # Python's own errors have none
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _json(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, content_type="application/json")


def _body() -> bytes:
    return b"".join(iter(lambda: request.stream.read(_CHUNK), b""))  # werkzeug's own chunks are small, and slow for it


def _decode(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Refusal(f"the request is not what {request.path} expects: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"the body is not JSON ({error})") from error
    except RecursionError as error:
        raise Refusal("the body is nested too deep to be a Label Studio request") from error


def _read(kind: type[Any]) -> Any:
    return _decode(_body(), kind)
