"""Ways to run SimpleClick's network: torch as the reference and on a GPU, OpenVINO on CPUs.

What steers it comes with every call, so that one compiled network serves the base and any adapter, at once and from
any thread. Measured in docs/benchmarks.md: OpenVINO in fp32 takes about half of torch's time and gives its masks; with
the ViT in bf16, neck and head in fp32, a third (`fast`; on a CPU that has no bf16 it is fp32 again).
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from model.compiled import CompiledModel, ensure_exported, has_bf16, runtime_name, save_traced
from model.graco.inputs import Architecture, LowRank
from model.graco.weights import RANK, network_state, read_base
from model.segmenter import Speed

if TYPE_CHECKING:
    from model.graco.network import SimpleClick

log = logging.getLogger(__name__)

_FEATURES, _LOGITS = "features.xml", "logits.xml"
_PAIR = 2  # an image and its mirror image: what a compiled network takes at a time


class Runtime(Protocol):
    """Something that runs the network, one call at a time."""

    name: str
    architecture: Architecture

    def __call__(self, image: Tensor, maps: Tensor, signals: Tensor, low_rank: LowRank) -> Tensor:
        """Return logits B, 1, H, W, fp32 on the CPU; arguments as `SimpleClick.forward`, all on the CPU."""


class TorchRuntime:
    """The network as torch runs it: fp32, or half precision on a GPU where speed is asked for."""

    def __init__(self, network: SimpleClick, architecture: Architecture, device: torch.device, speed: Speed) -> None:
        """Take the network in eval mode on the CPU, and where and how it shall run."""
        self.architecture = architecture
        self._type = torch.float16 if device.type == "cuda" and speed == "fast" else torch.float32
        self._network = network.to(device, self._type)
        self._device = device
        self._lock = threading.Lock()
        self.name = f"torch-{'fp16' if self._type == torch.float16 else 'fp32'}"

    def __call__(self, image: Tensor, maps: Tensor, signals: Tensor, low_rank: LowRank) -> Tensor:
        """Return the logits: the whole batch in one pass on a GPU, pair by pair on a CPU, which saves its memory."""
        together = _PAIR if self._device.type == "cpu" else len(image)
        with self._lock, torch.inference_mode():
            steer = LowRank(*(value.to(self._device, self._type) for value in (low_rank.down, low_rank.up)))
            batches = zip(*(torch.split(value, together) for value in (image, maps, signals)), strict=True)
            found = [self._network(*(v.to(self._device, self._type) for v in batch), steer) for batch in batches]
            return torch.cat(found).float().cpu()


class OpenVinoRuntime:
    """The network compiled for this CPU; a batch is answered pair by pair, which is as fast as all at once."""

    def __init__(self, weights: Path, digest: str, size: int, speed: Speed, threads: int, folder: Path) -> None:
        """Compile the base in `weights`; `folder` keeps its export for the next start.

        Raises:
            ImportError, RuntimeError, OSError: OpenVINO does not run here, or the export failed.
        """
        _, self.architecture = read_base(weights, values=False)
        exported = folder / f"graco-{digest[:16]}-{size}-{runtime_name()}"
        ensure_exported(exported, _LOGITS, _export, weights, size)
        fast = speed == "fast"
        if fast and not has_bf16():
            log.warning("this CPU does not compute in bf16, so that GRACO_SPEED=fast is no faster here than exact")
            fast = False
        self.name = "openvino-bf16" if fast else "openvino-fp32"
        self._features = CompiledModel(exported / _FEATURES, precision="bf16" if fast else "f32", threads=threads)
        self._logits = CompiledModel(exported / _LOGITS, threads=threads)
        self._lock = threading.Lock()

    def __call__(self, image: Tensor, maps: Tensor, signals: Tensor, low_rank: LowRank) -> Tensor:
        """Return the logits; the batch has an even number of rows."""
        steer = low_rank.down.numpy(), low_rank.up.numpy()
        found = []
        with self._lock:
            for rows in range(0, len(image), _PAIR):
                pair = (np.ascontiguousarray(value[rows : rows + _PAIR].numpy()) for value in (image, maps, signals))
                (features,) = self._features(*pair, *steer)
                (logits,) = self._logits(features)
                found.append(logits.copy())
        return torch.from_numpy(np.concatenate(found))


class _Features(nn.Module):
    def __init__(self, network: SimpleClick) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, maps: Tensor, signals: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return self.network.features(image, maps, signals, LowRank(down, up))


class _Logits(nn.Module):
    def __init__(self, network: SimpleClick, size: int) -> None:
        super().__init__()
        self.network = network
        self.size = size

    def forward(self, features: Tensor) -> Tensor:
        return self.network.logits(features, (self.size, self.size))


def load_network(weights: Path) -> tuple[SimpleClick, Architecture]:
    """Return the network of a base's weights file, fp32, in eval mode, frozen.

    Raises:
        Refusal: the file is missing, damaged, or of another network.
    """
    from model.graco.network import SimpleClick  # brings timm, which OpenVINO can do without

    own, architecture = read_base(weights)
    with torch.device("meta"):
        network = SimpleClick(architecture)
    network.load_state_dict(network_state(own, architecture), assign=True)
    return network.eval().requires_grad_(False), architecture


def _export(folder: Path, weights: Path, size: int) -> None:
    network, a = load_network(weights)
    image = torch.zeros(_PAIR, 3, size, size)
    down, up = torch.zeros(a.depth, 2, RANK, a.width), torch.zeros(a.depth, 2, a.width, RANK)
    save_traced(_Features(network), (image, image, torch.zeros(_PAIR, a.width), down, up), folder / _FEATURES)
    side = size // a.patch
    save_traced(_Logits(network, size), (torch.zeros(_PAIR, a.width, side, side),), folder / _LOGITS)


def make_runtime(
    weights: Path,
    *,
    digest: str,
    device: torch.device,
    speed: Speed,
    size: int,
    threads: int,
    compiled: Path | None,
) -> Runtime:
    """Return the runtime for a device: OpenVINO on a CPU where it works, else torch.

    Args:
        weights: the base's file.
        digest: of it.
        device: where to run.
        speed: `exact`, or `fast`: half precision where it pays.
        size: side of the network's input in pixels.
        threads: CPU threads; 0: one per core.
        compiled: folder for OpenVINO's export; None: torch is used.

    Raises:
        Refusal: the file is missing, damaged, or of another network.
    """
    if device.type == "cpu" and compiled is not None:
        try:
            return OpenVinoRuntime(weights, digest, size, speed, threads, compiled)
        except (ImportError, RuntimeError, OSError) as error:
            log.warning("OpenVINO does not run here (%s); torch does, about half as fast", error)
    network, architecture = load_network(weights)
    return TorchRuntime(network, architecture, device, speed)
