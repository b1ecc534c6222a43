"""How good a mask is."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model.metrics import (
    calibration,
    clicks_over,
    growth,
    iou,
    iou_at_all_granularities,
    iou_matrix,
    monotone_steps,
    number_of_clicks,
    seconds_per_interaction,
)

shares = st.floats(0, 1, allow_nan=False, width=32)


def test_reaching_the_target_on_the_last_click_is_not_a_miss():
    ious = np.linspace(0.5, 0.9, 20)
    assert number_of_clicks(ious, target=0.90) == 20
    assert number_of_clicks(ious, target=0.91) is None


def test_clicks_beyond_the_budget_do_not_count():
    assert number_of_clicks(np.array([0.1, 0.2, 0.95]), target=0.9, budget=2) is None


def test_no_iou_at_all_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        number_of_clicks(np.array([]), target=0.9)


def test_two_empty_masks_agree_and_shapes_must_match():
    empty = np.zeros((3, 4), bool)
    assert iou(empty, empty) == 1.0
    assert iou(empty, ~empty) == 0.0
    with pytest.raises(ValueError, match="different shapes"):
        iou(empty, np.zeros((4, 3), bool))


def test_misses_are_counted_apart_and_penalised_apart():
    clicks = clicks_over([2, 4, None, None], budget=20)
    assert (clicks.objects, clicks.misses) == (4, 2)
    assert clicks.reached_mean == 3.0
    assert clicks.penalised_mean == 11.5
    assert clicks_over([None], budget=20).reached_mean is None
    with pytest.raises(ValueError, match="at least one"):
        clicks_over([])


@given(st.lists(st.none() | st.integers(1, 20), min_size=1))
def test_a_miss_never_makes_the_penalised_mean_better_than_the_reached_one(clicks):
    counted = clicks_over(clicks, budget=20)
    assert 1 <= counted.penalised_mean <= 20
    if counted.reached_mean is not None:
        assert counted.penalised_mean >= counted.reached_mean - 1e-9
    assert (counted.reached_mean is None) == (counted.misses == len(clicks))


def test_matching_takes_the_pairs_with_the_largest_sum_and_not_the_best_pair_first():
    assert iou_at_all_granularities(np.array([[0.9, 0.8], [0.8, 0.1]])) == pytest.approx(0.8)


def test_a_true_mask_without_a_proposal_counts_zero():
    assert iou_at_all_granularities(np.array([[1.0, 0.2, 0.2]])) == pytest.approx(1 / 3)
    assert iou_at_all_granularities(np.zeros((0, 2))) == 0.0
    with pytest.raises(ValueError, match="at least one truth"):
        iou_at_all_granularities(np.zeros((2, 0)))


@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.floats(0, 1)))
def test_matching_equals_the_best_of_all_matchings(ious):
    proposals, truths = ious.shape
    padded = np.zeros((max(proposals, truths), truths))
    padded[:proposals] = ious
    best = max(
        sum(padded[row, column] for column, row in enumerate(rows))
        for rows in itertools.permutations(range(len(padded)), truths)
    )
    assert iou_at_all_granularities(ious) == pytest.approx(best / truths)


@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.floats(0, 1)), st.data())
def test_another_proposal_never_makes_matching_worse(ious, data):
    more = np.vstack([ious, data.draw(arrays(np.float64, (1, ious.shape[1]), elements=st.floats(0, 1)))])
    assert iou_at_all_granularities(more) >= iou_at_all_granularities(ious) - 1e-9


def test_the_matrix_has_proposals_as_rows():
    a, b = np.array([[True, True]]), np.array([[True, False]])
    np.testing.assert_array_equal(iou_matrix([a, b], [a]), [[1.0], [0.5]])
    assert iou_matrix([], [a, b]).shape == (0, 2)


def test_a_step_may_lose_one_percent():
    assert monotone_steps([1000, 990, 980]) == (1, 2)
    assert monotone_steps([0, 0, 5]) == (2, 2)
    assert monotone_steps([7]) == (0, 0)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=10))
def test_sorted_areas_keep_every_step(areas):
    assert monotone_steps(sorted(areas)) == (len(areas) - 1, len(areas) - 1)


def test_growth_from_or_to_an_empty_mask_is_a_failure():
    assert growth([10, 40]) == 4.0
    assert growth([0, 40]) == growth([10, 0]) == growth([0, 0]) == growth([]) == 0.0


def test_scores_that_are_right_on_average_in_each_bin_have_no_calibration_error():
    found = calibration([0.75, 0.75, 0.25], [0.65, 0.85, 0.25])
    assert found.expected_calibration_error == pytest.approx(0)
    assert found.mean_absolute_error == pytest.approx(0.2 / 3)
    assert calibration([1.0, 1.0], [0.5, 0.5]).expected_calibration_error == pytest.approx(0.5)


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=30))
def test_the_calibration_error_is_at_most_the_mean_absolute_error(pairs):
    scores, ious = zip(*pairs, strict=True)
    found = calibration(scores, ious)
    assert 0 <= found.expected_calibration_error <= found.mean_absolute_error + 1e-6
    assert found.masks == len(pairs)


def test_scores_without_their_ious_are_an_error():
    with pytest.raises(ValueError, match="as many"):
        calibration([0.5], [])


def test_an_encoding_is_shared_out_among_the_clicks():
    assert seconds_per_interaction(2.0, 0.1, clicks=20) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="at least 1"):
        seconds_per_interaction(2.0, 0.1, clicks=0)
