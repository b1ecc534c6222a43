"""A first click is refined: the middle of what it found, the cells around that, and when the decoder is asked again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from model.annotations import read_annotations
from model.evaluation.protocol import random_click
from model.geometry import Fit
from model.light import refining
from model.light.ladder import LOGITS_PER_CELL, OUTSIDE, placed
from model.light.network import LOW_RES, SIDE
from model.light.segmenter import LadderState, LightSegmenter
from model.metrics import iou
from model.segmenter import Encoded, FirstStep, Segmenter, predict
from model.types import Box, Click, Granularity, Mask, Prompt

FIT = Fit(480, 640, SIDE)
ROWS, COLUMNS = 192, 256  # of the logits that such an image fills
SCALE = 640 / COLUMNS  # pixels of the image along a side of a logit


def blank() -> Mask:
    return np.zeros((ROWS, COLUMNS), bool)


def at(column: float, row: float) -> Click:
    """Return a click on the image in the middle of a logit."""
    return Click(x=(column + 0.5) * SCALE, y=(row + 0.5) * SCALE, positive=True)


@pytest.fixture(scope="module")
def encoded(segmenter: Segmenter, scene) -> Encoded:
    return segmenter.encode(scene)


# --- the middle ---


def test_a_click_near_the_border_gets_another_in_the_middle_and_one_in_the_middle_none():
    found = blank()
    found[40:81, 60:141] = True
    middle = refining.middle(found, at(62, 42), FIT)
    assert middle is not None
    assert middle.positive
    column, row = middle.x / SCALE - 0.5, middle.y / SCALE - 0.5
    assert row == pytest.approx(60, abs=1)
    assert 79 <= column <= 121, "the middle of a bar is the line along it"
    for column, row in ((100, 60), (90, 62), (110, 55)):
        assert refining.middle(found, at(column, row), FIT) is None
    assert refining.middle(found, middle, FIT) is None, "its own middle needs none"


def test_the_middle_is_that_of_the_piece_that_was_clicked():
    found = blank()
    found[10:31, 10:31] = True
    found[100:181, 100:221] = True
    middle = refining.middle(found, at(11, 11), FIT)
    assert middle is not None
    assert (middle.x / SCALE - 0.5, middle.y / SCALE - 0.5) == pytest.approx((20, 20))
    elsewhere = refining.middle(found, at(200, 20), FIT)  # nothing was found there: the deepest of all
    assert elsewhere is not None
    assert elsewhere.y / SCALE > 100


@pytest.mark.parametrize("click", [(0.0, 0.0), (639.99, 479.99), (640.0, 480.0), (0.0, 480.0)])
def test_clicks_on_the_photos_edge_and_masks_of_one_logit_have_a_middle_inside(click):
    x, y = click
    everything = ~blank()
    middle = refining.middle(everything, Click(x=x, y=y, positive=True), FIT)
    assert middle is not None
    assert (middle.x, middle.y) == pytest.approx((320, 240), abs=90)
    one = blank()
    one[-1, -1] = True
    corner = refining.middle(one, Click(x=5, y=5, positive=True), FIT)
    assert corner is not None
    assert 0 <= corner.x <= 639.5
    assert 0 <= corner.y <= 479.5


# --- what is read again ---


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ((40, 80), (60, 140), (slice(7, 23), slice(10, 40))),  # 10 x 20 cells, half as much again
        ((100, 101), (100, 101), (slice(21, 30), slice(21, 30))),  # a speck: at least eight cells
        ((0, ROWS), (0, COLUMNS), (slice(0, 48), slice(0, 64))),  # no more than there are
        ((0, 4), (252, 256), (slice(0, 5), slice(59, 64))),
    ],
)
def test_the_cells_around_what_was_found_are_read_again(rows, columns, expected):
    found = blank()
    found[slice(*rows), slice(*columns)] = True
    within = refining.around(found)
    assert within == expected
    assert (
        found[within[0].start * 4 : within[0].stop * 4, within[1].start * 4 : within[1].stop * 4].sum() == found.sum()
    )


def test_what_was_not_read_again_lies_outside():
    part = torch.full((1, 3, 5 * LOGITS_PER_CELL, 7 * LOGITS_PER_CELL), 2.0)
    whole = placed(part, (slice(10, 15), slice(20, 27)), 48, 64)
    assert whole.shape == (1, 3, ROWS, COLUMNS)
    assert (whole[..., 40:60, 80:108] == 2).all()
    assert (whole == OUTSIDE).sum() == whole.numel() - part.numel()


# --- when the decoder is asked again ---


def test_a_click_in_the_middle_takes_two_passes_and_one_beside_it_three(ladder, encoded, asked):
    level = Granularity(10)
    middle, beside = Click(x=200, y=220, positive=True), Click(x=130, y=265, positive=True)  # of the scene's disc
    predict(ladder, encoded, Prompt(clicks=(middle,), granularity=level))
    assert [len(prompt.clicks) for prompt in asked] == [1, 1]
    assert [prompt.box is None for prompt in asked] == [True, False]
    box = asked[-1].box
    assert box is not None
    assert (box.left, box.top, box.right, box.bottom) == pytest.approx((100, 120, 300, 320), abs=8)
    asked.clear()
    predict(ladder, encoded, Prompt(clicks=(beside,), granularity=level))
    assert [(len(prompt.clicks), prompt.box is None) for prompt in asked] == [(1, True), (2, True), (1, False)]
    one, other = (
        predict(ladder, encoded, Prompt(clicks=(beside,), granularity=level), refined=refined).best.score
        for refined in (True, False)
    )
    assert one == other, "scores are those of the first pass, which are calibrated"
    added = asked[1].clicks[1]
    assert (added.x, added.y) == pytest.approx((200, 220), abs=12), "the middle of the disc"


def test_boxes_negative_first_clicks_and_later_clicks_are_answered_by_one_pass_each(ladder, encoded, asked):
    level = Granularity(5)
    memo: dict = {}
    box = Box(left=90, top=110, right=310, bottom=330)
    predict(ladder, encoded, Prompt(box=box, granularity=level))
    assert len(asked) == 1
    asked.clear()
    clicks = (Click(x=490, y=200, positive=False), Click(x=200, y=220, positive=True))
    predict(ladder, encoded, Prompt(clicks=clicks, granularity=level))
    assert len(asked) == 2
    first = Click(x=200, y=220, positive=True)
    predict(ladder, encoded, Prompt(clicks=(first,), granularity=level), memo=memo)
    asked.clear()
    predict(ladder, encoded, Prompt(clicks=(first, clicks[0]), granularity=level), memo=memo)
    assert len(asked) == 1


def test_without_level_and_phrase_nothing_is_refined_and_the_answer_stays_the_bases(segmenter, ladder, encoded, asked):
    for x, y in ((200, 220), (130, 265), (490, 300)):
        prompt = Prompt(clicks=(Click(x=x, y=y, positive=True),))
        one, other = predict(ladder, encoded, prompt), predict(segmenter, encoded, prompt)
        np.testing.assert_array_equal(one.best.mask, other.best.mask)
        level = Prompt(clicks=prompt.clicks, granularity=Granularity(2))
        np.testing.assert_array_equal(
            predict(segmenter, encoded, level).best.mask, predict(segmenter, encoded, level, refined=False).best.mask
        )
    assert not asked


def test_unrefined_is_the_first_pass_for_all_levels(ladder, encoded, asked):
    memo: dict = {}
    clicks = (Click(x=130, y=265, positive=True),)
    for level in range(1, 11):
        predict(ladder, encoded, Prompt(clicks=clicks, granularity=Granularity(level)), memo=memo, refined=False)
    assert len(asked) == 1
    assert [type(key) for key in memo] == [FirstStep]
    predict(ladder, encoded, Prompt(clicks=clicks, granularity=Granularity(10)), memo=memo)
    assert len(asked) == 3, "the first pass is not repeated"
    predict(ladder, encoded, Prompt(clicks=clicks, granularity=Granularity(10)), memo=memo)
    assert len(asked) == 3, "and what was refined is kept"


@pytest.mark.parametrize("lost", [True, False])
def test_where_refining_loses_the_click_the_first_answer_stands(ladder, encoded, monkeypatch, lost):
    prompt = Prompt(clicks=(Click(x=200, y=220, positive=True),), granularity=Granularity(3))
    first = ladder.step(encoded, prompt, None)
    original = LightSegmenter._pass

    def emptied(*given, **chosen):
        state = original(*given, **chosen)
        return LadderState(np.minimum(state.logits, -1), state.scores, state.look) if lost else state

    monkeypatch.setattr(LightSegmenter, "_pass", emptied)
    assert (ladder.refine(encoded, prompt, first) is first) == lost


def test_the_previous_mask_of_a_second_click_is_the_refined_one(ladder, encoded, monkeypatch):
    first, level = Click(x=130, y=265, positive=True), Granularity(10)
    memo: dict = {}
    predict(ladder, encoded, Prompt(clicks=(first,), granularity=level), memo=memo)
    refined = memo[Prompt(clicks=(first,), granularity=level)].logits[9].astype(np.float32)
    previous, original = [], LightSegmenter._pass
    monkeypatch.setattr(LightSegmenter, "_pass", lambda *a, **k: previous.append(a[5]) or original(*a, **k))
    clicks = (first, Click(x=490, y=200, positive=False))
    predict(ladder, encoded, Prompt(clicks=clicks, granularity=level), memo=memo)
    np.testing.assert_array_equal(previous[0], refined)


@pytest.mark.parametrize("place", [(-5000.0, 220.0), (200.0, -300.0), (9000.0, 9000.0)])
def test_a_click_outside_the_photo_is_as_one_at_its_edge(ladder, encoded, place):
    assert refining.logit_at(Click(x=place[0], y=place[1], positive=True), FIT) in {(88, 0), (0, 80), (191, 255)}
    x, y = place
    predict(ladder, encoded, Prompt(clicks=(Click(x=x, y=y, positive=True),), granularity=Granularity(5)))


def test_a_mask_without_a_pixel_stays_as_it_is(ladder, encoded, asked):
    prompt = Prompt(clicks=(Click(x=200, y=220, positive=True),), granularity=Granularity(3))
    nothing = LadderState(
        np.full((10, LOW_RES, LOW_RES), -5, np.float16), (0.5,) * 10, ladder.step(encoded, prompt, None).look
    )
    asked.clear()
    assert ladder.refine(encoded, prompt, nothing) is nothing
    assert not asked


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (7, 1600), (20, 20)])
def test_photos_of_any_shape_are_refined(ladder, size, asked):
    height, width = size
    encoded = ladder.encode(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
    for (x, y), level in itertools.product(((width / 2, height / 2), (0, 0), (width, height)), (1, 10)):
        prompt = Prompt(clicks=(Click(x=x, y=y, positive=True),), granularity=Granularity(level))
        best = predict(ladder, encoded, prompt).best
        assert best.mask.shape == (height, width)
        assert 0 <= best.score <= 1
    assert any(prompt.box is not None for prompt in asked), "something was found, and a box asked with"


@pytest.mark.parametrize(("name", "level", "gain"), [("car-parts", "part", 0.01), ("coco-mval", "object", 0.0)])
def test_refining_finds_more_of_what_is_meant_at_a_click_anywhere_in_it(shared, ladder, name, level, gain):
    images = read_annotations(shared / "data" / name, split="val").images
    before, after = [], []
    for image in images[:: max(1, len(images) // 24)]:
        encoded = ladder.encode(image.pixels())
        for mask in [mask for mask in image.masks if mask.level == level][:2]:
            truth = mask.mask()
            click = random_click(truth, f"{image.path.name}/{mask.id}")
            prompt = Prompt(clicks=(click,), granularity=image.level_of(mask) if level == "part" else Granularity(10))
            before.append(iou(predict(ladder, encoded, prompt, refined=False).best.mask, truth))
            after.append(iou(predict(ladder, encoded, prompt).best.mask, truth))
    assert len(after) >= 30
    assert np.mean(after) > np.mean(before) + gain, (np.mean(before), np.mean(after))
