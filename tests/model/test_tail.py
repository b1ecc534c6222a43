"""Adapters that move the encoder's tail: what they see, and what stays the base's."""

import gc
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model.adapter import ENCODER, attach, load_lora, read_adapter, write_adapter
from model.light.encoder import TorchEncoder
from model.light.segmenter import LadderState
from model.light.tail import TAIL_LAYERS, moved_by
from model.metrics import iou
from model.segmenter import BUNDLED, load_segmenter, predict
from model.types import Click, Granularity, Prompt, Refusal
from tests.model.random_adapter import write_random_adapter

CPU = torch.device("cpu")
BALL = (Click(x=490, y=250, positive=True),)
AT_ONCE = Prompt(clicks=BALL, granularity=Granularity(4))


@pytest.fixture(scope="module")
def adapters(segmenter, tmp_path_factory):
    """One adapter as it was before tails moved, one that moves it by nothing, and one that does, all else alike."""
    folder = tmp_path_factory.mktemp("adapters")
    offs = {"none": None, "still": 0.0, "moving": 0.05}
    return {
        name: write_random_adapter(folder / f"{name}.safetensors", segmenter, tail=off) for name, off in offs.items()
    }


def changed(path, target, change):
    """Write a copy of an adapter file whose tensors `change` altered."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        card = json.loads(file.metadata()["card"])
    change(tensors)
    save_file(tensors, target, {"card": json.dumps(card)})
    return target


def test_the_tail_by_itself_makes_the_encoders_embedding_of_its_features(segmenter, scene):
    encoded = segmenter.encode(scene)
    with torch.inference_mode():
        embedding = segmenter.encoder_tail()(encoded.tensors["features"].float())
    difference = (embedding - encoded.tensors["embedding"].float()).abs()
    assert difference.max() < 0.02, "no more than what keeping features in half precision costs"
    assert difference.mean() < 5e-4


def test_matrices_are_summed_into_the_tail_as_peft_adds_them(segmenter, adapters, scene):
    features = segmenter.encode(scene).tensors["features"].float()
    found = read_adapter(adapters["moving"])
    running = segmenter.encoder_tail()
    attach(running, ENCODER, rank=4, alpha=8, targets=list(TAIL_LAYERS))
    load_lora(running, ENCODER, found.lora[ENCODER])
    moved = moved_by(found)
    assert moved is not None
    with torch.inference_mode():
        by_peft, plain = running(features), segmenter.encoder_tail()(features)
    summed = TorchEncoder(BUNDLED, CPU).tail(moved)(features)
    torch.testing.assert_close(summed, by_peft, atol=1e-5, rtol=1e-4)
    assert (plain - by_peft).abs().mean() > 100 * (summed - by_peft).abs().mean(), "it does move"


def test_the_compiled_tail_sees_what_torch_sees_for_any_adapter(segmenter, adapters, scene, tmp_path):
    fast = load_segmenter("light", BUNDLED, device="cpu", encoder="fast", compiled=tmp_path)
    encoded = fast.encode(scene)
    features = encoded.tensors["features"].float()
    reference = TorchEncoder(BUNDLED, CPU)
    for name in ("moving", "still", "moving"):  # one network serves them all
        moved = moved_by(read_adapter(adapters[name]))
        ours, theirs = fast._encoder.tail(moved)(features), reference.tail(moved)(features)
        assert (ours - theirs).abs().max() < 1e-3
    ours = predict(fast.with_adapter(adapters["moving"]), encoded, AT_ONCE).best.mask
    theirs = predict(segmenter.with_adapter(adapters["moving"]), segmenter.encode(scene), AT_ONCE).best.mask
    assert iou(ours, theirs) > 0.98


def test_an_adapter_that_moves_the_tail_by_nothing_answers_as_one_without(segmenter, adapters, scene):
    encoded = segmenter.encode(scene)
    without, still, moving = (
        segmenter.with_adapter(adapters[name]).step(encoded, AT_ONCE, None).logits for name in adapters
    )
    assert np.abs(without.astype(np.float32) - still).max() < 0.5
    assert np.mean((without > 0) == (still > 0)) > 0.999
    assert np.abs(without.astype(np.float32) - moving).mean() > 10 * np.abs(without.astype(np.float32) - still).mean()


def test_without_a_level_and_a_phrase_the_base_answers_bit_for_bit(segmenter, adapters, scene):
    encoded = segmenter.encode(scene)
    asked = Prompt(clicks=BALL)
    ours = segmenter.with_adapter(adapters["moving"]).step(encoded, asked, None)
    np.testing.assert_array_equal(ours.logits, segmenter.step(encoded, asked, None).logits)


def test_wholes_still_have_the_bases_say_from_the_third_click_on(segmenter, adapters, scene, monkeypatch):
    """The base decodes what the base's encoder saw: of an adapter that moves it, its own embedding."""
    adapted = segmenter.with_adapter(adapters["moving"])
    encoded = segmenter.encode(scene)
    clicks = (*BALL, Click(x=480, y=200, positive=True), Click(x=200, y=240, positive=False))
    asked = Prompt(clicks=clicks, granularity=Granularity(10))
    seen = []
    decode = segmenter.mask_decoder.forward
    monkeypatch.setattr(
        segmenter.mask_decoder, "forward", lambda image, *rest: (seen.append(image), decode(image, *rest))[1]
    )
    state = None
    for n in (1, 2, 3):
        previous = state
        state = adapted.step(encoded, Prompt(clicks=clicks[:n], granularity=asked.granularity), previous)
    dense, _ = segmenter._asked(asked, previous.look.focus, np.asarray(previous.logits[9], np.float32))
    (image,) = seen
    torch.testing.assert_close(image, encoded.tensors["embedding"].float() + dense)


def test_an_image_is_moved_once_for_all_clicks_and_forgotten_with_it(segmenter, adapters, scene):
    adapted = segmenter.with_adapter(adapters["moving"])
    ladder = adapted._adapter
    seen = []
    run = ladder.tail
    object.__setattr__(ladder, "tail", lambda features: (seen.append(1), run(features))[1])
    encoded = segmenter.encode(scene)
    for x in (490, 480, 200):
        adapted.step(encoded, Prompt(clicks=(Click(x=x, y=240, positive=True),), granularity=Granularity(3)), None)
    assert len(seen) == 1
    assert len(ladder._seen) == 1
    del encoded
    gc.collect()
    assert len(ladder._seen) == 0


def test_no_more_images_are_kept_than_said(segmenter, adapters, scene, monkeypatch):
    monkeypatch.setattr("model.light.adapter._SEEN", 2)
    ladder = segmenter.with_adapter(adapters["moving"])._adapter
    images = [segmenter.encode(scene[:, shift:]) for shift in (0, 8, 16)]
    embeddings = [ladder.sees(image) for image in images]
    assert [image in ladder._seen for image in images] == [False, True, True]
    torch.testing.assert_close(ladder.sees(images[0]), embeddings[0], atol=0, rtol=0)


def test_readers_of_the_first_format_are_told_and_unknown_branches_refused(segmenter, adapters, tmp_path):
    """Half of an adapter, a decoder trained for other embeddings, must not be served."""
    formats = {name: json.loads(safe_open(path, "pt").metadata()["card"])["format"] for name, path in adapters.items()}
    assert formats == {"none": 1, "still": 2, "moving": 2}
    found = read_adapter(adapters["none"])
    lora = found.lora | {"later": {name: value.clone() for name, value in found.lora["level"].items()}}
    write_adapter(tmp_path / "later.safetensors", card=found.card, plain=found.plain, lora=lora)
    with pytest.raises(Refusal, match="has a branch later, which this version does not know"):
        segmenter.with_adapter(tmp_path / "later.safetensors")


@pytest.mark.parametrize("lost", ["all of it", "tail.xml"])
def test_a_compiled_tail_that_was_deleted_since_the_start_is_made_anew(adapters, tmp_path, lost):
    fast = load_segmenter("light", BUNDLED, device="cpu", encoder="fast", compiled=tmp_path)
    if lost == "all of it":
        shutil.rmtree(tmp_path)
    else:
        next(tmp_path.rglob(lost)).unlink()
    assert fast.with_adapter(adapters["moving"]).adapter is not None


def test_a_tail_that_cannot_be_compiled_is_a_refusal_that_says_what_to_do(adapters, tmp_path):
    fast = load_segmenter("light", BUNDLED, device="cpu", encoder="fast", compiled=tmp_path)
    next(tmp_path.rglob("tail.xml")).write_text("not a network")
    with pytest.raises(Refusal, match="tail cannot be made ready for adapter"):
        fast.with_adapter(adapters["moving"])
    assert fast.with_adapter(adapters["none"]).adapter is not None


def test_what_is_foreseen_is_seen_as_the_adapter_sees_it(segmenter, adapters, scene):
    adapted, state = segmenter.with_adapter(adapters["moving"]), None
    encoded = segmenter.encode(scene)
    clicks = tuple(Click(x=x, y=y, positive=True) for x, y in ((490, 250), (488, 252), (492, 248), (494, 250)))
    for n in range(1, 4):
        state = adapted.step(encoded, Prompt(clicks=clicks[:n], granularity=Granularity(1)), state)
    ready = adapted.foresee(encoded, Prompt(clicks=clicks[:3], granularity=Granularity(1)), state)
    ahead = ready().ahead
    answered = adapted.step(encoded, Prompt(clicks=clicks, granularity=Granularity(1)), state)
    assert answered.look.focus == ahead.focus
    torch.testing.assert_close(answered.look.adapted, ahead.adapted, atol=0, rtol=0)


def test_threads_that_ask_several_adapters_at_once_get_what_they_get_alone(segmenter, adapters, scene, tmp_path):
    fast = load_segmenter("light", BUNDLED, device="cpu", encoder="fast", compiled=tmp_path)
    other = write_random_adapter(tmp_path / "other.safetensors", segmenter, seed=3, tail=0.05)
    alone = [fast.with_adapter(path) for path in (*adapters.values(), other)]
    together = [fast.with_adapter(path) for path in (*adapters.values(), other)]
    images = [fast.encode(scene[:, shift:]) for shift in (0, 8)]
    asked = [(n, image) for image in images for n in range(len(alone))]
    expected = [alone[n].step(image, AT_ONCE, None).logits for n, image in asked]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: together[one[0]].step(one[1], AT_ONCE, None).logits, 3 * asked))
    for ours, theirs in zip(found, 3 * expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_focus_is_seen_as_the_adapter_sees_it_and_counted_in_memory(segmenter, adapters, scene):
    encoded = segmenter.encode(scene)
    spots = ((490, 250), (488, 252), (492, 248), (494, 250))
    states = {}
    for name in ("none", "moving"):
        adapted, state = segmenter.with_adapter(adapters[name]), None
        for n in range(1, 5):
            clicks = tuple(Click(x=x, y=y, positive=True) for x, y in spots[:n])
            state = adapted.step(encoded, Prompt(clicks=clicks, granularity=Granularity(1)), state)
        assert isinstance(state, LadderState)
        states[name] = state
    looks = {name: state.look for name, state in states.items()}
    if any(look.embedding is None for look in looks.values()):
        pytest.fail(f"the scene no longer leads to a focus: {looks}")
    assert looks["none"].adapted is None
    own, theirs = looks["moving"].adapted, looks["moving"].embedding
    assert own is not None
    assert not torch.equal(own, theirs)
    assert states["moving"].nbytes == states["moving"].logits.nbytes + 2 * own.nbytes


def _drop(tensors):
    del tensors[f"lora.{ENCODER}.neck.0.lora_B.weight"]
    del tensors[f"lora.{ENCODER}.neck.0.lora_A.weight"]


def _widen(tensors):
    name = f"lora.{ENCODER}.merges.2.conv1.lora_A.weight"
    tensors[name] = torch.cat([tensors[name]] * 2, dim=1)


def _turn(tensors):
    """Swap what a layer reads and gives: as many numbers, and nonsense."""
    name = f"lora.{ENCODER}.neck.0.lora_"
    down, up = (tensors[f"{name}{side}.weight"] for side in "AB")
    tensors[f"{name}A.weight"] = up.reshape(4, -1).contiguous()
    tensors[f"{name}B.weight"] = down.reshape(-1, 4).contiguous()


def _rename(tensors):
    for name in [name for name in tensors if f".{ENCODER}." in name]:
        tensors[name.replace(ENCODER, "neck")] = tensors.pop(name)


def _spoil(tensors):
    tensors[f"lora.{ENCODER}.neck.0.lora_B.weight"][0, 0] = float("nan")


def _alone(tensors):
    del tensors[f"lora.{ENCODER}.neck.0.lora_B.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, "not of this encoder's tail: see neck.0; train it anew"),
        (_widen, "does not fit"),
        (_turn, "does not fit neck.0"),
        (_rename, "belongs to nothing"),
        (_spoil, "not finite"),
        (_alone, "does not fit"),
    ],
)
def test_an_adapter_that_does_not_fit_the_tail_is_refused(segmenter, adapters, tmp_path, change, said):
    path = changed(adapters["moving"], tmp_path / "changed.safetensors", change)
    with pytest.raises(Refusal, match=said):
        segmenter.with_adapter(path)
