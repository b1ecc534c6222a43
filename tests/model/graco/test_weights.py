"""Published names and ours: every name and shape is checked, and what comes back is bit for bit what went in."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from model.adapter import attach, load_lora, lora_state, read_adapter, write_adapter
from model.graco import weights
from model.graco.inputs import Architecture
from model.graco.network import SimpleClick
from model.graco.pickles import read_checkpoint
from model.graco.weights import ALPHA, LEVEL, PHRASE, RANK
from model.types import Refusal
from tests.model.graco.synthetic import TINY, made_adapter, made_base, published_adapter, synthetic_base

VIT_B = Architecture(
    name="vit_b", width=768, depth=12, heads=12, patch=16, size=448, neck=(128, 256, 512, 1024), head=256
)
BASE = "b" * 64


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_the_published_vit_b_is_known_by_its_shapes_and_comes_back_bit_for_bit(tmp_path):
    base = synthetic_base()
    architecture = weights.architecture_of(base)
    assert architecture == VIT_B
    not_used = weights.check(base, architecture)
    assert set(not_used) == {name for name in base if re.match(r"backbone\.(cls|fc_|head)|head\.up_conv", name)}
    same(weights.published(weights.ours(base)), base)
    weights.write_base(tmp_path / "weights.safetensors", weights.ours(base), architecture)
    kept, told = weights.read_base(tmp_path / "weights.safetensors")
    assert told == architecture
    same(weights.published(kept), base)


@pytest.mark.parametrize(
    "architecture",
    [
        replace(VIT_B, size=672),
        replace(VIT_B, size=224),
        replace(VIT_B, doublings=1, head=512),
        replace(VIT_B, doublings=2, head=1024),
        replace(VIT_B, name="vit_l", width=1024, depth=24, heads=16, neck=(192, 384, 768, 1536)),
        replace(VIT_B, name="vit_h", width=1280, depth=32, heads=16, patch=14, neck=(240, 480, 960, 1920)),
        replace(VIT_B, name="vit_xtiny", width=160, depth=8, heads=4, neck=(96, 192, 288, 384), head=128),
    ],
    ids=lambda a: f"{a.name}-{a.size}-{a.doublings}",
)
def test_each_published_network_is_known_by_its_shapes(architecture):
    with torch.device("meta"):
        tensors = weights.published(SimpleClick(architecture).state_dict())
    assert weights.architecture_of(tensors) == architecture
    assert weights.architecture_of(tensors, weights.make_config(architecture)) == architecture


def test_what_is_read_loads_strictly_and_early_checkpoints_need_no_doublings():
    base = made_base(TINY)
    early = {name: value for name, value in base.items() if ".up_conv" not in name}
    for tensors in (base, early):
        assert not {n for n in weights.check(tensors, TINY) if "up_conv" in n} - tensors.keys()
        network = SimpleClick(TINY)
        network.load_state_dict(weights.network_state(weights.ours(tensors), TINY), strict=True)
        fused = tensors["backbone.blocks.1.attn.qkv.weight"]
        attention = network.backbone.blocks[1].attn
        assert torch.equal(
            torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]), fused
        )
    doubled = replace(TINY, doublings=1)
    with pytest.raises(Refusal, match=r"8 missing \(head\.up_conv1"):
        weights.check({n: v for n, v in made_base(doubled).items() if ".up_conv1" not in n}, doubled)


def test_heads_come_from_the_config_and_are_never_guessed():
    base = made_base(TINY)
    assert weights.architecture_of(base, weights.make_config(TINY)) == TINY
    with pytest.raises(Refusal, match="attention heads a width of 32 has is not known"):
        weights.architecture_of(base)
    config = weights.make_config(TINY)
    config["params"]["backbone_params"]["value"]["num_heads"] = 5
    with pytest.raises(Refusal, match="attention heads"):
        weights.architecture_of(base, config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("random_split", True), ("use_disks", False), ("norm_radius", 3), ("with_prev_mask", False)],
)
def test_a_config_of_what_the_network_does_not_compute_is_refused(name, value):
    config = weights.make_config(TINY)
    config["params"][name]["value"] = value
    with pytest.raises(Refusal, match=f"trained with {name} = {value}"):
        weights.architecture_of(made_base(TINY), config)


def test_all_that_does_not_fit_is_said_in_one_sentence():
    tensors = made_base(TINY)
    del tensors["neck.down_8.0.bias"]
    del tensors["backbone.blocks.2.attn.qkv.bias"]
    tensors["stranger\x1b[31m"] = torch.zeros(2)
    tensors["head.conv_seg.bias"] = torch.zeros(7)
    tensors["neck.down_16.0.bias"] = torch.zeros(32, dtype=torch.int64)
    with pytest.raises(Refusal) as refused:
        weights.check(tensors, TINY)
    said = str(refused.value)
    assert "2 missing (backbone.blocks.2.attn.qkv.bias, neck.down_8.0.bias)" in said
    assert r"1 left over (stranger\x1b[31m)" in said
    assert "head.conv_seg.bias [7] instead of [1]" in said
    assert "1 not in fp32, fp16 or bf16 (neck.down_16.0.bias)" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(value):
    tensors = made_base(TINY)
    tensors["backbone.blocks.3.mlp.fc2.weight"][5, 6] = value
    with pytest.raises(Refusal, match=r"not finite \(backbone\.blocks\.3\.mlp\.fc2\.weight\)"):
        weights.check(tensors, TINY)
    adapter = made_adapter(TINY)
    adapter["backbone.blocks.0.attn.qkv.lora_B2"][1, 1] = value
    with pytest.raises(Refusal, match=r"not finite \(backbone\.blocks\.0\.attn\.qkv\.lora_B2\)"):
        weights.adapter_from_published(adapter, TINY, BASE)


def test_tensors_of_another_network_are_refused_with_what_to_import():
    with pytest.raises(Refusal, match=r"not the tensors of a SimpleClick ViT checkpoint.*sbd_vit_base\.pth"):
        weights.architecture_of({"layer1.0.conv1.weight": torch.zeros(3)})
    tensors = made_base(TINY)
    tensors["backbone.pos_embed"] = tensors["backbone.pos_embed"][:, :-3]
    with pytest.raises(Refusal, match="no square grid"):
        weights.architecture_of(tensors, weights.make_config(TINY))


@pytest.fixture(scope="module")
def published():
    return read_checkpoint(published_adapter())


def test_the_published_adapter_goes_through_peft_and_comes_back_bit_for_bit(tmp_path, published):
    adapter = weights.adapter_from_published(published.tensors, VIT_B, BASE)
    assert (adapter.card["rank"], adapter.card["alpha"], set(adapter.lora)) == (RANK, ALPHA, {LEVEL, PHRASE})
    write_adapter(tmp_path / "a.safetensors", card=adapter.card, plain=adapter.plain, lora=adapter.lora, exact=True)
    kept = read_adapter(tmp_path / "a.safetensors", base=BASE)
    same(weights.adapter_to_published(kept), published.tensors)
    with torch.device("meta"):
        network = SimpleClick(VIT_B)
    network.to_empty(device="cpu")  # the base's values do not matter here
    for branch in kept.lora:
        attach(network, branch, rank=RANK, alpha=ALPHA)
        load_lora(network, branch, kept.lora[branch])
    trained = replace(kept, lora={branch: lora_state(network, branch) for branch in kept.lora})
    same(weights.adapter_to_published(trained), published.tensors)


def test_the_sums_are_those_of_loralib_and_leave_k_alone(published):
    adapter = weights.adapter_from_published(published.tensors, VIT_B, BASE)
    for branch, suffix in ((LEVEL, ""), (PHRASE, "2")):
        deltas = adapter.deltas([branch])
        assert len(deltas) == 2 * VIT_B.depth
        layer = "backbone.blocks.7.attn"
        a, b = (published.tensors[f"{layer}.qkv.lora_{half}{suffix}"] for half in "AB")
        expected = F.conv1d(a[None], b[..., None], groups=2)[0] / 8  # rows of q, then rows of v
        found = torch.cat([deltas[f"{layer}.q_proj.weight"], deltas[f"{layer}.v_proj.weight"]])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("phrase", [True, False])
def test_adapters_of_levels_alone_and_of_half_precision_come_back_too(tmp_path, dtype, phrase):
    tensors = {name: value.to(dtype) for name, value in made_adapter(TINY, phrase=phrase).items()}
    adapter = weights.adapter_from_published(tensors, TINY, BASE)
    assert set(adapter.lora) == ({LEVEL, PHRASE} if phrase else {LEVEL})
    write_adapter(tmp_path / "a.safetensors", card=adapter.card, plain=adapter.plain, lora=adapter.lora, exact=True)
    same(weights.adapter_to_published(read_adapter(tmp_path / "a.safetensors")), tensors)


def test_an_adapter_for_another_width_or_depth_is_refused_with_both_sizes(published):
    with pytest.raises(Refusal, match=r"width 768 with 12 blocks, and this base, vit_32x4, has 32 and 4"):
        weights.adapter_from_published(published.tensors, TINY, BASE)


@pytest.mark.parametrize("gone", ["backbone.gra_embed.weight", "backbone.blocks.1.attn.qkv.lora_B", "phrase_encoder"])
def test_an_adapter_that_lacks_something_is_refused_by_name(gone):
    tensors = {name: value for name, value in made_adapter(TINY).items() if not name.startswith(gone)}
    with pytest.raises(Refusal, match=gone):
        weights.adapter_from_published(tensors, TINY, BASE)


@pytest.mark.parametrize("rank", [4, 16])
def test_an_adapter_that_the_published_code_would_scale_otherwise_is_neither_taken_nor_written_for_it(rank):
    with pytest.raises(Refusal, match=f"rank {rank}; the published code reads"):
        weights.adapter_from_published(made_adapter(TINY, rank=rank), TINY, BASE)
    adapter = weights.adapter_from_published(made_adapter(TINY), TINY, BASE)
    with pytest.raises(Refusal, match=f"rank {rank} and alpha 1"):
        weights.adapter_to_published(replace(adapter, card=adapter.card | {"rank": rank}))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("backbone.blocks.99999999.norm1.weight", torch.zeros(32), "has 100000000 blocks"),
        ("backbone.patch_embed.proj.weight", torch.zeros(32, 3, 300, 300), "patches of 300 pixels"),
        ("backbone.patch_embed.proj.weight", torch.tensor(1.0), "some have other shapes"),
        ("backbone.pos_embed", torch.zeros(5), "some have other shapes"),
    ],
)
def test_sizes_that_no_network_has_are_refused_before_one_is_made(name, value, sentence):
    with pytest.raises(Refusal, match=sentence):
        weights.architecture_of(made_base(TINY) | {name: value}, weights.make_config(TINY))


def test_base_and_adapter_are_told_apart_by_names():
    base, adapter = made_base(TINY), made_adapter(TINY)
    tower = {"phrase_encoder.model.ln_final.weight": torch.ones(3)}
    assert weights.kinds_of(base) == {"base"}
    assert weights.kinds_of(adapter | tower) == {"adapter"}
    assert weights.kinds_of(base | adapter) == {"base", "adapter"}
    same(weights.part(base | adapter | tower, "base"), base)
    same(weights.part(base | adapter | tower, "adapter"), adapter)


def test_an_adapter_file_offered_as_base_and_the_reverse_are_refused(tmp_path):
    adapter = weights.adapter_from_published(made_adapter(TINY), TINY, BASE)
    write_adapter(tmp_path / "a.safetensors", card=adapter.card, plain=adapter.plain, lora=adapter.lora)
    weights.write_base(tmp_path / "b.safetensors", weights.ours(made_base(TINY)), TINY)
    with pytest.raises(Refusal, match="is an adapter, not a base"):
        weights.read_base(tmp_path / "a.safetensors")
    with pytest.raises(Refusal, match="cannot be read"):
        read_adapter(tmp_path / "b.safetensors")
    with pytest.raises(Refusal, match="trained on base"):
        read_adapter(tmp_path / "a.safetensors", base="c" * 64)


def test_the_config_made_for_an_adapter_is_the_published_one(published):
    made = weights.make_config(VIT_B, branches=(LEVEL, PHRASE))
    assert made["class"] == published.config["class"]
    for name, param in made["params"].items():
        assert param == published.config["params"][name], name
    left = [p for n, p in published.config["params"].items() if n not in made["params"]]
    assert not any(param["specified"] for param in left), "what is left out is what the published code assumes"
