"""Label Studio's JSON to our types and back; pure, and the only place where percent exists.

A request's `context.result` lists, for every click still pending, one result per tag that sits on it: results with one
`id` are one click, the order of ids is the order of clicks, and the last one is the newest. Answers are results too:
the mask first, then what else belongs to the same region under the same id.

Source: requests recorded from Label Studio 1.23.2 (tests/golden/label_studio) and its editor
(stores/Annotation/Annotation.js, regions/*.jsx).
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import cos, isfinite, nextafter, radians, sin
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from active_learning.corrections import Kind
from ml_backend import brush, outlines
from ml_backend.answers import Answer
from ml_backend.label_config import (
    DATA_PATH,
    OUTPUT_KINDS,
    ImageTag,
    LabelConfig,
    LevelTag,
    OutputKind,
    OutputTag,
    PromptKind,
    Usual,
)
from model.types import MAX_PHRASE, Box, Click, Granularity, Mask, Prompt, Refusal

if TYPE_CHECKING:  # who serves clicks shall not hold pycocotools and scipy in memory
    from model.annotations import Rle

Json = dict[str, Any]
LevelSource = Literal["number", "label", "attribute", "draft"]

MAX_SIDE = 100_000
"""Largest width and height of an image taken for one, in pixels."""
PERCENT_TOLERANCE = 0.5
"""How far a click may lie outside the image, in percent of its side, and still be moved onto its border."""

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 60
_brief.maxlist = _brief.maxdict = 4
_brief.maxlevel = 2
_DECIMALS = 4  # of percent: a tenth of a pixel in an image of MAX_SIDE
_WITH_MASK = (*OUTPUT_KINDS, "ellipse")
_ELLIPSE = ("x", "y", "radiusX", "radiusY")
_CHANGED: dict[Kind, Kind] = {"accepted": "corrected", "predicted": "predicted-changed"}
_OTHER_REGIONS = ("brush", "bitmask", "polygon", "ellipse", "vector")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one request asks for, and all that its answer has to name."""

    prompt: Prompt  # pixels of an image of width x height
    width: int  # pixels, of the original image
    height: int
    to_name: str  # the image tag
    uri: str  # the image, as the task's data name it
    task_id: int | None = None
    item_index: int | None = None  # page of a value list
    class_label: str | None = None
    click_ids: tuple[str, ...] = ()  # clicks in order, then the box
    prompt_type: PromptKind | None = None  # of the newest; None: a whole image, nothing was clicked
    level: float | None = None  # granularity exactly as given, 0..1
    level_source: LevelSource | None = None
    level_label: str | None = None  # the label that gave it
    all_levels: bool = False  # every level is asked for, by a label of its own
    usual: Usual | None = None  # what a click without a level gets, where the project says so

    @property
    def phrase(self) -> str | None:
        """What was typed beside the clicks."""
        return self.prompt.phrase


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAsk:
    """One image of a task that nobody clicked in. Unpacks as `to_name, uri`."""

    to_name: str
    uri: str
    task_id: int | None = None
    item_index: int | None = None

    def __iter__(self) -> Iterator[str]:
        return iter((self.to_name, self.uri))

    def sized(self, width: int, height: int) -> Ask:
        """Return it as an ask with an empty prompt, to write regions for."""
        return Ask(
            prompt=Prompt(),
            width=width,
            height=height,
            to_name=self.to_name,
            uri=self.uri,
            task_id=self.task_id,
            item_index=self.item_index,
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SubmittedRegion:
    """One region of a submitted annotation that holds a mask: all of a correction but which image it is on."""

    region: str
    uri: str  # the image, as the task's data name it
    height: int  # pixels
    width: int
    mask: Rle
    label: str  # class; empty if it has none
    granularity: float | None  # 0..1; None: unknown
    phrase: str | None
    clicks: tuple[Click, ...]
    kind: Kind
    proposed: Rle | None  # what we answered, where that is remembered
    adapter: str | None  # that answered


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Submitted:
    """A submitted annotation."""

    project: str
    annotation: int
    task: int | None
    annotator: int | None
    ground_truth: bool
    skipped: bool  # by the annotator: the regions are unfinished
    updated_s: float  # UTC
    regions: tuple[SubmittedRegion, ...]
    left_out: tuple[tuple[str, str], ...]  # region ids, each with the reason


# --- reading ---


def read_ask(config: LabelConfig, task: Json, context: Json | None) -> Ask | None:
    """Return what was asked for, or None when nothing was clicked.

    Clicks count when they lie on the image (and page) of the newest one. Granularity: the newest click's per-region
    number, else its level label, else those of older clicks, newest first, else the `graco` attribute of a click's
    label, else the per-task number of the newest draft. A level label that asks for all levels is one of them, and
    leaves the granularity out.

    Raises:
        Refusal: the request cannot be understood, names what the configuration or the task lacks, or holds too much.
    """
    by_hand = {tag.name for tag in config.outputs} - {tag.name for tag in config.prompts}
    pending = [group for group in _groups(context) if group.kind is not None and _from(group.anchor) not in by_hand]
    if not pending:
        drawn = context.get("result") if isinstance(context, dict) else None
        if drawn:
            kinds = sorted({_type(item) or "?" for item in drawn if isinstance(item, dict)})
            raise Refusal(
                f"none of the regions sent is a click or a box (they are {_shown(kinds)}); use a smart KeyPointLabels "
                'or RectangleLabels tag, and set smart="false" on all others, BrushLabels above all'
            )
        return None
    newest = pending[-1]
    image = config.image(newest.to_name)
    if image is None:
        raise Refusal(
            f"a click lies on {_shown(newest.to_name)}, but the labelling configuration has no <Image> of that name "
            f"(it has {', '.join(repr(tag.name) for tag in config.images)}); reload the page in Label Studio"
        )
    groups = [g for g in pending if (g.to_name, g.item_index) == (newest.to_name, newest.item_index)]
    width, height = _size(newest)
    clicks = [group for group in groups if group.kind == "keypoint"]
    boxes = [group for group in groups if group.kind == "rectangle"][-1:]
    level, levels = _level(config, groups, task), config.level_tag(newest.to_name)
    return Ask(
        prompt=Prompt(
            clicks=tuple(_click(group, width, height) for group in clicks),
            box=_box(boxes[0], width, height) if boxes else None,
            granularity=_granularity(level),
            phrase=_phrase(config, groups),
        ),
        width=width,
        height=height,
        to_name=newest.to_name,
        uri=_uri(image, task, newest.item_index),
        task_id=_task_id(task),
        item_index=newest.item_index,
        class_label=_class_label(config, groups),
        click_ids=tuple(group.id for group in (*clicks, *boxes)),
        prompt_type=newest.kind,
        level=level.value,
        level_source=level.source,
        level_label=level.label,
        all_levels=level.label is not None and level.value is None,
        usual=None if levels is None else levels.usual,
    )


def read_batch(config: LabelConfig, task: Json) -> tuple[BatchAsk, ...]:
    """Return the images of a task in the order of their tags, every page of a value list.

    Raises:
        Refusal: the task's data hold none of them.
    """
    found: list[BatchAsk] = []
    refused: Refusal | None = None
    for image in config.images:
        try:
            uris = _uris(image, task)
        except Refusal as refusal:
            refused = refused or refusal
            continue
        for index, uri in enumerate(uris):
            item_index = index if image.is_list else None
            found.append(BatchAsk(to_name=image.name, uri=uri, task_id=_task_id(task), item_index=item_index))
    if not found and refused is not None:
        raise refused
    return tuple(found)


def read_corrections(
    annotation: Json,
    task: Json,
    config: LabelConfig,
    project: str,
    find_answer: Callable[[str], Answer | None],
    *,
    received_s: float,
    max_pixels: int,
) -> Submitted:
    """Return what an annotation says of masks: a region for every id that has one.

    Results with one id are one region: a brush, bitmask, polygon, rectangle or ellipse; a line (`<Vector>`) is left
    out. Those that we gave as parts of one proposal (an object behind a pole is two polygons) are one region as long as
    they have one class. Its level is that of the answer it came from, unless its shape was changed and a number tag on
    it says another; else a number or level label of its own, else the per-task number. Its phrase is typed on it, else
    the one that was answered for. A box of a smart tag asks for a mask and is none, unless the image has no other tag.
    Nothing larger than an image of `max_pixels` is ever held.

    Args:
        annotation: as webhooks and the API carry it, with its whole `result`.
        task: its task, with `id` and `data`.
        config: the project's labelling configuration.
        project: its id.
        find_answer: gives what we answered under a region id.
        received_s: UTC; stands for the time of the last change where the annotation names none.
        max_pixels: width x height above which a region is left out.

    Raises:
        Refusal: it is no annotation.
    """
    number = annotation.get("id")
    if not isinstance(number, int) or isinstance(number, bool):
        raise Refusal(f"the annotation has the id {_shown(number)}; expected a whole number")
    results = annotation.get("result")
    groups: dict[str, _Group] = {}
    for item in results if isinstance(results, list) else ():
        if isinstance(item, dict) and isinstance(item.get("id"), str):
            groups.setdefault(item["id"], _Group(item["id"])).items.append(item)
    slider = {"drafts": [{"result": [item for group in groups.values() for item in group.items]}]}
    skipped = annotation.get("was_cancelled") is True
    wholes: dict[tuple[str, str, str, int, int], list[SubmittedRegion]] = {}  # those of one entry make one region
    left_out: list[tuple[str, str]] = []
    for group in () if skipped else groups.values():
        kinds = [_type(item).removesuffix("labels") for item in group.items]
        shape = next((item for item, kind in zip(group.items, kinds, strict=True) if kind in _WITH_MASK), None)
        if shape is None:
            if "vector" in kinds:
                left_out.append((group.id, "it is a line, which has no mask; draw it as a polygon or by brush"))
            continue
        group.anchor = shape
        answer = find_answer(group.id)
        try:
            region = _submitted(config, group, task, slider, answer, max_pixels)
        except Refusal as refusal:
            left_out.append((group.id, str(refusal)))
            continue
        first = group.id if answer is None or answer.parts is None else answer.parts.split()[0]
        wholes.setdefault((first, region.label, region.uri, region.height, region.width), []).append(region)
    return Submitted(
        project=project,
        annotation=number,
        task=_task_id(task) if task else _whole(annotation.get("task")),
        annotator=_whole(annotation.get("completed_by")),
        ground_truth=annotation.get("ground_truth") is True,
        skipped=skipped,
        updated_s=changed_s(annotation) or received_s,
        regions=tuple(_united(parts, first, find_answer) for (first, *_), parts in wholes.items()),
        left_out=tuple(left_out),
    )


def changed_s(annotation: Json) -> float | None:
    """Return when an annotation was last changed, UTC seconds; None where it does not say.

    >>> changed_s({"updated_at": "1970-01-01T00:01:00.5Z"})
    60.5
    """
    for key in ("updated_at", "created_at"):
        given = annotation.get(key)
        try:
            moment = datetime.fromisoformat(given) if isinstance(given, str) else None
            if moment is not None:
                return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            continue
    return None


def pack_shape(value: Json) -> bytes:
    """Return a value's shape in few bytes, to be remembered; `unpack_shape` gives it back."""
    if "rle" in value:
        return b"r" + zlib.compress(bytes(value["rle"]), 1)
    return b"j" + zlib.compress(json.dumps(value).encode(), 1)


def unpack_shape(packed: bytes) -> Json:
    """Return the value that `pack_shape` was given, as far as its shape goes.

    >>> unpack_shape(pack_shape({"rle": [0, 255], "format": "rle"}))
    {'rle': [0, 255]}
    """
    content = zlib.decompress(packed[1:])
    return {"rle": list(content)} if packed[:1] == b"r" else dict(json.loads(content))


def _submitted(
    config: LabelConfig, group: _Group, task: Json, slider: Json, answer: Answer | None, max_pixels: int
) -> SubmittedRegion:
    from model.annotations import encode

    image = config.image(group.to_name)
    if image is None:
        raise Refusal(f"it lies on {_shown(group.to_name)}, and the labelling configuration has no such <Image>")
    own = [tag for tag in config.outputs if tag.to_name == group.to_name]
    asking = {tag.name for tag in own if tag.smart and tag.kind == "rectangle"}
    if _from(group.anchor) in asking and any(tag.name not in asking for tag in own):
        raise Refusal("it is the box of a smart tag, which asks for a mask and is none")
    width, height = _size(group)
    if width * height > max_pixels:
        raise Refusal(f"its image has {width} x {height} pixels; at most {max_pixels} are read")
    value = _value(group.anchor)
    mask = _mask(value, height, width)
    if not mask.any():
        raise Refusal("its mask is empty")
    rle = encode(mask)
    unchanged = answer is not None and shape_digest(value) == answer.digest
    return SubmittedRegion(
        region=group.id,
        uri=_uri(image, task, group.item_index),
        height=height,
        width=width,
        mask=rle,
        label=_class_of(config, group),
        granularity=_level_of(config, group, slider, answer, unchanged=unchanged),
        phrase=_phrase_of(config, group, answer),
        clicks=_clicks(answer),
        kind=_kind(group.anchor.get("origin"), known=answer is not None, unchanged=unchanged),
        proposed=rle if unchanged else _proposed(answer, height, width),
        adapter=None if answer is None else answer.adapter,
    )


def _proposed(answer: Answer | None, height: int, width: int) -> Rle | None:
    from model.annotations import encode

    if answer is None or answer.shape is None:
        return None
    try:
        return encode(_mask(unpack_shape(answer.shape), height, width))
    except (Refusal, ValueError, zlib.error):  # of another size, or damaged
        return None


def _united(
    parts: Sequence[SubmittedRegion], first: str, find_answer: Callable[[str], Answer | None]
) -> SubmittedRegion:
    """Return what came back of one proposal as one region, under the id of its first part that did.

    Args:
        parts: what came back, or a region that is no part of anything.
        first: id of the proposal's first part, or of that region.
        find_answer: gives what we answered under a region id.
    """
    from model.annotations import unite

    one, head = parts[0], find_answer(first)
    ids = head.parts.split() if head is not None and head.parts is not None else []
    if one.region == first and not ids:
        return one
    there = {part.region: part for part in parts}
    shapes = [
        there[part].proposed if part in there else _proposed(find_answer(part), one.height, one.width) for part in ids
    ]
    known = [shape for shape in shapes if shape is not None]
    unchanged = there.keys() == set(ids) and all(part.kind in _CHANGED for part in parts)
    return replace(
        one,
        mask=unite([part.mask for part in parts]),
        kind=one.kind if unchanged else _CHANGED.get(one.kind, one.kind),
        proposed=unite(known) if known and len(known) == len(ids) else None,
    )


def _mask(value: Json, height: int, width: int) -> Mask:
    if "rle" in value:
        return brush.decode(value["rle"], height=height, width=width)
    if "imageDataURL" in value:
        return outlines.from_png_data_url(value["imageDataURL"], height=height, width=width)
    if "points" in value:
        points = value["points"]
        if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise Refusal("its points are no list of [x, y]")
        scaled = [
            (_number(x, "a point's x") / 100 * width, _number(y, "a point's y") / 100 * height) for x, y in points
        ]
        return outlines.from_polygon(scaled, height=height, width=width)
    if "radiusX" in value:
        x, y, across, down = (_number(value.get(key), f"{key} of the ellipse") for key in _ELLIPSE)
        return outlines.from_ellipse(
            (x / 100 * width, y / 100 * height),
            (across / 100 * width, down / 100 * height),
            height=height,
            width=width,
            rotation=_number(value.get("rotation") or 0, "rotation of the ellipse"),
        )
    x, y, w, h = (_number(value.get(key), f"{key} of the rectangle") for key in ("x", "y", "width", "height"))
    left, top = x / 100 * width, y / 100 * height
    return outlines.from_rectangle(
        (left, top, left + w / 100 * width, top + h / 100 * height),
        height=height,
        width=width,
        rotation=_number(value.get("rotation") or 0, "rotation of the rectangle"),
    )


def _class_of(config: LabelConfig, group: _Group) -> str:
    classes = {tag.name for tag in config.classes}
    for item in (group.anchor, *(item for item in group.items if _from(item) in classes)):
        for label in _labels(item):
            return label
    return ""


def _level_of(
    config: LabelConfig, group: _Group, slider: Json, answer: Answer | None, *, unchanged: bool
) -> float | None:
    """Return the answer's own level first: on accepting, the editor puts the click's label in place of ours.

    A number on a region whose shape was changed is the annotator's word on what it is now.
    """
    try:
        level = _level(config, [group], slider)
    except Refusal:
        level = _Level(None, None)
    asked = None if answer is None else answer.granularity
    return level.value if asked is None or (level.source == "number" and not unchanged) else asked


def _phrase_of(config: LabelConfig, group: _Group, answer: Answer | None) -> str | None:
    try:
        typed = _phrase(config, [group])
    except Refusal:
        typed = None
    return typed or (answer.phrase if answer is not None else None)


def _clicks(answer: Answer | None) -> tuple[Click, ...]:
    try:
        given = json.loads(answer.prompt)["clicks"] if answer is not None else ()
        return tuple(Click(x=click["x"], y=click["y"], positive=click["positive"]) for click in given)
    except (ValueError, KeyError, TypeError):
        return ()


def _kind(origin: object, *, known: bool, unchanged: bool) -> Kind:
    """Return what became of a region; a prediction that was stored says so itself, unless we know better."""
    if origin in ("prediction", "prediction-changed"):
        same = unchanged if known else origin == "prediction"
        return "predicted" if same else "predicted-changed"
    if not known:
        return "drawn"
    return "accepted" if unchanged else "corrected"


def _whole(value: object) -> int | None:
    """Return an id, which the API writes as a number or as an object with one."""
    given = value.get("id") if isinstance(value, dict) else value
    return given if isinstance(given, int) and not isinstance(given, bool) else None


def shape_digest(value: Mapping[str, Any]) -> str:
    """Return a digest of a value's shape, whatever its labels: equal for what we wrote and what came back unchanged.

    >>> shape_digest({"rle": [0, 1], "brushlabels": ["Car"]}) == shape_digest({"rle": [0, 1], "labels": ["0.5"]})
    True
    """
    if isinstance(value.get("rle"), list):
        try:
            return hashlib.blake2b(bytes(value["rle"]), digest_size=16).hexdigest()
        except (TypeError, ValueError):  # not bytes as integers: no answer of ours, so any digest will do
            shape: object = value["rle"]
    elif "imageDataURL" in value:
        shape = value["imageDataURL"]
    elif "points" in value:
        shape = _rounded(value["points"])
    else:
        shape = [_rounded(value.get(key, 0)) for key in ("x", "y", "width", "height", "rotation")]
    return hashlib.blake2b(json.dumps(shape, default=str).encode(), digest_size=16).hexdigest()


def _rounded(value: object) -> object:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, _DECIMALS) + 0.0 if isinstance(value, int | float) and abs(value) < 1e9 else value


@dataclass(slots=True)
class _Group:
    """All results of one id."""

    id: str
    items: list[Json] = field(default_factory=list)
    kind: PromptKind | None = None  # what was drawn; None: nothing that asks
    anchor: Json = field(default_factory=dict)  # the result whose value has its position

    @property
    def to_name(self) -> str:
        return str(self.anchor.get("to_name", ""))

    @property
    def item_index(self) -> int | None:
        index = self.anchor.get("item_index")
        if index is None:
            return None
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise Refusal(
                f"region {_shown(self.id)} has the item_index {_shown(index)}; expected a whole number from 0 on"
            )
        return index

    def get(self, key: str) -> object:
        """The key's value in the first result that has it."""
        return next((item[key] for item in self.items if item.get(key) is not None), None)


def _groups(context: Json | None) -> list[_Group]:
    if context is None:
        return []
    if not isinstance(context, dict):
        raise Refusal(f"context is {_shown(context)}; expected an object with a list named result")
    results = context.get("result")
    if results is None:
        return []
    if not isinstance(results, list):
        raise Refusal(f"context.result is {_shown(results)}; expected a list of regions")
    groups: dict[str, _Group] = {}
    for item in results:
        if not isinstance(item, dict):
            raise Refusal(f"context.result holds {_shown(item)}; expected regions, each an object")
        region = item.get("id")
        if region is None:
            if _drawn_as(item) is not None:
                raise Refusal("a click in context.result has no id, so what belongs to it cannot be known; send its id")
            continue
        groups.setdefault(str(region), _Group(str(region))).items.append(item)
    for group in groups.values():
        _find_anchor(group)
    return list(groups.values())


def _find_anchor(group: _Group) -> None:
    """Find out what was drawn, from the result of the drawing tool, or from any other where that was taken off."""
    own = [item for item in group.items if _type(item).removesuffix("labels") in ("keypoint", "rectangle")]
    if not own and any(_type(item).removesuffix("labels") in _OTHER_REGIONS for item in group.items):
        return
    for item in own or group.items:
        kind = _drawn_as(item)
        if kind is not None:
            group.kind, group.anchor = kind, item
            return


def _drawn_as(item: Json) -> PromptKind | None:
    value, kind = item.get("value"), _type(item).removesuffix("labels")
    if kind in ("keypoint", "rectangle") and not isinstance(value, dict):
        raise Refusal(f"region {_shown(item.get('id'))} has the value {_shown(value)}; expected an object with x and y")
    if not isinstance(value, dict) or kind in _OTHER_REGIONS or not ("x" in value or "y" in value):
        return None  # also the keypointlabels of an accepted mask, which have an rle instead
    if kind == "keypoint":
        return "keypoint"
    if kind == "rectangle" or ("width" in value and "height" in value):
        return "rectangle"
    return None if "radiusX" in value else "keypoint"


def _type(item: Json) -> str:
    kind = item.get("type")
    return kind if isinstance(kind, str) else ""


def _from(item: Json) -> str:
    name = item.get("from_name")
    return name if isinstance(name, str) else ""


def _value(item: Json) -> Json:
    value = item.get("value")
    return value if isinstance(value, dict) else {}


def _shown(value: object) -> str:
    return _brief.repr(value)


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refusal(f"{what} is {_shown(value)}; expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if not isfinite(number):
        raise Refusal(f"{what} is {_shown(value)}; expected a finite number")
    return number


def _size(group: _Group) -> tuple[int, int]:
    sides = []
    for name in ("original_width", "original_height"):
        given = group.get(name)
        if given is None:
            raise Refusal(f"region {_shown(group.id)} does not say {name}; send it, as Label Studio's editor does")
        side = _number(given, name)
        if not 1 <= side <= MAX_SIDE or side != int(side):
            raise Refusal(f"{name} is {_shown(given)}; expected whole pixels from 1 to {MAX_SIDE}")
        sides.append(int(side))
    rotation = _number(group.get("image_rotation") or 0, "image_rotation")
    if rotation % 360:
        raise Refusal(
            f"the image is shown rotated by {rotation:g} degrees, and clicks in rotated images are not supported; "
            "rotate it back"
        )
    return sides[0], sides[1]


def _click(group: _Group, width: int, height: int) -> Click:
    positive = group.get("is_positive")
    if positive is None:
        raise Refusal(
            f'click {_shown(group.id)} does not say is_positive; set smart="true" and smartOnly="true" on the '
            "KeyPointLabels tag, so that the editor sends it"
        )
    if not isinstance(positive, bool):
        raise Refusal(f"is_positive of click {_shown(group.id)} is {_shown(positive)}; expected true or false")
    value = _value(group.anchor)
    return Click(
        x=_pixels(value.get("x"), width, f"x of click {_shown(group.id)}"),
        y=_pixels(value.get("y"), height, f"y of click {_shown(group.id)}"),
        positive=positive,
    )


def _pixels(percent: object, side: int, what: str) -> float:
    """Return a position in pixels, within [0, side)."""
    number = _number(percent, what)
    if not -PERCENT_TOLERANCE <= number <= 100 + PERCENT_TOLERANCE:
        raise Refusal(f"{what} is {number:g} percent, outside the image; expected 0 to 100")
    return min(max(0.0, number / 100 * side), nextafter(side, 0))


def _box(group: _Group, width: int, height: int) -> Box:
    """Return the axis-parallel rectangle around a box, which is turned about its first corner, cut to the image."""
    value, what = _value(group.anchor), f"of box {_shown(group.id)}"
    x, y = (_number(value.get(key), f"{key} {what}") for key in ("x", "y"))
    w, h = (_number(value.get(key), f"{key} {what}") for key in ("width", "height"))
    turn = radians(_number(value.get("rotation") or 0, f"rotation {what}"))
    if not turn:  # a turned box may have its first corner outside
        _pixels(x, width, f"x {what}")
        _pixels(y, height, f"y {what}")
    left, top = x / 100 * width, y / 100 * height
    across, down = w / 100 * width, h / 100 * height
    corners = [(0.0, 0.0), (across, 0.0), (across, down), (0.0, down)]
    if turn:
        corners = [(dx * cos(turn) - dy * sin(turn), dx * sin(turn) + dy * cos(turn)) for dx, dy in corners]
    xs = [min(max(0.0, left + dx), float(width)) for dx, _ in corners]
    ys = [min(max(0.0, top + dy), float(height)) for _, dy in corners]
    return Box(left=min(xs), top=min(ys), right=max(xs), bottom=max(ys))


@dataclass(frozen=True, slots=True)
class _Level:
    value: float | None  # None with a label: all
    source: LevelSource | None
    label: str | None = None


def _level(config: LabelConfig, groups: Sequence[_Group], task: Json) -> _Level:
    regions = {tag.name: tag.scale for tag in config.numbers if tag.per_region}
    levels = {tag.name: tag for tag in config.levels}
    for group in reversed(groups):
        numbers = [number for item in group.items if (number := _tag_number(item, regions)) is not None]
        if numbers:
            return _Level(numbers[-1], "number")
        for item in reversed(group.items):
            tag = levels.get(_from(item))
            for label in reversed(_labels(item)) if tag else ():
                value = tag.granularity(label) if tag else None
                if value is not None or (tag and label == tag.all_levels):
                    return _Level(value, "label", label)
    attributes = _attributes(config)
    for group in reversed(groups):
        for item in reversed(group.items):
            for label in reversed(_labels(item)):
                value = attributes.get((_from(item), label))
                if value is not None:
                    return _Level(value, "attribute")
    drafted = _draft_number(config, task)
    return _Level(None, None) if drafted is None else _Level(drafted, "draft")


def _granularity(level: _Level) -> Granularity | None:
    """Return what a level asks for: of a number tag a share of the whole, of a label one of the ten levels."""
    if level.value is None:
        return None
    numbered = level.source in ("number", "draft")
    return Granularity.from_share(level.value) if numbered else Granularity.from_value(level.value)


def _attributes(config: LabelConfig) -> dict[tuple[str, str], float]:
    """Return the `graco` attributes of class labels, by tag and label."""
    tags = [(tag.name, tag.labels) for tag in config.prompts] + [(tag.name, tag.labels) for tag in config.classes]
    return {
        (name, label.value): label.granularity
        for name, labels in tags
        for label in labels
        if label.granularity is not None
    }


def _tag_number(item: Json, scales: Mapping[str, float]) -> float | None:
    """Return the granularity in a result of one of these number tags; None for other results and an empty number."""
    scale = scales.get(_from(item))
    given = _value(item).get("number")
    if scale is None or given is None or _type(item) != "number":
        return None
    value = _number(given, f"the number in {_shown(_from(item))}") / scale
    if not 0 <= value <= 1:
        raise Refusal(
            f"the number in {_shown(_from(item))} is {_shown(given)}, outside 0..{scale:g} (0 finest part, "
            f'{scale:g} whole object); give the <Number> tag min="0" and max="{scale:g}"'
        )
    return value


def _draft_number(config: LabelConfig, task: Json) -> float | None:
    scales = {tag.name: tag.scale for tag in config.task_numbers}
    drafts = task.get("drafts") if scales else None  # else never looked at: they hold every mask of the annotation
    drafts = [draft for draft in drafts if isinstance(draft, dict)] if isinstance(drafts, list) else []
    if not drafts:
        return None
    newest = max(reversed(drafts), key=lambda draft: str(draft.get("updated_at") or ""))
    results = newest.get("result")
    for item in reversed(results) if isinstance(results, list) else ():
        number = _tag_number(item, scales) if isinstance(item, dict) else None
        if number is not None:
            return number
    return None


def _labels(item: Json) -> list[str]:
    """Return the labels of a result: those under its own type, not the copy of the class in `labels`."""
    given = _value(item).get(_type(item)) if _type(item).endswith("labels") else None
    return [label for label in given if isinstance(label, str)] if isinstance(given, list) else []


def _class_label(config: LabelConfig, groups: Sequence[_Group]) -> str | None:
    """Return the class of the newest click that has one.

    Of several labels on one click, those with a `graco` attribute that no output holds are levels, not classes.
    """
    to_name = groups[-1].to_name
    levels = {tag.name for tag in config.levels}
    attributes = _attributes(config)
    class_tag = config.class_tag(to_name)
    for group in reversed(groups):
        for item in group.items:
            name = _from(item)
            for label in _labels(item) if name not in levels else ():
                held = any(tag.holds(label) for tag in config.outputs if tag.to_name == to_name and not tag.smart)
                if held or (class_tag and class_tag.holds(label)) or (name, label) not in attributes:
                    return label
    return None


def _phrase(config: LabelConfig, groups: Sequence[_Group]) -> str | None:
    names = {tag.name for tag in config.phrases}
    for group in reversed(groups):
        for item in reversed(group.items):
            if _from(item) not in names or _type(item) != "textarea":
                continue
            given = _value(item).get("text")
            texts = given if isinstance(given, list) else [given]
            words = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
            if words and len(words[-1]) > MAX_PHRASE:
                raise Refusal(f"the phrase has {len(words[-1])} characters, at most {MAX_PHRASE} are read; shorten it")
            if words:
                return words[-1]
    return None


def _task_id(task: Json) -> int | None:
    number = task.get("id")
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _uri(image: ImageTag, task: Json, item_index: int | None) -> str:
    uris = _uris(image, task)
    index = item_index or 0
    if index >= len(uris):
        raise Refusal(f"a click lies on page {index + 1} of {image.value}, which has {len(uris)}; reload the page")
    return uris[index]


def _uris(image: ImageTag, task: Json) -> list[str]:
    given = _image_value(image, task)
    uris: list[Any] = given if isinstance(given, list) and image.is_list else [given]
    if not uris or not all(isinstance(uri, str) and uri for uri in uris):
        raise Refusal(
            f"{image.value[1:]} of task {_shown(task.get('id'))} is {_shown(given)}; expected the address of an image"
        )
    return uris


def _image_value(image: ImageTag, task: Json) -> object:
    """Return what an `<Image>` tag shows of a task: what its path leads to, or text with such values in it.

    Source: the editor's parseValue (utils/data.js). Where it would write "undefined" into an address, we refuse.
    """
    if not image.paths:
        raise Refusal(f'the <Image> tag {image.name!r} names no key of the task\'s data; write value="$image"')
    data = task.get("data")
    values = {path: _at(data, path) for path in image.paths}
    for path, value in values.items():
        if value is None:
            held = ", ".join(map(_shown, list(data)[:10])) if isinstance(data, dict) and data else "nothing"
            raise Refusal(
                f"task {_shown(task.get('id'))} has no {path} in its data (it has {held}), which the <Image> tag "
                f"{image.name!r} shows; import the task with that key, or change the tag's value"
            )
    if image.value == f"${image.paths[0]}":
        return values[image.paths[0]]
    for path, value in values.items():
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise Refusal(
                f"{path} of task {_shown(task.get('id'))} is {_shown(value)}; expected text to put into "
                f"{_shown(image.value)}"
            )
    return DATA_PATH.sub(lambda found: str(values[found[1]]), image.value)


def _at(data: object, path: str) -> object:
    """Return what lies at a path such as `pages[0].url`, or None; a key that is the whole path comes first."""
    if isinstance(data, dict) and path in data:
        return data[path]
    for part in re.findall(r"[^.[\]]+", path):
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and part.isdigit():
            data = data[int(part)] if len(part) < 10 and int(part) < len(data) else None
        else:
            return None
    return data


# --- writing ---


def choose_output(config: LabelConfig, to_name: str, class_label: str | None) -> OutputTag:
    """Return the tag to put a mask of this image into.

    Tags that hold the class come first, then brush, bitmask, polygon, rectangle, then the order of the document. A
    smart rectangle tag, which is there to ask, comes after all others.

    Raises:
        Refusal: the image has no such tag.
    """
    own = [tag for tag in config.outputs if tag.to_name == to_name]
    if not own:
        raise Refusal(
            f"the labelling configuration has no tag that can hold a mask of {to_name!r}; add "
            f'<BrushLabels name="mask" toName="{to_name}" smart="false"> with your classes'
        )
    class_tag = config.class_tag(to_name)

    def rank(tag: OutputTag) -> tuple[bool, bool, int, bool]:
        holder = tag if tag.labelled else class_tag
        holds = holder is not None and holder.holds(class_label)
        return tag.smart and tag.kind == "rectangle", not holds, OUTPUT_KINDS.index(tag.kind), tag.smart

    return min(own, key=rank)


def shape_values(kind: OutputKind, mask: Mask) -> list[Json]:
    """Return the mask as values of regions, without labels: several for polygons, none for an empty mask.

    This is the costly part of an answer; its result may be kept and used again, but not changed.
    """
    if not mask.any():
        return []
    if kind == "brush":
        return [{"format": "rle", "rle": brush.encode(mask, surplus=False)}]
    if kind == "bitmask":
        return [{"imageDataURL": outlines.to_png_data_url(mask)}]
    height, width = mask.shape
    if kind == "polygon":
        percent = [polygon / (width, height) * 100 for polygon in outlines.to_polygons(mask)]
        return [{"points": np.round(points, _DECIMALS).tolist(), "closed": True} for points in percent]
    rectangle = outlines.to_rectangle(mask)
    if rectangle is None:
        return []
    left, top, right, bottom = rectangle
    x, y, w, h = left / width, top / height, (right - left) / width, (bottom - top) / height
    sides = {"x": x, "y": y, "width": w, "height": h}
    return [{key: round(side * 100, _DECIMALS) for key, side in sides.items()} | {"rotation": 0}]


def write_regions(
    ask: Ask,
    config: LabelConfig,
    output: OutputTag,
    values: Sequence[Json],
    *,
    model_version: str,
    score: float,
    granularity: Granularity | None = None,
    index: int = 0,
) -> list[Json]:
    """Return one proposal's results: per value the shape, then class (of a plain tag) and level under the same id.

    Args:
        ask: what was asked.
        config: the labelling configuration.
        output: the tag to use.
        values: shapes, as `shape_values` gave them for `output.kind`; they are not changed.
        model_version: goes into the ids.
        score: of the proposal; brought into 0..1, and 0 when it is not a number.
        granularity: where the proposal stands; None: what was asked for.
        index: the proposal's place among those of the same ask.
    """
    image: Json = {"original_width": ask.width, "original_height": ask.height, "image_rotation": 0}
    if ask.item_index is not None:
        image["item_index"] = ask.item_index
    label = _label_for(ask, config, output)
    extras = _level_results(ask, config, granularity)
    class_tag = None if output.labelled else config.class_tag(ask.to_name)
    if class_tag is not None and label is not None:
        extras = [{"type": "labels", "from_name": class_tag.name, "value": {"labels": [label]}}, *extras]
    results: list[Json] = []
    for part, value in enumerate(values):
        name: Json = {
            "id": region_id(ask, model_version=model_version, granularity=granularity, index=index, part=part),
            "to_name": ask.to_name,
        }
        labels: Json = {output.result_type: [label]} if output.labelled and label is not None else {}
        main = {"type": output.result_type, "from_name": output.name, "score": _score(score), "value": value | labels}
        results += [name | image | result for result in (main, *extras)]
    return results


def region_id(
    ask: Ask, *, model_version: str, granularity: Granularity | None = None, index: int = 0, part: int = 0
) -> str:
    """Return the id of a region we propose: 16 hexadecimal digits, the same for the same request.

    It is made of task, image, clicks with ids, positions and signs, box, level, phrase, model version, and the place of
    proposal and part. A new click has a new id, even on the spot of an old one.
    """
    prompt = ask.prompt
    box = prompt.box and (prompt.box.left, prompt.box.top, prompt.box.right, prompt.box.bottom)
    named = [
        [ask.task_id, ask.to_name, ask.item_index, ask.uri if ask.task_id is None else None],
        [ask.click_ids, [(click.x, click.y, click.positive) for click in prompt.clicks], box],
        [ask.level, *(one and (one.level, one.share) for one in (prompt.granularity, granularity)), prompt.phrase],
        [model_version, index, part],
    ]
    return hashlib.blake2b(json.dumps(named).encode(), digest_size=8).hexdigest()


def answer(result: list[Json], score: float, model_version: str) -> Json:
    """Return one item of "results"."""
    return {"result": result, "score": _score(score), "model_version": model_version}


def empty_answer(model_version: str, reason: str | None = None) -> Json:
    """Return the item of "results" that shows nothing; `reason` is for those who look at the response."""
    return answer([], 0.0, model_version) | ({"reason": reason} if reason else {})


def _score(score: float) -> float:
    return min(max(0.0, float(score)), 1.0) if isfinite(score) else 0.0


def _label_for(ask: Ask, config: LabelConfig, output: OutputTag) -> str | None:
    """Return the click's class, or the first of the output tag (of the class tag beside it) when that lacks it."""
    holder = output if output.labelled else config.class_tag(ask.to_name)
    if holder is None or holder.holds(ask.class_label):
        return ask.class_label
    labels = [label if isinstance(label, str) else label.value for label in holder.labels]
    return labels[0] if labels else None


def _level_results(ask: Ask, config: LabelConfig, granularity: Granularity | None) -> list[Json]:
    """Return the granularity as results of the image's level tag and number tag.

    The level tag gets the label that was chosen, or the nearest. The number tag gets the number that was asked for with
    it, the level of each of several proposals (on accepting one, the editor puts the click's own label in place of
    ours), or, where there is no level tag, any level.
    """
    asked = granularity is None or granularity == ask.prompt.granularity
    level = ask.level if asked or granularity is None else granularity.value
    if level is None:
        return []
    results: list[Json] = []
    tag: LevelTag | None = config.level_tag(ask.to_name, ask.level_label)
    if tag is not None:
        chosen = asked and ask.level_label is not None and tag.granularity(ask.level_label) is not None
        label = ask.level_label if chosen else tag.nearest(level)
        results.append({"type": "labels", "from_name": tag.name, "value": {"labels": [label]}})
    number = config.region_number(ask.to_name)
    if number is not None and (tag is None or not asked or ask.level_source == "number"):
        value = round(level * number.scale, 6)
        results.append({"type": "number", "from_name": number.name, "value": {"number": value}})
    return results
