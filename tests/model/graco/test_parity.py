"""Our network and predictor against what the published GraCo code answered (its cases: ../shared/parity)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from model.adapter import write_adapter
from model.graco import weights
from model.graco.inputs import click_disks, normalise, row_of
from model.graco.segmenter import GracoSegmenter
from model.graco.weights import LEVEL, PHRASE
from model.segmenter import digest_of
from model.types import LEVELS, Click, Granularity, Prompt
from tests.model.graco.synthetic import CASES, parity_file, published_adapter, synthetic_base

pytestmark = pytest.mark.parity

LOGITS, PROBABILITY = 2e-3, 1e-3  # of the cases' README: what float32 on another CPU may differ by


def cases(kind):
    """Return the recorded cases of one kind, or a stand-in where there is no folder (the fixture then says so)."""
    try:
        return json.loads(parity_file(CASES).read_text()).get(kind, [])
    except (pytest.skip.Exception, pytest.fail.Exception):
        return [{"name": "no folder of cases"}]


@pytest.fixture(scope="module")
def golden():
    with np.load(parity_file("golden.npz")) as file:
        return dict(file)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder for a gigabyte or two, gone with these tests: pytest would keep it to the end of the run."""
    folder = tmp_path_factory.mktemp("parity")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def imported(room):
    """Return a function from a case's head to the files of base and adapter."""
    folder = room / "imported"
    folder.mkdir()
    made: dict[tuple[float | None, float], tuple[Path, Path]] = {}
    adapter = None

    def make(case):
        nonlocal adapter
        from model.graco.pickles import read_checkpoint

        key = case.get("conv_seg_bias"), case.get("conv_seg_scale", 1)
        if key in made:
            return made[key]
        base = dict(synthetic_base())
        if key[0] is not None:
            base["head.conv_seg.bias"] = torch.full((1,), float(key[0]))
        base["head.conv_seg.weight"] = base["head.conv_seg.weight"] * key[1]
        architecture = weights.architecture_of(base)
        path = folder / f"{len(made)}.safetensors"
        weights.write_base(path, weights.ours(base), architecture)
        if adapter is None:
            adapter = read_checkpoint(published_adapter()).tensors
        found = weights.adapter_from_published(adapter, architecture, digest_of(path.read_bytes()))
        write_adapter(path.with_suffix(".adapter"), card=found.card, plain=found.plain, lora=found.lora, exact=True)
        made[key] = path, path.with_suffix(".adapter")
        return made[key]

    return make


class FixedText:
    """Stands for CLIP, whose output the case holds."""

    name, width = "fixed", 512

    def __init__(self, vector):
        self.vector = torch.as_tensor(vector).reshape(1, -1)

    def encode(self, phrases):
        return self.vector.expand(len(phrases), -1)


class AsPublished(GracoSegmenter):
    """Answers a prompt without a level as the published network does: LoRA's first branch on, no embedding added."""

    def _low_rank(self, branch):
        return super()._low_rank(branch or LEVEL)


def steered(base, adapter, case, golden, **how):
    """Return the segmenter of a case, with the level or phrase that its prompts have."""
    if case["model"] != "graco":
        return GracoSegmenter.load(base, device="cpu", **how), {}
    segmenter = AsPublished.load(base, device="cpu", **how).with_adapter(adapter)
    if case.get("phrase"):
        segmenter._text = FixedText(golden[f"{case['name']}/phrase"])
        return segmenter, {"phrase": "any"}
    if case.get("gra") is None:
        return segmenter, {}
    return segmenter, {"granularity": Granularity(1 + published_row(case["gra"]))}


def published_row(gra):
    """Return the row of the granularity embedding, as the published code finds it: truncated, in float32."""
    return int(torch.clamp(torch.tensor(gra, dtype=torch.float32) * 10 - 1, 0, 9).long())


def picture(height, width, seed, patch=None):
    g = np.random.Generator(np.random.PCG64(seed))
    blocks = g.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3)).astype(np.uint8)
    image = blocks.repeat(20, 0).repeat(20, 1)[:height, :width]
    if patch is None:
        return image
    top, left, bottom, right = patch
    framed = np.full_like(image, 128)
    framed[top:bottom, left:right] = image[top:bottom, left:right]
    return framed


@pytest.mark.parametrize("case", cases("forward"), ids=lambda case: case["name"])
def test_one_pass_of_the_network_gives_the_published_logits(case, imported, golden):
    base, adapter = imported(case)
    segmenter, steer = steered(base, adapter, case, golden)
    signal = segmenter._signal(Prompt(**steer))[None]
    low_rank = segmenter._low_rank(PHRASE if "phrase" in steer else LEVEL if "granularity" in steer else None)
    previous = torch.zeros(1, 448, 448)
    if case.get("prev"):
        previous[0, 100:300, 150:380] = 0.9
    image = normalise(torch.from_numpy(picture(448, 448, case["seed"])).permute(2, 0, 1).float() / 255)
    maps = torch.cat([previous, click_disks([(y, x, bool(p)) for y, x, p in case["clicks"]], 448, 448)])
    logits = segmenter._runtime(image[None], maps[None], signal, low_rank)[0, 0]
    expected = golden[f"{case['name']}/logits"].reshape(112, 112)
    assert np.abs(logits[::4, ::4].numpy() - expected).max() <= LOGITS


@pytest.mark.parametrize("case", cases("predict"), ids=lambda case: case["name"])
@pytest.mark.parametrize("runtime", ["torch", "compiled"])
def test_every_click_of_a_sequence_gives_the_published_probabilities(case, runtime, imported, golden, room):
    base, adapter = imported(case)
    compiled = room / "compiled" if runtime == "compiled" else None
    segmenter, steer = steered(base, adapter, case, golden, compiled=compiled)
    assert segmenter.runtime == ("openvino-fp32" if compiled else "torch-fp32")
    encoded = segmenter.encode(picture(case["h"], case["w"], case["seed"], case.get("patch")))
    clicks = tuple(Click(x=x + 0.5, y=y + 0.5, positive=bool(p)) for y, x, p in case["clicks"])
    state, expected = None, golden[f"{case['name']}/probs"]
    for n in range(1, len(clicks) + 1):
        prompt = Prompt(clicks=clicks[:n], **steer)
        state = segmenter.step(encoded, prompt, state)
        found = segmenter.probability(encoded, prompt, state)[::3, ::3]
        assert np.abs(found - expected[n - 1]).max() <= PROBABILITY, f"click {n}"


def test_a_level_picks_the_row_that_the_published_truncation_picks():
    for level in range(1, LEVELS + 1):
        assert published_row(Granularity(level).value) == row_of(level)
