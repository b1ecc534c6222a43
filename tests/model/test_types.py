"""Values refuse what they cannot mean."""

import math

import pytest

from model.types import MAX_CLICKS, Box, Click, Granularity, Prompt, Refusal


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_click_without_a_place_is_refused(value):
    with pytest.raises(Refusal, match="not a point"):
        Click(x=value, y=1, positive=True)
    with pytest.raises(Refusal, match="not a rectangle"):
        Box(left=0, top=0, right=value, bottom=1)


def test_an_empty_box_is_refused():
    with pytest.raises(Refusal, match="empty"):
        Box(left=5, top=0, right=5, bottom=9)


@pytest.mark.parametrize(("value", "level"), [(0, 1), (0.04, 1), (0.1, 1), (0.25, 2), (0.5, 5), (0.96, 10), (1, 10)])
def test_a_slider_value_becomes_the_nearest_level(value, level):
    assert Granularity.from_value(value).level == level


@pytest.mark.parametrize("value", [0.004, 0.13, 0.25, 0.3, 0.96])
def test_a_share_is_kept_beside_its_nearest_level(value):
    asked = Granularity.from_share(value)
    assert (asked.value, asked.share) == (value, value)
    assert asked.level == Granularity.from_value(value).level
    assert asked != Granularity(asked.level)


def test_all_and_nothing_of_the_whole_are_its_last_and_its_first_level():
    assert (Granularity.from_share(1.0), Granularity.from_share(0)) == (Granularity(10), Granularity(1))
    with pytest.raises(Refusal, match=r"outside 0\.\.1"):
        Granularity.from_share(1.2)


@pytest.mark.parametrize("share", [0.0, 0.9, -0.3, math.nan, math.inf])
def test_a_share_that_is_not_near_its_level_is_refused(share):
    with pytest.raises(Refusal, match="not near level 3"):
        Granularity(3, share)


@pytest.mark.parametrize("value", [-0.1, 1.01, math.nan])
def test_a_slider_value_outside_its_range_is_refused(value):
    with pytest.raises(Refusal, match=r"outside 0\.\.1"):
        Granularity.from_value(value)
    with pytest.raises(Refusal, match=r"from_value\(0\.3\)"):
        Granularity(0)


def test_ten_thousand_clicks_are_refused_at_once():
    click = Click(x=1, y=1, positive=True)
    Prompt(clicks=(click,) * MAX_CLICKS)
    with pytest.raises(Refusal, match="10000 clicks"):
        Prompt(clicks=(click,) * 10_000)
