"""The doctor: looks at everything one click and one correction depend on, and says what to do about what is broken.

Each check stands alone, is bounded in time and never raises; none changes anything here or in Label Studio. What is
shown holds no token, password or query.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import shutil
import socket
import tempfile
import time
import warnings
from base64 import b64encode, urlsafe_b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import getproxies_environment

import msgspec
import redis
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rq import Queue, Worker
from rq.serializers import JSONSerializer

from active_learning.lines import SHARED
from ml_backend import queues
from ml_backend.connect import SSRF as _SSRF
from ml_backend.connections import Connection, is_ours
from ml_backend.credentials import SECRET_HEADER, known_secrets, secrets_file
from ml_backend.families import LIGHT, adapter_file, base_of, clip_folder, load_model
from ml_backend.fetch import Answer, Fetcher, read_answer
from ml_backend.images import decode_image
from ml_backend.jobs import ENCODE, connect
from ml_backend.label_config import check_config, read_config
from ml_backend.label_studio import read_batch
from ml_backend.readiness import why_no_trainings
from ml_backend.service import open_registry, serving_version
from ml_backend.settings import Settings
from ml_backend.supervisor import redis_server, redis_socket
from model.segmenter import BUNDLED_ADAPTER, Segmenter
from model.text import load_phrase_encoder
from model.types import Refusal

log = logging.getLogger(__name__)

Status = Literal["ok", "warning", "error", "skipped"]
T = TypeVar("T")

_PROJECTS = 20  # the newest ones are looked at
_PROJECTS_LIMIT_S = 60.0
_IMAGE_LIMIT_S = 10.0
_OLD_JOB_S = 600.0
_CLOCK_OFF_S = 60.0
_NEW_TOKEN = "copy one from Account & Settings > Personal Access Token into LABEL_STUDIO_API_KEY"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    seen: str
    remedy: str = ""  # an exact setting, command or menu entry


class _Version(msgspec.Struct):
    release: str


class _User(msgspec.Struct):
    email: str


class _Project(msgspec.Struct):
    id: int
    title: str = ""
    label_config: str | None = None
    model_version: str | None = None


class _Page(msgspec.Struct):
    results: list[_Project]


class _Webhook(msgspec.Struct):
    url: str
    is_active: bool = True
    send_payload: bool = True
    send_for_all_actions: bool = True
    actions: list[str] = []
    headers: dict[str, str] = {}


class _Tasks(msgspec.Struct):
    tasks: list[dict[str, Any]]


class _Health(msgspec.Struct):
    status: str
    model_version: str
    error: str | None = None
    warning: str | None = None


def examine(settings: Settings, *, quickly: bool = False) -> list[Check]:
    """Look at everything, from this machine to the newest task's image, and return what was seen.

    Args:
        settings: of the backend.
        quickly: leave out what loads the model, for a process that has loaded it already.
    """
    loading = (
        *(("weights", _weights), ("phrases", _phrases), ("adapter", _adapter), ("adapter versions", _versions)),
        ("encoder", _encoder),
    )
    checks = [
        *_guarded("settings", _settings, settings),
        *_guarded("forward proxy", _forward_proxy),
        *_guarded("data directory", _data_dir, settings),
        *(check for name, look in (() if quickly else loading) for check in _guarded(name, look, settings)),
        *_guarded("Redis", _redis, settings),
        *_guarded("auth", _auth, settings),
        *_guarded("this backend", _backend, settings),
        *_guarded("its address", _address, settings),
    ]
    reached = True
    for name, look in (("Label Studio", _label_studio), ("token", _token), ("projects", _projects)):
        if reached:
            checks += _guarded(name, look, settings)
            reached = settings.label_studio_url is not None and checks[-1].status in ("ok", "warning")
        else:
            checks.append(Check(name, "skipped", "what comes before it has to work first"))
    secrets = [secret for secret in _secrets(settings) if secret]
    return [replace(c, seen=_clean(c.seen, secrets), remedy=_clean(c.remedy, secrets)) for c in checks]


def show(checks: list[Check]) -> bool:
    """Print the checks, each with its remedy; return whether nothing failed."""
    colours = {"ok": "green", "warning": "yellow", "error": "bold red", "skipped": "dim"}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        text = Text(check.seen)
        if check.remedy:
            text.append(f"\n-> {check.remedy}", style="cyan")
        table.add_row(Text(check.status, style=colours[check.status]), check.name, text)
    console = Console()
    console.print(table)
    failed, doubtful = (sum(c.status == status for c in checks) for status in ("error", "warning"))
    console.print(f"{len(checks)} checks: {failed} failed, {doubtful} with a warning")
    return not failed


def _guarded(name: str, look: Callable[..., Iterator[Check]], *args: object) -> Iterator[Check]:
    try:
        yield from look(*args)
    except Refusal as refusal:  # our sentences read 'what is so; what to do'
        seen, _, remedy = str(refusal).partition("; ")
        yield Check(name, "error", seen, remedy or "mend that and run the doctor again: python -m ml_backend doctor")
    except Exception as error:
        log.debug("check %r failed", name, exc_info=True)
        yield Check(
            name,
            "error",
            f"this check ended with an error of its own ({type(error).__name__})",
            "please report it with the traceback: GRACO_LOG_LEVEL=DEBUG python -m ml_backend doctor",
        )


def _secrets(settings: Settings) -> Iterator[str | None]:
    key = settings.label_studio_api_key
    yield key.get_secret_value().strip() if key else None
    for url in (settings.redis_url, settings.label_studio_url):
        with contextlib.suppress(ValueError):
            yield urlsplit(url or "").password
    with contextlib.suppress(Refusal):
        known = known_secrets(settings)
        yield from (known.password, known.webhook_secret, known.admin_password, known.session_secret)


def _clean(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    text = " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())
    return text if len(text) <= 900 else f"{text[:897]}..."


def _shown(url: str) -> str:
    """Return an address without user, password and query."""
    scheme, separator, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}"


def _settings(settings: Settings) -> Iterator[Check]:
    given = []
    for name in sorted(settings.model_fields_set):
        value = getattr(settings, name)
        text = "***" if name == "label_studio_api_key" else _shown(value) if name.endswith("_url") else str(value)
        given.append(f"{name.upper() if name.startswith('label_studio') else f'GRACO_{name.upper()}'}={text}")
    yield Check("settings", "ok", " ".join(given) or "none is set: defaults")


def _forward_proxy() -> Iterator[Check]:
    """Nothing is said where none is set: most have none."""
    found = [f"{scheme.upper()}_PROXY" for scheme in ("https", "http") if getproxies_environment().get(scheme)]
    if found:
        yield Check(
            "forward proxy",
            "warning",
            f"{' and '.join(found)} is set, which the backend passes over: it connects to Label Studio and to images "
            "directly, so images outside of this network may be out of reach",
            "let Label Studio fetch them: in the project's Cloud Storage settings turn off pre-signed URLs, so that it "
            "hands the files over itself; or import files instead of addresses (docs/operators.md, Network)",
        )


def _data_dir(settings: Settings) -> Iterator[Check]:
    folder = settings.data_dir.resolve()
    there = next((place for place in (folder, *folder.parents) if place.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=there):
            free_mb = shutil.disk_usage(there).free // 2**20
    except OSError as error:
        remedy = f"sudo chown -R $(id -u) {there}, or set GRACO_DATA_DIR to a folder you own"
        yield Check("data directory", "error", f"{folder} cannot be written ({error.strerror})", remedy)
        return
    seen = f"{folder}, {free_mb / 1024:.1f} GB free" + ("" if there == folder else ", made at the first start")
    if free_mb < settings.embedding_disk_mb + 200:
        remedy = "free some space, set GRACO_DATA_DIR to a larger disk, or GRACO_EMBEDDING_DISK_MB=200"
        seen += f", while embeddings may grow to {settings.embedding_disk_mb} MB"
        yield Check("data directory", "error" if free_mb < 100 else "warning", seen, remedy)
    else:
        yield Check("data directory", "ok", seen)


def _weights(settings: Settings) -> Iterator[Check]:
    restore = "python -m ml_backend weights list, and verify NAME; import what is damaged again"
    try:
        base = base_of(settings)
        if base.family == LIGHT:
            restore = f"git checkout -- model/weights/{base.path.name} model/weights/{base.path.stem}.md"
            if base.digest not in base.path.with_suffix(".md").read_text():
                raise Refusal(f"{base.path} has digest {base.digest[:16]}, which its model card does not name")
        version = _load(settings, None).version
    except (Refusal, OSError) as error:
        if settings.family == LIGHT:
            restore = "git checkout -- model/weights/light.safetensors model/weights/light.md"
        yield Check("weights", "error", str(error), restore)
        return
    yield Check("weights", "ok", f"{version}, digest as in its card, all tensors load")


def _load(settings: Settings, adapter: Path | None) -> Segmenter:
    """Load the chosen model the plain way."""
    return load_model(settings.model_copy(update={"encoder": "exact"}), adapter=adapter, device="cpu")


def _phrases(settings: Settings) -> Iterator[Check]:
    if adapter_file(settings) is None:
        yield Check("phrases", "skipped", "they need an adapter, and there is none")
        return
    if settings.family != LIGHT:
        yield _clip(settings)
        return
    encoder = load_phrase_encoder()
    encoder.encode(["a thing"])
    yield Check("phrases", "ok", f"the phrase encoder {encoder.name} loads, digest as expected")


def _clip(settings: Settings) -> Check:
    from model.graco.text import find_clip

    found = find_clip(clip_folder(settings))
    if found is None:
        remedy = f"put the weights of CLIP ViT-B/32 into {clip_folder(settings)} (docs/checkpoints.md)"
        return Check("phrases", "warning", "CLIP's text encoder is not at hand, so that phrases are refused", remedy)
    return Check("phrases", "ok", f"CLIP's text encoder is {found}")


def _adapter(settings: Settings) -> Iterator[Check]:
    path = adapter_file(settings)
    if path is None and settings.family != LIGHT:
        seen = "none: clicks are answered by the base, levels and phrases have no effect"
        yield Check("adapter", "ok", seen, "python -m ml_backend weights import GraCo_base_lora.pth")
        return
    if path is None:
        seen = "GRACO_ADAPTER=none: a level chooses among three masks by their size, phrases have no effect"
        yield Check("adapter", "ok", seen, "unset GRACO_ADAPTER to have levels and phrases obeyed")
        return
    try:
        adapter = _load(settings, path).adapter
    except Refusal as refusal:
        remedy = "unset GRACO_ADAPTER to use the bundled one, or name a file trained on this base"
        if path == BUNDLED_ADAPTER:
            remedy = (
                f"git checkout -- model/weights/{BUNDLED_ADAPTER.name} (if 'phrases' above failed, mend that first)"
            )
        yield Check("adapter", "error", str(refusal), remedy)
        return
    yield Check("adapter", "ok", f"{adapter}, made for this base, all tensors load")


def _versions(settings: Settings) -> Iterator[Check]:
    """Say which version serves each line, and whether it loads."""
    registry = open_registry(settings)
    base = _load(settings, None)
    serving: list[str] = []
    broken: list[tuple[str, str]] = []
    for line in registry.lines():
        try:
            version = registry.active(line)
            if version is None:
                continue
            base.with_adapter(registry.intact(version))
        except Refusal as refusal:
            broken.append((line, str(refusal)))
        else:
            serving.append(f"{line} by {version.id}")
    unused = [line for line in registry.lines() if line != SHARED and settings.adapter_line == "shared"]
    seen = f"served: {', '.join(serving)}" if serving else "none is active; the configured adapter serves all projects"
    if unused:
        seen += f" (GRACO_ADAPTER_LINE=shared: {', '.join(unused)} not used)"
    if broken:
        seen = " | ".join(f"{line}: {why}" for line, why in broken) + f" ({seen})"
        remedy = (
            f"python -m ml_backend adapters list, then: python -m ml_backend adapters activate {broken[0][0]} VERSION"
        )
        yield Check("adapter versions", "error", seen, remedy)
    else:
        yield Check("adapter versions", "ok", seen)


def _encoder(settings: Settings) -> Iterator[Check]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of drivers it cannot use; that is what we report
        cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        remedy = "set GRACO_DEVICE=auto, or install the driver (nvidia-smi has to list the GPU)"
        yield Check("encoder", "error", "GRACO_DEVICE=cuda, but torch sees no CUDA device", remedy)
    elif cuda and settings.device != "cpu":
        yield Check("encoder", "ok", f"torch {torch.__version__} on {torch.cuda.get_device_name()}")
    elif settings.encoder == "exact":
        remedy = "unset GRACO_ENCODER to encode about twice as fast"
        yield Check("encoder", "ok", f"torch {torch.__version__} fp32 on the CPU, as GRACO_ENCODER=exact says", remedy)
    else:
        try:
            version = importlib.import_module("openvino").__version__
        except Exception as error:  # a broken shared library raises whatever it likes
            status: Status = "error" if settings.encoder == "fast" else "warning"
            seen = f"OpenVINO cannot be imported ({type(error).__name__}: {error}), images are encoded half as fast"
            yield Check("encoder", status, seen, "python -m pip install -r requirements.txt, or GRACO_ENCODER=exact")
        else:
            yield Check("encoder", "ok", f"OpenVINO {version.split('-')[0]} on the CPU")


def _redis(settings: Settings) -> Iterator[Check]:
    url = settings.redis_url or f"unix://{redis_socket(settings.data_dir)}"
    if settings.redis_url is None and redis_server() is None:
        remedy = "python -m pip install -r requirements.txt (it brings one), or apt-get install redis-server"
        yield Check("Redis", "warning", "no Redis server is installed: imports are not encoded ahead", remedy)
        return
    try:
        with contextlib.closing(connect(url)) as connection:
            version = connection.info("server").get("redis_version", "of unknown version")
            yield Check("Redis", "ok", f"{_shown(url)} answers, version {version}")
            yield from _guarded("encode worker", _worker, settings, connection, url)
            yield from _guarded("trainer", _trainer, settings, url)
    except (redis.RedisError, ValueError, OSError) as error:
        if settings.redis_url is None:
            seen = "the bundled server does not run, so imports are not encoded ahead"
            yield Check("Redis", "warning", seen, "make run starts it with everything else")
        else:
            seen = f"{_shown(url)} does not answer as a Redis ({type(error).__name__}: {error})"
            yield Check("Redis", "error", seen, "correct GRACO_REDIS_URL, or unset it to use the bundled server")


def _worker(settings: Settings, connection: redis.Redis, url: str) -> Iterator[Check]:
    queue = Queue(ENCODE, connection=connection, serializer=JSONSerializer)
    workers = Worker.all(queue=queue)
    waiting, oldest = len(queue), None
    if waiting and (job := queue.fetch_job(queue.get_job_ids(0, 1)[0])) is not None and job.enqueued_at:
        oldest = (datetime.now(UTC) - job.enqueued_at.replace(tzinfo=UTC)).total_seconds()
    age = f", the oldest for {oldest / 60:.0f} min" if oldest is not None else ""
    seen = f"{len(workers)} listening on the queue {ENCODE!r}, {waiting} jobs waiting{age}"
    remedy = "" if workers else "python -m ml_backend worker (make run starts one by itself)"
    if workers and oldest is not None and oldest > _OLD_JOB_S:
        remedy = "look into the worker's log; a second one may help: python -m ml_backend worker"
    yield Check("encode worker", "warning" if remedy else "ok", seen, remedy)
    failed = queue.failed_job_registry.get_job_ids()
    if failed:
        where = "$GRACO_REDIS_URL" if settings.redis_url else url
        last = queue.fetch_job(failed[-1])
        result = last.latest_result() if last is not None else None
        *_, line = ((result.exc_string if result else None) or "no reason is kept").strip().splitlines()
        why = line.partition("model.types.Refusal: ")[2] or line.partition(":")[0]  # other messages may hold anything
        remedy = f'mend that, then: rq requeue --all --queue {ENCODE} -S json -u "{where}"'
        yield Check("failed jobs", "warning", f"{len(failed)} of {ENCODE!r}, the last one: {why}", remedy)


def _trainer(settings: Settings, url: str) -> Iterator[Check]:
    found = queues.look(url)
    if found.error is not None:
        remedy = "mend that Redis and run the doctor again: python -m ml_backend doctor"
        yield Check("trainer", "warning", f"whether there is one cannot be told: Redis: {found.error}", remedy)
        return
    missing = why_no_trainings(found)
    if not missing:
        yield Check("trainer", "ok", "one has reported lately")
        return
    remedy = "python -m ml_backend trainer (make run starts one by itself)"
    if settings.ledger == "elsewhere":
        remedy = "on the machine that keeps the ledger: python -m ml_backend trainer"
    yield Check("trainer", "warning", missing[0].partition(";")[0], remedy)


def _local(settings: Settings) -> str:
    """Return this backend's address as seen from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def _backend(settings: Settings) -> Iterator[Check]:
    name, url = "this backend", _local(settings)
    try:
        answer = Fetcher(url, None, max_bytes=2**20, timeout_s=3).ask("/health", timeout_s=3)
    except Refusal:
        remedy = f"GRACO_PORT={settings.port} make run, and look at what it prints"
        yield Check(name, "warning", f"nothing answers at {url}/health", remedy)
        return
    try:
        health = msgspec.json.decode(answer.body, type=_Health)
    except (msgspec.DecodeError, UnicodeDecodeError):
        seen = f"something else answers at {url} (/health: status {answer.status})"
        yield Check(name, "error", seen, f"stop it, or choose another port: GRACO_PORT={settings.port + 1} make run")
        return
    if health.status != "UP":
        remedy = "mend that, then stop it and start it again: make run"
        yield Check(name, "error", f"{url} runs, but {health.error or 'reports ' + health.status}", remedy)
    elif health.model_version != serving_version(settings):
        seen = f"{url} serves {health.model_version}, but the weights here are {serving_version(settings)}"
        yield Check(name, "warning", seen, "stop it and start it again: make run")
    elif health.warning:
        yield Check(name, "warning", f"{url} runs, but {health.warning}", "see 'adapter versions' above")
    else:
        yield Check(name, "ok", f"{url} serves {health.model_version}")


def _auth(settings: Settings) -> Iterator[Check]:
    if settings.auth == "off":
        open_to = "this machine" if _is_loopback(settings.host) else "this machine's networks"
        seen = f"GRACO_AUTH=off: whoever is on {open_to} may click, train and choose versions"
        yield Check("auth", "warning", seen, "unset GRACO_AUTH, then: python -m ml_backend connect --project ID")
        return
    known, path = known_secrets(settings), secrets_file(settings)
    if path.exists() and path.stat().st_mode & 0o077:
        yield Check("auth", "warning", f"others may read {path}", f"chmod 600 {path}")
    elif not known.password:
        yield Check("auth", "ok", "on; secrets are made at the first start")
    else:
        kept = (
            f"; the passwords that were made are in {path}"
            if None in (settings.password, settings.admin_password)
            else ""
        )
        yield Check("auth", "ok", f"on; Label Studio's user is {known.username}{kept}")


def _is_loopback(host: str | None) -> bool:
    return host is None or host in ("localhost", "::1") or host.startswith("127.")


def _address(settings: Settings) -> Iterator[Check]:
    """Say what to type into Label Studio: its way to us, not ours to it."""
    port, there = settings.port, urlsplit(settings.label_studio_url or "").hostname
    near = f"http://localhost:{port} if Label Studio runs on this machine"
    inside = (
        f"http://host.docker.internal:{port} if it runs in a container on this machine "
        "(there, localhost is the container itself)"
    )
    far = f"http://{socket.gethostname()}:{port} from other machines and containers of this network"
    if not _is_loopback(settings.host):
        ours = "" if _is_loopback(there) else f" (Label Studio is at {there})"
        yield Check("its address", "ok", f"type into Settings > Model > Connect Model: {near}; {inside}; {far}{ours}")
    elif _is_loopback(there):
        seen = f"type into Settings > Model > Connect Model: {near}; only this machine reaches {settings.host}"
        remedy = f"if Label Studio runs in a container: GRACO_HOST=0.0.0.0 make run, then type {inside}"
        yield Check("its address", "ok", seen, remedy)
    else:
        seen = f"it listens on {settings.host}, which only this machine reaches, but Label Studio is at {there}"
        yield Check("its address", "warning", seen, f"GRACO_HOST=0.0.0.0 make run, then type {far}, or {inside}")


def _label_studio(settings: Settings) -> Iterator[Check]:
    if settings.label_studio_url is None:
        remedy = "LABEL_STUDIO_URL=http://localhost:8080 (its address as seen from here) and LABEL_STUDIO_API_KEY"
        yield Check("Label Studio", "warning", "LABEL_STUDIO_URL is not set: only public images can be read", remedy)
        return
    url = _shown(settings.label_studio_url)
    answer = _fetcher(settings, token=False).ask("/api/version")
    if answer.location is not None:
        path, target = "/api/version", "an address that cannot be read"
        with contextlib.suppress(ValueError):
            target = _shown(urljoin(f"{url}{path}", answer.location)).rstrip("/")
        moved = target.endswith(path)
        remedy = f"set LABEL_STUDIO_URL={target.removesuffix(path)}" if moved else "let this machine pass without it"
        seen = f"{url} redirects to {target}" + ("" if moved else ", perhaps a page to log in")
        yield Check("Label Studio", "error", seen, remedy)
        return
    try:
        release = msgspec.json.decode(answer.body, type=_Version).release
    except (msgspec.DecodeError, UnicodeDecodeError):
        seen = f"{url} answers, but not as Label Studio does (/api/version: status {answer.status})"
        remedy = "correct LABEL_STUDIO_URL; under a sub-path it ends with it, such as https://host/label-studio"
        if answer.status >= 500:
            remedy = "look into Label Studio's log (and its proxy's), then run the doctor again"
        yield Check("Label Studio", "error", seen, remedy)
        return
    seen = f"{url} is Label Studio {release}"
    off_s = _clock_off_s(answer)
    if abs(off_s) > _CLOCK_OFF_S:
        seen += f", but its clock is {abs(off_s):.0f} s {'ahead' if off_s > 0 else 'behind'}: signed links may fail"
        yield Check("Label Studio", "warning", seen, "on the machine that is wrong: sudo timedatectl set-ntp true")
    else:
        yield Check("Label Studio", "ok", seen)


def _clock_off_s(answer: Answer) -> float:
    try:
        return parsedate_to_datetime(answer.date).timestamp() - time.time() if answer.date else 0.0
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _fetcher(settings: Settings, *, token: bool = True) -> Fetcher:
    key = settings.label_studio_api_key if token else None
    return Fetcher(
        settings.label_studio_url,
        key.get_secret_value() if key else None,
        max_bytes=settings.image_max_mb * 2**20,
        timeout_s=min(settings.image_timeout_s, _IMAGE_LIMIT_S),
        allow_hosts=settings.allow_hosts,
    )


def _get(studio: Fetcher, path: str, kind: type[T], *, timeout_s: float = 5) -> T:
    """Return what Label Studio's API says, of the shape we expect."""
    answer = studio.ask(path, timeout_s=timeout_s)
    route = path.partition("?")[0]
    if answer.status == 401 and studio.auth is not None:
        raise studio.auth.refused()
    if answer.status in (403, 404):
        raise Refusal(
            f"Label Studio answered {answer.status} to {route}; the token's user may not see it: use the token of "
            "a manager or administrator in LABEL_STUDIO_API_KEY"
        )
    if answer.status != 200:
        raise Refusal(f"Label Studio answered {answer.status} to {route}; look into Label Studio's log")
    return read_answer(answer.body, path, kind)


def _claims(token: str) -> dict[str, Any] | None:
    """Return what a JWT says of itself, or None for anything else."""
    with contextlib.suppress(ValueError, IndexError):
        body = token.split(".")[1]
        claims = msgspec.json.decode(urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        return claims if isinstance(claims, dict) else None
    return None


def _token(settings: Settings) -> Iterator[Check]:
    key = settings.label_studio_api_key
    token = key.get_secret_value().strip() if key else ""
    claims = _claims(token)
    if not token:
        yield Check("token", "error", "LABEL_STUDIO_API_KEY is not set: uploaded images cannot be read", _NEW_TOKEN)
        return
    if claims is not None and claims.get("token_type") == "access":
        seen = "LABEL_STUDIO_API_KEY holds an access token, which ends after 300 s; a personal access token is needed"
        yield Check("token", "error", seen, _NEW_TOKEN)
        return
    kind = "personal access token" if claims is not None else "legacy token"
    if claims is None and not re.fullmatch("[0-9a-f]{40}", token):
        kind = "token of a kind we do not know (legacy: 40 hex digits, personal access: three parts with dots)"
    try:
        user = _get(_fetcher(settings), "/api/current-user/whoami", _User)
    except Refusal as refusal:
        why, _, remedy = str(refusal).partition("; ")
        yield Check("token", "error", f"a {kind} is not accepted: {why}", remedy)
        return
    yield Check("token", "ok", f"a {kind} of {user.email}, accepted")


def _projects(settings: Settings) -> Iterator[Check]:
    studio = _fetcher(settings)
    include = "include=id,title,label_config,model_version"
    page = _get(studio, f"/api/projects?page_size={_PROJECTS}&ordering=-id&{include}", _Page)
    until, connected = time.monotonic() + _PROJECTS_LIMIT_S, 0
    for project in page.results[:_PROJECTS]:
        name = f"project {project.id}"
        if time.monotonic() > until:
            yield Check(name, "skipped", f"the {_PROJECTS_LIMIT_S:.0f} s for all projects are over", "run it again")
            continue
        found = list(_guarded(name, _project, settings, studio, project))
        connected += bool(found)
        yield from found
    if not connected:
        seen = f"none of the newest {len(page.results)} projects has this backend" if page.results else "there is none"
        remedy = (
            f"create one, then in its Settings > Model > Connect Model type {_local(settings)} (see 'its address'); "
            f"if that is refused as a reserved network address, {_SSRF}; and run the doctor with the backend's own "
            "GRACO_DATA_DIR, where it keeps which projects it answered"
        )
        yield Check("projects", "warning", seen, remedy)


def _project(settings: Settings, studio: Fetcher, project: _Project) -> Iterator[Check]:
    """Look at a project that has this backend; of others say nothing."""
    name = f"project {project.id}"
    backends = _get(studio, f"/api/ml?project={project.id}", list[Connection], timeout_s=10)
    for backend in backends:
        if not is_ours(settings, project.id, backend):
            continue
        yield _connection(settings, project, backend)
        yield from _guarded(f"{name} webhook", _webhook, settings, studio, project, backend)
        yield from _guarded(f"{name} labels", _labels, project)
        yield from _guarded(f"{name} image", _image, settings, studio, project)
        return


def _connection(settings: Settings, project: _Project, backend: Connection) -> Check:
    name, url = f"project {project.id}", _shown(backend.url).rstrip("/")
    seen = f"{project.title!r} has this backend as {url}"
    if backend.state in ("DI", "ER"):
        why = backend.error_message or "no reason given"
        remedy = f"where Label Studio runs, try: curl {url}/health; if that fails, see 'its address' above"
        if "reserved" in why or "SSRF" in why:
            remedy = _SSRF
        elif re.search(r"\b401\b", why):
            why = f"the user or password that it gives is not ours, or it gives none: {why}"
            remedy = f"python -m ml_backend connect --project {project.id} --url {url}"
        return Check(name, "error", f"{seen}, but Label Studio is not connected to it ({why})", remedy)
    if not backend.is_interactive:
        remedy = "Settings > Model > ... > Edit: switch on 'Interactive preannotations'"
        return Check(name, "error", f"{seen}, but not for interactive use: clicks do not reach us", remedy)
    if project.model_version and project.model_version == backend.title != backend.model_version:
        remedy = (
            "only for 'Uncertainty sampling', which finds no scores under a title: PATCH "
            f'/api/projects/{project.id} {{"model_version": "{backend.model_version}"}}'
        )
        return Check(name, "ok", f"{seen}, connected; its model version is the title {backend.title!r}", remedy)
    return Check(name, "ok", f"{seen}, connected")


def _webhook(settings: Settings, studio: Fetcher, project: _Project, backend: Connection) -> Iterator[Check]:
    name, wanted = f"project {project.id} webhook", f"{backend.url.rstrip('/')}/webhook"
    hooks = _get(studio, f"/api/webhooks?project={project.id}", list[_Webhook])
    hook = next((hook for hook in hooks if hook.url.rstrip("/").startswith(wanted)), None)
    deaf = "so annotations and imports do not reach us"
    if hook is None:
        seen = (
            f"none leads to {_shown(wanted)}, {deaf} (Label Studio leaves it out, silently, while it refuses addresses)"
        )
        remedy = f"{_SSRF}; then Settings > Model: delete the backend and add it again, which registers the webhook"
        yield Check(name, "error", seen, remedy)
        return
    switch = f"Settings > Webhooks > {_shown(wanted)}: switch on"
    if not hook.is_active:
        yield Check(name, "error", f"it is switched off, {deaf}", f"{switch} the webhook itself")
    elif not hook.send_payload:
        seen = "it sends no payload, so we learn that something happened but not what"
        yield Check(name, "error", seen, f"{switch} 'Send payload'")
    elif not hook.send_for_all_actions:
        seen = f"it tells only of {', '.join(hook.actions) or 'nothing'}"
        yield Check(name, "warning", seen, f"{switch} 'Send for all actions'")
    elif not _lets_in(hook, settings):
        seen = f"it does not carry our secret ({SECRET_HEADER}), so what it tells is refused (reconcile fetches it)"
        remedy = f"python -m ml_backend connect --project {project.id} --url {_shown(backend.url)}"
        yield Check(name, "error", seen, remedy)
    else:
        yield Check(name, "ok", "active, with payload, for all actions")


def _lets_in(hook: _Webhook, settings: Settings) -> bool:
    known = known_secrets(settings)
    if settings.auth == "off" or not known.webhook_secret:
        return True
    headers = {name.lower(): text for name, text in hook.headers.items()}
    basic = b64encode(f"{known.username}:{known.password}".encode()).decode()
    given = headers.get(SECRET_HEADER.lower()), headers.get("authorization")
    return given[0] == known.webhook_secret or (given[0] is None and given[1] == f"Basic {basic}")


def _labels(project: _Project) -> Iterator[Check]:
    name = f"project {project.id} labels"
    findings = check_config(project.label_config or "")
    grave = [finding for finding in findings if finding.severity != "info"]
    if not grave:
        yield Check(name, "ok", "clicks, masks and classes fit together")
        return
    sentences = [f"{finding.tag}: {finding.sentence}" for finding in grave]
    more = f" (and {len(sentences) - 2} more)" if len(sentences) > 2 else ""
    remedy = (
        "Settings > Labeling Interface > Code: mend that, or print a ready one: python -m ml_backend label-config "
        "CLASS ...; to see everything: python -m ml_backend label-config --check FILE"
    )
    status: Status = "error" if grave[0].severity == "error" else "warning"
    yield Check(name, status, " | ".join(sentences[:2]) + more, remedy)


def _image(settings: Settings, studio: Fetcher, project: _Project) -> Iterator[Check]:
    name = f"project {project.id} image"
    newest = quote('{"ordering":["-tasks:id"]}')
    found = _get(studio, f"/api/tasks?project={project.id}&page_size=1&fields=task_only&query={newest}", _Tasks)
    if not found.tasks:
        yield Check(name, "skipped", "the project has no task yet", "import an image")
        return
    asks = read_batch(read_config(project.label_config or ""), found.tasks[0])
    start = time.perf_counter()
    data = studio.fetch(asks[0].uri, asks[0].task_id)
    fetched = time.perf_counter()
    pixels = decode_image(data, max_pixels=settings.image_max_megapixels * 10**6)
    decoded = time.perf_counter()
    yield Check(
        name,
        "ok",
        f"the newest task's has {pixels.shape[1]} x {pixels.shape[0]} pixels, {len(data) / 1e6:.1f} MB, fetched in "
        f"{(fetched - start) * 1e3:.0f} ms, decoded in {(decoded - fetched) * 1e3:.0f} ms",
    )
