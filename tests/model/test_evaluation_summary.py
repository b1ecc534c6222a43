"""What rows come to: means with misses apart, and the figures to reach."""

import pytest

from model.evaluation.protocol import Options
from model.evaluation.report import Table, tables_of
from model.evaluation.summary import figures_of, groups_of, numbers_of
from model.types import Granularity

OPTIONS = Options(budget=4)


def row(protocol, mask=1, set_name="ccp-person-clothing", mask_level="part", own=2, **values):
    return {"set": set_name, "protocol": protocol, "mask": mask, "mask_level": mask_level, "own": own, **values}


def clicked(protocol, *ious, scores=None, **more):
    return row(protocol, ious=list(ious), scores=scores or [0.5] * len(ious), refusals=0, **more)


def figure(rows, what, options=OPTIONS):
    return next(f for f in figures_of(groups_of(rows), options) if f.what == what)


def test_rows_are_grouped_by_set_and_level():
    rows = [clicked("base", 0.5), clicked("base", 0.5, mask_level="object"), clicked("base", 0.5, set_name="other")]
    assert [(g.set_name, g.level) for g in groups_of(rows)] == [
        ("ccp-person-clothing", "part"),
        ("ccp-person-clothing", "object"),
        ("other", "part"),
    ]


def test_clicks_come_with_misses_apart_and_penalised():
    rows = [clicked("base", 0.5, 0.86, 0.91), clicked("base", 0.1, 0.2, 0.3, 0.4, mask=2)]
    base = numbers_of(groups_of(rows)[0], OPTIONS)["clicks"]["base"]
    assert base["iou_at_1"] == pytest.approx(0.3)
    assert base["NoC@85"] == {"objects": 2, "misses": 1, "reached_mean": 2.0, "penalised_mean": 3.0}
    assert base["NoC@90"]["reached_mean"] == 3.0


def test_each_fixed_level_has_its_own_numbers():
    options = Options(budget=4, fixed_levels=(Granularity(10), Granularity(5)))
    by_level = {"1.0": {"ious": [0.9], "refusals": 0}, "0.5": {"ious": [0.2], "refusals": 0}}
    clicks = numbers_of(groups_of([row("fixed", by_level=by_level)])[0], options)["clicks"]
    assert (clicks["fixed 1.0"]["iou_at_1"], clicks["fixed 0.5"]["iou_at_1"]) == (0.9, 0.2)


def test_a_gain_is_taken_over_the_masks_that_both_sides_have():
    rows = [clicked("base", 0.3), clicked("level", 0.7, nearest=0.6), clicked("base", 0.9, mask=2)]
    found = figure(rows, "level given, IoU@1")
    assert (found.base, found.ours, found.count) == (0.3, 0.7, 1)
    assert found.measured == pytest.approx(0.4)
    assert found.reached
    assert found.reach == "base +0.38"
    nearest = figure(rows, "nearest of ten levels given, IoU@1")
    assert (nearest.measured, nearest.reached) == (pytest.approx(0.3), False)


def test_a_figure_met_exactly_is_reached():
    rows = [clicked("base", 0.3), clicked("level", 0.68, nearest=0.6)]
    assert figure(rows, "level given, IoU@1").reached


def test_the_oracle_is_compared_with_the_best_of_three_and_with_the_clicks_of_base():
    rows = [
        clicked("base-oracle3", 0.2, 0.6, 0.4),
        clicked("base", 0.2, 0.3, 0.4, 0.5),
        row("oracle", ious=[0.65, 0.86], first=[0.65] * 10),
    ]
    assert figure(rows, "oracle level, IoU@1").measured == pytest.approx(0.05)
    clicks = figure(rows, "oracle level, NoC@85")
    assert (clicks.base, clicks.ours, clicks.measured) == (4, 2, 0.5)
    assert clicks.reached


def test_a_target_that_the_run_did_not_click_to_gives_no_figure():
    rows = [clicked("base", 0.2), row("oracle", ious=[0.65], first=[0.65] * 10)]
    found = figures_of(groups_of(rows), Options(targets=(0.5,)))
    assert [f.what for f in found] == []


def test_objects_are_compared_at_level_one():
    by_level = {"1.0": {"ious": [0.8, 0.95], "refusals": 0}}
    place = {"set_name": "penn-fudan", "mask_level": "object", "own": 10}
    rows = [clicked("base", 0.5, 0.6, 0.7, 0.8, **place), row("fixed", by_level=by_level, **place)]
    assert figure(rows, "fixed level 1.0, IoU@1").measured == pytest.approx(0.3)
    assert figure(rows, "fixed level 1.0, NoC@90").measured == 0.5


def test_growth_counts_objects_with_parts_only():
    rows = [
        row("monotone", areas=[10, 20, 40], has_parts=True, mask_level="object"),
        row("monotone", areas=[10, 20, 10], has_parts=False, mask_level="object", mask=2),
    ]
    assert figure(rows, "area at 1.0 over 0.1, objects with parts").measured == 4.0
    share = figure(rows, "steps that do not shrink (1 %)")
    assert (share.measured, share.count, share.reached) == (0.75, 4, False)


def test_masks_without_a_name_have_no_part_in_the_phrase():
    rows = [
        row("phrase", base=0.1, level=0.5, nearest=0.6, phrase=0.5, both=0.6, unknown=[0.1, 0.2]),
        row("phrase", mask=2, base=0.9, level=0.9, nearest=0.9, unknown=[0.9, 0.9]),
    ]
    numbers = numbers_of(groups_of(rows)[0], OPTIONS)["phrase"]
    assert (numbers["masks"], numbers["unnamed"], numbers["base"]) == (1, 1, 0.1)
    gains = [f for f in figures_of(groups_of(rows), OPTIONS) if f.what.startswith("phrase")]
    assert [(f.reach, f.reached) for f in gains] == [
        ("base +0.33", True),
        ("level alone -0.05", True),
        ("nearest level alone -0.05", False),
    ]


def test_pairs_of_all_sets_make_one_ratio_of_seconds():
    seconds = {"encode_s": 1.0, "base_click_s": [0.2, 0.2], "adapted_click_s": [0.2, 0.2]}
    rows = [
        row("time", base_step_s=[0.1, 0.1], adapted_step_s=[0.1, 0.11], **seconds),
        row("time", mask=2, set_name="other", base_step_s=[0.1, 0.1], adapted_step_s=[0.11, 0.3], **seconds),
    ]
    found = figure(rows, "decoder time with level, over without")
    assert (found.set_name, found.count) == ("all", 4)
    assert found.measured == pytest.approx(1.1)
    numbers = numbers_of(groups_of(rows)[0], OPTIONS)["time"]
    assert numbers["base_pie_s"] == pytest.approx(0.2 + 1 / 4)


def test_protocols_that_were_not_run_have_no_numbers_and_no_table():
    group = groups_of([clicked("base", 0.5)])[0]
    numbers = numbers_of(group, OPTIONS)
    assert set(numbers) == {"set", "level", "masks", "clicks", "own", "calibration"}
    assert [table.title for table in tables_of([numbers], [], OPTIONS)] == ["clicks", "calibration"]


def test_markdown_has_a_column_for_each_heading_and_escapes_bars():
    text = Table("t", ("a", "b", "c", "d"), [("x|y", "1", "2", "3")]).markdown()
    assert text.splitlines()[2:] == ["| a | b | c | d |", "|---|---|---|--:|", "| x\\|y | 1 | 2 | 3 |"]
