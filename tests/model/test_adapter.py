"""Adapter files, LoRA branches, and what a segmenter answers with an adapter whose values are random."""

import copy
import itertools
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.adapter import attach, load_lora, lora_state, read_adapter, switch_on, write_adapter
from model.light.adapter import LEVEL, PART, PHRASE, LadderAdapter
from model.light.network import CHANNELS, TwoWayTransformer
from model.light.segmenter import LightSegmenter
from model.metrics import iou
from model.segmenter import predict, probability
from model.text import Vocabulary, load_phrase_encoder
from model.types import Box, Click, Granularity, Prompt, Refusal
from tests.model.random_adapter import NAMES, write_random_adapter

CARD = {"base": "0123456789abcdef", "rank": 4, "alpha": 8, "note": "drawn"}
PLAIN = {"levels.weight": torch.arange(6.0).reshape(2, 3)}
LORA = {"level": {"q_proj.lora_A.weight": torch.ones(4, 3), "q_proj.lora_B.weight": torch.full((5, 4), 0.5)}}

# --- the file ---


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.safetensors"
    write_adapter(path, card=CARD, plain=PLAIN, lora=LORA)
    return path


def test_a_file_that_cannot_be_written_is_an_error_of_the_system_as_everywhere(tmp_path):
    (tmp_path / ".mine.safetensors.draft").mkdir()  # in the way
    with pytest.raises(OSError, match=f"{tmp_path} cannot be written to"):
        write_adapter(tmp_path / "mine.safetensors", card=CARD, plain=PLAIN, lora=LORA)
    assert not (tmp_path / "mine.safetensors").exists()


def rewrite(path, *, card, tensors=None):
    """Write an adapter file anew with another card, and other tensors (None: as they are)."""
    save_file(load_file(path) if tensors is None else tensors, path, {"card": json.dumps(card)})


WHOLE = CARD | {"format": 1, "branches": ["level"]}


def test_an_adapter_file_is_read_as_it_was_written_and_no_draft_stays(file):
    found = read_adapter(file, base=CARD["base"])
    assert found.card == WHOLE
    assert torch.equal(found.plain["levels.weight"], PLAIN["levels.weight"])
    assert found.lora.keys() == LORA.keys()
    for name, value in LORA["level"].items():
        assert torch.equal(found.lora["level"][name], value)
    torch.testing.assert_close(found.deltas(["level"]), {"q_proj.weight": torch.full((5, 3), 4.0)})
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_half_precision_is_read_as_fp32(file):
    write_adapter(file, card=CARD, plain={"levels.weight": PLAIN["levels.weight"].half()}, lora=LORA)
    assert read_adapter(file).plain["levels.weight"].dtype == torch.float32


def test_a_missing_or_damaged_file_is_refused_by_name(file):
    whole = file.read_bytes()
    for content in (whole[:-7], whole[:60], b"", b"not an adapter at all"):
        file.write_bytes(content)
        with pytest.raises(Refusal, match=r"mine\.safetensors cannot be read .* restore or train it anew"):
            read_adapter(file)
    file.unlink()
    with pytest.raises(Refusal, match=r"mine\.safetensors cannot be read"):
        read_adapter(file)
    file.mkdir()
    with pytest.raises(Refusal, match=r"mine\.safetensors cannot be read"):
        read_adapter(file)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_and_never_unpickled(file, tmp_path):
    canary = tmp_path / "unpickled"
    file.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(Refusal, match="cannot be read"):
        read_adapter(file)
    torch.save(Canary(canary), file)
    with pytest.raises(Refusal, match="cannot be read"):
        read_adapter(file)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary))).close()
    assert canary.exists(), "the canary would have sung"


def test_an_adapter_of_another_base_is_refused_and_both_are_named(file):
    with pytest.raises(Refusal, match="trained on base 0123456789ab, but base fedcba987654 is loaded; use that base"):
        read_adapter(file, base="fedcba9876543210")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(file, value):
    write_adapter(file, card=CARD, plain={"levels.weight": torch.tensor([1.0, value])}, lora=LORA)
    with pytest.raises(Refusal, match=r"not finite in plain\.levels\.weight; train it anew"):
        read_adapter(file)


@pytest.mark.parametrize("name", ["stray", "lora.phrase.q_proj.lora_A.weight", "bias.levels.weight"])
def test_a_tensor_that_belongs_to_nothing_is_refused(file, name):
    rewrite(file, card=WHOLE, tensors=load_file(file) | {name: torch.zeros(2)})
    with pytest.raises(Refusal, match=f"{name}, which belongs to nothing"):
        read_adapter(file)


def test_a_file_without_card_or_with_one_that_says_too_little_is_refused(file):
    save_file(load_file(file), file)
    with pytest.raises(Refusal, match="cannot be read"):
        read_adapter(file)
    for lacking in ("base", "rank", "alpha", "format", "branches"):
        rewrite(file, card={key: value for key, value in WHOLE.items() if key != lacking})
        with pytest.raises(Refusal, match="cannot be read"):
            read_adapter(file)


@pytest.mark.parametrize("change", [{"rank": 0}, {"rank": "4"}, {"branches": 3}, {"branches": [[1]]}])
def test_a_card_that_makes_no_sense_is_refused(file, change):
    rewrite(file, card=WHOLE | change)
    with pytest.raises(Refusal, match="cannot be read"):
        read_adapter(file)


def test_a_later_format_is_refused_and_both_are_named(file):
    rewrite(file, card=WHOLE | {"format": 3})
    with pytest.raises(Refusal, match="has format 3; this version reads formats 1 and 2"):
        read_adapter(file)


# --- branches, in training and summed in ---


@pytest.fixture
def transformer():
    torch.manual_seed(3)
    return TwoWayTransformer().eval()


def answer(network):
    draw = torch.Generator().manual_seed(5)
    image, position, tokens = (torch.randn(1, n, CHANNELS, generator=draw) for n in (12, 12, 4))
    with torch.no_grad():
        return torch.cat([part.flatten() for part in network(image, position, tokens)])


def attach_random(network, branch):
    attach(network, branch, rank=4, alpha=8)
    load_lora(network, branch, {n: 0.1 * torch.randn_like(v) for n, v in lora_state(network, branch).items()})


def test_sums_at_loading_compute_what_lora_computes_beside_the_weights(transformer, tmp_path):
    base = copy.deepcopy(transformer)
    attach_random(transformer, "level")
    one = answer(transformer)
    attach_random(transformer, "phrase")
    path = tmp_path / "two.safetensors"
    lora = {branch: lora_state(transformer, branch) for branch in ("level", "phrase")}
    write_adapter(path, card=CARD, plain={}, lora=lora)

    def merged(*branches):
        network = copy.deepcopy(base)
        weights = dict(network.named_parameters())
        with torch.no_grad():
            for name, delta in read_adapter(path).deltas(branches).items():
                weights[name].add_(delta)
        return answer(network)

    for branches in (["level"], ["phrase"], ["level", "phrase"]):
        switch_on(transformer, branches)
        torch.testing.assert_close(answer(transformer), merged(*branches), atol=1e-5, rtol=0)
    switch_on(transformer, ["level"])
    assert torch.equal(answer(transformer), one)
    assert (merged("level", "phrase") - merged("level")).abs().max() > 1e-3
    switch_on(transformer, [])
    assert torch.equal(answer(transformer), answer(base))


def test_a_new_branch_changes_no_answer_until_it_is_trained(transformer):
    before = answer(transformer)
    attach(transformer, "level", rank=4, alpha=8)
    assert torch.equal(answer(transformer), before)


def test_only_q_and_v_get_lora_and_a_second_branch_leaves_all_else_frozen(transformer):
    def trained():
        return {name for name, p in transformer.named_parameters() if p.requires_grad}

    attach(transformer, "level", rank=4, alpha=8)
    assert trained()
    assert all("lora_" in name and ".level." in name for name in trained())
    assert {name.split(".lora_")[0].rsplit(".")[-1] for name in trained()} == {"q_proj", "v_proj"}
    attach(transformer, "phrase", rank=4, alpha=8)
    assert trained()
    assert all("lora_" in name and ".phrase." in name for name in trained())


def test_switching_branches_freezes_and_thaws_nothing(transformer):
    for branch in ("level", "phrase"):
        attach(transformer, branch, rank=4, alpha=8)
    before = [p.requires_grad for p in transformer.parameters()]
    for branches in (["level"], [], ["level", "phrase"]):
        switch_on(transformer, branches)
        assert [p.requires_grad for p in transformer.parameters()] == before


def test_matrices_of_another_network_are_refused(transformer):
    attach(transformer, "level", rank=4, alpha=8)
    state = lora_state(transformer, "level")
    with pytest.raises(Refusal, match="do not fit the branch 'level'"):
        load_lora(transformer, "level", dict(list(state.items())[1:]))
    with pytest.raises(Refusal, match="do not fit the branch 'level'"):
        load_lora(transformer, "level", state | {"elsewhere.lora_A.weight": torch.zeros(4, 3)})


# --- a segmenter with an adapter of random values, on a strip: few cells, so quick ---


@pytest.fixture(scope="module")
def adapter(segmenter, tmp_path_factory):
    return write_random_adapter(tmp_path_factory.mktemp("adapters") / "random.safetensors", segmenter)


@pytest.fixture(scope="module")
def adapted(segmenter, adapter):
    return segmenter.with_adapter(adapter)


@pytest.fixture(scope="module")
def strip(segmenter, scene):
    """The middle of the scene, 640 x 160, encoded: a piece of the disc, and of the door with its handle."""
    return segmenter.encode(np.ascontiguousarray(scene[170:330]))


def at(x, y, *more, **rest):
    return Prompt(clicks=(Click(x=x, y=y, positive=True), *more), **rest)


def same(one, other):
    assert one.adapter == other.adapter
    assert len(one.proposals) == len(other.proposals)
    for a, b in zip(one.proposals, other.proposals, strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)
        assert (a.score, a.granularity) == (b.score, b.granularity)


MORE = Click(x=490, y=30, positive=False), Click(x=150, y=60, positive=True)
BOX = Box(left=110, top=5, right=290, bottom=140)


@pytest.mark.parametrize(
    "prompt",
    [at(200, 50), at(200, 50, *MORE), Prompt(box=BOX), Prompt(box=BOX, clicks=MORE[:1])],
    ids=["one click", "three clicks", "box", "box and click"],
)
def test_whatever_the_adapter_holds_a_prompt_without_level_and_phrase_is_the_bases(segmenter, adapted, strip, prompt):
    same(predict(adapted, strip, prompt), predict(segmenter, strip, prompt))
    np.testing.assert_array_equal(probability(adapted, strip, prompt), probability(segmenter, strip, prompt))


def test_threads_that_ask_base_level_phrase_and_both_at_once_get_what_they_get_alone(adapted, strip):
    asked = [
        at(x, 60, granularity=level, phrase=phrase)
        for x in (200, 490)
        for level in (None, Granularity(2), Granularity(9))
        for phrase in (None, *NAMES[:2])
    ]
    alone = [predict(adapted, strip, prompt) for prompt in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: predict(adapted, strip, prompt), asked))
    for one, other in zip(alone, together, strict=True):
        same(one, other)
    masks = {one.best.mask.tobytes() for one in alone[:9]}
    assert len(masks) > 4, "the questions differ, and so do the answers"


@pytest.mark.parametrize("phrase", ["blorb zzyx", "колесо", "!?", ""])
def test_a_phrase_the_adapter_does_not_know_is_as_no_phrase(adapted, strip, phrase):
    for level, proposals in itertools.product((None, Granularity(3)), (1, 10)):
        asked = predict(adapted, strip, at(200, 50, granularity=level, phrase=phrase), proposals=proposals)
        same(asked, predict(adapted, strip, at(200, 50, granularity=level), proposals=proposals))


def test_another_level_after_one_click_needs_no_further_pass_and_after_two_it_does(adapted, strip, monkeypatch):
    steps = []
    original = LightSegmenter.step
    monkeypatch.setattr(LightSegmenter, "step", lambda *a: steps.append(1) or original(*a))
    memo = {}
    for phrase, passes in ((None, 1), (NAMES[0], 2)):
        for level in (1, 5, 10):
            predict(adapted, strip, at(200, 50, granularity=Granularity(level), phrase=phrase), memo=memo)
        assert len(steps) == passes
    predict(adapted, strip, at(200, 50, MORE[0], granularity=Granularity(5)), memo=memo)
    predict(adapted, strip, at(200, 50, MORE[0], granularity=Granularity(6)), memo=memo)
    assert len(steps) == 4


def test_the_ladder_of_one_click_has_no_doubles_goes_from_small_to_large_and_says_levels_and_scores(adapted, strip):
    for x in (200, 490, 540):
        found = predict(adapted, strip, at(x, 80), proposals=10)
        assert found.adapter == adapted.adapter
        levels = [p.granularity.level for p in found.proposals if p.granularity is not None]
        assert levels == sorted(set(levels))
        areas = [int(p.mask.sum()) for p in found.proposals]
        assert all(b >= 0.99 * a for a, b in itertools.pairwise(areas)), areas  # ranked at the decoder's resolution
        for one, other in itertools.combinations(found.proposals, 2):
            assert iou(one.mask, other.mask) <= 0.86  # 0.85 at the decoder's resolution
        assert all(0 <= p.score <= 1 for p in found.proposals)
        assert found.best.score == max(p.score for p in found.proposals)
        for p in found.proposals:
            if p.granularity is not None:
                np.testing.assert_array_equal(
                    predict(adapted, strip, at(x, 80, granularity=p.granularity)).best.mask, p.mask
                )


def test_a_phrase_with_a_level_is_answered_with_the_levels_mask_and_alone_with_its_own(adapted, strip):
    for level in (None, Granularity(4)):
        found = predict(adapted, strip, at(490, 80, granularity=level, phrase="door"), proposals=10)
        assert [p.granularity for p in found.proposals] == [level]
        assert found.adapter == adapted.adapter


def test_loading_an_adapter_leaves_the_segmenter_it_is_loaded_beside_as_it_was(segmenter, adapter, strip):
    prompt = at(200, 50, granularity=Granularity(8))
    before, weights = predict(segmenter, strip, prompt), copy.deepcopy(segmenter.mask_decoder.state_dict())
    adapted = segmenter.with_adapter(adapter)
    assert segmenter.adapter is None
    same(predict(segmenter, strip, prompt), before)
    back = adapted.with_adapter(None)
    assert back.adapter is None
    assert adapted.adapter.startswith("random-")
    same(predict(back, strip, prompt), before)
    for name, value in segmenter.mask_decoder.state_dict().items():
        assert torch.equal(value, weights[name])


def test_two_adapters_on_one_base_answer_for_themselves(segmenter, adapted, strip, tmp_path):
    other = segmenter.with_adapter(write_random_adapter(tmp_path / "random.safetensors", segmenter, seed=1))
    assert other.adapter != adapted.adapter
    prompt = at(490, 80, granularity=Granularity(6), phrase="door")
    first, second = predict(adapted, strip, prompt), predict(other, strip, prompt)
    same(predict(adapted, strip, prompt), first)
    assert (first.adapter, second.adapter) == (adapted.adapter, other.adapter)
    assert first.best.score != second.best.score


def test_the_probability_is_over_a_half_exactly_where_the_mask_is(adapted, strip):
    for prompt in (
        at(490, 80),
        at(490, 80, granularity=Granularity(7)),
        at(490, 80, phrase="handle"),
        at(490, 80, MORE[1], granularity=Granularity(2), phrase="door"),
    ):
        mask = predict(adapted, strip, prompt).best.mask
        found = probability(adapted, strip, prompt)
        assert (found.shape, found.dtype) == (mask.shape, np.float32)
        np.testing.assert_array_equal(found > 0.5, mask)


def test_a_word_for_a_part_asks_for_a_level_but_words_before_a_known_name_leave_it_that_name(adapted):
    known = Vocabulary(["traffic light", "top", "heels", "bus", "car", "jacket"], load_phrase_encoder())
    adapter = LadderAdapter("drawn", adapted._adapter.level, None, known)
    for phrase, name in (("red traffic light", "traffic light"), ("tank top", "top"), ("high heel", "heels")):
        assert adapter.understood(at(1, 1, phrase=phrase)) == at(1, 1, phrase=name)
    for phrase in ("wheel", "street light", "wheel of the bus", "door of the car", "zipper of jacket"):
        assert adapter.understood(at(1, 1, phrase=phrase)) == at(1, 1, granularity=PART)
        own = at(1, 1, granularity=Granularity(7))
        assert adapter.understood(at(1, 1, phrase=phrase, granularity=own.granularity)) == own


def test_an_adapter_for_levels_alone_knows_no_phrase(segmenter, adapter, adapted, strip, tmp_path):
    file = read_adapter(adapter)
    path = tmp_path / "levels.safetensors"
    write_adapter(path, card=file.card, plain=file.plain, lora={LEVEL: file.lora[LEVEL]})
    levels = segmenter.with_adapter(path)
    assert levels.understood(at(1, 1, phrase="door")).phrase is None
    prompt = at(490, 80, granularity=Granularity(6))
    np.testing.assert_array_equal(predict(levels, strip, prompt).best.mask, predict(adapted, strip, prompt).best.mask)


@pytest.mark.parametrize("name", ["levels.weight", "heads.1.layers.0.bias", "phrase_token.weight", "score_head"])
def test_an_adapter_that_lacks_a_tensor_or_holds_another_networks_is_refused(segmenter, adapter, tmp_path, name):
    file = read_adapter(adapter)
    path = tmp_path / "part.safetensors"
    fewer = {key: value for key, value in file.plain.items() if not key.startswith(name)}
    write_adapter(path, card=file.card, plain=fewer, lora=file.lora)
    with pytest.raises(Refusal, match=f"lacks {name}"):
        segmenter.with_adapter(path)
    write_adapter(path, card=file.card, plain=file.plain | {f"other.{name}": torch.zeros(2)}, lora=file.lora)
    with pytest.raises(Refusal, match=f"other.{name}"):
        segmenter.with_adapter(path)
    matrices = {key.replace("layers.0", "layers.7"): value for key, value in file.lora[PHRASE].items()}
    write_adapter(path, card=file.card, plain=file.plain, lora=file.lora | {PHRASE: matrices})
    with pytest.raises(Refusal, match="does not fit the light family"):
        segmenter.with_adapter(path)
