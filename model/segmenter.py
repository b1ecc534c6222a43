"""What every model family offers, and the ways to ask it: replay a prompt's clicks, or take all levels of the first.

A family encodes an image once, then takes one step per click; what a step leaves behind is its state. Callers carry
`Encoded` and states about, and only the family looks into them. A prompt is replayed from its first click, so the
answer depends on image, prompt and weights alone; a memo of earlier states only makes it sooner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.geometry import FloatMap
from model.metrics import iou
from model.types import LEVELS, Granularity, Mask, Prediction, Prompt, Proposal, Refusal, RGBImage

BUNDLED = Path(__file__).resolve().parent / "weights" / "light.safetensors"
"""Base weights that ship with the code, of the family `light`."""
BUNDLED_ADAPTER = BUNDLED.with_name("light-granularity.safetensors")
"""The granularity adapter that ships with them."""

Device = Literal["auto", "cpu", "cuda"]
EncoderChoice = Literal["auto", "fast", "exact"]
Speed = Literal["exact", "fast"]
State = Any  # belongs to the family; its `nbytes` are the memory that keeping it takes

T = TypeVar("T")

_SAME = 0.85  # masks of all levels that agree more than this (IoU) are one
_COMPARED = 1024  # pixels of a mask's long side that are looked at for it; more takes a second for ten large masks


@dataclass(frozen=True, slots=True)
class FirstStep:
    """Where a memo keeps what the first step left, before it is refined; at `ANY_LEVEL` where that serves all."""

    prompt: Prompt


MemoKey = Prompt | FirstStep


class Memo(Protocol):
    """States of one image by prompt; a dict is one, and one that forgets will do."""

    def get(self, key: MemoKey, /) -> State | None:
        """Return the state kept for a key, or None."""

    def __setitem__(self, key: MemoKey, state: State, /) -> None:
        """Keep a state."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
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

    first_step_serves_all_levels: bool
    """Whether the state after the first step is the same for every level."""
    phrases_are_names: bool
    """Whether a phrase, once understood, is one of the names that the adapter was trained on; else it is as typed."""
    costly_to_encode: bool
    """Whether an encoded image is worth a file: it takes longer to make than to read."""

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

    def steps(self, encoded: Encoded, prompts: Sequence[Prompt], states: Sequence[State | None]) -> list[State]:
        """Return the states after the last clicks of several prompts on one image; in one pass if that is sooner."""

    def refine(self, encoded: Encoded, prompt: Prompt, state: State) -> State:
        """Return a better answer to a first click at its level or phrase than `state`, the first step's, or `state`."""

    def foresee(self, encoded: Encoded, prompt: Prompt, state: State) -> Callable[[], State] | None:
        """Return what takes long of the step after `prompt`, to be done while nobody waits; None: nothing does.

        Called, it returns `state` with that made ready. The step gives the same with and without.
        """

    def render(self, encoded: Encoded, prompt: Prompt, state: State, *, proposals: int = 1) -> Prediction:
        """Return the answer that `state` holds, masks at the image's size, at most `proposals` of them."""

    def probability(self, encoded: Encoded, prompt: Prompt, state: State) -> FloatMap:
        """Return the probability of each pixel to be in the mask that answers `prompt`, H, W in [0, 1]."""

    def base_offers(self, encoded: Encoded, prompt: Prompt, state: State) -> Iterator[Proposal]:
        """Yield masks of the base for the first click or box of `prompt`, to be shown among those of all levels.

        First those of that click, then, where a pass of the network is cheap, those that it finds close beside and that
        hold the click; each lot best first, without a level. A click's score is the IoU to expect with the nearest
        thing or part; a box's is the base's own, since a box leaves little doubt. `state` is the base's after `prompt`.
        What nobody asks for is not computed.
        """


def predict(
    segmenter: Segmenter,
    encoded: Encoded,
    prompt: Prompt,
    *,
    memo: Memo | None = None,
    proposals: int = 1,
    refined: bool = True,
) -> Prediction:
    """Return the answer to `prompt`: each click a step, the first one refined, the last one rendered.

    With an adapter, `proposals` over 1, one click (or box) and neither level nor phrase, it is all levels: the masks
    that differ among the ladder's and, without a level, the base's, small to large.

    Args:
        segmenter: the family that encoded the image.
        encoded: the image.
        prompt: all clicks so far, or a box, or a box and then clicks.
        memo: states of earlier prompts on this very image, weights and adapter; read and added to.
        proposals: how many masks are wanted at most when neither granularity nor phrase is given.
        refined: without, a first click is answered by its first step: sooner, where many levels are asked for.

    Raises:
        Refusal: the prompt names nothing to find.
    """
    prompt = segmenter.understood(prompt)
    open_question = prompt.granularity is None and prompt.phrase is None
    if proposals > 1 and open_question and _is_first(prompt) and segmenter.adapter is not None:
        return _all_levels(segmenter, encoded, prompt, {} if memo is None else memo, proposals)
    if _is_first(prompt) and not refined:
        state = _first_step(segmenter, encoded, _clear(prompt), {} if memo is None else memo)
    else:
        state = _replay(segmenter, encoded, prompt, memo)
    return segmenter.render(encoded, prompt, state, proposals=proposals)


def foresee(segmenter: Segmenter, encoded: Encoded, prompt: Prompt, memo: Memo) -> Callable[[], None] | None:
    """Return what takes long of the click after `prompt`, which `memo` holds the answer to; None: nothing does.

    Called, it does that and leaves it in `memo`.
    """
    prompt = segmenter.understood(prompt)
    state = memo.get(prompt)
    make = None if state is None else segmenter.foresee(encoded, prompt, state)
    if make is None:
        return None

    def make_ready() -> None:
        memo[prompt] = make()

    return make_ready


def probability(segmenter: Segmenter, encoded: Encoded, prompt: Prompt) -> FloatMap:
    """Return how sure the answer to `prompt` is of each pixel: H, W in [0, 1], over 0.5 inside the mask.

    Raises:
        Refusal: the prompt names nothing to find.
    """
    prompt = segmenter.understood(prompt)
    return segmenter.probability(encoded, prompt, _replay(segmenter, encoded, prompt, None))


ANY_LEVEL = Granularity(10)
"""Stands for all levels in a memo's key: the first step serves every one of them."""


def _all_levels(segmenter: Segmenter, encoded: Encoded, prompt: Prompt, memo: Memo, proposals: int) -> Prediction:
    """Return the masks of all levels that differ, and of the base's own those that differ from these, small to large.

    The base's bear no level: they are what a level's training gave up, on photos unlike those it saw. It is asked at
    the click and close beside it: where things can be taken apart in several ways, a step to the side takes another.
    """
    if segmenter.first_step_serves_all_levels:
        state = _first_step(segmenter, encoded, _clear(replace(prompt, granularity=ANY_LEVEL)), memo)
        differ = segmenter.render(encoded, prompt, state, proposals=LEVELS).proposals
        asked = [replace(prompt, granularity=one.granularity) for one in differ]
        # what is refined is not kept: a state each would push those of clicks out
        ladder = [segmenter.render(encoded, p, segmenter.refine(encoded, p, state)).best for p in asked]
    else:
        ladder = _passes_of_all_levels(segmenter, encoded, prompt, memo)
    ranked = sorted(ladder, key=lambda one: -one.score)

    def offered() -> Iterator[Proposal]:
        yield from ranked
        yield from segmenter.base_offers(encoded, prompt, _replay(segmenter, encoded, prompt, memo))

    stride = -(-max(encoded.height, encoded.width) // _COMPARED)
    found = differing(((one, one.mask[::stride, ::stride]) for one in offered()), most=proposals) or ranked[:1]
    return Prediction(
        proposals=tuple(sorted(found, key=lambda one: int(np.count_nonzero(one.mask)))),
        adapter=segmenter.adapter,
    )


def _passes_of_all_levels(segmenter: Segmenter, encoded: Encoded, prompt: Prompt, memo: Memo) -> list[Proposal]:
    """Return the mask of each level, where each takes a pass of its own."""
    prompts = [replace(prompt, granularity=Granularity(level)) for level in range(1, LEVELS + 1)]
    # asked once: it may forget them meanwhile
    states: dict[Prompt, State] = {p: memo.get(FirstStep(p)) for p in prompts}
    missing = [p for p, state in states.items() if state is None]
    for p, state in zip(missing, segmenter.steps(encoded, missing, [None] * len(missing)), strict=True):
        states[p] = memo[FirstStep(p)] = state
    return [segmenter.render(encoded, p, state).best for p, state in states.items()]


def differing(masks: Iterable[tuple[T, Mask]], *, most: int | None = None) -> list[T]:
    """Return what belongs to the masks that are not empty and like none before them; no more are looked at than needed.

    Args:
        masks: bool, all of one shape, each with what it belongs to.
        most: how many are wanted at most; None: all.
    """
    kept: list[tuple[T, Mask]] = []
    for key, mask in masks:
        if mask.any() and all(iou(mask, other) <= _SAME for _, other in kept):
            kept.append((key, mask))
            if len(kept) == most:
                break
    return [key for key, _ in kept]


def _is_first(prompt: Prompt) -> bool:
    return len(prompt.clicks) + (prompt.box is not None) == 1


def _clear(prompt: Prompt) -> Prompt:
    """Return a prompt that names something to find, or refuse it."""
    if prompt.box is None and not any(click.positive for click in prompt.clicks):
        raise Refusal(
            "nothing says what to segment: click the object first, then Alt+click what to leave out"
            if prompt.clicks
            else "an empty prompt: give a click or a box"
        )
    return prompt


def _replay(segmenter: Segmenter, encoded: Encoded, prompt: Prompt, memo: Memo | None) -> State:
    """Return the state after all clicks of an understood prompt."""
    memo = {} if memo is None else memo
    starts = range(0 if prompt.box is not None else 1, len(_clear(prompt).clicks) + 1)
    prefixes = [replace(prompt, clicks=prompt.clicks[:n]) for n in starts]
    state, missing = None, []
    for prefix in reversed(prefixes):
        state = memo.get(prefix)
        if state is not None:
            break
        missing.append(prefix)
    for prefix in reversed(missing):
        if state is None:
            first = _first_step(segmenter, encoded, prefix, memo)
            state = segmenter.refine(encoded, prefix, first)
            if state is first:
                continue  # the memo has it
        else:
            state = segmenter.step(encoded, prefix, state)
        memo[prefix] = state
    return state


def _first_step(segmenter: Segmenter, encoded: Encoded, prompt: Prompt, memo: Memo) -> State:
    """Return the state after the first click or box, which may serve every level, as the network left it."""
    key = _first_key(segmenter, prompt)
    state = memo.get(key)
    if state is None:
        state = memo[key] = segmenter.step(encoded, key.prompt, None)
    return state


def _first_key(segmenter: Segmenter, prompt: Prompt) -> FirstStep:
    """Return the key of a first step: with no earlier answer to choose by granularity, it may serve every level."""
    if not segmenter.first_step_serves_all_levels:
        return FirstStep(prompt)
    learned = segmenter.adapter is not None and prompt.granularity is not None
    return FirstStep(replace(prompt, granularity=ANY_LEVEL if learned else None))


def load_segmenter(
    family: str,
    weights: Path,
    *,
    adapter: Path | None = None,
    device: Device = "auto",
    encoder: EncoderChoice = "auto",
    speed: Speed = "exact",
    size: int = 0,
    threads: int = 0,
    compiled: Path | None = None,
    clip: Path | None = None,
) -> Segmenter:
    """Load a family's weights from a safetensors file, strictly.

    Args:
        family: `light`, or `graco`: SimpleClick's network as `ml_backend weights import` keeps it.
        weights: the file of its base weights.
        adapter: the file of a granularity adapter; None: the base alone. Its levels choose by rank of area in `light`,
            and mean nothing in `graco`.
        device: `auto` takes CUDA where there is one.
        encoder: of `light`: `fast` compiles the image encoder for this CPU, `exact` runs it in torch fp32, `auto` is
            fast where that works.
        speed: of `graco`: `exact` answers as the published code does, `fast` in half precision where that is sooner.
        size: of `graco`: side of the network's input in pixels; 0: that of the weights.
        threads: CPU threads of one run; 0: one per core.
        compiled: folder to keep compiled networks in; None: `light` compiles anew at each start, `graco` runs in torch.
        clip: of `graco`: CLIP's weights for phrases; None: phrases are refused.

    Raises:
        Refusal: the family is unknown, or the file is missing, damaged or of another network.
    """
    segmenter: Segmenter
    if family == "light":
        from model.light.segmenter import LightSegmenter

        segmenter = LightSegmenter.load(weights, device=device, encoder=encoder, threads=threads, compiled=compiled)
    elif family == "graco":
        from model.graco.segmenter import GracoSegmenter

        segmenter = GracoSegmenter.load(
            weights, device=device, speed=speed, size=size, threads=threads, compiled=compiled, clip=clip
        )
    else:
        raise Refusal(f"model family {family!r} is unknown; this version has: light, graco")
    return segmenter if adapter is None else segmenter.with_adapter(adapter)


def pick_device(device: Device) -> torch.device:
    """Return the device that a choice means here.

    Raises:
        Refusal: CUDA was asked for, and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal("GRACO_DEVICE=cuda, but torch sees no CUDA device; use auto or cpu, or install a driver")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def read_weights(weights: Path) -> bytes:
    """Return the bytes of a weights file.

    Raises:
        Refusal: it cannot be read.
    """
    try:
        return weights.read_bytes()
    except OSError as error:
        raise _unreadable(weights, error) from error


def _unreadable(weights: Path, error: OSError) -> Refusal:
    return Refusal(f"weights {weights} cannot be read ({error}); restore the file, or import it again")


def digest_of_file(weights: Path) -> str:
    """Return the SHA-256 of a weights file in hex, however large it is.

    Raises:
        Refusal: it cannot be read.
    """
    try:
        with weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(weights, error) from error


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of `data` in hex: how base weights are known."""
    return hashlib.sha256(data).hexdigest()
