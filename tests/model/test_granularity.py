"""How fine a mask is."""

import numpy as np
import pytest

from model.granularity import estimate, granularity, scale, semantic
from model.types import Granularity, Refusal
from tests.model.striped import HEIGHT, WIDTH, Striped, flag


@pytest.fixture
def probability() -> np.ndarray:
    return np.tile(np.linspace(0, 1, WIDTH, dtype=np.float32), (HEIGHT, 1))


def test_the_whole_has_granularity_1(probability):
    assert granularity(flag(), flag(), probability) == 1
    assert Granularity.from_value(granularity(flag(), flag(), probability)).level == 10


def test_granularity_is_half_the_share_of_pixels_and_half_the_share_of_probability(probability):
    assert scale(flag(0, 0), flag()) == 0.25
    assert semantic(probability, flag(0, 0), flag()) == pytest.approx(19 / 79)
    assert granularity(flag(0, 0), flag(), probability) == pytest.approx(0.5 * 0.25 + 0.5 * 19 / 79)


def test_a_part_over_which_the_network_stays_sure_is_finer_than_one_that_it_doubts(probability):
    sure = probability.copy()
    sure[flag(0, 0)] = 0.2
    assert granularity(flag(0, 0), flag(), sure) < granularity(flag(0, 0), flag(), probability)


def test_what_lies_outside_the_whole_does_not_count(probability):
    outside = flag(0, 0)
    outside[:, :20] = True
    assert granularity(outside, flag(), probability) == granularity(flag(0, 0), flag(), probability)


def test_a_map_that_tells_nothing_apart_leaves_the_part_its_scale_and_a_full_semantic_share():
    assert granularity(flag(0, 0), flag(), np.full((HEIGHT, WIDTH), 0.5, np.float32)) == 0.5 * 0.25 + 0.5


@pytest.mark.parametrize(
    ("part", "whole", "sentence"),
    [
        (np.zeros_like(flag()), flag(), "part holds no pixel"),
        (flag(), np.zeros_like(flag()), "whole holds no pixel"),
        (flag(0, 0), flag(2, 3), "outside its whole"),
    ],
)
def test_masks_without_a_granularity_are_refused(part, whole, sentence, probability):
    with pytest.raises(Refusal, match=sentence):
        granularity(part, whole, probability)


def test_an_estimate_asks_with_one_click_at_the_centre_of_the_part():
    segmenter = Striped()
    encoded = segmenter.encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    fine = estimate(segmenter, encoded, flag(1, 1), flag())
    coarse = estimate(segmenter, encoded, flag(0, 2), flag())
    assert 0 < fine < coarse < 1


def test_an_estimate_of_the_bundled_model_grows_from_part_to_whole(segmenter, scene):
    y, x = np.mgrid[:480, :640]
    door = (x >= 420) & (x <= 560) & (y >= 100) & (y <= 400)
    handle = (x >= 530) & (x <= 550) & (y >= 240) & (y <= 260)
    encoded = segmenter.encode(scene)
    assert estimate(segmenter, encoded, handle, door) < estimate(segmenter, encoded, door, door) == 1
