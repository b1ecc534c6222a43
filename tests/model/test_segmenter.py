"""What a prompt gets: replay, levels, boxes, several proposals, refusals."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from model.light.segmenter import LightSegmenter
from model.metrics import iou
from model.segmenter import Encoded, predict, version_of
from model.types import Box, Click, Granularity, Prompt, Refusal
from tests.conftest import WEIGHTS


@pytest.fixture(scope="module")
def encoded(segmenter, scene) -> Encoded:
    return segmenter.encode(scene)


def on_disc(*more: Click) -> Prompt:
    return Prompt(clicks=(Click(x=200, y=220, positive=True), *more))


def disc() -> np.ndarray:
    y, x = np.mgrid[:480, :640]
    return (x + 0.5 - 200) ** 2 + (y + 0.5 - 220) ** 2 <= 100**2


def test_one_click_finds_the_thing_under_it(segmenter, encoded):
    best = predict(segmenter, encoded, on_disc()).best
    assert best.mask.dtype == bool
    assert best.mask.shape == (480, 640)
    assert iou(best.mask, disc()) > 0.9
    assert 0.5 < best.score <= 1


def test_a_box_finds_the_thing_inside_it(segmenter, encoded):
    box = Prompt(box=Box(left=90, top=110, right=310, bottom=330))
    assert iou(predict(segmenter, encoded, box).best.mask, disc()) > 0.9


def test_a_box_that_reaches_over_the_edge_is_clipped_and_one_outside_is_refused(segmenter, encoded):
    predict(segmenter, encoded, Prompt(box=Box(left=-50, top=-50, right=310, bottom=330)))
    with pytest.raises(Refusal, match="outside the image"):
        predict(segmenter, encoded, Prompt(box=Box(left=700, top=10, right=800, bottom=20)))


def test_clicks_after_a_box_refine_it(segmenter, encoded):
    both = Prompt(box=Box(left=90, top=90, right=570, bottom=410), clicks=(Click(x=490, y=200, positive=False),))
    mask = predict(segmenter, encoded, both).best.mask
    assert not mask[200, 490]


def test_a_negative_click_leaves_its_spot_out(segmenter, encoded):
    whole = predict(segmenter, encoded, on_disc(Click(x=490, y=200, positive=True))).best.mask
    assert whole[200, 490]
    less = on_disc(Click(x=490, y=200, positive=True), Click(x=490, y=330, positive=False))
    assert not predict(segmenter, encoded, less).best.mask[330, 490]


def test_a_warm_memo_gives_the_answer_of_a_cold_one(segmenter, encoded):
    clicks = (
        Click(x=200, y=220, positive=True),
        Click(x=490, y=200, positive=False),
        Click(x=150, y=200, positive=True),
    )
    memo: dict = {}
    for n in range(1, 4):
        for level in (None, Granularity(2), Granularity(9)):
            prompt = Prompt(clicks=clicks[:n], granularity=level)
            warm = predict(segmenter, encoded, prompt, memo=memo).best
            cold = predict(segmenter, encoded, prompt).best
            np.testing.assert_array_equal(warm.mask, cold.mask)
            assert warm.score == cold.score


def test_a_memo_makes_the_next_click_one_step(segmenter, encoded, monkeypatch):
    steps = []
    original = LightSegmenter.step
    monkeypatch.setattr(LightSegmenter, "step", lambda *a: steps.append(1) or original(*a))
    memo: dict = {}
    clicks = tuple(Click(x=150 + 20 * i, y=220, positive=True) for i in range(4))
    for n in range(1, 5):
        predict(segmenter, encoded, Prompt(clicks=clicks[:n]), memo=memo)
    assert len(steps) == 4
    predict(segmenter, encoded, Prompt(clicks=clicks[:1], granularity=Granularity(1)), memo=memo)
    assert len(steps) == 4, "after one click another level needs no decoder pass"


def test_a_higher_level_never_gives_a_smaller_mask_after_one_click(segmenter, encoded):
    for x, y in ((200, 220), (490, 300), (540, 250), (20, 20), (320, 470)):
        prompts = [
            Prompt(clicks=(Click(x=x, y=y, positive=True),), granularity=Granularity(level)) for level in range(1, 11)
        ]
        areas = [predict(segmenter, encoded, p).best.mask.sum() for p in prompts]
        # ranked at the decoder's resolution; at the image's a border pixel may fall either way
        assert all(b >= a * 0.99 for a, b in itertools.pairwise(areas)), areas
        assert areas[-1] > areas[0]


def test_without_a_level_one_click_can_offer_three_masks_best_first(segmenter, encoded):
    proposals = predict(segmenter, encoded, on_disc(), proposals=3).proposals
    assert len(proposals) == 3
    assert [p.score for p in proposals] == sorted((p.score for p in proposals), reverse=True)
    by_area = sorted(proposals, key=lambda p: p.mask.sum())
    assert [p.granularity.level for p in by_area] == [2, 5, 10]


def test_a_chosen_level_is_answered_with_one_mask_that_says_it(segmenter, encoded):
    prompt = Prompt(clicks=on_disc().clicks, granularity=Granularity(4))
    prediction = predict(segmenter, encoded, prompt, proposals=3)
    assert [p.granularity for p in prediction.proposals] == [Granularity(4)]


def test_a_prompt_that_names_nothing_is_refused(segmenter, encoded):
    with pytest.raises(Refusal, match="give a click or a box"):
        predict(segmenter, encoded, Prompt())
    with pytest.raises(Refusal, match="click the object first"):
        predict(segmenter, encoded, Prompt(clicks=(Click(x=1, y=1, positive=False),)))


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (1025, 7), (480, 640)])
def test_images_of_any_shape_are_answered_at_their_own_size(segmenter, size):
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    click = Prompt(clicks=(Click(x=size[1] / 2, y=size[0] / 2, positive=True),))
    assert predict(segmenter, segmenter.encode(image), click).best.mask.shape == size


def test_threads_asking_at_once_get_the_answers_they_get_alone(segmenter, scene):
    images = [segmenter.encode(np.roll(scene, shift, axis=1)) for shift in (0, 100)]
    asked = [(i, Prompt(clicks=(Click(x=60 + 50 * k, y=230, positive=True),))) for k in range(6) for i in (0, 1)]
    alone = [predict(segmenter, images[i], prompt).best.mask for i, prompt in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda a: predict(segmenter, images[a[0]], a[1]).best.mask, asked))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_version_is_known_before_the_model_is_loaded(segmenter):
    assert version_of("light", WEIGHTS) == segmenter.version
