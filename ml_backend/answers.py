"""What we answered, remembered: region id to the shape and its digest, its prompt, level, phrase and model.

An accepted suggestion keeps the id that we gave it, so a submitted region is *accepted* when id and digest are known,
*corrected* when only the id is, and else *drawn* by hand. One SQLite file, bounded, safe between processes.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from active_learning.databases import open_whole

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    region_id TEXT PRIMARY KEY, project TEXT, task_id INTEGER, image_id TEXT, digest TEXT NOT NULL,
    prompt TEXT NOT NULL, granularity REAL, model_version TEXT NOT NULL, answered_s REAL NOT NULL,
    phrase TEXT, adapter TEXT, shape BLOB, parts TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_by_time ON answers (answered_s);
"""
_ADDED = ("phrase TEXT", "adapter TEXT", "shape BLOB", "parts TEXT")  # columns that files of earlier versions lack
_OF_TASK = "(project = ? OR project GLOB ? || '.*') AND task_id IS ifnull(?, task_id)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One region we proposed."""

    region_id: str
    project: str | None
    task_id: int | None
    image_id: str
    digest: str  # of the shape, as `label_studio.shape_digest` gives it
    prompt: str  # JSON: clicks and box in pixels, level, phrase as typed
    granularity: float | None  # 0..1
    model_version: str
    phrase: str | None  # the known name that was answered for; None: none was typed, or an unknown one
    adapter: str | None  # that made the shape; None: base weights
    shape: bytes | None  # as `label_studio.pack_shape` gives it; None: answered by a version that did not keep it
    parts: str | None = None
    """Region ids of a proposal that has several, with spaces between.

    The first of them names all, itself first, the others only the first: a hundred times a hundred would be much. None:
    the region is all of its proposal, or was answered by a version that did not say.
    """


_COLUMNS = ", ".join(field.name for field in fields(Answer))


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=5, check_same_thread=False, isolation_level=None)
    try:
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)
        _add_columns(db)
    except sqlite3.Error:
        db.close()
        raise
    return db


def _add_columns(db: sqlite3.Connection) -> None:
    db.execute("BEGIN IMMEDIATE")  # another process may be about to do the same
    have = {row[1] for row in db.execute("PRAGMA table_info(answers)")}
    for column in _ADDED:
        if column.split()[0] not in have:
            db.execute(f"ALTER TABLE answers ADD COLUMN {column}")
    db.execute("COMMIT")


class AnswerStore:
    """The answers given last, at most `limit`."""

    def __init__(self, path: Path, *, limit: int) -> None:
        """Open or create the file; one connection, used by one thread at a time."""
        self._limit = limit
        self._lock = threading.Lock()
        self._added = 0
        self._db = open_whole(path, _open, "remembering begins anew")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def remember(self, answers: Iterable[Answer]) -> None:
        """Keep `answers`; a region answered again replaces itself. A full disk is logged, no more."""
        rows = [(*astuple(answer), time.time()) for answer in answers]
        try:
            with self._lock:
                places = ",".join("?" * (len(fields(Answer)) + 1))
                self._db.executemany(f"INSERT OR REPLACE INTO answers ({_COLUMNS}, answered_s) VALUES ({places})", rows)
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
        query = f"SELECT {_COLUMNS} FROM answers WHERE region_id = ?"
        try:
            with self._lock, closing(self._db.execute(query, (region_id,))) as rows:
                row = rows.fetchone()
        except sqlite3.Error as error:
            log.error("remembered answers cannot be read (%s): a region counts as drawn by hand", error)
            return None
        return None if row is None else Answer(**dict(zip(_COLUMNS.split(", "), row, strict=True)))

    def images_of(self, project: str, task: int | None) -> set[str]:
        """Return the images that were answered for in a task, or with None in the whole project.

        Args:
            project: its id; what requests called it may have a point and a time behind.
            task: its id.
        """
        query = f"SELECT DISTINCT image_id FROM answers WHERE {_OF_TASK}"
        with self._lock, closing(self._db.execute(query, (project, project, task))) as rows:
            return {image for (image,) in rows}

    def forget(self, project: str, task: int | None, images: Iterable[str]) -> int:
        """Forget the answers that `images_of` looks at, and all others on these images; return how many.

        Raises:
            sqlite3.Error: the file cannot be written.
        """
        with self._lock:
            before = self._db.total_changes
            self._db.execute(f"DELETE FROM answers WHERE {_OF_TASK}", (project, project, task))
            self._db.executemany("DELETE FROM answers WHERE image_id = ?", [(image,) for image in images])
            return self._db.total_changes - before

    def __len__(self) -> int:
        with self._lock, closing(self._db.execute("SELECT COUNT(*) FROM answers")) as rows:
            return int(rows.fetchone()[0])
