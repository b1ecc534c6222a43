"""Where a simulated annotator clicks."""

import numpy as np
from hypothesis import given
from hypothesis.extra.numpy import arrays

from model.robot import next_click
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
