"""Masks that nobody drew: of a whole image, and of the parts of an object."""

import numpy as np
import pytest
from scipy import ndimage

from model.metrics import iou
from model.proposals import GeneratorOptions, generate, whole_image
from model.segmenter import Encoded
from model.types import Refusal
from tests.model.striped import HEIGHT, STRIPES, WIDTH, Striped, flag


@pytest.fixture
def encoded() -> Encoded:
    return Striped().encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8))


def test_the_things_of_a_scene_are_found_without_a_click_best_first(segmenter, scene):
    found = whole_image(segmenter, segmenter.encode(scene), grid=5)
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)
    assert any(p.mask[220, 200] and not p.mask[220, 490] for p in found), "the disc is among them"
    for i, one in enumerate(found):
        assert all(iou(one.mask, other.mask) <= 0.7 for other in found[:i])


def test_the_search_stops_when_told_to(segmenter, scene):
    asked = []
    found = whole_image(segmenter, segmenter.encode(scene), until=lambda: asked.append(1) or len(asked) > 2)
    assert len(asked) >= 3
    assert len(found) <= 2


def test_objects_are_found_as_the_largest_of_the_decoders_masks_but_never_the_background(segmenter, scene):
    found = whole_image(
        segmenter, segmenter.encode(scene), grid=5, largest=True, least_of_image=0.01, most_of_image=0.9
    )
    assert any(p.mask[220, 200] and not p.mask[220, 490] for p in found), "the disc is among them"
    assert all(0.01 <= p.mask.mean() <= 0.9 for p in found)


def test_negative_clicks_take_an_object_apart(encoded):
    options = GeneratorOptions(sources=("agg",), points=4, walks=4, per_object=20)
    found = generate(Striped(), encoded, flag(), np.random.default_rng(0), options)
    assert any(iou(one.mask, flag(0, 0)) > 0.9 or iou(one.mask, flag(3, 3)) > 0.9 for one in found)
    assert {one.origin for one in found} == {"proposal-agg"}


def test_proposals_lie_in_the_object_in_one_piece_all_different_small_to_large(encoded):
    options = GeneratorOptions(sources=("agg", "decoder", "grid"), points=4, walks=4, per_object=20)
    found = generate(Striped(), encoded, flag(), np.random.default_rng(1), options)
    assert len(found) >= STRIPES
    areas = [int(one.mask.sum()) for one in found]
    assert areas == sorted(areas)
    for place, one in enumerate(found):
        assert not (one.mask & ~flag()).any()
        assert ndimage.label(one.mask)[1] == 1
        assert 0 < one.granularity < 1
        assert iou(one.mask, flag()) <= options.most_iou_with_object
        assert all(iou(one.mask, other.mask) <= options.most_iou for other in found[:place])


def test_the_decoders_masks_at_one_click_are_offered_but_the_object_itself(encoded):
    options = GeneratorOptions(sources=("decoder",), points=1)
    found = generate(Striped(), encoded, flag(), np.random.default_rng(0), options)
    assert [int(one.mask.sum()) for one in found] == [int(flag(0, 0).sum()), int(flag(0, 1).sum())]


def test_a_mask_is_cut_to_the_object_and_one_mostly_of_another_object_is_left_out(encoded):
    options = GeneratorOptions(sources=("decoder",), points=1, most_iou_with_object=1.0)
    half = generate(Striped(), encoded, flag(0, 2), np.random.default_rng(0), options)
    assert any(iou(one.mask, flag(0, 2)) == 1 for one in half), "three quarters of the flag lie inside"
    stripe = generate(Striped(), encoded, flag(0, 0), np.random.default_rng(0), options)
    assert [int(one.mask.sum()) for one in stripe] == [int(flag(0, 0).sum())], (
        "the stripe; its half and the flag are not"
    )


def test_holes_are_filled_and_other_pieces_dropped(encoded):
    class Pierced(Striped):
        def step(self, encoded, prompt, state):
            mask = flag(0, 1)
            mask[20:24, 40:44] = False
            mask[15:20, 90:95] = True
            return (mask,)

    options = GeneratorOptions(sources=("decoder",), points=1)
    (found,) = generate(Pierced(), encoded, flag(), np.random.default_rng(0), options)[:1]
    np.testing.assert_array_equal(found.mask, flag(0, 1))


def test_masks_that_are_known_or_tiny_or_doubted_are_not_offered(encoded):
    def found(**changes) -> int:
        options = GeneratorOptions(sources=("decoder",), points=1, **changes)
        return len(generate(Striped(), encoded, flag(), np.random.default_rng(0), options))

    assert found() == 2
    assert found(least_of_object=0.3) == found(least_of_image=0.2) == found(least_score=0.9) + 1 == 1
    options = GeneratorOptions(sources=("decoder",), points=1)
    assert len(generate(Striped(), encoded, flag(), np.random.default_rng(0), options, known=[flag(1, 1)])) == 1


def test_clicks_keep_their_distance(encoded):
    seen = []

    class Watched(Striped):
        def step(self, encoded, prompt, state):
            seen.append(prompt.clicks)
            return super().step(encoded, prompt, state)

    options = GeneratorOptions(sources=("agg",), distance=0.3)
    generate(Watched(), encoded, flag(), np.random.default_rng(2), options)
    clicks = max(seen, key=len)
    assert 4 <= len(clicks) <= 7
    assert [click.positive for click in clicks] == [True, *[False] * (len(clicks) - 1)]
    least = 0.3 * flag(0, 0).sum() ** 0.5  # of the smallest mask there can be
    for place, one in enumerate(clicks):
        assert all((one.x - other.x) ** 2 + (one.y - other.y) ** 2 > least**2 for other in clicks[:place])


def test_the_same_seed_gives_the_same_masks_of_the_bundled_model(segmenter, scene):
    encoded = segmenter.encode(scene)
    y, x = np.mgrid[:480, :640]
    door = (x >= 420) & (x <= 560) & (y >= 100) & (y <= 400)
    one, other = (generate(segmenter, encoded, door, np.random.default_rng(5)) for _ in range(2))
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)
        assert (a.score, a.granularity, a.origin) == (b.score, b.granularity, b.origin)


def test_an_empty_object_and_options_that_mean_nothing_are_refused(encoded):
    with pytest.raises(Refusal, match="no pixel"):
        generate(Striped(), encoded, np.zeros((HEIGHT, WIDTH), np.bool_), np.random.default_rng(0))
    for changes in ({"sources": ()}, {"sources": ("magic",)}, {"points": 0}, {"walks": 3}, {"least_negatives": 7}):
        with pytest.raises(Refusal):
            GeneratorOptions(**changes)
