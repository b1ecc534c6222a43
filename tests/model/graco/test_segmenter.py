"""The graco family as a segmenter: replay, focus, levels, phrases, adapters, what it refuses. A tiny real network."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from model.adapter import write_adapter
from model.geometry import Focus
from model.graco import weights
from model.graco.segmenter import GracoSegmenter, _sampled
from model.metrics import iou
from model.segmenter import digest_of_file, load_segmenter, predict
from model.types import Box, Click, Granularity, Prompt, Refusal
from tests.model.graco.synthetic import TINY, made_adapter, made_base

LEVEL = Granularity(4)


class Letters:
    """Stands for CLIP, which no machine here has: a vector by the phrase's letters."""

    def encode(self, phrases):
        return torch.stack(
            [torch.from_numpy(np.resize(np.frombuffer(p.encode(), np.uint8), 512) / 64.0) for p in phrases]
        ).float()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    published = made_base(TINY)
    published["head.conv_seg.bias"] = torch.zeros(1)
    base, adapter = folder / "weights.safetensors", folder / "cars.safetensors"
    weights.write_base(base, weights.ours(published), TINY)
    found = weights.adapter_from_published(made_adapter(TINY), TINY, digest_of_file(base))
    write_adapter(adapter, card=found.card, plain=found.plain, lora=found.lora, exact=True)
    return base, adapter


@pytest.fixture(scope="module")
def base(files):
    return load_segmenter("graco", files[0], device="cpu")


@pytest.fixture(scope="module")
def adapted(base, files):
    found = base.with_adapter(files[1])
    return GracoSegmenter(found._runtime, found._digest, found._size, Letters(), found._adapter)


@pytest.fixture(scope="module")
def encoded(base, scene):
    return base.encode(scene)


def clicks(*places):
    return tuple(Click(x=x, y=y, positive=positive) for x, y, positive in places)


THREE = clicks((200, 220, True), (480, 240, True), (30, 30, False))


def test_a_warm_memo_gives_the_answer_of_a_cold_one(adapted, encoded):
    memo = {}
    for n in (1, 2, 3):
        prompt = Prompt(clicks=THREE[:n], granularity=LEVEL)
        warm, cold = predict(adapted, encoded, prompt, memo=memo), predict(adapted, encoded, prompt)
        np.testing.assert_array_equal(warm.best.mask, cold.best.mask)
        assert warm.best.score == cold.best.score
    assert len(memo) == 3


def test_with_a_memo_each_further_click_is_one_pass_of_the_image_and_its_mirror_image(adapted, encoded, monkeypatch):
    passes = []
    run = adapted._runtime

    class Counting:
        name, architecture = run.name, run.architecture

        def __call__(self, image, *rest):
            passes.append(len(image))
            return run(image, *rest)

    monkeypatch.setattr(adapted, "_runtime", Counting())
    memo = {}
    for n in (1, 2, 3):
        predict(adapted, encoded, Prompt(clicks=THREE[:n], granularity=LEVEL), memo=memo)
    assert passes == [2, 2, 2]
    passes.clear()
    predict(adapted, encoded, Prompt(clicks=THREE[:1]), proposals=10)
    assert passes == [20, 2], "all levels in one pass, and what the base says; nothing beside, which takes seconds"


class Forgetful(dict):
    """A memo that others have filled since it was last asked: what it gave once is gone."""

    def get(self, prompt):
        return self.pop(prompt, None)


@pytest.mark.parametrize("memo", [{}, Forgetful()])
def test_all_levels_are_offered_again_from_a_memo_that_has_all_some_or_none_of_them(adapted, encoded, memo):
    prompt = Prompt(clicks=THREE[:1])
    memo[replace(prompt, granularity=LEVEL)] = adapted.step(encoded, replace(prompt, granularity=LEVEL), None)
    offers = [predict(adapted, encoded, prompt, memo=memo, proposals=10).proposals for _ in range(3)]
    for again in offers[1:]:
        for one, other in zip(offers[0], again, strict=True):
            assert iou(one.mask, other.mask) > 0.999


@pytest.mark.parametrize("size", [(1, 1), (2, 700), (120, 90), (448, 448), (900, 1300)])
def test_of_a_photo_the_pixels_that_the_network_needs_are_those_of_the_whole_one_resized(size):
    pixels = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (*size, 3), dtype=np.uint8))
    whole = F.interpolate(pixels.permute(2, 0, 1)[None].float() / 255, (448, 448), mode="bilinear", align_corners=True)
    torch.testing.assert_close(_sampled(pixels, 448), whole[0], rtol=0, atol=1e-6)


def test_a_state_holds_no_more_memory_than_it_says(adapted, encoded):
    first = [Prompt(clicks=THREE[:1], granularity=Granularity(level)) for level in range(1, 11)]
    for state in adapted.steps(encoded, first, [None] * 10):
        held = state.probability if state.probability.base is None else state.probability.base
        assert held.nbytes == state.nbytes == 4 * state.probability.size, "not the map of the whole pass"


def test_levels_of_one_pass_are_those_of_ten(adapted, encoded):
    first = [Prompt(clicks=THREE[:1], granularity=Granularity(level)) for level in range(1, 11)]
    together = adapted.steps(encoded, first, [None] * 10)
    for prompt, state in zip(first, together, strict=True):
        alone = adapted.step(encoded, prompt, None)
        np.testing.assert_allclose(state.probability, alone.probability, atol=1e-5)
    assert len({state.probability.tobytes() for state in together}) == 10, "each level has an answer of its own"


def test_one_click_offers_the_levels_that_differ_small_to_large(adapted, encoded):
    offered = predict(adapted, encoded, Prompt(clicks=THREE[:1]), proposals=10)
    areas = [int(p.mask.sum()) for p in offered.proposals]
    assert areas == sorted(areas)
    assert all(0 <= p.score <= 1 for p in offered.proposals)
    assert sum(p.granularity is None for p in offered.proposals) <= 1, "what the base says bears no level"
    assert len(predict(adapted, encoded, Prompt(clicks=THREE[:1]), proposals=2).proposals) <= 2


def test_without_level_and_phrase_the_base_answers_as_if_there_were_no_adapter(base, adapted, encoded):
    prompt = Prompt(clicks=THREE[:2])
    plain, steered = predict(base, encoded, prompt), predict(adapted, encoded, prompt)
    np.testing.assert_array_equal(plain.best.mask, steered.best.mask)
    assert (plain.adapter, steered.adapter) == (None, None)
    assert predict(adapted, encoded, replace(prompt, granularity=LEVEL)).adapter == adapted.adapter


def test_without_an_adapter_level_and_phrase_change_nothing(base, encoded):
    prompt = Prompt(clicks=THREE[:1])
    assert base.understood(replace(prompt, granularity=LEVEL, phrase="wheel")) == prompt


def test_a_phrase_has_its_own_branch_and_wins_over_a_level(adapted, encoded):
    prompt = Prompt(clicks=THREE[:1], phrase="wheel")
    assert adapted.understood(replace(prompt, granularity=LEVEL)) == prompt
    levels = adapted.probability(encoded, *_state(adapted, encoded, Prompt(clicks=THREE[:1], granularity=LEVEL)))
    wheel = adapted.probability(encoded, *_state(adapted, encoded, prompt))
    door = adapted.probability(encoded, *_state(adapted, encoded, replace(prompt, phrase="door")))
    assert not np.allclose(wheel, levels)
    assert not np.allclose(wheel, door)
    again = adapted.probability(encoded, *_state(adapted, encoded, Prompt(clicks=THREE[:1], granularity=LEVEL)))
    np.testing.assert_array_equal(levels, again, err_msg="a phrase leaves the branch of levels as it was")


def _state(segmenter, encoded, prompt):
    return prompt, segmenter.step(encoded, prompt, None)


def test_a_phrase_without_clip_is_refused_with_where_to_put_it(base, files, encoded):
    with pytest.raises(Refusal, match=r"CLIP ViT-B/32 is not at hand.*folder clip"):
        predict(base.with_adapter(files[1]), encoded, Prompt(clicks=THREE[:1], phrase="wheel"))


def test_a_box_is_refused_with_what_to_do(base, encoded):
    with pytest.raises(Refusal, match="not boxes: click the object"):
        predict(base, encoded, Prompt(box=Box(left=1, top=1, right=9, bottom=9)))


def test_threads_that_ask_for_different_branches_at_once_get_what_one_alone_gets(base, adapted, encoded):
    prompts = [Prompt(clicks=THREE[:1], granularity=Granularity(level)) for level in (1, 5, 10)]
    prompts += [Prompt(clicks=THREE[:1]), Prompt(clicks=THREE[:1], phrase="wheel")]
    alone = [predict(adapted, encoded, prompt).best.mask for prompt in prompts]
    with ThreadPoolExecutor(5) as pool:
        together = list(pool.map(lambda n: predict(adapted, encoded, prompts[n % 5]).best.mask, range(40)))
    for n, mask in enumerate(together):
        np.testing.assert_array_equal(mask, alone[n % 5])


def test_the_weights_are_never_written_into(files, adapted, encoded):
    before = {name: value.clone() for name, value in adapted._runtime._network.state_dict().items()}
    predict(adapted, encoded, Prompt(clicks=THREE, granularity=LEVEL))
    predict(adapted, encoded, Prompt(clicks=THREE, phrase="wheel"))
    for name, value in adapted._runtime._network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_compiled_network_gives_torchs_masks_for_base_levels_and_phrases(files, adapted, encoded, tmp_path):
    compiled = load_segmenter("graco", files[0], device="cpu", compiled=tmp_path).with_adapter(files[1])
    assert compiled.runtime == "openvino-fp32"
    for prompt in (Prompt(clicks=THREE), Prompt(clicks=THREE, granularity=LEVEL)):
        ours, theirs = (_last(one, encoded, prompt) for one in (adapted, compiled))
        assert np.abs(ours - theirs).max() < 1e-3
    fast = load_segmenter("graco", files[0], device="cpu", compiled=tmp_path, speed="fast").with_adapter(files[1])
    assert np.abs(_last(fast, encoded, prompt) - theirs).mean() < 0.05


def _last(segmenter, encoded, prompt):
    state = None
    for n in range(1, len(prompt.clicks) + 1):
        state = segmenter.step(encoded, replace(prompt, clicks=prompt.clicks[:n]), state)
    return segmenter.probability(encoded, prompt, state)


def test_another_input_size_is_taken_by_interpolation_and_one_that_fits_no_window_is_refused(files, scene):
    larger = load_segmenter("graco", files[0], device="cpu", size=448)
    encoded = larger.encode(scene)
    assert predict(larger, encoded, Prompt(clicks=THREE)).best.mask.shape == scene.shape[:2]
    with pytest.raises(Refusal, match="multiple of 224"):
        load_segmenter("graco", files[0], device="cpu", size=300)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (700, 2)])
def test_images_of_odd_sizes_and_clicks_on_their_rim_are_answered(adapted, size):
    height, width = size
    image = np.full((height, width, 3), 90, np.uint8)
    encoded = adapted.encode(image)
    corner = Prompt(clicks=clicks((0, 0, True), (width, height, True), (width - 0.5, 0, False)), granularity=LEVEL)
    assert predict(adapted, encoded, corner).best.mask.shape == size


def test_a_focus_keeps_its_last_row_outside_as_the_published_code_does():
    focus = Focus(10, 20, 0, 99)
    assert (focus.holds(19, 5), focus.holds(20, 5)) == (True, False)
    assert focus.overlap(Focus(10, 20, 0, 99)) == 1.0


def test_adapters_that_do_not_fit_are_refused_and_the_segmenter_goes_on(files, base, encoded, tmp_path):
    before = predict(base, encoded, Prompt(clicks=THREE[:1])).best.mask
    found = weights.adapter_from_published(made_adapter(TINY), TINY, "0" * 64)
    write_adapter(tmp_path / "other.safetensors", card=found.card, plain=found.plain, lora=found.lora)
    with pytest.raises(Refusal, match="base 000000000000"):
        base.with_adapter(tmp_path / "other.safetensors")
    card = found.card | {"base": base.digest}
    lame = {"level": {k: v for k, v in found.lora["level"].items() if "blocks.2" not in k}}
    write_adapter(tmp_path / "lame.safetensors", card=card, plain=found.plain, lora=lame)
    with pytest.raises(Refusal, match="does not fit the graco family"):
        base.with_adapter(tmp_path / "lame.safetensors")
    write_adapter(tmp_path / "wide.safetensors", card=card | {"rank": 16}, plain=found.plain, lora=found.lora)
    with pytest.raises(Refusal, match="rank 16"):
        base.with_adapter(tmp_path / "wide.safetensors")
    np.testing.assert_array_equal(predict(base, encoded, Prompt(clicks=THREE[:1])).best.mask, before)


def test_weights_that_are_damaged_or_of_another_network_are_refused(files, tmp_path):
    whole = files[0].read_bytes()
    (tmp_path / "cut").write_bytes(whole[:5000])
    with pytest.raises(Refusal, match="cannot be read"):
        load_segmenter("graco", tmp_path / "cut", device="cpu")
    tensors = load_file(files[0])
    tensors.pop("neck.down_4.0.weight")
    weights.write_base(tmp_path / "lame", tensors, TINY)
    with pytest.raises((Refusal, RuntimeError), match=r"neck\.down_4\.0\.weight"):
        load_segmenter("graco", tmp_path / "lame", device="cpu")
    save_file({"x": torch.zeros(1)}, tmp_path / "stranger")
    with pytest.raises(Refusal, match="cannot be read"):
        load_segmenter("graco", tmp_path / "stranger", device="cpu")
