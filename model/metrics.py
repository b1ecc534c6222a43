"""How good a mask is: IoU, and the clicks it took. Numbers only; nothing here knows a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np
import numpy.typing as npt

from model.types import Mask

FloatArray = npt.NDArray[np.float64]


def iou(a: Mask, b: Mask) -> float:
    """Return intersection over union of two masks of one shape; two empty masks agree fully.

    >>> iou(np.array([[True, True]]), np.array([[True, False]]))
    0.5
    """
    if a.shape != b.shape:
        raise ValueError(f"masks of different shapes: {a.shape} and {b.shape}")
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 1.0


def number_of_clicks(ious: npt.NDArray[np.floating], target: float, budget: int = 20) -> int | None:
    """Return the clicks needed to reach a target IoU (NoC), or None for a miss.

    Args:
        ious: IoU after each click, shape (clicks,), each in [0, 1].
        target: the IoU that counts as done, 0.90 for NoC@90.
        budget: clicks to look at; later ones are ignored.

    Raises:
        ValueError: `ious` is empty.

    Source: the RITM evaluation protocol (arXiv 2102.06583), which scores a miss as `budget`; here it is None,
    so that reaching the target on the last click stays a success.

    >>> number_of_clicks(np.array([0.61, 0.88, 0.93]), target=0.90)
    3
    """
    if ious.size == 0:
        raise ValueError("no IoU to score: pass the IoU after each click, at least one")
    reached = np.flatnonzero(ious[:budget] >= target)
    return int(reached[0]) + 1 if reached.size else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Clicks:
    """The clicks that several objects took to one target IoU, misses apart."""

    objects: int
    misses: int
    reached_mean: float | None  # over those that got there; None: none did
    penalised_mean: float  # over all, a miss counted as the budget


def clicks_over(clicks: Sequence[int | None], budget: int = 20) -> Clicks:
    """Return what the clicks of several objects (None: a miss) come to.

    Args:
        clicks: what `number_of_clicks` gave for each object.
        budget: what the penalised mean counts for a miss.

    Raises:
        ValueError: `clicks` is empty.

    Source: the penalised mean is the NoC of the literature (RITM, arXiv 2102.06583; GraCo, arXiv 2405.00587).

    >>> clicks_over([1, 3, None], budget=20)
    Clicks(objects=3, misses=1, reached_mean=2.0, penalised_mean=8.0)
    """
    if not clicks:
        raise ValueError("no object to count clicks of: pass at least one")
    reached = [n for n in clicks if n is not None]
    return Clicks(
        objects=len(clicks),
        misses=len(clicks) - len(reached),
        reached_mean=fmean(reached) if reached else None,
        penalised_mean=fmean(budget if n is None else n for n in clicks),
    )


def iou_matrix(proposals: Sequence[Mask], truths: Sequence[Mask]) -> FloatArray:
    """Return the IoU of each proposal (rows) with each true mask (columns), shape (proposals, truths)."""
    return np.array([[iou(p, t) for t in truths] for p in proposals], np.float64).reshape(len(proposals), len(truths))


def iou_at_all_granularities(ious: FloatArray) -> float:
    """Return 1-IoU@all granularities: how well the proposals of one click cover all true masks under it.

    Each true mask is matched with at most one proposal, each proposal with at most one true mask, so that the sum of
    IoU is largest (Hungarian matching); the mean runs over the true masks, an unmatched one counting 0.

    Args:
        ious: IoU of each proposal with each true mask, shape (proposals, truths).

    Raises:
        ValueError: there is no true mask.

    Source: Semantic-SAM (arXiv 2307.04767), section 4.1, "1-IoU@All Granularity".

    >>> iou_at_all_granularities(np.array([[0.9, 0.8], [0.8, 0.1]]))
    0.8
    """
    if ious.ndim != 2 or not ious.shape[1]:
        raise ValueError(f"expected IoU of shape (proposals, truths) with at least one truth, got shape {ious.shape}")
    from scipy.optimize import linear_sum_assignment  # slow to load, and no serving process needs it

    rows, columns = linear_sum_assignment(ious, maximize=True)
    return float(ious[rows, columns].sum() / ious.shape[1])


def monotone_steps(areas: Sequence[int], tolerance: float = 0.01) -> tuple[int, int]:
    """Return how many steps from one level to the next do not shrink the area, and how many steps there are.

    Args:
        areas: pixels of the mask at each level, finest first.
        tolerance: the share of the area that a step may lose.

    >>> monotone_steps([100, 99, 200, 190])
    (2, 3)
    """
    kept = sum(after >= before * (1 - tolerance) for before, after in pairwise(areas))
    return kept, max(0, len(areas) - 1)


def growth(areas: Sequence[int]) -> float:
    """Return how many times larger the last area is than the first.

    0 where either is empty: a level that finds nothing is a failure, not boundless growth.

    >>> growth([50, 80, 200]), growth([0, 200])
    (4.0, 0.0)
    """
    return areas[-1] / areas[0] if areas and areas[0] and areas[-1] else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How far the expected IoU of masks is from their true IoU."""

    masks: int
    mean_absolute_error: float
    expected_calibration_error: float
    mean_score: float
    mean_iou: float


def calibration(scores: Sequence[float], ious: Sequence[float], bins: int = 10) -> Calibration:
    """Return how well scores (expected IoU, 0..1) foretell true IoU.

    The expected calibration error sorts the masks into `bins` equally wide bins of score and takes the mean over
    masks of the gap between a bin's mean score and its mean IoU (Guo et al., arXiv 1706.04599, IoU for accuracy).

    Raises:
        ValueError: the two differ in length or are empty.

    >>> calibration([0.9, 0.9], [1.0, 0.8]).mean_absolute_error
    0.1
    """
    if len(scores) != len(ious) or not scores:
        raise ValueError(f"{len(scores)} scores and {len(ious)} IoU: pass as many of one as of the other, at least one")
    expected, true = np.asarray(scores, np.float64), np.asarray(ious, np.float64)
    bin_of = np.clip((expected * bins).astype(int), 0, bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    gaps = np.abs(np.bincount(bin_of, expected, bins) - np.bincount(bin_of, true, bins))  # of sums: mean gap x count
    return Calibration(
        masks=len(scores),
        mean_absolute_error=round(float(np.abs(expected - true).mean()), 9),
        expected_calibration_error=round(float(gaps.sum() / counts.sum()), 9),
        mean_score=float(expected.mean()),
        mean_iou=float(true.mean()),
    )


def seconds_per_interaction(encode_s: float, click_s: float, clicks: int = 20) -> float:
    """Return the seconds one click costs when the image's encoding is shared out among `clicks` clicks.

    What we report as InterFormer's PIE. InterFormer (arXiv 2304.02942) separates preprocessing an image once from
    answering clicks, and sets such a pipeline against SPC (seconds per click), which leaves the encoding out. The
    paper's own formula was not at hand when this was written, so compare this figure with itself only.

    >>> seconds_per_interaction(encode_s=1.0, click_s=0.05, clicks=20)
    0.1
    """
    if clicks < 1:
        raise ValueError(f"{clicks} clicks to share an encoding among: pass at least 1")
    return (encode_s + clicks * click_s) / clicks
