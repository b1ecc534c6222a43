"""The decoder that answers all ten levels in one pass."""

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression

from model.adapter import read_adapter, write_adapter
from model.geometry import Fit
from model.light.adapter import load_ladder
from model.light.encoder import TorchEncoder
from model.light.ladder import (
    LOGITS_PER_CELL,
    LadderDecoder,
    _between,
    at_place,
    cells,
    fill_square,
    growing,
    place_of,
)
from model.light.network import CHANNELS, GRID, POINT_PADDING, POINT_POSITIVE, SIDE
from model.segmenter import BUNDLED, BUNDLED_ADAPTER
from model.types import LEVELS, Prompt

WIDTH = 5  # of a phrase's vector


@pytest.fixture(scope="module")
def decoder(segmenter) -> LadderDecoder:
    torch.manual_seed(0)
    return LadderDecoder(segmenter.mask_decoder, WIDTH).eval().requires_grad_(False)


def ask(decoder, segmenter, embedding, *spots, phrase=None):
    """Return the ladder of one click at each spot (pixels of the square) on an embedding of the photo's cells."""
    rows, columns = embedding.shape[-2:]
    xy = torch.tensor([[spot, (0.0, 0.0)] for spot in spots])
    points = segmenter.prompt_encoder.points(xy, torch.tensor([[POINT_POSITIVE, POINT_PADDING]] * len(spots)))
    image = (embedding + segmenter.prompt_encoder.dense(None)).expand(len(spots), -1, -1, -1)
    position = segmenter.prompt_encoder.grid_position()[..., :rows, :columns]
    return decoder(image, position, points, None if phrase is None else phrase.expand(len(spots), -1))


def test_an_untrained_ladder_grows_from_the_smallest_of_the_bases_masks_to_the_largest(decoder, segmenter, scene):
    fit = Fit(*scene.shape[:2], SIDE)
    rows, columns = cells(*fit.resized)
    embedding = segmenter.encode(scene).tensors["embedding"].float()[..., :rows, :columns]
    spots = [tuple(fit.to_square(np.array(spot, float)).tolist()) for spot in ((200, 220), (490, 300), (540, 250))]
    ladder = ask(decoder, segmenter, embedding, *spots)
    assert ladder.logits.shape == (3, LEVELS, rows * LOGITS_PER_CELL, columns * LOGITS_PER_CELL)
    assert ladder.scores.shape == (3, LEVELS)
    areas = (ladder.logits > 0).sum((-1, -2)).tolist()
    for one in areas:
        assert one[-1] > one[0] > 0
    steps = [b >= 0.99 * a for one in areas for a, b in itertools.pairwise(one)]
    assert np.mean(steps) >= 0.9, areas


def test_an_untrained_ladder_has_the_bases_masks_at_its_ends_and_in_its_middle_when_asked_the_same(segmenter):
    decoder = LadderDecoder(segmenter.mask_decoder, WIDTH)
    tokens = segmenter.mask_decoder.mask_tokens.weight[1:]
    levels = decoder.levels.weight.detach()
    torch.testing.assert_close(levels[0], tokens[0])
    torch.testing.assert_close((levels[4] + levels[5]) / 2, (8 * tokens[1] + tokens[0] / 2 + tokens[2] / 2) / 9)
    torch.testing.assert_close(levels[9], tokens[2])


@pytest.mark.parametrize("size", [(48, 480), (480, 48), (100, 300), (9, 2000), (2000, 9), (77, 77)])
def test_the_cells_of_a_photo_of_any_shape_give_its_logits_and_the_square_repeats_their_border(
    decoder, segmenter, size
):
    rows, columns = cells(*Fit(*size, SIDE).resized)
    assert max(rows, columns) == GRID
    few = torch.randn(1, CHANNELS, min(rows, 7), min(columns, 9), generator=torch.Generator().manual_seed(1))
    logits = ask(decoder, segmenter, few, (8.0, 8.0)).logits
    assert logits.shape == (1, LEVELS, LOGITS_PER_CELL * few.shape[2], LOGITS_PER_CELL * few.shape[3])
    square = fill_square(logits)
    assert square.shape == (1, LEVELS, GRID * LOGITS_PER_CELL, GRID * LOGITS_PER_CELL)
    height, width = logits.shape[-2:]
    assert torch.equal(square[..., :height, :width], logits)
    assert (square[..., :height, width:] == logits[..., -1:]).all()
    assert (square[..., height:, :width] == logits[..., -1:, :]).all()


def test_a_ladder_that_shrinks_somewhere_becomes_the_nearest_that_falls_nowhere_and_others_stay():
    drawn = torch.Generator().manual_seed(3)
    shrinking = torch.randn(LEVELS, 5, 6, generator=drawn)
    steady = torch.randn(5, 6, generator=drawn) + torch.arange(LEVELS)[:, None, None]
    steady[4, 0, 0] = steady[3, 0, 0] - 0.01  # falls, but its masks grow
    areas = (torch.stack([shrinking, steady]) > 0).sum((-1, -2)).diff(dim=1)
    assert areas[0].min() < 0 <= areas[1].min()
    grown = growing(torch.stack([shrinking, steady]))
    weights = np.array([1.0] * (LEVELS - 1) + [20.0])
    assert torch.equal(grown[1], steady)
    for row, column in itertools.product(range(5), range(6)):
        expected = isotonic_regression(shrinking[:, row, column].double().numpy(), weights=weights).x
        np.testing.assert_allclose(grown[0, :, row, column], expected, atol=1e-5)
    assert torch.equal(growing(steady[None])[0], steady)


def test_a_phrase_adds_an_eleventh_answer_and_without_one_there_are_ten(decoder, segmenter):
    embedding = torch.randn(1, CHANNELS, 4, 6, generator=torch.Generator().manual_seed(1))
    phrases = torch.eye(WIDTH)
    plain = ask(decoder, segmenter, embedding, (8.0, 8.0))
    named, other = (ask(decoder, segmenter, embedding, (8.0, 8.0), phrase=phrases[i : i + 1]) for i in (0, 1))
    assert (plain.logits.shape[1], plain.scores.shape[1]) == (LEVELS, LEVELS)
    assert (named.logits.shape[1], named.scores.shape[1]) == (LEVELS + 1, LEVELS + 1)
    assert not torch.equal(named.logits[:, LEVELS], other.logits[:, LEVELS])


def test_prompts_asked_together_get_what_they_get_alone(decoder, segmenter):
    embedding = torch.randn(1, CHANNELS, 4, 6, generator=torch.Generator().manual_seed(1))
    spots = [(8.0, 8.0), (60.0, 30.0), (90.0, 50.0)]
    together = ask(decoder, segmenter, embedding, *spots)
    for i, spot in enumerate(spots):
        alone = ask(decoder, segmenter, embedding, spot).logits[0]
        torch.testing.assert_close(together.logits[i], alone, rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("anchors", [2, 3, 4])
def test_each_level_is_shared_out_between_the_nearest_two_anchors(anchors):
    shares = _between(anchors)
    assert shares.shape == (LEVELS, anchors)
    torch.testing.assert_close(shares.sum(1), torch.ones(LEVELS))
    assert ((shares > 0).sum(1) <= 2).all()
    assert shares[0, 0] == shares[-1, -1] == 1


def test_a_ladder_lies_where_its_base_does(segmenter):
    """As on a GPU: `meta` too refuses to compute with tensors of another device."""
    base = copy.deepcopy(segmenter.mask_decoder).to("meta")
    assert {tensor.device.type for tensor in LadderDecoder(base, WIDTH).state_dict().values()} == {"meta"}


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")  # whose values are not kept
def test_an_adapter_is_loaded_beside_a_base_on_another_device(segmenter):
    base = copy.deepcopy(segmenter.mask_decoder).to("meta")
    adapter = load_ladder(BUNDLED_ADAPTER, base, segmenter.digest, TorchEncoder(BUNDLED, torch.device("cpu")).tail)
    assert {tensor.device.type for tensor in adapter.level.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("threshold", "desk", "sofa"),  # 0.60 from chair, and 0.86 from couch
    [(0.58, None, "couch"), (0.64, None, "couch"), (0.57, "chair", "couch"), (0.95, None, None)],
)
def test_a_card_chooses_its_threshold_and_the_earlier_default_means_todays(segmenter, tmp_path, threshold, desk, sofa):
    found = read_adapter(BUNDLED_ADAPTER)
    path = tmp_path / "a.safetensors"
    write_adapter(path, card=found.card | {"phrase_threshold": threshold}, plain=found.plain, lora=found.lora)
    tail = TorchEncoder(BUNDLED, torch.device("cpu")).tail
    adapter = load_ladder(path, segmenter.mask_decoder, segmenter.digest, tail)
    understood = [adapter.understood(Prompt(phrase=typed)).phrase for typed in ("desk", "sofa")]
    assert understood == [desk, sofa]


# --- between the levels ---


def discs(*radii: float) -> np.ndarray:
    """Return logits of discs in the middle of 64 x 64: how far each pixel lies inside, half precision."""
    down, across = np.mgrid[:64, :64] - 31.5
    return np.stack([radius - np.hypot(down, across) for radius in radii]).astype(np.float16)


def test_a_place_among_the_levels_is_theirs_at_whole_numbers_and_between_them_elsewhere():
    levels = discs(*range(3, 33, 3))
    for level in range(LEVELS):
        assert np.array_equal(at_place(levels, level), levels[level].astype(np.float32))
    half = at_place(levels, 4.5)
    assert half.dtype == np.float32
    assert np.allclose(half, (levels[4].astype(np.float32) + levels[5]) / 2)


def test_of_the_masks_near_a_share_the_one_with_that_share_of_the_last_levels_area_is_found():
    levels = discs(*(30 * np.sqrt(np.arange(1, 11) / 10)))  # level by level a tenth more of the whole
    whole = np.count_nonzero(levels[-1] > 0)
    for share in (0.13, 0.25, 0.38, 0.55, 0.92):
        found = np.count_nonzero(at_place(levels, place_of(levels, share)) > 0) / whole
        assert found == pytest.approx(share, abs=0.02)


def test_a_share_is_looked_for_one_level_from_where_it_stands_at_most_and_a_larger_one_never_lies_before():
    levels = discs(*range(21, 31))  # all much larger than they say
    for share, standing in ((0.02, 0.0), (0.25, 1.5), (0.5, 4.0), (0.97, 8.7)):
        assert abs(place_of(levels, share) - standing) <= 1
    rng = np.random.default_rng(0)
    for _ in range(20):
        levels = discs(*np.sort(rng.uniform(1, 31, LEVELS)))
        places = [place_of(levels, share) for share in np.linspace(0.01, 0.99, 50)]
        assert (np.diff(places) >= 0).all()


def test_of_masks_that_lie_apart_one_that_holds_the_click_is_taken_and_never_an_empty_one():
    down, across = np.mgrid[:64, :64]
    apart = [8 - np.hypot(down - 16, across - 16), 9 - np.hypot(down - 44, across - 44)]
    levels = np.stack([*apart, *(30 - np.hypot(down - 31.5, across - 31.5) for _ in range(8))]).astype(np.float16)
    assert not (at_place(levels, 0.5) > 0).any(), "between the two there is nothing"
    for share in (0.002, 0.02, 0.05, 0.13):
        assert (at_place(levels, place_of(levels, share)) > 0).any()
        for click in ((16, 16), (44, 44)):
            assert at_place(levels, place_of(levels, share, click=click))[click] > 0
        assert place_of(levels, share, click=(0, 63)) == place_of(levels, share), "none holds it"


@pytest.mark.parametrize("share", [1e-9, 0.05, 0.5, 0.999])
def test_empty_levels_and_a_whole_of_nothing_have_a_place_too(share):
    for levels in (discs(*[-1.0] * LEVELS), discs(*[-1.0] * 9, 20), discs(*[20.0] * 9, -1)):
        assert 0 <= place_of(levels, share) <= LEVELS - 1
