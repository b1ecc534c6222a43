"""Labelling configurations: read what we need of one, say what is wrong with one, print a good one.

A configuration is XML that a project's owner writes freely, so nothing here depends on names. Like the editor, we read
tag and attribute names without regard to case, and a label's `alias`, where it has one, is what results carry.
`graco="0.3"` on a label is our own attribute and says which granularity choosing that label asks for; `graco="all"` on
a label of a level tag asks for all of them at once. On the level tag itself it says what a click without one gets.

Source: the editor of Label Studio 1.23.2 (libs/editor/src: core/Tree, tags/control, stores/Annotation), and requests
recorded from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Literal
from xml.etree.ElementTree import Element, ParseError
from xml.sax.saxutils import quoteattr

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from model.types import Refusal

OutputKind = Literal["brush", "bitmask", "polygon", "rectangle"]
PromptKind = Literal["keypoint", "rectangle"]
Severity = Literal["error", "warning", "info"]
Usual = float | Literal["all"]
"""What a click without a level gets: one, 0..1, or all at once."""

OUTPUT_KINDS: tuple[OutputKind, ...] = ("brush", "bitmask", "polygon", "rectangle")
"""What a mask can be answered as, the most faithful first."""
PROMPT_KINDS: tuple[PromptKind, ...] = ("keypoint", "rectangle")

MAX_CHARACTERS = 1_000_000
"""Longest configuration read; real ones have a few thousand."""
MAX_DEPTH = 64
"""Deepest nesting of tags read."""
DATA_PATH = re.compile(r"\$([\w[\].{}]+)", re.ASCII)
"""A path into the task's data, as the editor finds it in a tag's value (utils/data.js, parseValue)."""

_ALL = "all"
_LEVEL_NAME = re.compile(r"granularity|level", re.IGNORECASE)
_PHRASE_NAME = re.compile(r"phrase|prompt", re.IGNORECASE)
_NUMBER_IN_TEXT = re.compile(r"(?<![\d.,])(?:0(?:[.,]\d+)?|1(?:[.,]0+)?|[.,]\d+)(?![\d.,])")
_FIXED_WIDTH = re.compile(r"flex:\s*0\s+0\s+\d+px|(?<![-\w])width:\s*\d+px")


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One label of a tag, as results name it."""

    value: str
    granularity: float | None = None  # 0..1, of its `graco` attribute; on a level tag also of its text


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTag:
    """Where the image of a task is found."""

    name: str
    value: str  # "$image", "$pages[0].url", "/data/local-files/?d=$file", or "$images" of a value list
    is_list: bool = False  # the task's data hold a list of images there, shown as pages

    @property
    def paths(self) -> tuple[str, ...]:
        """Where in the task's data the value looks, such as `pages[0].url`; none where it is the same for all tasks."""
        return tuple(DATA_PATH.findall(self.value))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTag:
    """A tag whose regions ask us something: every keypoint or rectangle tag that is not smart="false"."""

    name: str
    kind: PromptKind
    to_name: str
    labels: tuple[Label, ...]
    smart: bool  # says smart="true" or smartOnly="true"; the editor takes a tag that says nothing as smart too
    smart_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTag:
    """A tag that can hold our answer."""

    name: str
    kind: OutputKind
    to_name: str
    labelled: bool  # BrushLabels rather than Brush, whose labels come from a `<Labels>` tag beside it
    labels: tuple[str, ...]
    dynamic: bool = False  # labels come with the task's data, so any may be there
    smart: bool = False  # says smart="true": it asks, and holds an answer only for want of another tag

    @property
    def result_type(self) -> str:
        """The `type` of a result of this tag, and the key of its labels where it is labelled."""
        return f"{self.kind}labels" if self.labelled else self.kind

    def holds(self, label: str | None) -> bool:
        """Whether a region of this tag may carry `label`."""
        return label is not None and (self.dynamic or label in self.labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelsTag:
    """A `<Labels>` tag with classes, for regions of plain tags such as `<Brush>`."""

    name: str
    to_name: str
    labels: tuple[Label, ...]
    dynamic: bool = False

    def holds(self, label: str | None) -> bool:
        """Whether a region may carry `label` of this tag."""
        return label is not None and (self.dynamic or any(label == own.value for own in self.labels))


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelTag:
    """A `<Labels>` tag whose labels are granularities: the live control."""

    name: str
    to_name: str
    labels: tuple[Label, ...]  # at least one, each with a granularity
    all_levels: str | None = None  # the label that asks for all levels at once
    usual: Usual | None = None  # what a click without a level gets in this project, by its `graco`

    def granularity(self, label: str) -> float | None:
        """The granularity that a label stands for, 0..1, or None for a label of others."""
        return next((own.granularity for own in self.labels if own.value == label), None)

    def nearest(self, granularity: float) -> str:
        """The label that stands nearest to a granularity."""
        return min(self.labels, key=lambda own: abs((own.granularity or 0.0) - granularity)).value


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberTag:
    """A `<Number>` tag that holds a granularity."""

    name: str
    to_name: str
    per_region: bool
    scale: float  # what stands for the whole object: 1, or the tag's max where that is larger (10, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhraseTag:
    """A per-region `<TextArea>` that holds a phrase."""

    name: str
    to_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelConfig:
    """What we need of a labelling configuration; every list is in document order."""

    images: tuple[ImageTag, ...]  # at least one
    prompts: tuple[PromptTag, ...]
    outputs: tuple[OutputTag, ...]
    classes: tuple[LabelsTag, ...]
    levels: tuple[LevelTag, ...]
    numbers: tuple[NumberTag, ...]
    phrases: tuple[PhraseTag, ...]

    def image(self, name: str) -> ImageTag | None:
        """The image tag of this name."""
        return next((tag for tag in self.images if tag.name == name), None)

    def class_tag(self, to_name: str) -> LabelsTag | None:
        """The first separate class tag of an image."""
        return next((tag for tag in self.classes if tag.to_name == to_name), None)

    def level_tag(self, to_name: str, label: str | None = None) -> LevelTag | None:
        """The level tag of an image: the one that has `label`, else the first."""
        own = [tag for tag in self.levels if tag.to_name == to_name]
        with_label = (tag for tag in own if label is not None and tag.granularity(label) is not None)
        return next(with_label, own[0] if own else None)

    def region_number(self, to_name: str) -> NumberTag | None:
        """The first per-region number tag of an image."""
        return next((tag for tag in self.numbers if tag.per_region and tag.to_name == to_name), None)

    @property
    def task_numbers(self) -> tuple[NumberTag, ...]:
        """The per-task number tags: only with one of these is a task's draft worth reading."""
        return tuple(tag for tag in self.numbers if not tag.per_region)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing about a configuration that its owner should know."""

    severity: Severity  # error: no masks, or a broken editor; warning: works badly; info: could do more
    tag: str  # such as '<BrushLabels name="mask">'
    sentence: str  # what is so, why it matters, what to do


def read_config(xml: str) -> LabelConfig:
    """Return what we need of a labelling configuration; the same text is read only once.

    Raises:
        Refusal: it is not XML, carries entities or a DTD, is too long, or has no `<Image>` tag.
    """
    if not isinstance(xml, str):
        raise Refusal("the request carries no labelling configuration; save one under Settings > Labeling Interface")
    return _read_config(xml)


@lru_cache(maxsize=64)
def _read_config(xml: str) -> LabelConfig:
    tags = _parse(xml)
    images = tuple(_image(tag) for tag in tags if tag.kind == "image" and tag.name)
    if not images:
        raise Refusal(
            "the labelling configuration has no <Image> tag with a name, so there is nothing to segment; "
            'add <Image name="image" value="$image"/>, or take a ready one: python -m ml_backend label-config Object'
        )
    labels_tags = [tag for tag in tags if tag.kind == "labels" and tag.name]
    plain = {tag.to_name for tag in tags if tag.kind in (*OUTPUT_KINDS, *PROMPT_KINDS)}
    levels = tuple(level for tag in labels_tags if (level := _level_tag(tag, plain)))
    level_names = {level.name for level in levels}
    return LabelConfig(
        images=images,
        prompts=tuple(
            _prompt(tag) for tag in tags if tag.shape in PROMPT_KINDS and tag.name and tag.smart is not False
        ),
        outputs=tuple(_output(tag) for tag in tags if tag.shape in OUTPUT_KINDS and tag.name),
        classes=tuple(
            LabelsTag(name=tag.name, to_name=tag.to_name, labels=tag.labels, dynamic=tag.dynamic)
            for tag in labels_tags
            if tag.name not in level_names
        ),
        levels=levels,
        numbers=_numbers(tags),
        phrases=_phrases(tags),
    )


# --- the elements, read the way the editor reads them ---


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tag:
    element: Element
    kind: str  # the tag's name in lower case
    attributes: Mapping[str, str]  # names in lower case
    styles: tuple[str, ...]  # of the views around it
    children: tuple[Mapping[str, str], ...]  # attributes of its <Label>s

    @property
    def name(self) -> str:
        return self.attributes.get("name", "")

    @property
    def to_name(self) -> str:
        return self.attributes.get("toname", "")

    @property
    def labelled(self) -> bool:
        return self.kind.endswith("labels") and self.kind != "labels"

    @property
    def shape(self) -> str:
        return self.kind.removesuffix("labels") if self.labelled else self.kind

    @property
    def smart(self) -> bool | None:
        if self.smart_only:
            return True
        value = self.attributes.get("smart")
        return None if value is None else value == "true"

    @property
    def smart_only(self) -> bool:
        return self.attributes.get("smartonly") == "true"

    @property
    def per_region(self) -> bool:
        return self.attributes.get("perregion") == "true"

    @property
    def labels(self) -> tuple[Label, ...]:
        return tuple(
            Label(value=_label_text(child), granularity=_granularity(child.get("graco")))
            for child in self.children
            if _label_text(child)
        )

    @property
    def dynamic(self) -> bool:
        return "$" in self.attributes.get("value", "") or any(_label_text(c).startswith("$") for c in self.children)

    @property
    def shown(self) -> str:
        name = f" name={quoteattr(self.name)}" if self.name else ""
        return f"<{self.element.tag}{name}>"


def _parse(xml: str) -> list[_Tag]:
    if len(xml) > MAX_CHARACTERS:
        raise Refusal(f"the labelling configuration has {len(xml)} characters; at most {MAX_CHARACTERS} are read")
    try:
        root = fromstring(xml, forbid_dtd=True)
    except ParseError as error:
        raise Refusal(
            f"the labelling configuration is not XML ({error}); "
            "open Settings > Labeling Interface > Code and close the tag or quote that is named"
        ) from error
    except DefusedXmlException as error:
        raise Refusal("the labelling configuration carries a DTD or entities; write it without them") from error
    except ValueError as error:  # an encoding declaration or a character that XML does not know
        raise Refusal(f"the labelling configuration cannot be read ({error}); save it as plain UTF-8 text") from error
    return list(_walk(root))


def _walk(root: Element) -> Iterator[_Tag]:
    pending: list[tuple[Element, tuple[str, ...], int]] = [(root, (), 1)]
    while pending:
        element, styles, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise Refusal(f"the labelling configuration nests tags more than {MAX_DEPTH} deep; take out needless views")
        attributes = _attributes(element)
        yield _Tag(
            element=element,
            kind=element.tag.lower(),
            attributes=attributes,
            styles=styles,
            children=tuple(_attributes(e) for e in element.iter() if e.tag.lower() == "label")
            if element.tag.lower().endswith("labels")
            else (),
        )
        inside = (*styles, attributes["style"]) if attributes.get("style") else styles
        pending.extend((child, inside, depth + 1) for child in reversed(element))


def _attributes(element: Element) -> dict[str, str]:
    return {name.lower(): value for name, value in element.attrib.items()}


def _label_text(attributes: Mapping[str, str]) -> str:
    return attributes.get("alias") or attributes.get("value", "")


def _float(text: str | None) -> float | None:
    try:
        value = float((text or "").strip().replace(",", "."))
    except ValueError:
        return None
    return value if isfinite(value) else None


def _granularity(text: str | None) -> float | None:
    value = _float(text)
    return value if value is not None and 0 <= value <= 1 else None


def _asks_for_all(attributes: Mapping[str, str]) -> bool:
    return attributes.get("graco", "").strip().lower() == _ALL


def _image(tag: _Tag) -> ImageTag:
    listed = tag.attributes.get("valuelist", "")
    return ImageTag(name=tag.name, value=listed or tag.attributes.get("value", ""), is_list=bool(listed))


def _prompt(tag: _Tag) -> PromptTag:
    return PromptTag(
        name=tag.name,
        kind="keypoint" if tag.shape == "keypoint" else "rectangle",
        to_name=tag.to_name,
        labels=tag.labels,
        smart=tag.smart is True,
        smart_only=tag.smart_only,
    )


def _output(tag: _Tag) -> OutputTag:
    return OutputTag(
        name=tag.name,
        kind=next(kind for kind in OUTPUT_KINDS if kind == tag.shape),
        to_name=tag.to_name,
        labelled=tag.labelled,
        labels=tuple(label.value for label in tag.labels),
        dynamic=tag.labelled and tag.dynamic,
        smart=tag.smart is True,
    )


def _level_tag(tag: _Tag, plain: set[str]) -> LevelTag | None:
    """Return a `<Labels>` tag as a level tag, or None when its labels are classes.

    Labels that are numbers make one, a name such as "granularity" does, and so do `graco` attributes on every label,
    unless plain tags (`<KeyPoint>`, `<Brush>`) of the same image need these labels as their classes.
    """
    named = _LEVEL_NAME.search(tag.name) is not None
    labels = []
    all_levels = None
    for child in tag.children:
        text = _label_text(child)
        if text and _asks_for_all(child):
            all_levels = text
            continue
        value = _granularity(child.get("graco"))
        if value is None:
            value = _granularity(text)
        if value is None and named and (found := _NUMBER_IN_TEXT.findall(text)):
            value = _granularity(found[-1])
        labels.append(Label(value=text, granularity=value))
    readable = tuple(label for label in labels if label.granularity is not None and label.value)
    if not readable or not (named or len(readable) == len(labels)):
        return None
    numeric = all(_NUMBER_IN_TEXT.search(label.value) for label in readable)
    if not named and not numeric and tag.to_name in plain:
        return None
    usual: Usual | None = "all" if _asks_for_all(tag.attributes) else _granularity(tag.attributes.get("graco"))
    return LevelTag(
        name=tag.name,
        to_name=tag.to_name,
        labels=readable,
        all_levels=all_levels,
        usual=usual,
    )


def _numbers(tags: Sequence[_Tag]) -> tuple[NumberTag, ...]:
    """Return the `<Number>` tags of granularity: those named so, else those from 0 to at most 1."""
    found: list[NumberTag] = []
    for per_region in (True, False):
        own = [tag for tag in tags if tag.kind == "number" and tag.name and tag.per_region == per_region]
        named = [tag for tag in own if _LEVEL_NAME.search(tag.name)]
        ranged = [tag for tag in own if _float(tag.attributes.get("min")) == 0 and 0 < _maximum(tag) <= 1]
        found.extend(
            NumberTag(name=tag.name, to_name=tag.to_name, per_region=per_region, scale=max(1.0, _maximum(tag)))
            for tag in named or ranged
        )
    return tuple(found)


def _maximum(tag: _Tag) -> float:
    value = _float(tag.attributes.get("max"))
    return 0.0 if value is None else value


def _phrases(tags: Sequence[_Tag]) -> tuple[PhraseTag, ...]:
    own = [tag for tag in tags if tag.kind == "textarea" and tag.name and tag.per_region]
    named = [tag for tag in own if _PHRASE_NAME.search(tag.name)]
    return tuple(PhraseTag(name=tag.name, to_name=tag.to_name) for tag in named or own)


# --- what is wrong with a configuration ---


def check_config(xml: str) -> list[Finding]:
    """Return what is missing or unwise in a configuration for our use, errors first; none for a good one."""
    try:
        config = read_config(xml)
        tags = _parse(xml)
    except Refusal as refusal:
        return [Finding(severity="error", tag="<View>", sentence=str(refusal))]
    findings = [
        *_check_names(tags),
        *_check_images(config, tags),
        *_check_prompts(config, tags),
        *_check_outputs(config, tags),
        *_check_labels(tags),
        *_check_levels(config, tags),
        *_check_phrases(config, tags),
    ]
    order: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
    return sorted(findings, key=lambda finding: order[finding.severity])


_OURS = {*OUTPUT_KINDS, *PROMPT_KINDS, *(f"{kind}labels" for kind in (*OUTPUT_KINDS, *PROMPT_KINDS))} | {
    "labels",
    "number",
    "textarea",
    "magicwand",
}


def _check_names(tags: Sequence[_Tag]) -> Iterator[Finding]:
    names = Counter(tag.name for tag in tags if tag.name)
    told: set[str] = set()
    for tag in tags:
        if tag.kind not in _OURS and tag.kind != "image":
            continue
        if not tag.name:
            yield _found("error", tag, 'it has no name, so no result can refer to it; give it one, such as name="mask"')
        elif names[tag.name] > 1 and tag.name not in told:
            told.add(tag.name)
            yield _found("error", tag, f"{names[tag.name]} tags have this name; give each tag a name of its own")
        if tag.kind == "image":
            continue
        if "," in tag.to_name:
            yield _found(
                "error", tag, f"toName={quoteattr(tag.to_name)} names several tags; give each image its own tag"
            )
            continue
        if tag.to_name.strip() not in names:
            sentence = f"toName={quoteattr(tag.to_name)} points at no tag; write the name of the <Image> tag there"
            yield _found("error", tag, sentence)


def _check_images(config: LabelConfig, tags: Sequence[_Tag]) -> Iterator[Finding]:
    for tag in tags:
        if tag.kind != "image" or not tag.name:
            continue
        image = config.image(tag.name)
        if image is not None and not image.paths:
            yield _found("error", tag, 'its value names no key of the task\'s data; write value="$image"')
        if tag.attributes.get("rotatecontrol") == "true":
            yield _found(
                "warning",
                tag,
                "it lets annotators rotate the photo, where clicks get no mask and regions are not learned from; "
                'remove rotateControl="true"',
            )
        if any(_FIXED_WIDTH.search(style) for style in tag.styles):
            yield _found(
                "info",
                tag,
                "it stands in a column of fixed width, where part of the image can end up out of sight; "
                'let the column grow: style="flex:1 1 0;min-width:0"',
            )


def _check_prompts(config: LabelConfig, tags: Sequence[_Tag]) -> Iterator[Finding]:
    asking = [tag for tag in tags if tag.shape in PROMPT_KINDS and tag.smart]
    image = config.images[0].name
    if not asking:
        yield Finding(
            severity="error",
            tag="<KeyPointLabels>",
            sentence='no tag says smart="true", so clicks do not reach us; add '
            f'<KeyPointLabels name="click" toName={quoteattr(image)} smart="true" smartOnly="true"> with your classes',
        )
    for tag in asking:
        if not tag.smart_only:
            yield _found(
                "warning",
                tag,
                "it is smart without smartOnly, so choosing a label takes the ordinary tool, whose clicks ask nothing; "
                'add smartOnly="true"',
            )
        if tag.labelled and not tag.labels and not tag.dynamic:
            yield _found(
                "error",
                tag,
                "it has no <Label>, so nothing can be drawn with it; add your classes as <Label value=.../>",
            )


def _check_outputs(config: LabelConfig, tags: Sequence[_Tag]) -> Iterator[Finding]:
    for tag in tags:
        if tag.shape in ("brush", "bitmask", "magicwand") and tag.smart is not False:
            yield _found(
                "warning",
                tag,
                "it is smart unless told otherwise, and puts a smart brush first into the menu of smart tools; "
                'add smart="false"',
            )
        if tag.shape == "rectangle" and tag.smart is None:
            yield _found(
                "info",
                tag,
                'it is smart unless told otherwise; say smart="true" smartOnly="true" if its boxes shall ask for '
                'masks, else smart="false"',
            )
    for to_name in dict.fromkeys(prompt.to_name for prompt in config.prompts if prompt.smart):
        own = [output for output in config.outputs if output.to_name == to_name]
        proper = [output for output in own if not (output.smart and output.kind == "rectangle")]
        if not proper:
            yield Finding(
                severity="warning" if own else "error",
                tag="<BrushLabels>",
                sentence=f"no tag can hold the mask of image {to_name!r}"
                + (", so answers come as boxes" if own else "")
                + f'; add <BrushLabels name="mask" toName={quoteattr(to_name)} smart="false"> with your classes',
            )
            continue
        class_tag = config.class_tag(to_name)
        held = {label for output in proper for label in output.labels}
        held |= {label.value for label in class_tag.labels} if class_tag else set()
        if any(output.dynamic for output in proper) or (class_tag and class_tag.dynamic):
            continue
        yield from _check_classes(config, tags, to_name, held)
        for output in proper:
            if not output.labelled and class_tag is None:
                yield Finding(
                    severity="warning",
                    tag=f"<{output.kind.capitalize()} name={quoteattr(output.name)}>",
                    sentence="its masks get no class, for want of a <Labels> tag beside it; "
                    f"use <{output.kind.capitalize()}Labels> with your classes instead",
                )


def _check_classes(config: LabelConfig, tags: Sequence[_Tag], to_name: str, held: set[str]) -> Iterator[Finding]:
    for tag in tags:
        if tag.shape not in PROMPT_KINDS or not tag.smart or tag.to_name != to_name:
            continue
        several = tag.attributes.get("choice") == "multiple"  # then a label with graco may be a level, not a class
        missing = [
            label.value
            for label in tag.labels
            if label.value not in held and not (several and label.granularity is not None)
        ]
        if missing:
            yield _found(
                "warning",
                tag,
                f"its labels {', '.join(map(repr, missing))} are in no tag that can hold the mask, so masks asked for "
                "with them get another class; add them to the output tag, or take them out here",
            )


def _check_labels(tags: Sequence[_Tag]) -> Iterator[Finding]:
    keys: dict[str, str] = {}
    for tag in tags:
        for child in tag.children:
            text = _label_text(child)
            if "granularity" in child:
                yield _found(
                    "error",
                    tag,
                    f"the attribute granularity on its label {text!r} breaks the editor, which keeps that name for "
                    "text (symbol, word, sentence, paragraph); call it graco",
                )
            if _asks_for_all(child) and tag.kind != "labels":
                yield _found(
                    "warning",
                    tag,
                    f'graco="all" on its label {text!r} is only read on a label of the granularity tag; move it there',
                )
            elif "graco" in child and _granularity(child["graco"]) is None and not _asks_for_all(child):
                yield _found(
                    "warning",
                    tag,
                    f"graco={quoteattr(child['graco'])} on its label {text!r} is not a number from 0 to 1 and is not "
                    'read; write graco="0.3"',
                )
            key = child.get("hotkey", "").lower()
            if key in keys and key:
                yield _found(
                    "warning",
                    tag,
                    f"its label {text!r} has the hotkey {key!r} of {keys[key]}, and both act on one press; "
                    "give each label a key of its own",
                )
            elif key:
                keys[key] = f"{text!r} in {tag.shown}"


def _check_levels(config: LabelConfig, tags: Sequence[_Tag]) -> Iterator[Finding]:
    remedy = "add a <Labels> tag with the labels 0.1, 0.3, 0.5, 0.7 and 1.0"
    for tag in tags:
        read = any(level.name == tag.name and level.usual is not None for level in config.levels)
        if "graco" in tag.attributes and tag.kind != "label" and not read:
            yield _found(
                "warning",
                tag,
                f"its graco={quoteattr(tag.attributes['graco'])} is not read: it may be all or a number from 0 to 1, "
                "and stand on the <Labels> tag of the levels",
            )
        if tag.kind == "labels" and _LEVEL_NAME.search(tag.name):
            level = next((level for level in config.levels if level.name == tag.name), None)
            lost = [
                label.value
                for label in tag.labels
                if level is None or (level.granularity(label.value) is None and label.value != level.all_levels)
            ]
            if lost:
                yield _found(
                    "warning",
                    tag,
                    f"its labels {', '.join(map(repr, lost))} read as no number from 0 to 1, so choosing them changes "
                    'nothing; add the attribute graco="0.3" to each',
                )
        if tag.kind in ("choices", "rating") and _LEVEL_NAME.search(tag.name):
            yield _found(
                "warning", tag, f"granularity is not read from it, since it asks for nothing by itself; {remedy}"
            )
    for to_name in dict.fromkeys(prompt.to_name for prompt in config.prompts if prompt.smart):
        if config.level_tag(to_name) or any(
            label.granularity is not None for prompt in config.prompts for label in prompt.labels
        ):
            continue
        if config.region_number(to_name):
            yield Finding(
                severity="info",
                tag="<Labels>",
                sentence=f"granularity of image {to_name!r} is set by a <Number> alone, which acts at the next click; "
                f"to change a shown mask at once, {remedy}",
            )
        elif config.task_numbers:
            yield Finding(
                severity="warning",
                tag=f"<Number name={quoteattr(config.task_numbers[0].name)}>",
                sentence="it is per task and the only control of granularity, and reaches us with the next saved "
                f"draft, 5 s late and without a hint; {remedy}",
            )
        else:
            yield Finding(
                severity="info",
                tag="<Labels>",
                sentence=f"nothing sets the granularity of image {to_name!r}, so every mask is made with the server's "
                f"default; {remedy}",
            )


def _check_phrases(config: LabelConfig, tags: Sequence[_Tag]) -> Iterator[Finding]:
    if config.phrases or not config.prompts:
        return
    remedy = '<TextArea name="phrase" toName="..." perRegion="true" maxSubmissions="1" rows="1" editable="true"/>'
    per_task = next((tag for tag in tags if tag.kind == "textarea"), None)
    if per_task is not None:
        yield _found("info", per_task, 'it is per task and so not read as a phrase; if it is one, add perRegion="true"')
    else:
        yield Finding(
            severity="info",
            tag="<TextArea>",
            sentence=f"no phrase can be typed beside a click; if you want that, add {remedy}",
        )


def _found(severity: Severity, tag: _Tag, sentence: str) -> Finding:
    return Finding(severity=severity, tag=tag.shown, sentence=sentence)


# --- a good configuration ---

CLICK_KEYS = tuple("1234567890")
"""Hotkeys of the classes of the click tool, in order."""
LEVEL_KEYS = tuple("asdfgjlqtyi")
"""Hotkeys of the levels, the finest first, then all: the home row, without keys of the editor's own tools."""
BOX_KEYS = tuple(f"shift+{key}" for key in "qwetyuiopa")
"""Hotkeys of the classes of the box tool: Shift and the top row (Shift+R is the editor's own)."""
MASK_KEYS = ("z", "x", "c", "n", *(f"shift+{key}" for key in "zxcvbn"))
"""Hotkeys of the classes of the tag that holds masks, to draw by hand: the bottom row."""

_CLASS_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
_LEVEL_COLOURS = ("#00429d", "#2a5da9", "#4771b2", "#5d8bbd", "#73a2c6", "#8abccf", "#a5d5d8", "#f4a582", "#93003a")


def make_config(
    classes: Sequence[str],
    *,
    output: str = "brush",
    levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 1.0),
    usual: str | None = None,
    phrase: bool = True,
) -> str:
    """Return a ready labelling configuration in which nothing is to be mended.

    Keys: 1, 2, ... 9, 0 choose a class for clicks, A S D F G J L Q T Y I a level from fine to coarse and then all of
    them at once, Shift+Q W E T Y ... a class for boxes, Z X C N, then Shift+Z ... a class for masks drawn by hand. From
    the eleventh class (and level) on the editor deals out what is left.

    Args:
        classes: labels, each once.
        output: what a mask is answered as: brush, bitmask, polygon or rectangle.
        levels: granularities offered as labels, 0..1, and beside them one for all; none leaves the control out.
        usual: what a click without a level gets: all of them, or one, 0..1; None: what the operator has set.
        phrase: whether a phrase can be typed beside a click.

    Raises:
        Refusal: no class, a class twice or not printable, an unknown output, a level outside 0..1, or one that is usual
            and has no tag to stand on.
    """
    names = _checked_classes(classes)
    if output not in OUTPUT_KINDS:
        raise Refusal(f"output {output!r} is unknown; choose one of {', '.join(OUTPUT_KINDS)}")
    for level in levels:
        if not (isfinite(level) and 0 <= level <= 1):
            raise Refusal(f"level {level} is outside 0..1 (0 finest part, 1 whole object)")
    steps = sorted(set(levels))
    if usual is not None and ((usual != _ALL and _granularity(usual) is None) or not steps):
        raise Refusal(f"a click without a level cannot get {usual!r}; give all or a number from 0 to 1, beside levels")
    smart = {"toName": "image", "smart": "true", "smartOnly": "true"}
    lines = [
        *_labels_lines("KeyPointLabels", {"name": "click"} | smart, _class_labels(names, CLICK_KEYS)),
        *_labels_lines("RectangleLabels", {"name": "box"} | smart, _class_labels(names, BOX_KEYS)),
    ]
    if steps:
        lines += ['<Header value="Granularity: fine to coarse"/>']
        of_levels = {"name": "granularity", "toName": "image"} | ({} if usual is None else {"graco": usual})
        lines += _labels_lines("Labels", of_levels, _level_labels(steps))
    number = {"name": "granularity_value", "toName": "image", "perRegion": "true", "min": "0", "max": "1"}
    lines.append(_tag("Number", number | {"step": "0.05", "slider": "true"}, closed=True))
    if phrase:
        lines.append('<Header value="Phrase, then Enter"/>')
        area = {"name": "phrase", "toName": "image", "perRegion": "true", "maxSubmissions": "1", "rows": "1"}
        lines.append(_tag("TextArea", area | {"editable": "true", "placeholder": "such as: shoes"}, closed=True))
    lines.append('<Header value="Mask"/>')
    mask = {"name": "mask", "toName": "image", "smart": "false"}
    lines += _labels_lines(f"{output.capitalize()}Labels", mask, _class_labels(names, MASK_KEYS))
    return "\n".join(
        [
            '<View style="display:flex;gap:16px">',
            '  <View style="flex:1 1 0;min-width:0">',
            '    <Image name="image" value="$image" zoom="true" zoomControl="true"/>',
            "  </View>",
            '  <View style="flex:0 0 280px">',
            '    <Header value="Click or box"/>',
            *(f"    {line}" for line in lines),
            "  </View>",
            "</View>",
            "",
        ]
    )


def _checked_classes(classes: Sequence[str]) -> list[str]:
    names = [" ".join(name.split()) for name in classes]
    if not names:
        raise Refusal("no class was given; name at least one, such as Object")
    for name in names:
        if not name or not name.isprintable():
            raise Refusal(f"class {name!r} is empty or holds characters that cannot be shown; give it a readable name")
        if re.search(r"\$[\w[{.]", name):
            raise Refusal(f'class {name!r} holds "$", which the editor takes for a key of the task; leave it out')
        if names.count(name) > 1:
            raise Refusal(f"class {name!r} is given {names.count(name)} times; give each class once")
    return names


def _class_labels(names: Sequence[str], keys: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"value": name, "background": _CLASS_COLOURS[i % len(_CLASS_COLOURS)]}
        | ({"hotkey": keys[i]} if i < len(keys) else {})
        for i, name in enumerate(names)
    ]


def _level_labels(levels: Sequence[float]) -> list[dict[str, str]]:
    last = max(len(levels) - 1, 1)
    labels = []
    for i, level in enumerate(levels):
        text = f"{level:.1f}" if round(level, 1) == level else f"{level:.6g}"
        colour = _LEVEL_COLOURS[round(i * (len(_LEVEL_COLOURS) - 1) / last)]
        labels.append({"value": text, "graco": text, "background": colour})
    labels.append({"value": _ALL, "graco": _ALL, "background": "#666666"})
    return [label | ({"hotkey": LEVEL_KEYS[i]} if i < len(LEVEL_KEYS) else {}) for i, label in enumerate(labels)]


def _labels_lines(kind: str, attributes: Mapping[str, str], labels: Sequence[Mapping[str, str]]) -> list[str]:
    inner = [f"  {_tag('Label', label, closed=True)}" for label in labels]
    return [_tag(kind, attributes), *inner, f"</{kind}>"]


def _tag(kind: str, attributes: Mapping[str, str], *, closed: bool = False) -> str:
    written = "".join(f" {name}={quoteattr(value)}" for name, value in attributes.items())
    return f"<{kind}{written}{'/' if closed else ''}>"
