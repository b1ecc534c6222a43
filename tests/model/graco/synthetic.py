"""The synthetic ViT-B base of the parity cases, made tensor by tensor from its published names, and the real adapter.

Source of the rule: README.md beside the recorded cases (`GRACO_PARITY_DIR`, else ../shared/parity).
"""

from __future__ import annotations

import json
import math
import os
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.graco.inputs import Architecture
from model.graco.network import SimpleClick
from model.graco.weights import published
from tests.conftest import ROOT, missing

CASES, SHAPES = "cases.json", "simpleclick_vit_b_448.shapes.json"
TINY = Architecture(
    name="vit_32x4", width=32, depth=4, heads=2, patch=16, size=224, neck=(8, 16, 32, 64), head=16, doublings=0
)
"""A network of the family that is made, written and read in no time."""


def parity_file(name: str) -> Path:
    """Return a file of the recorded cases; without it the test is skipped.

    The names of the published tensors are the same for all cases, so that a folder of further ones need not hold them.
    """
    shared = ROOT.parent / "shared" / "parity"
    named = Path(os.environ.get("GRACO_PARITY_DIR", shared))
    folder = shared if name == SHAPES and not (named / name).is_file() else named
    if not (folder / name).is_file():
        missing(f"{folder / name} is not there: name the folder of parity cases with GRACO_PARITY_DIR")
    return folder / name


def published_adapter() -> Path:
    """Return the path of the published GraCo adapter; without it the test is skipped."""
    default = ROOT.parent / "shared" / "weights" / "graco-base-lora" / "GraCo_base_lora.pth"
    path = Path(os.environ.get("GRACO_PARITY_ADAPTER", default))
    if not path.is_file():
        missing(f"{path} is not there: name the published GraCo_base_lora.pth with GRACO_PARITY_ADAPTER")
    return path


def synthetic_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor that the rule gives for a published name."""
    x = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape, dtype=np.float32)
    if name == "head.conv_seg.bias":
        return torch.full(shape, -9.0)
    if len(shape) < 2:
        value = 0.1 * x
        return torch.from_numpy(1 + value if name.endswith(".weight") else value)
    value = x / np.float32(math.sqrt(2500 if name.endswith("pos_embed") else math.prod(shape[1:])))
    return torch.from_numpy(30 * value if name == "head.conv_seg.weight" else value)


@cache
def synthetic_base() -> dict[str, Tensor]:
    """Return the base of the cases in published names, fp32; made once, nobody writes into it."""
    shapes = json.loads(parity_file(SHAPES).read_text())
    return {name: synthetic_tensor(name, tuple(shape)) for name, shape in shapes.items()}


def made_base(architecture: Architecture) -> dict[str, Tensor]:
    """Return a base of any architecture in published names, values by the rule, with what the ViT has beside."""
    with torch.device("meta"):
        shapes = {name: tuple(v.shape) for name, v in published(SimpleClick(architecture).state_dict()).items()}
    width = architecture.width
    shapes |= {"backbone.cls_token": (1, 1, width), "backbone.fc_norm.weight": (width,)}
    shapes |= {"backbone.fc_norm.bias": (width,), "backbone.head.weight": (9, width), "backbone.head.bias": (9,)}
    return {name: synthetic_tensor(name, shape) for name, shape in shapes.items()}


def made_adapter(architecture: Architecture, *, phrase: bool = True, rank: int = 8) -> dict[str, Tensor]:
    """Return an adapter for any architecture in published names, values by the rule."""
    width = architecture.width
    shapes: dict[str, tuple[int, ...]] = {"backbone.gra_embed.weight": (10, width)}
    for block in range(architecture.depth):
        for suffix in ("", "2") if phrase else ("",):
            layer = f"backbone.blocks.{block}.attn.qkv.lora_"
            shapes |= {f"{layer}A{suffix}": (2 * rank, width), f"{layer}B{suffix}": (2 * width, rank)}
    if phrase:
        shapes |= {
            "phrase_encoder.phrase2gra_proj.weight": (width, 512),
            "phrase_encoder.phrase2gra_proj.bias": (width,),
        }
    return {name: synthetic_tensor(name, shape) for name, shape in shapes.items()}
