"""What we write, and what becomes of it where that fails: full disks, folders that are closed to us."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class NotWritten(OSError):
    """A file of ours cannot be written."""


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; where that fails nothing is left of it.

    Raises:
        NotWritten: it cannot be written; safetensors itself has an error of another kind for that.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise NotWritten(f"{path.parent} cannot be written to ({error})") from error


def remedy_of(error: OSError, written: Mapping[str, Path | None]) -> str:
    """Return what to do about a file that could not be written, to follow the error's own text.

    Args:
        error: of writing, or of reading, as of a photo that is missing: then nothing is advised.
        written: what a command writes, by the option that names it; None: it was not given.

    >>> remedy_of(FileNotFoundError(2, "No such file", "photos/1.jpg"), {"--out": Path("results")})
    ''
    >>> remedy_of(PermissionError(13, "Permission denied", "results/1.npz"), {"--out": Path("results")})
    '; choose another --out (results), or free some space'
    """
    named = [Path(os.path.abspath(os.fsdecode(name))) for name in (error.filename, error.filename2) if name is not None]
    ours = [Path(os.path.abspath(path)) for path in written.values() if path is not None]
    of_writing = error.errno in _NO_ROOM or any(_belongs(file, path) for file in named for path in ours)
    if not (of_writing or isinstance(error, NotWritten)):
        return ""
    options = " or ".join(f"{option} ({path})" if path is not None else option for option, path in written.items())
    return f"; choose another {options}, or free some space"


def _belongs(file: Path, written: Path) -> bool:
    """Whether a file lies in what is written, is a folder on the way there, or a draft beside it."""
    draft = file.parent == written.parent and written.name in file.name
    return draft or file.is_relative_to(written) or written.is_relative_to(file)
