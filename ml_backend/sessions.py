"""Sessions of the admin page that ended before their time: a signed cookie alone would open it for twelve hours more.

One empty file for each that was logged out, in the shared (or data) directory: all web processes and machines that
share it look there at each request, and a restart forgets none.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path

from active_learning.folders import sync


def new_id() -> str:
    """Return the id of a session that is opened now."""
    return secrets.token_hex(16)


class EndedSessions:
    """The ids of sessions that were logged out, for as long as their cookies would be good."""

    def __init__(self, folder: Path, lasting_s: float) -> None:
        """Take where they are kept, which need not exist yet, and how long a session lasts at most."""
        self._folder = folder
        self._lasting_s = lasting_s

    def __contains__(self, session: str) -> bool:
        """Whether a session was logged out."""
        return (self._folder / session).exists()

    def end(self, session: str) -> None:
        """Let a session open nothing any more, and forget those whose time is over anyway.

        Raises:
            OSError: it could not be written down.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / session).touch()
        with suppress(OSError):  # it is ended, though a power failure may undo that
            sync(self._folder)
            for file in self._folder.iterdir():
                with suppress(OSError):  # another process forgets it as well
                    if time.time() - file.stat().st_mtime > self._lasting_s:
                        file.unlink()
