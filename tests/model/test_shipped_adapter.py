"""The adapter that ships: where it comes from, and that it does what the README says, on photos of the val splits."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from model.adapter import read_adapter
from model.annotations import AnnotatedImage, AnnotatedMask, read_annotations
from model.evaluation.protocol import Bench, Models, Options, Scene
from model.metrics import iou
from model.robot import next_click
from model.segmenter import Encoded, Segmenter, digest_of, predict
from model.types import Granularity, Prompt
from tests.conftest import WEIGHTS

ADAPTER = WEIGHTS.with_name("light-granularity.safetensors")
CARD = ADAPTER.with_suffix(".md")
MAY_SHIP = {"ccp-person-clothing", "coco-mval", "coco128-seg"}

Case = tuple[AnnotatedImage, AnnotatedMask, Encoded, Prompt]


@pytest.fixture(scope="module")
def shipped(segmenter: Segmenter) -> Segmenter:
    return segmenter.with_adapter(ADAPTER)


def cases_of(source: Path, segmenter: Segmenter, level: str, count: int) -> list[Case]:
    """Return evenly spread masks, each with its encoded photo and a click in its middle."""
    images = read_annotations(source, split="val").images
    found = [(image, next(m for m in image.masks if m.level == level)) for image in images[:: len(images) // count]]
    cases = []
    for image, mask in found[:count]:
        click = next_click(mask.mask(), np.zeros((image.height, image.width), bool))
        assert click is not None
        cases.append((image, mask, segmenter.encode(image.pixels()), Prompt(clicks=(click,))))
    return cases


@pytest.fixture(scope="module")
def parts(shared: Path, segmenter: Segmenter) -> list[Case]:
    return cases_of(shared / "data" / "ccp-person-clothing", segmenter, "part", 12)


def with_level(prompt: Prompt, level: int) -> Prompt:
    return Prompt(clicks=prompt.clicks, granularity=Granularity(level))


def test_it_was_trained_on_the_bundled_base_and_only_on_data_that_may_ship():
    card = read_adapter(ADAPTER, base=digest_of(WEIGHTS.read_bytes())).card
    assert {part["path"] for part in card["sets"]} <= MAY_SHIP
    assert {part["split"] for part in card["sets"]} == {"train"}
    assert {"person", "shoes", "car", "dog"} <= set(card["vocabulary"])


def test_its_card_names_the_file_that_is_there():
    assert digest_of(ADAPTER.read_bytes()) in CARD.read_text()


def test_a_part_is_found_at_its_own_level_where_the_base_takes_too_much(parts, shipped):
    base, level = [], []
    for image, mask, encoded, prompt in parts:
        base.append(iou(predict(shipped, encoded, prompt).best.mask, mask.mask()))
        asked = with_level(prompt, image.level_of(mask).level)
        level.append(iou(predict(shipped, encoded, asked).best.mask, mask.mask()))
    assert np.mean(level) > np.mean(base) + 0.15, (np.mean(base), np.mean(level))


def test_the_mask_grows_from_level_to_level(parts, shipped):
    steps = []
    for _, _, encoded, prompt in parts:
        areas = [predict(shipped, encoded, with_level(prompt, n)).best.mask.sum() for n in range(1, 11)]
        steps += [b >= 0.99 * a for a, b in itertools.pairwise(areas)]
    assert np.mean(steps) >= 0.95


def test_the_name_of_a_part_finds_it(parts, shipped):
    base, named = [], []
    for _, mask, encoded, prompt in parts:
        base.append(iou(predict(shipped, encoded, prompt).best.mask, mask.mask()))
        asked = Prompt(clicks=prompt.clicks, phrase=mask.name)
        named.append(iou(predict(shipped, encoded, asked).best.mask, mask.mask()))
    # a guard against regressions; what the issue wants (+0.33) is not reached: docs/benchmarks.md
    assert np.mean(named) > np.mean(base) + 0.10, (np.mean(base), np.mean(named))


def test_all_levels_of_a_click_show_more_of_what_people_drew_than_the_bases_three_masks(shared, segmenter, shipped):
    models, options = Models(base=segmenter, adapted=shipped), Options(support=2)
    gains, expected, true = [], [], []
    for image, mask, encoded, _ in cases_of(shared / "data" / "bsds500-granularity", segmenter, "part", 12):
        scene = Scene(set_name="bsds500-granularity", image=image, encoded=encoded, pixels=image.pixels)
        row = Bench(models, scene, mask, options).run("levels")
        gains.append(row["ours"] - row["three"])
        expected += row["scores"]
        true += row["best"]
    assert np.mean(gains) > 0.03, gains
    assert abs(np.mean(expected) - np.mean(true)) < 0.2, (np.mean(expected), np.mean(true))


def test_a_word_for_a_part_gives_less_than_the_whole_and_an_unknown_one_changes_nothing(parts, shipped):
    _, _, encoded, prompt = parts[0]
    plain = predict(shipped, encoded, prompt).best
    for phrase in ("qwertyuiop", "自転車", "🚲", " "):
        np.testing.assert_array_equal(
            predict(shipped, encoded, Prompt(clicks=prompt.clicks, phrase=phrase)).best.mask, plain.mask
        )
    part = predict(shipped, encoded, Prompt(clicks=prompt.clicks, phrase="wheel")).best
    assert part.granularity == Granularity(2)
    assert part.mask.sum() < predict(shipped, encoded, with_level(prompt, 10)).best.mask.sum()
