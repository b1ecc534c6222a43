"""How fine a mask is: what share of its whole it takes, in pixels and in meaning.

Source: the mask granularity estimator of GraCo (Zhao et al., CVPR 2024, section on any-granularity mask generation).
A mask's granularity is half its scale, half its semantic share, both in 0..1: 0 a small part, 1 the whole object.
`model.types.Granularity.from_value` makes one of the ten levels of it.
"""

from __future__ import annotations

import numpy as np

from model.geometry import FloatMap
from model.robot import next_click
from model.segmenter import Encoded, Segmenter
from model.segmenter import probability as probability_of
from model.types import Mask, Prompt, Refusal


def scale(part: Mask, whole: Mask) -> float:
    """Return the area of `part` over that of `whole`, in 0..1; what of the part lies outside does not count.

    Args:
        part: bool H, W.
        whole: bool H, W.

    Raises:
        Refusal: either is empty, or they share no pixel.

    >>> scale(np.array([[True, False, False, False]]), np.array([[True, True, False, False]]))
    0.5
    """
    return int(np.count_nonzero(_inside(part, whole))) / int(np.count_nonzero(whole))


def semantic(probability: FloatMap, part: Mask, whole: Mask) -> float:
    """Return how much of the whole's meaning a part spans, in 0..1.

    (max - min of the probability inside the part) / (max - min inside the whole): one click at the part's centre
    makes the network sure of what belongs to it; a part over which it stays equally sure is fine. A map that is
    constant over the whole tells nothing apart: then the part counts as the whole, 1.

    Args:
        probability: the network's map for one positive click at the part's centre, float H, W in 0..1.
        part: bool H, W; what of it lies outside the whole does not count.
        whole: bool H, W.

    Raises:
        Refusal: either mask is empty, or they share no pixel.

    >>> probability = np.array([[1.0, 0.9, 0.5, 0.0]], dtype=np.float32)
    >>> round(semantic(probability, np.array([[True, True, False, False]]), np.array([[True, True, True, False]])), 3)
    0.2
    """
    inside = _inside(part, whole)
    if probability.shape != whole.shape:
        raise ValueError(f"a map of shape {probability.shape} for masks of shape {whole.shape}")
    of_whole = float(np.ptp(probability[whole]))
    return float(np.ptp(probability[inside])) / of_whole if of_whole > 0 else 1.0


def granularity(part: Mask, whole: Mask, probability: FloatMap) -> float:
    """Return a part's granularity, 0..1: the mean of `scale` and `semantic`.

    Raises:
        Refusal: either mask is empty, or they share no pixel.
    """
    return 0.5 * scale(part, whole) + 0.5 * semantic(probability, part, whole)


def estimate(segmenter: Segmenter, encoded: Encoded, part: Mask, whole: Mask) -> float:
    """Return a part's granularity, 0..1, asking the segmenter with one click at the part's centre: one decoder pass.

    Raises:
        Refusal: either mask is empty, or they share no pixel.
    """
    inside = _inside(part, whole)
    click = next_click(inside, np.zeros_like(inside))
    assert click is not None, "a mask with a pixel has a deepest one"
    return granularity(inside, whole, probability_of(segmenter, encoded, Prompt(clicks=(click,))))


def _inside(part: Mask, whole: Mask) -> Mask:
    if part.shape != whole.shape:
        raise ValueError(f"masks of different shapes: {part.shape} and {whole.shape}")
    for name, mask in (("part", part), ("whole", whole)):
        if not mask.any():
            raise Refusal(f"the {name} holds no pixel, so it has no granularity; leave empty masks out")
    inside: Mask = part & whole
    if not inside.any():
        raise Refusal(
            "the part lies outside its whole, so it has no granularity in it; check which whole it belongs to"
        )
    return inside
