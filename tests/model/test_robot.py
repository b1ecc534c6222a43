"""Where a simulated annotator clicks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model.robot import next_click, sample_click
from model.types import Click

MASKS = arrays(bool, (12, 17))


def test_the_first_click_lies_in_the_middle_of_the_object():
    truth = np.zeros((40, 60), bool)
    truth[10:21, 30:41] = True
    assert next_click(truth, np.zeros_like(truth)) == Click(x=35.5, y=15.5, positive=True)


def test_the_larger_error_is_clicked_first():
    truth, mask = np.zeros((40, 60), bool), np.zeros((40, 60), bool)
    truth[5:10, 5:10] = True
    mask[20:35, 30:50] = True
    click = next_click(truth, mask)
    assert click is not None
    assert not click.positive
    assert mask[int(click.y), int(click.x)]


@given(MASKS, MASKS)
def test_every_click_lies_on_an_error_of_its_kind_and_none_is_given_twice(truth, mask):
    clicks: list[Click] = []
    while (click := next_click(truth, mask, clicks)) is not None:
        assert click not in clicks
        spot = int(click.y), int(click.x)
        assert truth[spot] == click.positive
        assert mask[spot] != click.positive
        clicks.append(click)
        if len(clicks) == 3:
            break
    if len(clicks) < 3:
        assert len(clicks) == (truth ^ mask).sum()


@given(MASKS, MASKS, st.integers(0, 9))
def test_a_sampled_click_lies_on_the_error_that_the_middle_click_lies_on_and_never_where_one_was(truth, mask, seed):
    rng, clicks = np.random.default_rng(seed), []
    for _ in range(3):
        middle, click = next_click(truth, mask, clicks), sample_click(truth, mask, rng, clicks)
        assert (click is None) == (middle is None)
        if click is None:
            break
        assert click.positive == middle.positive
        assert click not in clicks
        spot = int(click.y), int(click.x)
        assert truth[spot] == click.positive
        assert mask[spot] != click.positive
        clicks.append(click)


def test_sampled_clicks_spread_over_the_inner_part_of_the_error_and_the_seed_decides_where():
    truth = np.zeros((40, 60), bool)
    truth[10:31, 20:51] = True  # 21 rows, so 11 deep in the middle
    mask = np.zeros_like(truth)
    clicks = [sample_click(truth, mask, np.random.default_rng(seed)) for seed in range(50)]
    assert clicks == [sample_click(truth, mask, np.random.default_rng(seed)) for seed in range(50)]
    assert len({(click.x, click.y) for click in clicks}) > 20
    assert all(15 <= click.y <= 26 and 25 <= click.x <= 46 for click in clicks)
    anywhere = [sample_click(truth, mask, np.random.default_rng(seed), inner=0) for seed in range(50)]
    assert any(click.y < 15 for click in anywhere)


def test_masks_of_different_shapes_have_no_error_to_click():
    with pytest.raises(ValueError, match="different shapes"):
        sample_click(np.ones((4, 4), bool), np.zeros((4, 5), bool), np.random.default_rng(0))
