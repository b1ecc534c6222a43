"""Networks compiled by OpenVINO for this CPU: exported once into a folder, compiled from there at each start.

An export is made in a process of its own (tracing takes a gigabyte that a serving process would never give back), in a
neighbour folder that is then renamed: nobody reads half a model, and of two processes either one's will do.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Precision = Literal["f32", "bf16"]

_MADV_PAGEOUT = 21  # of <linux/mman.h>


def runtime_name() -> str:
    """Return OpenVINO's name and version; an export serves no other one.

    Raises:
        ImportError: it is not installed.
    """
    import openvino as ov

    return f"openvino-{ov.__version__.split('-')[0]}"


def has_bf16() -> bool:
    """Return whether this CPU computes in bf16; OpenVINO takes fp32 where it does not.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class CompiledModel:
    """An exported network, compiled; one call at a time."""

    def __init__(self, path: Path, *, precision: Precision = "f32", threads: int = 0) -> None:
        """Compile a model file.

        Args:
            path: the file that `save_traced` wrote.
            precision: what its heavy layers compute in, where this CPU can.
            threads: CPU threads; 0: one per core.

        Raises:
            ImportError, RuntimeError: OpenVINO does not run here, or the file is damaged.
        """
        import openvino as ov

        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        if threads:
            config["INFERENCE_NUM_THREADS"] = str(threads)
        self._request = ov.Core().compile_model(path, "CPU", config).create_infer_request()
        _let_go(path.with_suffix(".bin"))

    def __call__(self, *inputs: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], ...]:
        """Return the outputs, valid until the next call."""
        return tuple(map(np.asarray, self._request.infer(list(inputs), share_inputs=True).values()))


def _let_go(file: Path) -> None:
    """Have the system take back the pages of a mapped file: the compiled network has its own copy of the weights.

    They are read anew from the file if anything asks for them.
    """
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except (OSError, AttributeError):  # other systems than Linux
        return
    for line in mapped:
        if line.endswith(f" {file}"):
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)


def save_traced(network: nn.Module, example: tuple[Tensor, ...], path: Path) -> None:
    """Write a network in OpenVINO's format, fp32, for inputs of exactly the shapes of `example`."""
    import openvino as ov

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns that sizes become constants, as they shall
        model = ov.convert_model(network, example_input=example, input=[list(value.shape) for value in example])
    ov.save_model(model, path, compress_to_fp16=False)


def ensure_exported(folder: Path, file: str, write: Callable[..., None], *args: object) -> None:
    """Have `write(draft, *args)` fill a folder, unless it holds `file` already.

    Args:
        folder: appears whole or not at all.
        file: is in it if it is there.
        write: a function of a module; runs in a process of its own.
        args: what it gets after the draft's path.

    Raises:
        RuntimeError: it failed.
        OSError: the folder cannot be written.
    """
    if (folder / file).is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        process = multiprocessing.get_context("spawn").Process(target=write, args=(draft, *args))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the network could not be exported into {folder} (exit status {process.exitcode})")
        draft.chmod(0o755)  # one user may make it and another one serve from it
        os.replace(draft, folder)
    except OSError:
        if not (folder / file).is_file():  # else another process was sooner
            shutil.rmtree(folder, ignore_errors=True)  # what is left of an export
            os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
