"""What a click says holds where it lies: a positive one is in the mask, a negative one is not.

The decoder weighs clicks and sometimes decides against one: from the fourth on, against every sixth. What it answers
is bent around the clicks that it went against, just far enough, and stays as it is everywhere else. Nothing the
network reads is changed.

Source: interpolation of residuals by a Gaussian kernel, as in kriging (docs/adr/0019-clicks-hold.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.geometry import FloatMap
from model.light.focus import Look
from model.light.network import LOW_RES, SIDE
from model.types import Click

_REACH = 6.0  # logits along one side: standard deviation of what bends them around a click
_SURE = 0.5  # the least that a logit under a click is away from 0
_TOGETHER = 1e-3  # of a residual that may be left, so that clicks on one place can be solved for


def obeyed(logits: FloatMap, clicks: Sequence[Click], look: Look) -> FloatMap:
    """Return logits that have the sign that each click says at its pixel.

    Clicks outside the look are none of its matter; what is unlike at one place (opposite clicks within a few logits
    of each other) is met as nearly as it goes.

    Args:
        logits: of a mask, 256, 256, in the square of `look`; returned as they are where no click is against them.
        clicks: on the image.
        look: what was seen of the image.
    """
    seen = [click for click in clicks if look.focus.covers(click.x, click.y)]
    if not seen:
        return logits
    pixels = np.array([(click.x, click.y) for click in seen]) // 1 + 0.5  # their middles, on the image
    corner = look.focus.left, look.focus.top
    places = look.fit.to_square(pixels - corner) * (LOW_RES / SIDE) - 0.5  # x and y, logits
    places = places.clip(0, LOW_RES - 1)
    signs = np.array([1.0 if click.positive else -1.0 for click in seen])
    there = _at(logits, places) * signs
    if (there > 0).all():
        return logits
    missing = (_SURE - there).clip(0) * signs
    apart = ((places[:, None] - places[None]) ** 2).sum(axis=-1)
    weights = np.linalg.solve(np.exp(-apart / (2 * _REACH**2)) + _TOGETHER * np.eye(len(seen)), missing)
    across, down = np.exp(-((np.arange(LOW_RES) - places.T[..., None]) ** 2) / (2 * _REACH**2))  # clicks, 256
    return np.asarray(logits + (down * weights[:, None]).T @ across, np.float32)


def _at(logits: FloatMap, places: FloatMap) -> FloatMap:
    """Return logits at places N, 2, x and y, each between the four around it."""
    low = np.minimum(places.astype(int), LOW_RES - 2)
    (x, y), (right, down) = low.T, (places - low).T
    above = logits[y, x] * (1 - right) + logits[y, x + 1] * right
    below = logits[y + 1, x] * (1 - right) + logits[y + 1, x + 1] * right
    return np.asarray(above * (1 - down) + below * down, np.float32)
