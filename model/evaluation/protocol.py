"""What is measured on one mask: chains of a robot's clicks, sweeps over levels, phrases, seconds.

Pure but for the clock of `time`: segmenter, embedding and masks come in, one row of numbers goes out. The robot is
`model.robot.next_click`: first the middle of the mask, then the middle of the deepest error, at most `budget` clicks. A
prompt that the segmenter refuses is answered by an empty mask with IoU 0, and counted.

Protocols:

- `base`: no level, no phrase, no adapter: at one click the best-scored of three masks, then the single mask.
- `base-oracle3`: the best of those three masks by true IoU, at one click.
- `level`: the mask's own level given (its area over that of its whole), not chosen by looking at the result; and the
  first click at the nearest of the ten levels.
- `oracle`: all ten levels clicked side by side, each by its own robot; the best IoU and the fewest clicks count
  (GraCo, arXiv 2405.00587).
- `fixed`: one level for every mask, 1.0 for whole objects.
- `levels`: all that one click offers against all true masks under it (Semantic-SAM, arXiv 2307.04767).
- `phrase`: the mask's name as the phrase, at a random pixel of the mask; level and base at that very pixel.
- `curve`: `base` and `level` through the whole budget, and the IoU of each level at one click.
- `monotone`: the area of each level at one click.
- `time`: seconds to encode, and to answer a click, with and without adapter in turns.

Protocols as the code published with GraCo measures them (its `isegm/inference/evaluation.py`), to compare with papers;
robot and stop rule are that code's (`model.robot`), pixels that the set leaves undecided do not count, and each mask is
timed by itself, its photo encoded anew:

- `paper-plain`: no level, no phrase, no adapter; this is SimpleClick's evaluation (arXiv 2210.11006).
- `paper-sweep`: each level is clicked from the start by its own robot, until the highest target, or one click more than
  the best level before it; the level of fewest clicks counts, of several that with the best first click.
- `paper-fixed`: one level for every mask.
- `paper-phrase`: the mask's name as the phrase, at every click (`phrase_of`).
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from model.annotations import AnnotatedImage, AnnotatedMask, decode
from model.metrics import iou, iou_at_all_granularities, iou_matrix
from model.robot import next_click
from model.segmenter import Encoded, MemoKey, Segmenter, predict
from model.types import (
    MAX_CLICKS,
    MAX_PROPOSALS,
    Click,
    Granularity,
    Mask,
    Prediction,
    Prompt,
    Proposal,
    Refusal,
    RGBImage,
)

Row = dict[str, Any]  # as it stands in results.jsonl

LEVELS = tuple(Granularity(level) for level in range(1, 11))
UNKNOWN_PHRASES = ("qwertyuiop", "自転車")
NAMELESS = ("", "region")
_NUMBERED = re.compile(r" \d+$")  # PASCAL-Part numbers a thing's parts of one kind: wheel 1, wheel 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What changes the numbers of a run."""

    budget: int = 20  # clicks on one mask at most
    targets: tuple[float, ...] = (0.85, 0.90)  # of the NoC
    fixed_levels: tuple[Granularity, ...] = (Granularity(10),)
    support: int = 1  # annotators who drew a mask, where the set says so
    seed: int = 0  # of the random clicks

    def __post_init__(self) -> None:
        if not 1 <= self.budget <= MAX_CLICKS:
            raise Refusal(f"a budget of {self.budget} clicks is outside 1..{MAX_CLICKS}")
        if not self.targets or not all(0 < target <= 1 for target in self.targets):
            raise Refusal(f"target IoU {self.targets}: give one or several in (0, 1], such as 0.85,0.90")
        if not self.fixed_levels:
            raise Refusal("no fixed level: give one or several, such as 1.0")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Models:
    """The two that are compared: the same base weights without and with an adapter (or twice without)."""

    base: Segmenter
    adapted: Segmenter


@dataclass(slots=True, eq=False, kw_only=True)
class ClickChain:
    """One robot at work on one mask; goes on as far as it is asked to."""

    segmenter: Segmenter
    encoded: Encoded
    truth: Mask
    granularity: Granularity | None = None
    phrase: str | None = None
    as_ritm: bool = False
    decided: Mask | None = None  # pixels that count; None: all
    opening: dict[MemoKey, Any] = field(default_factory=dict)  # memo of the first click, shared by chains of one model
    ious: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)
    refusals: int = 0
    _clicks: tuple[Click, ...] = ()
    _mask: Mask | None = None
    _memo: dict[MemoKey, Any] = field(default_factory=dict)

    def run(self, budget: int, until: float = 2.0) -> list[float]:
        """Return the IoU after each click, up to the click that reaches `until` or to the budget."""
        while len(self.ious) < budget and not any(value >= until for value in self.ious):
            self._advance()
        end = next((n for n, value in enumerate(self.ious, 1) if value >= until), budget)
        return self.ious[: min(end, budget)]

    def _advance(self) -> None:
        mask = np.zeros_like(self.truth) if self._mask is None else self._mask
        click = next_click(self.truth, mask, self._clicks, as_ritm=self.as_ritm)
        if click is None:  # nothing left to correct: the mask stands
            repeated: tuple[list[Any], ...] = (self.ious, self.scores, self.areas)
            for values in repeated:
                values.append(values[-1])
            return
        memo = self._memo if self._clicks else self.opening
        self._clicks = (*self._clicks, click)
        prompt = Prompt(clicks=self._clicks, granularity=self.granularity, phrase=self.phrase)
        answer = answer_to(self.segmenter, self.encoded, prompt, memo=memo)
        # the newest state is all the next click needs
        self._memo = dict(memo) if memo is self.opening else dict([*memo.items()][-1:])
        self.refusals += answer is None
        self._mask = np.zeros_like(self.truth) if answer is None else answer.best.mask
        if self.decided is not None:
            self._mask = self._mask & self.decided
        self.ious.append(round(iou(self._mask, self.truth), 6))
        self.scores.append(0.0 if answer is None else round(answer.best.score, 6))
        self.areas.append(int(np.count_nonzero(self._mask)))


def answer_to(
    segmenter: Segmenter,
    encoded: Encoded,
    prompt: Prompt,
    *,
    memo: dict[MemoKey, Any] | None = None,
    proposals: int = 1,
) -> Prediction | None:
    """Return the answer to a prompt, or None where the segmenter refuses it."""
    try:
        return predict(segmenter, encoded, prompt, memo=memo, proposals=proposals)
    except Refusal:
        return None


@dataclass(slots=True, eq=False, kw_only=True)
class Scene:
    """An image of a set, encoded, and its true masks, decoded when first asked for."""

    set_name: str
    image: AnnotatedImage
    encoded: Encoded
    pixels: Callable[[], RGBImage]
    _masks: dict[int, Mask] = field(default_factory=dict)

    def truth(self, mask: AnnotatedMask) -> Mask:
        """Return the pixels of a mask."""
        if mask.id not in self._masks:
            self._masks[mask.id] = mask.mask()
        return self._masks[mask.id]


class Bench:
    """One mask under any of the protocols, which share the chains they have in common."""

    def __init__(self, models: Models, scene: Scene, mask: AnnotatedMask, options: Options) -> None:
        """Take what is measured; nothing is computed yet."""
        self.models, self.scene, self.mask, self.options = models, scene, mask, options
        self.truth = scene.truth(mask)
        self.own = scene.image.granularity_of(mask)
        self.nearest = scene.image.level_of(mask)
        first = next_click(self.truth, np.zeros_like(self.truth))
        if first is None:
            raise Refusal(f"mask {mask.id} of {scene.image.path} is empty: nothing can be clicked in it")
        self.first = first
        self._chains: dict[Granularity | None, ClickChain] = {}
        self._openings: dict[int, dict[MemoKey, Any]] = {id(models.base): {}, id(models.adapted): {}}

    def chain(self, granularity: Granularity | None) -> ClickChain:
        """Return the robot's chain at a level, by the adapted model, or without one, by the base."""
        if granularity not in self._chains:
            segmenter = self.models.base if granularity is None else self.models.adapted
            self._chains[granularity] = ClickChain(
                segmenter=segmenter,
                encoded=self.scene.encoded,
                truth=self.truth,
                granularity=granularity,
                opening=self._openings[id(segmenter)],
            )
        return self._chains[granularity]

    def run(self, protocol: str) -> Row:
        """Return what `protocol` (see this module) measures on the mask."""
        return _PROTOCOLS[protocol](self)

    def answer(
        self,
        segmenter: Segmenter,
        *,
        click: Click | None = None,
        granularity: Granularity | None = None,
        phrase: str | None = None,
    ) -> tuple[Mask, float]:
        """Return the mask that one click (the middle if none is given) gets, and its IoU."""
        prompt = Prompt(clicks=(click or self.first,), granularity=granularity, phrase=phrase)
        memo = self._openings[id(segmenter)] if click is None and phrase is None else None
        answer = answer_to(segmenter, self.scene.encoded, prompt, memo=memo)
        mask = np.zeros_like(self.truth) if answer is None else answer.best.mask
        return mask, round(iou(mask, self.truth), 6)

    def _clicked(self, granularity: Granularity | None) -> Row:
        chain = self.chain(granularity)
        ious = chain.run(self.options.budget, max(self.options.targets))
        return {"ious": list(ious), "scores": chain.scores[: len(ious)], "refusals": chain.refusals}

    def _base(self) -> Row:
        return self._clicked(None)

    def _level(self) -> Row:
        return self._clicked(self.own) | {"nearest": self.answer(self.models.adapted, granularity=self.nearest)[1]}

    def _fixed(self) -> Row:
        return {"by_level": {str(level.value): self._clicked(level) for level in self.options.fixed_levels}}

    def _base_oracle3(self) -> Row:
        offered = self._offered(self.models.base, 3)
        return {"ious": [round(iou(p.mask, self.truth), 6) for p in offered], "scores": _scores(offered)}

    def _oracle(self) -> Row:
        """The levels side by side, so that a mask is done when the first of them reaches the highest target."""
        chains = [self.chain(level) for level in LEVELS]
        highest = max(self.options.targets)
        best: list[float] = []
        for n in range(1, self.options.budget + 1):
            best.append(max(chain.run(n)[-1] for chain in chains))
            if best[-1] >= highest:
                break
        return {"first": [chain.ious[0] for chain in chains], "ious": best}

    def _levels(self) -> Row:
        offered, three = self._offered(self.models.adapted, MAX_PROPOSALS), self._offered(self.models.base, 3)
        truths = self._truths_under(self.first)
        ours, theirs = (iou_matrix([p.mask for p in found], truths) for found in (offered, three))
        return {
            "truths": len(truths),
            "offered": len(offered),
            "ours": round(iou_at_all_granularities(ours), 6),
            "three": round(iou_at_all_granularities(theirs), 6),
            "scores": _scores(offered),
            "best": [round(float(value), 6) for value in ours.max(axis=1)],
            "three_scores": _scores(three),
            "three_best": [round(float(value), 6) for value in theirs.max(axis=1)],
        }

    def _phrase(self) -> Row:
        click = random_click(self.truth, f"{self.options.seed}/{self.scene.set_name}/{self.mask.id}")
        base, adapted, name = self.models.base, self.models.adapted, self.mask.name
        row: Row = {
            "base": self.answer(base, click=click)[1],
            "level": self.answer(adapted, click=click, granularity=self.own)[1],
            "nearest": self.answer(adapted, click=click, granularity=self.nearest)[1],
            "unknown": [self.answer(adapted, click=click, phrase=words)[1] for words in UNKNOWN_PHRASES],
        }
        if name not in NAMELESS:
            row["phrase"] = self.answer(adapted, click=click, phrase=name)[1]
            row["both"] = self.answer(adapted, click=click, phrase=name, granularity=self.own)[1]
        return row

    def _curve(self) -> Row:
        return {
            "base": list(self.chain(None).run(self.options.budget)),
            "level": list(self.chain(self.own).run(self.options.budget)),
            "by_level": [self.chain(level).run(1)[0] for level in LEVELS],
        }

    def _monotone(self) -> Row:
        for level in LEVELS:
            self.chain(level).run(1)
        parts = self.mask.level == "object" and bool(self.scene.image.children(self.mask))
        return {"areas": [self.chain(level).areas[0] for level in LEVELS], "has_parts": parts}

    def _time(self) -> Row:
        image = self.scene.pixels()
        start = time.perf_counter()
        self.models.base.encode(image)
        encode_s = time.perf_counter() - start
        clicks = (self.first, random_click(self.truth, "second"))
        turns = [
            (self.models.base, Prompt(clicks=clicks)),
            (self.models.adapted, Prompt(clicks=clicks, granularity=self.own)),
        ]
        for segmenter, prompt in turns:  # not counted: whatever is prepared at the first pass
            _seconds(segmenter, self.scene.encoded, prompt)
        seconds: list[list[tuple[float, float]]] = [[], []]
        for turn in range(TURNS):
            for which in (0, 1) if turn % 2 else (1, 0):
                seconds[which] += _seconds(turns[which][0], self.scene.encoded, turns[which][1])
        row: Row = {"encode_s": round(encode_s, 6)}
        for name, measured in zip(("base", "adapted"), seconds, strict=True):
            row[f"{name}_step_s"] = [round(step, 6) for step, _ in measured]
            row[f"{name}_click_s"] = [round(click, 6) for _, click in measured]
        return row

    def _paper_plain(self) -> Row:
        return self._published(self.models.base, [Prompt()])

    def _paper_sweep(self) -> Row:
        return self._published(self.models.adapted, [Prompt(granularity=level) for level in LEVELS])

    def _paper_fixed(self) -> Row:
        return {
            "by_level": {
                str(level.value): self._published(self.models.adapted, [Prompt(granularity=level)])
                for level in self.options.fixed_levels
            }
        }

    def _paper_phrase(self) -> Row:
        phrase = phrase_of(self.scene.image, self.mask)
        return {} if phrase in NAMELESS else self._published(self.models.adapted, [Prompt(phrase=phrase)])

    def _published(self, segmenter: Segmenter, steers: Sequence[Prompt]) -> Row:
        """Click one chain for each steering, and return the one that counts."""
        start, chains = time.perf_counter(), []
        encoded = segmenter.encode(self.scene.pixels())
        fewest, undecided = self.options.budget, self.mask.undecided
        for steer in steers:
            chain = ClickChain(
                segmenter=segmenter,
                encoded=encoded,
                truth=self.truth,
                granularity=steer.granularity,
                phrase=steer.phrase,
                as_ritm=True,
                decided=None if undecided is None else ~decode(undecided),
            )
            ious = chain.run(min(self.options.budget, fewest + 1), max(self.options.targets))
            fewest = min(fewest, len(ious))
            chains.append((chain, ious))
        counts = published_choice([ious for _, ious in chains])
        return {
            "ious": chains[counts][1],
            "steer": counts,
            "refusals": sum(chain.refusals for chain, _ in chains),
            "seconds": round(time.perf_counter() - start, 6),
        }

    def _offered(self, segmenter: Segmenter, proposals: int) -> tuple[Proposal, ...]:
        """What one click offers; an empty mask where the segmenter refuses."""
        memo, prompt = self._openings[id(segmenter)], Prompt(clicks=(self.first,))
        answer = answer_to(segmenter, self.scene.encoded, prompt, memo=memo, proposals=proposals)
        return (Proposal(mask=np.zeros_like(self.truth), score=0.0),) if answer is None else answer.proposals

    def _truths_under(self, click: Click) -> list[Mask]:
        """All true masks that hold the click, and the wholes of those."""
        image, row, column = self.scene.image, int(click.y), int(click.x)
        trusted = supported(image.masks, self.options.support)
        held = [mask for mask in trusted if self.scene.truth(mask)[row, column]]
        known = {mask.id: mask for mask in (self.mask, *held, *supported(map(image.whole, held), self.options.support))}
        return [self.scene.truth(mask) for mask in known.values() if self.scene.truth(mask).any()]


TURNS = 3
"""Turns of each model on one timed mask, of two clicks each; ten masks of a set make sixty pairs."""

_PROTOCOLS: dict[str, Callable[[Bench], Row]] = {
    "base": Bench._base,
    "base-oracle3": Bench._base_oracle3,
    "level": Bench._level,
    "oracle": Bench._oracle,
    "fixed": Bench._fixed,
    "levels": Bench._levels,
    "phrase": Bench._phrase,
    "curve": Bench._curve,
    "monotone": Bench._monotone,
    "time": Bench._time,
    "paper-plain": Bench._paper_plain,
    "paper-sweep": Bench._paper_sweep,
    "paper-fixed": Bench._paper_fixed,
    "paper-phrase": Bench._paper_phrase,
}
PAPER = ("paper-plain", "paper-sweep", "paper-fixed", "paper-phrase")
PROTOCOLS = tuple(name for name in _PROTOCOLS if name not in PAPER)
BASE_ONLY = ("base", "base-oracle3", "paper-plain")
"""Protocols that no adapter has a part in: their rows serve every adapter of these weights."""


def phrase_of(image: AnnotatedImage, mask: AnnotatedMask) -> str:
    """Return a mask's name as GraCo's evaluation makes a phrase of it: wheel of wheel 1, head of Quadruped Head."""
    name = _NUMBERED.sub("", mask.name).lower()
    return name.removeprefix(f"{image.whole(mask).name.lower()} ")


def published_choice(ious: Sequence[Sequence[float]]) -> int:
    """Return which level counts in GraCo's sweep: of those with the fewest clicks, the first of the best first click.

    Args:
        ious: of each level, after each click until it stopped. A level that got there at the last click of the budget
            has as many as one that never did, so there the first click alone decides, as published.

    >>> published_choice([[0.5, 0.6, 0.91], [0.3, 0.92], [0.4, 0.9]])
    2
    """
    fewest = min(map(len, ious))
    return max((n for n, of in enumerate(ious) if len(of) == fewest), key=lambda n: ious[n][0])


def supported(masks: Iterable[AnnotatedMask], support: int) -> list[AnnotatedMask]:
    """Return the masks that at least `support` annotators drew, or of which the set does not say."""
    return [mask for mask in masks if mask.support is None or mask.support >= support]


def random_click(truth: Mask, seed: str) -> Click:
    """Return a positive click at a pixel of `truth`, the same one for the same seed, whatever the platform."""
    pixels = np.flatnonzero(truth)
    if not pixels.size:
        raise ValueError("an empty mask has no pixel to click")
    digest = hashlib.sha256(seed.encode()).digest()
    chosen = np.random.default_rng(int.from_bytes(digest[:8], "big")).integers(pixels.size)
    row, column = divmod(int(pixels[chosen]), truth.shape[1])
    return Click(x=column + 0.5, y=row + 0.5, positive=True)


def _scores(proposals: Iterable[Proposal]) -> list[float]:
    return [round(proposal.score, 6) for proposal in proposals]


def _seconds(segmenter: Segmenter, encoded: Encoded, prompt: Prompt) -> list[tuple[float, float]]:
    """Return for each click of `prompt` the seconds of the decoder, and of the whole click with its mask rendered.

    A click whose state is in the memo costs its rendering only; the rest of a click's time is the decoder's.
    """
    memo: dict[MemoKey, Any] = {}
    found = []
    for n in range(1, len(prompt.clicks) + 1):
        clicked = replace(prompt, clicks=prompt.clicks[:n])
        start = time.perf_counter()
        predict(segmenter, encoded, clicked, memo=memo)
        answered = time.perf_counter()
        predict(segmenter, encoded, clicked, memo=memo)
        rendered = time.perf_counter()
        found.append((max(0.0, 2 * answered - start - rendered), answered - start))
    return found
