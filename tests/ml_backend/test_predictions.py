"""From tasks to results: what is asked for, in which shape, and what stays remembered of it."""

from itertools import pairwise

import numpy as np
import pytest

from ml_backend import brush, outlines
from ml_backend.label_config import make_config, read_config
from ml_backend.label_studio import shape_digest, unpack_shape
from ml_backend.predictions import predict_tasks
from model.adapter import read_adapter
from model.segmenter import BUNDLED_ADAPTER
from tests.ml_backend.conftest import CHELSEA, SIZES, ask, click, picture, wait_until

COFFEE = "/data/upload/3/f4aecc9d-coffee.jpg"


def results(service, body):
    config = read_config(body["label_config"])
    context = body["params"]["context"]
    return predict_tasks(service, config, body["tasks"], context, project=str(body["project"]))


def one(service, body):
    (result,) = results(service, body)
    return result


def batch(*images, output="brush"):
    body = ask(output=output)
    body["params"]["context"] = None
    body["tasks"] = [{"id": n, "project": 3, "data": {"image": image}} for n, image in enumerate(images, 1)]
    return body


def test_each_kind_of_output_holds_the_same_object(service):
    kinds = {}
    for output in ("brush", "bitmask", "polygon", "rectangle"):
        region = one(service, ask(click(31, 40, level="0.5"), output=output))["result"][0]
        assert region["type"] == f"{output}labels"
        assert region["from_name"] == "mask"
        assert region["value"][f"{output}labels"] == ["Object"]
        kinds[output] = region["value"]
    width, height = SIZES["chelsea"]
    mask = brush.decode(kinds["brush"]["rle"], height=height, width=width)
    ys, xs = np.nonzero(mask)
    corner = (kinds["rectangle"]["x"] / 100 * width, kinds["rectangle"]["y"] / 100 * height)
    assert corner == pytest.approx((xs.min(), ys.min()), abs=0.01)
    assert np.array_equal(
        outlines.from_png_data_url(kinds["bitmask"]["imageDataURL"], height=height, width=width), mask
    )
    assert len(kinds["polygon"]["points"]) >= 3


def test_class_and_level_come_back_on_the_mask(service):
    main, level = one(service, ask(click(31, 40, level="0.7", label="Part")))["result"]
    assert main["value"]["brushlabels"] == ["Part"]
    assert (level["type"], level["from_name"], level["value"]) == ("labels", "granularity", {"labels": ["0.7"]})
    assert level["id"] == main["id"]


def area(region):
    width, height = SIZES["chelsea"]
    return brush.decode(region["value"]["rle"], height=height, width=width).sum()


def masks_of(answer):
    return [region for region in answer["result"] if region["type"] == "brushlabels"]


def levels_of(answer):
    return [region["value"]["labels"][0] for region in answer["result"] if region["type"] == "labels"]


@pytest.mark.parametrize("adapter", ["bundled", "none"])
def test_the_mask_grows_with_the_level(make_service, adapter):
    service = make_service(adapter=adapter)
    areas = [area(masks_of(one(service, ask(click(31, 40, level=level))))[0]) for level in ("0.1", "0.5", "1.0")]
    assert all(large >= 0.99 * small for small, large in pairwise(areas)), areas
    assert areas[0] < areas[-1]


def test_a_number_is_answered_as_the_share_it_says_and_comes_back(service):
    def answered(value):
        regions = click(*ON_THE_DOOR)
        asked = {"from_name": "granularity_value", "type": "number", "value": regions[0]["value"] | {"number": value}}
        return one(service, ask([*regions, regions[0] | asked]))

    areas = {value: area(masks_of(answered(value))[0]) for value in (0.1, 0.35, 0.6)}
    assert areas[0.1] < areas[0.35] < areas[0.6]
    (number,) = (region for region in answered(0.35)["result"] if region["type"] == "number")
    assert number["value"]["number"] == 0.35
    assert service.answers.find(masks_of(answered(0.35))[0]["id"]).granularity == 0.35


def test_the_image_that_was_clicked_is_answered_of_several(service):
    config = """<View>
      <Image name="left" value="$before"/><Image name="right" value="$after"/>
      <KeyPointLabels name="a" toName="left" smart="true"><Label value="Object"/></KeyPointLabels>
      <KeyPointLabels name="b" toName="right" smart="true"><Label value="Object"/></KeyPointLabels>
      <BrushLabels name="mask-a" toName="left"><Label value="Object"/></BrushLabels>
      <BrushLabels name="mask-b" toName="right"><Label value="Object"/></BrushLabels></View>"""
    for to_name, tool, mask, size in (("left", "a", "mask-a", "chelsea"), ("right", "b", "mask-b", "coffee")):
        regions = [item | {"from_name": tool} for item in click(31, 40, to_name=to_name, size=SIZES[size])]
        body = ask(regions, config=config)
        body["tasks"][0]["data"] = {"before": CHELSEA, "after": COFFEE}
        (region,) = one(service, body)["result"]
        assert (region["to_name"], region["from_name"]) == (to_name, mask)
        assert (region["original_width"], region["original_height"]) == SIZES[size]


ON_THE_DOOR = (70, 50)  # percent; the disc at (31, 40) is one thing without parts, and all its levels may be alike


def assert_ladder(answer):
    masks = masks_of(answer)
    areas = [area(mask) for mask in masks]
    assert areas == sorted(areas)
    assert len(masks) == len({mask["id"] for mask in masks}) >= len(levels_of(answer)) > 1
    assert all(0 <= mask["score"] <= 1 for mask in masks)
    assert answer["score"] == max(mask["score"] for mask in masks)


def test_propose_offers_all_levels_of_one_click_small_to_large_and_one_mask_once_a_level_is_chosen(make_service):
    service = make_service(propose=12)
    assert_ladder(one(service, ask(click(*ON_THE_DOOR))))
    for more in ([click(31, 40, level="0.5")], [click(31, 40), click(40, 45, region="c2")]):
        assert len(masks_of(one(service, ask(*more)))) == 1


def test_propose_without_an_adapter_offers_three_masks(make_service):
    answer = one(make_service(propose=12, adapter="none"), ask(click(31, 40)))
    assert len(masks_of(answer)) == 3
    assert sorted(levels_of(answer)) == ["0.3", "0.5", "1.0"], "the labels nearest to 0.2, 0.5 and 1"


def test_the_label_for_all_levels_asks_for_them_whatever_the_operator_has_set(make_service):
    for service in (make_service(), make_service(propose=2, default_granularity=0.5)):
        assert_ladder(one(service, ask(click(*ON_THE_DOOR, level="all"))))


def test_of_several_proposals_each_says_its_level_by_number_too_and_what_the_base_offers_says_none(service):
    answer = one(service, ask(click(*ON_THE_DOOR, level="all")))
    numbers = {region["id"]: region["value"]["number"] for region in answer["result"] if region["type"] == "number"}
    kept = {mask["id"]: service.answers.find(mask["id"]).granularity for mask in masks_of(answer)}
    assert numbers == {region: level for region, level in kept.items() if level is not None}
    assert 1 < len(numbers) < len(kept), "one of the masks on the door is the base's alone"


def test_every_region_is_remembered_with_prompt_level_and_digest(service):
    regions = one(service, ask(click(31, 40, level="0.3", region="r1")))["result"]
    answer = service.answers.find(regions[0]["id"])
    assert answer.digest == shape_digest(regions[0]["value"])
    assert (answer.granularity, answer.task_id, answer.project) == (0.3, 7, "3.1795250578")
    assert unpack_shape(answer.shape)["rle"] == regions[0]["value"]["rle"]
    assert '"x": 139.8' in answer.prompt
    assert answer.model_version == service.version(None)
    assert (answer.adapter, answer.phrase) == (service.serving(None).segmenter.adapter, None)


def test_the_regions_of_one_proposal_are_remembered_as_its_parts(service, monkeypatch):
    square = {"points": [[10, 10], [20, 10], [20, 20]], "closed": True}
    monkeypatch.setattr("ml_backend.predictions.shape_values", lambda kind, mask: [square] * 3)
    ids = list(dict.fromkeys(region["id"] for region in one(service, ask(click(33, 40), output="polygon"))["result"]))
    assert [service.answers.find(region).parts for region in ids] == [" ".join(ids), ids[0], ids[0]]
    monkeypatch.setattr("ml_backend.predictions.shape_values", lambda kind, mask: [square])
    alone = one(service, ask(click(34, 40), output="polygon"))["result"][0]["id"]
    assert service.answers.find(alone).parts is None


def test_what_the_base_answers_is_remembered_as_the_bases(service):
    mask = masks_of(one(service, ask(click(31, 40))))[0]
    assert service.answers.find(mask["id"]).adapter is None


def test_a_default_level_is_used_when_none_was_chosen(make_service, service):
    coarse = make_service(default_granularity=1.0)
    chosen = one(service, ask(click(31, 40, level="1.0")))["result"][0]
    answer = one(coarse, ask(click(31, 40)))
    assert answer["result"][0]["value"] == chosen["value"]
    assert levels_of(answer) == [], "the annotator chose none"
    remembered = coarse.answers.find(masks_of(answer)[0]["id"])
    assert remembered.granularity is None, "nothing is learned from a level that nobody gave"


def in_a_project_with(usual, body):
    return body | {"label_config": make_config(["Object", "Part"], usual=usual)}


def test_a_project_says_what_a_click_without_a_level_gets_whatever_the_operator_has_set(make_service, service):
    coarse = make_service(default_granularity=1.0)
    assert_ladder(one(coarse, in_a_project_with("all", ask(click(*ON_THE_DOOR)))))
    fine = in_a_project_with("0.1", ask(click(*ON_THE_DOOR)))
    (chosen,) = masks_of(one(service, ask(click(*ON_THE_DOOR, level="0.1"))))
    assert [mask["value"]["rle"] for mask in masks_of(one(coarse, fine))] == [chosen["value"]["rle"]]
    assert levels_of(one(coarse, fine)) == [], "the annotator chose none"
    for project in ("all", "0.1"):
        asked = in_a_project_with(project, ask(click(*ON_THE_DOOR, level="0.7")))
        assert levels_of(one(coarse, asked)) == ["0.7"]
        assert len(masks_of(one(coarse, in_a_project_with(project, phrased(known_name(service)))))) == 1


@pytest.mark.parametrize("typed", ["wheel", "wheel of the bus", "door handle"])
def test_a_word_for_a_part_wins_over_the_default_level_and_offers_all_levels_where_they_are_asked_for(
    make_service, typed
):
    coarse = make_service(default_granularity=1.0)
    assert levels_of(one(coarse, phrased(typed))) == ["0.3"], "the label nearest to 0.2"
    spot = click(*ON_THE_DOOR, level="all")
    words = spot[0] | {"type": "textarea", "from_name": "phrase", "value": spot[0]["value"] | {"text": [typed]}}
    assert_ladder(one(coarse, ask([*spot, words])))


def test_a_known_phrase_wins_over_the_default_level(make_service, service):
    typed = phrased(known_name(service))
    (with_default,) = masks_of(one(make_service(default_granularity=1.0), typed))
    assert with_default["value"] == masks_of(one(service, typed))[0]["value"]


def phrased(text, level=None, region="c1"):
    regions = click(31, 40, level=level, region=region)
    spot = regions[0]["value"] | {"text": [text]}
    return ask([*regions, regions[0] | {"type": "textarea", "from_name": "phrase", "value": spot}])


def known_name(service):
    """A name of the bundled adapter's vocabulary."""
    return read_adapter(BUNDLED_ADAPTER).card["vocabulary"][0]


def test_a_phrase_the_adapter_knows_is_obeyed_however_it_is_written_and_goes_with_a_level(service, caplog, counted):
    caplog.set_level("INFO")
    name = known_name(service)
    (mask,) = masks_of(answer := one(service, phrased(f" The  {name.upper()}!")))
    assert "reason" not in answer
    remembered = service.answers.find(mask["id"])
    assert (remembered.phrase, remembered.adapter) == (name, service.serving(None).segmenter.adapter)
    assert f"phrase {name}" in caplog.text
    assert f"by {remembered.adapter}" in caplog.text
    both = one(service, phrased(name, level="0.3"))
    assert levels_of(both) == ["0.3"]
    assert counted("graco_phrases_total", outcome="known") == 2


@pytest.mark.parametrize("typed", ["blorb zzyx", "колесо", "车轮", "\N{BICYCLE}", "...", "0"])
@pytest.mark.parametrize("level", [None, "0.3", "all"])
def test_an_unknown_phrase_is_answered_as_if_there_were_none_with_the_reason(service, caplog, counted, typed, level):
    answer = one(service, phrased(typed, level))
    plain = one(service, ask(click(31, 40, level=level)))
    assert [mask["value"] for mask in masks_of(answer)] == [mask["value"] for mask in masks_of(plain)]
    assert "is no name that the model knows" in answer["reason"]
    assert answer["reason"] in caplog.text
    assert service.answers.find(masks_of(answer)[0]["id"]).phrase is None
    assert counted("graco_phrases_total", outcome="unknown") == 1


@pytest.mark.parametrize("typed", ["", "  ", "\N{NO-BREAK SPACE}"])
def test_an_empty_phrase_is_none(service, typed):
    answer = one(service, phrased(typed))
    assert "reason" not in answer
    assert len(masks_of(answer)) == 1


def test_without_an_adapter_a_phrase_has_no_effect_and_says_so(make_service):
    service = make_service(adapter="none")
    answer = one(service, phrased(known_name(service)))
    assert masks_of(answer)[0]["value"] == masks_of(one(service, ask(click(31, 40))))[0]["value"]
    assert "GRACO_ADAPTER" in answer["reason"]


def test_a_phrase_of_10_kilobytes_and_one_beside_no_click_are_refused_with_a_sentence(service):
    answer = one(service, phrased("wheel " * 1700))
    assert answer["result"] == []
    assert "shorten it" in answer["reason"]
    body = phrased("wheel")
    body["params"]["context"]["result"] = [
        item | {"value": {"text": ["wheel"]}}
        for item in body["params"]["context"]["result"]
        if item["type"] == "textarea"
    ]
    answer = one(service, body)
    assert answer["result"] == []
    assert "none of the regions sent is a click or a box" in answer["reason"]


def test_one_task_that_cannot_be_served_costs_the_others_nothing(service):
    body = ask(click(31, 40))
    body["tasks"] = [{"id": 1, "data": {}}, *body["tasks"]]
    bad, good = results(service, body)
    assert "has no image" in bad["reason"]
    assert good["result"]


# --- batches ---


def test_a_batch_of_one_task_has_its_image_encoded_in_the_background(make_service, label_studio, counted):
    service = make_service()
    uri = label_studio.add("/data/upload/9/opened.png", picture(90, 60, shade=9))
    assert one(service, batch(uri)) == {"result": [], "score": 0.0, "model_version": service.version(None)}
    wait_until(lambda: counted("graco_embeddings_total", source="encoded") == 1, limit_s=60)
    asked = label_studio.asked[uri]
    assert one(service, ask(click(31, 40, size=(90, 60)), image=uri, task=1))["result"]
    assert label_studio.asked[uri] == asked, "the first click finds it warm"
    assert counted("graco_embeddings_total", source="encoded") == 1


def test_a_batch_of_many_tasks_is_answered_at_once_and_queued(make_service, monkeypatch):
    service = make_service(start=False)
    waiting = []
    monkeypatch.setattr(service, "warm", lambda image: waiting.append(image) or True)
    body = batch(*(f"/data/upload/1/{n}.jpg" for n in range(200)))
    body["tasks"][5]["data"] = {}
    assert [r["result"] for r in results(service, body)] == [[]] * 200
    assert len(waiting) == 199


def test_prelabelling_gives_proposals_with_scores_for_each_task(make_service):
    service = make_service(prelabel=True)
    found, missing = results(service, batch(CHELSEA, "/data/upload/1/nowhere.png"))
    assert 1 <= len(found["result"]) <= 12
    assert len({region["id"] for region in found["result"]}) == len(found["result"])
    for region in found["result"]:
        assert region["type"] == "brushlabels"
        assert 0.8 <= region["score"] <= 1
        assert region["value"]["brushlabels"] == ["Object"]
        assert service.answers.find(region["id"]) is not None
    assert 0.8 <= found["score"] <= 1
    assert missing["result"] == []
    assert "404" in missing["reason"]


def test_prelabelling_ends_within_its_limit_and_says_so(make_service, caplog):
    service = make_service(prelabel=True, prelabel_limit_s=1e-6)
    answers = results(service, batch(CHELSEA, COFFEE))
    assert [answer["result"] for answer in answers] == [[], []]
    assert all("no time is left" in answer["reason"] for answer in answers)
    assert "no time is left" in caplog.text


def test_a_configuration_that_can_hold_no_mask_is_a_sentence(service, caplog):
    config = make_config(["Object"]).replace("BrushLabels", "TextLabels")
    body = ask(click(31, 40), config=config.replace("RectangleLabels", "OtherLabels"))
    assert one(service, body)["result"] == []
    assert "BrushLabels" in caplog.text
