"""What every model family offers, and the one way to ask it: replay a prompt's clicks.

A family encodes an image once, then takes one step per click; what a step leaves behind is its state. Callers carry
`Encoded` and states about, and only the family looks into them. A prompt is replayed from its first click, so the
answer depends on image, prompt and weights alone; a memo of earlier states only makes it sooner.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from model.types import Prediction, Prompt, Refusal, RGBImage

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

    def encode(self, image: RGBImage) -> Encoded:
        """Return what all clicks on `image` (uint8 H, W, 3) share."""

    def step(self, encoded: Encoded, prompt: Prompt, state: State | None) -> State:
        """Return the state after the last click of `prompt`, given the state before it (None: it is the first)."""

    def render(self, encoded: Encoded, prompt: Prompt, state: State, *, proposals: int = 1) -> Prediction:
        """Return the answer that `state` holds, masks at the image's size, at most `proposals` of them."""


def predict(
    segmenter: Segmenter, encoded: Encoded, prompt: Prompt, *, memo: Memo | None = None, proposals: int = 1
) -> Prediction:
    """Return the answer to `prompt`: each click a step, the last one rendered.

    Args:
        segmenter: the family that encoded the image.
        encoded: the image.
        prompt: all clicks so far, or a box, or a box and then clicks.
        memo: states of earlier prompts on this very image, weights and adapter; read and added to.
        proposals: how many masks are wanted when no granularity is given.

    Raises:
        Refusal: the prompt names nothing to find.
    """
    if prompt.box is None and not any(click.positive for click in prompt.clicks):
        raise Refusal(
            "nothing says what to segment: click the object first, then Alt+click what to leave out"
            if prompt.clicks
            else "an empty prompt: give a click or a box"
        )
    memo = {} if memo is None else memo
    starts = range(0 if prompt.box is not None else 1, len(prompt.clicks) + 1)
    prefixes = [_memo_key(replace(prompt, clicks=prompt.clicks[:n])) for n in starts]
    state, missing = None, []
    for prefix in reversed(prefixes):
        state = memo.get(prefix)
        if state is not None:
            break
        missing.append(prefix)
    for prefix in reversed(missing):
        state = memo[prefix] = segmenter.step(encoded, prefix, state)
    return segmenter.render(encoded, prompt, state, proposals=proposals)


def _memo_key(prompt: Prompt) -> Prompt:
    """The first step has no earlier answer to choose by granularity, so its state serves every level."""
    first = len(prompt.clicks) + (prompt.box is not None) == 1
    prompt = replace(prompt, phrase=None)  # no family understands phrases yet
    return replace(prompt, granularity=None) if first else prompt


def load_segmenter(
    family: str,
    weights: Path,
    *,
    device: Device = "auto",
    encoder: EncoderChoice = "auto",
    threads: int = 0,
    compiled: Path | None = None,
) -> Segmenter:
    """Load a family's weights from a safetensors file, strictly.

    Args:
        family: `light`.
        weights: the file of its base weights.
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

        return LightSegmenter.load(weights, device=device, encoder=encoder, threads=threads, compiled=compiled)
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
