"""A share of the whole is answered by the mask that has it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model.annotations import read_annotations
from model.evaluation.protocol import random_click
from model.light.ladder import at_place
from model.light.segmenter import LightSegmenter
from model.metrics import iou
from model.segmenter import Encoded, FirstStep, Segmenter, predict, probability
from model.types import LEVELS, Box, Click, Granularity, Prompt

FIRST = Click(x=320, y=240, positive=True)


@pytest.fixture(scope="module")
def encoded(segmenter: Segmenter, scene) -> Encoded:
    return segmenter.encode(scene)


def at(value: float, *more: Click) -> Prompt:
    return Prompt(clicks=(FIRST, *more), granularity=Granularity.from_share(value))


def area(ladder: Segmenter, encoded: Encoded, prompt: Prompt, **options) -> int:
    return int(np.count_nonzero(predict(ladder, encoded, prompt, **options).best.mask))


def test_the_first_pass_serves_shares_and_levels_alike_and_its_masks_grow_with_the_share(ladder, encoded, asked):
    memo: dict = {}
    shares = [0.02, *(n / 20 for n in range(1, 20))]  # all stops of the slider
    areas = [area(ladder, encoded, at(share), refined=False, memo=memo) for share in shares]
    assert len(asked) == 1
    assert isinstance(next(iter(memo)), FirstStep)
    assert areas == sorted(areas)
    assert len(set(areas)) > 3


def test_what_is_shown_says_the_share_and_its_score_lies_between_those_of_the_levels(ladder, encoded):
    best = predict(ladder, encoded, at(0.25)).best
    assert best.granularity == Granularity(2, 0.25)
    state = ladder.step(encoded, at(0.25), None)
    place = state.place_for(at(0.25))
    beside = state.scores[int(place)], state.scores[int(place) + 1]
    first = predict(ladder, encoded, at(0.25), refined=False).best
    assert min(beside) <= first.score <= max(beside)
    sure = probability(ladder, encoded, at(0.25))
    assert np.array_equal(sure > 0.5, best.mask)


def test_later_clicks_are_answered_where_the_first_one_was(ladder, encoded):
    further = Click(x=250, y=200, positive=True), Click(x=420, y=330, positive=False)
    for prompt in (at(0.25), at(0.25, *further[:1]), at(0.25, *further)):
        memo: dict = {}
        once = predict(ladder, encoded, prompt, memo=memo).best.mask
        state = memo[prompt]
        places = {one.place for key, one in memo.items() if not isinstance(key, FirstStep)}
        assert places == {state.place}
        assert 0.5 <= state.place <= 2.5, "a quarter stands between levels 2 and 3, at 1.5"
        assert np.array_equal(once, predict(ladder, encoded, prompt).best.mask)


def test_a_box_and_a_click_after_it_have_shares_too(ladder, encoded):
    box = Box(left=180, top=120, right=500, bottom=400)
    asked = Prompt(box=box, granularity=Granularity.from_share(0.45))
    first = predict(ladder, encoded, asked).best
    assert first.granularity == Granularity(4, 0.45)
    assert first.mask.any()
    memo: dict = {}
    clicked = Prompt(box=box, clicks=(FIRST,), granularity=asked.granularity)
    assert predict(ladder, encoded, clicked, memo=memo).best.mask.any()
    (opened,) = (state for key, state in memo.items() if isinstance(key, FirstStep))
    assert memo[clicked].place == opened.place_for(asked)


def test_a_share_beside_a_phrase_is_the_level_that_counts(ladder, encoded):
    asked = Prompt(clicks=(FIRST,), granularity=Granularity.from_share(0.25), phrase="shirt")
    assert ladder.understood(asked).phrase == "shirt"
    memo: dict = {}
    best = predict(ladder, encoded, asked, memo=memo).best
    assert best.granularity == asked.granularity
    state = memo[asked]
    assert np.array_equal(state.answer(asked)[0], at_place(state.logits, state.place))
    alone = Prompt(clicks=(FIRST,), phrase="shirt")
    assert predict(ladder, encoded, alone, memo=memo).best.granularity is None
    assert np.array_equal(memo[alone].answer(alone)[0], memo[alone].logits[LEVELS].astype(np.float32))
    assert not np.array_equal(best.mask, predict(ladder, encoded, alone).best.mask)


def test_a_place_is_looked_for_once_a_positive_click_says_what_is_meant(ladder, encoded):
    out = Click(x=600, y=20, positive=False)
    asked = Prompt(clicks=(out, FIRST), granularity=Granularity.from_share(0.25))
    memo: dict = {}
    assert predict(ladder, encoded, asked, memo=memo).best.mask.any()
    assert memo[asked].place is None
    more = replace(asked, clicks=(*asked.clicks, Click(x=250, y=200, positive=True)))
    predict(ladder, encoded, more, memo=memo)
    assert memo[more].place == memo[asked].place_for(asked)


def test_where_refining_falls_back_the_place_is_that_of_the_first_pass(ladder, encoded, monkeypatch):
    plain = LightSegmenter._pass

    def lost(self, adapter, encoded, prompt, *args, **more):
        state = plain(self, adapter, encoded, prompt, *args, **more)
        return state if prompt.box is None else replace(state, logits=np.full_like(state.logits, -1))

    monkeypatch.setattr(LightSegmenter, "_pass", lost)
    first = predict(ladder, encoded, at(0.25), refined=False).best
    assert first.mask.any()
    assert np.array_equal(predict(ladder, encoded, at(0.25)).best.mask, first.mask)


@pytest.mark.parametrize(("place", "by_base"), [(9.0, True), (8.75, False)])
def test_the_base_has_a_say_in_later_clicks_where_the_share_is_the_last_levels(
    ladder, encoded, monkeypatch, place, by_base
):
    asked = []
    plain = LightSegmenter._pass

    def watched(self, *args, with_base=False, **more):
        asked.append(with_base)
        return plain(self, *args, with_base=with_base, **more)

    monkeypatch.setattr(LightSegmenter, "_pass", watched)
    monkeypatch.setattr("model.light.segmenter.place_of", lambda *_, **__: place)
    more = Click(x=250, y=200, positive=True), Click(x=400, y=300, positive=True)
    predict(ladder, encoded, at(0.97, *more))
    assert asked[-1] == by_base
    assert not any(asked[:-1])


def test_without_an_adapter_a_share_is_its_nearest_level(segmenter, encoded):
    for value in (0.04, 0.25, 0.52, 0.97):
        nearest = Prompt(clicks=(FIRST,), granularity=Granularity.from_value(value))
        answers = [predict(segmenter, encoded, prompt).best.mask for prompt in (at(value), nearest)]
        assert np.array_equal(*answers)


@pytest.mark.parametrize("name", ["car-parts", "ccp-person-clothing"])
def test_a_parts_share_of_its_whole_finds_more_of_it_than_the_nearest_level(shared, ladder, name):
    images = read_annotations(shared / "data" / name, split="val").images
    nearest, share = [], []
    for image in images[:: max(1, len(images) // 24)]:
        encoded = ladder.encode(image.pixels())
        for mask in [mask for mask in image.masks if mask.level == "part"][:3]:
            truth = mask.mask()
            click = random_click(truth, f"{image.path.name}/{mask.id}")
            for found, level in ((nearest, image.level_of(mask)), (share, image.granularity_of(mask))):
                found.append(iou(predict(ladder, encoded, Prompt(clicks=(click,), granularity=level)).best.mask, truth))
    assert len(share) >= 40
    assert np.mean(share) > np.mean(nearest) + 0.01, (np.mean(nearest), np.mean(share))
