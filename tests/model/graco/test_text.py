"""CLIP's text encoder: what the libraries answer, from every format that people have the weights in."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.graco import text
from model.graco.text import FILES, VIT_B_32, ClipText, TextShape, find_clip
from model.types import MAX_PHRASE, Refusal

SMALL = TextShape(width=64, heads=2, layers=2, out=48)
PHRASES = ("head", "the left front WHEEL of a car", "qwertyuiop 自転車 &amp; café", "", "a " * 200)


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip")


def whole_clip(open_clip, *, patch=32):
    """CLIP as open_clip builds it, with random weights and next to no image half."""
    torch.manual_seed(3)
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": patch, "image_size": patch}
    words = {"context_length": 77, "vocab_size": 49408, "width": SMALL.width, "heads": 2, "layers": SMALL.layers}
    return open_clip.CLIP(SMALL.out, vision, words, quick_gelu=True).eval()


@pytest.fixture(scope="module")
def clip(open_clip):
    return whole_clip(open_clip)


@pytest.fixture(scope="module")
def answers(open_clip, clip):
    with torch.no_grad():
        return clip.encode_text(open_clip.tokenizer.SimpleTokenizer()(list(PHRASES)))


def write_open_clip(path, clip):
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, path)


def write_state_dict(path, clip):
    torch.save(clip.state_dict(), path)


def write_torchscript(path, clip):
    """As OpenAI publishes it: a module with its code, which we must not run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have something newer
        traced = torch.jit.trace_module(clip, {"encode_text": torch.full((1, 77), 49407)}, check_trace=False)
        torch.jit.save(traced, path)


@pytest.mark.parametrize("write", [write_open_clip, write_state_dict, write_torchscript])
def test_a_phrase_gets_the_vector_that_open_clip_gives_it(clip, answers, tmp_path, write):
    write(tmp_path / "weights", clip)
    rows = ClipText(tmp_path / "weights", shape=SMALL).encode(PHRASES)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, answers, atol=1e-5, rtol=0)
    assert not torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=0.01), "GraCo does not normalise"


def test_a_phrase_gets_the_vector_that_transformers_gives_it(open_clip, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.CLIPTextConfig(
        hidden_size=SMALL.width,
        intermediate_size=4 * SMALL.width,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        projection_dim=SMALL.out,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    assert config.hidden_act == "quick_gelu"
    reference = transformers.CLIPTextModelWithProjection(config).eval()
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        answers = reference(open_clip.tokenizer.SimpleTokenizer()(list(PHRASES))).text_embeds
    rows = ClipText(tmp_path / "model.safetensors", shape=SMALL).encode(PHRASES)
    torch.testing.assert_close(rows, answers, atol=1e-5, rtol=0)


def test_half_precision_is_read_as_what_it_is_and_computed_in_fp32(clip, answers, tmp_path):
    save_file({name: value.half().contiguous() for name, value in clip.state_dict().items()}, tmp_path / "half")
    rows = ClipText(tmp_path / "half", shape=SMALL).encode(PHRASES)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, answers, atol=2e-2, rtol=0)


def test_the_sizes_are_those_that_the_library_has_for_vit_b_32(open_clip):
    known = open_clip.get_model_config("ViT-B-32-quickgelu")
    words = known["text_cfg"]
    assert (words["width"], words["heads"], words["layers"]) == (VIT_B_32.width, VIT_B_32.heads, VIT_B_32.layers)
    assert known["embed_dim"] == VIT_B_32.out
    assert known["quick_gelu"]


def test_the_image_half_is_never_read_into_memory(clip, tmp_path, monkeypatch):
    write_torchscript(tmp_path / "ViT-B-32.pt", clip)
    read = []

    def spy(path, wanted):
        found = text_reader(path, wanted)
        read.extend(found.tensors)
        return found

    text_reader = text.read_checkpoint
    monkeypatch.setattr(text, "read_checkpoint", spy)
    ClipText(tmp_path / "ViT-B-32.pt", shape=SMALL).encode(["wheel"])
    assert [name for name in read if name.startswith("visual.")] == ["visual.conv1.weight"]


def test_threads_get_the_vectors_of_one_thread_and_weights_are_read_once(clip, tmp_path, monkeypatch):
    write_open_clip(tmp_path / "weights", clip)
    loads = []
    load = text._load
    monkeypatch.setattr(text, "_load", lambda *given: loads.append(given) or load(*given))
    alone, shared = (ClipText(tmp_path / "weights", shape=SMALL) for _ in range(2))
    phrases = [f"part {number}" for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        rows = torch.cat(list(pool.map(lambda phrase: shared.encode([phrase]), phrases)))
    assert torch.equal(rows, alone.encode(phrases))
    assert len(loads) == 2
    with torch.inference_mode():
        assert not shared.encode(["part 3", "new"]).isnan().any()
    assert shared.encode([]).shape == (0, SMALL.out)


def test_the_folder_is_searched_under_the_published_names(tmp_path):
    assert find_clip(tmp_path) is None
    assert find_clip(tmp_path / "nowhere") is None
    for name in reversed(FILES):
        (tmp_path / name).touch()
        assert find_clip(tmp_path) == tmp_path / name


def test_weights_that_are_not_there_are_named_with_the_folder_they_belong_in(tmp_path):
    with pytest.raises(Refusal, match="clip of the data directory"):
        ClipText(tmp_path / "ViT-B-32.pt").encode(["wheel"])


def changed(clip, **changes):
    state = {name: value.contiguous() for name, value in clip.state_dict().items()}
    for name, change in changes.items():
        name = name.replace("__", ".")
        if change is None:
            del state[name]
        else:
            state[name] = change(state[name])
    return state


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"positional_embedding": None}, "lacks 1 tensors of CLIP's text encoder, such as positional_embedding"),
        ({"ln_final__weight": lambda x: x[:-1]}, r"ln_final.weight of shape \(63,\)"),
        ({"text_projection": lambda x: x.to(torch.int64)}, "text_projection of shape .*int64"),
        ({"ln_final__bias": lambda x: torch.full_like(x, np.nan)}, "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(clip, tmp_path, changes, sentence):
    save_file(changed(clip, **changes), tmp_path / "weights")
    with pytest.raises(Refusal, match=sentence):
        ClipText(tmp_path / "weights", shape=SMALL).encode(["wheel"])


def test_the_neighbour_with_smaller_patches_is_told_apart(open_clip, tmp_path):
    write_open_clip(tmp_path / "weights", whole_clip(open_clip, patch=16))
    with pytest.raises(Refusal, match="patches of 16 pixels, and GraCo learned with ViT-B/32"):
        ClipText(tmp_path / "weights", shape=SMALL).encode(["wheel"])


def test_a_torchscript_archive_that_was_cut_off_is_refused(clip, tmp_path):
    write_torchscript(tmp_path / "ViT-B-32.pt", clip)
    whole = (tmp_path / "ViT-B-32.pt").read_bytes()
    (tmp_path / "ViT-B-32.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refusal, match="damaged"):
        ClipText(tmp_path / "ViT-B-32.pt", shape=SMALL).encode(["wheel"])


def test_another_file_is_refused(tmp_path):
    (tmp_path / "weights").write_text("<html>sign in first</html>")
    with pytest.raises(Refusal, match="holds text"):
        ClipText(tmp_path / "weights").encode(["wheel"])
    save_file({"pos_embed": torch.zeros(3)}, tmp_path / "vit")
    with pytest.raises(Refusal, match="none of those looked for"):
        ClipText(tmp_path / "vit").encode(["wheel"])


def test_a_phrase_that_is_a_text_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(Refusal, match="shorten it"):
        ClipText(tmp_path / "nowhere").encode(["a" * (MAX_PHRASE + 1)])
