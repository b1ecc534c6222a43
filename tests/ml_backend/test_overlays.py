"""A correction as numbers and as a picture."""

import pytest
from PIL import Image

from ml_backend.overlays import SIDE, changed_shares, draw_correction
from model.annotations import encode
from model.types import Refusal
from tests.active_learning.corrected import HEIGHT, WIDTH, box, correction


def test_what_was_added_and_taken_away_are_shares_of_the_proposal():
    one = correction(mask=box(10, 10, 30, 30), proposed=encode(box(20, 10, 40, 30)))
    assert changed_shares(one) == pytest.approx((1 / 3, 0.5, 0.5))
    assert changed_shares(correction(proposed=None)) is None
    assert changed_shares(correction(proposed=encode(box(0, 0, 0, 0)))) is None


def test_a_photo_of_another_size_too_large_or_damaged_is_refused(tmp_path):
    path = tmp_path / "photo"
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, "PNG")
    one = correction()
    assert draw_correction(path, one, max_pixels=WIDTH * HEIGHT)[:2] == b"\xff\xd8"
    with pytest.raises(Refusal, match="pixels"):
        draw_correction(path, one, max_pixels=WIDTH * HEIGHT - 1)
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(path, "PNG")
    with pytest.raises(Refusal, match=f"{WIDTH + 1} x {HEIGHT}"):
        draw_correction(path, one, max_pixels=10**6)
    path.write_bytes(b"no photo")
    with pytest.raises(Refusal, match="cannot be read"):
        draw_correction(path, one, max_pixels=10**6)
    assert max(WIDTH, HEIGHT) < SIDE
