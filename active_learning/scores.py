"""What clicking comes to: curves of objects, their scores, and two adapters compared object by object.

Objects are compared in pairs, so that hard ones weigh on both sides alike. Deterministic but for the bootstrap, whose
generator comes in.

Source: NoC as in RITM (arXiv 2102.06583), a miss counted as the budget; the paired percentile bootstrap of Efron and
Tibshirani, An Introduction to the Bootstrap, chapter 13.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from model.metrics import clicks_over, number_of_clicks

LOWER, UPPER = 0.85, 0.90
"""The IoU of NoC@85 and NoC@90."""
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectCurve:
    """How one object went: the IoU after each click up to the budget, the last value held once IoU 0.90 is reached."""

    object: str  # digest of the photo and id of the mask
    name: str
    level: int  # that was asked for, 1..10
    ious: tuple[float, ...]  # one for each click of the budget

    def __post_init__(self) -> None:
        if not self.ious or not all(0 <= iou <= 1 for iou in self.ious):
            raise ValueError(f"the curve of {self.object} must hold an IoU in 0..1 for each click, at least one")

    def clicks(self, target: float) -> int:
        """Return the clicks to a target IoU, a miss counted as the budget."""
        return number_of_clicks(np.array(self.ious), target, len(self.ious)) or len(self.ious)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self) | {"ious": list(self.ious)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ObjectCurve:
        """Return the curve that `to_json` wrote.

        Raises:
            ValueError: it is not one.
        """
        try:
            ious = tuple(float(iou) for iou in content["ious"])
            return cls(object=str(content["object"]), name=str(content["name"]), level=int(content["level"]), ious=ious)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the curve of an object ({error!r}); have it clicked again") from error


Pairs = Sequence[tuple[ObjectCurve, ObjectCurve]]  # candidate's and incumbent's, as `paired` makes them


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How one adapter did on the objects of a set."""

    objects: int
    noc85: float  # mean clicks to IoU 0.85, a miss counted as the budget
    noc90: float
    misses85: int
    misses90: int
    iou1: float  # mean IoU after one click
    curve: tuple[float, ...]  # mean IoU after each click


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Candidate against incumbent; below 0 the candidate needs fewer clicks."""

    mean: float  # clicks
    relative: float  # of the incumbent's mean
    low: float  # bootstrap interval of `relative`
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Both on the same objects."""

    candidate: Scores
    incumbent: Scores
    noc85: Difference
    noc90: Difference


def paired(*, candidate: Iterable[ObjectCurve], incumbent: Iterable[ObjectCurve]) -> Pairs:
    """Return the curves of both, object by object, sorted by object.

    Raises:
        ValueError: they are not of the same objects, or an object is there twice.
    """
    sides = [sorted(curves, key=lambda curve: curve.object) for curves in (candidate, incumbent)]
    names = [[curve.object for curve in side] for side in sides]
    if names[0] != names[1] or len(set(names[0])) < len(names[0]):
        raise ValueError("candidate and incumbent must have clicked the same objects, each once")
    return list(zip(*sides, strict=True))


def scores_of(curves: Sequence[ObjectCurve]) -> Scores:
    """Return what the curves of a set come to.

    Raises:
        ValueError: there is none, or they are of different budgets.
    """
    if not curves:
        raise ValueError("no object to score: pass at least one curve")
    budget = len(curves[0].ious)
    counts = {
        target: clicks_over([number_of_clicks(np.array(c.ious), target, budget) for c in curves], budget)
        for target in (LOWER, UPPER)
    }
    curve = tuple(fmean(at) for at in zip(*(c.ious for c in curves), strict=True))
    return Scores(
        objects=len(curves),
        noc85=counts[LOWER].penalised_mean,
        noc90=counts[UPPER].penalised_mean,
        misses85=counts[LOWER].misses,
        misses90=counts[UPPER].misses,
        iou1=curve[0],
        curve=curve,
    )


def compare(pairs: Pairs, rng: np.random.Generator, *, confidence: float = 0.95) -> Paired:
    """Return how candidate and incumbent compare; the order of the pairs does not matter.

    Args:
        pairs: as `paired` returns them, at least one.
        rng: draws the bootstrap.
        confidence: of the intervals, two-sided.

    Raises:
        ValueError: there is no pair, or the curves are of different budgets.
    """
    pairs = sorted(pairs, key=lambda pair: pair[0].object)
    candidate, incumbent = (scores_of([pair[side] for pair in pairs]) for side in (0, 1))
    drawn = rng.integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    by_target = [
        _difference(np.array([[curve.clicks(target) for curve in pair] for pair in pairs]), drawn, confidence)
        for target in (LOWER, UPPER)
    ]
    return Paired(candidate=candidate, incumbent=incumbent, noc85=by_target[0], noc90=by_target[1])


def _difference(clicks: npt.NDArray[np.int64], drawn: npt.NDArray[np.int64], confidence: float) -> Difference:
    """Compare clicks (N, 2: candidate, incumbent); `drawn` names the objects of each resample."""
    ours, theirs = clicks.mean(axis=0)
    sums = clicks[drawn].sum(axis=1)  # resamples, 2
    low, high = np.quantile(sums[:, 0] / sums[:, 1] - 1, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(mean=float(ours - theirs), relative=float(ours / theirs - 1), low=float(low), high=float(high))
