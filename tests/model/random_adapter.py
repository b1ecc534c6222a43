"""An adapter that obeys nothing: the shape of a trained one, values drawn by a seed."""

from __future__ import annotations

from pathlib import Path

import torch

from model.adapter import ENCODER, attach, lora_state, write_adapter
from model.light.adapter import LEVEL, PHRASE, VOCABULARY
from model.light.ladder import LadderDecoder
from model.light.segmenter import LightSegmenter
from model.light.tail import TAIL_LAYERS
from model.text import MINILM, THRESHOLD

NAMES = ("disc", "door", "handle")
WIDTH = 384  # of a phrase's vector


def write_random_adapter(path: Path, base: LightSegmenter, *, seed: int = 0, tail: float | None = None) -> Path:
    """Write an adapter of both branches that fits `base`; values are a little off where a training begins.

    With `tail` it also moves the encoder's tail, by matrices so far off nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LadderDecoder(base.mask_decoder, WIDTH)
        plain = {
            name: value + 0.1 * value.std(correction=0) * torch.randn_like(value)
            for name, value in network.state_dict().items()
            if not name.startswith(("transformer.", "iou_token."))
        }
        lora = {}
        for branch in (LEVEL, PHRASE):
            attach(network.transformer, branch, rank=4, alpha=8)
            matrices = lora_state(network.transformer, branch)
            lora[branch] = {name: value + 0.02 * torch.randn_like(value) for name, value in matrices.items()}
        if tail is not None:
            ending = base.encoder_tail()
            attach(ending, ENCODER, rank=4, alpha=8, targets=list(TAIL_LAYERS))
            matrices = lora_state(ending, ENCODER)
            lora[ENCODER] = {name: value + tail * torch.randn_like(value) for name, value in matrices.items()}
        vectors = torch.nn.functional.normalize(torch.randn(len(NAMES), WIDTH), dim=1)
    card = {
        "base": base.digest,
        "rank": 4,
        "alpha": 8,
        "phrase_width": WIDTH,
        "phrase_encoder": MINILM,
        "phrase_threshold": THRESHOLD,
        "vocabulary": list(NAMES),
    }
    write_adapter(path, card=card, plain=plain | {VOCABULARY: vectors}, lora=lora)
    return path
