"""What every model family offers, and the ways to ask it: replay a prompt's clicks, or take all levels of the first.

A family encodes an image once, then takes one step per click; what a step leaves behind is its state. Callers carry
`Encoded` and states about, and only the family looks into them. A prompt is replayed from its first click, so the
answer depends on image, prompt and weights alone; a memo of earlier states only makes it sooner.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from torch import Tensor

from model.geometry import FloatMap
from model.types import Granularity, Prediction, Prompt, Refusal, RGBImage

BUNDLED = Path(__file__).resolve().parent / "weights" / "light.safetensors"
"""Base weights that ship with the code, of the family `light`."""
BUNDLED_ADAPTER = BUNDLED.with_name("light-granularity.safetensors")
"""The granularity adapter that ships with them."""

Device = Literal["auto", "cpu", "cuda"]
EncoderChoice = Literal["auto", "fast", "exact"]
State = Any  # belongs to the family


class Memo(Protocol):
    """States of one image by prompt; a dict is one, and one that forgets will do."""

    def get(self, prompt: Prompt, /) -> State | None:
        """Return the state kept for `prompt`, or None."""

    def __setitem__(self, prompt: Prompt, state: State, /) -> None:
        """Keep a state."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An image as its family's encoder left it; immutable, shared between threads."""

    tensors: dict[str, Tensor]
    height: int  # of the source image
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory the tensors take."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Segmenter(Protocol):
    """A model family with its weights loaded; safe to call from many threads."""

    @property
    def version(self) -> str:
        """Family and digest of the base weights, such as light-1a2b3c4d."""

    @property
    def encoding(self) -> str:
        """Names how images are encoded; embeddings of another `encoding` are not interchangeable."""

    @property
    def adapter(self) -> str | None:
        """Name and digest of the adapter, such as light-granularity-1a2b3c4d; None: base weights alone."""

    def with_adapter(self, adapter: Path | None) -> Self:
        """Return a segmenter with another adapter, or none; it shares the base weights and this one stays as it is.

        Raises:
            Refusal: the file is missing, damaged, or fits another base.
        """

    def understood(self, prompt: Prompt) -> Prompt:
        """Return the part of `prompt` that decides the answer: what this segmenter cannot use is taken out."""

    def encode(self, image: RGBImage) -> Encoded:
        """Return what all clicks on `image` (uint8 H, W, 3) share."""

    def step(self, encoded: Encoded, prompt: Prompt, state: State | None) -> State:
        """Return the state after the last click of `prompt`, given the state before it (None: it is the first)."""

    def render(self, encoded: Encoded, prompt: Prompt, state: State, *, proposals: int = 1) -> Prediction:
        """Return the answer that `state` holds, masks at the image's size, at most `proposals` of them."""

    def probability(self, encoded: Encoded, prompt: Prompt, state: State) -> FloatMap:
        """Return the probability of each pixel to be in the mask that answers `prompt`, H, W in [0, 1]."""


def predict(
    segmenter: Segmenter, encoded: Encoded, prompt: Prompt, *, memo: Memo | None = None, proposals: int = 1
) -> Prediction:
    """Return the answer to `prompt`: each click a step, the last one rendered.

    With an adapter, `proposals` over 1, one click (or box) and neither level nor phrase, it is the ladder: masks of all
    levels that differ, small to large.

    Args:
        segmenter: the family that encoded the image.
        encoded: the image.
        prompt: all clicks so far, or a box, or a box and then clicks.
        memo: states of earlier prompts on this very image, weights and adapter; read and added to.
        proposals: how many masks are wanted at most when neither granularity nor phrase is given.

    Raises:
        Refusal: the prompt names nothing to find.
    """
    prompt = segmenter.understood(prompt)
    open_question = prompt.granularity is None and prompt.phrase is None
    if proposals > 1 and open_question and _is_first(prompt) and segmenter.adapter is not None:
        state = _replay(segmenter, encoded, replace(prompt, granularity=ANY_LEVEL), memo)
    else:
        state = _replay(segmenter, encoded, prompt, memo)
    return segmenter.render(encoded, prompt, state, proposals=proposals)


def probability(segmenter: Segmenter, encoded: Encoded, prompt: Prompt) -> FloatMap:
    """Return how sure the answer to `prompt` is of each pixel: H, W in [0, 1], over 0.5 inside the mask.

    Raises:
        Refusal: the prompt names nothing to find.
    """
    prompt = segmenter.understood(prompt)
    return segmenter.probability(encoded, prompt, _replay(segmenter, encoded, prompt, None))


ANY_LEVEL = Granularity(10)
"""Stands for all levels in a memo's key: the first step serves every one of them."""


def _is_first(prompt: Prompt) -> bool:
    return len(prompt.clicks) + (prompt.box is not None) == 1


def _replay(segmenter: Segmenter, encoded: Encoded, prompt: Prompt, memo: Memo | None) -> State:
    """Return the state after all clicks of an understood prompt."""
    if prompt.box is None and not any(click.positive for click in prompt.clicks):
        raise Refusal(
            "nothing says what to segment: click the object first, then Alt+click what to leave out"
            if prompt.clicks
            else "an empty prompt: give a click or a box"
        )
    memo = {} if memo is None else memo
    starts = range(0 if prompt.box is not None else 1, len(prompt.clicks) + 1)
    prefixes = [_memo_key(segmenter, replace(prompt, clicks=prompt.clicks[:n])) for n in starts]
    state, missing = None, []
    for prefix in reversed(prefixes):
        state = memo.get(prefix)
        if state is not None:
            break
        missing.append(prefix)
    for prefix in reversed(missing):
        state = memo[prefix] = segmenter.step(encoded, prefix, state)
    return state


def _memo_key(segmenter: Segmenter, prompt: Prompt) -> Prompt:
    """The first step has no earlier answer to choose by granularity, so its state serves every level."""
    if not _is_first(prompt):
        return prompt
    learned = segmenter.adapter is not None and prompt.granularity is not None
    return replace(prompt, granularity=ANY_LEVEL if learned else None)


def load_segmenter(
    family: str,
    weights: Path,
    *,
    adapter: Path | None = None,
    device: Device = "auto",
    encoder: EncoderChoice = "auto",
    threads: int = 0,
    compiled: Path | None = None,
) -> Segmenter:
    """Load a family's weights from a safetensors file, strictly.

    Args:
        family: `light`.
        weights: the file of its base weights.
        adapter: the file of a granularity adapter; None: the base alone, whose levels choose by rank of area.
        device: `auto` takes CUDA where there is one.
        encoder: `fast` compiles the image encoder for this CPU, `exact` runs it in torch fp32, `auto` is fast where
            that works.
        threads: CPU threads of one run; 0: one per core.
        compiled: folder to keep the compiled encoder in; None: compiled anew at each start.

    Raises:
        Refusal: the family is unknown, or the file is missing, damaged or of another network.
    """
    if family == "light":
        from model.light.segmenter import LightSegmenter

        segmenter = LightSegmenter.load(weights, device=device, encoder=encoder, threads=threads, compiled=compiled)
        return segmenter if adapter is None else segmenter.with_adapter(adapter)
    raise Refusal(f"model family {family!r} is unknown; this version has: light")


def version_of(family: str, weights: Path) -> str:
    """Return the version that the loaded segmenter will have, without loading it.

    Raises:
        Refusal: the file cannot be read.
    """
    return f"{family}-{digest_of(read_weights(weights))[:8]}"


def read_weights(weights: Path) -> bytes:
    """Return the bytes of a weights file.

    Raises:
        Refusal: it cannot be read.
    """
    try:
        return weights.read_bytes()
    except OSError as error:
        raise Refusal(f"weights {weights} cannot be read ({error}); restore the file from the repository") from error


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of `data` in hex: how base weights are known."""
    return hashlib.sha256(data).hexdigest()
