"""The gate: who may serve, by made-up curves; and the robot with the real segmenter on one drawn photo."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from active_learning.gate import Margins, curves_of, judge, objects_of, write_verdict
from active_learning.scores import ObjectCurve, paired, scores_of
from model.annotations import read_annotations
from model.evaluation.protocol import Models, Scene
from model.metrics import iou
from model.robot import next_click
from model.segmenter import BUNDLED_ADAPTER, predict
from model.types import Granularity, Prompt, Refusal

BUDGET = 10
MARGINS = Margins(budget=BUDGET)


def curve(number: int, clicks: int | None, first: float = 0.4) -> ObjectCurve:
    """Return a curve that reaches IoU 0.90 at a click, or never."""
    ious = [first if n < (clicks or BUDGET + 1) else 0.92 for n in range(1, BUDGET + 1)]
    return ObjectCurve(object=f"photo/{number:03}", name="door", level=3, ious=tuple(ious))


def curves(clicks, first: float = 0.4) -> list[ObjectCurve]:
    return [curve(number, n, first) for number, n in enumerate(clicks)]


def verdict(holdout, reference, margins=MARGINS, seed=0):
    pairs = [found and paired(candidate=found[0], incumbent=found[1]) for found in (holdout, reference)]
    return judge(pairs[0], pairs[1], margins, np.random.default_rng(seed))


SAME = (curves([4] * 20), curves([4] * 20))
BETTER = (curves([3, 4] * 10), curves([6, 5] * 10))


def test_a_candidate_that_wins_at_home_and_loses_nothing_abroad_is_accepted():
    found = verdict(BETTER, SAME)
    assert (found.accepted, found.decision) == (True, "accepted")
    assert "20 objects of the hold-out: NoC@85 5.50 -> 3.50 (-36.4%" in found.reasons[0]
    assert found.reference.noc90.relative == found.reference.noc90.high == 0


def test_one_that_forgets_is_rejected_however_much_it_wins_at_home():
    found = verdict((curves([1] * 20), curves([9] * 20)), (curves([5] * 20), curves([4] * 20)))
    assert found.decision == "rejected"
    assert found.reasons[-1] == "It is worse on the reference set: NoC@90 +25.0%, where +10.0% is allowed."


def test_a_loss_within_the_margin_is_let_through_and_one_beyond_it_is_not():
    before = curves([5] * 40)
    for more, decision in ((6, "accepted"), (7, "rejected")):  # of 200 clicks, 3 % are 6
        found = verdict(BETTER, (curves([6] * more + [5] * (40 - more)), before))
        assert found.decision == decision


def test_objects_that_contradict_each_other_prove_no_small_loss_and_a_large_one_counts_all_the_same():
    before = curves([9, 1] * 10)
    small = verdict(BETTER, (curves([1, 9] * 8 + [3, 9, 3, 9]), before))
    assert small.reference.noc90.low < 0 < small.reference.noc90.relative
    assert small.decision == "accepted"
    large = verdict(BETTER, (curves([2, 10] * 10), before))
    assert large.reference.noc90.low < 0
    assert large.decision == "rejected"


def test_losses_that_each_were_allowed_are_not_when_they_add_up_since_the_line_began():
    reference = (curves([4] * 19 + [5]), curves([4] * 20))  # 1.25 % worse than the incumbent
    first = paired(candidate=reference[0], incumbent=curves([4] * 10 + [3] * 10))  # 15.7 % worse than the first
    pairs = [paired(candidate=one[0], incumbent=one[1]) for one in (BETTER, reference)]
    found = judge(*pairs, MARGINS, np.random.default_rng(0), since_first=first)
    assert found.decision == "rejected"
    assert "add up to too much on the reference set: NoC@90 +15.7%" in found.reasons[-1]
    assert found.to_json()["since_first"]["noc90"]["relative"] == pytest.approx(0.157, abs=1e-3)
    assert judge(*pairs, MARGINS, np.random.default_rng(0)).accepted
    assert judge(*pairs, replace(MARGINS, total=0.2), np.random.default_rng(0), since_first=first).accepted


def test_one_that_makes_up_for_earlier_losses_is_accepted_although_not_all_is_made_up_for():
    reference = (curves([4] * 19 + [5]), curves([4] * 18 + [5] * 2))
    first = paired(candidate=reference[0], incumbent=curves([4] * 10 + [3] * 10))
    pairs = [paired(candidate=one[0], incumbent=one[1]) for one in (BETTER, reference)]
    assert judge(*pairs, MARGINS, np.random.default_rng(0), since_first=first).accepted


def test_a_better_mean_with_a_poorer_first_click_does_not_win():
    poorer = (curves([3] * 20, first=0.3), curves([5] * 20))
    assert verdict(poorer, SAME, replace(MARGINS, first=0.11)).accepted
    found = verdict(poorer, SAME)
    assert found.decision == "rejected"
    assert found.reasons[-1] == "Its first click is poorer on the hold-out: IoU@1 0.3000 after 0.4000."


def test_a_win_smaller_than_asked_for_is_none():
    assert verdict(BETTER, SAME, replace(MARGINS, win=0.3)).accepted
    assert not verdict(BETTER, SAME, replace(MARGINS, win=0.4)).accepted


def test_too_few_objects_at_home_are_said_so_unless_the_reference_set_speaks():
    few = (curves([1] * 9), curves([9] * 9))
    found = verdict(few, SAME)
    assert (found.accepted, found.decision) == (False, "too-few")
    assert "The hold-out has 9 objects, fewer than the 10" in found.reasons[-1]
    assert found.holdout is not None
    assert verdict(None, SAME).decision == verdict(([], []), SAME).decision == "too-few"
    assert verdict(None, SAME).holdout is None
    assert verdict(few, (curves([9] * 20), curves([4] * 20))).decision == "rejected"


def test_of_too_few_objects_it_is_said_where_the_candidate_is_worse_on_these():
    for worse, named in (
        ((curves([5] * 3), curves([4] * 3)), "It is worse on these few: NoC@85 5.00 after 4.00."),
        ((curves([4] * 3, first=0.3), curves([4] * 3)), "Its first click is poorer on the hold-out: IoU@1 0.3000"),
    ):
        found = verdict(worse, SAME)
        assert (found.decision, found.worse_on_few) == ("too-few", True)
        assert [reason for reason in found.reasons if reason.startswith(named)]
    same = (curves([4] * 3), curves([4] * 3))
    for few in (same, (curves([3, 4, 5]), curves([5, 4, 3])), None):
        assert not verdict(few, SAME).worse_on_few
    assert not verdict(worse, (curves([9] * 20), curves([4] * 20))).worse_on_few, "it is rejected"


CLICKS = st.lists(st.one_of(st.none(), st.integers(1, BUDGET)), min_size=10, max_size=25)
PAIRS = st.lists(st.tuples(st.integers(1, BUDGET), st.integers(1, BUDGET)), min_size=10, max_size=25)


@settings(max_examples=30, deadline=None)
@given(CLICKS, st.integers(0, 9))
def test_an_equal_is_neither_accepted_nor_called_worse(clicks, seed):
    same = (curves(clicks), curves(clicks))
    found = verdict(same, same, seed=seed)
    assert found.decision == "rejected"
    assert [reason for reason in found.reasons if "worse" in reason or "poorer" in reason] == []
    assert "does not win" in found.reasons[-1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, BUDGET - 1), min_size=10, max_size=25), st.integers(0, 9))
def test_one_that_is_worse_on_every_object_is_rejected_on_either_set(clicks, seed):
    worse = (curves([n + 1 for n in clicks]), curves(clicks))
    assert verdict(worse, SAME, seed=seed).decision == "rejected"
    assert verdict(BETTER, worse, seed=seed).decision == "rejected"


@settings(max_examples=30, deadline=None)
@given(PAIRS, PAIRS, st.randoms(use_true_random=False), st.integers(0, 9))
def test_the_order_of_objects_does_not_matter_and_a_seed_decides_all(holdout, reference, random, seed):
    sets = [[curves(side) for side in zip(*pairs, strict=True)] for pairs in (holdout, reference)]
    first = verdict(*sets, seed=seed)
    for side in (side for of_set in sets for side in of_set):
        random.shuffle(side)
    assert verdict(*sets, seed=seed) == first


def test_scores_count_a_miss_as_the_budget_and_hold_the_last_value():
    found = scores_of([curve(0, 2), curve(1, None)])
    assert (found.noc90, found.misses90, found.iou1) == (6.0, 1, 0.4)
    assert found.curve == pytest.approx((0.4, *[0.66] * 9))


def test_curves_survive_json_and_a_damaged_one_is_told():
    one = curve(3, 4)
    assert ObjectCurve.from_json(json.loads(json.dumps(one.to_json()))) == one
    for damage in ({"ious": []}, {"ious": [2.0]}, {"ious": [float("nan")]}, {"ious": None}, {"level": "x"}):
        with pytest.raises(ValueError):
            ObjectCurve.from_json(one.to_json() | damage)
    with pytest.raises(ValueError, match="'name'"):
        ObjectCurve.from_json({"object": "a", "ious": [1]})


def test_curves_of_other_objects_or_another_budget_are_not_compared():
    with pytest.raises(ValueError, match="same objects"):
        paired(candidate=curves([1, 2]), incumbent=curves([1]))
    with pytest.raises(ValueError, match="each once"):
        paired(candidate=[curve(0, 1)] * 2, incumbent=[curve(0, 1)] * 2)
    with pytest.raises(ValueError, match="12 clicks, the budget"):
        verdict(None, SAME, replace(MARGINS, budget=12))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lose": 0.2},
        {"win": -1.0},
        {"first": -0.1},
        {"confidence": 1.0},
        {"budget": 0},
        {"least_objects": 41},
        {"lose": float("nan")},
    ],
)
def test_margins_that_make_no_sense_are_refused(wrong):
    with pytest.raises(Refusal):
        Margins(**wrong)


# --- the robot ---


@pytest.fixture(scope="module")
def models(segmenter) -> Models:
    return Models(base=segmenter, adapted=segmenter.with_adapter(BUNDLED_ADAPTER))


@pytest.fixture(scope="module")
def objects(data, segmenter):
    chosen = objects_of(read_annotations(data / "strip"), 3)
    return [
        (Scene(set_name="strip", image=image, encoded=segmenter.encode(image.pixels()), pixels=image.pixels), masks)
        for image, masks in chosen
    ]


def test_the_robot_clicks_at_each_masks_own_level_and_gets_the_same_curves_again(objects, models):
    told = []
    first = curves_of(models.adapted, objects, budget=4, report=told.append)
    assert curves_of(models.adapted, objects, budget=4) == first
    assert told == [1, 2, 3]
    assert [len(one.ious) for one in first] == [4, 4, 4]
    by_name = {one.name: one for one in first}
    assert by_name["door"].level == 10 > by_name["window"].level
    assert by_name["door"].ious[-1] > 0.85
    for one in first:
        done = [n for n, iou in enumerate(one.ious) if iou >= 0.90]
        assert len({one.ious[n] for n in done}) <= 1, "later clicks hold the value"


@pytest.mark.parametrize("value", [0.4, 0.37])
def test_of_a_level_that_the_annotator_stated_the_nearest_key_is_pressed(objects, models, value):
    ((scene, masks),) = objects
    stated = replace(masks[0], granularity=value)
    (found,) = curves_of(models.adapted, [(scene, [stated])], budget=1)
    assert found.level == 4
    truth = scene.truth(stated)
    middle = next_click(truth, np.zeros_like(truth))
    assert middle is not None
    at_its_key = predict(models.adapted, scene.encoded, Prompt(clicks=(middle,), granularity=Granularity(4)))
    assert found.ious[0] == pytest.approx(iou(at_its_key.best.mask, truth))


def test_a_verdict_is_kept_with_every_curve_a_drawing_and_the_objects_that_changed_most(objects, models, tmp_path):
    sides = (curves_of(side, objects, budget=3) for side in (models.adapted, models.base))
    pairs = paired(candidate=next(sides), incumbent=next(sides))
    found = judge(None, pairs, Margins(budget=3), np.random.default_rng(0))
    folder = tmp_path / "deep" / "verdict"
    write_verdict(folder, found, holdout=None, reference=pairs, objects=objects, models=models)
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "sheet.png", "verdict.json"]
    content = json.loads((folder / "verdict.json").read_text())
    assert content["decision"] == found.decision
    assert [ObjectCurve.from_json(both["candidate"]) for both in content["curves"]["reference set"]] == [
        ours for ours, _ in pairs
    ]
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 3 * 200
        assert sheet.height > 3 * 50


def test_a_set_gives_its_photos_in_turn_before_any_photo_gives_twice(data):
    found = read_annotations(data / "strip")
    (image,) = found.images
    others = tuple(
        replace(image, id=n, masks=tuple(replace(mask, id=10 * n + mask.id, image_id=n) for mask in image.masks))
        for n in (2, 3)
    )
    found = replace(found, images=(image, *others))
    assert [len(masks) for _, masks in objects_of(found, 3)] == [1, 1, 1]
    assert [masks[0].name for _, masks in objects_of(found, 3)] == ["door", "window", "handle"]
    assert sorted(len(masks) for _, masks in objects_of(found, 5)) == [1, 2, 2]
    assert sum(len(masks) for _, masks in objects_of(found, 99)) == 12
