"""The gate: may a candidate serve instead of the incumbent? A robot clicks the same objects with both, and we compare.

Two sets are clicked: the hold-out (corrected images that no training saw), on which the candidate must win, and the
reference set (outside photos, always the same), which shows what was forgotten. Each object is clicked at its mask's
own level, since without a level or a phrase an adapter has no part in the answer; how two adapters' clicks compare is
`active_learning.scores`. Everything is deterministic but for the bootstrap, whose generator comes in.

Source: the robot as in RITM (arXiv 2102.06583).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from active_learning.folders import write_whole
from active_learning.scores import UPPER, Difference, ObjectCurve, Paired, Pairs, compare
from active_learning.snapshots import ACCEPTED
from model.annotations import AnnotatedImage, AnnotatedMask, AnnotationSet
from model.evaluation.protocol import Bench, ClickChain, Models, Options, Scene
from model.evaluation.report import draw_cell, draw_click_curves, draw_rows
from model.evaluation.sets import evenly_spaced
from model.segmenter import Segmenter
from model.types import MAX_CLICKS, Granularity, Refusal

Decision = Literal["accepted", "rejected", "too-few"]
Objects = tuple[Scene, Sequence[AnnotatedMask]]  # a photo, and the masks on it that are clicked

_SHEET_ROWS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """What a candidate may lose and has to win.

    A set of 40 objects cannot prove a loss of 3 %: its interval is some 10 % wide on either side, and one object that
    stops at IoU 0.899 instead of 0.901 makes 5 %. So a loss of more than `lose` counts where the whole interval lies
    above 0, and one of more than `doubt` always. What is let through at each version may add up over many: so it is
    also counted from the adapter that the line began with, and more than `total` of that is let through by no version.
    """

    lose: float = 0.03  # relative NoC@90 that the mean may be worse by for certain, on either set
    doubt: float = 0.10  # relative NoC@90 that the mean may be worse by at all, on either set
    total: float = 0.10  # relative NoC@90 that the mean on the reference set may be worse by since the line began
    win: float = 0.0  # relative NoC@85 that the hold-out must gain more than
    first: float = 0.005  # IoU after one click that the hold-out may lose
    confidence: float = 0.95  # of the intervals, two-sided
    least_objects: int = 10  # of the hold-out
    limit: int = 40  # objects of each set at most
    budget: int = 10  # clicks on one object at most

    def __post_init__(self) -> None:
        if not (0 <= self.lose <= self.doubt and min(self.total, self.win, self.first) >= 0):
            raise Refusal(
                f"margins lose {self.lose}, doubt {self.doubt}, total {self.total}, win {self.win}, first {self.first}"
                ": give 0 <= lose <= doubt, and total, win and first of 0 or more"
            )
        if not 0 < self.confidence < 1:
            raise Refusal(f"confidence {self.confidence} is outside 0..1; 0.95 is usual")
        if not 1 <= self.budget <= MAX_CLICKS:
            raise Refusal(f"a budget of {self.budget} clicks is outside 1..{MAX_CLICKS}")
        if not 1 <= self.least_objects <= self.limit:
            raise Refusal(f"{self.least_objects} objects at least and {self.limit} at most: give 1 <= least <= most")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate decided, and why: sentences with figures for the admin."""

    accepted: bool
    decision: Decision
    reasons: tuple[str, ...]
    holdout: Paired | None  # None: it has no object
    reference: Paired
    since_first: Paired | None = (
        None  # on the reference set, against the adapter that the line began with; None: that serves
    )
    worse_on_few: bool = False  # `too-few`, and worse on the objects that there are: it serves by nobody's setting

    @property
    def rank(self) -> int:
        """How good it is among verdicts on other shares of the same training: 2 needs no other."""
        return 0 if self.decision == "rejected" else 1 if self.worse_on_few else 2

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain values."""
        return asdict(self)


# --- Clicking -------------------------------------------------------------------------------------------------------


def objects_of(found: AnnotationSet, limit: int) -> list[tuple[AnnotatedImage, tuple[AnnotatedMask, ...]]]:
    """Return at most `limit` masks of a set by their photos, spread over as many photos as there are.

    Objects of one photo say nearly the same. So each photo gives one mask before any gives a second; which one turns
    with the photo, so that wholes and parts both come up. The same set gives the same masks.
    """
    images = [(image, [mask for mask in image.masks if mask.area]) for image in found.images]
    turned = [masks[n % len(masks) :] + masks[: n % len(masks)] for n, (_, masks) in enumerate(images) if masks]
    chosen: set[int] = set()
    for turn in zip_longest(*turned):
        one_each = [mask.id for mask in turn if mask is not None]
        chosen.update(evenly_spaced(one_each, limit - len(chosen)))
    by_image = [(image, tuple(mask for mask in masks if mask.id in chosen)) for image, masks in images]
    return [(image, masks) for image, masks in by_image if masks]


def judged_by(holdout: AnnotationSet, margins: Margins) -> AnnotationSet:
    """Return a hold-out with the masks to judge by: those that people drew or changed, where they are enough.

    What they took as it was is the incumbent's own answer, to the pixel: by it no candidate draws an edge better.
    """
    by_people = [
        replace(image, masks=tuple(mask for mask in image.masks if mask.origin != ACCEPTED)) for image in holdout.images
    ]
    if sum(mask.area > 0 for image in by_people for mask in image.masks) < margins.least_objects:
        return holdout
    return replace(holdout, images=tuple(image for image in by_people if image.masks))


def curves_of(
    segmenter: Segmenter,
    objects: Iterable[Objects],
    *,
    budget: int,
    report: Callable[[int], None] = lambda done: None,
) -> list[ObjectCurve]:
    """Return how the robot gets on with each object, at the mask's own level.

    That is the granularity that the set states for the mask (an annotator's), else its area over that of its whole.
    The robot stops at IoU 0.90.

    Args:
        segmenter: the adapter that is measured, on its base.
        objects: photos, encoded by this very base, and the masks to click; may be a generator.
        budget: clicks on one object at most.
        report: called with the number of objects done; what it raises ends the run.

    Raises:
        Refusal: a photo cannot be read.
    """
    curves: list[ObjectCurve] = []
    for scene, masks in objects:
        for mask in masks:
            level = _level(scene, mask)
            chain = ClickChain(segmenter=segmenter, encoded=scene.encoded, truth=scene.truth(mask), granularity=level)
            ious = chain.run(budget, until=UPPER)
            held = (*ious, *ious[-1:] * (budget - len(ious)))
            curves.append(ObjectCurve(object=_key(scene, mask), name=mask.name, level=level.level, ious=held))
            report(len(curves))
    return curves


def _level(scene: Scene, mask: AnnotatedMask) -> Granularity:
    """Return the level whose key an annotator presses for a mask: the nearest to what is stated, else to its share."""
    stated = mask.granularity
    return scene.image.level_of(mask) if stated is None else Granularity.from_value(stated)


def _key(scene: Scene, mask: AnnotatedMask) -> str:
    return f"{scene.image.digest()[:16]}/{mask.id}"


# --- Judging --------------------------------------------------------------------------------------------------------


def judge(
    holdout: Pairs | None,
    reference: Pairs,
    margins: Margins,
    rng: np.random.Generator,
    *,
    since_first: Pairs | None = None,
) -> Verdict:
    """Return whether the candidate may serve.

    On either set it loses where its mean NoC@90 is worse by more than `margins.doubt`, or by more than `margins.lose`
    with the whole interval above 0. On the hold-out it wins where its mean NoC@85 is lower by more than `margins.win`
    and its mean IoU after one click is not lower by more than `margins.first`. It also loses where it is worse on the
    reference set than the adapter the line began with, by more than `margins.total`, and no better than the incumbent:
    a line that is beyond that already may only come back. Without enough objects to say so the
    decision is `too-few`, and the caller's to take; a candidate that loses on the reference set is rejected even so.
    Margins allow for what chance does to many objects; of few it is said where any mean of clicks is worse.
    The order of the pairs does not matter, and equal generators give equal verdicts.

    Args:
        holdout: curves on the hold-out, as `paired` returns them; None or empty: there is no object.
        reference: curves on the reference set.
        margins: what may be lost and has to be won.
        rng: draws the bootstrap.
        since_first: curves on the reference set, of the candidate and of the adapter the line began with; None: that
            is the incumbent.

    Raises:
        ValueError: the reference is empty, or a curve is of another budget than `margins.budget`.
    """
    outside = _compared(reference, margins, rng)
    own = _compared(holdout, margins, rng) if holdout else None
    enough = own is not None and own.candidate.objects >= margins.least_objects
    whole_way = _compared(since_first, margins, rng) if since_first else None
    losses = _losses("reference set", outside, margins)
    if whole_way is not None and outside.noc90.relative >= -_ROUNDING:
        losses += _drift(whole_way, margins)
    reasons = [_figures("reference set", outside)]
    if own is not None:
        reasons.insert(0, _figures("hold-out", own))
    worse_on_few: list[str] = []
    if own is not None and enough:
        losses += _losses("hold-out", own, margins) + _not_won(own, margins)
    else:
        count = own.candidate.objects if own else 0
        reasons.append(
            f"The hold-out has {count} objects, fewer than the {margins.least_objects} that a comparison needs: "
            "correct more images, or decide by the figures above."
        )
        worse_on_few = _worse_on_few(own, margins) if own else []
        reasons += worse_on_few
    decision: Decision = "rejected" if losses else "accepted" if enough else "too-few"
    if decision == "accepted":
        reasons.append("It wins on the hold-out and does not lose on the reference set.")
    return Verdict(
        accepted=decision == "accepted",
        decision=decision,
        reasons=(*reasons, *losses),
        holdout=own,
        reference=outside,
        since_first=whole_way,
        worse_on_few=decision == "too-few" and bool(worse_on_few),
    )


def _compared(pairs: Pairs, margins: Margins, rng: np.random.Generator) -> Paired:
    if any(len(curve.ious) != margins.budget for pair in pairs for curve in pair):
        raise ValueError(f"a curve has not {margins.budget} clicks, the budget; have the objects clicked again")
    return compare(pairs, rng, confidence=margins.confidence)


_ROUNDING = 1e-9  # means of equal curves may differ by this


def _losses(where: str, found: Paired, margins: Margins) -> list[str]:
    change = found.noc90
    if change.relative > margins.doubt + _ROUNDING:
        return [f"It is worse on the {where}: NoC@90 {change.relative:+.1%}, where {margins.doubt:+.1%} is allowed."]
    if change.relative > margins.lose + _ROUNDING and change.low > _ROUNDING:
        return [
            f"It is worse on the {where} for certain: NoC@90 {change.relative:+.1%}, at best {change.low:+.1%}, where "
            f"{margins.lose:+.1%} is allowed."
        ]
    return []


def _drift(found: Paired, margins: Margins) -> list[str]:
    change = found.noc90
    if change.relative <= margins.total + _ROUNDING:
        return []
    return [
        "With it, losses of the versions so far add up to too much on the reference set: NoC@90 "
        f"{change.relative:+.1%} against the adapter that the line began with, where {margins.total:+.1%} is "
        "allowed; correct other things too, or go back: python -m ml_backend adapters rollback"
    ]


def _not_won(found: Paired, margins: Margins) -> list[str]:
    ours, theirs, reasons = found.candidate, found.incumbent, []
    if not found.noc85.relative < -margins.win - _ROUNDING:
        wanted = f"by more than {margins.win:.1%} " if margins.win else ""
        reasons.append(f"It does not win {wanted}on the hold-out: NoC@85 {ours.noc85:.2f} after {theirs.noc85:.2f}.")
    return reasons + _poorer_first(found, margins)


def _worse_on_few(found: Paired, margins: Margins) -> list[str]:
    ours, theirs = found.candidate, found.incumbent
    clicks = ("NoC@85", ours.noc85, theirs.noc85), ("NoC@90", ours.noc90, theirs.noc90)
    reasons = [
        f"It is worse on these few: {name} {after:.2f} after {before:.2f}."
        for name, after, before in clicks
        if after > before + _ROUNDING
    ]
    return reasons + _poorer_first(found, margins)


def _poorer_first(found: Paired, margins: Margins) -> list[str]:
    ours, theirs = found.candidate.iou1, found.incumbent.iou1
    if ours >= theirs - margins.first - _ROUNDING:
        return []
    return [f"Its first click is poorer on the hold-out: IoU@1 {ours:.4f} after {theirs:.4f}."]


def _figures(where: str, found: Paired) -> str:
    ours, theirs = found.candidate, found.incumbent

    def change(name: str, before: float, after: float, of: Difference) -> str:
        return f"{name} {before:.2f} -> {after:.2f} ({of.relative:+.1%}, {of.low:+.1%} to {of.high:+.1%})"

    return (
        f"On {ours.objects} objects of the {where}: {change('NoC@85', theirs.noc85, ours.noc85, found.noc85)}, "
        f"{change('NoC@90', theirs.noc90, ours.noc90, found.noc90)}, IoU@1 {theirs.iou1:.3f} -> {ours.iou1:.3f}, "
        f"misses of IoU 0.90 {theirs.misses90} -> {ours.misses90}."
    )


# --- What is kept ---------------------------------------------------------------------------------------------------


def write_verdict(
    folder: Path,
    verdict: Verdict,
    *,
    holdout: Pairs | None,
    reference: Pairs,
    objects: Iterable[Objects] = (),
    models: Models | None = None,
) -> None:
    """Write verdict.json (with the curve of every object), curves.png, and sheet.png where there are objects to show.

    The sheet has a row for each object whose first answer changed most: photo and click, incumbent, candidate.

    Args:
        folder: where to; made where it is not there.
        verdict: what `judge` returned.
        holdout: what it judged.
        reference: likewise.
        objects: as for `curves_of`; those of both sets, or of one.
        models: incumbent (`base`) and candidate (`adapted`); needed to draw the sheet.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"hold-out": (verdict.holdout, holdout or ()), "reference set": (verdict.reference, reference)}
    content = verdict.to_json() | {
        "curves": {
            name: [{"candidate": ours.to_json(), "incumbent": theirs.to_json()} for ours, theirs in pairs]
            for name, (_, pairs) in sets.items()
        }
    }
    write_whole(folder / "verdict.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    draw_click_curves(
        folder / "curves.png",
        {
            f"{name}, {found.candidate.objects} objects": {
                "candidate": found.candidate.curve,
                "incumbent": found.incumbent.curve,
            }
            for name, (found, _) in sets.items()
            if found is not None
        },
    )
    if models is not None:
        pairs = [pair for _, pairs in sets.values() for pair in pairs]
        _draw_changes(folder / "sheet.png", pairs, objects, models)


def _draw_changes(path: Path, pairs: Pairs, objects: Iterable[Objects], models: Models) -> None:
    change = {ours.object: ours.ious[0] - theirs.ious[0] for ours, theirs in pairs}
    shown = set(sorted(change, key=lambda key: (-abs(change[key]), key))[:_SHEET_ROWS])
    rows = {}
    for scene, masks in objects:
        for mask in masks:
            if (key := _key(scene, mask)) in shown:
                rows[key] = row_of(Bench(models, scene, mask, Options()))[0]
    if rows:
        draw_rows(path, [rows[key] for key in sorted(rows, key=lambda key: (-abs(change[key]), key))])


def row_of(
    bench: Bench, labels: tuple[str, str] = ("incumbent", "candidate")
) -> tuple[list[Image.Image], tuple[float, float]]:
    """Return the cells of a sheet's row (photo and click, then both answers), and the IoU of both answers.

    Args:
        bench: the mask, and the two that answer one click at its own level: `base`, then `adapted`.
        labels: what they are called.
    """
    pixels, truth, click, level = bench.scene.pixels(), bench.truth, bench.first, _level(bench.scene, bench.mask)
    cells = [draw_cell(pixels, None, truth, click, f"{bench.mask.name or bench.mask.level} {level.value}")]
    ious = []
    for label, segmenter in zip(labels, (bench.models.base, bench.models.adapted), strict=True):
        mask, iou = bench.answer(segmenter, granularity=level)
        ious.append(iou)
        cells.append(draw_cell(pixels, mask, truth, click, f"{label}: {iou:.2f}"))
    return cells, (ious[0], ious[1])
