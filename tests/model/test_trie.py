"""Levels between parts and their whole."""

import numpy as np
import pytest

from model.annotations import AnnotatedMask, encode, read_annotations
from model.metrics import iou
from model.trie import merge_siblings, plural, shortened
from tests.model.striped import flag


def mask_of(id_: int, name: str, pixels: np.ndarray, parent: int | None = 1) -> AnnotatedMask:
    return AnnotatedMask(
        id=id_,
        image_id=7,
        name=name,
        level="object" if parent is None else "part",
        parent_id=parent,
        origin="human",
        area=int(pixels.sum()),
        segmentation=encode(pixels),
    )


def car(*parts: str) -> list[AnnotatedMask]:
    """A car whose parts stand apart, one column each."""
    pixels = np.zeros((60, 120), np.bool_)
    pixels[5:55, 5:115] = True
    masks = [mask_of(1, "car", pixels, None)]
    for place, name in enumerate(parts):
        part = np.zeros_like(pixels)
        part[10:50, 8 + 14 * place : 14 + 14 * place] = True
        masks.append(mask_of(place + 2, name, part))
    return masks


def named(masks: tuple[AnnotatedMask, ...]) -> dict[str, set[str]]:
    """Names of merged masks, and of what each holds."""
    return {m.name: {o.name for o in masks if o.parent_id == m.id} for m in masks if m.origin == "proposal-trie"}


def test_left_and_right_become_the_plural():
    found = merge_siblings(car("left wheel", "right wheel", "hood"), following=50)
    assert named(found) == {"wheels": {"left wheel", "right wheel"}}
    wheels = found[-1]
    assert (wheels.id, wheels.parent_id, wheels.level, wheels.image_id) == (50, 1, "part", 7)
    np.testing.assert_array_equal(wheels.mask(), found[1].mask() | found[2].mask())


def test_modifiers_go_one_by_one():
    found = merge_siblings(car("front left door", "back left door", "front right door", "back right door"), following=9)
    assert named(found) == {
        "left doors": {"front left door", "back left door"},
        "right doors": {"front right door", "back right door"},
        "doors": {"left doors", "right doors"},
    }


def test_numbers_and_equal_names_merge_and_regions_without_a_name_do_not():
    assert named(merge_siblings(car("leg 1", "leg 2"), following=9)) == {"legs": {"leg 1", "leg 2"}}
    assert named(merge_siblings(car("wheel", "wheel"), following=9)) == {"wheels": {"wheel"}}
    assert named(merge_siblings(car("region", "region", "", ""), following=9)) == {}


def test_touching_siblings_grow_together_up_to_the_whole_the_smallest_union_first():
    masks = [
        mask_of(1, "flag", flag(), None),
        mask_of(2, "red", flag(0, 0)),
        mask_of(3, "white", flag(1, 1)),
        mask_of(4, "blue", flag(2, 3)),
    ]
    found = merge_siblings(masks, following=5)
    assert len(found) == 5, "red with white; with blue they would be the flag"
    level = found[-1]
    assert (level.name, level.parent_id) == ("", 1)
    np.testing.assert_array_equal(level.mask(), flag(0, 1))
    assert [m.parent_id for m in found[1:4]] == [5, 5, 1]


def test_subparts_merge_below_their_part():
    masks = [
        mask_of(1, "flag", flag(), None),
        mask_of(2, "band", flag(0, 2)),
        mask_of(3, "a", flag(0, 0), 2),
        mask_of(4, "b", flag(1, 1), 2),
        mask_of(5, "c", flag(2, 2), 2),
    ]
    level = merge_siblings(masks, following=6)[-1]
    assert (level.level, level.parent_id) == ("subpart", 2)


def test_what_is_there_already_is_not_made_again_and_orphans_are_no_siblings():
    masks = [*car("left wheel", "right wheel"), mask_of(8, "pair", car("x", "y")[1].mask() | car("x", "y")[2].mask())]
    assert named(merge_siblings(masks, following=9)) == {}
    orphans = [mask_of(2, "left wheel", flag(0, 0), 99), mask_of(3, "right wheel", flag(1, 1), 99)]
    assert merge_siblings(orphans, following=9) == tuple(orphans)


def test_siblings_outside_their_whole_make_no_level_and_those_partly_in_it_do():
    def merged(*columns: int) -> tuple[AnnotatedMask, ...]:
        car_, *wheels = car("left wheel", "right wheel")
        for place, column in enumerate(columns):
            pixels = np.zeros((60, 120), np.bool_)
            pixels[10:50, column : column + 3] = True  # the car begins at column 5
            wheels[place] = mask_of(place + 2, wheels[place].name, pixels)
        return merge_siblings([car_, *wheels], following=9)

    assert named(merged(0, 117)) == {}
    assert [mask.parent_id for mask in merged(0, 117)] == [None, 1, 1]
    assert named(merged(0, 20)) == {"wheels": {"left wheel", "right wheel"}}
    masks = [
        *(mask_of(1, "flag", flag(0, 1), None), mask_of(2, "band", flag(2, 3))),  # a part drawn outside its object
        *(mask_of(3, "left pole", flag(2, 2), 2), mask_of(4, "right pole", flag(3, 3) & (np.arange(120) > 90), 2)),
    ]
    assert merge_siblings(masks, following=9) == tuple(masks)


@pytest.mark.parametrize(
    ("one", "many"),
    [
        *(("glass", "glasses"), ("leg", "legs"), ("skin", "skin"), ("hair", "hair"), ("glasses", "glasses")),
        *(
            ("shoes", "shoes"),
            ("left mirror", "left mirrors"),
            ("watch", "watches"),
            ("body", "bodies"),
            ("bus", "buses"),
        ),
        *(("scarf", "scarves"), ("foot", "feet"), ("people", "people"), ("", "")),
    ],
)
def test_plurals(one, many):
    assert plural(one) == many


def test_a_name_that_is_only_a_modifier_stays():
    assert shortened("left") is shortened("7") is shortened("") is None


def test_levels_of_real_cars_keep_the_tree_sound(shared):
    for image in read_annotations(shared / "data" / "car-parts", split="val").images[:10]:
        found = merge_siblings(image.masks, following=10**6)
        by_id = {mask.id: mask for mask in found}
        assert len(by_id) == len(found)
        made = [mask for mask in found if mask.origin == "proposal-trie"]
        for mask in made:
            assert mask.parent_id in by_id
            others = [other for other in found if other is not mask]
            assert all(iou(mask.mask(), other.mask()) <= 0.95 for other in others)
        for mask in image.masks:
            root = by_id[mask.id]
            while root.parent_id is not None:
                root = by_id[root.parent_id]
            assert root.id == image.whole(mask).id
