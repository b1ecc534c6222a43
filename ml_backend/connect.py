"""Connects this backend to a project of Label Studio as its forms would, and gives the webhook the secret it lacks.

Label Studio registers the webhook itself when a backend is added, but sends no basic auth with it; a header can be set.
What is as it should be is left alone, so that a second run changes nothing and only looks whether all still works.

Source: the API of Label Studio 1.23.2. A connection's password cannot be read, but each look at a connection makes
Label Studio ask /health and /setup with it, and says how that went.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from ml_backend.credentials import SECRET_HEADER, Secrets, open_secrets
from ml_backend.fetch import Fetcher, make_fetcher, read_answer
from ml_backend.label_config import check_config
from ml_backend.settings import Settings
from model.types import Refusal

T = TypeVar("T")

SSRF = (
    "start Label Studio with LABEL_STUDIO_ML_BLOCK_LOCAL_IP=false and LABEL_STUDIO_SSRF_PROTECTION_ENABLED=false "
    "(both: from 1.23 on it refuses private and container addresses)"
)
TITLE = "GraCo"
"""What a connection that we make is called."""
_LIMIT_S = 60.0  # of one answer; Label Studio asks us up to four times before it gives one
_PAGE = 100
_WELL = ("CO", "TR", "PR")  # states of a connection: connected, training, predicting
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LONGEST_REASON = 400  # characters


class _Project(msgspec.Struct):
    id: int
    title: str = ""
    label_config: str | None = None
    model_version: str | None = None
    show_collab_predictions: bool = True
    sampling: str | None = None
    total_annotations_number: int | None = None


class _Projects(msgspec.Struct):
    results: list[_Project]
    next: str | None = None


class _Connection(msgspec.Struct):
    id: int
    url: str
    title: str | None = None
    state: str = ""
    error_message: str | None = None
    is_interactive: bool = False
    auth_method: str = "NONE"
    basic_auth_user: str | None = None
    model_version: str | None = None


class _Webhook(msgspec.Struct):
    id: int
    url: str
    headers: dict[str, str] = {}
    is_active: bool = True
    send_payload: bool = True
    send_for_all_actions: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be connected, and how."""

    url: str  # this backend's, as Label Studio reaches it
    project: int | None = None
    create: str | None = None  # title of the project to make, or to use if there is one
    label_config: str | None = None  # None: the project's own stays
    force: bool = False  # replace a labelling configuration that annotations were made with


def default_url(settings: Settings) -> str:
    """Return this backend's address for a Label Studio on this machine.

    Raises:
        Refusal: Label Studio is elsewhere, so that only a person knows.
    """
    host = urlsplit(settings.label_studio_url or "").hostname
    if host is not None and host not in _LOOPBACK:
        raise Refusal(
            f"Label Studio is at {host}, and how it reaches this backend is not known here; say it: "
            f"--url http://HOST:{settings.port} (python -m ml_backend doctor names addresses)"
        )
    return f"http://127.0.0.1:{settings.port}"


def connect(settings: Settings, wish: Wish) -> Iterator[str]:
    """Connect, and yield a sentence on each thing that was done or found as it should be.

    Raises:
        Refusal: Label Studio declines something, or does not reach this backend.
        OSError: new secrets cannot be written.
    """
    studio = make_fetcher(settings)
    url = wish.url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise Refusal(f"{wish.url} is no address; give it with its scheme, such as http://127.0.0.1:{settings.port}")
    known = open_secrets(settings) if settings.auth == "on" else None
    project = yield from _project(studio, wish)
    yield from _label_config(studio, project, wish)
    backend = yield from _backend(studio, project, url, known)
    yield from _webhooks(studio, project, url, known)
    yield from _model_version(studio, project.id, backend, settings)
    yield f"reached: Label Studio gets {backend.model_version} from {url}"


def _project(studio: Fetcher, wish: Wish) -> Generator[str, None, _Project]:
    if wish.create is None:
        found = _get(studio, f"/api/projects/{wish.project}/", _Project)
        yield f"project {found.id}: {found.title!r}"
        return found
    for number in itertools.count(1):
        listed = _get(studio, f"/api/projects?page={number}&page_size={_PAGE}&include=id,title", _Projects)
        match = next((one for one in listed.results if one.title == wish.create), None)
        if match is not None:
            yield f"project {match.id}: {match.title!r} is there"
            return _get(studio, f"/api/projects/{match.id}/", _Project)
        if listed.next is None:
            break
    if wish.label_config is None:
        raise Refusal(
            f"project {wish.create!r} needs labels to be made; add --classes Car,Wheel or --label-config FILE"
        )
    _check(wish.label_config)
    content = {"title": wish.create, "label_config": wish.label_config}
    made = read_answer(_ask(studio, "POST", "/api/projects", content), "/api/projects", _Project)
    yield f"project {made.id}: {made.title!r} is made, with its labelling configuration"
    return _get(studio, f"/api/projects/{made.id}/", _Project)


def _check(label_config: str) -> None:
    grave = next((one for one in check_config(label_config) if one.severity == "error"), None)
    if grave is not None:
        raise Refusal(f"the labelling configuration is not one to click with: {grave.tag}: {grave.sentence}")


def _label_config(studio: Fetcher, project: _Project, wish: Wish) -> Iterator[str]:
    if wish.label_config is None:
        _check(project.label_config or "")
        yield "labels: those of the project stay"
        return
    if (project.label_config or "").strip() == wish.label_config.strip():
        yield "labels: as wanted"
        return
    _check(wish.label_config)
    if project.total_annotations_number and not wish.force:
        raise Refusal(
            f"project {project.id} has {project.total_annotations_number} annotations made with another labelling "
            "configuration; to replace it all the same: --force"
        )
    _ask(studio, "PATCH", f"/api/projects/{project.id}/", {"label_config": wish.label_config})
    yield "labels: the labelling configuration is set"


def _backend(studio: Fetcher, project: _Project, url: str, known: Secrets | None) -> Generator[str, None, _Connection]:
    found, others = _connections(studio, project.id, url)
    content: dict[str, Any] = {"project": project.id, "url": url, "title": TITLE, "is_interactive": True}
    if known is None:
        content["auth_method"] = "NONE"
    else:
        content |= {"auth_method": "BASIC_AUTH", "basic_auth_user": known.username, "basic_auth_pass": known.password}
    if found is None:
        _offer(studio, "POST", "/api/ml", content, url)
        yield f"connection: {url} is added, interactive, {_by(known)}"
    elif not found.is_interactive or not _let_in(found, known):
        _offer(studio, "PATCH", f"/api/ml/{found.id}", content | {"title": found.title or TITLE}, url)
        yield f"connection: {url} is set right: interactive, {_by(known)}"
    else:
        yield f"connection: {url} is there, interactive, {_by(known)}"
    found, others = _connections(studio, project.id, url)
    if found is None or found.state not in _WELL:
        why = "it is not kept" if found is None else found.error_message or "it says no reason"
        raise Refusal(f"Label Studio does not get on with {url} ({_cut(why)}); ask: python -m ml_backend doctor")
    for other in others:
        if other.state in _WELL and other.model_version == found.model_version:
            yield f"connection: {other.url} looks like this backend again; remove one of both in Settings > Model"
    return found


def _let_in(found: _Connection, known: Secrets | None) -> bool:
    if found.state not in _WELL:
        return False
    return known is None or (found.auth_method == "BASIC_AUTH" and found.basic_auth_user == known.username)


def _by(known: Secrets | None) -> str:
    return "without a password (GRACO_AUTH=off)" if known is None else f"as user {known.username} with its password"


def _connections(studio: Fetcher, project: int, url: str) -> tuple[_Connection | None, list[_Connection]]:
    """Return the connection to our address and the other ones; Label Studio asks each backend while we wait."""
    listed = _get(studio, f"/api/ml?project={project}", list[_Connection])
    ours = next((one for one in listed if one.url.rstrip("/") == url), None)
    return ours, [one for one in listed if one is not ours]


def _offer(studio: Fetcher, method: str, path: str, content: dict[str, Any], url: str) -> None:
    """Have Label Studio take a connection, which it does after asking it."""
    answer = studio.ask(path, timeout_s=_LIMIT_S, method=method, content=json.dumps(content).encode())
    if answer.status in (200, 201):
        return
    why = _reason(answer.body)
    if "reserved" in why or "SSRF" in why:
        raise Refusal(f"Label Studio refuses the address {url}; {SSRF}, then run this again")
    if re.search(r"\b401\b|authentication parameters", why):
        raise Refusal(
            f"{url} does not accept the password found here; run this with the environment of the backend "
            "(GRACO_DATA_DIR, GRACO_PASSWORD ...), and see that it was started since they were changed"
        )
    if re.search(r"\b429\b", why):
        raise Refusal(f"{url} saw too many wrong passwords from Label Studio's address; run this again in a minute")
    if "health check failed" in why:
        raise Refusal(
            f"Label Studio does not reach {url}; start the backend, or name its address as Label Studio sees it: "
            "--url http://HOST:PORT (in a container, localhost is the container itself)"
        )
    raise _declined(method, path, answer.status, studio, why)


def _webhooks(studio: Fetcher, project: _Project, url: str, known: Secrets | None) -> Iterator[str]:
    address = f"{url}/webhook"
    listed = _get(studio, f"/api/webhooks/?project={project.id}", list[_Webhook])
    header = {} if known is None else {SECRET_HEADER: known.webhook_secret}
    wanted = {"is_active": True, "send_payload": True, "send_for_all_actions": True}
    carries = "for all actions" + (f", with {SECRET_HEADER}" if header else "")
    ours = [hook for hook in listed if hook.url.rstrip("/") == address]
    if not ours:
        content = wanted | {"project": project.id, "url": address, "headers": header}
        _ask(studio, "POST", "/api/webhooks/", content)
        yield f"webhook: {address} is added, {carries}"
    for hook in ours:
        kept = {name: text for name, text in hook.headers.items() if name.lower() != SECRET_HEADER.lower()} | header
        if kept == hook.headers and hook.is_active and hook.send_payload and hook.send_for_all_actions:
            yield f"webhook: {address} is there, {carries}"
            continue
        _ask(studio, "PATCH", f"/api/webhooks/{hook.id}/", wanted | {"url": hook.url, "headers": kept})
        yield f"webhook: {address} is set right: {carries}"


def _model_version(studio: Fetcher, number: int, backend: _Connection, settings: Settings) -> Iterator[str]:
    """See that a project that shows predictions shows those of whichever version serves.

    Label Studio follows a connection's version while the project's model version is the connection's title. Uncertainty
    sampling needs the version itself instead, which `next-tasks` sets.
    """
    project = _get(studio, f"/api/projects/{number}/", _Project)
    shown = project.show_collab_predictions or settings.prelabel
    stale = _base(project.model_version) == _base(backend.model_version)  # pinned to one version of ours
    title = backend.title or TITLE
    if project.sampling == "Uncertainty sampling":
        yield f"model version: {project.model_version or 'none'}, as uncertainty sampling needs it (see next-tasks)"
    elif not shown:
        yield "model version: none, the project shows no predictions"
    elif project.show_collab_predictions and project.model_version and not stale:
        yield f"model version: {project.model_version}" + (
            ", whichever serves" if project.model_version == title else ""
        )
    else:
        change = {"show_collab_predictions": True, "model_version": title}
        _ask(studio, "PATCH", f"/api/projects/{number}/", change)
        yield f"model version: {title}, whichever serves; predictions are shown"


def _base(version: str | None) -> str | None:
    return version.partition("+")[0] if version else None


def _get(studio: Fetcher, path: str, kind: type[T]) -> T:
    return read_answer(_ask(studio, "GET", path), path, kind)


def _ask(studio: Fetcher, method: str, path: str, content: dict[str, Any] | None = None) -> bytes:
    body = None if content is None else json.dumps(content).encode()
    answer = studio.ask(path, timeout_s=_LIMIT_S, method=method, content=body)
    if answer.status in (200, 201):
        return answer.body
    raise _declined(method, path, answer.status, studio, _reason(answer.body))


def _declined(method: str, path: str, status: int, studio: Fetcher, why: str) -> Refusal:
    if status == 401 and studio.auth is not None:
        return studio.auth.refused()
    if status in (401, 403, 404):
        return Refusal(
            f"Label Studio answered {status} to {method} {path.partition('?')[0]}; there is no such project, or the "
            "token's user may not change it: use the token of a manager or administrator in LABEL_STUDIO_API_KEY"
        )
    return Refusal(f"Label Studio answered {status} to {method} {path.partition('?')[0]}: {why or 'it says no reason'}")


def _reason(body: bytes) -> str:
    """Return what an error of Label Studio's API says, for people."""
    try:
        said = json.loads(body)
    except ValueError:
        return ""
    texts = list(_texts(said.get("validation_errors") or said.get("detail") if isinstance(said, dict) else said))
    return _cut(re.sub(r"<[^>]*>", "", " ".join(texts)))


def _texts(said: object) -> Iterator[str]:
    if isinstance(said, str):
        yield said
    elif isinstance(said, dict | list):
        for one in said.values() if isinstance(said, dict) else said:
            yield from _texts(one)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."
