"""The memory of this process: what it holds, and what is freed and glibc keeps, given back after large pieces of work.

Freed pages are kept for what comes next. Between things that live long, such as kept answers and embeddings, they come
to hundreds of megabytes, and without this the heap only ever grows. It takes some milliseconds, and more until the
pages that are used again are there again: nothing for every click.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path


def give_back() -> None:
    """Give back all whole pages that are free; where there is no glibc, nothing."""
    if _TRIM is not None:
        _TRIM(0)


def held() -> int | None:
    """Return the bytes of memory that this process holds for itself; None: the system does not say.

    Pages of files, as libraries are, do not count: they can be had again, and are shared.
    """
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    except (OSError, ValueError):
        return None
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _find_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # no glibc
        return None
    return trim


_TRIM = _find_trim()
