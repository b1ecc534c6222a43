"""Two tiers of embeddings: bounded, safe between threads and processes, and never in the way of a click."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ml_backend.embeddings import EmbeddingCache
from model.embeddings import EmbeddingFolder
from model.segmenter import Encoded
from tests.conftest import ROOT

KB = 1024


def encoded(value=0.0, size=64):
    """About `size` * 2 KB."""
    return Encoded({"embedding": torch.full((size, KB), value, dtype=torch.float16)}, 30, 40)


def cache_in(folder, *, memory_kb=10_000, disk_kb=10_000):
    return EmbeddingCache(folder and folder / "light-test", memory_bytes=memory_kb * KB, disk_bytes=disk_kb * KB)


def ids(count):
    return [f"{n:02x}{'e' * 62}" for n in range(count)]


def never():
    raise AssertionError("it was there and need not be encoded")


def test_memory_is_bounded_by_bytes_and_the_one_used_longest_ago_goes_first(tmp_path):
    cache = cache_in(None, memory_kb=3 * 128)
    a, b, c, d = ids(4)
    for image_id in (a, b, c):
        cache.get_or_encode(image_id, encoded)
    cache.get(a)
    cache.get_or_encode(d, encoded)
    assert [cache.get(image_id) is not None for image_id in (a, b, c, d)] == [True, False, True, True]
    assert cache._held == sum(e.nbytes for e in cache._memory.values()) <= 3 * 128 * KB


def test_a_look_at_what_is_in_memory_neither_counts_nor_reads_nor_keeps_it_longer(tmp_path, counted):
    cache = cache_in(tmp_path, memory_kb=2 * 128)
    a, b, c = ids(3)
    for image_id in (a, b):
        cache.get_or_encode(image_id, encoded)
    assert cache.peek(a) is not None
    cache.get_or_encode(c, encoded)
    assert cache.peek(a) is None, "it was used longest ago all the same, and its file is not read"
    assert counted("graco_embeddings_total", source="memory") == 0
    assert counted("graco_embeddings_total", source="disk") == 0


def test_an_embedding_larger_than_all_memory_still_serves_the_image_at_hand(tmp_path):
    cache = cache_in(None, memory_kb=1)
    first, second = ids(2)
    cache.get_or_encode(first, encoded)
    assert cache.get_or_encode(first, never).height == 30
    cache.get_or_encode(second, encoded)
    assert list(cache._memory) == [second]


def test_files_serve_the_next_process_and_hold_exactly_what_was_encoded(tmp_path):
    (image_id,) = ids(1)
    first = cache_in(tmp_path).get_or_encode(image_id, lambda: encoded(0.1))
    again = cache_in(tmp_path).get_or_encode(image_id, never)
    assert torch.equal(first.tensors["embedding"], again.tensors["embedding"])
    assert (again.height, again.width) == (30, 40)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"\xff" * len(data),
        lambda data: data.replace(b'"height"', b'"hieght"'),
        lambda data: data.replace(b'"height":"30"', b'"height":"3x"'),
    ],
    ids=["cut", "empty", "noise", "no height", "no number"],
)
def test_a_damaged_file_is_replaced_by_encoding_anew(tmp_path, damage, caplog):
    (image_id,) = ids(1)
    cache_in(tmp_path).get_or_encode(image_id, lambda: encoded(1.0))
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    assert cache_in(tmp_path).get_or_encode(image_id, lambda: encoded(1.0)).height == 30
    assert "is unreadable" in caplog.text
    assert cache_in(tmp_path).get_or_encode(image_id, never).tensors["embedding"][0, 0] == 1.0


def test_pruning_keeps_the_limit_and_the_files_used_last(tmp_path):
    cache = cache_in(tmp_path, disk_kb=700)  # five files and their headers
    for age, image_id in enumerate(ids(10)):
        cache.get_or_encode(image_id, encoded)
        os.utime(cache._path(image_id), (1000 + age, 1000 + age))
    fresh = cache_in(tmp_path)
    assert fresh.get(ids(10)[0]) is not None, "reading it makes it the newest"
    cache.prune()
    left = {path.stem for path in tmp_path.rglob("*.safetensors")}
    assert left == {ids(10)[0], *ids(10)[6:]}
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 700 * KB


def test_what_is_written_prunes_by_itself(tmp_path):
    cache = cache_in(tmp_path, disk_kb=60)
    for image_id in ids(70):
        cache.get_or_encode(image_id, lambda: encoded(size=1))
    assert len(list(tmp_path.rglob("*.safetensors"))) <= 60


def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_click(tmp_path, caplog):
    (tmp_path / "taken").write_text("a file where the folder should be")
    cache = cache_in(tmp_path / "taken")
    (image_id,) = ids(1)
    assert cache.get_or_encode(image_id, encoded).height == 30
    assert cache.get_or_encode(image_id, never).height == 30
    assert "could not be stored" in caplog.text
    cache.prune()


def test_a_full_disk_leaves_no_half_file(tmp_path):
    code = """
import resource, signal, sys, torch
from pathlib import Path
from ml_backend.embeddings import EmbeddingCache
from model.embeddings import EmbeddingFolder
from model.segmenter import Encoded
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
cache = EmbeddingCache(Path(sys.argv[1]), memory_bytes=10**8, disk_bytes=10**8)
encoded = cache.get_or_encode("ab" * 32, lambda: Encoded({"embedding": torch.zeros(64, 1024)}, 30, 40))
print(encoded.height)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "light-test")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "30\n", done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_zero_bytes_of_disk_mean_no_files(tmp_path):
    cache = cache_in(tmp_path, disk_kb=0)
    cache.get_or_encode(ids(1)[0], encoded)
    assert list(tmp_path.iterdir()) == []


def test_threads_asking_for_one_image_share_one_encoding(tmp_path):
    cache, runs = cache_in(tmp_path), []
    together = threading.Barrier(8)

    def encode():
        runs.append(1)
        time.sleep(0.1)
        return encoded()

    def ask(_):
        together.wait()
        return cache.get_or_encode(ids(1)[0], encode)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert len(runs) == 1
    assert all(one is found[0] for one in found)


def test_an_encoding_that_fails_fails_for_all_who_wait_and_is_tried_again_by_the_next(tmp_path):
    cache = cache_in(tmp_path)
    together = threading.Barrier(4)

    def fail():
        time.sleep(0.1)
        raise RuntimeError("out of memory")

    def ask(_):
        together.wait()
        with pytest.raises(RuntimeError, match="out of memory"):
            cache.get_or_encode(ids(1)[0], fail)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert cache.get_or_encode(ids(1)[0], encoded).height == 30


def test_two_processes_writing_and_pruning_the_same_images_leave_only_whole_files(tmp_path):
    code = """
import json, sys, torch
from pathlib import Path
from ml_backend.embeddings import EmbeddingCache
from model.embeddings import EmbeddingFolder
from model.segmenter import Encoded
wrong = 0
for round in range(80):
    cache = EmbeddingCache(Path(sys.argv[1]), memory_bytes=1, disk_bytes=150_000)
    for n in range(4):
        fresh = Encoded({"embedding": torch.full((16, 1024), float(n))}, 30, 40)
        got = cache.get_or_encode(f"{n:02x}" + "e" * 62, lambda: fresh)
        wrong += not bool((got.tensors["embedding"] == n).all())
    cache.prune()
print(json.dumps(wrong))
"""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "light-test")],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    said = [process.communicate() for process in both]
    for process, (out, err) in zip(both, said, strict=True):
        assert process.returncode == 0, err
        assert json.loads(out) == 0
        assert "unreadable" not in err
    assert list(tmp_path.rglob(".draft-*")) == []


def test_files_of_another_encoding_and_drafts_of_a_killed_process_count_and_go_first(tmp_path):
    old = EmbeddingCache(tmp_path / "light-old", memory_bytes=10_000 * KB, disk_bytes=10_000 * KB)
    for image_id in ids(5):
        old.get_or_encode(image_id, encoded)
        os.utime(old._path(image_id), (1000, 1000))
    stale, fresh = tmp_path / "light-old" / "00" / ".draft-a", tmp_path / "light-old" / "00" / ".draft-b"
    for draft in (stale, fresh):
        draft.write_text("half a file")
    os.utime(stale, (1000, 1000))
    cache = cache_in(tmp_path, disk_kb=700)
    for image_id in ids(5):
        cache.get_or_encode(image_id, encoded)
    cache.prune()
    assert all(cache._path(image_id).is_file() for image_id in ids(5))
    assert not any(old._path(image_id).is_file() for image_id in ids(5))
    assert (stale.exists(), fresh.exists()) == (False, True)


class Small:
    """Encodes to one number."""

    costly_to_encode, encoding = True, "small"

    def encode(self, image):
        return Encoded({"embedding": torch.ones(1)}, 4, 6)


def test_the_cache_reads_what_a_training_or_a_command_encoded(tmp_path):
    folder, image_id = EmbeddingFolder(tmp_path), "ab" * 32
    folder.encoded(Small(), image_id, lambda: None, height=4, width=6)
    found = EmbeddingCache(tmp_path / "small", memory_bytes=KB, disk_bytes=KB).get(image_id)
    assert found is not None
    assert (found.height, found.width, found.tensors["embedding"].item()) == (4, 6, 1)
