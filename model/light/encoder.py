"""Ways to run the image encoder: torch as the reference, OpenVINO where it is faster on this CPU.

It runs in a thread of its own that lets the decoder go first (`model.background`). Measured in docs/benchmarks.md:
OpenVINO fp32 gives torch's masks at half the time on CPUs; int8 and bf16 do not keep the masks (IoU under 0.99), so
they are not offered.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.background import background_thread
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


class _Encoder:
    """Encodes one image at a time: side by side they only take more memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread = background_thread("encode")

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the embedding 1, 256, 64, 64 in fp32; one call runs at a time."""
        return self._thread.submit(self._run, pixels).result()

    def _run(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError


class TorchEncoder(_Encoder):
    """The network as torch runs it: fp32 on a CPU (the reference), half precision on a GPU."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load the encoder in `weights` onto `device`."""
        encoder = _load_encoder(weights)
        self.half = device.type == "cuda"
        super().__init__("torch-fp16" if self.half else "torch-fp32")
        self._encoder = (encoder.half() if self.half else encoder.to(memory_format=torch.channels_last)).to(device)
        self._device = device

    def _run(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self._device, torch.float16 if self.half else torch.float32)
        with torch.inference_mode():
            embedding: Tensor = self._encoder(pixels.to(memory_format=torch.channels_last)).float()
        return embedding


class OpenVinoEncoder(_Encoder):
    """The network compiled by OpenVINO for this CPU, in fp32."""

    def __init__(self, weights: Path, digest: str, threads: int, folder: Path) -> None:
        """Compile the encoder in `weights`; `folder` keeps its export for the next start.

        Raises:
            ImportError, RuntimeError: OpenVINO does not run here, or the export failed.
        """
        super().__init__("openvino-fp32")
        exported = folder / f"encoder-{digest[:16]}-{runtime_name()}"
        ensure_exported(exported, _MODEL, _export, weights)
        compiled = self._thread.submit(CompiledModel, exported / _MODEL, threads=threads)  # starts threads of its own
        self._compiled = compiled.result()

    def _run(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self._compiled(pixels.numpy()).copy())


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
