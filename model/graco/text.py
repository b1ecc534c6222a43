"""Phrases as GraCo's network takes them: CLIP ViT-B/32's text encoder, without the image half.

GraCo projects `encode_text(...)` as it comes, neither normalised nor cut; so does this. The encoder is OpenAI's, whose
activation is QuickGELU. Weights are never fetched: they lie in the folder `clip` of the data directory, in any
of the formats that OpenAI, open_clip and transformers publish, and are read as data.

Sources: CLIP (arXiv 2103.00020); GraCo's code, where the published configurations and adapter name ViT-B/32 (the
default of its `ClipTextEncoder`, ViT-B/16, is used by none of them). The two have text encoders of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from model.graco.pickles import read_checkpoint
from model.types import MAX_PHRASE, Refusal

FILES = (
    *("ViT-B-32.pt", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    *("model.safetensors", "pytorch_model.bin"),
)
"""Names under which the weights are published: OpenAI's, open_clip's, transformers'."""

_REMEMBERED = 1024  # phrases
_PATCHES = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")  # tell B/32 from B/16
_PATCH = 32
_REMEDY = (
    "put OpenAI's CLIP ViT-B/32 into the folder clip of the data directory, as ViT-B-32.pt (OpenAI), "
    "open_clip_model.safetensors (open_clip) or model.safetensors (transformers: clip-vit-base-patch32)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextShape:
    """The sizes of a text encoder of CLIP's kind."""

    width: int
    heads: int
    layers: int
    out: int


VIT_B_32 = TextShape(width=512, heads=8, layers=12, out=512)


def find_clip(folder: Path) -> Path | None:
    """Return the weights in a folder, the first of `FILES` that is there, or None."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


class ClipText:
    """CLIP's text encoder on the CPU, fp32; read at the first phrase. May be used by several threads."""

    def __init__(self, weights: Path, *, shape: TextShape = VIT_B_32) -> None:
        """Take the file of the weights, whole CLIP or its text half."""
        self._weights = weights
        self._shape = shape
        self._lock = Lock()
        self._loaded: _Encoder | None = None
        self._vector = lru_cache(_REMEMBERED)(self._encode)

    def encode(self, phrases: Sequence[str]) -> Tensor:
        """Return one row for each phrase, fp32, as CLIP's `encode_text` gives it: N, 512.

        Words beyond CLIP's 75 tokens are cut off.

        Raises:
            Refusal: a phrase has more than `MAX_PHRASE` characters; or the weights are missing, damaged or others.
        """
        rows = [self._vector(phrase) for phrase in phrases]
        return torch.stack(rows) if rows else torch.empty(0, self._shape.out)

    def _encode(self, phrase: str) -> Tensor:
        if len(phrase) > MAX_PHRASE:
            raise Refusal(f"the phrase has {len(phrase)} characters, at most {MAX_PHRASE} are read; shorten it")
        with self._lock:
            self._loaded = self._loaded or _load(self._weights, self._shape)
        # whatever mode the caller is in: the vector is kept, in fp32, and may meet a gradient later
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self._loaded([phrase])[0]


_Encoder = Callable[[list[str]], Tensor]


def _load(path: Path, shape: TextShape) -> _Encoder:
    from open_clip.tokenizer import SimpleTokenizer  # seconds, and memory, for those who use phrases
    from open_clip.transformer import QuickGELU, TextTransformer

    tokenizer = SimpleTokenizer()
    with torch.device("meta"):  # no memory for weights that are read next
        tower = TextTransformer(
            context_length=tokenizer.context_length,
            vocab_size=tokenizer.vocab_size,
            width=shape.width,
            heads=shape.heads,
            layers=shape.layers,
            output_dim=shape.out,
            act_layer=QuickGELU,
        )
    with torch.inference_mode(False):
        tower.load_state_dict(_read(path, tower.state_dict(), shape), assign=True)
        tower.attn_mask = tower.build_causal_mask()
    tower.eval().requires_grad_(False)
    return lambda phrases: tower(tokenizer(phrases))


def _read(path: Path, expected: dict[str, Any], shape: TextShape) -> dict[str, Tensor]:
    """Return the text encoder's tensors in open_clip's naming, fp32, of the names and shapes of `expected`."""
    if not path.is_file():
        raise Refusal(f"{path} is not there; {_REMEDY}")
    theirs = {name for of in _transformers_names(shape).values() for name in of}
    names = expected.keys() | theirs | set(_PATCHES)
    found = read_checkpoint(path, wanted=names.__contains__).tensors
    patch = next((found[name].shape[-1] for name in _PATCHES if name in found and found[name].ndim == 4), _PATCH)
    if patch != _PATCH:
        raise Refusal(f"{path} is CLIP with patches of {patch} pixels, and GraCo learned with ViT-B/32; {_REMEDY}")
    if theirs & found.keys():
        found = _from_transformers(found, shape)
    missing = [name for name in expected if name not in found]
    if missing:
        raise Refusal(f"{path} lacks {len(missing)} tensors of CLIP's text encoder, such as {missing[0]}; {_REMEDY}")
    tensors = {}
    for name, like in expected.items():
        one = found[name]
        if one.shape != like.shape or not one.is_floating_point():
            raise Refusal(
                f"{path} holds {name} of shape {tuple(one.shape)} ({one.dtype}), and ViT-B/32 has "
                f"{tuple(like.shape)}; {_REMEDY}"
            )
        if not one.isfinite().all():
            raise Refusal(f"{path} holds numbers in {name} that are not finite; download it again")
        tensors[name] = one.to(torch.float32)
    return tensors


def _transformers_names(shape: TextShape) -> dict[str, tuple[str, ...]]:
    """Return what each tensor is called by transformers: the attention's three parts stand for one."""
    text = "text_model"
    names: dict[str, tuple[str, ...]] = {
        "token_embedding.weight": (f"{text}.embeddings.token_embedding.weight",),
        "positional_embedding": (f"{text}.embeddings.position_embedding.weight",),
        "ln_final.weight": (f"{text}.final_layer_norm.weight",),
        "ln_final.bias": (f"{text}.final_layer_norm.bias",),
        "text_projection": ("text_projection.weight",),
    }
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    inner |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for layer in range(shape.layers):
        ours, theirs = f"transformer.resblocks.{layer}", f"{text}.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            names[f"{ours}.attn.in_proj_{kind}"] = parts
            names |= {f"{ours}.{a}.{kind}": (f"{theirs}.{b}.{kind}",) for a, b in inner.items()}
    return names


def _from_transformers(found: dict[str, Tensor], shape: TextShape) -> dict[str, Tensor]:
    ours = {
        name: torch.cat([found[part] for part in parts]) if len(parts) > 1 else found[parts[0]]
        for name, parts in _transformers_names(shape).items()
        if all(part in found for part in parts)
    }
    if "text_projection" in ours:
        ours["text_projection"] = ours["text_projection"].T.contiguous()
    return ours
