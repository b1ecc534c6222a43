"""SQLite files that several processes open: one that is damaged is put aside, and writes are whole or not at all."""

from __future__ import annotations

import fcntl
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def open_whole(path: Path, open_file: Callable[[Path], sqlite3.Connection], remedy: str) -> sqlite3.Connection:
    """Return an open database, made anew where the file is damaged; the damaged one is kept under another name.

    Args:
        path: the file; `path`.lock appears beside it.
        open_file: opens or creates it, and closes it again if that fails.
        remedy: what happens to what it held, for the log.

    Raises:
        sqlite3.OperationalError: it is locked, full or not ours: waiting or a person mends that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # two processes that find it damaged shall not both put it aside
        try:
            return open_file(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            aside = path.with_suffix(f".damaged-{time.time_ns()}")
            log.error("%s is damaged (%s): it is kept as %s; %s", path, error, aside.name, remedy)
            for ending in ("-wal", "-shm", ""):  # a log left behind would be played into the new file
                beside = path.with_name(path.name + ending)
                if beside.exists():
                    beside.rename(aside.with_name(aside.name + ending))
            return open_file(path)


@contextmanager
def all_or_nothing(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Have everything in the block written in one transaction, or nothing; one thread at a time."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    finally:
        if db.in_transaction:  # something was raised, and SQLite has not gone back by itself
            db.execute("ROLLBACK")
