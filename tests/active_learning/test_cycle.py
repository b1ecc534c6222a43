"""One training cycle on drawn corrections: its order, what comes of it, and what survives a kill."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from active_learning.corrections import Correction, CorrectionStore, held_out
from active_learning.cycle import Limits, Workplace, run
from active_learning.dataset import PLAIN
from active_learning.gate import Margins, judged_by
from active_learning.images import ImageStore
from active_learning.learn import LearningConfig, _out_of_memory
from active_learning.registry import AdapterRegistry
from active_learning.snapshots import HOLD_OUT, TRAIN, annotated, of_split, write_snapshot
from active_learning.status import TrainingFolder
from model import heap
from model.adapter import ENCODER, read_adapter, write_adapter
from model.annotations import decode, encode, read_annotations
from model.light.tail import moved_by
from model.segmenter import BUNDLED_ADAPTER
from model.types import Granularity
from tests.active_learning.drawn import HEIGHT, WIDTH, strip, strip_masks

QUICK = LearningConfig(fewest_steps=4, most_steps=4, clicks=1, checkpoint_every=1, tail=False, views=0)
SERVED = Limits(precision="no", too_few="publish")
SURE = Margins(lose=50.0, doubt=50.0, least_objects=30, limit=30, budget=2)  # too few to judge by
EASY = Margins(lose=5.0, doubt=50.0, least_objects=1, limit=2, budget=2)


def fill(
    store: CorrectionStore, images: ImageStore, *, photos: int, project: str = "3", siblings: bool = False
) -> None:
    """Add corrections on `photos` drawn photos, some of them held out; with `siblings` a door has two of one name."""
    names = {"window": "fitting", "handle": "fitting"} if siblings else {}
    for number in range(photos):
        pixels = strip(number)
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        images.put(digest, file.getvalue())
        regions = [
            Correction(
                project=project,
                annotation=number,
                region=name,
                task=number,
                image=digest,
                height=HEIGHT,
                width=WIDTH,
                mask=encode(mask),
                label=names.get(name, name),
                granularity=None,
                phrase=None,
                clicks=(),
                kind="drawn",
                proposed=None,
                adapter=None,
                annotator=1,
                ground_truth=False,
                updated_s=1000.0 + number,
            )
            for name, mask in strip_masks().items()
        ]
        store.replace(project, number, regions, updated_s=1000.0 + number)


@pytest.fixture
def place(tmp_path, segmenter, data, embeddings) -> Workplace:
    found = read_annotations(data / "strip")
    store = CorrectionStore(tmp_path / "corrections.sqlite")
    yield Workplace(
        store=store,
        images=ImageStore(tmp_path / "images"),
        registry=AdapterRegistry(tmp_path / "adapters", base=segmenter.digest),
        segmenter=segmenter,
        embeddings=embeddings,
        configured=BUNDLED_ADAPTER,
        bundled=BUNDLED_ADAPTER,
        replay=found,
        reference=found,
    )
    store.close()


@pytest.fixture
def trainings(tmp_path) -> TrainingFolder:
    return TrainingFolder(tmp_path / "trainings", "project-3")


def carry_out(place, trainings, *, thorough=False, **changes):
    values = {"config": QUICK, "margins": EASY, "limits": Limits(precision="no")} | changes
    return run(place, trainings, trainings.ask("a test", thorough=thorough), **values)


def test_a_cycle_learns_judges_and_keeps_a_version_with_its_card_and_pictures(place, trainings):
    fill(place.store, place.images, photos=6)
    ended = carry_out(place, trainings)
    (version,) = place.registry.versions("project-3")
    assert ended.state in ("published", "rejected")
    assert ended.version == version.id
    assert version.accepted == (ended.state == "published")
    assert (place.registry.active("project-3") is not None) == version.accepted
    assert version.snapshot == place.store.snapshot("3").id
    assert set(version.scores) == {"hold-out", "reference"}
    folder = place.registry.path(version).parent
    assert {"verdict.json", "curves.png", "sheet.png"} <= {path.name for path in folder.iterdir()}
    learned = read_adapter(place.registry.path(version), base=place.segmenter.digest)
    began = read_adapter(BUNDLED_ADAPTER)
    assert learned.lora["phrase"].keys() == began.lora["phrase"].keys()
    assert any((learned.lora["level"][name] != value).any() for name, value in began.lora["level"].items())
    assert trainings.pending() is None
    assert not trainings.work(ended).exists()


def test_the_same_corrections_are_not_trained_on_twice(place, trainings):
    fill(place.store, place.images, photos=3)
    first = carry_out(place, trainings)
    again = carry_out(place, trainings)
    assert (again.state, again.version) == ("nothing new", first.version)
    assert len(place.registry.versions("project-3")) == 1


def test_what_was_learned_in_a_hurry_is_learned_thoroughly_once(place, trainings):
    fill(place.store, place.images, photos=3)
    hurried = carry_out(place, trainings)
    slowly = {"thorough": True, "config": replace(QUICK, fewest_steps=6, most_steps=6)}
    thorough = carry_out(place, trainings, **slowly)
    assert thorough.version not in (None, hurried.version)
    assert [place.registry.card("project-3", one.version)["thorough"] for one in (hurried, thorough)] == [False, True]
    for again in (carry_out(place, trainings, **slowly), carry_out(place, trainings)):
        assert (again.state, again.version) == ("nothing new", thorough.version)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("serving", ["hurried", "thorough"])
def test_a_damaged_version_is_replaced_though_another_of_the_same_corrections_is_whole(
    place, trainings, serving, again
):
    fill(place.store, place.images, photos=6)
    known = {"margins": SURE, "limits": SERVED}
    slowly = {"thorough": True, "config": replace(QUICK, fewest_steps=6, most_steps=6), **known}
    made = {"hurried": carry_out(place, trainings, **known), "thorough": carry_out(place, trainings, **slowly)}
    place.registry.activate("project-3", made[serving].version, by="a test")
    hurt(place.registry, place.registry.get("project-3", made[serving].version), "damaged")
    mended = carry_out(place, trainings, **(slowly if again else known))
    assert mended.state == "published", mended.said
    assert mended.version != made[serving].version
    assert place.registry.active_id("project-3") == mended.version


def test_without_corrections_nothing_is_trained(place, trainings):
    assert carry_out(place, trainings).said == "there are no corrections yet"


def test_with_too_few_held_out_objects_the_admin_is_asked_or_the_setting_decides(place, trainings):
    fill(place.store, place.images, photos=3)
    many = replace(EASY, least_objects=30, limit=30)
    kept = carry_out(place, trainings, margins=many)
    assert kept.state == "kept"
    assert f"adapters activate project-3 {kept.version}" in kept.said
    assert place.registry.active("project-3") is None
    fill(place.store, place.images, photos=4)
    served = carry_out(place, trainings, margins=many, limits=Limits(precision="no", too_few="publish"))
    assert served.state == "published"
    active = place.registry.active("project-3")
    assert active is not None
    assert active.id == served.version


def test_a_candidate_that_loses_on_the_reference_set_is_kept_and_does_not_serve(place, trainings):
    fill(place.store, place.images, photos=6)
    strict = replace(EASY, win=0.99)
    ended = carry_out(place, trainings, margins=strict)
    assert ended.state == "rejected"
    assert "does not win" in ended.said
    assert place.registry.active("project-3") is None


def test_a_cancelled_training_ends_at_its_next_step(place, trainings):
    fill(place.store, place.images, photos=3)
    assert carry_out(place, trainings, pause=trainings.cancel).state == "cancelled"
    assert place.registry.versions("project-3") == []


def test_a_training_that_takes_too_long_fails_with_a_sentence_and_blocks_no_other(place, trainings):
    fill(place.store, place.images, photos=3)
    ended = carry_out(place, trainings, limits=Limits(precision="no", time_s=0.0))
    assert ended.state == "failed"
    assert "GRACO_TRAIN_LIMIT_MINUTES" in ended.said
    assert carry_out(place, trainings).state in ("published", "rejected", "kept")


def test_a_snapshot_taken_stays_the_same_when_corrections_come_in_meanwhile(place, trainings):
    fill(place.store, place.images, photos=3)
    before = place.store.snapshot("3").id
    once = iter([True])

    def pause() -> None:
        if next(once, False):
            fill(place.store, place.images, photos=5)

    ended = carry_out(place, trainings, pause=pause)
    assert ended.snapshot == before
    assert place.store.snapshot("3").id != before


_TRAINER = """
import os
import sys
from pathlib import Path
from dataclasses import replace
import torch
torch.set_num_threads(1)
from active_learning.corrections import CorrectionStore
from active_learning.cycle import Limits, Workplace, run
from active_learning.images import ImageStore
from active_learning.registry import AdapterRegistry
from active_learning.status import TrainingFolder
from model.annotations import read_annotations
from model.segmenter import BUNDLED, BUNDLED_ADAPTER, load_segmenter
from tests.active_learning.test_cycle import EASY, QUICK
folder, data, embeddings = map(Path, sys.argv[1:4])
segmenter = load_segmenter("light", BUNDLED, encoder="exact", device="cpu")
found = read_annotations(data / "strip")
trainings = TrainingFolder(folder / "trainings", "project-3")

def train():
    place = Workplace(store=CorrectionStore(folder / "corrections.sqlite"), images=ImageStore(folder / "images"),
        registry=AdapterRegistry(folder / "adapters", base=segmenter.digest), segmenter=segmenter,
        embeddings=embeddings, configured=BUNDLED_ADAPTER, bundled=BUNDLED_ADAPTER, replay=found, reference=found)
    config = replace(QUICK, fewest_steps=STEPS, most_steps=STEPS)
    with trainings.alone() as ours:
        assert ours, "the lock of the one that was killed is free"
        run(place, trainings, trainings.pending(), config=config, margins=EASY, limits=Limits(precision="no"))

for _ in sys.stdin:  # a process for each training, forked as rq's worker forks them
    if (pid := os.fork()) == 0:
        try:
            train()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_trainer_killed_twenty_times_at_random_goes_on_and_publishes_one_version(
    place, trainings, tmp_path, data, embeddings
):
    steps, kills = 240, 20
    fill(place.store, place.images, photos=6)
    status = trainings.ask("a test")
    rng = np.random.default_rng(0)
    code = _TRAINER.replace("STEPS", str(steps))
    reached = []
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(data), str(embeddings)],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[2]},
    ) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None

        def begin() -> int:
            trainer.stdin.write("train\n")
            trainer.stdin.flush()
            return int(trainer.stdout.readline())

        for kill in range(kills):
            pid, before = begin(), trainings.pending().step
            wanted = before + int(rng.integers(0, 3)) if kill % 2 else 0  # every other one in the middle of its steps
            until_s = time.monotonic() + 60
            while trainings.pending().step < wanted and time.monotonic() < until_s:
                time.sleep(0.01)
            time.sleep(float(rng.uniform(0, 0.2 if kill % 2 else 0.6)))
            os.kill(pid, signal.SIGKILL)
            assert int(trainer.stdout.readline()) == -signal.SIGKILL, "it had not ended before"
            reached.append(trainings.pending().step)
        begin()
        assert int(trainer.stdout.readline()) == 0
    ended = trainings.status()
    assert ended is not None
    assert (ended.id, ended.state in ("published", "rejected")) == (status.id, True)
    assert len({step for step in reached if 0 < step < steps}) >= 4, "else the kills came before the steps"
    assert reached == sorted(reached), "each went on from where the one before was"
    (version,) = place.registry.versions("project-3")
    assert version.id == ended.version
    assert json.loads((trainings.folder / "history.jsonl").read_text())["id"] == status.id


def test_held_out_photos_are_never_learned_from(place, trainings):
    fill(place.store, place.images, photos=12)
    held = [c.image for c in place.store.corrections("3") if held_out(c.image)]
    assert held

    found = annotated(place.store.snapshot("3"), place.images)
    assert {image.digest() for image in of_split(found, HOLD_OUT).images} == set(held)
    assert not {image.digest() for image in of_split(found, TRAIN).images} & set(held)


def test_the_level_of_a_part_of_a_part_is_its_share_of_the_whole_as_the_shipped_adapter_has_it(place):
    fill(place.store, place.images, photos=1)
    drawn = place.store.get("3", 0)
    pane = np.zeros((HEIGHT, WIDTH), bool)
    pane[25:45, 90:120] = True
    further = replace(drawn[0], region="pane", label="pane", mask=encode(pane))
    place.store.replace("3", 0, [*drawn, further], updated_s=2000.0)
    (image,) = annotated(place.store.snapshot("3"), place.images).images
    by_name = {mask.name: mask for mask in image.masks if mask.granularity is not None}
    door, window, pane = (by_name[name] for name in ("door", "window", "pane"))
    assert (pane.parent_id, window.parent_id, door.parent_id) == (window.id, door.id, None)
    assert pane.granularity == pytest.approx(pane.area / door.area)
    assert pane.granularity < 0.5 * pane.area / window.area
    assert Granularity.from_share(pane.granularity) == image.granularity_of(pane)


def test_what_two_tasks_or_projects_drew_on_one_photo_counts_once(place):
    fill(place.store, place.images, photos=1)
    fill(place.store, place.images, photos=1, project="4")
    kept = place.store.get("4", 0)
    shifted = [replace(c, mask=encode(np.roll(decode(c.mask), 1, axis=1)), updated_s=2000.0) for c in kept]
    place.store.replace("4", 0, shifted, updated_s=2000.0)
    (image,) = annotated(place.store.snapshot(None), place.images).images
    drawn = [mask for mask in image.masks if mask.origin == "human"]
    assert sorted(mask.name for mask in drawn) == sorted(c.label for c in kept), "each once"
    later = {c.label: c.mask for c in shifted}
    alike = [mask.segmentation["counts"] == later[mask.name]["counts"] for mask in drawn if mask.area > 200]
    assert all(alike), "what was changed last stays"


def test_masks_that_were_accepted_as_they_were_judge_nobody_where_others_suffice(place):
    fill(place.store, place.images, photos=12)
    for one in place.store.corrections("3"):
        if one.label == "ball":
            rest = [c for c in place.store.get("3", one.annotation) if c.region != one.region]
            place.store.replace("3", one.annotation, [*rest, replace(one, kind="accepted")], updated_s=5000.0)
    holdout = of_split(annotated(place.store.snapshot("3"), place.images), HOLD_OUT)
    by_people = [mask for image in holdout.images for mask in image.masks if mask.name != "ball"]
    judging = judged_by(holdout, Margins(least_objects=len(by_people)))
    assert [mask for image in judging.images for mask in image.masks] == by_people
    assert judged_by(holdout, Margins(least_objects=len(by_people) + 1)) == holdout


def test_a_training_that_holds_too_much_at_once_goes_on_with_smaller_steps(place, trainings, monkeypatch, caplog):
    fill(place.store, place.images, photos=3)
    held, given_back = iter([2**31, 3 * 2**30, 2**31 + 1]), []
    monkeypatch.setattr(heap, "held", lambda: next(held, 2**31))
    monkeypatch.setattr(heap, "give_back", lambda: given_back.append(1))
    monkeypatch.setattr("active_learning.cycle._PASSES", 3)
    limits = Limits(precision="no", memory_mb=2048)
    ended = carry_out(place, trainings, config=replace(QUICK, clicks=4), limits=limits)
    assert ended.step == ended.steps == QUICK.most_steps
    said = "memory ran out (it held {} MB, and may hold 2048): training begins anew with {} clicks a step"
    assert [said.format(3072, 2) in caplog.text, said.format(2048, 1) in caplog.text] == [True, True]
    passes = 2 + 1 + QUICK.most_steps
    assert len(given_back) == 2 + passes // 3, "after each attempt that failed, and every so many passes"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
    ],
)
def test_whatever_says_that_memory_ran_out_is_known(error):
    assert _out_of_memory(error)


def test_other_errors_are_none_of_memory():
    assert not _out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_photos_are_learned_from_in_crops_too_which_are_counted_once_and_leave_no_file(place, trainings):
    fill(place.store, place.images, photos=8, siblings=True)
    found = of_split(annotated(place.store.snapshot("3"), place.images), TRAIN)
    assert {len(image.masks) for image in found.images} == {5}, "four, and two of them merged"
    shipped = LearningConfig(fewest_steps=10, most_steps=10, clicks=1, checkpoint_every=1)
    seen = shipped.photos(found)
    assert len(seen) == 3 * len(found.images)
    assert [photo.view for photo in seen] == [photo.view for photo in shipped.photos(found)], "a second attempt goes on"

    crops = set()

    def look():
        for work in trainings.folder.iterdir():
            crops.update(path.stem for path in work.glob("views/*/*/*.safetensors"))

    ended = carry_out(place, trainings, config=shipped, pause=look, margins=SURE, limits=SERVED)
    assert ended.state == "published"
    assert crops <= {photo.embedding for photo in seen if photo.view != PLAIN}
    assert crops
    assert not {path.stem for path in place.embeddings.glob("*/*/*.safetensors")} & crops
    assert not trainings.work(ended).exists()
    (version,) = place.registry.versions("project-3")
    first = read_adapter(place.registry.path(version))
    corrections = place.store.snapshot("3").corrections
    assert first.card["masks"] == sum(not held_out(one.image) for one in corrections), "merged ones do not count"

    # the encoder's tail learned as well, and goes on doing so
    assert first.lora[ENCODER]
    scale = first.card["alpha"] / first.card["rank"]
    moved = moved_by(first)
    assert all(delta.abs().max() > 0 for delta in moved.values())
    name, delta = next(iter(moved.items()))
    up, down = (first.lora[ENCODER][f"{name}.lora_{side}.weight"].flatten(1) for side in "BA")
    torch.testing.assert_close(delta, scale * up @ down)
    fill(place.store, place.images, photos=12)
    carry_out(place, trainings)  # by a recipe without it, which it outlasts
    second = read_adapter(place.registry.path(place.registry.versions("project-3")[-1]))
    assert all(not torch.equal(second.lora[ENCODER][name], value) for name, value in first.lora[ENCODER].items())


def test_a_recipe_without_the_encoders_tail_leaves_it_as_it_is(place, trainings):
    fill(place.store, place.images, photos=6)
    carry_out(place, trainings)
    (version,) = place.registry.versions("project-3")
    assert ENCODER not in read_adapter(place.registry.path(version)).lora


def test_a_training_killed_between_publishing_and_activating_is_finished_by_the_next_attempt(place, trainings):
    fill(place.store, place.images, photos=6)
    status = trainings.ask("a test")
    published = run(place, trainings, status, config=QUICK, margins=SURE, limits=SERVED)
    assert published.state == "published"
    # as it was just before: the version is there and nothing serves, the request is pending and its snapshot is kept
    place.registry.activate("project-3", None)
    again = trainings.ask("a test", now_s=status.asked_s)
    folder = trainings.work(again)
    folder.mkdir()
    write_snapshot(folder / "snapshot.json", place.store.snapshot("3"))
    ended = run(place, trainings, again, config=QUICK, margins=SURE, limits=SERVED)
    assert (ended.state, ended.version) == ("published", published.version)
    assert place.registry.active_id("project-3") == published.version


def test_a_version_that_an_admin_activated_during_a_training_is_not_replaced(place, trainings):
    fill(place.store, place.images, photos=6)
    card = {"snapshot": "another", "note": "by hand"}
    by_hand = place.registry.publish("project-3", BUNDLED_ADAPTER, card=card, activate=False)
    once = iter([True])

    def pause() -> None:
        if next(once, False):
            place.registry.activate("project-3", by_hand.id)

    ended = carry_out(place, trainings, margins=SURE, limits=SERVED, pause=pause)
    assert ended.state == "kept"
    assert "meanwhile" in ended.said
    assert place.registry.active_id("project-3") == by_hand.id


def hurt(registry, version, how):
    """Have a version serve nobody, as a bad disk or another base does."""
    path = registry.path(version)
    if how == "damaged":
        path.write_bytes(path.read_bytes()[:-8])
    elif how == "of another base":
        card = registry.card(version.line, version.id) | {"base": "cd" * 32}
        path.with_name("card.json").write_text(json.dumps(card))
    elif how == "without a card":
        path.with_name("card.json").unlink()
    else:
        path.parents[1].joinpath("ACTIVE").write_text("v0001-tor")


@pytest.mark.parametrize("how", ["damaged", "of another base", "without a card", "torn"])
def test_a_line_whose_version_cannot_serve_is_trained_on_the_same_corrections_and_publishes_again(
    place, trainings, how
):
    fill(place.store, place.images, photos=6)
    first = carry_out(place, trainings, margins=SURE, limits=SERVED)
    assert first.state == "published"
    hurt(place.registry, place.registry.get("project-3", first.version), how)
    if how == "torn":  # its version is whole, and these corrections give no other
        fill(place.store, place.images, photos=7)
    ended = carry_out(place, trainings, margins=SURE, limits=SERVED)
    assert ended.state == "published", ended.said
    assert ended.version != first.version
    assert place.registry.active_id("project-3") == ended.version


def test_a_version_activated_between_two_attempts_of_a_training_is_not_replaced_either(place, trainings):
    fill(place.store, place.images, photos=6)
    status = trainings.ask("a test")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(place, trainings, status, config=QUICK, margins=SURE, limits=SERVED, pause=stop)
    by_hand = place.registry.publish("project-3", BUNDLED_ADAPTER, card={"snapshot": "another"}, activate=True)
    ended = run(place, trainings, status, config=QUICK, margins=SURE, limits=SERVED)
    assert ended.state == "kept"
    assert "Another version was activated meanwhile" in ended.said
    assert place.registry.active_id("project-3") == by_hand.id


def test_what_an_attempt_left_is_not_mixed_with_another_parent(place, trainings, caplog):
    fill(place.store, place.images, photos=6)
    status = trainings.ask("a test")
    folder = trainings.work(status)
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text("{}")
    (folder / "trained.safetensors").write_bytes(b"of another parent")
    ended = run(place, trainings, status, config=QUICK, margins=SURE, limits=SERVED)
    assert ended.state == "published"
    assert "it begins anew" in caplog.text
    assert not folder.exists()


def test_where_the_base_alone_serves_a_candidate_is_compared_with_that(place, trainings):
    fill(place.store, place.images, photos=6)
    ended = carry_out(replace(place, configured=None), trainings, margins=SURE, limits=SERVED)
    assert ended.state == "published"
    version = place.registry.active("project-3")
    assert version is not None
    assert version.parent is None


TAUGHT = LearningConfig(
    fewest_steps=30,
    most_steps=30,
    clicks=1,
    checkpoint_every=100,
    learning_rate=1e-2,
    head_learning_rate=5e-3,
    blends=(1.0,),
    tail=False,
    views=0,
)


def spoil(store: CorrectionStore) -> None:
    """Have every correction on a photo that is trained on say the contrary of what is there."""
    for one in store.corrections("3"):
        if not held_out(one.image):
            wrong = replace(one, mask=encode(~decode(one.mask)), updated_s=5000.0)
            rest = [c for c in store.get("3", one.annotation) if c.region != one.region]
            store.replace("3", one.annotation, [*rest, wrong], updated_s=5000.0)


def test_an_adapter_that_learned_wrong_masks_is_refused_by_the_usual_margins(place, trainings):
    fill(place.store, place.images, photos=12)
    spoil(place.store)
    usual = Margins(least_objects=4, limit=4)
    ended = carry_out(place, trainings, config=TAUGHT, margins=usual)
    assert ended.state == "rejected", ended.said
    assert "It does not win on the hold-out" in ended.said
    assert "worse on the reference set" in ended.said
    assert place.registry.active("project-3") is None
    (version,) = place.registry.versions("project-3")
    assert version.accepted is False


def test_a_candidate_that_is_worse_on_too_few_held_out_objects_serves_by_no_setting(place, trainings):
    fill(place.store, place.images, photos=12)
    spoil(place.store)
    ended = carry_out(place, trainings, config=TAUGHT, margins=SURE, limits=SERVED)
    assert ended.state == "kept", ended.said
    assert "It is worse on these few" in ended.said or "Its first click is poorer on the hold-out" in ended.said
    assert f"adapters activate project-3 {ended.version}" in ended.said
    assert place.registry.active("project-3") is None
    assert place.registry.activate("project-3", ended.version) is not None


def test_a_line_that_lost_too_much_since_its_beginning_is_compared_with_that_beginning(place, trainings, tmp_path):
    fill(place.store, place.images, photos=6)
    good = read_adapter(BUNDLED_ADAPTER)
    lora = good.lora | {"level": {name: value * 3 for name, value in good.lora["level"].items()}}
    write_adapter(tmp_path / "worse.safetensors", card=good.card, plain=good.plain, lora=lora)
    worse = place.registry.publish("project-3", tmp_path / "worse.safetensors", card={"snapshot": "x"}, activate=True)
    ended = carry_out(place, trainings)
    version = place.registry.get("project-3", ended.version)
    assert version.parent == worse.id
    told = json.loads((place.registry.path(version).parent / "verdict.json").read_text())
    first, before = told["since_first"]["incumbent"], told["reference"]["incumbent"]
    assert told["since_first"]["candidate"] == told["reference"]["candidate"]
    assert first["iou1"] > before["iou1"]
