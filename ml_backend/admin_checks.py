"""The doctor's checks for the admin page: run by a thread, kept in a file that all web processes read."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import asdict, dataclass

from active_learning.folders import write_whole
from ml_backend.settings import Settings

log = logging.getLogger(__name__)

_OLD_S = 900.0


@dataclass(frozen=True, slots=True)
class Shown:
    """One check, as `ml_backend.doctor.Check`."""

    name: str
    status: str
    seen: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Looked:
    """What was seen, and when (UTC seconds)."""

    at_s: float
    checks: tuple[Shown, ...]


class Checks:
    """The checks that need no model of their own."""

    def __init__(self, settings: Settings) -> None:
        """Take what is looked at."""
        self._settings = settings
        self._path = settings.data_dir / "admin" / "doctor.json"
        self._one = threading.Lock()

    @property
    def running(self) -> bool:
        """Whether this process looks now."""
        return self._one.locked()

    def last(self) -> Looked | None:
        """Return what was seen last, by any process."""
        try:
            content = json.loads(self._path.read_bytes())
            return Looked(float(content["at_s"]), tuple(Shown(**check) for check in content["checks"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def renew(self) -> None:
        """Look in the background, unless somebody did lately."""
        last = self.last()
        if last is None or time.time() - last.at_s > _OLD_S:
            self.start()

    def start(self) -> None:
        """Look in the background; nothing where this process looks already."""
        if self._one.acquire(blocking=False):
            threading.Thread(target=self._look, name="doctor", daemon=True).start()

    def _look(self) -> None:
        from ml_backend.doctor import examine

        try:
            checks = examine(self._settings, quickly=True)
            content = {"at_s": time.time(), "checks": [asdict(check) for check in checks]}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(content))
        except Exception:
            log.exception("the doctor's checks could not be made")
        finally:
            self._one.release()
