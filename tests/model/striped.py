"""A segmenter that is easily understood: the image is a flag of four stripes, and a click knows its stripe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from model.segmenter import Encoded
from model.types import Mask, Prediction, Prompt, Proposal, RGBImage

HEIGHT, WIDTH, STRIPES = 80, 120, 4
LEFT, TOP, RIGHT, BOTTOM = 20, 10, 100, 70  # of the flag


def flag(first: int = 0, last: int = STRIPES - 1) -> Mask:
    """Return the stripes from `first` to `last`, bool H, W."""
    wide = (RIGHT - LEFT) // STRIPES
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[TOP:BOTTOM, LEFT + first * wide : LEFT + (last + 1) * wide] = True
    return mask


class Striped:
    """One click: its stripe, its half and the whole flag, best the whole; each negative click takes a stripe away."""

    version = encoding = "striped"
    adapter = None
    first_step_serves_all_levels = phrases_are_names = costly_to_encode = True

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, image: RGBImage) -> Encoded:
        self.encoded += 1
        return Encoded({"embedding": torch.zeros(1)}, image.shape[0], image.shape[1])

    def understood(self, prompt: Prompt) -> Prompt:
        return prompt

    def step(self, encoded: Encoded, prompt: Prompt, state: Any) -> tuple[Mask, ...]:
        stripe = _stripe(prompt.clicks[0].x)
        if not (LEFT <= prompt.clicks[0].x < RIGHT and TOP <= prompt.clicks[0].y < BOTTOM):
            return (np.zeros((HEIGHT, WIDTH), np.bool_),)
        if len(prompt.clicks) == 1:
            return flag(), flag(stripe, stripe), flag(stripe // 2 * 2, stripe // 2 * 2 + 1)
        mask = flag()
        for click in prompt.clicks[1:]:
            if _stripe(click.x) != stripe:
                mask &= ~flag(_stripe(click.x), _stripe(click.x))
        return (mask,)

    def render(self, encoded: Encoded, prompt: Prompt, state: Any, *, proposals: int = 1) -> Prediction:
        masks = state[:proposals]
        return Prediction(proposals=tuple(Proposal(mask=m, score=0.95 - 0.05 * i) for i, m in enumerate(masks)))

    def refine(self, encoded: Encoded, prompt: Prompt, state: Any) -> Any:
        return state

    def foresee(self, encoded: Encoded, prompt: Prompt, state: Any) -> None:
        return None

    def base_offers(self, encoded: Encoded, prompt: Prompt, state: Any) -> Iterator[Proposal]:
        yield from self.render(encoded, prompt, state, proposals=STRIPES).proposals

    def probability(self, encoded: Encoded, prompt: Prompt, state: Any) -> np.ndarray:
        """Falls from 1 at the click to 0 at the far end of the flag."""
        x = np.arange(WIDTH, dtype=np.float32) + 0.5
        row = np.clip(1 - np.abs(x - prompt.clicks[0].x) / (RIGHT - LEFT), 0, 1)
        return np.tile(row, (HEIGHT, 1)).astype(np.float32)


def _stripe(x: float) -> int:
    return int((x - LEFT) // ((RIGHT - LEFT) // STRIPES))
