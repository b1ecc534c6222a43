"""The command: a run from start to report, a run that goes on, and what it says to wrong input."""

import json
import platform
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from model.annotations import decode, encode
from model.embeddings import EmbeddingFolder
from model.evaluation.command import app
from model.evaluation.protocol import BASE_ONLY, PROTOCOLS, Models, Options
from model.evaluation.runner import ModelSource, Results, key_of, plan, run
from model.evaluation.sets import evenly_spaced, select
from model.types import Granularity, Refusal
from tests.conftest import WEIGHTS
from tests.model.drawn_set import Painter, write_set

QUICK = ("--adapter", "none", "--device", "cpu", "--encoder", "exact", "--budget", "2", "--sheet", "2")


@pytest.fixture
def folder(tmp_path, scene):
    return write_set(tmp_path / "drawn", scene)


@pytest.fixture
def loaded(monkeypatch):
    """The command with the painter instead of a network; gives the painters it loaded."""
    painters = []

    def load(source):
        painters.append(Painter())
        return Models(base=painters[-1], adapted=painters[-1])

    monkeypatch.setattr(ModelSource, "load", load)
    return painters


def called(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])


def selected(folder, **changes):
    wanted = {"kind": "auto", "split": "val", "levels": (), "limit": None, "support": 1}
    return select(folder, **(wanted | changes))


def planned(selection, protocols, options=None, adapter=None):
    def key(protocol, of):
        return key_of(protocol, of, options or Options(), encoding="painter", adapter=adapter)

    return plan([selection], protocols, key)


def test_a_run_writes_results_report_curves_and_sheets(folder, tmp_path, loaded):
    out = tmp_path / "out"
    result = called(folder, *QUICK, "--out", out)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * len(PROTOCOLS)
    report = json.loads((out / "report.json").read_text())
    assert [(g["set"], g["level"], g["masks"]) for g in report["groups"]] == [
        ("drawn", "object", 2),
        ("drawn", "part", 1),
    ]
    markdown = (out / "report.md").read_text()
    for title in ("compare", "clicks", "phrase", "monotone", "calibration", "time", "IoU@k", "1-IoU@all granularities"):
        assert f"\n## {title}\n" in markdown
    for picture in ("curves.png", "sheet-drawn.png"):
        assert np.asarray(Image.open(out / picture)).std() > 0
    assert "NoC@85" in result.output


def test_a_run_that_was_cut_off_goes_on_and_says_the_same(folder, tmp_path, loaded):
    out = tmp_path / "out"
    arguments = (folder, *QUICK, "--out", out, "--protocols", "base,level,monotone")
    assert called(*arguments).exit_code == 0
    whole = json.loads((out / "report.json").read_text())["groups"]
    lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    (out / "results.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])
    again = called(*arguments)
    assert "4 of 9 rows are there already" in again.output
    assert json.loads((out / "report.json").read_text())["groups"] == whole
    rows = (out / "results.jsonl").read_bytes().splitlines()
    assert rows[4] == lines[4][:20]
    assert sorted(rows[:4] + rows[5:]) == sorted(line.rstrip() for line in lines)


def test_a_finished_run_measures_nothing_again(folder, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    tasks = planned(selected(folder), ["base", "time"])
    for expected in (True, False):
        painter = Painter()
        models = Models(base=painter, adapted=painter)
        run(tasks, results, Options(), EmbeddingFolder(None), models=models)
        assert bool(painter.steps) == expected
        results = Results(tmp_path / "results.jsonl")


def test_only_what_matters_to_a_protocol_changes_its_rows(folder):
    pets = selected(folder)

    def keys(options=None, **facts):
        facts = {"encoding": "e", "adapter": "a", "clock": "here"} | facts
        return {p: key_of(p, pets, options or Options(), **facts) for p in PROTOCOLS}

    def changed(options=None, **facts):
        return {p for p, key in keys(options, **facts).items() if key != keys()[p]}

    assert len(set(keys().values())) == len(PROTOCOLS)
    assert changed(adapter="b") == set(PROTOCOLS) - set(BASE_ONLY)
    assert changed(clock="there") == {"time"}
    assert changed(Options(seed=1)) == {"phrase"}
    assert changed(Options(support=2)) == {"levels"}
    assert changed(Options(fixed_levels=(Granularity(5),))) == {"fixed"}
    near = [Options(fixed_levels=(Granularity.from_share(value),)) for value in (0.2, 0.22, 0.25)]
    assert len({keys(options)["fixed"] for options in near}) == len(near)
    assert changed(Options(targets=(0.85,))) == {"base", "level", "oracle", "fixed"}
    assert changed(Options(budget=3)) == {"base", "level", "oracle", "fixed", "curve"}


def test_another_annotation_makes_the_rows_of_a_set_stale(folder):
    before = selected(folder).fingerprint
    content = json.loads((folder / "annotations.json").read_text())
    content["annotations"][2]["parent_id"] = None
    (folder / "annotations.json").write_text(json.dumps(content))
    assert selected(folder).fingerprint != before


def test_a_mask_that_was_drawn_anew_with_as_many_pixels_makes_the_rows_of_its_set_stale(folder):
    before = selected(folder).fingerprint
    content = json.loads((folder / "annotations.json").read_text())
    note = content["annotations"][0]
    segmentation = note["segmentation"]
    drawn = decode(segmentation | {"counts": segmentation["counts"].encode()})
    segmentation["counts"] = encode(np.roll(drawn, 1, axis=1))["counts"].decode()
    (folder / "annotations.json").write_text(json.dumps(content))
    assert selected(folder).fingerprint != before


def test_seconds_are_measured_again_with_other_threads_and_on_another_machine(folder, tmp_path, loaded, monkeypatch):
    def kept(*arguments) -> str:
        result = called(folder, *QUICK, "--out", tmp_path / "out", "--protocols", "base,time", *arguments)
        assert result.exit_code == 0, result.output
        return result.output

    kept("--threads", "1")
    assert "6 of 6 rows are there already" in kept("--threads", "1")
    assert "3 of 6 rows are there already" in kept("--threads", "2")
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    assert "3 of 6 rows are there already" in kept("--threads", "1")


def test_a_limit_takes_masks_of_each_level_spread_evenly(folder):
    assert evenly_spaced(range(10), 3) == [0, 3, 6]
    assert evenly_spaced([1, 2], 5) == [1, 2]
    assert [mask.name for _, masks in selected(folder, limit=1).chosen for mask in masks] == ["disc", "handle"]
    assert selected(folder, levels=("part",)).masks == 1
    assert selected(folder, support=2).masks == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--protocols", "base,bse"), "protocol bse is unknown"),
        (("--protocols", ","), "protocol nothing is unknown"),
        (("--level", "whole"), "level whole is unknown"),
        (("--targets", "high"), "are not numbers"),
        (("--targets", "85"), "in (0, 1]"),
        (("--fixed-level", "1.5"), "outside 0..1"),
        (("--fixed-level", "nan"), "outside 0..1"),
        (("--split", "test"), "no image of split 'test'"),
        (("--level", "subpart"), "holds no mask to measure"),
        (("--adapter", "nowhere.safetensors"), "is not a file"),
        (("--limit", "-1"), "greater than or equal to 1"),
        (("--budget", "0"), "greater than or equal to 1"),
        (("--kind", "voc"), "'voc' is not one of"),
    ],
)
def test_wrong_input_is_answered_with_a_sentence(folder, tmp_path, loaded, arguments, sentence):
    adapter = () if "--adapter" in arguments else ("--adapter", "none")
    result = called(folder, "--out", tmp_path / "out", *adapter, *arguments)
    assert result.exit_code != 0
    assert sentence in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_a_set_that_is_not_there_or_given_twice_is_refused(folder, tmp_path, loaded):
    assert "does not exist" in called(tmp_path / "nowhere", *QUICK).output
    assert "called 'drawn'" in " ".join(called(folder, folder, *QUICK).output.split())


def test_a_photo_that_cannot_be_read_is_named(folder, tmp_path, loaded):
    (folder / "images" / "scene.png").write_bytes(b"not a photo")
    result = called(folder, *QUICK, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "scene.png cannot be read" in " ".join(result.output.split())


def test_an_adapter_that_was_named_is_known_by_its_bytes(tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"one")
    one = ModelSource(weights=WEIGHTS, adapter=path).adapter_digest()
    path.write_bytes(b"two")
    assert ModelSource(weights=WEIGHTS, adapter=path).adapter_digest() != one
    assert ModelSource(weights=WEIGHTS, adapter=None).adapter_digest() is None


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path, scene):
    folder = write_set(tmp_path / "drawn", scene)
    content = json.loads((folder / "annotations.json").read_text())
    content["images"].append(content["images"][0] | {"id": 2, "file_name": "again.png"})
    content["annotations"] += [
        n | {"id": n["id"] + 10, "image_id": 2, "parent_id": None} for n in content["annotations"]
    ]
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "images" / "again.png").write_bytes((folder / "images" / "scene.png").read_bytes())
    groups = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        arguments = (
            "--out",
            out,
            "--jobs",
            jobs,
            "--threads",
            "1",
            "--protocols",
            "base,level",
            "--compiled",
            tmp_path,
        )
        result = called(folder, *QUICK, *arguments)
        assert result.exit_code == 0, result.output
        groups.append(json.loads((out / "report.json").read_text())["groups"])
    assert groups[0] == groups[1]


def test_an_out_that_cannot_be_written_is_refused(folder, tmp_path, loaded):
    (tmp_path / "file").write_text("in the way")
    result = called(folder, *QUICK, "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "give another --out" in " ".join(result.output.split())


def test_embeddings_that_cannot_be_written_are_answered_with_what_to_do(folder, tmp_path, loaded):
    (tmp_path / "file").write_text("in the way")
    result = called(folder, *QUICK, "--out", tmp_path / "out", "--embeddings", tmp_path / "file" / "below")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "; choose another --out (" in said
    assert "or free some space" in said
    assert str(tmp_path / "file") in said.replace(" ", "")


def test_a_process_that_dies_is_answered_with_what_to_do(folder, tmp_path, monkeypatch):
    def die(*arguments):
        raise BrokenProcessPool("killed")

    monkeypatch.setattr("model.evaluation.runner.as_completed", die)
    monkeypatch.setattr("model.evaluation.runner._load", print)
    tasks = planned(selected(folder), ["base"]) * 2
    source = ModelSource(weights=WEIGHTS, adapter=None)
    models = Models(base=Painter(), adapted=Painter())
    with pytest.raises(Refusal, match="fewer --jobs"):
        run(
            tasks, Results(tmp_path / "r.jsonl"), Options(), EmbeddingFolder(None), models=models, source=source, jobs=2
        )
