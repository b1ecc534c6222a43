"""What an adapter may move of the image encoder: LoRA on the matrices of its last stage, the merge before and the neck.

The rest of the encoder stays as it is, and what it leaves (the features) is kept with every image. So an adapter that
moves the tail asks for a tenth of an encoding, once for each image, and no photo is encoded anew for it
(docs/adr/0015-encoder-tail.md).

Nothing here needs timm, which a process that runs the encoder by OpenVINO does without.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from model.adapter import ENCODER, AdapterFile
from model.types import Refusal

_PER_BLOCK = {"attn.qkv": (320, 960), "attn.proj": (320, 320), "mlp.fc1": (320, 1280), "mlp.fc2": (1280, 320)}
TAIL_LAYERS = {
    "merges.2.conv1": (160, 320),
    "merges.2.conv3": (320, 320),
    **{f"stages.3.{block}.{name}": sizes for block in range(2) for name, sizes in _PER_BLOCK.items()},
    "neck.0": (320, 256),
}
"""The layers it moves, by their names in the encoder, with the numbers they read and give."""

Moved = dict[str, Tensor]
"""What an adapter adds to the weights of these layers: name of the layer to a matrix, what it gives x what it reads."""


def moved_by(found: AdapterFile) -> Moved | None:
    """Return how an adapter moves the tail; None: it does not.

    Raises:
        Refusal: its matrices are not those of the tail.
    """
    if ENCODER not in found.lora:
        return None
    deltas = {name.removesuffix(".weight"): delta for name, delta in found.deltas([ENCODER]).items()}
    if deltas.keys() != TAIL_LAYERS.keys():
        strange = sorted(deltas.keys() ^ TAIL_LAYERS.keys())[0]
        raise Refusal(f"the adapter's {ENCODER} branch is not of this encoder's tail: see {strange}; train it anew")
    for name, (reads, gives) in TAIL_LAYERS.items():
        if deltas[name].flatten(1).shape != (gives, reads):
            raise Refusal(f"the adapter's {ENCODER} branch does not fit {name}; train it anew")
    return {name: deltas[name].reshape(gives, reads) for name, (reads, gives) in TAIL_LAYERS.items()}


def summed(state: Mapping[str, Tensor], moved: Moved) -> dict[str, Tensor]:
    """Return a tail's tensors by name, with what an adapter adds to them."""
    sums = dict(state)
    for layer, delta in moved.items():
        weight = sums[f"{layer}.weight"]
        sums[f"{layer}.weight"] = weight + delta.reshape(weight.shape)
    return sums
