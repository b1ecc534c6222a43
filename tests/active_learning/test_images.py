"""Images of corrections: kept once, under the digest of their bytes, whole or not at all."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from active_learning.images import ImageStore


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "data" / "images")


def digest(data):
    return hashlib.sha256(data).hexdigest()


def test_an_image_is_found_under_its_digest_and_a_second_put_writes_nothing(store):
    data = os.urandom(5000)
    image_id = digest(data)
    assert store.path(image_id) is None
    path = store.put(image_id, data)
    assert path == store.path(image_id) == store.folder / image_id[:2] / image_id
    assert path.read_bytes() == data
    os.utime(path, (1, 1))
    assert store.put(image_id, data) == path
    assert path.stat().st_mtime == 1


def test_a_deleted_image_is_gone_and_deleting_it_again_does_nothing(store):
    path = store.put(digest(b"a"), b"a")
    store.put(digest(b"b"), b"b")
    assert store.delete(digest(b"a"))
    assert not path.exists()
    assert not store.delete(digest(b"a"))
    assert not store.delete("../b")
    assert store.path(digest(b"b"))


def test_bytes_of_another_image_are_an_error_unless_the_caller_has_checked(store):
    with pytest.raises(ValueError, match="their SHA-256 is another"):
        store.put(digest(b"a"), b"b")
    assert store.path(digest(b"a")) is None
    assert store.put(digest(b"a"), b"b", checked=False).read_bytes() == b"b"


@pytest.mark.parametrize("image_id", ["", "../../" + "a" * 58, "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_what_is_no_digest_names_no_file(store, image_id):
    assert store.path(image_id) is None
    with pytest.raises(ValueError, match="is no SHA-256"):
        store.put(image_id, b"data", checked=False)
    assert not store.folder.exists()


def test_many_may_put_the_same_image_at_once_and_no_draft_is_left(store):
    data = os.urandom(200_000)
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: store.put(digest(data), data), range(40)))
    assert len(paths) == 1
    (path,) = paths
    assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


def test_an_image_that_cannot_be_written_leaves_nothing(store):
    data = b"data"
    store.folder.mkdir(parents=True)
    (store.folder / digest(data)[:2]).write_bytes(b"a file where the folder should be")
    with pytest.raises(OSError):
        store.put(digest(data), data)
    assert store.path(digest(data)) is None
    assert len(list(store.folder.iterdir())) == 1
