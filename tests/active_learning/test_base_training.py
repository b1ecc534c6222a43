"""The training of the shipped adapter, small: from a recipe to a file that a segmenter takes."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from active_learning import base_training
from active_learning.__main__ import app
from active_learning.base_training import Recipe, SetPart, train_base
from active_learning.train import TrainingConfig
from model.adapter import read_adapter
from model.annotations import read_annotations
from model.light.adapter import LEVEL, PHRASE, VOCABULARY
from model.light.segmenter import LightSegmenter
from model.segmenter import load_segmenter, predict
from model.types import Click, Granularity, Prompt, Refusal
from tests.active_learning.drawn import strip, write_strip
from tests.conftest import ROOT, WEIGHTS

SHIPPED = ROOT / "active_learning" / "recipes" / "light-granularity.toml"
RECIPE = """
phrase_threshold = 0.58

[[sets]]
path = "strip"
split = "train"
views = 1
named = true

[proposals]
sources = ["agg"]
per_object = 3
points_per_image = 2
seed = 0

[views]
smallest = 0.8
seed = 0

[level]
steps = 4
clicks = 1
most_clicks = 2
rank = 4
alpha = 8
checkpoint_every = 2
log_every = 1

[phrase]
steps = 3
clicks = 2
most_clicks = 1
rank = 4
alpha = 8
checkpoint_every = 2
log_every = 1
"""


class Stopped(Exception):
    """Stands for whatever ends a training early."""


class Bars:
    """Keeps what progress bars are told; ends the run at a step of one of them."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.told: dict[str, list[int]] = {}
        self.stop = stop

    def __call__(self, name, steps):
        self.told[name] = []

        def tell(done, said):
            assert done <= steps
            self.told[name].append(done)
            if (name, done) == self.stop:
                raise Stopped

        return tell


def read(folder: Path, text: str = RECIPE) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text)
    return Recipe.read(path, device="cpu", precision="no")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    file = read_adapter(path)
    lora = {f"{branch}.{name}": value for branch, state in file.lora.items() for name, value in state.items()}
    return file.plain | lora


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def photos_for(recipe, segmenter, data, out, embeddings):
    return base_training._photos(recipe, base_training._read(recipe, data), segmenter, out, embeddings, Bars())


def corrected(folder: Path, **changes) -> Path:
    """Write the set into a folder of sets, as if somebody had gone over its annotations."""
    shutil.rmtree(folder / "strip", ignore_errors=True)
    write_strip(folder / "strip", **changes)
    return folder


@pytest.fixture(scope="module")
def trained(segmenter, data, embeddings, tmp_path_factory):
    """Return the output folder of an undisturbed run, and its bars."""
    out, bars = tmp_path_factory.mktemp("out"), Bars()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_base(read(out), segmenter, data, out, embeddings=embeddings, stage=bars)
    torch.set_num_threads(threads)
    return out, bars


# --- the run ---


def test_a_recipe_becomes_an_adapter_that_a_segmenter_takes_and_whose_card_says_what_it_is(trained, segmenter):
    out, bars = trained
    path = out / "light-granularity.safetensors"
    assert bars.told["level branch"] == [1, 2, 3, 4]
    assert bars.told["phrase branch"] == [1, 2, 3]
    card = read_adapter(path, base=segmenter.digest).card
    assert card["branches"] == [LEVEL, PHRASE]
    assert card["vocabulary"] == ["ball", "door", "handle", "window"]
    assert card["recipe"] == read(out).digest
    assert [part["path"] for part in card["sets"]] == ["strip"]
    adapted = load_segmenter("light", WEIGHTS, adapter=path, device="cpu", encoder="exact")
    assert adapted.adapter.startswith("light-granularity-")
    encoded = segmenter.encode(strip())
    clicks = (Click(x=120, y=90, positive=True),)
    level = predict(adapted, encoded, Prompt(clicks=clicks, granularity=Granularity(10)))
    named = predict(adapted, encoded, Prompt(clicks=clicks, phrase="the door"))
    assert level.adapter == named.adapter == adapted.adapter
    assert np.count_nonzero(level.best.mask) > 0


def test_pictures_and_tensorboards_files_are_left_for_both_branches(trained):
    out, _ = trained
    for branch, sheets in ((LEVEL, [2, 4]), (PHRASE, [2, 3])):
        found = sorted((out / branch).glob("sheet-*.png"))
        assert [path.name for path in found] == [f"sheet-{step:06}.png" for step in sheets]
        with Image.open(found[-1]) as sheet:
            assert sheet.width > 200
        assert list((out / branch).glob("events.out.tfevents.*"))


def test_phrases_are_learned_on_top_of_levels_without_a_change_to_them(trained):
    out, _ = trained
    level, both = (read_adapter(out / branch / "adapter.safetensors") for branch in (LEVEL, PHRASE))
    assert (list(level.lora), list(both.lora)) == ([LEVEL], [LEVEL, PHRASE])
    equal(level.lora[LEVEL], both.lora[LEVEL])
    moved = {name for name, value in level.plain.items() if not torch.equal(value, both.plain[name])}
    assert moved
    assert all(name.startswith("phrase_") for name in moved)
    assert VOCABULARY in both.plain


def test_a_second_run_trains_nothing_and_gives_the_same_file(trained, segmenter, data, embeddings):
    out, _ = trained
    path = out / "light-granularity.safetensors"
    before, bars = path.read_bytes(), Bars()
    assert train_base(read(out), segmenter, data, out, embeddings=embeddings, stage=bars) == path
    assert bars.told == {}
    assert path.read_bytes() == before


@pytest.mark.parametrize("stop", [("level branch", 3), ("phrase branch", 1), ("phrase branch", 3)])
def test_a_run_that_is_killed_goes_on_to_the_very_tensors_of_one_that_is_not(
    trained, segmenter, data, embeddings, tmp_path, monkeypatch, stop
):
    monkeypatch.setattr(base_training, "_draw", lambda *_: None)
    with pytest.raises(Stopped):
        train_base(read(tmp_path), segmenter, data, tmp_path, embeddings=embeddings, stage=Bars(stop))
    torch.manual_seed(99)  # another process draws from elsewhere
    bars = Bars()
    path = train_base(read(tmp_path), segmenter, data, tmp_path, embeddings=embeddings, stage=bars)
    assert ("level branch" in bars.told) == (stop[0] == "level branch")
    equal(tensors(path), tensors(trained[0] / "light-granularity.safetensors"))


def test_proposals_are_made_once_and_get_their_share_of_the_lessons(segmenter, data, embeddings, tmp_path, monkeypatch):
    monkeypatch.setattr(base_training, "_draw", lambda *_: None)
    text = RECIPE.replace("views = 1", "proposals = 0.5")
    recipe = read(tmp_path, text)
    recipe = replace(recipe, level=replace(recipe.level, steps=1), phrase=replace(recipe.phrase, steps=1))
    bars = Bars()
    train_base(recipe, segmenter, data, tmp_path, embeddings=embeddings, stage=bars)
    assert bars.told["proposals on strip"] == [1]
    (proposals,) = (tmp_path / "proposals").glob("strip-*.json")
    (image,) = read_annotations(proposals, split="train").images
    assert any(mask.origin.startswith("proposal") for mask in image.masks)
    groups, named, _ = photos_for(recipe, segmenter, data, tmp_path, embeddings)
    assert [share for share, _ in groups] == [1.0, 0.5]
    assert {name for _, photos in named for photo in photos for name in photo.names} == {
        "door",
        "window",
        "handle",
        "ball",
    }


def test_a_finished_branch_of_other_annotations_photos_or_another_base_is_refused(
    trained, segmenter, embeddings, tmp_path, monkeypatch
):
    out, data, bars = tmp_path / "out", tmp_path / "data", Bars()
    shutil.copytree(trained[0], out)

    def refused() -> None:
        with pytest.raises(Refusal, match=r"adapter\.safetensors was .* on other data .*name another output folder"):
            train_base(read(tmp_path), segmenter, data, out, embeddings=embeddings, stage=bars)

    corrected(data, handle={"parent_id": None})
    refused()
    photo = corrected(data) / "strip" / "images" / "strip.png"
    Image.fromarray(strip(1)).save(photo)
    refused()
    corrected(data)
    monkeypatch.setattr(LightSegmenter, "digest", "0" * 64)
    refused()
    assert bars.told == {}, "it is said before hours of encoding"
    monkeypatch.undo()
    train_base(read(tmp_path), segmenter, data, out, embeddings=embeddings, stage=bars)
    assert bars.told == {}


def test_a_checkpoint_of_other_annotations_is_refused_and_proposals_are_made_anew_for_them(
    segmenter, embeddings, tmp_path, monkeypatch
):
    monkeypatch.setattr(base_training, "_draw", lambda *_: None)
    recipe = read(tmp_path, RECIPE.replace("views = 1", "proposals = 0.5"))
    data = corrected(tmp_path / "data")
    with pytest.raises(Stopped):
        train_base(recipe, segmenter, data, tmp_path, embeddings=embeddings, stage=Bars(("level branch", 3)))
    corrected(data, ball={"id": 9})
    bars = Bars()
    with pytest.raises(Refusal, match=r"checkpoint\.pt belongs to .* other data .*delete it"):
        train_base(recipe, segmenter, data, tmp_path, embeddings=embeddings, stage=bars)
    assert bars.told["proposals on strip"] == [1]


def test_a_photo_that_is_left_out_of_the_proposals_is_named_in_the_log(segmenter, embeddings, tmp_path, caplog):
    folder = corrected(tmp_path / "data") / "strip"
    (folder / "images" / "torn.png").write_bytes((folder / "images" / "strip.png").read_bytes()[:200])
    content = json.loads((folder / "annotations.json").read_text())
    content["images"].append(content["images"][0] | {"id": 2, "file_name": "torn.png"})
    (folder / "annotations.json").write_text(json.dumps(content))
    recipe = read(tmp_path, RECIPE.replace("views = 1", "proposals = 0.5"))
    photos_for(recipe, segmenter, tmp_path / "data", tmp_path, embeddings)
    (said,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert "a photo of strip has no part in its proposals: " in said
    assert "torn.png" in said


def test_the_phrase_branch_may_see_other_views_and_shares_than_the_level_branch(data, segmenter, embeddings, tmp_path):
    recipe = read(tmp_path, RECIPE.replace("views = 1", "views = 1\nphrase_views = 3\nphrase_share = 0.25"))
    groups, named, _ = photos_for(recipe, segmenter, data, tmp_path, embeddings)
    assert [(share, len(photos)) for share, photos in groups] == [(1.0, 2)]
    assert [(share, len(photos)) for share, photos in named] == [(0.25, 4)]
    assert {photo.embedding for photo in groups[0][1]} < {photo.embedding for photo in named[0][1]}


def test_two_processes_by_torchrun_share_what_they_learn_and_write_one_adapter(segmenter, data, embeddings, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "active_learning", "train-base", "--config", str(recipe), "--data", str(data)]
    command += ["--out", str(tmp_path / "out"), "--embeddings", str(embeddings), "--encoder", "exact"]
    command += ["--device", "cpu", "--precision", "no", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    path = tmp_path / "out" / "light-granularity.safetensors"
    assert str(path) in done.stdout
    assert read_adapter(path, base=segmenter.digest).card["branches"] == [LEVEL, PHRASE]
    kept = torch.load(tmp_path / "out" / "level" / "checkpoint.pt", weights_only=True)
    assert len(kept["rng"]) == 2, "each process drew lessons of its own"


def test_processes_wait_for_the_first_one_as_long_as_encoding_may_take(trained, segmenter, data, embeddings, tmp_path):
    # in a process of its own: accelerate makes one group of processes and keeps it
    program = f"""
import sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed
from active_learning import base_training

began = torch.distributed.init_process_group

def begin(*arguments, **options):
    print("waits", options["timeout"] >= timedelta(hours=12), flush=True)
    began(*arguments, **options)

def prepare(*_):
    assert torch.distributed.is_initialized()
    from accelerate import Accelerator
    print("trains as", Accelerator(cpu=True).num_processes)  # as `fine_tune` makes it, of the same group
    sys.exit()

torch.distributed.init_process_group, base_training._photos = begin, prepare
recipe = base_training.Recipe.read(Path({str(trained[0] / "recipe.toml")!r}), device="cpu")
base_training.train_base(
    recipe,
    type("Base", (), {{"digest": {segmenter.digest!r}}}),
    Path({str(data)!r}),
    Path({str(tmp_path)!r}),
    embeddings=Path({str(embeddings)!r}),
    stage=print,
)
"""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | alone, capture_output=True, text=True, check=False
    )
    assert "waits True\ntrains as 1" in done.stdout, done.stderr[-3000:]


# --- refusals ---


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("phrase_threshold = 0.58", "", "lacks 'phrase_threshold'"),
        ("smallest = 0.8", "", "lacks 'smallest'"),
        ("[level]", "[levels]", "lacks 'level'"),
        ("rank = 4", "ranks = 4", "cannot set 'ranks'; it may set .*rank"),
        ('split = "train"', 'spilt = "train"', "spilt"),
        ("[level]", "[level", "not understood"),
        ("steps = 4", 'steps = "4"', r"steps = '4' in \[level\]"),
        ("steps = 3", "steps = 3.5", r"steps = 3.5 in \[phrase\]"),
        ("steps = 4", "steps = 4\nclip = 'x'", r"clip = 'x' in \[level\]"),
        ("smallest = 0.8", 'smallest = "all"', "not understood"),
        ("rank = 4", "rank = 8", r"\(8, 8\) in \[level\] but \(4, 8\) in \[phrase\]; .* both branches the same"),
        ("alpha = 8", "alpha = 16", r"\(4, 16\) in \[level\] but \(4, 8\) in \[phrase\]"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_with_what_is_wrong(tmp_path, old, new, said):
    assert old in RECIPE
    with pytest.raises(Refusal, match=rf"recipe\.toml .*{said}"):
        read(tmp_path, RECIPE.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "allowed"),
    [
        *(
            (f"{name} = {usual}", f"{name} = {value}", "a whole number from 1 on")
            for name, usual in (("steps", 4), ("clicks", 1), ("most_clicks", 2), ("rank", 4), ("alpha", 8))
            for value in (0, -1, 1.5, "true")
        ),
        ("checkpoint_every = 2", "checkpoint_every = 0", "a whole number from 1 on"),
        ("log_every = 1", "log_every = 0", "a whole number from 1 on"),
        ("log_every = 1", "warmup = -1", "a whole number from 0 on"),
        ("log_every = 1", "head_learning_rate = nan", "a number above 0"),
        ("log_every = 1", "learning_rate = 0", "a number above 0"),
        ("log_every = 1", "clip = inf", "a number above 0"),
        ("log_every = 1", "score = -0.5", "a number from 0 on"),
        ("log_every = 1", "central = 2", "a number from 0 to 1"),
        ("log_every = 1", "device = 'gpu'", "auto or cpu or cuda"),
        ("log_every = 1", "precision = 8", "bf16 or no"),
        ("log_every = 1", "kind_weights = {object = 'x'}", "numbers from 0 on for object, part, subpart"),
        ("log_every = 1", "kind_weights = {whole = 1.0}", "numbers from 0 on for object, part, subpart"),
        ("log_every = 1", "kind_weights = {part = nan}", "numbers from 0 on for object, part, subpart"),
        ("views = 1", "views = -1", "a whole number from 0 on"),
        ("views = 1", "phrase_views = 1.5", "a whole number from 0 on"),
        ("views = 1", "share = '0.28'", "a number from 0 on"),
        ("views = 1", "share = nan", "a number from 0 on"),
        ("views = 1", "phrase_share = -1", "a number from 0 on"),
        ("named = true", "named = 'yes'", "true or false"),
        ('path = "strip"', "path = 3", "a text"),
        ("smallest = 0.8", "smallest = 2", "a number above 0, 1 at most"),
        ("smallest = 0.8", "smallest = 0.0", "a number above 0, 1 at most"),
        ("seed = 0", "seed = -1", "a whole number from 0 on"),
        ("per_object = 3", "per_object = '3'", "a whole number from 1 on"),
        ('sources = ["agg"]', "sources = 'agg'", "a list of names"),
        ("phrase_threshold = 0.58", "phrase_threshold = nan", "a number from 0 to 1"),
        ("[[sets]]", "sets = [1]\n[[set]]", "a list of tables"),
        ("[[sets]]", "sets = []\n[[set]]", "a list of tables"),
    ],
)
def test_a_value_that_no_training_can_have_is_refused_by_its_name_with_what_is_allowed(tmp_path, old, new, allowed):
    assert old in RECIPE
    name = new.partition(" = ")[0]
    with pytest.raises(Refusal, match=rf"recipe\.toml .*\b{name} = .* is not allowed; give {allowed}$"):
        read(tmp_path, RECIPE.replace(old, new, 1))


def test_a_branch_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(Refusal, match="level = 3 in the recipe is not allowed; give a table"):
        read(tmp_path, "level = 3\n" + RECIPE.replace("[level]", "[levels]"))


def test_every_value_of_a_training_is_checked():
    assert base_training._TRAINING.keys() | {"branch"} == {field.name for field in fields(TrainingConfig)}
    assert base_training._SET.keys() == {field.name for field in fields(SetPart)}


def test_a_wrong_device_in_a_recipe_is_refused_though_another_one_is_asked_for(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("log_every = 1", "device = 'gpu'", 1))
    with pytest.raises(Refusal, match="device = 'gpu'"):
        Recipe.read(tmp_path / "recipe.toml", device="cpu")


def test_a_recipe_that_is_missing_or_not_text_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"none\.toml cannot be read"):
        Recipe.read(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refusal, match=r"bytes\.toml is not understood"):
        Recipe.read(tmp_path / "bytes.toml")


def test_an_unknown_precision_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    with pytest.raises(Refusal, match=r"precision = 'fp8' .*give bf16 or no"):
        Recipe.read(tmp_path / "recipe.toml", precision="fp8")


def test_a_whole_number_will_do_where_a_fraction_may_stand(tmp_path):
    assert read(tmp_path, RECIPE.replace("steps = 4", "steps = 4\nclip = 2")).level.clip == 2


def test_a_set_that_is_not_there_is_refused_by_name(segmenter, tmp_path):
    with pytest.raises(Refusal, match="strip"):
        train_base(read(tmp_path), segmenter, tmp_path, tmp_path, embeddings=tmp_path, stage=Bars())


def test_a_set_without_names_can_teach_no_phrase(segmenter, data, embeddings, tmp_path):
    recipe = read(tmp_path, RECIPE.replace("named = true", "").replace("views = 1", ""))
    with pytest.raises(Refusal, match="nothing to train phrases on"):
        train_base(recipe, segmenter, data, tmp_path, embeddings=embeddings, stage=Bars())


def test_a_nameless_mask_in_a_set_of_names_is_refused_before_anything_is_encoded(segmenter, tmp_path):
    folder = write_strip(tmp_path / "data" / "strip")
    content = json.loads((folder / "annotations.json").read_text())
    content["categories"][1]["name"] = ""
    (folder / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(Refusal, match=r"strip has named = true, but a mask of strip\.png has no name"):
        train_base(read(tmp_path), segmenter, tmp_path / "data", tmp_path, embeddings=tmp_path, stage=Bars())


# --- what ships ---


def test_the_shipped_recipe_is_read_and_names_only_sets_that_companies_may_use():
    recipe = Recipe.read(SHIPPED)
    assert {part.path for part in recipe.sets} == {"ccp-person-clothing", "coco-mval", "coco128-seg"}
    assert {part.split for part in recipe.sets} == {"train"}
    assert (recipe.level.branch, recipe.phrase.branch) == (LEVEL, PHRASE)
    assert (recipe.level.rank, recipe.level.alpha) == (recipe.phrase.rank, recipe.phrase.alpha)


# --- the command ---


def said_by(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        app, ["train-base", *arguments], env={"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"}
    )
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_the_command_explains_itself():
    code, said = said_by("--help")
    assert code == 0
    assert "a stopped run goes on" in said
    for option in ("--config", "--data", "--out", "--embeddings", "--precision"):
        assert option in said


@pytest.mark.parametrize("option", ["--out", "--embeddings"])
def test_the_command_ends_with_two_and_a_sentence_where_it_cannot_write(data, embeddings, tmp_path, option):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "file").write_text("in the way")
    where = {"--out": tmp_path / "out", "--embeddings": embeddings} | {option: tmp_path / "file" / "below"}
    given = {"--config": tmp_path / "recipe.toml", "--data": data, "--device": "cpu", "--encoder": "exact"} | where
    code, said = said_by(*(str(word) for pair in given.items() for word in pair))
    assert code == 2
    assert f"choose another --out ({where['--out']}) or --embeddings ({where['--embeddings']}), or free" in said
    assert "Traceback" not in said


def test_bundle_ends_with_two_and_a_sentence_where_it_cannot_write(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr("active_learning.__main__.bundle", full)
    result = CliRunner().invoke(app, ["bundle", "--out", str(tmp_path)], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "no room; choose another --out" in result.output


def test_bundle_advises_no_other_out_where_a_photo_is_missing(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "photos" / "1.jpg"))

    monkeypatch.setattr("active_learning.__main__.bundle", missing)
    result = CliRunner().invoke(app, ["bundle", "--out", str(tmp_path / "out")], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "1.jpg" in result.output
    assert "choose another" not in result.output


def test_the_command_ends_with_two_and_a_sentence_on_a_wrong_recipe(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("rank = 4", "ranks = 4", 1))
    code, said = said_by("--config", str(tmp_path / "recipe.toml"))
    assert code == 2
    assert "[level] cannot set 'ranks'" in said
    code, said = said_by("--config", str(tmp_path / "none.toml"))
    assert code == 2
    assert "cannot be read" in said
