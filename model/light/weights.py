"""The tensors of the `light` family: one file for its three parts, loaded strictly; and from published MobileSAM ones.

Source: key names of the official `mobile_sam.pt` (MobileSAM, arXiv 2306.14289).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.light.network import MaskDecoder, PromptEncoder
from model.types import Refusal

_ENCODER_NAMES = (
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1."),
    (r"^layers\.(\d)\.downsample\.", r"merges.\1."),
    (r"\.c\.weight$", ".conv.weight"),
)
_UNUSED = ("image_encoder.head.", "image_encoder.norm_head.")  # the classifier TinyViT was trained with


Part = TypeVar("Part", bound=nn.Module)

IMAGE_ENCODER, PROMPT_ENCODER, MASK_DECODER = "image_encoder", "prompt_encoder", "mask_decoder"


def load_part(part: Part, tensors: dict[str, Tensor], name: str) -> Part:
    """Return `part` in eval mode with its tensors (those under `name.`, any precision) as fp32, not to be trained.

    Raises:
        Refusal: a tensor is missing, left over, or of another shape.
    """
    try:
        part.load_state_dict(tensors_of(tensors, name), strict=True)
    except RuntimeError as error:
        raise Refusal(f"these tensors do not make the {name} of the light family: {error}") from error
    return part.eval().requires_grad_(False)


def tensors_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of one part (those under `name.`, any precision) by their names in it, as fp32."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)}


def from_mobile_sam(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under our names (fp32) that compute what the published ones compute.

    Args:
        published: tensors under the names of `mobile_sam.pt`.

    Raises:
        Refusal: a tensor is missing, left over, or of another shape.
    """
    from model.light.image_encoder import ImageEncoder, fuse_norms  # brings timm

    encoder: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, value in published.items():
        room, _, name = key.partition(".")
        if key.startswith(_UNUSED) or key.endswith("attention_bias_idxs"):
            continue
        if room == "image_encoder":
            for pattern, replacement in _ENCODER_NAMES:
                name = re.sub(pattern, replacement, name)
            encoder[f"{IMAGE_ENCODER}.{name}"] = value
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

    unfolded = load_part(ImageEncoder(folded=False), encoder, IMAGE_ENCODER)
    fuse_norms(unfolded)
    parts = {
        IMAGE_ENCODER: unfolded,
        PROMPT_ENCODER: load_part(PromptEncoder(), renamed, PROMPT_ENCODER),
        MASK_DECODER: load_part(MaskDecoder(), renamed, MASK_DECODER),
    }
    known = tuple(f"{name}." for name in parts)
    if strangers := [key for key in renamed if not key.startswith(known)]:
        raise Refusal(
            f"these are not the tensors of a MobileSAM vit_t checkpoint: {', '.join(strangers[:5])} are left over"
        )
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def pack(published: Path, packed: Path) -> None:
    """Write `packed` (safetensors, our names) from a published MobileSAM file (safetensors, the official names).

    Matrices and kernels are kept in fp16, everything small in fp32: half the size, and the recorded golden numbers
    move by under a tenth of their tolerances.
    """
    state = from_mobile_sam(load_file(published))
    small = {k for k, v in state.items() if v.ndim < 2 or v.numel() < 2000}
    save_file({k: (v if k in small else v.half()).contiguous() for k, v in state.items()}, packed)
