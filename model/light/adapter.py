"""A granularity adapter as the `light` family serves it: ladder decoders with LoRA summed in, and known phrases.

There is one decoder for levels alone and one for phrases, each with its own sums; both share all other tensors. Which
one answers is chosen by request and writes to neither. An adapter may also move the encoder's tail: then it sees each
image its own way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor

from model.adapter import ENCODER, AdapterFile, read_adapter
from model.light.encoder import Tail
from model.light.ladder import Ladder, LadderDecoder
from model.light.network import MaskDecoder
from model.light.tail import Moved, moved_by
from model.segmenter import Encoded, digest_of_file
from model.text import MINILM, THRESHOLD, Vocabulary, clean, load_phrase_encoder, names_part, with_and_without_s
from model.types import Granularity, Prompt, Refusal

LEVEL, PHRASE = "level", "phrase"
"""Branches of the decoder: LoRA of the level signal, and that of the phrase signal, which is on together with it.

A third one, `model.adapter.ENCODER`, moves the encoder's tail.
"""
PART = Granularity(2)
"""What a word for a part asks for; chosen among 0.1 .. 0.5 on car parts (docs/experiments.md)."""
_OF_BASE = ("transformer.", "iou_token.", "mask_tokens.")  # what stays as the base has it, sums aside
_SEEN = 16  # images whose embeddings a moved tail keeps, 2 MB each; further ones take the tail's time again
_EARLIER_THRESHOLD = 0.58  # the default before `THRESHOLD` was raised; the shipped adapter and its offspring say it
VOCABULARY = "vocabulary"
"""Name of the tensor that holds the vectors of known names."""


@dataclass(frozen=True, slots=True, eq=False)
class LadderAdapter:
    """An adapter loaded beside one base; may be asked from many threads."""

    id: str  # file name and digest
    level: LadderDecoder
    phrase: LadderDecoder | None
    vocabulary: Vocabulary | None
    tail: Tail | None = None  # of the encoder, as the adapter moves it
    # newest last, and only while the image itself is kept
    _seen: WeakKeyDictionary[Encoded, Tensor] = field(init=False, default_factory=WeakKeyDictionary)
    _seeing: threading.Lock = field(init=False, default_factory=threading.Lock)

    def sees(self, encoded: Encoded) -> Tensor:
        """Return the embedding of an image as this adapter sees it: 1, 256, 64, 64, fp16."""
        if self.tail is None:
            return encoded.tensors["embedding"]
        with self._seeing:  # whoever asks for the same image meanwhile finds it
            embedding = self._seen.pop(encoded, None)
            if embedding is None:
                embedding = self.moved(encoded.tensors["features"])
            if len(self._seen) >= _SEEN and (oldest := next(iter(self._seen), None)) is not None:
                self._seen.pop(oldest, None)
            self._seen[encoded] = embedding
        return embedding

    def moved(self, features: Tensor) -> Tensor:
        """Return what the moved tail makes of features 1, 160, 64, 64: an embedding 1, 256, 64, 64, fp16."""
        assert self.tail is not None
        return self.tail(features.float()).half().cpu()

    def understood(self, prompt: Prompt) -> Prompt:
        """Return `prompt` with its phrase as a name that was trained, or without.

        A word for a part of something ("wheel") that is no such name is taken as what it says of granularity: the level
        `PART`, unless the prompt has one, also where it says of what ("wheel of the bus"); words before a name ("red
        traffic light") leave it that name. Any other phrase that is no name and near none is left out.
        """
        if prompt.phrase is None:
            return prompt
        match = None if self.vocabulary is None else self.vocabulary.match(prompt.phrase)
        if names_part(prompt.phrase) and (match is None or not _asks_for(prompt.phrase, match.name)):
            return replace(prompt, phrase=None, granularity=prompt.granularity or PART)
        return replace(prompt, phrase=None if match is None else match.name)

    def answer(self, image: Tensor, position: Tensor, points: Tensor, phrase: str | None) -> Ladder:
        """Return the ladder of one prompt; arguments as `LadderDecoder.forward`, `phrase` a known name."""
        ladder: Ladder
        if phrase is None:
            ladder = self.level(image, position, points)
            return ladder
        match = None if self.vocabulary is None else self.vocabulary.match(phrase)
        if self.phrase is None or match is None:
            raise ValueError(f"{phrase!r} is no name that adapter {self.id} knows")
        ladder = self.phrase(image, position, points, match.vector.to(image.device)[None])
        return ladder


def _asks_for(phrase: str, name: str) -> bool:
    """Return whether a phrase is a name, or ends with it before any "of"; a final s does not matter."""
    cleaned = clean(phrase) or ""
    asked = with_and_without_s(cleaned.partition(" of ")[0])
    return name in with_and_without_s(cleaned) or any(f" {words}".endswith(f" {name}") for words in asked)


def load_ladder(path: Path, base: MaskDecoder, digest: str, tail: Callable[[Moved], Tail]) -> LadderAdapter:
    """Load an adapter file beside `base`.

    Args:
        path: as `model.adapter.write_adapter` wrote it.
        base: the decoder of the base weights; the adapter's lie on its device.
        digest: of the base weights.
        tail: the base's encoder's, as an adapter moves it.

    Raises:
        Refusal: the file cannot be read, or was made for another base or network.
    """
    found = read_adapter(path, base=digest)
    if strange := found.lora.keys() - {LEVEL, PHRASE, ENCODER}:
        raise Refusal(
            f"adapter {path} has a branch {min(strange)}, which this version does not know; upgrade, or train anew"
        )
    try:
        width = int(found.card["phrase_width"])
        level = _decoder(found, base, width, [LEVEL])
        phrase = _decoder(found, base, width, [LEVEL, PHRASE]) if PHRASE in found.lora else None
        vocabulary = _vocabulary(found) if phrase is not None else None
        moved = moved_by(found)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"adapter {path} does not fit the light family ({error}); train it anew") from error
    try:
        moving = None if moved is None else tail(moved)
    except (ImportError, OSError, RuntimeError, SafetensorError) as error:
        raise Refusal(
            f"the encoder's tail cannot be made ready for adapter {path} ({error}); see that the weights file and "
            "the folder of compiled networks can be read and written, then restart"
        ) from error
    if phrase is not None:
        for name, part in level.named_children():
            if name != "transformer":
                setattr(phrase, name, part)  # the same tensors: held once
    name = f"{path.stem}-{digest_of_file(path)[:8]}"
    return LadderAdapter(name, level, phrase, vocabulary, moving)


def _decoder(found: AdapterFile, base: MaskDecoder, width: int, branches: list[str]) -> LadderDecoder:
    ladder = LadderDecoder(base, width)
    state = ladder.state_dict()
    unknown = found.plain.keys() - state.keys() - {VOCABULARY}
    if unknown:
        raise Refusal(f"the adapter holds {sorted(unknown)[0]}, which the ladder decoder has not")
    lacking = {name for name in state if not name.startswith(_OF_BASE)} - found.plain.keys()
    if lacking:
        raise Refusal(f"the adapter lacks {sorted(lacking)[0]}, without which the ladder decoder is untrained")
    ladder.load_state_dict({k: v for k, v in found.plain.items() if k != VOCABULARY}, strict=False)
    weights = dict(ladder.transformer.named_parameters())
    with torch.no_grad():
        for name, delta in found.deltas(branches).items():
            if weights[name].shape != delta.shape:
                raise Refusal(f"the adapter's {name} has shape {tuple(delta.shape)}, not {tuple(weights[name].shape)}")
            weights[name].add_(delta.to(weights[name].device))
    return ladder.eval().requires_grad_(False)


def _vocabulary(found: AdapterFile) -> Vocabulary:
    encoder = load_phrase_encoder(found.card["phrase_encoder"])
    threshold = float(found.card["phrase_threshold"])
    if encoder.name == MINILM and threshold == _EARLIER_THRESHOLD:
        threshold = THRESHOLD
    return Vocabulary(found.card["vocabulary"], encoder, threshold, vectors=found.plain.get(VOCABULARY))
