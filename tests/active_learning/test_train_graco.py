"""Training a graco adapter: a tiny network, the drawn photo, and the whole cycle on drawn corrections."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from active_learning.corrections import CorrectionStore
from active_learning.cycle import Limits, Workplace, run
from active_learning.dataset import EmbeddingFiles, Sampler, photos_of
from active_learning.gate import Margins
from active_learning.images import ImageStore
from active_learning.learn import graco_learning, learn
from active_learning.registry import AdapterRegistry
from active_learning.status import TrainingFolder
from active_learning.train_graco import GracoCourse, SteeredNetwork, fine_tune, untrained
from model.adapter import read_adapter, write_adapter
from model.annotations import read_annotations
from model.graco.runtime import load_network
from model.graco.segmenter import GracoSegmenter
from model.graco.weights import LEVEL, LEVEL_EMBEDDING, PHRASE, adapter_from_published, adapter_to_published
from model.segmenter import predict
from model.types import Click, Granularity, Prompt, Refusal
from tests.active_learning.drawn import strip
from tests.active_learning.test_cycle import EASY, fill
from tests.model.graco.tiny import TINY, write_tiny_adapter, write_tiny_base

QUICK = replace(graco_learning("cpu"), fewest_steps=5, most_steps=5, checkpoint_every=1)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("graco") / "weights.safetensors")


@pytest.fixture(scope="module")
def adapter(base):
    return write_tiny_adapter(base.with_name("adapter.safetensors"), base)


@pytest.fixture(scope="module")
def tiny(base):
    return GracoSegmenter.load(base, device="cpu")


def teach(base, found, photo, folder, **changes):
    usual = {"size": TINY.size, "warmup": 2, "average": 0.5, "precision": "no", "device": "cpu", "log_every": 1}
    course = GracoCourse(**(usual | changes))
    network = SteeredNetwork(load_network(base)[0], found, course)
    sampler = Sampler([(1.0, [photo])], level_power=0.5, kind_weights={}, central=course.central)
    told = []
    fine_tune(course, network, sampler, folder, report=told.append)
    return network, [progress.figures for progress in told]


def learned(base, adapter, tiny, data, folder, **more):
    photos = photos_of(read_annotations(data / "strip"))
    files = EmbeddingFiles(folder / "embeddings", tiny)
    given = {"card": {"snapshot": "drawn"}, "weights": base, "precision": "no"} | more
    return learn(QUICK, tiny, photos, photos, files, adapter, folder, **given)


def test_the_loss_falls_on_one_photo(base, adapter, photo, tmp_path):
    given = {"steps": 30, "batch": 2, "learning_rate": 2e-2, "further": 1, "whole": 1.0}
    _, told = teach(base, read_adapter(adapter), photo, tmp_path, **given)
    losses = [figures["loss"] for figures in told]
    assert np.mean(losses[-8:]) < 0.75 * np.mean(losses[:8]), losses


def test_lora_and_the_level_embedding_move_and_nothing_else_by_a_bit(base, adapter, photo, tmp_path):
    before = load_network(base)[0].state_dict()
    found = read_adapter(adapter)
    network, _ = teach(base, found, photo, tmp_path, steps=2)
    after = {name.replace(".base_layer", ""): value for name, value in network.network.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    plain, lora = network.adapter(found)
    assert {name for name, value in plain.items() if not torch.equal(value, found.plain[name])} == {LEVEL_EMBEDDING}
    assert all(not torch.equal(value, found.lora[LEVEL][name]) for name, value in lora[LEVEL].items())
    assert all(torch.equal(value, found.lora[PHRASE][name]) for name, value in lora[PHRASE].items())


def test_lessons_taken_one_at_a_time_make_the_same_step(base, adapter, photo, tmp_path):
    given = {"steps": 1, "batch": 3, "further": 0}
    _, (one,) = teach(base, read_adapter(adapter), photo, tmp_path / "one", clicks=1, **given)
    _, (other,) = teach(base, read_adapter(adapter), photo, tmp_path / "other", clicks=2, **given)
    for name in ("loss", "IoU", "gradient"):
        assert one[name] == pytest.approx(other[name], rel=1e-4), name


_CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from model.graco.segmenter import GracoSegmenter
from tests.active_learning.test_train_graco import learned
base, adapter, data, folder = map(Path, sys.argv[1:])
def report(progress):
    if progress.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
learned(base, adapter, GracoSegmenter.load(base, device="cpu"), data, folder, report=report)
"""


def test_a_training_that_was_killed_goes_on_to_the_very_file_of_one_that_was_not(base, adapter, tiny, data, tmp_path):
    at_once = learned(base, adapter, tiny, data, tmp_path / "one")
    arguments = [sys.executable, "-c", _CHILD, *map(str, (base, adapter, data, tmp_path / "two"))]
    (tmp_path / "two").mkdir()
    assert subprocess.run(arguments, cwd=ROOT, env=os.environ, check=False).returncode == -signal.SIGKILL
    steps = []
    resumed = learned(base, adapter, tiny, data, tmp_path / "two", report=lambda progress: steps.append(progress.step))
    assert steps == [3, 4, 5], "the checkpoint of step 2 was gone on from"
    assert resumed.read_bytes() == at_once.read_bytes()


def test_what_was_learned_converts_to_the_published_layout_and_back_to_the_bit(base, adapter, tiny, data, tmp_path):
    trained = read_adapter(learned(base, adapter, tiny, data, tmp_path), base=tiny.digest)
    again = adapter_from_published(adapter_to_published(trained), TINY, tiny.digest)
    for one, other in ((trained.plain, again.plain), *((trained.lora[b], again.lora[b]) for b in (LEVEL, PHRASE))):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_where_memory_runs_out_fewer_clicks_are_taken_at_a_time(base, adapter, tiny, data, tmp_path):
    once = iter([True])

    def report(_):
        if next(once, False):
            raise MemoryError

    assert learned(base, adapter, tiny, data, tmp_path, report=report).is_file()
    assert (tmp_path / "clicks").read_text() == "1"
    (tmp_path / "trained.safetensors").unlink()
    once = iter([True])
    with pytest.raises(Refusal, match="memory does not suffice to learn from one click at a time"):
        learned(base, adapter, tiny, data, tmp_path, report=report)


def test_the_untrained_adapter_answers_every_level_as_the_base_does(base, tiny, tmp_path):
    nothing = untrained(TINY.width, TINY.depth, tiny.digest)
    path = tmp_path / "untrained.safetensors"
    write_adapter(path, card=nothing.card, plain=nothing.plain, lora=nothing.lora, exact=True)
    encoded = tiny.encode(strip())
    clicks = (Click(x=100, y=30, positive=True),)
    alone = predict(tiny, encoded, Prompt(clicks=clicks)).best.mask
    steered = predict(tiny.with_adapter(path), encoded, Prompt(clicks=clicks, granularity=Granularity(3))).best.mask
    np.testing.assert_array_equal(steered, alone)


@pytest.mark.parametrize("imported", [True, False], ids=["an imported adapter serves", "the base alone serves"])
def test_a_cycle_learns_judges_and_keeps_a_version(base, adapter, tiny, data, tmp_path, imported):
    found = read_annotations(data / "strip")
    store, images = CorrectionStore(tmp_path / "corrections.sqlite"), ImageStore(tmp_path / "images")
    fill(store, images, photos=6)
    place = Workplace(
        store=store,
        images=images,
        registry=AdapterRegistry(tmp_path / "adapters", base=tiny.digest),
        segmenter=tiny,
        embeddings=tmp_path / "embeddings",
        configured=adapter if imported else None,
        bundled=None,
        weights=base,
        replay=found,
        reference=found,
    )
    trainings = TrainingFolder(tmp_path / "trainings", "project-3")
    limits = Limits(precision="no", too_few="publish")
    unsure = Margins(lose=50.0, doubt=50.0, total=50.0, least_objects=30, limit=30, budget=2)
    ended = run(place, trainings, trainings.ask("a test"), config=QUICK, margins=unsure, limits=limits)
    assert ended.state == "published", ended.said
    active = place.registry.active("project-3")
    serving = read_adapter(place.registry.path(active), base=tiny.digest)
    began = read_adapter(adapter) if imported else untrained(TINY.width, TINY.depth, tiny.digest)
    assert not torch.equal(serving.plain[LEVEL_EMBEDDING], began.plain[LEVEL_EMBEDDING])
    for name in began.plain.keys() - {LEVEL_EMBEDDING}:
        assert torch.equal(serving.plain[name], began.plain[name]), "the phrase branch is handed on to the bit"
    fill(store, images, photos=7)
    again = run(place, trainings, trainings.ask("a test"), config=QUICK, margins=EASY, limits=limits)
    assert again.state in ("published", "rejected"), again.said
    assert place.registry.card("project-3", again.version)["parent"] == active.id
    store.close()
