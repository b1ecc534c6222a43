"""A base of the family that is small enough to train in a test, values drawn by a seed, and an adapter for it."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from model.adapter import write_adapter
from model.graco.inputs import Architecture
from model.graco.network import SimpleClick
from model.graco.weights import ALPHA, LEVEL, LEVEL_EMBEDDING, PHRASE, PHRASE_BIAS, PHRASE_WEIGHT, RANK, write_base
from model.segmenter import digest_of
from model.types import LEVELS

TINY = Architecture(
    **{"name": "vit_32x4", "width": 32, "depth": 4, "heads": 2, "patch": 16, "size": 224},
    **{"neck": (8, 8, 8, 8), "head": 16},
)


def write_tiny_base(path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = SimpleClick(TINY)
    state = network.state_dict()
    state["backbone.pos_embed"] = 0.1 * torch.randn(state["backbone.pos_embed"].shape, generator=_draw(1))
    state["head.conv_seg.weight"] = 10 * state["head.conv_seg.weight"]  # as trained ones are: what is seen decides
    write_base(path, state, TINY)
    return path


def write_tiny_adapter(path: Path, base: Path) -> Path:
    """Write an adapter of both branches, as an imported one is: exactly."""
    draw = _draw(2)
    lora: dict[str, dict[str, torch.Tensor]] = {LEVEL: {}, PHRASE: {}}
    for matrices in lora.values():
        for block in range(TINY.depth):
            for part in "qv":
                name = f"backbone.blocks.{block}.attn.{part}_proj"
                matrices[f"{name}.lora_A.weight"] = torch.randn(RANK, TINY.width, generator=draw) / math.sqrt(
                    TINY.width
                )
                matrices[f"{name}.lora_B.weight"] = 0.1 * torch.randn(TINY.width, RANK, generator=draw)
    plain = {
        LEVEL_EMBEDDING: 0.3 * torch.randn(LEVELS, TINY.width, generator=draw),
        PHRASE_WEIGHT: 0.05 * torch.randn(TINY.width, 512, generator=draw),
        PHRASE_BIAS: torch.zeros(TINY.width),
    }
    card = {"base": digest_of(base.read_bytes()), "rank": RANK, "alpha": ALPHA}
    write_adapter(path, card=card, plain=plain, lora=lora, exact=True)
    return path


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
