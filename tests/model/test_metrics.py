"""How good a mask is."""

import numpy as np
import pytest

from model.metrics import iou, number_of_clicks


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
