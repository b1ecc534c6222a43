"""What is freed is given back: in processes of their own, whose heap nobody else has used."""

import os
import subprocess
import sys
import threading

import psutil
import pytest
import torch
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer

from ml_backend import jobs
from ml_backend.jobs import connect
from ml_backend.supervisor import _heap
from model import heap
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")

_HOLES, _HOLE = 1000, 100_000  # bytes of one: below what glibc maps by itself
_MB = 2**20
_lasting = []


def leave_holes():
    """Free 100 MB between things that last."""
    passing = []
    for _ in range(_HOLES):
        passing.append(b"\1" * _HOLE)
        _lasting.append(bytes(1000))


def held_mb():
    return psutil.Process().memory_info().rss / _MB


def alone(function, *arguments, **variables):
    """What a function of this module prints, run by a process of its own, as numbers."""
    script = f"import sys; from tests.ml_backend import test_heap; test_heap.{function.__name__}(*sys.argv[1:])"
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


def print_what_is_held():
    before = held_mb()
    leave_holes()
    kept = held_mb()
    heap.give_back()
    print(kept - before, held_mb() - before)


def print_what_a_worker_holds(url, kind):
    worker_of = {"ours": jobs._Worker, "plain": SimpleWorker}[kind]
    with connect(url) as connection:
        queue = Queue("holes", connection=connection, serializer=JSONSerializer)
        worker = worker_of([queue], connection=connection, serializer=JSONSerializer)
        worker.work(burst=True, logging_level="WARNING")
        before = held_mb()
        queue.enqueue(leave_holes)
        worker.work(burst=True, logging_level="WARNING")
        print(held_mb() - before)


def print_what_threads_hold():
    """Have threads multiply matrices as large as a click's, one after another, and stay, as those of a server do."""
    states, weights = torch.randn(4096, 256), torch.randn(256, 2048)
    leave = threading.Event()

    def compute():
        for _ in range(3):
            states @ weights
        done.set()
        leave.wait()

    held = []
    for _ in range(9):
        done = threading.Event()
        threading.Thread(target=compute).start()
        done.wait()
        heap.give_back()
        held.append(held_mb())
    leave.set()
    print(held[-1] - held[0])


def test_what_was_freed_between_things_that_last_is_given_back():
    kept, given_back = alone(print_what_is_held)
    assert kept > 80, "else this shows nothing"
    assert given_back < 20


def test_a_worker_holds_nothing_of_a_job_that_is_done(redis_url):
    assert alone(print_what_a_worker_holds, redis_url, "plain")[0] > 80, "else this shows nothing"
    assert alone(print_what_a_worker_holds, redis_url, "ours")[0] < 20


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="MKL's buffers")
def test_threads_of_the_web_process_keep_no_buffers_once_they_have_computed():
    settings = _heap("web")
    without = {name: value for name, value in settings.items() if not name.startswith("MKL")}
    kept = alone(print_what_threads_hold, **without)[0]
    assert kept > 10, "else this shows nothing"
    assert alone(print_what_threads_hold, **settings)[0] < kept / 4


def test_a_web_process_that_was_started_by_hand_keeps_no_buffers_either():
    script = """
import os, sys

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("MKL_DISABLE_FAST_MM"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
import _wsgi
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MKL")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "1\n", done.stderr
