import numpy as np
import pytest
import torch

from active_learning.selection import feature, k_centre, priorities, uncertainty
from model.segmenter import BUNDLED_ADAPTER, Encoded


@pytest.fixture(scope="module")
def adapted(segmenter):
    return segmenter.with_adapter(BUNDLED_ADAPTER)


@pytest.fixture(scope="module")
def encoded(segmenter, scene):
    return segmenter.encode(scene)


class Counting:
    """A segmenter that counts its decoder passes."""

    def __init__(self, segmenter):
        self._segmenter, self.passes = segmenter, 0

    def __getattr__(self, name):
        return getattr(self._segmenter, name)

    def step(self, *args):
        self.passes += 1
        return self._segmenter.step(*args)


def units(rng, count, width=5):
    points = rng.normal(size=(count, width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def test_a_place_costs_two_passes_however_many_levels(adapted, encoded):
    counting = Counting(adapted)
    found = uncertainty(counting, encoded, np.random.default_rng(1), clicks=3)
    assert counting.passes == 2 * 4  # three places want a grid of 2 x 2
    for value in (found.levels, found.moved, found.score, found.value):
        assert 0 <= value <= 1


def test_the_same_chance_gives_the_same_uncertainty(adapted, encoded):
    first, second = (uncertainty(adapted, encoded, np.random.default_rng(3), clicks=2) for _ in range(2))
    assert first == second


def test_a_base_without_adapter_is_asked_too(segmenter, encoded):
    assert 0 < uncertainty(segmenter, encoded, np.random.default_rng(1), clicks=2).value < 1


def test_noise_is_more_uncertain_than_a_scene_of_plain_things(adapted, encoded):
    noise = {"embedding": torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(1)).half()}
    nonsense = Encoded(noise, encoded.height, encoded.width)
    a, b = (uncertainty(adapted, one, np.random.default_rng(1), clicks=2) for one in (nonsense, encoded))
    assert a.value > b.value


def test_a_large_photo_is_judged_as_a_small_one_of_the_same_embedding(adapted, encoded):
    large = Encoded(encoded.tensors, 12 * encoded.height, 12 * encoded.width)
    a, b = (uncertainty(adapted, one, np.random.default_rng(1), clicks=2) for one in (encoded, large))
    assert a == b


def test_no_click_is_no_question(adapted, encoded):
    with pytest.raises(ValueError, match="at least one"):
        uncertainty(adapted, encoded, np.random.default_rng(1), clicks=0)


def test_what_lies_outside_the_photo_does_not_count_in_its_feature(encoded):
    tensors = {"embedding": encoded.tensors["embedding"].clone()}
    tensors["embedding"][:, :, 48:] = 9  # the scene is 640 x 480: it fills 48 rows of 64
    vector = feature(encoded)
    np.testing.assert_array_equal(vector, feature(Encoded(tensors, encoded.height, encoded.width)))
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("labelled", [0, 1, 4])
def test_k_centre_is_farthest_first(labelled):
    rng = np.random.default_rng(labelled)
    points, taken = units(rng, 30), units(rng, labelled)
    order, distances = k_centre(points, taken)
    assert sorted(order) == list(range(30))
    assert (np.diff(distances) <= 1e-9).all()
    centres = list(taken)
    for place, index in enumerate(order):
        left = [i for i in range(30) if i not in order[:place]]
        far = {i: min((np.linalg.norm(points[i] - c) for c in centres), default=None) for i in left}
        if far[left[0]] is None:
            middle = points.mean(0)
            assert index == min(left, key=lambda i: np.linalg.norm(points[i] - middle))
        else:
            assert far[index] == pytest.approx(max(far.values()), abs=1e-6)
            assert distances[place] == pytest.approx(far[index], abs=1e-6)
        centres.append(points[index])


def test_of_two_alike_one_comes_last_and_nothing_orders_nothing():
    points = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    order, distances = k_centre(points, points[1:2])
    assert order.tolist() == [0, 1, 2]
    assert distances.tolist() == pytest.approx([2**0.5, 0, 0])
    order, distances = k_centre(points[:0], points)
    assert (order.size, distances.size) == (0, 0)


def test_the_most_useful_image_has_the_lowest_score_and_no_two_are_alike():
    rng = np.random.default_rng(0)
    features = {name: vector for name, vector in zip("abcdef", units(rng, 6), strict=True)}
    same = dict.fromkeys("abcdef", 0.5)
    scores = priorities(same | {"c": 0.9}, features, units(rng, 2), novelty=0.0)
    assert min(scores, key=scores.__getitem__) == next(iter(scores)) == "c"
    assert sorted(scores.values()) == pytest.approx([n / 6 for n in range(6)])


def test_of_images_equally_uncertain_the_one_unlike_those_corrected_comes_first():
    features = {"alike": np.array([1, 0.1], np.float32), "unlike": np.array([0, 1], np.float32)}
    scores = priorities(dict.fromkeys(features, 0.3), features, np.array([[1, 0]], np.float32))
    assert scores == {"unlike": 0.0, "alike": 0.5}
    assert priorities({}, {}, np.empty((0, 2), np.float32)) == {}
