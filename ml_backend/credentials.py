"""The secrets of this backend: from settings, else made once and kept in a file that all its processes find.

`secrets.json` lies in the data (or shared) directory and is readable by its owner alone.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ml_backend import logs
from ml_backend.settings import Settings
from model.types import Refusal

log = logging.getLogger(__name__)

SECRET_HEADER = "X-Graco-Secret"
"""Carries the webhook secret."""
CONNECT = "python -m ml_backend connect --project ID"
"""The command that tells Label Studio."""

_MADE = ("password", "webhook_secret", "admin_password", "session_secret")
_FILE = "secrets.json"
_LENGTH = 24  # bytes of randomness


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """What opens this backend; empty where auth is off."""

    username: str
    password: str = field(default="", repr=False)
    webhook_secret: str = field(default="", repr=False)
    admin_password: str = field(default="", repr=False)
    session_secret: str = field(default="", repr=False)


def secrets_file(settings: Settings) -> Path:
    """Return where secrets are kept that no setting gives."""
    return settings.shared / _FILE


def known_secrets(settings: Settings) -> Secrets:
    """Return the secrets of the settings, and those made before; nothing is made now.

    Raises:
        Refusal: the file cannot be read.
    """
    return Secrets(username=settings.username, **_known(settings))


def open_secrets(settings: Settings) -> Secrets:
    """Return all secrets, making those that are missing; what is made is shown once, in the terminal.

    Raises:
        Refusal: the file cannot be read.
        OSError: it cannot be written.
    """
    wanted = _MADE if settings.auth == "on" else ("session_secret",)
    known = _known(settings)
    if not known.keys() >= set(wanted):
        folder = secrets_file(settings).parent
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{_FILE}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            known = _known(settings)
            made = {name: secrets.token_urlsafe(_LENGTH) for name in wanted if name not in known}
            if made:
                _write(secrets_file(settings), _read(secrets_file(settings)) | made)
        known |= made
        if made.keys() - {"session_secret"}:
            _announce(settings, made)
    logs.hide(known.values())
    return Secrets(username=settings.username, **known)


def _known(settings: Settings) -> dict[str, str]:
    given = {name: value.get_secret_value() for name in _MADE if (value := getattr(settings, name)) is not None}
    kept = {} if given.keys() >= set(_MADE) else _read(secrets_file(settings))
    return {name: kept[name] for name in _MADE if name in kept} | given


def _read(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise Refusal(
            f"{path} cannot be read ({type(error).__name__}); give it to the user who runs this, or delete it: new "
            f"secrets are made at the next start, and {CONNECT} tells Label Studio"
        ) from error


def _write(path: Path, content: dict[str, str]) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _announce(settings: Settings, made: dict[str, str]) -> None:
    """Show new secrets to a person; where output goes to a file or a container's log, only say where they are."""
    path = secrets_file(settings).resolve()
    if not sys.stdout.isatty():
        log.warning("new secrets were made, see %s (only its owner may read it)", path)
        return
    lines = [f"New secrets, shown this once and kept in {path}:"]
    if "password" in made:
        lines += [
            "  Label Studio (Settings > Model > Connect Model, Basic Authentication):",
            f"    Basic auth user  {settings.username}",
            f"    Basic auth pass  {made['password']}",
        ]
    if "admin_password" in made:
        lines.append(f"  admin page: http://localhost:{settings.port}/admin with password {made['admin_password']}")
    if "webhook_secret" in made:
        lines.append(f"  webhooks: header {SECRET_HEADER}: {made['webhook_secret']}")
    lines.append(f"To have all of it entered: {CONNECT}")
    print("\n".join(lines), flush=True)
