import re
from pathlib import Path
from xml.etree.ElementTree import Element

import pytest
from defusedxml.ElementTree import fromstring
from hypothesis import given
from hypothesis import strategies as st

from ml_backend.label_config import BOX_KEYS, CLICK_KEYS, LEVEL_KEYS, MASK_KEYS, check_config, make_config, read_config
from model.types import Refusal

GOLDEN = Path(__file__).parent.parent / "golden" / "label_studio"
CLICK = '<KeyPointLabels name="kp" toName="img" smart="true" smartOnly="true"><Label value="Cat"/></KeyPointLabels>'
MASK = '<BrushLabels name="mask" toName="img" smart="false"><Label value="Cat"/></BrushLabels>'
LEVELS = '<Labels name="how" toName="img"><Label value="0.2"/><Label value="1"/></Labels>'
PHRASE = '<TextArea name="phrase" toName="img" perRegion="true"/>'


def view(*tags: str) -> str:
    return f'<View><Image name="img" value="$image"/>{"".join(tags)}</View>'


def recorded(letter: str) -> str:
    return (GOLDEN / f"config_{letter}.xml").read_text()


def found(xml: str) -> list[tuple[str, str]]:
    return [(finding.severity, finding.tag) for finding in check_config(xml)]


def sentences(xml: str) -> str:
    return "\n".join(finding.sentence for finding in check_config(xml))


# --- reading ---


def test_the_recommended_configuration_is_read():
    config = read_config(recorded("C"))
    assert [(image.name, image.paths) for image in config.images] == [("image", ("image",))]
    assert [(tag.name, tag.kind, tag.smart, tag.smart_only) for tag in config.prompts] == [
        ("click", "keypoint", True, True),
        ("box", "rectangle", True, True),
    ]
    assert [(tag.name, tag.result_type, tag.smart, tag.labels) for tag in config.outputs] == [
        ("box", "rectanglelabels", True, ("Object", "Part")),
        ("mask", "brushlabels", False, ("Object", "Part")),
    ]
    assert [label.granularity for label in config.levels[0].labels] == [0.1, 0.3, 0.5, 0.7, 1.0]
    assert [(tag.name, tag.per_region) for tag in config.numbers] == [("task_granularity", False)]
    assert [tag.name for tag in config.phrases] == ["phrase"]
    assert config.classes == ()


def test_level_labels_may_say_their_granularity_in_an_attribute():
    level = read_config(recorded("B")).levels[0]
    assert (level.name, level.granularity("L 0.2"), level.granularity("L 0.8")) == ("level", 0.2, 0.8)
    assert level.granularity("Object") is None
    assert [level.nearest(value) for value in (0.0, 0.4, 0.6, 1.0)] == ["L 0.2", "L 0.2", "L 0.8", "L 0.8"]


ALL = '<Labels name="granularity" toName="img"><Label value="0.2"/><Label value="every" graco="All"/></Labels>'


def test_a_level_label_may_ask_for_all_levels():
    (level,) = read_config(view(CLICK, MASK, ALL)).levels
    assert (level.all_levels, level.granularity("every"), level.nearest(1.0)) == ("every", None, "0.2")
    (level,) = read_config(view(CLICK, MASK, ALL.replace("granularity", "how"))).levels
    assert level.all_levels == "every"
    assert "every" not in sentences(view(CLICK, MASK, ALL, PHRASE))
    assert read_config(make_config(["Car"])).levels[0].all_levels == "all"


@pytest.mark.parametrize(("written", "usual"), [("all", "all"), ("ALL", "all"), ("0.3", 0.3), ("0", 0.0), ("1", 1.0)])
def test_the_level_tag_says_what_a_click_without_a_level_gets(written, usual):
    xml = make_config(["Car"], usual="all").replace('graco="all">', f'graco="{written}">', 1)
    assert read_config(xml).levels[0].usual == usual
    assert not check_config(xml)
    assert read_config(make_config(["Car"])).levels[0].usual is None


@pytest.mark.parametrize("written", ["some", "2", "-0.1", ""])
def test_what_is_no_level_is_not_read_and_said(written):
    xml = make_config(["Car"], usual="all").replace('graco="all">', f'graco="{written}">', 1)
    assert read_config(xml).levels[0].usual is None
    assert any("is not read" in finding.sentence for finding in check_config(xml))
    with pytest.raises(Refusal, match="without a level"):
        make_config(["Car"], usual=written)


def test_a_usual_level_on_another_tag_is_not_read_and_said():
    xml = make_config(["Car"]).replace('<KeyPointLabels name="click"', '<KeyPointLabels name="click" graco="all"', 1)
    assert any("<Labels> tag of the levels" in finding.sentence for finding in check_config(xml))
    with pytest.raises(Refusal, match="beside levels"):
        make_config(["Car"], levels=(), usual="all")


def test_asking_for_all_levels_elsewhere_is_noticed():
    xml = view(CLICK.replace('value="Cat"', 'value="Cat" graco="all"'), MASK, LEVELS, PHRASE)
    assert found(xml) == [("warning", '<KeyPointLabels name="kp">')]
    assert "move it there" in sentences(xml)


def test_class_labels_may_carry_a_granularity():
    config = read_config(recorded("A"))
    assert {label.value: label.granularity for label in config.prompts[0].labels} == {"Object": 0.9, "Part": 0.3}
    assert config.levels == ()
    assert [(tag.name, tag.per_region) for tag in config.numbers] == [
        ("granularity_region", True),
        ("granularity", False),
    ]
    assert config.phrases == ()  # its TextArea is per task


@pytest.mark.parametrize(
    ("labels", "granularities"),
    [
        ('<Labels name="a" toName="img"><Label value="0,3"/><Label value="1.0"/></Labels>', [0.3, 1.0]),
        ('<Labels name="a" toName="img"><Label value="fine" graco="0.1"/></Labels>', [0.1]),
        ('<Labels name="Level" toName="img"><Label value="fine 0.2"/><Label value="?"/></Labels>', [0.2]),
        ('<labels NAME="granularity" TONAME="img"><label VALUE="1"/></labels>', [1.0]),
        ('<Labels name="a" toName="img"><View><Label value="x" alias="0.4"/></View></Labels>', [0.4]),
    ],
)
def test_labels_that_read_as_numbers_are_levels(labels, granularities):
    config = read_config(view(CLICK, MASK, labels))
    assert [label.granularity for label in config.levels[0].labels] == granularities
    assert config.classes == ()


@pytest.mark.parametrize(
    "labels",
    [
        '<Labels name="a" toName="img"><Label value="Cat"/><Label value="0.5"/></Labels>',
        '<Labels name="a" toName="img"><Label value="3"/></Labels>',
        '<Labels name="a" toName="img"><Label value="nan"/></Labels>',
        '<Labels name="level" toName="img"><Label value="Cat"/></Labels>',
        '<Labels name="a" toName="img"/>',
    ],
)
def test_labels_that_do_not_read_as_numbers_are_classes(labels):
    config = read_config(view(CLICK, MASK, labels))
    assert config.levels == ()
    assert config.class_tag("img") is not None


def test_classes_with_granularities_beside_plain_tags_stay_classes():
    labels = '<Labels name="class" toName="img"><Label value="Cat" graco="0.8"/></Labels>'
    config = read_config(
        view('<KeyPoint name="kp" toName="img" smart="true"/>', '<Brush name="m" toName="img"/>', labels)
    )
    assert config.levels == ()
    assert config.classes[0].labels[0].granularity == 0.8
    assert [(tag.name, tag.labelled, tag.result_type) for tag in config.outputs] == [("m", False, "brush")]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ('<Number name="granularity" toName="img"/>', [(False, 1)]),
        ('<Number name="level" toName="img" perRegion="true" min="1" max="10"/>', [(True, 10)]),
        ('<Number name="how" toName="img" perRegion="true" min="0" max="1"/>', [(True, 1)]),
        ('<Number name="age" toName="img" min="0" max="120"/>', []),
        ('<Number name="age" toName="img"/>', []),
    ],
)
def test_numbers_of_granularity_are_known_by_name_or_range(number, expected):
    assert [(tag.per_region, tag.scale) for tag in read_config(view(number)).numbers] == expected


def test_a_number_named_granularity_wins_over_one_of_the_same_range():
    number = '<Number name="certainty" toName="img" min="0" max="1"/>'
    numbers = (number, number.replace("certainty", "granularity"))
    assert [tag.name for tag in read_config(view(*numbers)).numbers] == ["granularity"]


def test_of_several_text_areas_the_one_named_phrase_is_read():
    areas = (
        '<TextArea name="note" toName="img" perRegion="true"/><TextArea name="phrase" toName="img" perRegion="true"/>'
    )
    assert [tag.name for tag in read_config(view(areas)).phrases] == ["phrase"]
    assert [tag.name for tag in read_config(view(areas.replace("phrase", "words"))).phrases] == ["note", "words"]


def test_value_lists_and_labels_from_the_data_are_noted():
    config = read_config(
        '<View><Image name="a" valueList="$images"/><Image name="b" value="fixed.jpg"/>'
        '<BrushLabels name="m" toName="a" value="$classes"/></View>'
    )
    assert [(image.paths, image.is_list) for image in config.images] == [(("images",), True), ((), False)]
    assert config.outputs[0].dynamic
    assert config.outputs[0].holds("whatever")


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        ("$pages[0]", ("pages[0]",)),
        ("$photo.url", ("photo.url",)),
        ("/data/local-files/?d=$file", ("file",)),
        ("https://host/$bucket/$file", ("bucket", "file")),
    ],
)
def test_an_image_at_a_path_or_inside_an_address_is_nothing_to_mend(value, paths):
    text = make_config(["Object"]).replace('value="$image"', f'value="{value}"')
    assert read_config(text).images[0].paths == paths
    assert check_config(text) == check_config(make_config(["Object"]))


def test_a_tag_that_is_not_smart_asks_nothing():
    assert read_config(view(CLICK.replace('smart="true" smartOnly="true"', 'smart="false"'))).prompts == ()


def test_the_same_text_is_read_once():
    assert read_config(recorded("C")) is read_config(recorded("C"))


@pytest.mark.parametrize(
    ("xml", "says"),
    [
        ("<View><Image", "not XML"),
        ("", "not XML"),
        ("<View/>", "no <Image> tag"),
        ('<View><Image value="$image"/></View>', "no <Image> tag"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><View>&b;</View>', "entities"),
        (f"<View>{'<View>' * 100}{'</View>' * 100}</View>", "deep"),
        ("<View/>" + " " * 1_000_000, "characters"),
        ("<View>\ud800</View>", "cannot be read"),
        ("<View>\x00</View>", "not XML"),
        (None, "no labelling configuration"),
        ({}, "no labelling configuration"),
    ],
)
def test_what_is_no_configuration_is_refused_with_a_sentence(xml, says):
    with pytest.raises(Refusal, match=says):
        read_config(xml)


# --- checking ---


@pytest.mark.parametrize("letter", "ABC")
def test_recorded_configurations_have_no_error(letter):
    assert "error" not in {severity for severity, _ in found(recorded(letter))}


def test_a_brush_that_is_smart_by_default_is_found():
    assert ("warning", '<BrushLabels name="brush">') in found(recorded("A"))


def test_nothing_is_found_in_a_good_configuration():
    assert check_config(view(CLICK, MASK, LEVELS, PHRASE)) == []


@pytest.mark.parametrize(
    ("tags", "severity", "says"),
    [
        ((MASK, LEVELS, PHRASE), "error", "no tag says smart"),
        ((CLICK.replace('smartOnly="true"', ""), MASK, LEVELS, PHRASE), "warning", 'add smartOnly="true"'),
        ((CLICK, MASK.replace('smart="false"', ""), LEVELS, PHRASE), "warning", 'add smart="false"'),
        ((CLICK, MASK, '<MagicWand name="w" toName="img"/>', LEVELS, PHRASE), "warning", 'add smart="false"'),
        ((CLICK, LEVELS, PHRASE), "error", "no tag can hold the mask"),
        ((CLICK, MASK.replace("Cat", "Dog"), LEVELS, PHRASE), "warning", "'Cat' are in no tag"),
        ((CLICK, MASK, LEVELS, PHRASE.replace("img", "other")), "error", "points at no tag"),
        ((CLICK, MASK, LEVELS, PHRASE.replace('"phrase"', '"kp"')), "error", "2 tags have this name"),
        ((CLICK, MASK, LEVELS, PHRASE, '<Brush toName="img" smart="false"/>'), "error", "it has no name"),
        ((CLICK, MASK, LEVELS), "info", "no phrase can be typed"),
        ((CLICK, MASK, LEVELS, '<TextArea name="t" toName="img"/>'), "info", "it is per task and so not read"),
        ((CLICK, MASK, PHRASE), "info", "nothing sets the granularity"),
        ((CLICK, MASK, PHRASE, '<Number name="granularity" toName="img"/>'), "warning", "5 s late"),
        ((CLICK, MASK, PHRASE, '<Number name="level" toName="img" perRegion="true"/>'), "info", "at the next click"),
        ((CLICK, MASK, LEVELS, PHRASE, '<Rating name="granularity" toName="img"/>'), "warning", "not read from it"),
        ((CLICK, MASK.replace("/></", ' granularity="0.3"/></'), LEVELS, PHRASE), "error", "breaks the editor"),
        ((CLICK, MASK.replace("/></", ' graco="30%"/></'), LEVELS, PHRASE), "warning", "not a number from 0 to 1"),
        ((CLICK, MASK, LEVELS.replace("how", "level").replace("0.2", "5"), PHRASE), "warning", "no number from 0 to 1"),
        (
            (CLICK, MASK, LEVELS.replace("/><", ' hotkey="Q"/><', 2).replace('"Q"', '"q"', 1), PHRASE),
            "warning",
            "hotkey",
        ),
        ((CLICK.replace('<Label value="Cat"/>', ""), MASK, LEVELS, PHRASE), "error", "it has no <Label>"),
        ((CLICK, MASK, '<Rectangle name="r" toName="img"/>', LEVELS, PHRASE), "info", "smart unless told otherwise"),
        ((CLICK, '<Brush name="r" toName="img" smart="false"/>', LEVELS, PHRASE), "warning", "get no class"),
    ],
)
def test_each_fault_is_found_with_what_to_do(tags, severity, says):
    findings = [finding for finding in check_config(view(*tags)) if says in finding.sentence]
    assert [finding.severity for finding in findings] == [severity]


def test_a_photo_that_can_be_rotated_in_the_editor_is_warned_of():
    xml = view(CLICK, MASK, LEVELS, PHRASE)
    assert found(xml.replace("<Image ", '<Image rotateControl="true" ')) == [("warning", '<Image name="img">')]
    assert found(xml.replace("<Image ", '<Image rotateControl="false" ')) == []


def test_a_smart_box_as_the_only_output_is_warned_of():
    box = (
        '<RectangleLabels name="box" toName="img" smart="true" smartOnly="true"><Label value="Cat"/></RectangleLabels>'
    )
    assert ("warning", "<BrushLabels>") in found(view(box, LEVELS, PHRASE))


def test_each_clicked_image_needs_an_output_of_its_own():
    second = '<Image name="two" value="$other"/>' + CLICK.replace("img", "two").replace('"kp"', '"kp2"')
    assert "mask of image 'two'" in sentences(view(CLICK, MASK, LEVELS, PHRASE, second))


def test_an_image_in_a_fixed_column_is_pointed_out():
    assert ("info", '<Image name="image">') in found(recorded("C"))
    assert "fixed" not in sentences(make_config(["Cat"]))


def test_an_image_without_a_data_key_is_an_error():
    assert ("error", '<Image name="img">') in found(view(CLICK, MASK, LEVELS, PHRASE).replace("$image", "image"))


def test_levels_of_a_tag_with_several_labels_at_once_need_no_place_in_the_output():
    assert "are in no tag" not in sentences(recorded("B"))


def test_errors_come_first_and_a_broken_text_is_one():
    order = ["error", "warning", "info"]
    severities = [order.index(severity) for severity, _ in found(view(CLICK.replace('smartOnly="true"', "")))]
    assert severities == sorted(severities)
    assert found("<View") == [("error", "<View>")]


# --- printing ---


@pytest.mark.parametrize("output", ["brush", "bitmask", "polygon", "rectangle"])
def test_a_printed_configuration_has_nothing_to_mend(output):
    xml = make_config(["Car", "Wheel"], output=output)
    assert check_config(xml) == []
    config = read_config(xml)
    assert [(tag.kind, tag.smart) for tag in config.outputs if tag.name == "mask"] == [(output, False)]
    assert [tag.name for tag in (*config.levels, *config.numbers, *config.phrases)] == [
        "granularity",
        "granularity_value",
        "phrase",
    ]


@given(st.lists(st.text(st.characters(exclude_characters="$"), max_size=12), max_size=4))
def test_any_printable_class_survives_the_writing(classes):
    names = [" ".join(name.split()) for name in classes]
    if not names or len(set(names)) < len(names) or not all(name and name.isprintable() for name in names):
        with pytest.raises(Refusal):
            make_config(classes)
    else:
        config = read_config(make_config(classes))
        assert [label.value for label in config.prompts[0].labels] == names
        assert config.outputs[-1].labels == tuple(names)


def hotkeys(xml: str) -> list[str]:
    root: Element = fromstring(xml)
    return [label.attrib["hotkey"] for label in root.iter("Label") if "hotkey" in label.attrib]


@pytest.mark.parametrize("count", [1, 2, 10, 60])
def test_no_two_labels_share_a_hotkey_however_many_classes(count):
    keys = hotkeys(make_config([f"Class {i}" for i in range(count)], levels=[i / 10 for i in range(11)]))
    assert len(keys) == len(set(keys)) == 3 * min(count, 10) + 11


def test_hotkeys_are_those_that_the_text_promises():
    assert hotkeys(make_config(["Car", "Wheel"])) == ["1", "2", "shift+q", "shift+w", *"asdfgj", "z", "x"]


def test_hotkeys_keep_clear_of_the_editors_own():
    tools = set("hvbeomkwpru[]") | {"shift+1", "shift+2", "shift+r"}
    assert not tools & {*CLICK_KEYS, *LEVEL_KEYS, *BOX_KEYS, *MASK_KEYS}


def test_levels_are_written_in_order_and_once():
    level = read_config(make_config(["Car"], levels=[1, 0.25, 0.1, 0.25])).levels[0]
    assert [(label.value, label.granularity) for label in level.labels] == [("0.1", 0.1), ("0.25", 0.25), ("1.0", 1.0)]


def test_levels_and_phrase_can_be_left_out():
    config = read_config(make_config(["Car"], levels=(), phrase=False))
    assert (config.levels, config.phrases) == ((), ())
    assert {finding.severity for finding in check_config(make_config(["Car"], levels=(), phrase=False))} == {"info"}


@pytest.mark.parametrize(
    ("classes", "options", "says"),
    [
        ([], {}, "no class"),
        (["Car", " "], {}, "is empty"),
        (["Car\x07"], {}, "cannot be shown"),
        (["Car", "Car "], {}, "2 times"),
        (["$image"], {}, re.escape('holds "$"')),
        (["Car"], {"output": "video"}, "unknown"),
        (["Car"], {"levels": [1.5]}, "outside 0..1"),
        (["Car"], {"levels": [float("nan")]}, "outside 0..1"),
    ],
)
def test_what_cannot_be_printed_is_refused(classes, options, says):
    with pytest.raises(Refusal, match=says):
        make_config(classes, **options)


def test_a_tag_for_several_images_is_an_error_that_says_what_to_write():
    xml = make_config(["Car"]).replace('name="mask" toName="image"', 'name="mask" toName="image,other"')
    found = [finding for finding in check_config(xml) if "several tags" in finding.sentence]
    assert [finding.severity for finding in found] == ["error"]
