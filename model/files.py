"""Files of tensors, written so that whoever writes them hears of a full disk as of any other file's."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; where that fails nothing is left of it.

    Raises:
        OSError: it cannot be written; safetensors itself has an error of another kind for that.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise OSError(f"{path.parent} cannot be written to ({error})") from error
