"""Later clicks hold: what is shown has the sign that each click says, and is otherwise what the network answered."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from model.evaluation.protocol import random_click
from model.geometry import Focus
from model.light.focus import Look, pasted
from model.light.obeying import obeyed
from model.light.segmenter import LadderState, LightSegmenter
from model.segmenter import Segmenter, predict
from model.types import Click, Granularity, Mask, Prompt, RGBImage

SIZES = [(480, 640), (2000, 3000), (300, 200), (100, 1500), (60, 90), (1024, 1024)]


def whole(height: int, width: int) -> Look:
    return Look(Focus(0, height - 1, 0, width - 1))


def part(height: int, width: int) -> Look:
    """Return a look at a focus in an image."""
    top, left = height // 4, width // 5
    return Look(Focus(top, top + height // 2, left, left + width // 2), torch.zeros(0))


def hilly(rng: np.random.Generator) -> np.ndarray:
    """Return logits whose hills are 1 to 12 logits wide and 1 to 15 high."""
    noise = cv2.GaussianBlur(rng.normal(size=(256, 256)).astype(np.float32), (0, 0), rng.uniform(1, 12))
    return noise / noise.std() * rng.uniform(1, 15)


def scattered(look: Look, rng: np.random.Generator) -> list[Click]:
    """Return up to twenty clicks in a look, opposite ones at least eight logits and two pixels apart."""
    clicks: list[Click] = []
    for _ in range(20):
        x = rng.uniform(look.focus.left, look.focus.right + 1)
        y = rng.uniform(look.focus.top, look.focus.bottom + 1)
        positive = bool(rng.integers(2))
        apart = [np.hypot(c.x - x, c.y - y) for c in clicks if c.positive != positive]
        if all(distance > 2 and distance * look.fit.scale / 4 > 8 for distance in apart):
            clicks.append(Click(x=x, y=y, positive=positive))
    return clicks


def against(clicks: list[Click], mask: Mask) -> list[Click]:
    """Return the clicks that a mask goes against."""
    rows, columns = mask.shape
    return [c for c in clicks if mask[min(int(c.y), rows - 1), min(int(c.x), columns - 1)] != c.positive]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("look_at", [whole, part])
@pytest.mark.parametrize("seed", range(5))
def test_every_click_holds_whatever_was_answered(size, look_at, seed):
    rng = np.random.default_rng([seed, *size])
    look, logits = look_at(*size), hilly(rng)
    clicks = scattered(look, rng)
    assert against(clicks, pasted(logits, look, *size) > 0), "else there is nothing to see"
    assert not against(clicks, pasted(obeyed(logits, clicks, look), look, *size) > 0)


def test_where_no_click_is_against_it_an_answer_stays_as_it_is():
    logits = np.full((256, 256), -0.1, np.float32)
    logits[:, 128:] = 0.1
    clicks = [Click(x=100, y=50, positive=False), Click(x=500, y=50, positive=True)]
    assert obeyed(logits, clicks, whole(640, 640)) is logits


def test_it_is_bent_around_the_click_alone():
    logits = np.full((256, 256), 8, np.float32)
    bent = obeyed(logits, [Click(x=320, y=320, positive=False)], whole(640, 640))
    out = bent <= 0
    assert out[128, 128]
    assert 1 <= np.count_nonzero(out) < 60, "a dent, not a hole of the kernel's size"
    rows, columns = np.nonzero(np.abs(bent - logits) > 0.01)
    assert max(np.hypot(rows - 127.5, columns - 127.5)) < 25


def disc() -> np.ndarray:
    """Return logits that find a disc of 40 logits around the middle, 8 inside and -8 outside."""
    y, x = np.mgrid[:256, :256]
    return np.where(np.hypot(y - 127.5, x - 127.5) < 40, 8, -8).astype(np.float32)


@pytest.mark.parametrize(("apart", "taken"), [(0.5, 30), (1, 30), (2, 30), (4, 30), (8, 40)])
def test_opposite_clicks_side_by_side_bend_nothing_far_away(apart, taken):
    clicks = [Click(x=320, y=320, positive=True), Click(x=320 + 2.5 * apart, y=320, positive=False)]
    logits, look = disc(), whole(640, 640)
    bent = obeyed(logits, clicks, look)
    assert np.count_nonzero((bent > 0) != (logits > 0)) <= taken
    rows, columns = np.nonzero(np.abs(bent - logits) > 0.5)
    assert max(np.hypot(rows - 127.5, columns - 127.5), default=0) < 12 + apart
    assert np.abs(bent - logits).max() < 20
    if apart >= 4:
        assert not against(clicks, pasted(bent, look, 640, 640) > 0)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_positive_clicks_only_add_and_negative_ones_only_take(positive, seed):
    rng = np.random.default_rng(seed)
    logits, look = hilly(rng), whole(480, 640)
    clicks = [Click(x=c.x, y=c.y, positive=positive) for c in scattered(look, rng)]
    clicks += [replace(c, x=min(c.x + 9, 639)) for c in clicks[:5]]
    bent = obeyed(logits, clicks, look)
    assert bent is not logits, "else there is nothing to see"
    assert not ((bent < logits) if positive else (bent > logits)).any()


def test_opposite_clicks_on_one_place_and_the_same_click_again_are_no_fault():
    logits = np.full((256, 256), -4, np.float32)
    yes, no = Click(x=320, y=320, positive=True), Click(x=320, y=320, positive=False)
    for clicks in ([yes, no], [yes, yes], [no, yes, no, yes]):
        assert np.isfinite(obeyed(logits, clicks, whole(640, 640))).all()
    assert np.abs(obeyed(logits, [yes, no], whole(640, 640))).max() < 10
    assert not against([yes, yes], pasted(obeyed(logits, [yes, yes], whole(640, 640)), whole(640, 640), 640, 640) > 0)


def test_clicks_outside_the_focus_are_left_alone():
    look = part(480, 640)
    logits = np.full((256, 256), 5, np.float32)
    assert obeyed(logits, [Click(x=1, y=1, positive=False)], look) is logits
    assert obeyed(logits, [], look) is logits


@pytest.mark.parametrize("place", [(0.0, 0.0), (640.0, 480.0), (639.9, 0.2), (0.0, 480.0)])
def test_clicks_on_the_photos_edge_hold(place):
    logits = np.full((256, 256), -6, np.float32)
    click = Click(x=place[0], y=place[1], positive=True)
    assert not against([click], pasted(obeyed(logits, [click], whole(480, 640)), whole(480, 640), 480, 640) > 0)


# --- in the segmenter ---


def stubborn(scene: RGBImage, count: int, seed: int) -> tuple[Click, ...]:
    """Return clicks here and there in a photo, the first of them positive: nothing real could obey them all."""
    rng = np.random.default_rng(seed)
    everywhere = np.ones(scene.shape[:2], bool)
    places = [random_click(everywhere, f"{seed} {n}") for n in range(count)]
    return tuple(replace(click, positive=n == 0 or bool(rng.integers(2))) for n, click in enumerate(places))


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_clicked_the_mask_obeys(ladder: Segmenter, scene: RGBImage, seed):
    encoded, memo = ladder.encode(scene), {}
    clicks = stubborn(scene, 8, seed)
    bent = 0
    for count in range(2, len(clicks) + 1):
        prompt = Prompt(clicks=clicks[:count], granularity=Granularity(5))
        mask = predict(ladder, encoded, prompt, memo=memo).best.mask
        assert not against(list(prompt.clicks), mask)
        state = memo[prompt]
        assert isinstance(state, LadderState)
        bent += obeyed(state.answer(prompt)[0], prompt.clicks, state.look) is not state.answer(prompt)[0]
    assert bent, "else there is nothing to see"


def test_without_a_level_the_base_answers_as_published(segmenter: Segmenter, ladder: Segmenter, scene: RGBImage):
    prompt = Prompt(clicks=stubborn(scene, 6, 0))
    encoded = segmenter.encode(scene)
    plain, adapted = (predict(one, encoded, prompt) for one in (segmenter, ladder))
    np.testing.assert_array_equal(plain.best.mask, adapted.best.mask)
    assert against(list(prompt.clicks), plain.best.mask), "it weighs clicks, and nobody bends that"


def test_a_first_click_is_answered_as_the_network_answers(ladder: Segmenter, scene: RGBImage, monkeypatch):
    def refuse(*_):
        raise AssertionError("a first click is not bent")

    monkeypatch.setattr("model.light.obeying.obeyed", refuse)
    encoded = ladder.encode(scene)
    for click in stubborn(scene, 3, 1):
        predict(ladder, encoded, Prompt(clicks=(replace(click, positive=True),), granularity=Granularity(3)))


def test_the_probability_of_a_mask_is_of_the_mask_that_is_shown(ladder: LightSegmenter, scene: RGBImage):
    encoded, memo = ladder.encode(scene), {}
    prompt = Prompt(clicks=stubborn(scene, 8, 0), granularity=Granularity(5))
    mask = predict(ladder, encoded, prompt, memo=memo).best.mask
    np.testing.assert_array_equal(ladder.probability(encoded, prompt, memo[prompt]) > 0.5, mask)
