"""Published MobileSAM tensors to the state dict of `LightNetwork`, strictly.

Source: key names of the official `mobile_sam.pt` (MobileSAM, arXiv 2306.14289).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.light.network import ImageEncoder, LightNetwork, fuse_norms
from model.types import Refusal

_ENCODER_NAMES = (
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1."),
    (r"^layers\.(\d)\.downsample\.", r"merges.\1."),
    (r"\.c\.weight$", ".conv.weight"),
)
_UNUSED = ("image_encoder.head.", "image_encoder.norm_head.")  # the classifier TinyViT was trained with


def from_mobile_sam(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of `LightNetwork` (fp32) that computes what the published tensors compute.

    Args:
        published: tensors under the names of `mobile_sam.pt`.

    Raises:
        Refusal: a tensor is missing, left over, or of another shape.
    """
    encoder: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, value in published.items():
        room, _, name = key.partition(".")
        if key.startswith(_UNUSED) or key.endswith("attention_bias_idxs"):
            continue
        if room == "image_encoder":
            for pattern, replacement in _ENCODER_NAMES:
                name = re.sub(pattern, replacement, name)
            encoder[name] = value
        else:
            rest[key] = value
    kinds = [rest.pop(f"prompt_encoder.point_embeddings.{i}.weight", torch.empty(0, 256)) for i in range(4)]
    renamed = {
        "prompt_encoder.kinds.weight": torch.cat(kinds),
        "prompt_encoder.padding.weight": rest.pop("prompt_encoder.not_a_point_embed.weight", torch.empty(0)),
        "prompt_encoder.no_mask.weight": rest.pop("prompt_encoder.no_mask_embed.weight", torch.empty(0)),
        "prompt_encoder.frequencies": rest.pop(
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", torch.empty(0)
        ),
    }
    for key, value in rest.items():
        renamed[key.replace(".mlp.lin1.", ".mlp.layers.0.").replace(".mlp.lin2.", ".mlp.layers.1.")] = value

    unfolded = ImageEncoder(folded=False)
    network = LightNetwork()
    try:
        unfolded.load_state_dict({k: v.float() for k, v in encoder.items()}, strict=True)
        fuse_norms(unfolded.eval())
        folded = {f"image_encoder.{k}": v for k, v in unfolded.state_dict().items()}
        network.load_state_dict(folded | {k: v.float() for k, v in renamed.items()}, strict=True)
    except RuntimeError as error:
        raise Refusal(f"these are not the tensors of a MobileSAM vit_t checkpoint: {error}") from error
    return network.state_dict()


def pack(published: Path, packed: Path) -> None:
    """Write `packed` (safetensors, our names) from a published MobileSAM file (safetensors, the official names).

    Matrices and kernels are kept in fp16, everything small in fp32: half the size, and the recorded golden numbers
    move by under a tenth of their tolerances.
    """
    state = from_mobile_sam(load_file(published))
    small = {k for k, v in state.items() if v.ndim < 2 or v.numel() < 2000}
    save_file({k: (v if k in small else v.half()).contiguous() for k, v in state.items()}, packed)
