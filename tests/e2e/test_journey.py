"""An annotator's journeys: a real editor in a real browser, a real Label Studio, our backend as `run` starts it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from active_learning.corrections import CorrectionStore
from active_learning.status import TrainingFolder
from model.adapter import read_adapter
from model.annotations import decode
from model.segmenter import BUNDLED_ADAPTER
from tests.conftest import ROOT
from tests.e2e.conftest import Pictures, StartBackend
from tests.e2e.editor import Editor, Exchange
from tests.e2e.label_studio_server import CREDENTIALS, LabelStudio, Project
from tests.e2e.masks import deepest, holds, iou, outskirts, read_mask
from tests.e2e.photos import Photo, turned
from tests.e2e.servers import get_text

pytestmark = pytest.mark.e2e

_TAKEN_IN_S = 120  # with a worker that has the lowest priority
_TRAINED_S = 600
LEVEL_KEYS = {"a": "0.1", "s": "0.3", "d": "0.5", "f": "0.7", "g": "1.0"}
ALL_KEY = "j"
KEYPOINT, RECTANGLE = "key-point-tool", "rectangle-tool"

needs_own_backend = pytest.mark.skipif(
    "GRACO_E2E_BACKEND_URL" in os.environ, reason="needs a backend with settings of its own"
)

Report = Callable[[str, object], None]


def printed_config(output: str, *more: str) -> str:
    """The labelling configuration that our own command prints."""
    command = [sys.executable, "-m", "ml_backend", "label-config", "Object", "Part", "--output", output, *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def open_editor(editor: Editor, project: Project) -> None:
    editor.open_task(project.id, project.task)
    editor.switch_on_auto_annotation()
    editor.switch_on_select_after_create()


def only(exchange: Exchange, kind: str = "brushlabels") -> dict[str, Any]:
    """The single region of an answer."""
    (region,) = exchange.regions(kind)
    return region


def stored(annotation: dict[str, Any], kind: str) -> dict[str, Any]:
    (region,) = (item for item in annotation["result"] if item["type"] == kind)
    return dict(region)


def regions_counted(backend: str) -> dict[str, float]:
    """How many submitted regions our backend has counted: accepted as answered, corrected, drawn by hand."""
    lines = (get_text(f"{backend}/metrics", auth=CREDENTIALS) or "").splitlines()
    lines = [line for line in lines if line.startswith("graco_regions_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def test_clicks_levels_and_a_box_give_masks_and_the_accepted_one_is_stored_as_answered(
    label_studio: LabelStudio,
    backend: str,
    editor: Editor,
    photo: Photo,
    pictures: Pictures,
    record_property: Report,
) -> None:
    project = label_studio.add_project("journey", printed_config("brush"), photo, backend)
    assert project.webhooks == (f"{backend}/webhook",)
    editor.open_task(project.id, project.task)
    editor.switch_on_auto_annotation()
    editor.switch_on_select_after_create(lambda: pictures.take("settings-select-after-create", editor))
    editor.choose_tool(KEYPOINT)
    editor.choose_label("Object")

    def report_iou(step: str, exchange: Exchange) -> None:
        if photo.truth is not None:
            value = iou(read_mask(only(exchange)), photo.truth)
            record_property(f"iou, {step}", round(value, 3))
            print(f"IoU with ground truth, {step}: {value:.3f}, answered after {exchange.seconds * 1000:.0f} ms")

    # One click, one suggestion.
    first = editor.answered(lambda: editor.click(photo.click))
    assert [click["is_positive"] for click in first.clicks] == [True]
    assert (first.clicks[0]["original_width"], first.clicks[0]["original_height"]) == (photo.width, photo.height)
    assert first.spots[0] == pytest.approx(photo.click, abs=0.02)
    first_mask = read_mask(only(first))
    assert first_mask.shape == (photo.height, photo.width)
    assert holds(first_mask, first.spots[0])
    report_iou("one click", first)
    pictures.take("click", editor)

    # A negative click takes its spot away, a further positive one belongs to the mask.
    unwanted = outskirts(first_mask, photo.click)
    second = editor.answered(lambda: editor.click(unwanted, negative=True))
    assert [click["is_positive"] for click in second.clicks] == [True, False]
    second_mask = read_mask(only(second))
    assert holds(first_mask, second.spots[1])
    assert not holds(second_mask, second.spots[1])
    assert holds(second_mask, second.spots[0])
    report_iou("a negative click", second)
    pictures.take("negative", editor)

    wanted = deepest(second_mask)
    third = editor.answered(lambda: editor.click(wanted))
    assert [click["is_positive"] for click in third.clicks] == [True, False, True]
    assert holds(read_mask(only(third)), third.spots[2])
    report_iou("a second positive click", third)

    # Each level key sends one request. Up, the mask grows; down, the same levels give the same masks.
    def press(key: str) -> Exchange:
        before = editor.asked
        exchange = editor.answered(lambda: editor.press(key))
        assert editor.asked == before + 1
        assert [item["value"]["labels"] for item in exchange.context if item["type"] == "labels"][-1] == [
            LEVEL_KEYS[key]
        ]
        assert len(exchange.clicks) == 3
        assert exchange.level == LEVEL_KEYS[key]
        return exchange

    up = {}
    for key in LEVEL_KEYS:
        up[key] = press(key)
        report_iou(f"level {LEVEL_KEYS[key]}", up[key])
        if key == "a":
            pictures.take("granularity-fine", editor)
    pictures.take("granularity-whole", editor)
    areas = [int(read_mask(only(exchange)).sum()) for exchange in up.values()]
    assert areas[0] < areas[-1], "the clicks bind each level, so those between may come near each other"
    for key in list(LEVEL_KEYS)[-2::-1]:
        down = press(key)
        assert only(down)["value"]["rle"] == only(up[key])["value"]["rle"]

    # Accepted: the clicks are gone, the mask stays.
    answer = press("g")
    answered = only(answer)
    editor.accept()
    assert [region["id"] for region in editor.regions()] == [answered["id"]]
    pictures.take("accepted", editor)

    # A box is another object: the accepted mask and its clicks are none of its business.
    editor.choose_tool(RECTANGLE)
    editor.choose_label("Object", nth=1)
    boxed = editor.answered(lambda: editor.draw_box(photo.box))
    (box,) = (item for item in boxed.context if item["type"] == "rectanglelabels")
    assert not boxed.clicks
    left, _, right, _ = photo.box
    assert box["value"]["x"] == pytest.approx(left * 100, abs=2)
    assert box["value"]["width"] == pytest.approx((right - left) * 100, abs=2)
    box_mask = read_mask(only(boxed))
    assert holds(box_mask, deepest(box_mask))
    report_iou("a box", boxed)
    pictures.take("box", editor)
    editor.reject()
    assert [region["id"] for region in editor.regions()] == [answered["id"]]

    # Submitted: stored as answered. The editor may then ask by itself with no click at all; nothing must be suggested.
    counted = regions_counted(backend)
    editor.submit()
    assert editor.suggestions() == []
    assert label_studio.ask(project, context=[]) == []
    annotation = label_studio.annotation(project)
    mask = stored(annotation, "brushlabels")
    assert mask["id"] == answered["id"]
    assert mask["value"]["rle"] == answered["value"]["rle"]
    assert mask["value"]["brushlabels"] == ["Object"]
    levels = [item["value"]["labels"] for item in annotation["result"] if item["type"] == "labels"]
    assert levels == [["1.0"]]

    # Corrected: the same region, another mask.
    again = deepest(read_mask(answered))
    editor.erase(0, (again[0] - 0.05, again[1]), (again[0] + 0.05, again[1]))
    corrected_annotation = editor.update()
    assert corrected_annotation["id"] == annotation["id"]
    corrected = stored(label_studio.annotation(project), "brushlabels")
    assert corrected["id"] == answered["id"]
    assert corrected["value"]["rle"] != answered["value"]["rle"]
    assert not holds(read_mask(corrected), again)

    # Label Studio told our backend of both before it answered (one second, no second try); the worker takes them in.
    deadline_s, now = time.monotonic() + _TAKEN_IN_S, counted
    while any(now.get(kind, 0) != counted.get(kind, 0) + 1 for kind in ("accepted", "corrected")):
        assert time.monotonic() < deadline_s, f"{counted} has become {now}"
        time.sleep(0.5)
        now = regions_counted(backend)


def test_after_one_click_level_keys_grow_the_mask_and_one_key_shows_all_levels(
    label_studio: LabelStudio, backend: str, editor: Editor, photo: Photo, pictures: Pictures
) -> None:
    project = label_studio.add_project("levels", printed_config("brush"), photo, backend)
    open_editor(editor, project)
    editor.choose_tool(KEYPOINT)
    editor.choose_label("Object")
    editor.answered(lambda: editor.click(photo.click))
    levels = {key: editor.answered(partial(editor.press, key)) for key in LEVEL_KEYS}
    areas = [int(read_mask(only(exchange)).sum()) for exchange in levels.values()]
    assert all(large >= 0.99 * small for small, large in pairwise(areas)), areas
    assert areas[0] < areas[-1]

    # All levels, then one of them, then all again.
    every = editor.answered(lambda: editor.press(ALL_KEY))
    masks = [read_mask(region) for region in every.regions("brushlabels")]
    assert len(editor.suggestions()) == len(masks) > 1
    sizes = [int(mask.sum()) for mask in masks]
    assert sizes == sorted(sizes)
    pictures.take("all-levels", editor)
    single = editor.answered(lambda: editor.press("g"))
    assert only(single)["value"] == only(levels["g"])["value"]
    editor.answered(lambda: editor.press(ALL_KEY))

    # All accepted at once: the editor writes the click's label on each, the number says which level it is.
    editor.accept()
    editor.submit()
    results = label_studio.annotation(project)["result"]
    numbers = {item["id"]: item["value"]["number"] for item in results if item["type"] == "number"}
    assert numbers == {item["id"]: item["value"]["number"] for item in every.regions("number")}
    assert numbers
    assert numbers.keys() <= {item["id"] for item in every.regions("brushlabels")}


def test_a_project_that_asks_for_all_levels_gets_them_from_one_click_alone(
    label_studio: LabelStudio, backend: str, editor: Editor, photo: Photo
) -> None:
    project = label_studio.add_project("usual", printed_config("brush", "--usual", "all"), photo, backend)
    open_editor(editor, project)
    editor.choose_tool(KEYPOINT)
    editor.choose_label("Object")
    every = editor.answered(lambda: editor.click(photo.click))
    sizes = [int(read_mask(region).sum()) for region in every.regions("brushlabels")]
    assert len(editor.suggestions()) == len(sizes) > 1
    assert sizes == sorted(sizes)
    assert len(editor.answered(lambda: editor.press("g")).regions("brushlabels")) == 1


def test_a_phrase_typed_beside_a_click_is_obeyed_and_an_unknown_one_changes_nothing(
    label_studio: LabelStudio, backend: str, editor: Editor, photo: Photo
) -> None:
    project = label_studio.add_project("phrases", printed_config("brush"), photo, backend)
    open_editor(editor, project)
    editor.choose_tool(KEYPOINT)
    editor.choose_label("Object")
    plain = editor.answered(lambda: editor.click(photo.click))
    unknown = editor.answered(lambda: editor.type_phrase("blorb zzyx"))
    assert only(unknown)["value"] == only(plain)["value"]
    editor.reject()

    editor.choose_label("Object")
    editor.answered(lambda: editor.click(photo.click))
    name = read_adapter(BUNDLED_ADAPTER).card["vocabulary"][0]
    named = editor.answered(lambda: editor.type_phrase(name))
    assert [item["value"]["text"] for item in named.context if item["type"] == "textarea"] == [[name]]
    assert holds(read_mask(only(named)), named.spots[0])
    editor.accept()
    assert [region["id"] for region in editor.regions()] == [only(named)["id"]]


@pytest.mark.parametrize("output", ["bitmask", "polygon", "rectangle"])
def test_a_click_is_answered_with_the_kind_of_region_that_the_configuration_has(
    label_studio: LabelStudio, backend: str, editor: Editor, photo: Photo, output: str
) -> None:
    project = label_studio.add_project(output, printed_config(output), photo, backend)
    open_editor(editor, project)
    editor.choose_tool(KEYPOINT)
    editor.choose_label("Object")
    exchange = editor.answered(lambda: editor.click(photo.click))
    answered = {region["id"]: region["value"] for region in exchange.regions(f"{output}labels")}
    assert answered
    editor.accept()
    editor.submit()
    results = label_studio.annotation(project)["result"]
    kept = {item["id"]: item["value"] for item in results if item["type"] == f"{output}labels"}
    assert kept == answered


@needs_own_backend
def test_a_click_without_a_level_is_answered_with_three_proposals_where_the_operator_wants_them(
    label_studio: LabelStudio, start_backend: StartBackend, editor: Editor, photo: Photo
) -> None:
    with start_backend(GRACO_PROPOSE="3", GRACO_ADAPTER="none", GRACO_ENCODER="exact") as backend:
        project = label_studio.add_project("proposals", printed_config("brush"), photo, backend)
        open_editor(editor, project)
        editor.choose_tool(KEYPOINT)
        editor.choose_label("Object")
        exchange = editor.answered(lambda: editor.click(photo.click))
        assert len(editor.suggestions()) == len(exchange.regions("brushlabels")) == 3
        masks = [read_mask(region) for region in exchange.regions("brushlabels")]
        assert len({mask.tobytes() for mask in masks}) == 3
        editor.reject()
        assert editor.regions() == []


def test_a_photo_that_a_phone_turned_is_clicked_where_it_is_shown(
    label_studio: LabelStudio, backend: str, editor: Editor, photo: Photo, record_property: Report
) -> None:
    project = label_studio.add_project("turned", printed_config("brush"), turned(photo), backend)
    open_editor(editor, project)
    editor.choose_tool(KEYPOINT)
    editor.choose_label("Object")
    exchange = editor.answered(lambda: editor.click(photo.click))
    click = exchange.clicks[0]
    assert (click["original_width"], click["original_height"]) == (photo.width, photo.height)
    mask = read_mask(only(exchange))
    assert holds(mask, exchange.spots[0])
    if photo.truth is not None:
        record_property("iou, turned", value := round(iou(mask, photo.truth), 3))
        print(f"IoU with ground truth, turned photo: {value}")


def test_start_training_in_label_studio_learns_from_what_webhooks_lost(
    label_studio: LabelStudio, start_backend: StartBackend, photo: Photo, tmp_path: Path
) -> None:
    mask = np.zeros((photo.height, photo.width), bool)
    mask[photo.height // 4 : photo.height // 2, photo.width // 4 : photo.width // 2] = True
    settings = {"GRACO_DATA_DIR": str(tmp_path), "GRACO_TRAIN_STEPS": "1", "GRACO_ENCODER": "exact"}
    with start_backend(**settings) as backend:
        project = label_studio.add_project("start training", printed_config("brush"), photo, backend)
        label_studio.stop_webhooks(project)
        label_studio.annotate(project, mask)
        label_studio.start_training(project)
        trainings = TrainingFolder(tmp_path / "trainings", f"project-{project.id}")
        deadline_s = time.monotonic() + _TRAINED_S
        while not trainings.history():
            assert time.monotonic() < deadline_s, trainings.status()
            time.sleep(1)
    (ended,) = trainings.history()
    assert ended.reason == "Start Training in Label Studio"
    with closing(CorrectionStore(tmp_path / "corrections.sqlite")) as store:
        (correction,) = store.corrections(str(project.id))
    assert (correction.kind, correction.label, correction.task) == ("drawn", "Object", project.task)
    np.testing.assert_array_equal(decode(correction.mask), mask)
    # the one photo is either learned from, and nothing is held out to judge by, or it is held out itself
    assert ended.state in ("kept", "failed", "rejected"), ended.said
