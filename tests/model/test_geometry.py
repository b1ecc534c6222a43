"""Sizes and places, and the way back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.geometry import Fit, clip_box
from model.types import Box, Refusal

SIZES = st.integers(1, 5000)


@given(SIZES, SIZES, st.floats(0, 1), st.floats(0, 1))
def test_a_point_goes_to_the_square_and_comes_back(height, width, fx, fy):
    fit = Fit(height, width, 1024)
    point = np.array([fx * width, fy * height])
    there = fit.to_square(point)
    assert (there >= 0).all()
    assert (there <= 1024.01).all()
    np.testing.assert_allclose(fit.from_square(there), point, atol=max(height, width) * 1e-5 + 1e-6)


@given(SIZES, SIZES)
def test_the_long_side_fills_the_square(height, width):
    resized = Fit(height, width, 1024).resized
    assert max(resized) == 1024
    assert min(resized) >= 1


def test_resizing_gives_the_size_that_was_announced_and_refuses_other_images():
    fit = Fit(50, 80, 1024)
    assert fit.resize(np.zeros((50, 80, 3), np.uint8)).shape == (640, 1024, 3)
    with pytest.raises(ValueError, match="expected uint8"):
        fit.resize(np.zeros((80, 50, 3), np.uint8))


def test_a_map_of_the_square_is_pasted_back_where_it_was():
    fit = Fit(300, 600, 1024)
    square = np.zeros((256, 256), np.float32)
    square[32:64, 64:128] = 1  # of the 128 x 256 rows and columns that the image fills
    pasted = fit.paste_back(square) > 0.5
    rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
    assert (rows[0], rows[-1] + 1) == pytest.approx((75, 150), abs=1)
    assert (columns[0], columns[-1] + 1) == pytest.approx((150, 300), abs=1)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(Refusal, match="holds nothing"):
        Fit(0, 10, 1024)


def test_a_box_is_clipped_to_the_image():
    assert clip_box(Box(left=-5, top=2, right=50, bottom=9), 8, 20) == Box(left=0, top=2, right=20, bottom=8)
    with pytest.raises(Refusal, match="outside"):
        clip_box(Box(left=30, top=2, right=50, bottom=9), 8, 20)
