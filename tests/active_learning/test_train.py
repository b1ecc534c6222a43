"""The training loop: on one drawn photo, a few steps."""

import itertools

import numpy as np
import pytest
import torch

from active_learning import train
from active_learning.dataset import EmbeddingFiles, Sampler
from active_learning.train import (
    TrainingConfig,
    fine_tune,
    plain_state,
    prepare,
    prepare_tail,
    trainable_names,
)
from active_learning.training_run import seeded
from model.adapter import ENCODER, load_lora, lora_state, switch_on
from model.light.adapter import LEVEL, PHRASE
from model.light.ladder import Ladder, LadderDecoder
from model.light.network import CHANNELS
from model.light.tail import TAIL_LAYERS
from model.types import Refusal

WIDTH = 5  # of a phrase's vector


class Stopped(Exception):
    """Stands for whatever ends a training early."""


def config(**changes) -> TrainingConfig:
    usual = {"steps": 5, "clicks": 1, "most_clicks": 2, "warmup": 2, "checkpoint_every": 2, "log_every": 1}
    return TrainingConfig(**(usual | {"rank": 4, "alpha": 8, "precision": "no", "device": "cpu"} | changes))


def phrases(names):
    """Return a vector of each name."""
    order = ["door", "window", "handle", "ball"]
    return torch.eye(WIDTH)[[order.index(name) for name in names]]


@pytest.fixture
def fresh(segmenter):
    """Make networks that are the same each time."""

    def make(*branches):
        with seeded(0):
            network = LadderDecoder(segmenter.mask_decoder, WIDTH)
        for branch in branches:
            prepare(network, config(branch=branch))
        return network

    return make


@pytest.fixture
def teach(segmenter, photo, embeddings):
    """Train a network on the drawn photo."""

    def run(network, folder, recipe, **more):
        drawn = Sampler(
            [(1.0, [photo])],
            level_power=recipe.level_power,
            kind_weights=recipe.kind_weights,
            central=recipe.central,
        )
        files = EmbeddingFiles(embeddings, segmenter)
        fine_tune(recipe, network, segmenter.prompt_encoder, drawn, files, folder, phrases=phrases, **more)
        return network

    return run


def stop_at(step):
    def report(progress):
        if progress.step == step:
            raise Stopped

    return report


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def answers(network, branches, phrase=None):
    """Return what a network answers to drawn vectors with these branches on."""
    switch_on(network.transformer, branches)
    draw = torch.Generator().manual_seed(5)
    image, position = (torch.randn(1, CHANNELS, 4, 6, generator=draw) for _ in range(2))
    with torch.no_grad():
        ladder = network(image, position, torch.randn(1, 2, CHANNELS, generator=draw), phrase)
    return ladder.logits, ladder.scores


# --- resume ---


@pytest.mark.parametrize("branch", [LEVEL, PHRASE])
def test_a_training_that_was_stopped_goes_on_to_the_very_weights_of_one_that_was_not(fresh, teach, tmp_path, branch):
    branches = [LEVEL] if branch == LEVEL else [LEVEL, PHRASE]
    recipe = config(branch=branch)
    at_once = teach(fresh(*branches), tmp_path / "one", recipe)
    with pytest.raises(Stopped):
        teach(fresh(*branches), tmp_path / "two", recipe, report=stop_at(3))
    steps = []
    resumed = teach(fresh(*branches), tmp_path / "two", recipe, report=lambda progress: steps.append(progress.step))
    assert steps == [3, 4, 5], "the checkpoint of step 2 was gone on from"
    equal(at_once.state_dict(), resumed.state_dict())


def test_the_encoders_tail_goes_on_where_it_was_too(segmenter, fresh, teach, tmp_path):
    recipe = config()

    def tail():
        found = segmenter.encoder_tail()
        prepare_tail(found, recipe)
        return found

    begun, at_once, resumed = tail(), tail(), tail()
    network = teach(fresh(LEVEL), tmp_path / "one", recipe, tail=at_once)
    assert "tail" not in dict(network.named_children()), "what is kept of the decoder is the decoder's"
    with pytest.raises(Stopped):
        teach(fresh(LEVEL), tmp_path / "two", recipe, tail=tail(), report=stop_at(3))
    equal(network.state_dict(), teach(fresh(LEVEL), tmp_path / "two", recipe, tail=resumed).state_dict())
    equal(at_once.state_dict(), resumed.state_dict())
    before, after = lora_state(begun, ENCODER), lora_state(at_once, ENCODER)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert len(moved) == 2 * len(TAIL_LAYERS)
    plain = {name for name, value in at_once.state_dict().items() if "lora_" not in name}
    equal({name: at_once.state_dict()[name] for name in plain}, {name: begun.state_dict()[name] for name in plain})


def test_a_training_that_is_done_only_puts_its_weights_back(fresh, teach, tmp_path):
    recipe = config(steps=2)
    first = teach(fresh(LEVEL), tmp_path, recipe)
    steps = []
    again = teach(fresh(LEVEL), tmp_path, recipe, report=lambda progress: steps.append(progress.step))
    assert steps == []
    equal(first.state_dict(), again.state_dict())


def test_the_checkpoint_of_another_recipe_is_refused(fresh, teach, tmp_path):
    teach(fresh(LEVEL), tmp_path, config(steps=1))
    with pytest.raises(Refusal, match=r"checkpoint\.pt belongs to another recipe, .*; name another output folder"):
        teach(fresh(LEVEL), tmp_path, config(steps=1, growth=0.25))


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_the_system_that_names_it(fresh, teach, tmp_path):
    (tmp_path / ".checkpoint.pt.draft").mkdir()  # in the way
    with pytest.raises(OSError, match=rf"checkpoint {tmp_path}/checkpoint\.pt cannot be written"):
        teach(fresh(LEVEL), tmp_path, config(steps=1))


def test_the_checkpoint_of_another_number_of_processes_is_refused(fresh, teach, tmp_path):
    teach(fresh(LEVEL), tmp_path, config(steps=1))
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(content | {"rng": content["rng"] * 2}, tmp_path / "checkpoint.pt")
    with pytest.raises(Refusal, match=r"checkpoint\.pt was written by 2 processes; go on with as many"):
        teach(fresh(LEVEL), tmp_path, config(steps=1))


def test_a_damaged_checkpoint_is_refused_by_name_with_the_remedy(fresh, teach, tmp_path):
    teach(fresh(LEVEL), tmp_path, config(steps=1))
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"rubbish", whole[:40]):
        path.write_bytes(content)
        with pytest.raises(Refusal, match=r"checkpoint\.pt cannot be read .*; delete it to begin anew"):
            teach(fresh(LEVEL), tmp_path, config(steps=1))
    for content in ([1, 2], {"weights": {}}):
        torch.save(content, path)
        with pytest.raises(Refusal, match=r"checkpoint\.pt cannot be read"):
            teach(fresh(LEVEL), tmp_path, config(steps=1))


def test_at_each_checkpoint_the_network_shows_its_average_and_then_trains_on(fresh, teach, tmp_path):
    shown = {}
    network = fresh(LEVEL)

    def look(step):
        shown[step] = network.levels.weight.detach().clone()

    teach(network, tmp_path, config(), each_checkpoint=look)
    assert list(shown) == [2, 4, 5]
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert torch.equal(shown[5], kept["average"]["levels.weight"])
    assert torch.equal(network.levels.weight, shown[5])
    assert not torch.equal(kept["weights"]["levels.weight"], shown[5])
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(shown.values()))
    alone = teach(fresh(LEVEL), tmp_path / "alone", config())
    equal(network.state_dict(), alone.state_dict())


# --- what moves ---


def test_a_branch_moves_its_own_tensors_and_no_other(fresh, teach, tmp_path):
    network = fresh(LEVEL)
    for branch in (LEVEL, PHRASE):
        if branch == PHRASE:
            prepare(network, config(branch=PHRASE))
        before = {name: value.clone() for name, value in network.state_dict().items()}
        teach(network, tmp_path / branch, config(branch=branch))
        moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
        own = set(trainable_names(network, branch)) | {n for n in before if "lora_" in n and f".{branch}." in n}
        assert moved == own
    assert all(bool(plain) for plain in (trainable_names(network, LEVEL), trainable_names(network, PHRASE)))


def test_what_is_kept_bears_the_decoders_own_names_whatever_lora_was_added_to(segmenter, fresh):
    network = fresh(LEVEL)
    kept = plain_state(network)
    prepare(network, config(branch=PHRASE))
    assert any("mlp" in name for name in lora_state(network.transformer, PHRASE))
    equal(plain_state(network), kept)


def test_the_base_is_left_as_it_was(segmenter, fresh, teach, tmp_path):
    parts = segmenter.mask_decoder, segmenter.prompt_encoder
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    teach(fresh(LEVEL), tmp_path, config(steps=2))
    for part, state in zip(parts, before, strict=True):
        equal(dict(part.state_dict()), state)
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())


def test_learning_phrases_leaves_the_answers_to_levels_alone_as_they_were(fresh, teach, tmp_path):
    network = teach(fresh(LEVEL), tmp_path / LEVEL, config(steps=2))
    levels, scores = answers(network, [LEVEL])
    prepare(network, config(branch=PHRASE))
    before, _ = answers(network, [LEVEL, PHRASE], phrases(["door"]))
    teach(network, tmp_path / PHRASE, config(branch=PHRASE, steps=3))
    again, scores_again = answers(network, [LEVEL])
    assert torch.equal(again, levels)
    assert torch.equal(scores_again, scores)
    after, _ = answers(network, [LEVEL, PHRASE], phrases(["door"]))
    assert not torch.equal(after, before)


def test_the_seed_decides_where_lora_and_phrases_begin_and_nothing_else_is_drawn_from(segmenter, fresh):
    torch.manual_seed(1)
    one = fresh(LEVEL, PHRASE).state_dict()
    following = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), following)
    equal(one, fresh(LEVEL, PHRASE).state_dict())
    with seeded(0):
        other = LadderDecoder(segmenter.mask_decoder, WIDTH)
    prepare(other, config(branch=LEVEL, seed=1))
    assert any(not torch.equal(value, one[name]) for name, value in other.state_dict().items() if "lora_A" in name)


def test_what_is_saved_of_a_network_can_be_put_into_another(fresh, teach, tmp_path):
    network = teach(fresh(LEVEL), tmp_path, config(steps=2))
    other = fresh(LEVEL)
    other.load_state_dict(plain_state(network), strict=False)
    load_lora(other.transformer, LEVEL, lora_state(network.transformer, LEVEL))
    equal(network.state_dict(), other.state_dict())


# --- learning ---


@pytest.mark.parametrize("branch", [LEVEL, PHRASE])
def test_a_few_steps_on_one_photo_lower_the_loss(fresh, teach, tmp_path, branch):
    losses, figures = [], {}

    def report(progress):
        assert progress.steps == 30
        losses.append(progress.figures["loss"])
        figures.update(progress.figures)

    recipe = config(branch=branch, steps=30, clicks=2, most_clicks=1, boxed=0.0, checkpoint_every=30)
    teach(fresh(*([LEVEL] if branch == LEVEL else [LEVEL, PHRASE])), tmp_path, recipe, report=report)
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5]), losses
    assert {"loss", "IoU after 1", "gradient", "clicks a second"} <= figures.keys()
    assert all(np.isfinite(value) for value in figures.values())
    assert 0 <= figures["IoU after 1"] <= 1


def test_lessons_that_begin_with_boxes_are_learned_from_too(fresh, teach, tmp_path):
    told = []
    recipe = config(steps=4, boxed=1.0, most_clicks=3, further=1.0, clicks=2)
    teach(fresh(LEVEL), tmp_path, recipe, report=told.append)
    assert [progress.step for progress in told] == [1, 2, 3, 4]
    assert any("IoU after 2 and 3" in progress.figures for progress in told)
    assert all(np.isfinite(progress.figures["loss"]) for progress in told)


def asked_of(monkeypatch):
    """Return a list that grows by the clicks of a prompt, its boxes, and whether the pass counts, with every pass."""
    asked, original = [], train._vectors

    def noted(prompts, clicks, boxes):
        asked.append(([len(one) for one in clicks], boxes, torch.is_grad_enabled()))
        return original(prompts, clicks, boxes)

    monkeypatch.setattr(train, "_vectors", noted)
    return asked


def test_a_refined_first_click_is_taught_with_the_box_of_what_the_network_found(fresh, teach, tmp_path, monkeypatch):
    asked, told = asked_of(monkeypatch), []
    recipe = config(steps=4, refined=1.0, boxed=0.0, further=0.0, clicks=2, most_clicks=1)
    teach(fresh(LEVEL), tmp_path, recipe, report=told.append)
    assert len(asked) == 2 * 4, "one pass to find it, one that counts"
    for (clicks, first_boxes, _), (again, boxes, _) in zip(asked[::2], asked[1::2], strict=True):
        assert first_boxes is None
        assert set(clicks) == set(again) == {1}, "no click is added"
        assert boxes.shape == (len(again), 2, 2)
        assert (boxes[:, 1] > boxes[:, 0]).all()
    assert all("IoU after 1" in progress.figures for progress in told)
    assert all(np.isfinite(progress.figures["loss"]) for progress in told)


def test_without_it_and_after_boxes_nothing_is_refined(fresh, teach, tmp_path, monkeypatch):
    asked = asked_of(monkeypatch)
    teach(fresh(LEVEL), tmp_path / "none", config(steps=3, refined=0.0, boxed=0.0, further=0.0))
    assert [boxes for _, boxes, _ in asked] == [None] * 3
    asked.clear()
    teach(fresh(LEVEL), tmp_path / "boxed", config(steps=3, refined=1.0, boxed=1.0, further=0.0))
    assert len(asked) == 3


def test_a_network_that_finds_nothing_is_taught_by_the_click_alone(fresh, teach, tmp_path, monkeypatch):
    monkeypatch.setattr(LadderDecoder, "forward", emptied(LadderDecoder.forward))
    asked, told = asked_of(monkeypatch), []
    teach(fresh(LEVEL), tmp_path, config(steps=2, refined=1.0, boxed=0.0, further=0.0), report=told.append)
    assert [boxes for _, boxes, _ in asked] == [None] * 4
    assert all(np.isfinite(progress.figures["loss"]) for progress in told)


def emptied(forward):
    """Return a pass of the decoder whose masks have no pixel."""

    def answered(*given, **named):
        ladder = forward(*given, **named)
        return Ladder(ladder.logits.clamp(max=-1), ladder.scores)

    return answered


def test_tensorboards_file_holds_the_losses_and_progress_is_told_every_few_steps(fresh, teach, tmp_path):
    told = []
    teach(fresh(LEVEL), tmp_path, config(steps=5, log_every=2), report=told.append)
    assert [progress.step for progress in told] == [2, 4, 5]
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"level/loss" in events.read_bytes()
