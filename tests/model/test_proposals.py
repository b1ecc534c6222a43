"""Masks of a whole image."""

from model.metrics import iou
from model.proposals import whole_image


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
