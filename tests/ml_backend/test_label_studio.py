import json
import string
import tracemalloc
from contextlib import suppress
from copy import deepcopy
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_backend import brush, outlines
from ml_backend.answers import Answer
from ml_backend.label_config import LabelConfig, make_config, read_config
from ml_backend.label_studio import (
    Ask,
    answer,
    choose_output,
    empty_answer,
    pack_shape,
    read_ask,
    read_batch,
    read_corrections,
    region_id,
    shape_digest,
    shape_values,
    unpack_shape,
    write_regions,
)
from model.annotations import decode
from model.types import MAX_CLICKS, Box, Click, Granularity, Prediction, Prompt, Proposal, Refusal

GOLDEN = Path(__file__).parent.parent / "golden" / "label_studio"
CONFIG = read_config(make_config(["Object", "Part"]))
TASK = {"id": 7, "data": {"image": "/data/upload/3/cat.jpg"}}


def recorded(number: int) -> dict:
    (path,) = GOLDEN.glob(f"{number}_*.json")
    return json.loads(path.read_text())["body"]


def asked(number: int) -> Ask | None:
    body = recorded(number)
    config = read_config(body["label_config"])
    return read_ask(config, body["tasks"][0], body["params"]["context"])


def click(
    region: str = "one", x: float = 50.0, y: float = 25.0, *, positive: object = True, label: str = "Object", **more
) -> dict:
    return {
        "id": region,
        "type": "keypointlabels",
        "from_name": "click",
        "to_name": "image",
        "original_width": 200,
        "original_height": 100,
        "image_rotation": 0,
        "is_positive": positive,
        "value": {"x": x, "y": y, "width": 0.3, "labels": [label], "keypointlabels": [label]},
    } | more


def box(x: float = 10, y: float = 20, width: float = 30, height: float = 40, **more) -> dict:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": ["Object"]} | more
    item = click(type="rectanglelabels", from_name="box", value=value)
    del item["is_positive"]
    return item


def beside(item: dict, kind: str, name: str, **value: object) -> dict:
    """Another tag's result on the same region, its geometry repeated as the editor does."""
    geometry = {key: item["value"][key] for key in ("x", "y", "width", "height") if key in item["value"]}
    return item | {"type": kind, "from_name": name, "value": geometry | value}


def level(item: dict, text: str) -> dict:
    return beside(item, "labels", "granularity", labels=[text])


def number(item: dict, value: object) -> dict:
    return beside(item, "number", "granularity_value", labels=["Object"], number=value)


def phrase(item: dict, *texts: object) -> dict:
    return beside(item, "textarea", "phrase", labels=["Object"], text=list(texts))


def read(*items: object, config: LabelConfig = CONFIG, task: dict = TASK) -> Ask | None:
    return read_ask(config, task, {"result": list(items)})


def ask_of(*items: object, config: LabelConfig = CONFIG, task: dict = TASK) -> Ask:
    ask = read(*items, config=config, task=task)
    assert ask is not None
    return ask


def changed(item: dict, key: str, value: object) -> dict:
    """The item with one key of it, or of its value, changed; `...` takes the key out."""
    item = deepcopy(item)
    holder = item["value"] if key in item["value"] else item
    if value is ...:
        del holder[key]
    else:
        holder[key] = value
    return item


# --- recorded requests ---


@pytest.mark.parametrize(
    ("fixture", "clicks", "granularity", "source", "label"),
    [
        (10, 1, 0.9, "attribute", "Object"),
        (11, 2, 0.9, "attribute", "Object"),
        (12, 3, 0.9, "attribute", "Object"),
        (13, 1, 0.3, "attribute", "Part"),  # not the draft's 0.4
        (14, 2, 0.3, "attribute", "Part"),
        (15, 2, 0.3, "number", "Object"),  # of the older click; the draft says 0.7, the class 0.9
        (16, 1, 0.3, "attribute", "Object"),  # a second label of the click
        (17, 1, 0.2, "label", "Object"),
        (18, 1, 0.2, "label", "Object"),
        (19, 1, 0.8, "label", "Object"),
        (20, 1, 0.25, "number", "Object"),  # the level label says 0.2
        (30, 1, 0.5, "label", "Object"),
        (31, 2, 0.5, "label", "Object"),
        (32, 3, 0.5, "label", "Object"),
        (33, 3, 1.0, "label", "Object"),  # of the newest click; the older ones still say 0.5
        (34, 1, 0.5, "label", None),  # the class was taken off the click
        (35, 0, 0.1, "label", "Object"),  # a box
        (36, 1, 0.1, "label", "Object"),
    ],
)
def test_a_recorded_request_is_read(fixture, clicks, granularity, source, label):
    ask = asked(fixture)
    assert ask is not None
    assert (len(ask.prompt.clicks), ask.level, ask.level_source, ask.class_label) == (
        clicks,
        granularity,
        source,
        label,
    )
    make = Granularity.from_share if source == "number" else Granularity.from_value
    assert ask.prompt.granularity == make(granularity)
    assert (ask.width, ask.height) == (451, 300)
    assert ask.uri == recorded(fixture)["tasks"][0]["data"]["image"]
    assert ask.task_id == recorded(fixture)["tasks"][0]["id"]


def test_clicks_keep_their_order_place_and_sign():
    ask = asked(32)
    assert ask is not None
    assert ask.click_ids == ("tbitdO9V5Y", "ldTM0_w5D_", "zolepK6vJJ")
    assert [c.positive for c in ask.prompt.clicks] == [True, True, False]
    assert ask.prompt.clicks[0].x == pytest.approx(31.290322580645167 * 4.51)
    assert ask.prompt.clicks[0].y == pytest.approx(35.936559139784954 * 3)
    assert (ask.prompt_type, ask.to_name) == ("keypoint", "image")


def test_a_recorded_box_is_read():
    ask = asked(35)
    assert ask is not None
    assert ask.prompt.box is not None
    corners = (ask.prompt.box.left, ask.prompt.box.top, ask.prompt.box.right, ask.prompt.box.bottom)
    assert corners == pytest.approx((99.66, 66.35, 267.69, 206.01), abs=0.01)
    assert (ask.prompt_type, ask.click_ids, ask.prompt.clicks) == ("rectangle", ("KyNHwViuQB",), ())


def test_a_click_without_its_own_label_is_still_a_click():
    ask = asked(34)
    assert ask is not None
    assert (ask.click_ids, ask.level_label, ask.class_label) == (("x7d4JlcWpp",), "0.5", None)


def test_the_level_label_is_kept_as_the_tag_writes_it():
    ask = asked(17)
    assert ask is not None
    assert ask.level_label == "L 0.2"


def test_a_recorded_phrase_is_read():
    ask = asked(20)
    assert ask is not None
    assert (ask.phrase, ask.prompt.phrase, ask.level_label) == ("the left eye", "the left eye", None)


def test_after_a_submit_nothing_is_asked():
    assert asked(37) is None


def test_a_recorded_batch_asks_for_its_images():
    body = recorded(50)
    config = read_config(body["label_config"])
    assert asked(50) is None
    assert [(to_name, uri) for task in body["tasks"] for to_name, uri in read_batch(config, task)] == [
        ("image", "/data/upload/3/ac93f566-chelsea.jpg"),
        ("image", "/data/upload/3/f4aecc9d-coffee.jpg"),
        ("image", "/data/upload/3/c2373f56-astronaut.jpg"),
    ]


@pytest.mark.parametrize("context", [None, {}, {"result": None}, {"result": []}])
def test_nothing_clicked_is_nothing_asked(context):
    assert read_ask(CONFIG, TASK, context) is None


def test_results_without_a_click_are_refused_and_beside_one_passed_over():
    mask = click(type="brushlabels", from_name="mask", value={"format": "rle", "rle": [1], "brushlabels": ["Object"]})
    kept = click(value={"format": "rle", "rle": [1], "keypointlabels": ["Object"]})  # of an accepted mask
    task_number = {"id": "n", "type": "number", "from_name": "granularity_value", "value": {"number": 0.5}}
    relation = {"type": "relation", "from_id": "a", "to_id": "b"}
    ellipse = click("e", type="ellipselabels", from_name="e", value={"x": 1, "y": 1, "radiusX": 2, "radiusY": 2})
    polygon = click("p", type="polygonlabels", from_name="p", value={"points": [[1, 2]], "closed": True})
    with pytest.raises(Refusal, match="none of the regions sent is a click or a box"):
        read(mask, kept, task_number, relation, polygon, ellipse, level(ellipse, "0.5"))
    ask = ask_of(mask, click("two"), polygon)
    assert ask.click_ids == ("two",)


def test_a_box_drawn_into_the_output_is_no_question():
    config = read_config(make_config(["Object"], output="rectangle"))
    with pytest.raises(Refusal, match="is a click or a box"):
        read(box() | {"from_name": "mask"}, config=config)
    assert read(box(), config=config) is not None


# --- granularity ---


def test_the_number_of_the_newest_click_wins():
    one, two = click("one"), click("two")
    assert ask_of(one, number(one, 0.9), two, level(two, "0.1"), number(two, 0.35)).level == 0.35


def test_the_label_of_the_newest_click_wins_over_the_number_of_an_older_one():
    one, two = click("one"), click("two")
    ask = ask_of(one, number(one, 0.9), two, level(two, "0.1"))
    assert (ask.level, ask.level_source, ask.level_label) == (0.1, "label", "0.1")


def test_the_label_for_all_levels_leaves_the_granularity_out():
    one, two = click(), click(id="c2")
    config = read_config(make_config(["Object"]))
    found = ask_of(one, level(one, "0.3"), two, level(two, "all"), config=config)
    assert (found.all_levels, found.level, found.prompt.granularity, found.level_label) == (True, None, None, "all")
    back = ask_of(one, level(one, "all"), two, level(two, "0.3"), config=config)
    assert (back.all_levels, back.level) == (False, 0.3)


def test_an_older_click_is_asked_when_the_newest_says_nothing():
    one, two, three = click("one"), click("two"), click("three")
    assert ask_of(one, level(one, "0.1"), two, level(two, "0.7"), three).level == 0.7
    assert ask_of(one, level(one, "0.1"), number(one, 0.6), two, three).level_source == "number"


def test_an_emptied_number_counts_as_none():
    one = click()
    assert ask_of(one, level(one, "0.3"), number(one, None)).level_source == "label"


def test_a_number_from_1_to_10_is_a_tenth_of_it():
    xml = make_config(["Object"]).replace('max="1"', 'max="10"')
    assert ask_of(click(), number(click(), 3), config=read_config(xml)).level == 0.3


def draft(updated: str, *numbers: float) -> dict:
    results = [{"type": "number", "from_name": "how", "value": {"number": n}} for n in numbers]
    return {"updated_at": updated, "result": [{"type": "brushlabels", "value": {"rle": [0]}}, *results]}


WITH_SLIDER = read_config(
    make_config(["Object"]).replace("</View>\n", '<Number name="how" toName="image" min="0" max="1"/></View>\n', 1)
)


def test_a_number_of_the_task_is_read_from_the_newest_draft():
    task = TASK | {"drafts": [draft("2026-01-02", 0.2, 0.4), draft("2026-01-01", 0.9)]}
    ask = ask_of(click(), config=WITH_SLIDER, task=task)
    assert (ask.level, ask.level_source) == (0.4, "draft")
    assert ask_of(click(), level(click(), "0.1"), config=WITH_SLIDER, task=task).level == 0.1


@pytest.mark.parametrize("drafts", [None, [], "drafts", [None], [{}], [{"result": None}], [{"result": [None]}]])
def test_a_draft_that_says_nothing_gives_no_level(drafts):
    ask = ask_of(click(), config=WITH_SLIDER, task=TASK | {"drafts": drafts})
    assert (ask.level, ask.level_source, ask.prompt.granularity) == (None, None, None)


def test_drafts_are_not_looked_at_without_a_number_of_the_task():
    class Task(dict):
        def get(self, key, default=None):
            assert key != "drafts"
            return super().get(key, default)

    assert read_ask(CONFIG, Task(TASK), {"result": [click()]}) is not None


# --- phrase ---


def test_the_newest_phrase_is_read():
    one, two, three = click("one"), click("two"), click("three")
    assert (
        ask_of(one, phrase(one, "ear"), two, phrase(two, "left", "  the left\n eye "), three).phrase == "the left eye"
    )
    assert ask_of(one, phrase(one, "ear"), two, phrase(two, " ", 3)).phrase == "ear"


def test_a_note_is_no_phrase():
    assert ask_of(click(meta={"text": ["check this one"]})).phrase is None


# --- boxes ---


def test_a_box_in_percent_becomes_one_in_pixels():
    assert ask_of(box(10, 20, 30, 40)).prompt.box == Box(left=20, top=20, right=80, bottom=60)


def test_a_turned_box_is_boxed():
    turned = ask_of(box(50, 20, 20, 20, rotation=90)).prompt.box
    assert turned is not None
    assert (turned.left, turned.top, turned.right, turned.bottom) == pytest.approx((80, 20, 100, 60))


def test_a_box_beyond_the_image_is_cut_off():
    assert ask_of(box(90, 90, 30, 30)).prompt.box == Box(left=180, top=90, right=200, bottom=100)
    assert ask_of(box(99.9, 50, 20, 20, rotation=180)).prompt.box is not None


def test_the_newest_of_several_boxes_is_meant():
    ask = ask_of(box(0, 0) | {"id": "old"}, box(50, 50) | {"id": "new"})
    assert ask.prompt.box == Box(left=100, top=50, right=160, bottom=90)
    assert ask.click_ids == ("new",)


def test_a_box_whose_own_label_was_taken_off_is_still_a_box():
    ask = ask_of(level(box(), "0.3"))
    assert (ask.prompt_type, ask.level) == ("rectangle", 0.3)


def test_an_empty_box_is_refused():
    with pytest.raises(Refusal, match="draw it wider"):
        read(box(10, 10, 0, 10))


# --- several images, other names ---

TWO_IMAGES = read_config("""<View>
  <Image name="before" value="$first"/><Image name="after" value="$pages" />
  <KeyPoint name="kp1" toName="before" smart="true"/><KeyPoint name="kp2" toName="after" smart="true"/>
  <Labels name="was" toName="before"><Label value="House"/></Labels>
  <Labels name="is" toName="after"><Label value="Ruin"/><Label value="House"/></Labels>
  <Labels name="fine" toName="after"><Label value="g 0.4" graco="0.4"/><Label value="g 1" graco="1"/></Labels>
  <Brush name="old" toName="before" smart="false"/><Bitmask name="new" toName="after" smart="false"/>
</View>""")
TWO_DATA = {"id": 3, "data": {"first": "a.png", "pages": "b.png"}}


def test_clicks_on_another_image_than_the_newest_are_left_out():
    old = click("old", type="keypoint", from_name="kp1", to_name="before")
    new = click("new", type="keypoint", from_name="kp2", to_name="after")
    house = beside(new, "labels", "is", labels=["House"])
    ask = ask_of(new, house, old, config=TWO_IMAGES, task=TWO_DATA)
    assert (ask.to_name, ask.uri, ask.click_ids, ask.class_label) == ("before", "a.png", ("old",), None)
    ask = ask_of(old, new, house, config=TWO_IMAGES, task=TWO_DATA)
    assert (ask.to_name, ask.uri, ask.click_ids, ask.class_label) == ("after", "b.png", ("new",), "House")


def test_plain_tags_answer_with_the_class_in_a_result_of_its_own():
    new = click("new", type="keypoint", from_name="kp2", to_name="after")
    fine, house = beside(new, "labels", "fine", labels=["g 0.4"]), beside(new, "labels", "is", labels=["House"])
    ask = ask_of(new, fine, house, config=TWO_IMAGES, task=TWO_DATA)
    output = choose_output(TWO_IMAGES, ask.to_name, ask.class_label)
    result = write_result(ask, TWO_IMAGES, output, prediction(), model_version="v")
    assert [(r["type"], r["from_name"]) for r in result] == [("bitmask", "new"), ("labels", "is"), ("labels", "fine")]
    assert set(result[0]["value"]) == {"imageDataURL"}
    assert [r["value"] for r in result[1:]] == [{"labels": ["House"]}, {"labels": ["g 0.4"]}]
    assert len({r["id"] for r in result}) == 1


def test_each_image_of_a_task_is_part_of_a_batch():
    assert [tuple(ask) for ask in read_batch(TWO_IMAGES, TWO_DATA)] == [("before", "a.png"), ("after", "b.png")]
    assert [tuple(ask) for ask in read_batch(TWO_IMAGES, {"data": {"pages": "b.png"}})] == [("after", "b.png")]
    with pytest.raises(Refusal, match="'other'"):
        read_batch(TWO_IMAGES, {"data": {"other": "b.png"}})


def test_a_value_list_has_a_page_for_each_image():
    config = read_config(make_config(["Object"]).replace('value="$image"', 'valueList="$pages"'))
    task = {"id": 1, "data": {"pages": ["a.png", "b.png"]}}
    ask = ask_of(click("one", item_index=0), click("two", item_index=1), config=config, task=task)
    assert (ask.uri, ask.item_index, ask.click_ids) == ("b.png", 1, ("two",))
    result = write_regions(ask, config, config.outputs[-1], [{}], model_version="v", score=1)
    assert result[0]["item_index"] == 1
    assert ask_of(click(), config=config, task=task).uri == "a.png"
    assert [(b.uri, b.item_index) for b in read_batch(config, task)] == [("a.png", 0), ("b.png", 1)]
    for index in (2, -1, "0", True):
        with pytest.raises(Refusal):
            read(click(item_index=index), config=config, task=task)


def showing(value):
    return read_config(make_config(["Object"]).replace('value="$image"', value))


def uris(value, data):
    return [ask.uri for ask in read_batch(showing(value), {"id": 7, "data": data})]


@pytest.mark.parametrize(
    ("value", "data", "shown"),
    [
        ('value="$images[0]"', {"images": ["a.png", "b.png"]}, ["a.png"]),
        ('value="$images[1].url"', {"images": [{}, {"url": "b.png"}]}, ["b.png"]),
        ('value="$images.1"', {"images": ["a.png", "b.png"]}, ["b.png"]),
        ('value="$img.url"', {"img": {"url": "a.png"}}, ["a.png"]),
        ('value="$img.url"', {"img.url": "whole.png", "img": {"url": "a.png"}}, ["whole.png"]),
        ('value="/data/local-files/?d=$file"', {"file": "x/a.png"}, ["/data/local-files/?d=x/a.png"]),
        ('value="https://host/$at.dir/$number"', {"at": {"dir": "d"}, "number": 3}, ["https://host/d/3"]),
        ('valueList="$album.pages"', {"album": {"pages": ["a.png", "b.png"]}}, ["a.png", "b.png"]),
    ],
)
def test_images_are_found_where_the_editor_finds_them(value, data, shown):
    assert uris(value, data) == shown
    assert ask_of(click(), config=showing(value), task={"id": 7, "data": data}).uri == shown[0]


# --- refusals ---


@pytest.mark.parametrize(
    ("value", "data", "says"),
    [
        ('value="$images[2]"', {"images": ["a.png"]}, r"has no images\[2\] in its data \(it has 'images'\)"),
        ('value="$images[99999999999]"', {"images": ["a.png"]}, "has no images"),
        ('value="$images[one]"', {"images": ["a.png"]}, "has no images"),
        ('value="$img.url"', {"img": {"link": "a.png"}}, "has no img.url in its data"),
        ('value="$img.url"', {"img": "a.png"}, "has no img.url in its data"),
        ('value="$img"', {"img": {"url": "a.png"}}, "img of task 7 is .*; expected the address"),
        ('value="/data/local-files/?d=$file"', {"name": "a.png"}, "has no file in its data"),
        ('value="/data/local-files/?d=$file"', {"file": ["a.png"]}, "expected text to put into"),
        ('value="/data/local-files/?d=$file"', {"file": ""}, "expected text to put into"),
        ('valueList="$album.pages"', {"album": {}}, "has no album.pages"),
        ('valueList="$pages"', {"pages": []}, "expected the address"),
        ('value="fixed.png"', {"image": "a.png"}, "names no key"),
    ],
)
def test_a_task_that_lacks_what_the_image_tag_names_is_refused_with_the_path(value, data, says):
    with pytest.raises(Refusal, match=says):
        uris(value, data)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (changed(click(), "x", 101), "outside the image"),
        (changed(click(), "y", -0.6), "outside the image"),
        (changed(click(), "x", nan), "finite"),
        (changed(click(), "y", inf), "finite"),
        (changed(click(), "x", 10**400), "finite"),
        (changed(click(), "x", "50"), "expected a number"),
        (changed(click(), "x", True), "expected a number"),
        (changed(click(), "y", None), "expected a number"),
        (changed(click(), "y", ...), "expected a number"),
        (changed(click(), "value", None), "an object with x and y"),
        (changed(click(), "id", ...), "has no id"),
        (changed(click(), "is_positive", ...), 'smart="true"'),
        (changed(click(), "is_positive", "false"), "true or false"),
        (changed(click(), "original_width", ...), "does not say original_width"),
        (changed(click(), "original_height", None), "does not say original_height"),
        (changed(click(), "original_width", 0), "whole pixels"),
        (changed(click(), "original_height", -5), "whole pixels"),
        (changed(click(), "original_width", 100_001), "whole pixels"),
        (changed(click(), "original_width", 1.5), "whole pixels"),
        (changed(click(), "original_width", "200"), "expected a number"),
        (changed(click(), "image_rotation", 90), "rotated by 90"),
        (changed(click(), "to_name", "elsewhere"), "'elsewhere'"),
        (changed(box(), "x", -3), "outside the image"),
        (changed(box(), "width", nan), "finite"),
        (changed(box(), "rotation", "90"), "expected a number"),
        (None, "each an object"),
        ("click", "each an object"),
    ],
)
def test_a_click_that_cannot_be_understood_is_refused(item, says):
    with pytest.raises(Refusal, match=says):
        read(item)


@pytest.mark.parametrize("given", [2, -0.1, nan, "0.5", True])
def test_a_number_that_is_no_granularity_is_refused(given):
    with pytest.raises(Refusal, match="the number in 'granularity_value'"):
        read(click(), number(click(), given))


@pytest.mark.parametrize("context", [[], "x", 3, {"result": {}}, {"result": "x"}])
def test_a_context_of_another_shape_is_refused(context):
    with pytest.raises(Refusal, match="expected"):
        read_ask(CONFIG, TASK, context)


@pytest.mark.parametrize("data", [None, {}, {"photo": "a.jpg"}, {"image": None}, {"image": ""}, {"image": ["a.jpg"]}])
def test_a_task_without_its_image_is_refused(data):
    with pytest.raises(Refusal, match="image"):
        read(click(), task={"id": 7, "data": data})


def test_too_many_clicks_are_refused():
    with pytest.raises(Refusal, match="at most"):
        read(*(click(str(i)) for i in range(MAX_CLICKS + 1)))


def test_a_refusal_does_not_repeat_a_huge_value():
    with pytest.raises(Refusal) as refused:
        read(changed(click(), "x", "5" * 10_000_000))
    assert len(str(refused.value)) < 300


def test_a_click_just_outside_is_moved_onto_the_border():
    first, second = ask_of(click("one", -0.4, 0), click("two", 100.4, 100)).prompt.clicks
    assert (first.x, first.y) == (0, 0)
    assert (199.9 < second.x < 200, 99.9 < second.y < 100) == (True, True)


sides = st.integers(1, 20_000)
percents = st.floats(0, 100)


@given(percents, percents, sides, sides)
def test_percent_to_pixels_and_back(x, y, width, height):
    one = changed(changed(click(x=x, y=y), "original_width", width), "original_height", height)
    got = ask_of(one).prompt.clicks[0]
    assert 0 <= got.x < width
    assert 0 <= got.y < height
    assert (got.x / width * 100, got.y / height * 100) == pytest.approx((x, y), abs=1e-9)


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_a_rectangle_written_and_read_is_the_same(width, height, data):
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    (value,) = shape_values("rectangle", mask)
    item = changed(changed(box(**value), "original_width", width), "original_height", height)
    got = ask_of(item).prompt.box
    assert got is not None
    assert (got.left, got.top, got.right, got.bottom) == pytest.approx((left, top, right, bottom), abs=1e-3)


CLICK_TAG = '<KeyPointLabels name="click" toName="image" smart="true"><Label value="Fox"/></KeyPointLabels>'
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["id", "type", "from_name", "to_name", "original_width", "image_rotation", "is_positive", "value", "item_index"]


@given(
    st.lists(st.tuples(st.sampled_from([*KEYS, "x", "y", "keypointlabels"]), json_values), max_size=3),
    json_values,
)
def test_whatever_comes_is_read_or_refused(changes, other):
    item = click()
    for key, value in changes:
        (item["value"] if isinstance(item["value"], dict) and key in ("x", "y", "keypointlabels") else item)[key] = (
            value
        )
    for context in ({"result": [item, level(click("two"), "0.5")]}, {"result": [item]}, {"result": other}, other):
        with suppress(Refusal):
            read_ask(CONFIG, TASK, context)
    for kind in SHAPES:
        submitted(item | {"type": f"{kind}labels"}, item)
    shape_digest({"points": other})
    shape_digest({"rle": other})


# --- the tag of the answer ---


def outputs(*tags: str) -> LabelConfig:
    written = [tag if "<" in tag else f'<{tag} toName="image"><Label value="Cat"/></{tag.split()[0]}>' for tag in tags]
    return read_config(f'<View><Image name="image" value="$image"/>{"".join(written)}</View>')


@pytest.mark.parametrize(
    ("tags", "chosen"),
    [
        (['RectangleLabels name="r"', 'PolygonLabels name="p"', 'BitmaskLabels name="m"', 'BrushLabels name="b"'], "b"),
        (['RectangleLabels name="r"', 'PolygonLabels name="p"', 'BitmaskLabels name="m"'], "m"),
        (['RectangleLabels name="r"', 'PolygonLabels name="p"'], "p"),
        (['RectangleLabels name="ask" smart="true"', 'RectangleLabels name="r" smart="false"'], "r"),
        (['RectangleLabels name="ask" smart="true"', '<Polygon name="p" toName="image"/>'], "p"),
        (['RectangleLabels name="ask" smart="true"'], "ask"),
        (['BrushLabels name="one"', 'BrushLabels name="two"'], "one"),
        (['BrushLabels name="s" smart="true"', 'BrushLabels name="b"'], "b"),
        (['<BrushLabels name="b" toName="image"><Label value="Dog"/></BrushLabels>', 'PolygonLabels name="p"'], "p"),
        (
            ['<BrushLabels name="dogs" toName="image"><Label value="Dog"/></BrushLabels>', 'BrushLabels name="cats"'],
            "cats",
        ),
        (['<BrushLabels name="any" toName="image" value="$classes"/>', 'PolygonLabels name="p"'], "any"),
        (['BrushLabels name="b"', '<Image name="other" value="$o"/>'], "b"),
    ],
)
def test_the_most_faithful_tag_that_holds_the_class_is_chosen(tags, chosen):
    assert choose_output(outputs(*tags), "image", "Cat").name == chosen


def test_without_a_class_the_first_of_the_most_faithful_is_chosen():
    config = outputs('PolygonLabels name="p"', 'BrushLabels name="one"', 'BrushLabels name="two"')
    assert choose_output(config, "image", None).name == "one"
    assert choose_output(config, "image", "Unknown").name == "one"


def test_no_tag_for_the_image_is_refused_with_what_to_add():
    with pytest.raises(Refusal, match=r'add <BrushLabels name="mask" toName="other"'):
        choose_output(outputs('BrushLabels name="b"'), "other", "Cat")


# --- the answer ---

MASK = np.zeros((100, 200), bool)
MASK[20:60, 40:120] = True
TWO_PARTS = MASK.copy()
TWO_PARTS[70:90, 150:190] = True


def prediction(*scores: float, levels: tuple[float, ...] = ()) -> Prediction:
    proposals = [
        Proposal(mask=MASK, score=score, granularity=Granularity.from_share(levels[i]) if levels else None)
        for i, score in enumerate(scores or (0.9,))
    ]
    return Prediction(proposals=tuple(proposals))


def write_result(ask, config, output, answered, *, model_version, shapes=None) -> list[dict]:
    """The regions of all proposals, as `predictions` writes them."""
    return [
        region
        for index, one in enumerate(answered.proposals)
        for region in write_regions(
            *(ask, config, output, shape_values(output.kind, one.mask) if shapes is None else shapes[index]),
            **{"model_version": model_version, "score": one.score, "granularity": one.granularity, "index": index},
        )
    ]


def written(ask: Ask, *scores: float, config: LabelConfig = CONFIG, levels: tuple[float, ...] = ()) -> list[dict]:
    output = choose_output(config, ask.to_name, ask.class_label)
    return write_result(ask, config, output, prediction(*scores, levels=levels), model_version="v1")


def test_an_answer_has_the_form_that_label_studio_accepts():
    accepted = recorded(90)["results"][0]
    ask = ask_of(click(), level(click(), "0.5"))
    ours = answer(written(ask, 0.91), 0.91, "graco-lora-7")
    assert set(ours) == set(accepted)
    assert [set(result) for result in ours["result"]] == [set(result) for result in accepted["result"]]
    assert [set(result["value"]) for result in ours["result"]] == [
        set(result["value"]) for result in accepted["result"]
    ]
    assert [r["type"] for r in ours["result"]] == [r["type"] for r in accepted["result"]]
    assert json.loads(json.dumps(ours, allow_nan=False)) == ours


def test_a_brush_answer_holds_the_mask_the_class_and_the_level():
    mask, fine = written(ask_of(click(label="Part"), level(click(), "0.3")))
    np.testing.assert_array_equal(brush.decode(mask["value"]["rle"], height=100, width=200), MASK)
    assert mask["value"]["format"] == "rle"
    assert mask["value"]["brushlabels"] == ["Part"]
    assert (mask["from_name"], mask["to_name"], mask["score"]) == ("mask", "image", 0.9)
    assert (mask["original_width"], mask["original_height"], mask["image_rotation"]) == (200, 100, 0)
    assert (fine["type"], fine["from_name"], fine["value"]) == ("labels", "granularity", {"labels": ["0.3"]})
    assert fine["id"] == mask["id"]


def test_a_bitmask_answer_holds_a_picture_of_the_mask():
    config = read_config(make_config(["Object"], output="bitmask"))
    (mask,) = written(ask_of(click(), config=config), config=config)
    np.testing.assert_array_equal(
        outlines.from_png_data_url(mask["value"]["imageDataURL"], height=100, width=200), MASK
    )
    assert (mask["type"], mask["value"]["bitmasklabels"]) == ("bitmasklabels", ["Object"])


def test_a_polygon_answer_has_a_region_for_each_part():
    config = read_config(make_config(["Object"], output="polygon"))
    ask = ask_of(click(), level(click(), "0.7"), config=config)
    one = Prediction(proposals=(Proposal(mask=TWO_PARTS, score=0.5),))
    result = write_result(ask, config, choose_output(config, "image", "Object"), one, model_version="v1")
    assert [r["type"] for r in result] == ["polygonlabels", "labels", "polygonlabels", "labels"]
    assert len({r["id"] for r in result}) == 2
    assert all(r["value"]["closed"] and r["value"]["polygonlabels"] == ["Object"] for r in result[::2])
    xs, ys = zip(*result[0]["value"]["points"], strict=True)
    assert (min(xs), max(xs), min(ys), max(ys)) == (20, 60, 20, 60)


def test_a_rectangle_answer_is_the_box_around_the_mask():
    config = read_config(make_config(["Object"], output="rectangle"))
    (region,) = written(ask_of(click(), config=config), config=config)
    assert region["from_name"] == "mask"
    assert region["value"] == {
        "x": 20.0,
        "y": 20.0,
        "width": 40.0,
        "height": 40.0,
        "rotation": 0,
        "rectanglelabels": ["Object"],
    }


@pytest.mark.parametrize("kind", ["brush", "bitmask", "polygon", "rectangle"])
def test_an_empty_mask_is_no_region(kind):
    assert shape_values(kind, np.zeros((4, 5), bool)) == []


def test_shapes_that_were_kept_give_the_same_answer_and_stay_as_they_were():
    ask = ask_of(click(), level(click(), "0.3"))
    output = choose_output(CONFIG, "image", "Object")
    values = shape_values("brush", MASK)
    kept = deepcopy(values)
    again = write_result(ask, CONFIG, output, prediction(), model_version="v1", shapes=[values])
    assert again == written(ask)
    assert values == kept


@pytest.mark.parametrize(("label", "expected"), [("Part", "Part"), ("Unknown", "Object")])
def test_a_class_that_the_output_lacks_is_replaced_by_its_first(label, expected):
    assert written(ask_of(click(label=label)))[0]["value"]["brushlabels"] == [expected]


def test_without_a_class_the_outputs_first_is_taken():
    assert written(ask_of(level(click(), "0.5")))[0]["value"]["brushlabels"] == ["Object"]


def test_a_class_from_the_tasks_data_is_written_as_it_came():
    config = outputs('<BrushLabels name="b" toName="image" value="$classes"/>', CLICK_TAG)
    assert written(ask_of(click(label="Fox"), config=config), config=config)[0]["value"]["brushlabels"] == ["Fox"]
    no_label = changed(click(), "keypointlabels", [])
    assert "brushlabels" not in written(ask_of(no_label, config=config), config=config)[0]["value"]


def test_a_level_of_another_source_is_written_as_the_nearest_label():
    ask = ask_of(click(), config=WITH_SLIDER, task=TASK | {"drafts": [draft("2026-01-01", 0.8)]})
    assert written(ask, config=WITH_SLIDER)[1]["value"] == {"labels": ["0.7"]}
    assert len(written(ask_of(click()))) == 1


def test_a_number_that_was_given_is_given_back():
    one = click()
    mask, label, value = written(ask_of(one, level(one, "0.1"), number(one, 0.45)))
    assert label["value"] in ({"labels": ["0.5"]}, {"labels": ["0.3"]})
    assert (value["type"], value["from_name"], value["value"]) == ("number", "granularity_value", {"number": 0.45})
    assert mask["id"] == value["id"]


def test_without_a_level_tag_the_number_tag_gets_the_level():
    slider = '<Number name="how" toName="image" min="0" max="1"/></View>\n'
    config = read_config(
        make_config(["Object"], levels=()).replace('max="1"', 'max="10"').replace("</View>\n", slider, 1)
    )
    ask = ask_of(click(), config=config, task=TASK | {"drafts": [draft("2026-01-01", 0.3)]})
    assert written(ask, config=config)[1]["value"] == {"number": 3}


def test_each_proposal_says_where_it_stands():
    one = click()
    result = written(ask_of(one, number(one, 0.52)), 0.9, 0.8, 0.7, levels=(0.52, 0.1, 1.0))
    assert [r["value"] for r in result if r["type"] != "brushlabels"] == [
        {"labels": ["0.5"]},
        {"number": 0.52},
        {"labels": ["0.1"]},
        {"number": 0.1},
        {"labels": ["1.0"]},
        {"number": 1.0},
    ]
    assert len({r["id"] for r in result}) == 3


def test_a_whole_image_proposal_needs_no_click():
    (batch,) = read_batch(CONFIG, TASK)
    ask = batch.sized(200, 100)
    assert (ask.prompt, ask.prompt_type, ask.task_id, ask.phrase) == (Prompt(), None, 7, None)
    result = written(ask, 0.9, 0.8, levels=(1.0, 0.3))
    assert [r["value"]["labels"] for r in result if r["type"] == "labels"] == [["1.0"], ["0.3"]]


@pytest.mark.parametrize(("score", "shown"), [(0.5, 0.5), (1.2, 1.0), (-1, 0.0), (nan, 0.0), (inf, 0.0)])
def test_scores_are_finite_and_within_0_and_1(score, shown):
    assert written(ask_of(click()), score)[0]["score"] == shown
    assert answer([], score, "v")["score"] == shown


def test_an_empty_answer_may_say_why():
    assert empty_answer("v1") == {"result": [], "score": 0.0, "model_version": "v1"}
    assert empty_answer("v1", "no such image")["reason"] == "no such image"


# --- ids and digests ---


def test_the_same_request_gives_the_same_id():
    items = (click(), level(click(), "0.5"), phrase(click(), "ear"))
    ids = {region_id(ask_of(*items), model_version="v1") for _ in range(2)}
    assert len(ids) == 1
    assert len(ids.pop()) == 16


def test_whatever_changes_the_answer_changes_the_id():
    one = click()
    asks = [
        ask_of(one),
        ask_of(click("other")),  # a new click on the same spot
        ask_of(click(x=51)),
        ask_of(click(positive=False)),
        ask_of(one, click("two")),
        ask_of(one, level(one, "0.5")),
        ask_of(one, number(one, 0.45)),
        ask_of(one, number(one, 0.44)),
        ask_of(one, phrase(one, "ear")),
        ask_of(one, task=TASK | {"id": 8}),
        ask_of(box()),
        ask_of(box(11)),
    ]
    ids = [region_id(ask, model_version="v1") for ask in asks]
    ids += [region_id(asks[0], model_version="v2"), region_id(asks[0], model_version="v1", index=1)]
    ids += [region_id(asks[0], model_version="v1", part=1)]
    ids += [
        region_id(asks[0], model_version="v1", granularity=level) for level in (Granularity(3), Granularity(3, 0.3))
    ]
    assert len(set(ids)) == len(ids)


# --- what was submitted ---

HEIGHT, WIDTH = 12, 20


def blob(left=3, top=2, right=9, bottom=8):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def region(value, *, kind="brush", id="r1", origin="manual", label="Object", **more):
    return {
        **{"id": id, "type": f"{kind}labels", "from_name": "mask", "to_name": "image", "origin": origin},
        **{"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0},
        "value": value | {f"{kind}labels": [label]},
    } | more


def painted(mask):
    return {"format": "rle", "rle": brush.encode(mask)}


def remembered(value, **more):
    return Answer(
        **{
            **{"region_id": "r1", "project": "3.1", "task_id": 7, "image_id": "i", "digest": shape_digest(value)},
            **{"prompt": json.dumps({"clicks": [{"x": 4.5, "y": 3.0, "positive": True}]}), "granularity": 0.7},
            **{"model_version": "v", "phrase": "wheel", "adapter": "a1", "shape": pack_shape(value)},
        }
        | more
    )


def submitted(*results, answers=None, config=CONFIG, task=TASK, annotation=None, max_pixels=10**6):
    return read_corrections(
        {"id": 5, "result": list(results), "updated_at": "2026-11-21T08:48:26.5Z"} | (annotation or {}),
        task,
        config,
        "3",
        (answers or {}).get,
        received_s=99.0,
        max_pixels=max_pixels,
    )


def only(found):
    assert found.left_out == ()
    (one,) = found.regions
    return one


SHAPES = {
    "brush": painted(blob()),
    "bitmask": {"imageDataURL": outlines.to_png_data_url(blob())},
    "polygon": {"points": [[15, 100 / 6], [45, 100 / 6], [45, 200 / 3], [15, 200 / 3]], "closed": True},
    "rectangle": {"x": 15, "y": 100 / 6, "width": 30, "height": 50, "rotation": 0},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_of_region_is_a_mask_of_the_image(kind):
    config = read_config(make_config(["Object"], output=kind))
    one = only(submitted(region(SHAPES[kind], kind=kind), config=config))
    np.testing.assert_array_equal(decode(one.mask), blob())
    assert (one.kind, one.label, one.uri, one.proposed) == ("drawn", "Object", "/data/upload/3/cat.jpg", None)


def test_an_ellipse_is_a_mask_too_and_is_turned_about_its_middle():
    config = read_config(
        make_config(["Object"]).replace(
            "</View>\n", '<EllipseLabels name="e" toName="image"><Label value="Object"/></EllipseLabels></View>\n', 1
        )
    )
    round_one = {"x": 50, "y": 50, "radiusX": 10, "radiusY": 100 / 3, "rotation": 0}  # of 2 and 4 pixels
    mask = decode(only(submitted(region(round_one, kind="ellipse", from_name="e"), config=config)).mask)
    assert mask.shape == (HEIGHT, WIDTH)
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 9, 8, 11)
    lying = round_one | {"rotation": 90}
    turned = decode(only(submitted(region(lying, kind="ellipse", from_name="e"), config=config)).mask)
    rows, columns = np.nonzero(turned)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 7, 6, 13)
    empty = region(round_one | {"radiusX": 0}, kind="ellipse", from_name="e")
    ((name, why),) = submitted(empty, config=config).left_out
    assert name == "r1"
    assert "empty" in why


def test_of_an_id_with_two_kinds_of_shape_the_first_counts():
    brushed, outlined = region(painted(blob())), region(outline(LEFT), kind="polygon")
    np.testing.assert_array_equal(decode(only(submitted(brushed, outlined)).mask), blob())
    np.testing.assert_array_equal(decode(only(submitted(outlined, brushed)).mask), LEFT)


def test_a_line_is_left_out_with_the_reason():
    found = submitted(region({"vertices": [{"x": 1, "y": 2}, {"x": 3, "y": 4}]}, kind="vector"))
    assert found.regions == ()
    assert "has no mask" in found.left_out[0][1]


def test_a_turned_rectangle_is_turned_about_its_corner():
    turned = {"x": 50, "y": 0, "width": 50, "height": 25, "rotation": 90}  # 10 x 3 pixels, then 3 x 10
    config = read_config(make_config(["Object"], output="rectangle"))
    one = only(submitted(region(turned, kind="rectangle"), config=config))
    np.testing.assert_array_equal(decode(one.mask), blob(7, 0, 10, 10))


def test_what_came_back_unchanged_is_accepted_with_the_clicks_level_and_phrase_of_the_answer():
    value = painted(blob())
    one = only(submitted(region(value), answers={"r1": remembered(value)}))
    assert (one.kind, one.granularity, one.phrase, one.adapter) == ("accepted", 0.7, "wheel", "a1")
    assert one.clicks == (Click(x=4.5, y=3.0, positive=True),)
    assert one.proposed == one.mask


def test_what_came_back_changed_is_corrected_and_the_proposed_mask_is_known():
    proposed = blob(right=12)
    one = only(submitted(region(painted(blob())), answers={"r1": remembered(painted(proposed))}))
    assert one.kind == "corrected"
    np.testing.assert_array_equal(decode(one.proposed), proposed)
    np.testing.assert_array_equal(decode(one.mask), blob())


def test_an_answer_of_an_earlier_version_has_no_proposed_mask():
    one = only(submitted(region(painted(blob())), answers={"r1": remembered(painted(blob(right=12)), shape=None)}))
    assert (one.kind, one.proposed) == ("corrected", None)


@pytest.mark.parametrize(
    ("origin", "known", "kind"),
    [
        ("prediction", None, "predicted"),
        ("prediction-changed", None, "predicted-changed"),
        ("prediction-changed", blob(), "predicted"),
        ("prediction", blob(right=12), "predicted-changed"),
        ("manual", None, "drawn"),
    ],
)
def test_a_stored_prediction_says_what_became_of_it_unless_we_know_better(origin, known, kind):
    answers = {} if known is None else {"r1": remembered(painted(known))}
    assert only(submitted(region(painted(blob()), origin=origin), answers=answers)).kind == kind


POLYGONS = read_config(make_config(["Object", "Part"], output="polygon"))
LEFT, RIGHT = blob(right=6), blob(left=12, right=15)  # a person behind a pole


def outline(mask):
    (value,) = shape_values("polygon", mask)
    return value


def behind_a_pole(*regions, forgotten=(), origin="manual"):
    """What is read where the left and the right part of one proposal were answered, and `regions` came back."""
    answers = {
        "left": remembered(outline(LEFT), region_id="left", parts="left right", granularity=1.0),
        "right": remembered(outline(RIGHT), region_id="right", parts="left", granularity=1.0),
    }
    found = [region(outline(mask), kind="polygon", id=name, origin=origin, **more) for name, mask, more in regions]
    return submitted(*found, answers={k: v for k, v in answers.items() if k not in forgotten}, config=POLYGONS).regions


def test_the_parts_of_one_proposal_are_one_correction():
    (one,) = behind_a_pole(("left", LEFT, {}), ("right", RIGHT, {}))
    np.testing.assert_array_equal(decode(one.mask), LEFT | RIGHT)
    assert (one.region, one.kind, one.granularity, one.adapter) == ("left", "accepted", 1.0, "a1")
    assert one.proposed == one.mask
    (stored,) = behind_a_pole(("left", LEFT, {}), ("right", RIGHT, {}), origin="prediction")
    assert stored.kind == "predicted"


@pytest.mark.parametrize(
    ("regions", "mask"),
    [
        ([("left", LEFT, {}), ("right", blob(left=12, right=17), {})], LEFT | blob(left=12, right=17)),
        ([("left", LEFT, {})], LEFT),
        ([("right", RIGHT, {})], RIGHT),
    ],
    ids=["one was changed", "the second was deleted", "the first was deleted"],
)
def test_a_proposal_of_which_a_part_was_changed_or_deleted_is_corrected(regions, mask):
    (one,) = behind_a_pole(*regions)
    np.testing.assert_array_equal(decode(one.mask), mask)
    assert (one.region, one.kind, one.granularity) == (regions[0][0], "corrected", 1.0)
    np.testing.assert_array_equal(decode(one.proposed), LEFT | RIGHT)


def test_a_part_that_was_given_another_class_is_an_object_of_its_own():
    first, second = behind_a_pole(("left", LEFT, {}), ("right", RIGHT, {"label": "Part"}))
    assert [(one.region, one.kind, one.label) for one in (first, second)] == [
        ("left", "corrected", "Object"),
        ("right", "corrected", "Part"),
    ]
    np.testing.assert_array_equal(decode(second.mask), RIGHT)


def test_a_part_whose_proposal_is_forgotten_in_part_is_corrected_and_what_was_proposed_is_unknown():
    (one,) = behind_a_pole(("right", RIGHT, {}), forgotten=["left"])
    assert (one.region, one.kind, one.proposed) == ("right", "corrected", None)
    left, right = behind_a_pole(("left", LEFT, {}), ("right", RIGHT, {}), forgotten=["right"])
    assert (left.kind, left.proposed, right.kind) == ("corrected", None, "drawn")


def test_an_accepted_region_of_every_kind_is_what_was_answered():
    for output in ("brush", "bitmask", "polygon", "rectangle"):
        config = read_config(make_config(["Object"], output=output))
        result = written(ask_of(click(), level(click(), "0.3"), config=config), config=config)
        came_back = json.loads(json.dumps(result))
        for item in came_back:
            for key in ("x", "y", "width", "height"):
                if key in item["value"]:
                    item["value"][key] *= 1 + 1e-12
        known = {result[0]["id"]: remembered(result[0]["value"])}
        assert only(submitted(*came_back, answers=known, config=config)).kind == "accepted"


def test_recorded_events_are_read_as_what_they_were():
    def read(number, answers=None):
        event = recorded(number)
        return read_corrections(
            event["annotation"],
            event["task"],
            read_config(event["project"]["label_config"]),
            str(event["project"]["id"]),
            (answers or {}).get,
            received_s=0.0,
            max_pixels=10**6,
        )

    drawn = read(40)
    one = only(drawn)
    assert (drawn.annotation, drawn.task, drawn.annotator, drawn.skipped) == (1, 8, 1, False)
    assert drawn.updated_s == pytest.approx(1795250906.807676)
    assert (one.region, one.label, one.granularity, one.kind) == ("2de56ade51", "Object", 0.3, "drawn")
    assert (one.uri, one.height, one.width) == ("/data/upload/3/f4aecc9d-coffee.jpg", 400, 600)
    answer = remembered(recorded(40)["annotation"]["result"][0]["value"])
    assert only(read(40, {"2de56ade51": answer})).kind == "accepted"
    corrected = only(read(41, {"2de56ade51": answer}))
    assert corrected.kind == "corrected"
    assert corrected.proposed["counts"] == one.mask["counts"] != corrected.mask["counts"]
    assert (only(read(42)).kind, only(read(43)).kind) == ("predicted", "predicted-changed")
    assert read(45).skipped
    assert read(45).regions == ()


def test_without_an_answer_the_level_is_the_regions_own_and_else_the_tasks_slider():
    config = read_config((GOLDEN / "config_C.xml").read_text())
    mask = region(painted(blob()))
    chosen = mask | {"type": "labels", "from_name": "granularity", "value": painted(blob()) | {"labels": ["0.3"]}}
    slider = {"id": "x", "type": "number", "from_name": "task_granularity", "value": {"number": 0.85}}
    assert only(submitted(mask, chosen, slider, config=config)).granularity == 0.3
    assert only(submitted(mask, slider, config=config)).granularity == 0.85
    assert only(submitted(mask, config=config)).granularity is None
    assert only(submitted(mask, slider | {"value": {"number": 40}}, config=config)).granularity is None


def test_a_number_on_a_mask_that_was_changed_is_its_level_and_on_one_that_was_not_the_answers_stays():
    proposed, drawn = painted(blob(right=12)), painted(blob())
    answers = {"r1": remembered(proposed, granularity=0.3)}

    def with_number(value, given):
        number = region(value) | {
            "type": "number",
            "from_name": "granularity_value",
            "value": value | {"number": given},
        }
        return only(submitted(region(value), number, answers=answers)).granularity

    assert with_number(drawn, 1.0) == 1.0
    assert with_number(drawn, 0.3) == 0.3
    assert with_number(proposed, 1.0) == 0.3, "it was not looked at again after the slider had moved"
    assert with_number(drawn, 40) == 0.3, "what is no share says nothing"
    chosen = region(drawn) | {"type": "labels", "from_name": "granularity", "value": drawn | {"labels": ["1.0"]}}
    assert only(submitted(region(drawn), chosen, answers=answers)).granularity == 0.3, "the editor puts labels there"


def test_a_phrase_typed_on_the_mask_is_the_masks():
    mask = region(painted(blob()))
    typed = {"id": "r1", "type": "textarea", "from_name": "phrase", "value": {"text": [" the  left eye "]}}
    assert only(submitted(mask, typed)).phrase == "the left eye"


def test_a_box_of_a_smart_tag_asks_and_is_no_mask():
    box = region(SHAPES["rectangle"], kind="rectangle", from_name="box")
    found = submitted(box, region(painted(blob()), id="r2"))
    assert [one.region for one in found.regions] == ["r2"]
    ((left_out, why),) = found.left_out
    assert left_out == "r1"
    assert "asks for a mask" in why


def _claims(values):
    return [*values.to_bytes(4, "big"), *brush.encode(blob())[4:]]


@pytest.mark.parametrize(
    ("value", "more"),
    [
        ({"rle": []}, {}),
        ({"rle": [0, 0, 3]}, {}),
        ({"rle": [-1, *brush.encode(blob())[1:]]}, {}),
        ({"rle": brush.encode(blob())[:-3]}, {}),
        ({"rle": _claims(10**9)}, {}),
        ({"rle": "AAAA"}, {}),
        ({"rle": [1.5] * 100}, {}),
        ({"rle": [0] * 10**6}, {}),
        ({"rle": brush.encode(np.zeros((HEIGHT, WIDTH), bool))}, {}),
        ({"rle": _claims(4 * 10**9)}, {"original_width": 50_000, "original_height": 20_000}),
        ({"rle": brush.encode(blob())}, {"original_width": 21}),
        ({"rle": brush.encode(blob())}, {"original_width": -5}),
        ({"rle": brush.encode(blob())}, {"original_width": None}),
        ({"rle": brush.encode(blob())}, {"image_rotation": 90}),
        ({"rle": brush.encode(blob())}, {"to_name": "elsewhere"}),
        ({"rle": brush.encode(blob())}, {"item_index": -1}),
        ({"imageDataURL": "data:image/png;base64,AAAA"}, {}),
        ({"imageDataURL": 7}, {}),
        ({"points": [[0, 0], [1, inf], [5, 5]]}, {}),
        ({"points": [[0, 0], "ab", [5, 5]]}, {}),
        ({"points": {"x": 1}}, {}),
        ({"x": 1, "y": "2", "width": 3, "height": 4}, {}),
        ({"x": 1, "y": 2, "width": 0, "height": 4}, {}),
        ({}, {}),
    ],
)
def test_a_malformed_region_is_left_out_with_the_reason_and_the_rest_is_kept(value, more):
    tracemalloc.start()
    try:
        found = submitted(region(value, id="bad") | more, region(painted(blob()), id="good"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [one.region for one in found.regions] == ["good"]
    ((left_out, why),) = found.left_out
    assert left_out == "bad"
    assert len(why) > 10
    assert peak < 40e6


@pytest.mark.parametrize(
    "annotation",
    [
        {"result": None},
        {"result": [None, {"type": "brushlabels"}, {"type": "brushlabels", "id": 3, "value": {}}]},
        {"result": [{"type": ["brush"], "id": "a", "value": {}}, {"type": "choices", "id": "a", "value": {}}]},
        {"updated_at": 5, "created_at": "yesterday", "completed_by": True, "ground_truth": "no"},
    ],
)
def test_what_is_no_region_is_skipped(annotation):
    found = submitted(annotation=annotation)
    assert (found.regions, found.left_out, found.annotator, found.ground_truth) == ((), (), None, False)


def test_an_annotation_without_a_time_is_of_when_it_came():
    assert submitted(annotation={"updated_at": None}).updated_s == 99.0


@pytest.mark.parametrize("number", [None, "5", True])
def test_what_has_no_number_is_no_annotation(number):
    with pytest.raises(Refusal, match="whole number"):
        submitted(annotation={"id": number})


@pytest.mark.parametrize("kind", SHAPES)
def test_a_packed_shape_comes_back_with_the_same_digest(kind):
    assert shape_digest(unpack_shape(pack_shape(SHAPES[kind]))) == shape_digest(SHAPES[kind])


@pytest.mark.parametrize(
    "value", [{"rle": "x"}, {"rle": [300]}, {"rle": [None]}, {"points": [[1, "a"]]}, {"x": {}}, {}]
)
def test_a_shape_of_others_has_a_digest_too(value):
    assert len(shape_digest(value)) == 32


@pytest.mark.parametrize("kind", ["hologram", "brush", "brushlabels", None])
def test_a_drawing_that_is_no_click_is_refused_with_the_remedy(kind):
    drawn = {"id": "a", "type": kind, "from_name": "mask", "to_name": "image", "value": {"format": "rle", "rle": [1]}}
    config = read_config(make_config(["Object"]))
    with pytest.raises(Refusal, match='smart="false" on all others'):
        read_ask(config, {"id": 1, "data": {"image": "/a"}}, {"result": [drawn]})


def test_a_phrase_longer_than_a_phrase_is_refused():
    task, context = {"id": 1, "data": {"image": "/a"}}, {"result": []}
    base = {"id": "a", "to_name": "image", "original_width": 9, "original_height": 9, "is_positive": True}
    spot = {"x": 5, "y": 5, "width": 1}
    context["result"] = [
        base | {"type": "keypointlabels", "from_name": "click", "value": spot | {"keypointlabels": ["Object"]}},
        base | {"type": "textarea", "from_name": "phrase", "value": spot | {"text": ["wheel " * 100]}},
    ]
    with pytest.raises(Refusal, match="599 characters"):
        read_ask(read_config(make_config(["Object"])), task, context)
