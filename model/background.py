"""Work that lets others go first: on busy cores a click is answered while an image is being encoded.

A thread's standing can be lowered by anybody and raised by nobody without privileges, so what steps back does so for
good, in threads of its own. Threads that these start stand no higher: OpenMP's, and OpenVINO's, of which all models of
a process have the same.
"""

from __future__ import annotations

import contextlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor

_STEPS = 10  # of nice(2): on a busy core a tenth of what others get


def step_back() -> None:
    """Have the calling thread, and those it starts from now on, leave busy cores to others; on Linux alone."""
    if sys.platform == "linux":  # elsewhere the whole process would step back
        with contextlib.suppress(OSError):  # a system that forbids it
            os.nice(_STEPS)


def background_thread(name: str) -> ThreadPoolExecutor:
    """Return an executor with a single thread, which steps back before its first work."""
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=step_back)
