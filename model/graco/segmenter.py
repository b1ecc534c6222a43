"""The `graco` family as a `Segmenter`: SimpleClick's network steered by GraCo's adapter, one pass per click.

Each click the network looks again, at a focus around what it has found so far (RITM: zoom-in), with its previous
answer as an input; the answers to the image and to its mirror image are averaged. What it finds is exactly what the
published predictor finds, click for click; but that one keeps its state between calls, and here a state is a value.

A prompt with a level or a phrase is answered under the adapter's branch for it, one with neither by the base alone; a
phrase wins over a level, since GraCo's network takes one of the two. Boxes are refused.

Sources: RITM (arXiv 2102.06583), SimpleClick (arXiv 2210.11006), GraCo (arXiv 2405.00587) and its published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.adapter import AdapterFile, read_adapter
from model.geometry import FloatMap, Focus, extent
from model.graco.inputs import WINDOW, Architecture, LowRank, click_disks, normalise, row_of
from model.graco.runtime import Runtime, make_runtime
from model.graco.weights import LEVEL, LEVEL_EMBEDDING, PHRASE, PHRASE_BIAS, PHRASE_WEIGHT, RANK, read_base
from model.segmenter import Device, Encoded, Speed, digest_of_file, pick_device
from model.types import LEVELS, Click, Mask, Prediction, Prompt, Proposal, Refusal, RGBImage

THRESHOLD = 0.5
"""Probability over which a pixel is in the mask."""
_EXPANSION = 1.4  # of the box around the mask, to the focus
_SMALLEST_FOCUS = 200  # pixels
_SAME_FOCUS = 0.5  # a focus stays while it overlaps the one now wanted by so much
_BATCH = 2 * LEVELS  # rows of the largest batch: all levels, each with its mirror image


class Phrases(Protocol):
    """Turns phrases into the vectors that GraCo was trained with."""

    def encode(self, phrases: Sequence[str]) -> Tensor:
        """Return one fp32 row for each phrase: N, 512."""


@dataclass(frozen=True, slots=True, eq=False)
class GracoState:
    """The answer to the clicks so far."""

    focus: Focus
    probability: FloatMap  # of the focus, at the network's size: size, size

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes."""
        return self.probability.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class GracoAdapter:
    """An adapter's tensors as the network takes them."""

    id: str  # file name and digest
    levels: Tensor  # 10, width
    low_rank: dict[str, LowRank]  # branch to its matrices
    projection: tuple[Tensor, Tensor] | None  # of a phrase's vector: width, 512 and width


class GracoSegmenter:
    """SimpleClick's ViT and GraCo's adapter; see `model.segmenter.Segmenter` for what the methods mean."""

    first_step_serves_all_levels = False
    phrases_are_names = False
    costly_to_encode = False

    def __init__(
        self,
        runtime: Runtime,
        digest: str,
        size: int,
        text: Phrases | None = None,
        adapter: GracoAdapter | None = None,
    ) -> None:
        """Take the network, the digest of its weights, the side of its input, and what answers for phrases and levels.

        Raises:
            Refusal: `size` is none that the network takes.
        """
        window = WINDOW // runtime.architecture.patch * runtime.architecture.patch
        if size < window or size % window:
            raise Refusal(f"an input of {size} pixels does not fit the network's windows; take a multiple of {window}")
        self._runtime = runtime
        self._digest = digest
        self._size = size
        self._text = text
        self._adapter = adapter
        a = runtime.architecture
        self._plain = LowRank(torch.zeros(a.depth, 2, RANK, a.width), torch.zeros(a.depth, 2, a.width, RANK))

    @classmethod
    def load(
        cls,
        weights: Path,
        *,
        device: Device = "auto",
        speed: Speed = "exact",
        size: int = 0,
        threads: int = 0,
        compiled: Path | None = None,
        clip: Path | None = None,
    ) -> Self:
        """Load a base as `ml_backend weights import` keeps it; arguments and errors as `load_segmenter`."""
        if threads:
            torch.set_num_threads(threads)
        digest = digest_of_file(weights)
        runtime = make_runtime(
            weights,
            digest=digest,
            device=pick_device(device),
            speed=speed,
            size=size or read_base(weights, values=False)[1].size,
            threads=threads,
            compiled=compiled,
        )
        text = None
        if clip is not None:
            from model.graco.text import ClipText  # brings a library that few need

            text = ClipText(clip)
        return cls(runtime, digest, size or runtime.architecture.size, text)

    @property
    def version(self) -> str:
        """Family and digest of the base weights."""
        return f"graco-{self._digest[:8]}"

    @property
    def digest(self) -> str:
        """SHA-256 of the base weights' file."""
        return self._digest

    @property
    def architecture(self) -> Architecture:
        """The sizes of the network."""
        return self._runtime.architecture

    @property
    def encoding(self) -> str:
        """Images are kept as they are, whatever the weights."""
        return "graco-pixels"

    @property
    def runtime(self) -> str:
        """Name of what runs the network, such as openvino-fp32."""
        return self._runtime.name

    @property
    def adapter(self) -> str | None:
        """Name and digest of the adapter."""
        return None if self._adapter is None else self._adapter.id

    def with_adapter(self, adapter: Path | None) -> Self:
        """Return a segmenter with another adapter; it shares everything else."""
        found = None if adapter is None else _load_adapter(adapter, self._digest, self.architecture)
        return type(self)(self._runtime, self._digest, self._size, self._text, found)

    def understood(self, prompt: Prompt) -> Prompt:
        """Return `prompt` with a phrase or else a level, if the adapter has a branch for it.

        Raises:
            Refusal: there is a box; or a phrase, and CLIP's text encoder is not at hand.
        """
        if prompt.box is not None:
            raise Refusal("this model answers clicks, not boxes: click the object; Alt+click what to leave out")
        if self._adapter is None:
            return replace(prompt, granularity=None, phrase=None)
        phrase = (prompt.phrase or "").strip() or None
        if phrase is None or PHRASE not in self._adapter.low_rank:
            return replace(prompt, phrase=None)
        if self._text is None:
            raise Refusal(
                "the phrase cannot be read: CLIP ViT-B/32 is not at hand. Put its weights into the folder "
                "clip of the data directory (docs/checkpoints.md), or leave the phrase empty"
            )
        return replace(prompt, phrase=phrase, granularity=None)

    def encode(self, image: RGBImage) -> Encoded:
        """Return the pixels: the network needs them together with each click."""
        return Encoded({"pixels": torch.from_numpy(np.array(image, np.uint8))}, image.shape[0], image.shape[1])

    def step(self, encoded: Encoded, prompt: Prompt, state: GracoState | None) -> GracoState:
        """Return the network's answer to all clicks of `prompt` in the focus that `state` gives."""
        return self.steps(encoded, [prompt], [state])[0]

    def steps(
        self, encoded: Encoded, prompts: Sequence[Prompt], states: Sequence[GracoState | None]
    ) -> list[GracoState]:
        """Return the states after the last clicks of several prompts on one image, all in one pass.

        The prompts are of one branch: all levels, all phrases, or neither.
        """
        if not prompts:
            return []
        branch = {PHRASE if p.phrase is not None else LEVEL if p.granularity is not None else None for p in prompts}
        if len(branch) > 1:
            raise ValueError("prompts with a level, with a phrase and with neither take a pass each")
        low_rank = self._low_rank(branch.pop())
        found: list[GracoState] = []
        for start in range(0, len(prompts), _BATCH // 2):
            rows = range(start, min(start + _BATCH // 2, len(prompts)))
            looks = [self._look(encoded, prompts[row], states[row]) for row in rows]
            images = torch.stack([half for _, image, _ in looks for half in image])
            maps = torch.stack([half for _, _, seen in looks for half in seen])
            signals = torch.stack([self._signal(prompts[row]) for row in rows]).repeat_interleave(2, 0)
            logits = self._runtime(images, maps, signals, low_rank)[:, 0]  # 2 * rows, size, size
            both = 0.5 * (logits[0::2] + logits[1::2].flip(2))
            found += [GracoState(look[0], p.numpy().copy()) for look, p in zip(looks, both.sigmoid(), strict=True)]
        return found

    def _look(
        self, encoded: Encoded, prompt: Prompt, state: GracoState | None
    ) -> tuple[Focus, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the focus, and what the network sees of it: pixels and maps, each as they are and mirrored."""
        clicks = _pixels_of(prompt.clicks, encoded)
        previous = None if state is None else _paste(state, encoded)
        focus = _next_focus(previous, clicks, encoded, None if state is None else state.focus)
        image = normalise(_sampled(encoded.tensors["pixels"][focus.slices], self._size))
        inside = torch.zeros(1, *focus.shape) if previous is None else torch.from_numpy(previous[focus.slices])[None]
        height, width = focus.shape
        moved = [
            (self._size * (row - focus.top) / height, self._size * (column - focus.left) / width, positive)
            for row, column, positive in clicks
        ]
        mirrored = [(row, self._size - column - 1, positive) for row, column, positive in moved]
        earlier = _resize(inside, (self._size, self._size))
        side = self._size
        maps = torch.cat([earlier, click_disks(moved, side, side)])
        flipped = torch.cat([earlier.flip(2), click_disks(mirrored, side, side)])
        return focus, (image, image.flip(2)), (maps, flipped)

    def _low_rank(self, branch: str | None) -> LowRank:
        return self._plain if branch is None or self._adapter is None else self._adapter.low_rank[branch]

    def _signal(self, prompt: Prompt) -> Tensor:
        adapter = self._adapter
        if adapter is None or (prompt.phrase is None and prompt.granularity is None):
            return torch.zeros(self.architecture.width)
        if prompt.granularity is not None:
            return adapter.levels[row_of(prompt.granularity.level)]
        if prompt.phrase is None or self._text is None or adapter.projection is None:
            raise ValueError("a phrase that nothing here can read: give prompts that `understood` has seen")
        return F.linear(self._text.encode([prompt.phrase])[0], *adapter.projection)

    def refine(self, encoded: Encoded, prompt: Prompt, state: GracoState) -> GracoState:
        """Return the answer to a first click as it is: a pass costs as much as encoding."""
        return state

    def foresee(self, encoded: Encoded, prompt: Prompt, state: GracoState) -> None:
        """Return None: each step takes the photo as it is."""

    def render(self, encoded: Encoded, prompt: Prompt, state: GracoState, *, proposals: int = 1) -> Prediction:
        """Return the mask; its score is the IoU that its own probabilities let expect."""
        probability = _paste(state, encoded)
        mask = probability > THRESHOLD
        steered = prompt.granularity is not None or prompt.phrase is not None
        found = Proposal(mask=mask, score=_expected_iou(probability, mask), granularity=prompt.granularity)
        return Prediction(proposals=(found,), adapter=self.adapter if steered else None)

    def base_offers(self, encoded: Encoded, prompt: Prompt, state: GracoState) -> Iterator[Proposal]:
        """Yield the base's one mask; to ask beside the click would be a pass of the whole network each time."""
        yield from self.render(encoded, prompt, state).proposals

    def probability(self, encoded: Encoded, prompt: Prompt, state: GracoState) -> FloatMap:
        """Return the probability map that the mask is cut from."""
        return _paste(state, encoded)


def _load_adapter(path: Path, digest: str, a: Architecture) -> GracoAdapter:
    found = read_adapter(path, base=digest)
    try:
        levels = found.plain[LEVEL_EMBEDDING]
        low_rank = {branch: _low_rank_of(found, branch, a) for branch in found.lora}
        projection = (found.plain[PHRASE_WEIGHT], found.plain[PHRASE_BIAS]) if PHRASE in low_rank else None
        fits = levels.shape == (LEVELS, a.width) and LEVEL in low_rank
    except (KeyError, RuntimeError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"adapter {path} does not fit the graco family ({error}); import or train it anew") from error
    if not fits:
        raise Refusal(f"adapter {path} does not fit {a.name}: its level embedding is {tuple(levels.shape)}")
    name = f"{path.stem}-{digest_of_file(path)[:8]}"
    return GracoAdapter(name, levels, low_rank, projection)


def _low_rank_of(found: AdapterFile, branch: str, a: Architecture) -> LowRank:
    scale = found.card["alpha"] / found.card["rank"]
    if found.card["rank"] > RANK:
        raise Refusal(f"the adapter has rank {found.card['rank']}; this family runs up to {RANK}")
    down, up = torch.zeros(a.depth, 2, RANK, a.width), torch.zeros(a.depth, 2, a.width, RANK)
    for block in range(a.depth):
        for place, part in enumerate(("q_proj", "v_proj")):
            name = f"backbone.blocks.{block}.attn.{part}"
            first, second = (found.lora[branch][f"{name}.lora_{side}.weight"] for side in "AB")
            down[block, place, : first.shape[0]] = first
            up[block, place, :, : second.shape[1]] = scale * second
    return LowRank(down, up)


def _pixels_of(clicks: Sequence[Click], encoded: Encoded) -> list[tuple[int, int, bool]]:
    """Return row and column of the pixel under each click, the nearest of the image."""
    return [
        (
            min(max(int(np.floor(click.y)), 0), encoded.height - 1),
            min(max(int(np.floor(click.x)), 0), encoded.width - 1),
            click.positive,
        )
        for click in clicks
    ]


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps C, H, W at another size, bilinear, corners on corners."""
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=True)[0]


def _sampled(pixels: Tensor, size: int) -> Tensor:
    """Return pixels H, W, 3 of 0 .. 255 as `_resize` gives them, 3, size, size in [0, 1], reading only those it needs.

    All of a large photo in float32 would take more memory than the network.
    """
    (top, bottom, down), (left, right, across) = (_neighbours(length, size) for length in pixels.shape[:2])
    above, below = (
        [row[:, column].permute(2, 0, 1).float() / 255 for column in (left, right)]
        for row in (pixels[top], pixels[bottom])
    )
    upper, lower = torch.lerp(above[0], above[1], across), torch.lerp(below[0], below[1], across)
    return torch.lerp(upper, lower, down[:, None])


def _neighbours(length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixels before and after each of `size` places along `length` pixels, and how near the second is."""
    places = torch.arange(size, dtype=torch.float32) * ((length - 1) / (size - 1))
    before = places.long().clamp(max=length - 1)
    return before, (before + 1).clamp(max=length - 1), places - before


def _paste(state: GracoState, encoded: Encoded) -> FloatMap:
    """Return the probability map of the whole image: zero outside the focus."""
    whole = np.zeros((encoded.height, encoded.width), np.float32)
    whole[state.focus.slices] = _resize(torch.from_numpy(state.probability)[None], state.focus.shape)[0].numpy()
    return whole


def _next_focus(
    previous: FloatMap | None, clicks: Sequence[tuple[int, int, bool]], encoded: Encoded, old: Focus | None
) -> Focus:
    """Return where to look: as before, unless a positive click or the mask itself has left that box."""
    wanted = Focus(0, encoded.height - 1, 0, encoded.width - 1)
    if previous is not None and (mask := previous > THRESHOLD).any():
        wanted = _around(mask, clicks)
    if old is None or any(positive and not old.holds(row, column) for row, column, positive in clicks):
        return wanted
    return wanted if wanted.overlap(old) < _SAME_FOCUS else old


def _around(mask: Mask, clicks: Sequence[tuple[int, int, bool]]) -> Focus:
    """Return the box around a mask and the positive clicks, widened, inside the image."""
    rows, columns = extent(mask)
    kept = [(row, column) for row, column, positive in clicks if positive]
    top, bottom = _widened([rows.start, rows.stop - 1, *(row for row, _ in kept)], mask.shape[0])
    left, right = _widened([columns.start, columns.stop - 1, *(column for _, column in kept)], mask.shape[1])
    return Focus(top, bottom, left, right)


def _widened(places: Sequence[int], size: int) -> tuple[int, int]:
    first, last = min(places), max(places)
    middle, length = 0.5 * (first + last), max(_EXPANSION * (last - first + 1), _SMALLEST_FOCUS)
    return max(0, round(middle - 0.5 * length)), min(size - 1, round(middle + 0.5 * length))


def _expected_iou(probability: FloatMap, mask: Mask) -> float:
    """Return the IoU of a mask with an object whose pixels are drawn by `probability`: E[intersection] / E[union]."""
    inside = float(probability[mask].sum())
    union = float(np.count_nonzero(mask)) + float(probability.sum()) - inside
    return inside / union if union > 0 else 0.0
