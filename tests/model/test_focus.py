"""Where the light family looks again, and what the later clicks on a small thing get from it."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from model.annotations import AnnotatedImage, AnnotatedMask, read_annotations
from model.evaluation.protocol import ClickChain
from model.geometry import Fit, FloatMap, Focus
from model.light import focus
from model.light import segmenter as light
from model.light.encoder import TorchEncoder
from model.light.focus import Look, filled, kept, moved, next_focus, pasted, seen_in
from model.light.ladder import OUTSIDE
from model.light.network import LOW_RES, SIDE
from model.light.segmenter import LadderState, LightState
from model.metrics import iou
from model.segmenter import Encoded, FirstStep, Segmenter, foresee, predict
from model.types import Box, Click, Granularity, Mask, Prediction, Prompt, RGBImage
from tests.conftest import lawn

HEIGHT, WIDTH = 1000, 1500
WHOLE = Focus(0, HEIGHT - 1, 0, WIDTH - 1)
EVERYTHING = np.full((LOW_RES, LOW_RES), 5, np.float32)
NOTHING = -EVERYTHING


def look_at(seen: Focus) -> Look:
    return Look(seen, torch.zeros(0))


def places_of(look: Look) -> tuple[FloatMap, FloatMap]:
    """Return y and x, in pixels of the image, of the middles of the logits in a look's square."""
    middles = np.stack(np.meshgrid(*2 * [(np.arange(LOW_RES) + 0.5) * SIDE / LOW_RES]), axis=-1)
    x, y = np.moveaxis(look.fit.from_square(middles), -1, 0)
    return y + look.focus.top, x + look.focus.left


def box_in(look: Look, top: float, bottom: float, left: float, right: float) -> FloatMap:
    """Return logits of a look's square that find a box of the image, to half a logit."""
    y, x = places_of(look)
    inside = (y >= top) & (y <= bottom) & (x >= left) & (x <= right)
    return np.where(inside, EVERYTHING, NOTHING)


def ellipse_in(look: Look, middle: tuple[float, float], radii: tuple[float, float]) -> FloatMap:
    """Return logits of a look's square that fall evenly from the middle of an ellipse outwards."""
    y, x = places_of(look)
    far = np.hypot((y - middle[0]) / radii[0], (x - middle[1]) / radii[1])
    return np.asarray(10 * (1 - far), np.float32).clip(-20, 20)


# --- the photo that is kept ---


def test_a_focus_on_all_of_a_photo_shows_what_the_first_look_saw(scene):
    height, width = scene.shape[:2]
    seen = seen_in(kept(scene), Focus(0, height - 1, 0, width - 1), height, width)
    expected = Fit(height, width, SIDE).resize(scene)
    assert seen.dtype == np.uint8
    assert seen.shape == expected.shape
    difference = np.abs(seen.astype(int) - expected)
    assert difference.mean() < 1.5
    assert np.quantile(difference, 0.999) < 12


def test_a_focus_shows_its_part_of_a_photo_and_no_other(scene):
    part = Focus(230, 269, 505, 575)  # the handle of the door
    seen = seen_in(kept(scene), part, *scene.shape[:2])
    cut = scene[part.top : part.bottom + 1, part.left : part.right + 1]
    expected = Fit(*part.shape, SIDE).resize(cut)
    assert seen.shape == expected.shape
    # one pixel is 14 of the square: a shift of a fourth of one would show
    assert np.abs(seen.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("size", [(2400, 4000), (4000, 2400)])
def test_a_focus_in_a_photo_larger_than_what_is_kept_shows_the_right_place(size):
    top, left = size[0] - 300, size[1] - 500
    image = np.full((*size, 3), (20, 60, 90), np.uint8)
    image[top : top + 60, left : left + 120] = 250, 200, 30
    photo = kept(image)
    assert max(Image.open(io.BytesIO(photo.numpy().tobytes())).size) == 2048
    part = Focus(top - 90, top + 149, left - 70, left + 249)
    found = seen_in(photo, part, *size)[..., 0] > 135
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    pixel = SIDE / 320
    assert (rows[0], rows[-1] + 1) == pytest.approx((90 * pixel, 150 * pixel), abs=1.2 * pixel)
    assert (columns[0], columns[-1] + 1) == pytest.approx((70 * pixel, 190 * pixel), abs=1.2 * pixel)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (5000, 7), (2049, 2731)])
def test_photos_of_any_shape_are_kept_and_shown_up_to_their_last_pixel(size):
    height, width = size
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    photo = kept(image)
    last = Focus(max(0, height - 64), height - 1, max(0, width - 64), width - 1)
    for part in (Focus(0, height - 1, 0, width - 1), last, Focus(height - 1, height - 1, width - 1, width - 1)):
        assert seen_in(photo, part, height, width).shape == (*Fit(*part.shape, SIDE).resized, 3)


# --- where to look next ---


def test_where_nothing_was_found_the_look_stays():
    for seen in (WHOLE, Focus(300, 500, 300, 500)):
        assert next_focus(NOTHING, look_at(seen), [(400, 400)], WHOLE) == seen


def test_where_nothing_was_found_a_click_elsewhere_is_still_looked_at():
    assert next_focus(NOTHING, look_at(Focus(300, 500, 300, 500)), [(400, 400), (1200, 900)], WHOLE).covers(1200, 900)


@pytest.mark.parametrize("extent", [(250, 750, 450, 950), (0, 1000, 700, 720), (400, 420, 10, 1400)])
def test_a_large_thing_is_looked_at_in_all_of_the_photo(extent):
    assert next_focus(box_in(look_at(WHOLE), *extent), look_at(WHOLE), [], WHOLE) == WHOLE


def test_a_small_thing_is_looked_at_with_as_much_again_around_it():
    thing = 400, 520, 700, 900
    wanted = next_focus(box_in(look_at(WHOLE), *thing), look_at(WHOLE), [(800, 460)], WHOLE)
    logit = 2 * WIDTH / LOW_RES
    assert wanted.shape == pytest.approx((400, 400), abs=2 * logit)
    assert ((wanted.top + wanted.bottom) / 2, (wanted.left + wanted.right) / 2) == pytest.approx((460, 800), abs=logit)


def test_a_tiny_thing_is_not_looked_at_closer_than_64_pixels():
    found = box_in(look_at(WHOLE), 500, 512, 700, 712)
    assert next_focus(found, look_at(WHOLE), [], WHOLE).shape == pytest.approx((64, 64), abs=1)


def test_a_photo_that_is_small_itself_is_looked_at_whole():
    small = Focus(0, 79, 0, 99)
    assert next_focus(box_in(look_at(small), 30, 40, 30, 40), look_at(small), [(35, 35)], small) == small


def test_all_positive_clicks_and_the_corners_of_a_box_count_as_the_thing():
    found = box_in(look_at(WHOLE), 400, 440, 700, 740)
    alone = next_focus(found, look_at(WHOLE), [], WHOLE)
    for place in ((600, 420), (720, 550.5), (820, 300)):
        assert not alone.covers(*place)
        wanted = next_focus(found, look_at(WHOLE), [place], WHOLE)
        assert wanted.covers(*place)
        assert wanted.covers(700, 400)
        assert wanted.covers(740, 440)


@pytest.mark.parametrize("corner", [(0, 0), (WIDTH, 0), (0, HEIGHT), (WIDTH, HEIGHT), (WIDTH + 40, -40)])
def test_a_thing_and_clicks_at_the_photos_border_get_a_focus_inside_it(corner):
    x, y = min(corner[0], WIDTH), max(corner[1], 0)
    found = box_in(look_at(WHOLE), y - 60, y + 60, x - 80, x + 80)
    for places in ([corner], [(abs(x - 70), abs(y - 50)), corner], []):
        wanted = next_focus(found, look_at(WHOLE), places, WHOLE)
        assert wanted != WHOLE
        assert 0 <= wanted.top < wanted.bottom < HEIGHT
        assert 0 <= wanted.left < wanted.right < WIDTH
        assert wanted.covers(x, y)
        assert max(wanted.shape) <= 170


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (5000, 7), (64, 64)])
def test_photos_of_any_shape_have_a_focus_inside_them(size):
    whole = Focus(0, size[0] - 1, 0, size[1] - 1)
    middle = size[1] / 2, size[0] / 2
    for found in (EVERYTHING, NOTHING, box_in(look_at(whole), 0, 40, 0, 40)):
        wanted = next_focus(found, look_at(whole), [middle], whole)
        assert 0 <= wanted.top <= wanted.bottom <= whole.bottom
        assert 0 <= wanted.left <= wanted.right <= whole.right


def test_the_look_stays_as_long_as_all_that_counts_lies_in_it():
    seen = look_at(Focus(300, 499, 600, 799))
    for extent, places in (
        ((380, 400, 680, 700), [(690, 390)]),
        ((310, 490, 610, 790), [(600, 300), (800, 500)]),
    ):
        assert next_focus(box_in(seen, *extent), seen, places, WHOLE) == seen.focus


@pytest.mark.parametrize("extent", [(300, 400, 650, 700), (400, 500, 650, 700), (380, 420, 600, 700)])
def test_what_the_focus_cuts_off_is_looked_at_with_what_lies_beyond(extent):
    seen = look_at(Focus(300, 499, 600, 799))
    wanted = next_focus(box_in(seen, *extent), seen, [(660, 390)], WHOLE)
    top, bottom, left, right = extent
    assert wanted != WHOLE
    assert wanted.covers(left - 10, top - 10)
    assert wanted.covers(right + 10, bottom + 10)


@pytest.mark.parametrize("seen", [Focus(0, 199, 0, 150), Focus(800, 999, 1350, 1499)])
def test_the_photos_own_border_cuts_nothing_off(seen):
    corner = box_in(look_at(seen), seen.top, seen.top + 100, seen.left, seen.left + 60)
    if seen.top:
        corner = box_in(look_at(seen), 950, 1000, 1450, 1500)
    assert next_focus(corner, look_at(seen), [], WHOLE) == seen


def test_a_speck_far_away_does_not_say_where_to_look():
    found = box_in(look_at(WHOLE), 400, 460, 300, 360)
    alone = next_focus(found, look_at(WHOLE), [(330, 430)], WHOLE)
    found[-60, -20] = 1.0
    assert next_focus(found, look_at(WHOLE), [(330, 430)], WHOLE) == alone != WHOLE


def test_a_click_outside_the_focus_takes_the_look_there_and_far_off_to_all_of_the_photo():
    seen = look_at(Focus(300, 499, 600, 799))
    found = box_in(seen, 380, 420, 680, 720)
    wanted = next_focus(found, seen, [(700, 400), (820, 400)], WHOLE)
    assert wanted not in (seen.focus, WHOLE)
    for place in ((820, 400), (680, 380), (720, 420)):
        assert wanted.covers(*place)
    assert next_focus(found, seen, [(700, 400), (1400, 900)], WHOLE) == WHOLE


def test_what_was_found_in_a_focus_is_where_it_lies_in_the_photo():
    seen = look_at(Focus(300, 499, 600, 799))
    found = box_in(seen, 420, 480, 700, 780)
    wanted = next_focus(found, seen, [(850, 450)], WHOLE)  # the click makes it look anew
    assert ((wanted.top + wanted.bottom) / 2, (wanted.left + wanted.right) / 2) == pytest.approx((450, 775), abs=2)
    assert wanted.shape == pytest.approx((300, 300), abs=4)


# --- logits from one look to another ---


@pytest.mark.parametrize("seen", [WHOLE, Focus(300, 499, 600, 799), Focus(10, 90, 700, 1100), Focus(0, 999, 3, 66)])
def test_logits_moved_to_the_same_look_stay(seen):
    logits = np.random.default_rng(1).normal(0, 5, (LOW_RES, LOW_RES)).astype(np.float32)
    rows, columns = filled(look_at(seen).fit)
    there = moved(logits, look_at(seen), look_at(seen))
    # the last ones may reach beyond the photo: there its border goes on
    np.testing.assert_allclose(there[: rows - 1, : columns - 1], logits[: rows - 1, : columns - 1], atol=2e-2)
    np.testing.assert_array_equal(there[:, columns:], np.repeat(there[:, -1:], LOW_RES - columns, axis=1))


@pytest.mark.parametrize(
    "new", [Focus(300, 599, 500, 899), Focus(250, 649, 580, 979), Focus(400, 480, 550, 850), Focus(0, 999, 400, 949)]
)
def test_what_was_found_stays_in_its_place_when_the_look_moves_into_a_focus_and_back(new):
    blob = ellipse_in(look_at(WHOLE), (450, 700), (60, 120))
    before = pasted(blob, look_at(WHOLE), HEIGHT, WIDTH) > 0
    there = moved(blob, look_at(WHOLE), look_at(new))
    assert there.shape == (LOW_RES, LOW_RES)
    assert there.dtype == np.float32
    inside = np.s_[new.top : new.bottom + 1, new.left : new.right + 1]
    after = pasted(there, look_at(new), HEIGHT, WIDTH) > 0
    assert iou(after[inside], before[inside]) > 0.96
    back = pasted(moved(there, look_at(new), look_at(WHOLE)), look_at(WHOLE), HEIGHT, WIDTH) > 0
    assert iou(back[inside], before[inside]) > 0.95


def test_what_was_found_stays_in_its_place_from_one_focus_to_another_that_overlaps():
    old, new = look_at(Focus(300, 599, 500, 899)), look_at(Focus(350, 749, 450, 849))
    blob = ellipse_in(old, (460, 700), (60, 90))
    before = pasted(blob, old, HEIGHT, WIDTH) > 0
    assert iou(pasted(moved(blob, old, new), new, HEIGHT, WIDTH) > 0, before) > 0.96


@pytest.mark.parametrize(
    "old",
    [
        Focus(300, 499, 600, 799),
        Focus(300, 699, 0, 199),
        Focus(0, 199, 500, 899),
    ],
)
@pytest.mark.parametrize("new", [WHOLE, Focus(0, 799, 0, 999)])
def test_what_the_old_look_did_not_see_is_outside(old, new):
    there = pasted(moved(EVERYTHING, look_at(old), look_at(new)), look_at(new), HEIGHT, WIDTH)
    seen = np.zeros((HEIGHT, WIDTH), bool)
    seen[old.top : old.bottom + 1, old.left : old.right + 1] = True
    margin = 12  # two logits of the whole
    near = np.zeros_like(seen)
    near[max(0, old.top - margin) : old.bottom + margin, max(0, old.left - margin) : old.right + margin] = True
    assert (there[~near] == OUTSIDE).all()
    assert iou(there > 0, seen) > 0.9


@pytest.mark.parametrize("new", [Focus(0, 199, 0, 199), Focus(800, 999, 1300, 1499)])
def test_what_fills_a_corner_of_the_photo_still_fills_it_in_a_focus_there(new):
    assert (moved(EVERYTHING, look_at(WHOLE), look_at(new)) > 0).all()


def test_logits_of_a_focus_are_pasted_into_their_place_and_the_rest_is_outside():
    part = Focus(300, 499, 600, 899)
    found = pasted(EVERYTHING, look_at(part), HEIGHT, WIDTH)
    assert found.shape == (HEIGHT, WIDTH)
    assert found.dtype == np.float32
    expected = np.full((HEIGHT, WIDTH), OUTSIDE, np.float32)
    expected[300:500, 600:900] = 5
    np.testing.assert_array_equal(found, expected)


def test_logits_of_all_of_a_photo_are_pasted_as_ever():
    logits = np.random.default_rng(1).normal(0, 5, (LOW_RES, LOW_RES)).astype(np.float32)
    expected = Fit(HEIGHT, WIDTH, SIDE).paste_back(logits)
    np.testing.assert_array_equal(pasted(logits, look_at(WHOLE), HEIGHT, WIDTH), expected)


# --- the segmenter with the adapter that ships ---

CLICKS = tuple(
    Click(x=x, y=y, positive=True)
    for x, y in ((1220.0, 810.0), (1240.0, 800.0), (1195.0, 815.0), (1215.0, 790.0), (1230.0, 825.0))
)


@dataclass(frozen=True)
class Journey:
    """Five clicks on the small disc at one level, one after the other."""

    level: Granularity
    answers: tuple[Prediction, ...]
    encodings: tuple[int, ...]  # at each click
    memo: dict[Prompt, LadderState]

    def prompt(self, clicks: int = 5) -> Prompt:
        return Prompt(clicks=CLICKS[:clicks], granularity=self.level)

    def state(self, clicks: int = 5) -> LadderState:
        return self.memo[self.prompt(clicks)]


@pytest.fixture(scope="module")
def far() -> RGBImage:
    """A drawn photo, 1800 x 1200, of a lawn with a large blue disc and far from it a small red one."""
    image = lawn(1200, 1800, (0.02, 0.02, 0.01))
    draw = ImageDraw.Draw(image)
    draw.ellipse((100, 100, 500, 500), fill=(30, 60, 160))
    draw.ellipse((1180, 780, 1260, 840), fill=(190, 40, 30))
    return np.asarray(image)


@pytest.fixture(scope="module")
def encoded(segmenter: Segmenter, far: RGBImage) -> Encoded:
    return segmenter.encode(far)


@pytest.fixture(scope="module", params=[Granularity(5), Granularity(10), Granularity.from_share(0.95)], ids=str)
def journey(request: pytest.FixtureRequest, ladder: Segmenter, encoded: Encoded) -> Journey:
    level, memo = request.param, {}
    answers, encodings = [], []
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        for n in range(1, len(CLICKS) + 1):
            before = len(calls)
            prompt = Prompt(clicks=CLICKS[:n], granularity=level)
            answers.append(predict(ladder, encoded, prompt, memo=memo))
            encodings.append(len(calls) - before)
    return Journey(level, tuple(answers), tuple(encodings), memo)


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with every run of the encoder."""
    calls: list[int] = []
    original = TorchEncoder.__call__
    patch.setattr(TorchEncoder, "__call__", lambda *a: calls.append(1) or original(*a))
    return calls


def small_disc() -> Mask:
    y, x = np.mgrid[:1200, :1800]
    return ((x + 0.5 - 1220) / 40) ** 2 + ((y + 0.5 - 810) / 30) ** 2 <= 1


def test_only_the_fourth_click_on_a_small_thing_encodes_again(journey):
    assert journey.encodings == (0, 0, 0, 1, 0)


def test_the_fourth_click_brings_a_small_thing_closer_to_its_outline(journey):
    third, fourth, fifth = (iou(answer.best.mask, small_disc()) for answer in journey.answers[2:])
    assert fourth > third + 0.02
    assert fifth > 0.95


def test_the_answer_has_the_photos_size_and_lies_within_the_focus(journey, ladder, encoded):
    seen = journey.state().look.focus
    assert max(seen.shape) < 200
    assert all(seen.covers(click.x, click.y) for click in CLICKS)
    outside = np.ones((1200, 1800), bool)
    outside[seen.top : seen.bottom + 1, seen.left : seen.right + 1] = False
    mask = journey.answers[4].best.mask
    assert mask.shape == outside.shape
    assert mask.any()
    assert not mask[outside].any()
    probability = ladder.probability(encoded, journey.prompt(), journey.state())
    assert probability.shape == outside.shape
    assert probability[outside].max() < 1e-4
    np.testing.assert_array_equal(probability > 0.5, mask)


def test_a_state_in_a_focus_weighs_its_embedding_too(journey):
    plain, closer = journey.state(3), journey.state(4)
    assert plain.nbytes == plain.logits.nbytes > 2**20
    assert closer.nbytes == plain.nbytes + 256 * 64 * 64 * 2
    assert journey.state(5).look.embedding is closer.look.embedding


@pytest.mark.parametrize("journey", [Granularity(10)], indirect=True)
def test_a_cold_memo_gives_the_answer_of_a_warm_one_in_a_focus(journey, ladder, encoded):
    cold = predict(ladder, encoded, journey.prompt()).best
    warm = journey.answers[4].best
    np.testing.assert_array_equal(cold.mask, warm.mask)
    assert cold.score == warm.score


def test_without_a_level_nothing_is_encoded_again_and_the_adapter_changes_nothing(
    segmenter, ladder, encoded, monkeypatch
):
    calls = counted(monkeypatch)
    memo: dict = {}
    beside = Click(x=1220, y=860, positive=False)
    for prompt in (
        *(Prompt(clicks=CLICKS[:n]) for n in range(3, 6)),
        Prompt(clicks=(*CLICKS, beside), box=Box(left=1170, top=770, right=1270, bottom=850)),
    ):
        one, other = predict(ladder, encoded, prompt, memo=memo), predict(segmenter, encoded, prompt)
        np.testing.assert_array_equal(one.best.mask, other.best.mask)
        assert one.best.score == other.best.score
        assert one.adapter is None
    assert not calls


def test_without_an_adapter_a_level_encodes_nothing_again(segmenter, encoded, monkeypatch):
    calls = counted(monkeypatch)
    predict(segmenter, encoded, Prompt(clicks=CLICKS, granularity=Granularity(10)))
    assert not calls


def test_a_negative_click_far_outside_the_focus_does_no_harm(journey, ladder, encoded, monkeypatch):
    calls = counted(monkeypatch)
    prompt = replace(journey.prompt(), clicks=(*CLICKS, Click(x=300, y=300, positive=False)))
    state = ladder.step(encoded, prompt, journey.state())
    assert state.look is journey.state().look
    mask = ladder.render(encoded, prompt, state).best.mask
    assert iou(mask, small_disc()) > iou(journey.answers[4].best.mask, small_disc()) - 0.01
    assert not calls


def test_a_positive_click_far_outside_the_focus_is_answered_on_all_of_the_photo(journey, ladder, encoded, monkeypatch):
    calls = counted(monkeypatch)
    click = Click(x=300, y=300, positive=True)
    prompt = replace(journey.prompt(), clicks=(*CLICKS, click))
    state = ladder.step(encoded, prompt, journey.state())
    assert state.look.focus == Focus(0, 1199, 0, 1799)
    assert state.look.embedding is None
    mask = ladder.render(encoded, prompt, state).best.mask
    assert mask[300, 300]
    assert mask[810, 1220]
    assert not calls


# --- what is made ready for the click to come ---


@pytest.fixture
def made_ready(journey: Journey, ladder: Segmenter, encoded: Encoded) -> dict[Prompt, LadderState]:
    """A memo of three clicks that the fourth was made ready for."""
    memo = {key: state for key, state in journey.memo.items() if isinstance(key, FirstStep) or len(key.clicks) < 4}
    make = foresee(ladder, encoded, journey.prompt(3), memo)
    assert make is not None
    assert memo[journey.prompt(3)].ahead is None, "nothing is done before it is called"
    make()
    return memo


def test_a_fourth_click_that_was_made_ready_for_encodes_nothing_and_gives_the_same(
    made_ready, journey, ladder, encoded, monkeypatch
):
    calls = counted(monkeypatch)
    answer = predict(ladder, encoded, journey.prompt(4), memo=made_ready)
    assert not calls
    expected = journey.answers[3].best
    np.testing.assert_array_equal(answer.best.mask, expected.mask)
    assert answer.best.score == expected.score
    np.testing.assert_array_equal(made_ready[journey.prompt(4)].logits, journey.state(4).logits)


def test_a_state_weighs_what_was_made_ready_too(made_ready, journey):
    assert made_ready[journey.prompt(3)].nbytes == journey.state(3).nbytes + 256 * 64 * 64 * 2


def test_a_click_that_was_not_foreseen_is_answered_as_if_nothing_had_been(
    made_ready, journey, ladder, encoded, monkeypatch
):
    calls = counted(monkeypatch)
    elsewhere = Prompt(clicks=(*CLICKS[:3], Click(x=1320, y=810, positive=True)), granularity=journey.level)
    ready = predict(ladder, encoded, elsewhere, memo=made_ready).best
    assert len(calls) == 1
    cold = predict(ladder, encoded, elsewhere).best
    np.testing.assert_array_equal(ready.mask, cold.mask)
    assert ready.score == cold.score


def test_nothing_is_made_ready_where_nothing_takes_long(journey, made_ready, segmenter, ladder, encoded, monkeypatch):
    calls = counted(monkeypatch)
    for n in (1, 2, 4, 5):  # no focus yet, and in it already
        assert foresee(ladder, encoded, journey.prompt(n), dict(journey.memo)) is None
    assert foresee(ladder, encoded, journey.prompt(3), made_ready) is None, "it is ready"
    assert foresee(ladder, encoded, journey.prompt(3), {}) is None, "its answer is forgotten"
    large = tuple(Click(x=x, y=300, positive=True) for x in (300.0, 200.0, 400.0))
    everything = Box(left=20, top=20, right=1780, bottom=1180)
    for model, prompt in (
        (ladder, Prompt(clicks=CLICKS[:3])),
        (segmenter, Prompt(clicks=CLICKS[:3], granularity=journey.level)),
        (ladder, Prompt(clicks=large, granularity=journey.level, box=everything)),
    ):
        memo: dict = {}
        predict(model, encoded, prompt, memo=memo)
        assert foresee(model, encoded, prompt, memo) is None
    assert not calls


def test_the_corners_of_a_box_lie_in_the_focus(ladder, encoded):
    box = Box(left=1150, top=700, right=1300, bottom=870)
    prompt = Prompt(clicks=CLICKS[:4], box=box, granularity=Granularity(5))
    memo: dict = {}
    mask = predict(ladder, encoded, prompt, memo=memo).best.mask
    seen = memo[prompt].look.focus
    assert max(seen.shape) < 500
    assert seen.covers(box.left, box.top)
    assert seen.covers(box.right, box.bottom)
    assert iou(mask, small_disc()) > 0.9


@pytest.mark.parametrize("size", [(1, 1), (5000, 7)])
def test_many_clicks_on_photos_of_any_shape_are_answered_at_their_own_size(ladder, size):
    image = np.full((*size, 3), (90, 140, 80), np.uint8)
    image[size[0] // 2 :] = 190, 40, 30
    height, width = size
    clicks = [Click(x=width * 0.5, y=height * (0.5 + 0.001 * n), positive=True) for n in range(4)]
    clicks += [Click(x=width, y=height, positive=True), Click(x=0, y=0, positive=False)]
    prompt = Prompt(clicks=tuple(clicks), granularity=Granularity(10))
    assert predict(ladder, ladder.encode(image), prompt).best.mask.shape == size


# --- wholes, from the third click on ---


def test_from_the_third_click_on_a_whole_is_the_mean_of_the_ladder_and_the_base(
    segmenter, ladder, encoded, monkeypatch
):
    prompts = {
        (level, n): Prompt(clicks=CLICKS[:n], granularity=Granularity(level)) for level in (9, 10) for n in (2, 3)
    }

    def states() -> dict[tuple[int, int], LadderState]:
        memo: dict = {}
        for prompt in prompts.values():
            predict(ladder, encoded, prompt, memo=memo)
        return {asked: memo[prompt] for asked, prompt in prompts.items()}

    shared = states()
    monkeypatch.setattr(light, "_FIRST_WITH_BASE", 10**6)
    alone = states()
    differing = [asked for asked in prompts if not np.array_equal(shared[asked].logits, alone[asked].logits)]
    assert differing == [(10, 3)]

    before, with_base, without = alone[10, 2], shared[10, 3], alone[10, 3]
    np.testing.assert_array_equal(with_base.logits[:9], without.logits[:9])
    shown = np.asarray(before.logits[9], np.float32)
    base = segmenter.step(encoded, Prompt(clicks=CLICKS[:3]), LightState(shown[None], (1.0,), (1, 2, 3)))
    rows = 683 // 4  # of 256, that the photo fills
    mean = (without.logits[9, :rows].astype(np.float32) + base.logits[0, :rows]) / 2
    np.testing.assert_allclose(with_base.logits[9, :rows].astype(np.float32), mean, atol=0.05)


def test_negative_clicks_outside_the_focus_do_not_silence_the_base(ladder, encoded, monkeypatch):
    said, original = [], light.LightSegmenter._pass

    def noted(*given, with_base=False, **chosen):
        said.append(with_base)
        return original(*given, with_base=with_base, **chosen)

    monkeypatch.setattr(light.LightSegmenter, "_pass", noted)
    away = tuple(Click(x=x, y=y, positive=False) for x, y in ((100, 100), (100, 1000), (300, 600)))
    memo: dict = {}
    for n in range(1, 5):
        said.clear()
        prompt = Prompt(clicks=(CLICKS[0], *away)[:n], granularity=Granularity(10))
        predict(ladder, encoded, prompt, memo=memo)
        assert said[-1] == (n >= 3)
    assert memo[prompt].look.embedding is not None, "the fourth is answered in a focus, and these lie outside"


@pytest.mark.parametrize("journey", [Granularity(10)], indirect=True)
def test_the_base_has_its_say_in_a_focus_too(journey, ladder, encoded, monkeypatch):
    monkeypatch.setattr(light, "_FIRST_WITH_BASE", 10**6)
    alone = ladder.step(encoded, journey.prompt(), journey.state(4))
    assert alone.look is journey.state().look
    np.testing.assert_array_equal(alone.logits[:9], journey.state().logits[:9])
    assert not np.array_equal(alone.logits[9], journey.state().logits[9])


# --- real small things ---

Part = tuple[AnnotatedImage, AnnotatedMask, Encoded]


@pytest.fixture(scope="module")
def small_parts(shared: Path, segmenter: Segmenter) -> list[Part]:
    images = read_annotations(shared / "data" / "ccp-person-clothing", split="val").images
    found = [
        (image, mask)
        for image in images
        for mask in image.masks
        if mask.level == "part" and 0.002 < mask.area / (image.height * image.width) < 0.006
    ]
    return [(image, mask, segmenter.encode(image.pixels())) for image, mask in found[:: len(found) // 12][:12]]


def after_clicks(segmenter: Segmenter, part: Part, clicks: int) -> float:
    """Return the IoU after as many clicks of the robot."""
    image, annotated, encoded = part
    level = image.level_of(annotated)
    chain = ClickChain(segmenter=segmenter, encoded=encoded, truth=annotated.mask(), granularity=level)
    return chain.run(clicks)[-1]


def test_eight_clicks_find_a_small_part_better_in_a_focus(small_parts, ladder, monkeypatch):
    closer = [after_clicks(ladder, part, 8) for part in small_parts]
    monkeypatch.setattr(focus, "FIRST_CLICK", 10**6)
    whole = [after_clicks(ladder, part, 8) for part in small_parts]
    assert np.mean(closer) >= np.mean(whole), (closer, whole)
