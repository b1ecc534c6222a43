"""What a prompt gets: replay, levels, boxes, several proposals, refusals."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from model.adapter import read_adapter, write_adapter
from model.light.segmenter import LightSegmenter
from model.metrics import iou
from model.segmenter import Encoded, Segmenter, digest_of_file, predict
from model.types import MAX_PROPOSALS, Box, Click, Granularity, Prediction, Prompt, Proposal, Refusal
from tests.conftest import ROOT, WEIGHTS

ADAPTER = ROOT / "model" / "weights" / "light-granularity.safetensors"


@pytest.fixture(scope="module")
def encoded(segmenter, scene) -> Encoded:
    return segmenter.encode(scene)


@pytest.fixture(scope="module")
def name() -> str:
    """A name of the adapter's vocabulary."""
    return read_adapter(ADAPTER).card["vocabulary"][0]


def offers_of(ladder: Segmenter, encoded: Encoded, prompt: Prompt) -> tuple[Proposal, ...]:
    return tuple(ladder.base_offers(encoded, prompt, ladder.step(encoded, prompt, None)))


def on_disc(*more: Click) -> Prompt:
    return Prompt(clicks=(Click(x=200, y=220, positive=True), *more))


def disc() -> np.ndarray:
    y, x = np.mgrid[:480, :640]
    return (x + 0.5 - 200) ** 2 + (y + 0.5 - 220) ** 2 <= 100**2


def test_one_click_finds_the_thing_under_it(segmenter, encoded):
    best = predict(segmenter, encoded, on_disc()).best
    assert best.mask.dtype == bool
    assert best.mask.shape == (480, 640)
    assert iou(best.mask, disc()) > 0.9
    assert 0.5 < best.score <= 1


def test_a_box_finds_the_thing_inside_it(segmenter, encoded):
    box = Prompt(box=Box(left=90, top=110, right=310, bottom=330))
    assert iou(predict(segmenter, encoded, box).best.mask, disc()) > 0.9


def test_a_box_that_reaches_over_the_edge_is_clipped_and_one_outside_is_refused(segmenter, encoded):
    predict(segmenter, encoded, Prompt(box=Box(left=-50, top=-50, right=310, bottom=330)))
    with pytest.raises(Refusal, match="outside the image"):
        predict(segmenter, encoded, Prompt(box=Box(left=700, top=10, right=800, bottom=20)))


def test_clicks_after_a_box_refine_it(segmenter, encoded):
    both = Prompt(box=Box(left=90, top=90, right=570, bottom=410), clicks=(Click(x=490, y=200, positive=False),))
    mask = predict(segmenter, encoded, both).best.mask
    assert not mask[200, 490]


def test_a_negative_click_leaves_its_spot_out(segmenter, encoded):
    whole = predict(segmenter, encoded, on_disc(Click(x=490, y=200, positive=True))).best.mask
    assert whole[200, 490]
    less = on_disc(Click(x=490, y=200, positive=True), Click(x=490, y=330, positive=False))
    assert not predict(segmenter, encoded, less).best.mask[330, 490]


def test_a_warm_memo_gives_the_answer_of_a_cold_one(segmenter, encoded):
    clicks = (
        Click(x=200, y=220, positive=True),
        Click(x=490, y=200, positive=False),
        Click(x=150, y=200, positive=True),
    )
    memo: dict = {}
    for n in range(1, 4):
        for level in (None, Granularity(2), Granularity(9)):
            prompt = Prompt(clicks=clicks[:n], granularity=level)
            warm = predict(segmenter, encoded, prompt, memo=memo).best
            cold = predict(segmenter, encoded, prompt).best
            np.testing.assert_array_equal(warm.mask, cold.mask)
            assert warm.score == cold.score


def test_a_memo_makes_the_next_click_one_step(segmenter, encoded, monkeypatch):
    steps = []
    original = LightSegmenter.step
    monkeypatch.setattr(LightSegmenter, "step", lambda *a: steps.append(1) or original(*a))
    memo: dict = {}
    clicks = tuple(Click(x=150 + 20 * i, y=220, positive=True) for i in range(4))
    for n in range(1, 5):
        predict(segmenter, encoded, Prompt(clicks=clicks[:n]), memo=memo)
    assert len(steps) == 4
    predict(segmenter, encoded, Prompt(clicks=clicks[:1], granularity=Granularity(1)), memo=memo)
    assert len(steps) == 4, "after one click another level needs no decoder pass"


def test_a_higher_level_never_gives_a_smaller_mask_after_one_click(segmenter, encoded):
    for x, y in ((200, 220), (490, 300), (540, 250), (20, 20), (320, 470)):
        prompts = [
            Prompt(clicks=(Click(x=x, y=y, positive=True),), granularity=Granularity(level)) for level in range(1, 11)
        ]
        areas = [predict(segmenter, encoded, p).best.mask.sum() for p in prompts]
        # ranked at the decoder's resolution; at the image's a border pixel may fall either way
        assert all(b >= a * 0.99 for a, b in itertools.pairwise(areas)), areas
        assert areas[-1] > areas[0]


def test_without_a_level_one_click_can_offer_three_masks_best_first(segmenter, encoded):
    proposals = predict(segmenter, encoded, on_disc(), proposals=3).proposals
    assert len(proposals) == 3
    assert [p.score for p in proposals] == sorted((p.score for p in proposals), reverse=True)
    by_area = sorted(proposals, key=lambda p: p.mask.sum())
    assert [p.granularity.level for p in by_area] == [2, 5, 10]


def test_a_chosen_level_is_answered_with_one_mask_that_says_it(segmenter, encoded):
    prompt = Prompt(clicks=on_disc().clicks, granularity=Granularity(4))
    prediction = predict(segmenter, encoded, prompt, proposals=3)
    assert [p.granularity for p in prediction.proposals] == [Granularity(4)]


def test_a_prompt_that_names_nothing_is_refused(segmenter, encoded):
    with pytest.raises(Refusal, match="give a click or a box"):
        predict(segmenter, encoded, Prompt())
    with pytest.raises(Refusal, match="click the object first"):
        predict(segmenter, encoded, Prompt(clicks=(Click(x=1, y=1, positive=False),)))


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (1025, 7), (480, 640)])
def test_images_of_any_shape_are_answered_at_their_own_size(segmenter, size):
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    click = Prompt(clicks=(Click(x=size[1] / 2, y=size[0] / 2, positive=True),))
    assert predict(segmenter, segmenter.encode(image), click).best.mask.shape == size


def test_threads_asking_at_once_get_the_answers_they_get_alone(segmenter, scene):
    images = [segmenter.encode(np.roll(scene, shift, axis=1)) for shift in (0, 100)]
    asked = [(i, Prompt(clicks=(Click(x=60 + 50 * k, y=230, positive=True),))) for k in range(6) for i in (0, 1)]
    alone = [predict(segmenter, images[i], prompt).best.mask for i, prompt in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda a: predict(segmenter, images[a[0]], a[1]).best.mask, asked))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_version_is_known_before_the_model_is_loaded(segmenter):
    assert segmenter.version == f"light-{digest_of_file(WEIGHTS)[:8]}"


# --- with an adapter ---


def same(one, other) -> bool:
    pairs = zip(one.proposals, other.proposals, strict=True)
    return all(
        np.array_equal(a.mask, b.mask) and (a.score, a.granularity) == (b.score, b.granularity) for a, b in pairs
    )


def test_without_level_and_phrase_the_adapter_changes_nothing(segmenter, ladder, encoded):
    more = Click(x=490, y=200, positive=True), Click(x=490, y=330, positive=False)
    for prompt in (on_disc(), on_disc(*more), Prompt(box=Box(left=90, top=110, right=310, bottom=330))):
        with_adapter = predict(ladder, encoded, prompt)
        assert same(with_adapter, predict(segmenter, encoded, prompt))
        assert with_adapter.adapter is None


def test_a_level_is_answered_by_the_adapter_with_one_mask_that_says_it(ladder, encoded):
    for prompt in (on_disc(), on_disc(Click(x=490, y=200, positive=True))):
        asked = Prompt(clicks=prompt.clicks, granularity=Granularity(4))
        prediction = predict(ladder, encoded, asked, proposals=10)
        assert [p.granularity for p in prediction.proposals] == [Granularity(4)]
        assert prediction.adapter == ladder.adapter
        assert ladder.adapter.startswith("light-granularity-")


def test_all_levels_of_one_click_differ_and_go_from_small_to_large(segmenter, ladder, encoded):
    for x, y in ((200, 220), (490, 300), (540, 250)):
        prompt = Prompt(clicks=(Click(x=x, y=y, positive=True),))
        found = predict(ladder, encoded, prompt, proposals=MAX_PROPOSALS)
        areas = [p.mask.sum() for p in found.proposals]
        assert areas == sorted(areas)
        for one, other in itertools.combinations(found.proposals, 2):
            assert iou(one.mask, other.mask) < 0.9
        assert found.best.score == max(p.score for p in found.proposals)
        base = [p.mask for p in predict(segmenter, encoded, prompt, proposals=3).proposals]
        base += [p.mask for p in offers_of(ladder, encoded, prompt)]
        for p in found.proposals:
            if p.granularity is None:
                assert any(np.array_equal(p.mask, mask) for mask in base)
            else:
                asked = Prompt(clicks=prompt.clicks, granularity=p.granularity)
                assert np.array_equal(predict(ladder, encoded, asked).best.mask, p.mask)
        few = predict(ladder, encoded, prompt, proposals=2).proposals
        assert len(few) == min(2, len(areas))


def test_all_levels_leave_out_no_mask_of_the_base_and_put_none_in_the_place_of_a_levels(segmenter, ladder, encoded):
    for x, y in ((200, 220), (490, 300), (540, 250), (20, 20), (600, 460)):
        prompt = Prompt(clicks=(Click(x=x, y=y, positive=True),))
        found = predict(ladder, encoded, prompt, proposals=MAX_PROPOSALS).proposals
        for mask in (p.mask for p in predict(segmenter, encoded, prompt, proposals=3).proposals if p.mask.any()):
            assert max(iou(mask, p.mask) for p in found) > 0.84
        levels = [p.granularity.level for p in found if p.granularity is not None]
        assert levels == sorted(set(levels))
        for level in range(1, 11):
            mask = predict(ladder, encoded, Prompt(clicks=prompt.clicks, granularity=Granularity(level))).best.mask
            assert max(iou(mask, p.mask) for p in found if p.granularity is not None) > 0.8


def test_no_level_of_a_first_pass_is_smaller_than_the_one_before(ladder, encoded):
    for x, y in ((200, 220), (490, 300), (540, 250), (20, 20), (320, 400)):
        clicks = (Click(x=x, y=y, positive=True),)
        areas = [
            int(predict(ladder, encoded, prompt, refined=False).best.mask.sum())
            for prompt in (Prompt(clicks=clicks, granularity=Granularity(level)) for level in range(1, 11))
        ]
        assert all(after >= 0.99 * before for before, after in itertools.pairwise(areas)), areas


CORNERS = ((0, 0), (639.9, 479.9))


@pytest.mark.parametrize("place", [(200, 220), (490, 300), *CORNERS])
def test_the_base_offers_what_it_finds_at_a_click_and_of_what_it_finds_around_what_holds_it(
    segmenter, ladder, encoded, place
):
    x, y = place
    prompt = Prompt(clicks=(Click(x=x, y=y, positive=True),))
    found = offers_of(ladder, encoded, prompt)
    assert all(p.granularity is None and p.mask.shape == (encoded.height, encoded.width) for p in found)
    here, around = found[:3], found[3:]
    for p, own in zip(here, predict(segmenter, encoded, prompt, proposals=3).proposals, strict=True):
        assert np.array_equal(p.mask, own.mask)
        assert p.score == pytest.approx(0.82 * own.score - 0.22), "the base thinks too well of its masks"
    assert [p.score for p in around] == sorted((p.score for p in around), reverse=True)
    assert around or place in CORNERS
    for one, other in itertools.combinations(around, 2):
        assert iou(one.mask, other.mask) < 0.9
    near = np.zeros((encoded.height, encoded.width), bool)
    near[max(0, int(y) - 2) : int(y) + 3, max(0, int(x) - 2) : int(x) + 3] = True
    assert all(p.mask[int(y), int(x)] for p in around)
    answers = []
    for turn in np.arange(8) * np.pi / 4:
        beside_x, beside_y = x + 0.04 * encoded.width * np.cos(turn), y + 0.04 * encoded.width * np.sin(turn)
        at = Click(
            x=min(max(beside_x, 0.5), encoded.width - 0.5),
            y=min(max(beside_y, 0.5), encoded.height - 0.5),
            positive=True,
        )
        beside = Prompt(clicks=(at,))
        state = segmenter._base_step(encoded, beside, None, padded=False)
        answers += [p.mask for p in segmenter.render(encoded, beside, state, proposals=3).proposals]
    for p in around:
        assert any(np.array_equal(p.mask, mask) for mask in answers)
    for mask in answers:
        if (mask & near).sum() == near.sum():
            assert max(iou(mask, p.mask) for p in around) > 0.8


def test_around_a_box_the_base_is_not_asked(segmenter, ladder, encoded):
    box = Prompt(box=Box(left=100, top=120, right=300, bottom=320))
    (one,) = offers_of(ladder, encoded, box)
    own = predict(segmenter, encoded, box).best
    assert np.array_equal(one.mask, own.mask)
    assert one.score == own.score


def passes(patch: pytest.MonkeyPatch) -> list[Prompt]:
    """Return a list that grows by what is asked with every pass of the ladder or the base."""
    asked: list[Prompt] = []

    def note(name: str) -> None:
        original = getattr(LightSegmenter, name)

        def noted(*args, **chosen):
            asked.append(next(arg for arg in args if isinstance(arg, Prompt)))
            return original(*args, **chosen)

        patch.setattr(LightSegmenter, name, noted)

    note("_climb")
    note("_base_step")
    return asked


def test_one_step_answers_every_level_of_the_first_click_and_one_more_and_eight_beside_what_the_base_offers(
    ladder, encoded, monkeypatch
):
    steps = passes(monkeypatch)
    memo: dict = {}
    for level in range(1, 11):
        predict(ladder, encoded, Prompt(clicks=on_disc().clicks, granularity=Granularity(level)), memo=memo)
    assert len(steps) == 1
    predict(ladder, encoded, on_disc(), memo=memo, proposals=10)
    assert len(steps) == 1 + 1 + 8
    assert len(memo) == 2 + 10, "what was asked beside is nobody's earlier click"


def test_the_base_is_asked_only_where_the_levels_leave_room_and_nowhere_twice(ladder, encoded, monkeypatch):
    steps = passes(monkeypatch)
    assert len(predict(ladder, encoded, on_disc(), proposals=2).proposals) == 2
    assert len(steps) == 1, "two levels that differ are enough"
    steps.clear()
    predict(ladder, encoded, Prompt(clicks=(Click(x=0, y=0, positive=True),)), proposals=MAX_PROPOSALS)
    assert len(steps) == len(set(steps)) == 2 + 6, "at a corner three of the eight places are one"


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (7, 1600), (20, 20), (1700, 1300)])
def test_photos_of_any_shape_have_all_levels_small_to_large(ladder, size):
    height, width = size
    encoded = ladder.encode(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
    for x, y in ((width / 2, height / 2), (0, 0), (width - 0.01, height - 0.01)):
        prompt = Prompt(clicks=(Click(x=x, y=y, positive=True),))
        found = predict(ladder, encoded, prompt, proposals=MAX_PROPOSALS).proposals
        assert 1 <= len(found) <= MAX_PROPOSALS
        assert all(p.mask.shape == (height, width) and 0 <= p.score <= 1 for p in found)
        areas = [int(p.mask.sum()) for p in found]
        assert areas == sorted(areas)


def test_eight_threads_are_offered_what_one_is(ladder, encoded):
    prompts = [Prompt(clicks=(Click(x=60 * n + 80, y=200 + 10 * n, positive=True),)) for n in range(8)]

    def asked(prompt: Prompt) -> Prediction:
        return predict(ladder, encoded, prompt, proposals=MAX_PROPOSALS)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(asked, prompts))
    for one, other in zip(together, map(asked, prompts), strict=True):
        assert same(one, other)


def test_a_warm_memo_gives_the_answer_of_a_cold_one_with_levels_and_phrases(ladder, encoded, name):
    clicks = on_disc(Click(x=490, y=200, positive=False), Click(x=150, y=200, positive=True)).clicks
    memo: dict = {}
    for n, level, phrase in itertools.product((1, 2, 3), (None, Granularity(2), Granularity(9)), (None, name)):
        prompt = Prompt(clicks=clicks[:n], granularity=level, phrase=phrase)
        for proposals in (1, 10):
            warm = predict(ladder, encoded, prompt, memo=memo, proposals=proposals)
            assert same(warm, predict(ladder, encoded, prompt, proposals=proposals))


def test_a_known_phrase_is_obeyed_however_it_is_written_and_an_unknown_one_is_as_none(ladder, encoded, name):
    clicks = on_disc().clicks
    known = predict(ladder, encoded, Prompt(clicks=clicks, phrase=name))
    assert known.adapter == ladder.adapter
    assert same(predict(ladder, encoded, Prompt(clicks=clicks, phrase=f" The {name.upper()}!"), proposals=10), known)
    assert ladder.understood(Prompt(clicks=clicks, phrase=f"the {name}")).phrase == name
    for phrase in ("blorb zzyx", "колесо", "..."):
        for level in (None, Granularity(3)):
            asked = Prompt(clicks=clicks, phrase=phrase, granularity=level)
            plain = Prompt(clicks=clicks, granularity=level)
            for proposals in (1, 10):
                answer = predict(ladder, encoded, asked, proposals=proposals)
                assert same(answer, predict(ladder, encoded, plain, proposals=proposals))


def test_without_an_adapter_a_phrase_has_no_effect(segmenter, encoded, name):
    asked = Prompt(clicks=on_disc().clicks, phrase=name)
    assert same(predict(segmenter, encoded, asked), predict(segmenter, encoded, on_disc()))


def test_threads_with_and_without_level_and_phrase_do_not_mix(ladder, encoded, name):
    asked = [
        Prompt(clicks=(Click(x=60 + 90 * k, y=230, positive=True),), granularity=level, phrase=phrase)
        for k in range(3)
        for level in (None, Granularity(2), Granularity(10))
        for phrase in (None, name)
    ]
    alone = [predict(ladder, encoded, prompt) for prompt in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: predict(ladder, encoded, prompt), asked))
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))


def test_an_adapter_that_is_damaged_or_fits_another_base_is_refused_by_name(segmenter, tmp_path):
    path, file = tmp_path / "mine.safetensors", read_adapter(ADAPTER)
    with pytest.raises(Refusal, match=r"mine\.safetensors cannot be read"):
        segmenter.with_adapter(path)
    path.write_bytes(ADAPTER.read_bytes()[:5000])
    with pytest.raises(Refusal, match=r"mine\.safetensors cannot be read"):
        segmenter.with_adapter(path)
    write_adapter(path, card=file.card | {"base": "0123456789abcdef"}, plain=file.plain, lora=file.lora)
    with pytest.raises(Refusal, match="use that base"):
        segmenter.with_adapter(path)
    for plain in (
        {**file.plain, "levels.weight": file.plain["levels.weight"][:3]},
        {**file.plain, "more": 0 * file.plain["levels.weight"]},
    ):
        write_adapter(path, card=file.card, plain=plain, lora=file.lora)
        with pytest.raises(Refusal):
            segmenter.with_adapter(path)
