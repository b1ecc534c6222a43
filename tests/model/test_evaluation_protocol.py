"""What each protocol measures on one mask: with a segmenter that paints discs, and with the bundled one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.annotations import read_annotations
from model.evaluation.protocol import (
    LEVELS,
    PROTOCOLS,
    Bench,
    ClickChain,
    Models,
    Options,
    Scene,
    random_click,
)
from model.metrics import iou
from model.robot import next_click
from model.segmenter import predict
from model.types import Click, Granularity, Prompt, Refusal
from tests.model.drawn_set import Painter, disc, write_set


@pytest.fixture(scope="module")
def image(scene, tmp_path_factory):
    folder = write_set(tmp_path_factory.mktemp("sets") / "drawn", scene)
    return read_annotations(folder).images[0]


def bench(image, segmenter, name="disc", **options) -> Bench:
    encoded = segmenter.encode(image.pixels())
    scene = Scene(set_name="drawn", image=image, encoded=encoded, pixels=image.pixels)
    mask = next(mask for mask in image.masks if mask.name == name)
    return Bench(Models(base=segmenter, adapted=segmenter), scene, mask, Options(**options))


def test_the_first_click_is_the_middle_of_the_mask(image):
    assert bench(image, Painter()).first == Click(x=200.5, y=220.5, positive=True)


def test_the_level_is_the_share_of_the_whole_and_an_object_is_level_ten(image):
    own = bench(image, Painter(), "handle").own
    handle = next(mask for mask in image.masks if mask.name == "handle")
    assert own == Granularity(1, handle.area / image.whole(handle).area)
    assert bench(image, Painter(), "disc").own == Granularity(10)


def test_a_chain_stops_at_the_click_that_reaches_the_target_and_goes_on_when_asked_for_more(image):
    painter = Painter()
    encoded = painter.encode(image.pixels())
    truth = disc(480, 640, 200.5, 220.5, 100)
    chain = ClickChain(segmenter=painter, encoded=encoded, truth=truth, granularity=Granularity(10))
    assert chain.run(20, until=0.9) == [1.0]
    assert painter.steps == 1
    assert chain.run(4) == [1.0] * 4, "nothing is left to correct: the mask stands"
    assert painter.steps == 1
    assert chain.run(20, until=0.9) == [1.0], "what was clicked later does not show"


def test_a_refused_prompt_counts_as_an_empty_mask(image, monkeypatch):
    def refuse(*args):
        raise Refusal("no")

    monkeypatch.setattr(Painter, "step", refuse)
    row = bench(image, Painter(), budget=3).run("base")
    assert row == {"ious": [0.0] * 3, "scores": [0.0] * 3, "refusals": 3}
    assert bench(image, Painter()).run("levels")["ours"] == 0.0


def test_the_given_level_is_the_masks_own(image):
    assert bench(image, Painter(), "disc").run("level")["ious"] == [1.0]
    assert bench(image, Painter(), "handle").run("level")["ious"][0] > 0.9


def test_the_nearest_of_the_ten_levels_is_clicked_once_beside_the_own_one(image, monkeypatch):
    asked = []
    render = Painter.render

    def watched(self, encoded, prompt, *args, **options):
        asked.append(prompt.granularity)
        return render(self, encoded, prompt, *args, **options)

    monkeypatch.setattr(Painter, "render", watched)
    measured = bench(image, Painter(), "handle", budget=1)
    row = measured.run("level")
    assert set(asked) == {measured.own, Granularity(1)}
    assert row["nearest"] > 0.9
    assert bench(image, Painter(), "disc").run("level")["nearest"] == 1.0


def test_a_fixed_level_is_the_same_for_every_mask(image):
    levels = (Granularity(10), Granularity(1))
    row = bench(image, Painter(), "handle", fixed_levels=levels, budget=2).run("fixed")["by_level"]
    assert list(row) == ["1.0", "0.1"]
    assert row["0.1"]["ious"][0] > 0.9 > 0.1 > row["1.0"]["ious"][0]


def test_the_oracle_is_the_best_of_the_ten_chains_after_each_click(image):
    options = {"budget": 4, "targets": (0.999,)}
    door = bench(image, Painter(), "door", **options)
    row = door.run("oracle")
    chains = [door.chain(level).run(4) for level in LEVELS]
    assert row["first"] == [chain[0] for chain in chains]
    assert row["ious"] == [max(at) for at in zip(*chains, strict=True)]


def test_the_oracle_asks_no_more_once_a_level_is_there(image):
    painter = Painter()
    assert bench(image, painter, "disc").run("oracle")["ious"] == [1.0]
    assert painter.steps == 1, "and the first click is answered for all levels at once"


def test_protocols_share_the_chains_they_have_in_common(image):
    painter = Painter()
    disc_bench = bench(image, painter, "disc")
    disc_bench.run("oracle")
    before = painter.steps
    disc_bench.run("level")
    disc_bench.run("fixed")
    disc_bench.run("monotone")
    assert painter.steps == before


def test_the_best_of_three_looks_at_the_truth(image):
    row = bench(image, Painter(), "disc").run("base-oracle3")
    assert len(row["ious"]) == 3
    assert max(row["ious"]) == row["ious"][2]


def test_all_levels_are_held_against_all_true_masks_under_the_click(image):
    row = bench(image, Painter(), "handle").run("levels")
    assert row["truths"] == 2, "the handle and the door around it"
    assert row["offered"] == 3
    assert 0 < row["ours"] < 1
    assert row["ours"] == row["three"]
    alone = bench(image, Painter(), "disc", support=2).run("levels")
    assert alone["truths"] == 1, "the mask itself is always among them"


def test_one_random_click_serves_phrase_level_and_base(image):
    row = bench(image, Painter(), "disc").run("phrase")
    assert row["phrase"] == row["base"], "the painter does not listen to words"
    assert row["unknown"] == [0.0, 0.0], "and refuses some"
    assert bench(image, Painter(), "disc", seed=1).run("phrase")["level"] != row["level"]


def test_areas_are_taken_level_by_level_and_objects_with_parts_are_known(image):
    row = bench(image, Painter(), "door").run("monotone")
    assert row["has_parts"]
    assert row["areas"] == sorted(row["areas"])
    assert len(row["areas"]) == 10
    assert not bench(image, Painter(), "disc").run("monotone")["has_parts"]


def test_seconds_are_taken_in_pairs(image):
    row = bench(image, Painter(), "disc").run("time")
    assert len(row["base_step_s"]) == len(row["adapted_step_s"]) == len(row["adapted_click_s"])
    assert all(click >= step >= 0 for step, click in zip(row["base_step_s"], row["base_click_s"], strict=True))


@given(st.integers(0, 2**20 - 1).filter(bool), st.text(max_size=20))
def test_a_random_click_lies_in_the_mask_and_is_the_same_for_the_same_seed(bits, seed):
    truth = np.array([bits >> i & 1 for i in range(20)], bool).reshape(4, 5)
    click = random_click(truth, seed)
    assert truth[int(click.y), int(click.x)]
    assert click.positive
    assert click == random_click(truth, seed)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"budget": 0}, "budget"),
        ({"targets": ()}, "target"),
        ({"targets": (1.5,)}, "target"),
        ({"fixed_levels": ()}, "level"),
    ],
)
def test_options_that_make_no_sense_are_refused(wrong, word):
    with pytest.raises(Refusal, match=word):
        Options(**wrong)


def test_every_protocol_measures_the_bundled_model(image, segmenter):
    measured = bench(image, segmenter, "disc", budget=2)
    rows = {protocol: measured.run(protocol) for protocol in PROTOCOLS}
    assert rows["base"]["ious"][0] > 0.9
    assert max(rows["base-oracle3"]["ious"]) >= rows["base"]["ious"][0]
    assert rows["oracle"]["ious"][0] >= rows["level"]["ious"][0]
    assert rows["oracle"]["ious"][0] == max(rows["oracle"]["first"])
    best = predict(segmenter, measured.scene.encoded, Prompt(clicks=(measured.first,))).best
    assert rows["curve"]["base"][0] == pytest.approx(iou(best.mask, measured.truth), abs=1e-6)


def test_a_chain_that_shares_its_opening_gives_the_answers_of_a_cold_replay(image, segmenter):
    measured = bench(image, segmenter, "door")
    measured.run("monotone")
    for level in (Granularity(2), Granularity(9), None):
        clicks, mask, ious = (), np.zeros_like(measured.truth), []
        for _ in range(3):
            clicks = (*clicks, next_click(measured.truth, mask, clicks))
            mask = predict(segmenter, measured.scene.encoded, Prompt(clicks=clicks, granularity=level)).best.mask
            ious.append(round(iou(mask, measured.truth), 6))
        assert measured.chain(level).run(3) == ious
