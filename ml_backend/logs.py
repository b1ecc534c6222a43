"""Log lines for people, or as JSON for machines, each with the request it belongs to; never bodies, tokens, pixels.

Whoever logs leaves those out. As a second wall every line loses the passwords and queries of the addresses in it, and
the secrets of the settings, so that an error's text from elsewhere does not carry them either. What does not print is
escaped: no value of a request begins a line of its own, or steers a terminal.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")

_SANE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CREDENTIALS = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]{1,20}://)[^\s/@'\"]{1,500}@")
_QUERY = re.compile(r"((?:\b[a-zA-Z][a-zA-Z0-9+.-]{1,20}:/|(?<![\w)/]))/[^\s?#'\"]{0,500})\?[^\s'\"]+")
_INLINE = re.compile(r"(\bdata:[a-zA-Z0-9/+.-]{0,60}[;,])[^\s'\"]+")
_LONGEST = 20_000  # characters of one message
_SHORTEST_SECRET = 8  # characters; a shorter one would blot out ordinary words
_CHATTY = ("httpx", "httpcore", "PIL", "openvino", "rq.worker", "urllib3", "requests", "matplotlib", "asyncio", "redis")
_hidden: set[str] = set()


def adopt(given: str | None) -> str:
    r"""Return the id of a request: the one it came with (`X-Request-Id`) if that is a plain word, else a new one.

    >>> adopt("trace-7.a")
    'trace-7.a'
    >>> len(adopt("a line\nof another's"))
    8
    """
    return given if given is not None and _SANE.fullmatch(given) else secrets.token_hex(4)


@contextmanager
def carrying(given: str) -> Iterator[None]:
    """Have the lines of the block carry this id."""
    token = request_id.set(given)
    try:
        yield
    finally:
        request_id.reset(token)


def hide(secrets_given: Iterable[str]) -> None:
    """Have these blotted out wherever a line of this process would show them; very short ones are not."""
    _hidden.update(secret for secret in secrets_given if len(secret) >= _SHORTEST_SECRET)


def redact(text: str) -> str:
    """Return `text` without passwords and queries of addresses, contents of data: addresses, and what `hide` named.

    >>> redact("GET http://me:pw@host/a.png?token=1 failed")
    'GET http://***@host/a.png?*** failed'
    """
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]} ... ({len(text) - _LONGEST} more characters)"
    for secret in _hidden:
        text = text.replace(secret, "***")
    text = _INLINE.sub(r"\1***", text)
    return _QUERY.sub(r"\1?***", _CREDENTIALS.sub(r"\1***@", text))


def _printable(text: str) -> str:
    r"""Return `text` with the signs that do not print escaped, line breaks first of all.

    >>> print(_printable("project 3\n12:00:00 INFO \x1b[2Jall is well\u202e"))
    project 3\n12:00:00 INFO \x1b[2Jall is well\u202e
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


class _WithRequest(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


class PlainFormatter(logging.Formatter):
    """Readable lines."""

    def __init__(self) -> None:
        """Set the form."""
        super().__init__("%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and below it, indented, those of a traceback."""
        record.message, record.asctime = record.getMessage(), self.formatTime(record, self.datefmt)
        lines = [_printable(redact(self.formatMessage(record)))]
        if record.exc_info:
            lines += [f"  {_printable(line)}" for line in redact(self.formatException(record.exc_info)).splitlines()]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, process, request, message; fields, traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "request": getattr(record, "request_id", "-"),
            "message": redact(record.getMessage()),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = redact(self.formatException(record.exc_info))
        text = json.dumps(line, ensure_ascii=False)  # escapes line breaks, but not all that readers take for one
        if text.isprintable():
            return text
        return "".join(sign if sign.isprintable() else json.dumps(sign)[1:-1] for sign in text)


def configure(level: str, *, as_json: bool) -> None:
    """Send all log lines of this process to standard error, once."""
    handler = logging.StreamHandler()
    handler.addFilter(_WithRequest())
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
