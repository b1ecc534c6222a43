"""What we answered, remembered: region id to the digest of its shape, its prompt, level and model version.

An accepted suggestion keeps the id that we gave it, so a submitted region is *accepted* when id and digest are known,
*corrected* when only the id is, and else *drawn* by hand. One small SQLite file, bounded, safe between processes.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    region_id TEXT PRIMARY KEY, project TEXT, task_id INTEGER, image_id TEXT, digest TEXT NOT NULL,
    prompt TEXT NOT NULL, granularity REAL, model_version TEXT NOT NULL, answered_s REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_by_time ON answers (answered_s);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One region we proposed."""

    region_id: str
    project: str | None
    task_id: int | None
    image_id: str
    digest: str  # of the shape, as `label_studio.shape_digest` gives it
    prompt: str  # JSON: clicks and box in pixels, phrase
    granularity: float | None  # 0..1
    model_version: str


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=5, check_same_thread=False, isolation_level=None)
    try:
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db


class AnswerStore:
    """The answers given last, at most `limit`."""

    def __init__(self, path: Path, *, limit: int) -> None:
        """Open or create the file; one connection, used by one thread at a time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._limit = limit
        self._lock = threading.Lock()
        self._added = 0
        try:
            self._db = _open(path)
        except sqlite3.OperationalError:  # locked, full, not ours: waiting or a person mends that
            raise
        except sqlite3.DatabaseError as error:
            aside = path.with_suffix(f".damaged-{time.time_ns()}")
            log.error("%s is damaged (%s): it is kept as %s, and remembering begins anew", path, error, aside.name)
            path.rename(aside)
            self._db = _open(path)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def remember(self, answers: Iterable[Answer]) -> None:
        """Keep `answers`; a region answered again replaces itself. A full disk is logged, no more."""
        rows = [(*astuple(answer), time.time()) for answer in answers]
        try:
            with self._lock:
                self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?,?,?,?,?,?,?,?,?)", rows)
                self._added += len(rows)
                if self._added >= min(self._limit, 1000) // 10:
                    self._added = 0
                    self._db.execute(
                        "DELETE FROM answers WHERE region_id IN"
                        " (SELECT region_id FROM answers ORDER BY answered_s DESC LIMIT -1 OFFSET ?)",
                        (self._limit,),
                    )
        except sqlite3.Error as error:
            log.error("answers could not be remembered (%s): corrections of them will count as drawn by hand", error)

    def find(self, region_id: str) -> Answer | None:
        """Return what was answered under this id, or None when it was not ours or is too long ago."""
        query = "SELECT * FROM answers WHERE region_id = ?"
        try:
            with self._lock, closing(self._db.execute(query, (region_id,))) as rows:
                row = rows.fetchone()
        except sqlite3.Error as error:
            log.error("remembered answers cannot be read (%s): a region counts as drawn by hand", error)
            return None
        if row is None:
            return None
        names = ("region_id", "project", "task_id", "image_id", "digest", "prompt", "granularity", "model_version")
        return Answer(**dict(zip(names, row[:8], strict=True)))

    def judge(self, region_id: str, digest: str) -> Literal["accepted", "corrected", "drawn"]:
        """Return what became of a submitted region: accepted as is, corrected, or drawn by hand."""
        answer = self.find(region_id)
        if answer is None:
            return "drawn"
        return "accepted" if answer.digest == digest else "corrected"

    def __len__(self) -> int:
        with self._lock, closing(self._db.execute("SELECT COUNT(*) FROM answers")) as rows:
            return int(rows.fetchone()[0])
