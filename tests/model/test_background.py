"""What steps back, and that the encoder does, with all the threads that compute for it."""

import os
import subprocess
import sys
import threading

import pytest

from model.background import background_thread, step_back
from tests.conftest import ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="a thread's standing is Linux's")


def standing(thread):
    return os.getpriority(os.PRIO_PROCESS, thread)


def in_a_thread(work):
    """What `work` gives in a thread of its own: who steps back never comes forward again."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@linux
def test_a_thread_that_steps_back_leaves_the_others_where_they_are_and_takes_along_those_it_starts():
    def steps_back():
        step_back()
        here = standing(threading.get_native_id())
        return here, in_a_thread(lambda: standing(threading.get_native_id()))

    before = standing(threading.get_native_id())
    assert in_a_thread(steps_back) == (min(19, before + 10),) * 2
    assert standing(threading.get_native_id()) == before


@linux
def test_a_background_thread_is_one_that_steps_back():
    with background_thread("here") as one:
        found = {one.submit(threading.get_native_id).result() for _ in range(5)}
        assert len(found) == 1
        assert standing(*found) == min(19, standing(threading.get_native_id()) + 10)


def test_where_stepping_back_is_forbidden_work_is_done_all_the_same(monkeypatch):
    def forbidden(_):
        raise PermissionError

    monkeypatch.setattr(os, "nice", forbidden)
    with background_thread("here") as one:
        assert one.submit(lambda: "done").result() == "done"


_SPENT = """
import contextlib, os, threading
from pathlib import Path
import numpy as np
from model.segmenter import BUNDLED, load_segmenter

def spent():
    found = {}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
            found[int(thread)] = int(fields[11]) + int(fields[12])  # ticks, user and system
    return found

segmenter = load_segmenter("light", BUNDLED, encoder="ENCODER", device="cpu", threads=2)
image = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
segmenter.encode(image)
before = spent()
for _ in range(4):
    segmenter.encode(image)
after = spent()
main = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
for thread, ticks in after.items():
    with contextlib.suppress(OSError):
        print(os.getpriority(os.PRIO_PROCESS, thread) - main, ticks - before.get(thread, 0))
"""


@linux
@pytest.mark.parametrize("encoder", ["exact", "fast"])
def test_all_threads_that_encode_have_stepped_back(encoder, tmp_path):
    if encoder == "fast":
        pytest.importorskip("openvino")
    done = subprocess.run(
        [sys.executable, "-c", _SPENT.replace("ENCODER", encoder)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    spent = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    behind = sum(ticks for steps, ticks in spent if steps > 0)
    assert behind > 20, done.stdout
    assert behind > 0.9 * sum(ticks for _, ticks in spent), done.stdout
