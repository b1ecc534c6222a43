"""Charts as SVG: what they say to who cannot see them, and what cannot get into them."""

import re

from ml_backend import charts


def test_bars_are_as_high_as_their_numbers_and_say_them():
    drawn = charts.bars("days", "By day", [("2026-11-24", 2), ("2026-11-25", 8), ("2026-11-26", 0)])
    heights = [float(found) for found in re.findall(r'class="bar"[^>]* height="([^"]+)"', drawn)]
    assert heights[1] == 4 * heights[0]
    assert heights[2] == 0
    assert "3 bars, 10 in all; most on 2026-11-25: 8." in drawn
    assert 'role="img" aria-labelledby="days-title days-said"' in drawn


def test_a_line_goes_from_left_to_right_and_says_where_from_and_to():
    drawn = charts.line("loss", "Loss", [(10, 1.0), (20, 0.5), (40, 0.25)], until=80)
    points = [tuple(map(float, point.split(","))) for point in re.search('points="([^"]+)"', drawn)[1].split()]
    assert points == sorted(points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # down is larger
    assert "From 1 at 10 to 0.25 at 40." in drawn


def test_nothing_is_drawn_of_nothing_and_markup_in_a_label_stays_text():
    assert charts.bars("a", "b", []) == charts.line("a", "b", [(1, 1.0)], until=1) == ""
    drawn = charts.bars("a", "<b>title</b>", [("<script>", 1)])
    assert "<script>" not in drawn
    assert "<b>" not in drawn
