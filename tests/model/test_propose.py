"""Proposals for a whole set: one file, the same after every kind of interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from model.annotations import AnnotationSet, encode, read_annotations
from model.propose import options_for, propose
from model.types import Refusal
from tests.conftest import ROOT
from tests.model.striped import HEIGHT, WIDTH, Striped, flag

ALL = options_for(["agg", "decoder", "grid", "trie"], per_object=6, points_per_image=4, seed=0)


def write_set(folder: Path, *, photos: int = 3, annotated: bool = True) -> Path:
    """Write photos that differ, each with a flag, its first two stripes and an object that is too small for parts."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    speck = np.zeros_like(flag())
    speck[:4, :4] = True
    for place in range(1, photos + 1):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 40 * place, np.uint8)).save(folder / "images" / f"{place}.png")
        images.append({"id": place, "file_name": f"{place}.png", "height": HEIGHT, "width": WIDTH, "split": "train"})
        first = 10 * place
        for offset, (mask, parent) in enumerate(
            [(flag(), None), (flag(0, 0), first), (flag(1, 1), first), (speck, None)] if annotated else []
        ):
            segmentation = encode(mask)
            annotations.append(
                {
                    **{"id": first + offset, "image_id": place, "category_id": 1, "parent_id": parent},
                    "level": "object" if parent is None else "part",
                    "segmentation": {**segmentation, "counts": segmentation["counts"].decode()},
                }
            )
    content = {
        **{"info": {"name": "flags", "license": "ours"}, "images": images, "annotations": annotations},
        "categories": [{"id": 1, "name": "left stripe", "supercategory": ""}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def flags(tmp_path) -> AnnotationSet:
    return read_annotations(write_set(tmp_path / "flags"))


def test_what_is_written_can_be_read_again_with_parents_origins_and_granularities(flags, tmp_path):
    out = tmp_path / "elsewhere" / "proposals.json"
    progress = propose(flags, Striped(), out, ALL)
    found = read_annotations(out)
    assert [image.path for image in found.images] == [image.path.resolve() for image in flags.images]
    assert [image.split for image in found.images] == ["train"] * 3
    assert (found.name, found.licence) == ("flags, with proposals", "ours")
    proposals = [mask for image in found.images for mask in image.masks if mask.origin != "human"]
    assert progress.proposals == len(proposals) > 0
    assert {mask.origin for mask in proposals} >= {"proposal-agg", "proposal-trie"}
    ids = [mask.id for image in found.images for mask in image.masks]
    assert len(set(ids)) == len(ids)
    for image in found.images:
        for mask in image.masks:
            whole = image.whole(mask)
            assert not (mask.mask() & ~whole.mask()).any()
            if mask.origin != "human":
                assert mask.granularity is not None
                assert 0 < mask.granularity < 1
                assert mask.parent_id in image.by_id
                assert whole.area > 16, "no parts are looked for in a speck"
        (stripes,) = (mask for mask in image.masks if mask.origin == "proposal-trie")
        assert stripes.name == "left stripes"
        assert {child.id for child in image.children(stripes)} == {image.id * 10 + 1, image.id * 10 + 2}
    assert not list(out.parent.glob("*.parts"))
    assert progress.passes > 0


def test_photos_without_masks_get_whole_objects_and_their_parts(tmp_path):
    folder = write_set(tmp_path / "flags", photos=1, annotated=False) / "images"
    progress = propose(read_annotations(folder), Striped(), tmp_path / "out.json", ALL)
    (image,) = read_annotations(tmp_path / "out.json").images
    (whole,) = (mask for mask in image.masks if mask.level == "object")
    np.testing.assert_array_equal(whole.mask(), flag())
    assert (whole.origin, whole.granularity) == ("proposal-grid", 1.0)
    assert len(image.children(whole)) == progress.proposals - 1 > 0


def test_the_order_of_the_photos_changes_no_proposal_and_another_seed_does(flags, tmp_path):
    def masks(annotations: AnnotationSet, seed: int) -> dict[int, list[tuple[bytes, float | None]]]:
        options = options_for(["agg", "decoder"], per_object=6, points_per_image=4, seed=seed)
        propose(annotations, Striped(), tmp_path / "out.json", options)
        images = read_annotations(tmp_path / "out.json").images
        return {image.id: [(m.segmentation["counts"], m.granularity) for m in image.masks] for image in images}

    turned = replace(flags, images=flags.images[::-1])
    assert masks(flags, 0) == masks(turned, 0) != masks(flags, 1)


def test_a_run_that_fails_goes_on_where_it_was_and_ends_with_the_same_bytes(flags, tmp_path):
    propose(flags, Striped(), tmp_path / "once.json", ALL)

    class Failing(Striped):
        def encode(self, image):
            if self.encoded == 2:
                raise RuntimeError("the power is gone")
            return super().encode(image)

    with pytest.raises(RuntimeError, match="power"):
        propose(flags, Failing(), tmp_path / "twice.json", ALL)
    assert not (tmp_path / "twice.json").exists()
    second = Striped()
    progress = propose(flags, second, tmp_path / "twice.json", ALL)
    assert (progress.reused, second.encoded) == (2, 1)
    assert (tmp_path / "twice.json").read_bytes() == (tmp_path / "once.json").read_bytes()
    assert not (tmp_path / "twice.json.parts").exists()


def test_a_run_that_is_killed_goes_on_where_it_was_and_ends_with_the_same_bytes(tmp_path):
    folder = write_set(tmp_path / "flags", photos=4)
    out = tmp_path / "killed.json"
    program = f"""
import time
from pathlib import Path
from model.annotations import read_annotations
from model.propose import propose
from tests.model.striped import Striped
from tests.model.test_propose import ALL

def wait(progress):
    print(progress.done, flush=True)
    if progress.done == 2:
        time.sleep(600)

propose(read_annotations(Path({str(folder)!r})), Striped(), Path({str(out)!r}), ALL, report=wait)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "2":
                break
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    flags = read_annotations(folder)
    progress = propose(flags, Striped(), out, ALL)
    assert progress.reused == 2
    propose(flags, Striped(), tmp_path / "once.json", ALL)
    assert out.read_bytes() == (tmp_path / "once.json").read_bytes()


def test_what_was_made_with_other_options_or_masks_is_not_taken_for_this_run(flags, tmp_path):
    def stop(progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        propose(flags, Striped(), tmp_path / "out.json", ALL, report=stop)
    assert propose(flags, Striped(), tmp_path / "out.json", replace(ALL, seed=1)).reused == 0


def test_a_damaged_photo_is_left_out_with_a_sentence_and_done_once_it_is_mended(flags, tmp_path):
    path = flags.images[1].path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    progress = propose(flags, Striped(), tmp_path / "out.json", ALL)
    assert len(progress.refusals) == 1
    assert str(path) in progress.refusals[0]
    assert [image.id for image in read_annotations(tmp_path / "out.json").images] == [1, 3]
    path.write_bytes(whole)
    progress = propose(flags, Striped(), tmp_path / "out.json", ALL)
    assert (progress.reused, progress.refusals) == (2, [])
    assert len(read_annotations(tmp_path / "out.json").images) == 3


def test_siblings_drawn_outside_their_whole_cost_that_level_and_not_the_photo(tmp_path):
    folder = write_set(tmp_path / "flags", photos=2)
    content = json.loads((folder / "annotations.json").read_text())
    for note in content["annotations"]:
        if note["id"] in (11, 12):  # both stripes of the first photo, moved above its flag
            strip = np.zeros_like(flag())
            strip[:8, 30 * (note["id"] - 11) :][:, :30] = True
            note["segmentation"]["counts"] = encode(strip)["counts"].decode()
    (folder / "annotations.json").write_text(json.dumps(content))
    progress = propose(read_annotations(folder), Striped(), tmp_path / "out.json", ALL)
    assert progress.refusals == []
    one, other = read_annotations(tmp_path / "out.json").images
    origins = [{mask.origin for mask in image.masks} for image in (one, other)]
    assert ["proposal-agg" in of for of in origins] == [True, True]
    assert ["proposal-trie" in of for of in origins] == [False, True]


@pytest.mark.parametrize("left", [b"", b"[{", b"\x00" * 64, b"null"])
def test_what_an_earlier_run_left_damaged_is_done_again(flags, tmp_path, left):
    def stop(progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    propose(flags, Striped(), tmp_path / "once.json", ALL)
    with pytest.raises(KeyboardInterrupt):
        propose(flags, Striped(), tmp_path / "out.json", ALL, report=stop)
    min((tmp_path / "out.json.parts").glob("*.json")).write_bytes(left)
    assert propose(flags, Striped(), tmp_path / "out.json", ALL).reused == 1
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "once.json").read_bytes()


def test_embeddings_are_kept_for_a_second_run_and_a_damaged_one_is_made_anew(flags, tmp_path):
    first, second, third = Striped(), Striped(), Striped()
    for place, segmenter in enumerate((first, second)):
        propose(flags, segmenter, tmp_path / f"{place}.json", ALL, embeddings=tmp_path / "embeddings")
    assert (first.encoded, second.encoded) == (3, 0)
    digest = flags.images[0].digest()
    kept = tmp_path / "embeddings" / "striped" / digest[:2] / f"{digest}.safetensors"
    kept.write_bytes(b"nothing")
    propose(flags, third, tmp_path / "2.json", ALL, embeddings=tmp_path / "embeddings")
    assert third.encoded == 1
    assert len({(tmp_path / f"{place}.json").read_bytes() for place in range(3)}) == 1


def test_options_that_mean_nothing_are_refused():
    good = {"per_object": 6, "points_per_image": 4, "seed": 0}
    for sources, changes in (([], {}), (["magic"], {}), (["agg"], {"points_per_image": 0}), (["agg"], {"seed": -1})):
        with pytest.raises(Refusal):
            options_for(sources, **{**good, **changes})
    with pytest.raises(Refusal, match="1 or more"):
        options_for(["agg"], **{**good, "per_object": 0})


@pytest.fixture
def command(monkeypatch):
    """The command `propose` with the striped model; returns exit status and all it says in one line."""
    from model import __main__

    monkeypatch.setattr(__main__, "load_segmenter", lambda *args, **options: Striped())

    def command(*arguments: object) -> tuple[int, str]:
        found = CliRunner().invoke(__main__.app, ["propose", *map(str, arguments)])
        return found.exit_code, " ".join(found.output.split())

    return command


def test_the_command_writes_the_file_and_tells_its_speed(command, tmp_path):
    folder = write_set(tmp_path / "flags")
    status, said = command(folder, "--out", tmp_path / "out.json", "--limit", 2, "--sources", "decoder, agg")
    assert status == 0
    assert "proposals on 2 photos" in said
    assert "a second" in said
    assert len(read_annotations(tmp_path / "out.json").images) == 2


def test_the_command_ends_with_status_1_when_a_photo_was_left_out(command, tmp_path):
    folder = write_set(tmp_path / "flags")
    (folder / "images" / "2.png").write_bytes(b"nothing")
    status, said = command(folder, "--out", tmp_path / "out.json")
    assert status == 1
    assert "left out" in said
    assert "proposals on 2 photos" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sources", "magic"], "magic is unknown"),
        (["--split", "test"], "its splits are"),
        (["--out", "/proc/nowhere/out.json"], "choose another --out"),
    ],
)
def test_the_command_says_what_to_mend(command, tmp_path, arguments, sentence):
    folder = write_set(tmp_path / "flags", photos=1)
    status, said = command(folder, "--out", tmp_path / "out.json", *arguments)
    assert status == 2
    assert sentence in said
    (folder / "annotations.json").write_text("{")
    assert command(folder)[0] == 2
