"""Rows of a run as numbers: for each set and level what each protocol comes to, and the figures we want to reach.

Pure. Every number stands beside the count of masks behind it; a difference is taken over masks that both sides have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from operator import itemgetter
from statistics import fmean, median
from typing import Any

import numpy as np

from model.evaluation.protocol import Options, Row
from model.metrics import (
    calibration,
    clicks_over,
    growth,
    monotone_steps,
    number_of_clicks,
    seconds_per_interaction,
)

Numbers = dict[str, Any]  # JSON-able


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Group:
    """The rows of one set and level (object, part, subpart): protocol to mask to row."""

    set_name: str
    level: str
    rows: dict[str, dict[int, Row]]

    def of(self, protocol: str) -> list[Row]:
        """Return the rows of a protocol."""
        return list(self.rows.get(protocol, {}).values())

    def values(self, protocol: str, value: Callable[[Row], float | None]) -> dict[int, float]:
        """Return a value of each row of a protocol by its mask, without those that have none."""
        found = {mask: value(row) for mask, row in self.rows.get(protocol, {}).items()}
        return {mask: number for mask, number in found.items() if number is not None}


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """Return the rows by set and level, in the order they come in; a fixed level's are under `fixed 1.0` and so on."""
    groups: dict[tuple[str, str], Group] = {}
    for row in rows:
        place = (row["set"], row["mask_level"])
        group = groups.setdefault(place, Group(set_name=place[0], level=place[1], rows={}))
        parts = {row["protocol"]: row}
        if row["protocol"] in ("fixed", "paper-fixed"):
            parts = {f"{row['protocol']} {level}": row | clicked for level, clicked in row["by_level"].items()}
        for protocol, part in parts.items():
            group.rows.setdefault(protocol, {})[row["mask"]] = part
    return list(groups.values())


def numbers_of(group: Group, options: Options) -> Numbers:
    """Return all numbers of a group, each protocol's under its name; only what was run is there."""
    masks = {mask for rows in group.rows.values() for mask in rows}
    numbers: Numbers = {"set": group.set_name, "level": group.level, "masks": len(masks)}
    makers: dict[str, Callable[[Group, Options], Numbers]] = {
        "clicks": _clicks,
        "oracle3": _oracle3,
        "levels": _levels,
        "phrase": _phrase,
        "curve": _curve,
        "own": _over_own_level,
        "monotone": _monotone,
        "calibration": _calibration,
        "time": lambda group, options: _time(group.of("time"), options),
        "paper": _paper,
    }
    made = {name: make(group, options) for name, make in makers.items()}
    return numbers | {name: value for name, value in made.items() if value}


def _clicks(group: Group, options: Options) -> Numbers:
    """IoU@1 and NoC of every protocol that clicks on."""
    names = ("base", "level", "oracle", *(f"fixed {level.value}" for level in options.fixed_levels))
    found: Numbers = {}
    for name in names:
        if chains := group.of(name):
            found[name] = {"masks": len(chains), "iou_at_1": fmean(row["ious"][0] for row in chains)}
            found[name]["refusals"] = sum(row.get("refusals", 0) for row in chains)
            for target in options.targets:
                clicks = [number_of_clicks(np.array(row["ious"]), target, options.budget) for row in chains]
                found[name][noc_name(target)] = asdict(clicks_over(clicks, options.budget))
    return found


def noc_name(target: float) -> str:
    """Return how a target's clicks are called.

    >>> noc_name(0.85), noc_name(0.925)
    ('NoC@85', 'NoC@92.5')
    """
    return f"NoC@{round(target * 100, 2):g}"


def _paper(group: Group, options: Options) -> Numbers:
    """What GraCo's and RITM's code print: a miss counts as the budget, and a budget spent counts as a miss."""
    names = ("paper-plain", "paper-sweep", *(f"paper-fixed {x.value}" for x in options.fixed_levels), "paper-phrase")
    found: Numbers = {}
    for name in names:
        if rows := [row for row in group.of(name) if "ious" in row]:
            found[name] = published([row["ious"] for row in rows], max(options.targets), options.budget)
            found[name]["seconds"] = sum(row["seconds"] for row in rows)
            found[name]["clicks"] = sum(len(row["ious"]) for row in rows)
            found[name]["refusals"] = sum(row["refusals"] for row in rows)
    return found


def pooled(parts: Sequence[Numbers]) -> Numbers:
    """Return what `published` numbers of several groups come to together: means over all masks, sums of the rest.

    >>> pooled([{"masks": 1, "NoC@90": 20.0, ">=20@90": 1}, {"masks": 3, "NoC@90": 2.0, ">=20@90": 0}])
    {'masks': 4, 'NoC@90': 6.5, '>=20@90': 1}
    """
    masks = sum(part["masks"] for part in parts)
    found: Numbers = {}
    for key, value in parts[0].items():
        of = [part[key] * (part["masks"] if isinstance(value, float) and key != "seconds" else 1) for part in parts]
        found[key] = sum(of) / masks if isinstance(value, float) and key != "seconds" else sum(of)
    return found


def published(ious: Sequence[Sequence[float]], highest: float, budget: int = 20) -> Numbers:
    """Return the numbers of the papers' tables for the IoUs of each mask, after each click until it stopped.

    Args:
        ious: of each mask.
        highest: the target at which clicking stopped; NoC is given for 0.80, 0.85 and 0.90 up to it.
        budget: clicks on a mask at most.

    Source: `compute_noc_metric` of RITM, in GraCo's `isegm/inference/utils.py`. Our own NoC tells a miss from a mask
    that got there at the last click; here both have `budget` clicks, and both count in `>=20@`.

    >>> published([[0.7, 0.95], [0.5] * 20], 0.9)["NoC@90"]
    11.0
    """
    found: Numbers = {"masks": len(ious), "iou_at_1": fmean(of[0] for of in ious)}
    for target in (0.80, 0.85, 0.90):
        if target <= highest:
            clicks = [number_of_clicks(np.array(of), target, budget) or budget for of in ious]
            found[noc_name(target)] = fmean(clicks)
            found[f">={budget}@{round(target * 100)}"] = clicks.count(budget)
    return found


def _oracle3(group: Group, options: Options) -> Numbers:
    best = [max(row["ious"]) for row in group.of("base-oracle3")]
    return {"masks": len(best), "iou_at_1": fmean(best)} if best else {}


def _levels(group: Group, options: Options) -> Numbers:
    rows = group.of("levels")
    if not rows:
        return {}
    means = {name: fmean(row[name] for row in rows) for name in ("ours", "three", "truths", "offered")}
    return {"masks": len(rows), "support": options.support, **means}


def _phrase(group: Group, options: Options) -> Numbers:
    rows = [row for row in group.of("phrase") if "phrase" in row]
    unnamed = len(group.of("phrase")) - len(rows)
    if not rows:
        return {}
    means = {name: fmean(row[name] for row in rows) for name in ("base", "level", "nearest", "phrase", "both")}
    unknown = [fmean(row["unknown"][i] for row in rows) for i in range(len(rows[0]["unknown"]))]
    return {"masks": len(rows), "unnamed": unnamed, **means, "unknown": unknown}


def _curve(group: Group, options: Options) -> Numbers:
    rows = group.of("curve")
    if not rows:
        return {}
    means = {name: [fmean(at) for at in zip(*(row[name] for row in rows), strict=True)] for name in _CURVES}
    return {"masks": len(rows), **means}


_CURVES = ("base", "level", "by_level")


def _over_own_level(group: Group, options: Options) -> Numbers:
    """IoU@1 over the masks' own level, base and level given."""
    found: Numbers = {}
    for name in ("base", "level"):
        for row in group.of(name):
            found.setdefault(name, {}).setdefault(row["own"], []).append(row["ious"][0])
    return {
        name: {str(own): {"masks": len(ious), "iou_at_1": fmean(ious)} for own, ious in sorted(by_level.items())}
        for name, by_level in found.items()
    }


def _monotone(group: Group, options: Options) -> Numbers:
    rows = group.of("monotone")
    if not rows:
        return {}
    kept, steps = (sum(values) for values in zip(*(monotone_steps(row["areas"]) for row in rows), strict=True))
    grown = [growth(row["areas"]) for row in rows if row["has_parts"]]
    found: Numbers = {"masks": len(rows), "steps": steps, "share": kept / steps, "with_parts": len(grown)}
    if grown:
        found |= {"growth_median": median(grown), "empty": sum(value == 0 for value in grown)}
    return found


def _calibration(group: Group, options: Options) -> Numbers:
    """By source: the masks of base and level after each click; what one click offers, all levels and the base's three.

    The truth of an offer is the true mask under the click that it is closest to.
    """
    columns = {
        "base": ("base", "scores", "ious"),
        "level": ("level", "scores", "ious"),
        "all levels": ("levels", "scores", "best"),
        "base, three masks": ("levels", "three_scores", "three_best"),
    }
    found: Numbers = {}
    for name, (protocol, scores, ious) in columns.items():
        expected = [score for row in group.of(protocol) for score in row[scores]]
        if expected:
            true = [iou for row in group.of(protocol) for iou in row[ious]]
            found[name] = asdict(calibration(expected, true))
    return found


def _time(rows: Sequence[Row], options: Options) -> Numbers:
    if not rows:
        return {}
    found: Numbers = {"masks": len(rows), "encode_s": median(row["encode_s"] for row in rows)}
    for name in ("base", "adapted"):
        steps = list(chain.from_iterable(row[f"{name}_step_s"] for row in rows))
        clicks = list(chain.from_iterable(row[f"{name}_click_s"] for row in rows))
        found |= {
            f"{name}_step_median_s": median(steps),
            f"{name}_spc_median_s": median(clicks),
            f"{name}_spc_mean_s": fmean(clicks),
            f"{name}_pie_s": seconds_per_interaction(found["encode_s"], median(clicks), options.budget),
        }
    pairs = chain.from_iterable(zip(row["adapted_step_s"], row["base_step_s"], strict=True) for row in rows)
    ratios = [adapted / base for adapted, base in pairs if base > 0]
    return found | {"pairs": len(ratios), "step_ratio_median": median(ratios) if ratios else 1.0}


# --- The figures to reach -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of the table we want to reach, measured."""

    set_name: str
    level: str
    what: str
    reach: str
    base: float | None  # what it is compared with
    ours: float
    measured: float
    reached: bool
    count: int  # masks, steps or pairs behind it


_PARTS = ("ccp-person-clothing", "car-parts", "bsds500-granularity")
_OBJECTS = ("coco-mval", "coco128-seg", "penn-fudan")
_COVERED = ("bsds500-granularity", "ccp-person-clothing")
_PHRASED = ("ccp-person-clothing",)
_LEVEL_GAIN = dict(zip(_PARTS, (0.38, 0.22, 0.18), strict=True))
_ORACLE_GAIN = dict(zip(_PARTS, (0.04, 0.0, 0.0), strict=True))
_ORACLE_CLICKS = dict(zip(_PARTS, (0.65, 0.85, 0.85), strict=True))


def figures_of(groups: Sequence[Group], options: Options) -> list[Figure]:
    """Return the figures to reach for which the needed protocols were run, on the sets they are named for.

    Source: the table of issue [granularity]; NoC there is the penalised mean.
    """
    found: list[Figure | None] = []
    for group in groups:
        if group.level == "part" and group.set_name in _PARTS:
            found += _part_figures(group, options)
        if group.level == "object" and group.set_name in _OBJECTS:
            found += _object_figures(group, options)
        found += _monotone_figures(group, options)
        if group.set_name in _COVERED:
            what = "1-IoU@all granularities" + (f", support >= {options.support}" if options.support > 1 else "")
            base, ours = group.values("levels", itemgetter("three")), group.values("levels", itemgetter("ours"))
            found.append(_gain(group, what, base, ours, 0.06, to="three masks"))
        if group.level == "part" and group.set_name in _PHRASED:
            found += _phrase_figures(group)
    if time := _time([row for group in groups for row in group.of("time")], options):
        ratio, what = time["step_ratio_median"], "decoder time with level, over without"
        found.append(_alone("all", "all", what, "1.15 x", ratio, ratio <= 1.15, time["pairs"]))
    return [figure for figure in found if figure is not None]


def _part_figures(group: Group, options: Options) -> list[Figure | None]:
    base, oracle, clicks = group.values("base", _first), group.values("oracle", _first), _penalised(0.85, options)
    three = group.values("base-oracle3", lambda row: max(row["ious"]))
    nearest = group.values("level", itemgetter("nearest"))
    name = group.set_name
    return [
        _gain(group, "level given, IoU@1", base, group.values("level", _first), _LEVEL_GAIN[name]),
        _gain(group, "nearest of ten levels given, IoU@1", base, nearest, _LEVEL_GAIN[name]),
        _gain(group, "oracle level, IoU@1", three, oracle, _ORACLE_GAIN[name], to="best of three"),
        _times(
            group,
            "oracle level, NoC@85",
            group.values("base", clicks),
            group.values("oracle", clicks),
            _ORACLE_CLICKS[name],
        ),
    ]


def _object_figures(group: Group, options: Options) -> list[Figure | None]:
    clicks, whole = _penalised(0.90, options), "fixed 1.0"
    return [
        _gain(group, "fixed level 1.0, IoU@1", group.values("base", _first), group.values(whole, _first), 0.10),
        _times(group, "fixed level 1.0, NoC@90", group.values("base", clicks), group.values(whole, clicks), 0.9),
    ]


def _monotone_figures(group: Group, options: Options) -> list[Figure]:
    numbers = _monotone(group, options)
    if not numbers:
        return []
    share, ratio = numbers["share"], numbers.get("growth_median")
    found = [
        _alone(
            group.set_name,
            group.level,
            "steps that do not shrink (1 %)",
            "0.95",
            share,
            share >= 0.95,
            numbers["steps"],
        )
    ]
    if ratio is not None:
        what = "area at 1.0 over 0.1, objects with parts"
        found.append(_alone(group.set_name, group.level, what, "3 x", ratio, ratio >= 3, numbers["with_parts"]))
    return found


def _phrase_figures(group: Group) -> list[Figure | None]:
    phrase, base, level, nearest = (
        {mask: row[side] for mask, row in group.rows.get("phrase", {}).items() if "phrase" in row}
        for side in ("phrase", "base", "level", "nearest")
    )
    return [
        _gain(group, "phrase, IoU@1 at a random click", base, phrase, 0.33),
        _gain(group, "phrase, IoU@1 at a random click", level, phrase, -0.05, to="level alone"),
        _gain(group, "phrase, IoU@1 at a random click", nearest, phrase, -0.05, to="nearest level alone"),
    ]


def _first(row: Row) -> float:
    return float(row["ious"][0])


def _penalised(target: float, options: Options) -> Callable[[Row], float | None]:
    """The clicks to a target, a miss counted as the budget; None where the run did not go that far."""

    def clicks(row: Row) -> float | None:
        if max(options.targets) < target:
            return None
        return number_of_clicks(np.array(row["ious"]), target, options.budget) or options.budget

    return clicks


def _gain(
    group: Group, what: str, base: dict[int, float], ours: dict[int, float], gain: float, to: str = "base"
) -> Figure | None:
    """A difference of means over the masks that both sides have; None: there are none."""
    return _compared(group, what, base, ours, f"{to} {gain:+.2f}", lambda a, b: b - a, lambda gap: gap >= gain)


def _times(group: Group, what: str, base: dict[int, float], ours: dict[int, float], factor: float) -> Figure | None:
    """A ratio of means over the masks that both sides have; None: there are none."""
    return _compared(group, what, base, ours, f"{factor:g} x base", lambda a, b: b / a, lambda ratio: ratio <= factor)


def _compared(
    group: Group,
    what: str,
    base: dict[int, float],
    ours: dict[int, float],
    reach: str,
    compare: Callable[[float, float], float],
    reached: Callable[[float], bool],
) -> Figure | None:
    both = sorted(base.keys() & ours.keys())
    if not both:
        return None
    ours_mean, base_mean = (fmean(side[mask] for mask in both) for side in (ours, base))
    measured = compare(base_mean, ours_mean)
    return Figure(
        set_name=group.set_name,
        level=group.level,
        what=what,
        reach=reach,
        base=base_mean,
        ours=ours_mean,
        measured=measured,
        reached=reached(round(measured, 9)),
        count=len(both),
    )


def _alone(set_name: str, level: str, what: str, reach: str, measured: float, reached: bool, count: int) -> Figure:
    return Figure(
        set_name=set_name,
        level=level,
        what=what,
        reach=reach,
        base=None,
        ours=measured,
        measured=measured,
        reached=reached,
        count=count,
    )
