"""When a training is due by its rules."""

from active_learning.rules import When, due, due_at_night, rest_s

DAY_S = 86_400
NIGHT = When(after=0, night_h=(22, 6))


def test_a_training_is_due_by_number_and_by_hours():
    assert due(When(after=2), new=2, first_s=0.0, last_s=None, now_s=0) == "2 new corrections"
    assert due(When(after=2), new=1, first_s=0.0, last_s=None, now_s=0) is None
    hours = When(after=0, every_h=2)
    assert due(hours, new=1, first_s=0.0, last_s=None, now_s=DAY_S) is not None
    assert due(hours, new=1, first_s=0.0, last_s=0.0, now_s=7200) is not None
    assert due(hours, new=1, first_s=0.0, last_s=0.0, now_s=7199) is None
    assert due(hours, new=0, first_s=0.0, last_s=0.0, now_s=9000) is None
    assert due(hours, new=1, first_s=DAY_S, last_s=None, now_s=DAY_S + 7199) is None, "not at the very first correction"
    assert due(hours, new=1, first_s=DAY_S, last_s=None, now_s=DAY_S + 7200) is not None
    evening = DAY_S + 22 * 3600
    assert due(NIGHT, new=1, first_s=0.0, last_s=None, now_s=evening) is None, "at night a thorough one is"


def test_a_thorough_training_is_due_once_a_night():
    noon, evening, midnight = DAY_S + 12 * 3600, DAY_S + 22 * 3600, 2 * DAY_S + 60
    assert due_at_night(NIGHT, new=1, last_s=noon - 3600, now_s=noon) is None
    assert due_at_night(NIGHT, new=1, last_s=noon, now_s=evening) is not None
    assert due_at_night(NIGHT, new=1, last_s=None, now_s=evening) is not None
    assert due_at_night(NIGHT, new=0, last_s=noon, now_s=evening) is None
    assert due_at_night(NIGHT, new=1, last_s=evening, now_s=midnight) is None
    assert due_at_night(NIGHT, new=1, last_s=noon, now_s=midnight) is not None
    assert due_at_night(When(after=1), new=1, last_s=None, now_s=evening) is None, "no night was named"


def test_after_failures_no_training_is_due_for_a_day_at_most():
    assert rest_s(0) == 0
    assert rest_s(1) == 3600
    assert rest_s(2) == 7200
    assert rest_s(10_000) == DAY_S
