"""What Label Studio reported, kept before it is acted on: raw events, one row each, durable.

Label Studio sends an event once and waits a second, so a webhook does nothing but write it here. The key is the digest
of the body: the same event five times is one row. Redis only says what to do next; whether it was done stands here.

An event is on the disk when `add` returns. That it was acted on may be forgotten when the power fails: then it is acted
on again, which changes nothing.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from active_learning.databases import all_or_nothing, open_whole

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often an event is tried until it counts as failed: tried every six hours, or when asked (`reconcile --retry`)."""
SETTLE_S = 20.0
"""An event that came so recently is on its way by itself."""
_PATIENCE = 10  # each further attempt waits so many times longer
_AGAIN_S = 6 * 3600.0
_AGAIN_UNTIL_S = 14 * 86400.0  # since it came
_AGAIN_MOST = 20  # at a time
_DEADLY = 1000  # attempts of an event that is never tried again by itself
_KEEP_DONE_S = 7 * 86400.0
_LONGEST_ERROR = 500  # characters
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    key TEXT PRIMARY KEY, action TEXT NOT NULL, body BLOB NOT NULL, packed INTEGER NOT NULL, received_s REAL NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL, touched_s REAL NOT NULL, error TEXT
);
CREATE INDEX IF NOT EXISTS events_by_state ON events (state, touched_s);
CREATE TABLE IF NOT EXISTS regions (kind TEXT PRIMARY KEY, count INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event as it came."""

    key: str
    action: str
    body: bytes  # JSON
    received_s: float  # UTC


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=5, check_same_thread=False, isolation_level=None)
    try:
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db


class Inbox:
    """The events of one data folder; used by many threads and processes."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; one connection, used by one thread at a time."""
        self._lock = threading.Lock()
        self._db = open_whole(path, _open, "what it held is fetched again by: python -m ml_backend reconcile")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def add(self, body: bytes, action: str, *, again: bool = False) -> str:
        """Keep an event, and return its key once it is on the disk; one that came before is left as it is.

        Args:
            body: of the event.
            action: it reports.
            again: have it acted on once more although it is done: what it brought is no longer there.

        Raises:
            sqlite3.Error: it could not be written.
        """
        key = hashlib.blake2b(body, digest_size=16).hexdigest()
        packed = zlib.compress(body, 1)
        smaller = len(packed) < len(body)
        now_s = time.time()
        with self._lock:
            self._db.execute("PRAGMA synchronous=FULL")
            try:
                self._db.execute(
                    "INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?, 'undone', 0, ?, NULL)",
                    (key, action, packed if smaller else body, smaller, now_s, now_s),
                )
                if again:
                    self._db.execute(
                        "UPDATE events SET state = 'undone', attempts = 0, body = ?, packed = ?"
                        " WHERE key = ? AND state = 'done'",
                        (packed if smaller else body, smaller, key),
                    )
            finally:
                self._db.execute("PRAGMA synchronous=NORMAL")
        return key

    def read(self, key: str) -> Event | None:
        """Return an event that is still to be acted on; None for one that is done, or that nobody knows."""
        query = "SELECT action, body, packed, received_s FROM events WHERE key = ? AND state != 'done'"
        with self._lock, closing(self._db.execute(query, (key,))) as rows:
            row = rows.fetchone()
        if row is None:
            return None
        action, body, packed, received_s = row
        return Event(key=key, action=action, body=zlib.decompress(body) if packed else body, received_s=received_s)

    def state(self, key: str) -> str | None:
        """Return whether an event is undone, done or failed; None for one that nobody knows."""
        with self._lock, closing(self._db.execute("SELECT state FROM events WHERE key = ?", (key,))) as rows:
            row = rows.fetchone()
        return None if row is None else str(row[0])

    def done(self, key: str, kinds: Mapping[str, int] | None = None, *, note: str | None = None) -> None:
        """Mark an event as acted on.

        Args:
            key: of the event.
            kinds: regions it brought, by kind; counted once, however often this is called.
            note: why nothing came of it, if so.
        """
        with self._writing() as db:
            changed = db.execute(
                "UPDATE events SET state = 'done', touched_s = ?, error = ? WHERE key = ? AND state != 'done'",
                (time.time(), note and note[:_LONGEST_ERROR], key),
            )
            if changed.rowcount:
                db.executemany(
                    "INSERT INTO regions VALUES (?, ?) ON CONFLICT (kind) DO UPDATE SET count = count + excluded.count",
                    (kinds or {}).items(),
                )

    def failed(self, key: str, error: str) -> bool:
        """Note that acting on an event failed; return whether it will be tried again by itself."""
        with self._writing() as db:
            db.execute(
                "UPDATE events SET attempts = attempts + 1, touched_s = ?, error = ?,"
                " state = CASE WHEN attempts + 1 < ? THEN 'undone' ELSE 'failed' END WHERE key = ? AND state != 'done'",
                (time.time(), error[:_LONGEST_ERROR], ATTEMPTS, key),
            )
        return self.state(key) == "undone"

    def give_up(self, key: str, error: str) -> None:
        """Note that nothing is to try an event again until a person asks for it: it ends what tries it."""
        with self._writing() as db:
            db.execute(
                "UPDATE events SET attempts = ?, touched_s = ?, error = ?, state = 'failed'"
                " WHERE key = ? AND state != 'done'",
                (_DEADLY, time.time(), error[:_LONGEST_ERROR], key),
            )

    def undone(self, limit: int, older_than_s: float, *, failed_s: float | None = None) -> list[str]:
        """Return the keys of events to act on, oldest first.

        Args:
            limit: how many at most.
            older_than_s: that long ago they came.
            failed_s: a tenth of how long ago one failed that failed once; one that failed twice ten times as long ago.
                None: as `older_than_s`.
        """
        query = (
            "SELECT key FROM events WHERE state = 'undone' AND touched_s <= ? - (CASE attempts WHEN 0 THEN ?"
            f" WHEN 1 THEN {_PATIENCE} * ? ELSE {_PATIENCE**2} * ? END) ORDER BY received_s LIMIT ?"
        )
        failed_s = older_than_s if failed_s is None else failed_s
        facts = time.time(), older_than_s, failed_s, failed_s, limit
        with self._lock, closing(self._db.execute(query, facts)) as rows:
            return [key for (key,) in rows]

    def try_again(self) -> int:
        """Have events that failed six hours ago tried once more, for two weeks; return how many there are.

        What they need may be back by then: a photo's host, or a token that is accepted. They are few at a time, so
        that what comes in new does not wait behind all of them.
        """
        now_s = time.time()
        with self._writing() as db:
            reopened = db.execute(
                "UPDATE events SET state = 'undone', attempts = ? WHERE key IN (SELECT key FROM events WHERE"
                " state = 'failed' AND attempts < ? AND touched_s < ? AND received_s > ? ORDER BY touched_s LIMIT ?)",
                (ATTEMPTS - 1, _DEADLY, now_s - _AGAIN_S, now_s - _AGAIN_UNTIL_S, _AGAIN_MOST),
            )
            return reopened.rowcount

    def retry(self) -> int:
        """Have all events that were given up tried again; return how many there are."""
        with self._writing() as db:
            reopened = db.execute("UPDATE events SET state = 'undone', attempts = 0 WHERE state = 'failed'")
            return reopened.rowcount

    def failures(self) -> list[tuple[str, str, str]]:
        """Return key, action and error of the events that were given up, the newest first."""
        query = "SELECT key, action, error FROM events WHERE state = 'failed' ORDER BY received_s DESC"
        with self._lock, closing(self._db.execute(query)) as rows:
            return list(rows)

    def counts(self) -> dict[str, int]:
        """Return how many events are undone, done and failed."""
        with self._lock, closing(self._db.execute("SELECT state, COUNT(*) FROM events GROUP BY state")) as rows:
            return {"undone": 0, "done": 0, "failed": 0} | dict(rows)

    def oldest_s(self) -> float | None:
        """Return when the oldest event came that is not acted on (UTC seconds); None: there is none.

        Those do not count that have failed all but the last time.
        """
        query = "SELECT MIN(received_s) FROM events WHERE state = 'undone' AND attempts < ?"
        with self._lock, closing(self._db.execute(query, (ATTEMPTS - 1,))) as rows:
            oldest = rows.fetchone()[0]
        return None if oldest is None else float(oldest)

    def regions(self) -> dict[str, int]:
        """Return how many regions events brought so far, by kind."""
        with self._lock, closing(self._db.execute("SELECT kind, count FROM regions")) as rows:
            return dict(rows)

    def prune(self) -> int:
        """Forget events done more than a week ago; return how many they were."""
        with self._writing() as db:
            before_s = time.time() - _KEEP_DONE_S
            return db.execute("DELETE FROM events WHERE state = 'done' AND touched_s < ?", (before_s,)).rowcount

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, all_or_nothing(self._db):
            yield self._db
