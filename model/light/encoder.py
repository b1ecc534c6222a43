"""Ways to run the image encoder: torch as the reference, OpenVINO where it is faster on this CPU.

Measured in docs/benchmarks.md: OpenVINO fp32 gives torch's masks at half the time on CPUs; int8 and bf16 do not keep
the masks (IoU under 0.99), so they are not offered.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.compiled import CompiledModel, ensure_exported, runtime_name, save_traced
from model.light.network import SIDE
from model.light.weights import IMAGE_ENCODER, load_part

if TYPE_CHECKING:
    from model.light.image_encoder import ImageEncoder

log = logging.getLogger(__name__)

_MODEL = "encoder.xml"


class EncoderRuntime(Protocol):
    """Something that turns normalised pixels 1, 3, 1024, 1024 into an embedding 1, 256, 64, 64, one call at a time."""

    name: str

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the embedding, fp32 on the CPU or on the device of `pixels`."""


def _load_encoder(weights: Path) -> ImageEncoder:
    from model.light.image_encoder import ImageEncoder  # brings timm, which OpenVINO can do without

    return load_part(ImageEncoder(), load_file(weights), IMAGE_ENCODER)


class TorchEncoder:
    """The network as torch runs it: fp32 on a CPU (the reference), half precision on a GPU."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load the encoder in `weights` onto `device`."""
        encoder = _load_encoder(weights)
        self.half = device.type == "cuda"
        self.name = "torch-fp16" if self.half else "torch-fp32"
        self._encoder = (encoder.half() if self.half else encoder.to(memory_format=torch.channels_last)).to(device)
        self._device = device
        self._lock = threading.Lock()  # images one after the other: side by side they only take more memory

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the embedding 1, 256, 64, 64 in fp32; one call runs at a time."""
        pixels = pixels.to(self._device, torch.float16 if self.half else torch.float32)
        with self._lock, torch.inference_mode():
            embedding: Tensor = self._encoder(pixels.to(memory_format=torch.channels_last)).float()
        return embedding


class OpenVinoEncoder:
    """The network compiled by OpenVINO for this CPU, in fp32."""

    def __init__(self, weights: Path, digest: str, threads: int, folder: Path) -> None:
        """Compile the encoder in `weights`; `folder` keeps its export for the next start.

        Raises:
            ImportError, RuntimeError: OpenVINO does not run here, or the export failed.
        """
        self.name = "openvino-fp32"
        self._lock = threading.Lock()
        exported = folder / f"encoder-{digest[:16]}-{runtime_name()}"
        ensure_exported(exported, _MODEL, _export, weights)
        self._run = CompiledModel(exported / _MODEL, threads=threads)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the embedding 1, 256, 64, 64 in fp32; one call runs at a time."""
        with self._lock:
            return torch.from_numpy(self._run(pixels.numpy()).copy())


def _export(folder: Path, weights: Path) -> None:
    save_traced(_load_encoder(weights).eval(), (torch.zeros(1, 3, SIDE, SIDE),), folder / _MODEL)


def make_encoder(
    weights: Path,
    *,
    digest: str,
    device: torch.device,
    choice: str,
    threads: int,
    compiled: Path | None,
) -> EncoderRuntime:
    """Return the runtime that `choice` names: `fast`, `exact`, or `auto` (fast on a CPU where it works).

    Raises:
        ImportError, RuntimeError, OSError: `fast` was asked for and OpenVINO does not run here.
    """
    if device.type == "cuda" or choice == "exact" or (compiled is None and choice == "auto"):
        return TorchEncoder(weights, device)
    try:
        return OpenVinoEncoder(weights, digest, threads, compiled or Path(tempfile.gettempdir()) / "graco-compiled")
    except (ImportError, RuntimeError, OSError) as error:
        if choice == "fast":
            raise
        log.warning("OpenVINO does not run here (%s); images are encoded by torch, about half as fast", error)
        return TorchEncoder(weights, device)
