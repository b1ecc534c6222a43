"""Ways to run the image encoder: torch as the reference, OpenVINO where it is faster on this CPU.

It runs in a thread of its own that lets the decoder go first (`model.background`). Measured in docs/benchmarks.md:
OpenVINO fp32 gives torch's masks at half the time on CPUs; int8 and bf16 do not keep the masks (IoU under 0.99), so
they are not offered.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.background import background_thread
from model.compiled import CompiledModel, ensure_exported, runtime_name, save_traced
from model.light.network import GRID, SIDE
from model.light.tail import TAIL_LAYERS, Moved, summed
from model.light.weights import IMAGE_ENCODER, load_part, tensors_of

if TYPE_CHECKING:
    from model.light.image_encoder import EncoderTail, ImageEncoder

log = logging.getLogger(__name__)

_ENCODER, _TAIL = "encoder.xml", "tail.xml"

Tail = Callable[[Tensor], Tensor]
"""The encoder's tail as an adapter moves it: features 1, 160, 64, 64 to an embedding 1, 256, 64, 64; thread-safe."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the encoder makes of pixels: fp32, on its device."""

    features: Tensor  # 1, 160, 64, 64: what the tail reads
    embedding: Tensor  # 1, 256, 64, 64


class EncoderRuntime(Protocol):
    """Something that encodes normalised pixels 1, 3, 1024, 1024, one call at a time."""

    name: str

    def __call__(self, pixels: Tensor) -> Seen:
        """Return what it makes of them."""

    def tail(self, moved: Moved) -> Tail:
        """Return the tail as an adapter moves it; it runs in the thread that calls it."""

    def plain_tail(self) -> EncoderTail:
        """Return the base's tail as torch runs it, fp32 on the CPU."""


def _load_encoder(weights: Path) -> ImageEncoder:
    from model.light.image_encoder import ImageEncoder  # brings timm, which OpenVINO can do without

    return load_part(ImageEncoder(), load_file(weights), IMAGE_ENCODER)


def load_tail(weights: Path, moved: Moved | None = None) -> EncoderTail:
    """Return the tail of the encoder in a weights file by itself, as torch runs it, in eval mode, frozen.

    Args:
        weights: of the base.
        moved: what an adapter adds to it.
    """
    from model.light.image_encoder import EncoderTail  # brings timm

    tail = EncoderTail()
    own = tail.state_dict().keys()
    state = {name: value for name, value in _tensors(weights).items() if name in own}
    tail.load_state_dict(state if moved is None else summed(state, moved))
    return tail.eval().requires_grad_(False)


def _tensors(weights: Path) -> dict[str, Tensor]:
    return tensors_of(load_file(weights), IMAGE_ENCODER)


class _Encoder:
    """Encodes one image at a time: side by side they only take more memory."""

    def __init__(self, name: str, weights: Path) -> None:
        self.name = name
        self._weights = weights
        self._thread = background_thread("encode")

    def __call__(self, pixels: Tensor) -> Seen:
        """Return features and embedding in fp32; one call runs at a time."""
        return self._thread.submit(self._run, pixels).result()

    def plain_tail(self) -> EncoderTail:
        """Return the base's tail as torch runs it, fp32 on the CPU, frozen."""
        return load_tail(self._weights)

    def _run(self, pixels: Tensor) -> Seen:
        raise NotImplementedError


class TorchEncoder(_Encoder):
    """The network as torch runs it: fp32 on a CPU (the reference), half precision on a GPU."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load the encoder in `weights` onto `device`."""
        encoder = _load_encoder(weights)
        self.half = device.type == "cuda"
        super().__init__("torch-fp16" if self.half else "torch-fp32", weights)
        self._encoder = (encoder.half() if self.half else encoder.to(memory_format=torch.channels_last)).to(device)
        self._type = torch.float16 if self.half else torch.float32
        self._device = device

    def _run(self, pixels: Tensor) -> Seen:
        pixels = pixels.to(self._device, self._type)
        with torch.inference_mode():
            features, embedding = self._encoder(pixels.to(memory_format=torch.channels_last))
        return Seen(features.float(), embedding.float())

    def tail(self, moved: Moved) -> Tail:
        """Return the tail with an adapter's matrices summed in: weights of its own."""
        tail = load_tail(self._weights, moved).to(self._device, self._type).to(memory_format=torch.channels_last)

        def run(features: Tensor) -> Tensor:
            with torch.inference_mode():
                embedding: Tensor = tail(features.to(self._device, self._type)).float()
            return embedding

        return run


class OpenVinoEncoder(_Encoder):
    """The network compiled by OpenVINO for this CPU, in fp32."""

    def __init__(self, weights: Path, digest: str, threads: int, folder: Path) -> None:
        """Compile the encoder in `weights`; `folder` keeps its export for the next start.

        Raises:
            ImportError, RuntimeError: OpenVINO does not run here, or the export failed.
        """
        super().__init__("openvino-fp32", weights)
        self._exported = folder / f"light-{digest[:16]}-{runtime_name()}"
        self._threads = threads
        ensure_exported(self._exported, _TAIL, _export, weights)
        compiled = self._thread.submit(CompiledModel, self._exported / _ENCODER, threads=threads)  # starts threads
        self._compiled = compiled.result()
        self._compiled_tail: CompiledModel | None = None  # until an adapter moves it
        self._tail_runs = threading.Lock()

    def _run(self, pixels: Tensor) -> Seen:
        features, embedding = (torch.from_numpy(value.copy()) for value in self._compiled(pixels.numpy()))
        return Seen(features, embedding)

    def tail(self, moved: Moved) -> Tail:
        """Return the one compiled tail, which gets the weights that adapters move with the features."""
        with self._tail_runs:
            if self._compiled_tail is None:
                ensure_exported(self._exported, _TAIL, _export, self._weights)  # it may be gone since the start
                self._compiled_tail = CompiledModel(self._exported / _TAIL, threads=self._threads)
            compiled = self._compiled_tail
        sums = summed(_tensors(self._weights), moved)
        matrices = [sums[f"{layer}.weight"].flatten(1).numpy() for layer in TAIL_LAYERS]

        def run(features: Tensor) -> Tensor:
            with self._tail_runs:
                (embedding,) = compiled(features.numpy(), *matrices)
                return torch.from_numpy(embedding.copy())

        return run


def _export(folder: Path, weights: Path) -> None:
    save_traced(_load_encoder(weights), (torch.zeros(1, 3, SIDE, SIDE),), folder / _ENCODER)
    matrices = [torch.zeros(gives, reads) for reads, gives in TAIL_LAYERS.values()]
    features = torch.zeros(1, next(iter(TAIL_LAYERS.values()))[0], GRID, GRID)
    save_traced(_MovedTail(load_tail(weights)), (features, *matrices), folder / _TAIL)


class _MovedLayer(nn.Module):
    """A linear layer or a 1 x 1 convolution whose weights come with each call; for tracing alone."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, self.weight, self.layer.bias)
        y = (self.weight @ x.flatten(2)).reshape(len(x), -1, *x.shape[2:])
        return y if self.layer.bias is None else y + self.layer.bias[:, None, None]


class _MovedTail(nn.Module):
    """The tail as a function of features and of the weights of `TAIL_LAYERS`, in their order."""

    def __init__(self, tail: EncoderTail) -> None:
        super().__init__()
        self.tail = tail
        self.moved = []
        for name in TAIL_LAYERS:
            parent, _, last = name.rpartition(".")
            layer = tail.get_submodule(name)
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            self.moved.append(_MovedLayer(layer))
            setattr(tail.get_submodule(parent), last, self.moved[-1])

    def forward(self, features: Tensor, *weights: Tensor) -> Tensor:
        for layer, weight in zip(self.moved, weights, strict=True):
            layer.weight = weight
        embedding: Tensor = self.tail(features)
        return embedding


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
