"""From tasks to results: what is asked for, in which shape, and what stays remembered of it."""

import numpy as np
import pytest

from ml_backend import brush, outlines
from ml_backend.label_config import make_config, read_config
from ml_backend.label_studio import read_submitted
from ml_backend.predictions import predict_tasks
from tests.ml_backend.conftest import CHELSEA, SIZES, ask, click, picture, recorded, wait_until

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


def test_the_mask_grows_with_the_level(service):
    (width, height), areas = SIZES["chelsea"], []
    for level in ("0.1", "0.5", "1.0"):
        region = one(service, ask(click(31, 40, level=level)))["result"][0]
        areas.append(brush.decode(region["value"]["rle"], height=height, width=width).sum())
    assert areas == sorted(areas)
    assert areas[0] < areas[-1]


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


def test_propose_offers_several_masks_of_one_click_and_one_once_a_level_is_chosen(make_service):
    service = make_service(propose=3)
    regions = one(service, ask(click(31, 40)))["result"]
    masks = [region for region in regions if region["type"] == "brushlabels"]
    levels = [region["value"]["labels"] for region in regions if region["type"] == "labels"]
    assert len(masks) == len({mask["id"] for mask in masks}) == 3
    assert sorted(levels) == [["0.1"], ["0.5"], ["1.0"]] or len(set(map(str, levels))) == 3
    assert all(0 <= mask["score"] <= 1 for mask in masks)
    chosen = one(service, ask(click(31, 40, level="0.5")))["result"]
    assert [region["type"] for region in chosen] == ["brushlabels", "labels"]


def test_every_region_is_remembered_with_prompt_level_and_digest(service):
    regions = one(service, ask(click(31, 40, level="0.3", region="r1")))["result"]
    ((region_id, digest),) = read_submitted({"result": regions})
    answer = service.answers.find(region_id)
    assert (answer.digest, answer.granularity, answer.task_id, answer.project) == (digest, 0.3, 7, "3.1795250578")
    assert '"x": 139.8' in answer.prompt
    assert answer.model_version == service.model_version


def test_a_default_level_is_used_when_none_was_chosen(make_service, service):
    coarse = make_service(default_granularity=1.0)
    chosen = one(service, ask(click(31, 40, level="1.0")))["result"][0]
    assert one(coarse, ask(click(31, 40)))["result"][0]["value"] == chosen["value"]


def test_a_typed_phrase_is_not_obeyed_but_the_click_is_answered_and_the_log_says_so(service, caplog):
    assert one(service, recorded("20"))["result"]
    assert "phrases are not understood" in caplog.text


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
    assert one(service, batch(uri)) == {"result": [], "score": 0.0, "model_version": service.model_version}
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
