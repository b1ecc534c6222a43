"""The levels between parts and their whole: sibling parts merged by their names, then by touch.

Names make a tree when they are read from the end and their modifiers are taken away one by one: `front left door` and
`back left door` are `left doors`, these and `right doors` are `doors`. What is left then grows together: of the
siblings that touch, the two that make the smallest union merge, again and again, into levels without a name, up to the
whole.

Source: the multi-grained mask trie of GraCo (README of 2025-01); the rules are our own.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from model.annotations import AnnotatedMask, Level, encode, whole_of
from model.metrics import iou
from model.types import Mask

ORIGIN = "proposal-trie"

_MODIFIERS = {"front", "back", "rear", "left", "right", "upper", "lower", "top", "bottom", "inner", "outer", "middle"}
_UNCOUNTED = {"skin", "hair", "fur", "clothing", "footwear", "headwear", "grass", "sky", "water", "foliage", "sheep"}
_IRREGULAR = {
    **{"person": "people", "foot": "feet", "tooth": "teeth", "child": "children", "man": "men", "woman": "women"},
    **{"scarf": "scarves", "knife": "knives", "leaf": "leaves", "shelf": "shelves", "hoof": "hooves", "calf": "calves"},
}
_SINGULAR_IN_S = {"bus", "lens", "gas", "iris", "canvas", "torus", "cactus", "walrus"}
_Join = Callable[[Sequence["_Node"], str, int], "_Node"]  # several nodes, the name and strips of the one they make


@dataclass(slots=True, eq=False)
class _Node:
    """A group of siblings that counts as one: made of the masks `members`, or itself the only one."""

    mask: Mask
    members: list[int]  # ids whose parent changes when the group gets an id of its own
    name: str
    strips: int  # modifiers that can still be taken off the name


def plural(name: str) -> str:
    """Return the plural of a name: of its last word, which stays as it is when it is one already or has none.

    >>> [plural(name) for name in ("left wheel", "glass", "leg", "skin", "shoes", "body", "scarf", "foot")]
    ['left wheels', 'glasses', 'legs', 'skin', 'shoes', 'bodies', 'scarves', 'feet']
    """
    before, space, word = name.rpartition(" ")
    if word in _UNCOUNTED:
        return name
    if word in _IRREGULAR:
        word = _IRREGULAR[word]
    elif word in _SINGULAR_IN_S or re.search(r"(ss|x|z|ch|sh)$", word):
        word += "es"
    elif re.search(r"[^aeiou]y$", word):
        word = word[:-1] + "ies"
    elif word and not word.endswith("s") and word not in _IRREGULAR.values():
        word += "s"
    return before + space + word


def shortened(name: str) -> str | None:
    """Return a name without its trailing number, or else without its first modifier; None where nothing can go.

    >>> shortened("front left door 2"), shortened("front left door"), shortened("left door"), shortened("door")
    ('front left door', 'left door', 'door', None)
    """
    words = name.split()
    if len(words) > 1 and words[-1].isdigit():
        return " ".join(words[:-1])
    if len(words) > 1 and words[0] in _MODIFIERS:
        return " ".join(words[1:])
    return None


def merge_siblings(
    masks: Sequence[AnnotatedMask], *, following: int, gap: int = 2, most_iou: float = 0.95
) -> tuple[AnnotatedMask, ...]:
    """Return the masks of an image with the levels between siblings and their parent added, parents brought up to date.

    A level that would repeat a mask of the image, be no smaller than the parent, or lie outside its whole is not made.
    Masks without a parent in the image are no siblings.

    Args:
        masks: all masks of one image.
        following: the id of the first new mask; the others count on.
        gap: pixels between two masks that still touch.
        most_iou: IoU above which two masks are the same.
    """
    pixels = {mask.id: mask.mask() for mask in masks}
    found = {mask.id: mask for mask in masks}
    wholes = {mask.id: pixels[whole_of(mask, found).id] for mask in masks}
    for parent in masks:
        siblings = [mask for mask in masks if mask.parent_id == parent.id and mask.id != parent.id]
        if len(siblings) < 2:
            continue

        def join(group: Sequence[_Node], name: str, strips: int, parent: AnnotatedMask = parent) -> _Node:
            """Return one node of several; it becomes a mask of the image unless there is such a one."""
            nonlocal following
            union: Mask = np.logical_or.reduce([node.mask for node in group])
            members = [member for node in group for member in node.members]
            larger = np.count_nonzero(union) >= parent.area  # siblings may reach out of their parent
            outside = not (union & wholes[parent.id]).any()  # nobody can say how fine it is
            if larger or outside or any(iou(union, other) > most_iou for other in pixels.values()):
                return _Node(union, members, name, strips)
            level: Level = "part" if parent.level == "object" else "subpart"
            found[following] = AnnotatedMask(
                id=following,
                image_id=parent.image_id,
                name=plural(name) if name else "",
                level=level,
                parent_id=parent.id,
                origin=ORIGIN,
                area=int(np.count_nonzero(union)),
                segmentation=encode(union),
            )
            pixels[following] = union
            for member in members:
                found[member] = replace(found[member], parent_id=following)
            following += 1
            return _Node(union, [following - 1], name, strips)

        nodes = _by_name([_Node(pixels[m.id], [m.id], m.name, _strips(m.name)) for m in siblings], join)
        _by_touch(nodes, gap, join)
    return tuple(found.values())


def _strips(name: str) -> int:
    count = 0
    while (shorter := shortened(name)) is not None:
        name, count = shorter, count + 1
    return count


def _by_name(nodes: list[_Node], join: _Join) -> list[_Node]:
    """Merge nodes of one name, longest names first, each then losing a modifier."""
    for strips in range(max(node.strips for node in nodes), -1, -1):
        groups: dict[str, list[_Node]] = {}
        others = [node for node in nodes if node.strips != strips or node.name in ("", "region")]
        for node in nodes:
            if node not in others:
                groups.setdefault(node.name, []).append(node)
        merged = [group[0] if len(group) == 1 else join(group, name, strips) for name, group in groups.items()]
        for node in merged:
            node.name, node.strips = shortened(node.name) or node.name, max(0, strips - 1)
        nodes = others + merged
    return nodes


def _by_touch(nodes: Sequence[_Node], gap: int, join: _Join) -> None:
    """Merge touching nodes two by two, the smallest union first, until none touch."""
    kernel = np.ones((gap * 2 + 1, gap * 2 + 1), np.uint8)
    alive: dict[int, _Node] = {}
    pairs: list[tuple[int, int, int]] = []  # pixels of the union, and the numbers of both nodes

    def add(number: int, node: _Node) -> None:
        grown = cv2.dilate(node.mask.astype(np.uint8), kernel).astype(np.bool_)
        for other, there in alive.items():
            if (grown & there.mask).any():
                heapq.heappush(pairs, (int(np.count_nonzero(node.mask | there.mask)), other, number))
        alive[number] = node

    for number, node in enumerate(nodes):
        add(number, node)
    following = len(nodes)
    while pairs:
        _, one, other = heapq.heappop(pairs)
        if one in alive and other in alive:
            add(following, join((alive.pop(one), alive.pop(other)), "", 0))
            following += 1
