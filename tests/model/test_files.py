"""What to do where a file cannot be written, which is not what to do where one cannot be read."""

import errno
from pathlib import Path

import pytest

from model.files import NotWritten, remedy_of

WRITTEN = {"--out": Path("/results/out.json"), "--embeddings": Path("/kept")}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        NotWritten("/kept cannot be written to"),
        PermissionError(errno.EACCES, "Permission denied", "/results/.out.json.draft"),
        OSError(errno.EACCES, "Permission denied", "/elsewhere", None, "/results/out.json"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", b"/kept/a/b"),
        FileExistsError(errno.EEXIST, "File exists", "/results"),
    ],
)
def test_what_cannot_be_written_is_answered_with_other_places(error):
    said = remedy_of(error, WRITTEN)
    assert said == "; choose another --out (/results/out.json) or --embeddings (/kept), or free some space"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/photos/1.jpg"),
        PermissionError(errno.EACCES, "Permission denied", "/results/photos/1.jpg"),
        OSError("image file is truncated (3 bytes not processed)"),
    ],
)
def test_what_cannot_be_read_is_not_answered_with_another_place_to_write(error):
    assert remedy_of(error, WRITTEN) == ""


def test_an_option_that_was_not_given_is_named_alone():
    said = remedy_of(OSError(errno.ENOSPC, "No space left on device"), {"--out": Path("a"), "--embeddings": None})
    assert said == "; choose another --out (a) or --embeddings, or free some space"
