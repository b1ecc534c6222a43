"""The `light` family as a `Segmenter`: one encoder run per image, one decoder pass per click.

With an adapter a prompt with a level or a phrase goes to the ladder decoder, whose pass answers all ten levels and, by
interpolating them, the shares between (`model.light.ladder.place_of`). A first click is refined
(`model.light.refining`), from the fourth on small things are looked at more closely (`model.light.focus`), and what is
shown after several obeys all of them (`model.light.obeying`). A prompt with neither goes to the base's decoder, as if
there were no adapter. Without an adapter a level chooses among the base's three masks (tokens 1-3) by rank of area:
levels 1-3 the smallest, 4-7 the middle, 8-10 the largest.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from model.geometry import Fit, FloatMap, Focus, clip_box
from model.light import focus, obeying, refining
from model.light.adapter import LadderAdapter, load_ladder
from model.light.encoder import EncoderRuntime, make_encoder
from model.light.focus import Look
from model.light.ladder import at_place, cells, fill_square, growing, place_of, placed
from model.light.network import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    GRID,
    LOW_RES,
    POINT_NEGATIVE,
    POINT_PADDING,
    POINT_POSITIVE,
    SIDE,
    MaskDecoder,
    PromptEncoder,
)
from model.light.weights import MASK_DECODER, PROMPT_ENCODER, load_part
from model.segmenter import Device, Encoded, EncoderChoice, differing, digest_of, pick_device, read_weights
from model.types import LEVELS, Box, Click, Granularity, Mask, Prediction, Prompt, Proposal, Refusal, RGBImage

log = logging.getLogger(__name__)

_DECODING = threading.Lock()  # passes side by side on the same cores take longer each and gain nothing
_MEAN = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1)
_STD = torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1)
_SINGLE, _MULTI = 0, (1, 2, 3)  # mask tokens
_FIRST_WITH_BASE = (
    3  # click from which on the base has a say in wholes: where outlines are fine it is the better one then
)
_WHOLE = Granularity(LEVELS)
_EIGHT = np.arange(8) * (np.pi / 4)
_RING = 0.04 * np.stack([np.cos(_EIGHT), np.sin(_EIGHT)], axis=1)
"""Where the base is asked beside a click: 8, 2, x and y as shares of the image's long side."""
_TRUE_PER_SCORE = 0.82, -0.22
"""Slope and start of the IoU with the nearest true mask over the base's score, fitted on clothing's `train` photos."""
_RANK_LEVELS = (Granularity(2), Granularity(5), Granularity(10))  # where the three masks stand, small to large


@dataclass(frozen=True, slots=True, eq=False)
class LightState:
    """The base decoder's answer to the clicks so far."""

    logits: npt.NDArray[np.float32]  # 4, 256, 256
    scores: tuple[float, ...]  # expected IoU of each, 0..1
    by_area: tuple[int, ...]  # tokens 1-3, smallest mask first

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes."""
        return self.logits.nbytes

    def answer(self, prompt: Prompt) -> tuple[FloatMap, float]:
        """Return the logits that answer `prompt`, 256, 256, and their score."""
        token = self.token(prompt)
        return self.logits[token], self.scores[token]

    def token(self, prompt: Prompt) -> int:
        """Return the mask token that answers `prompt`."""
        if prompt.granularity is not None:
            return self.by_area[rank_of(prompt.granularity)]
        if len(prompt.clicks) + 2 * (prompt.box is not None) > 1:
            return _SINGLE  # several clicks, or a box, leave little doubt; the single mask is the better one then
        return max(_MULTI, key=lambda token: self.scores[token])


@dataclass(frozen=True, slots=True, eq=False)
class LadderState:
    """The ladder decoder's answer to the clicks so far: levels 1 .. 10, then the phrase's if there was one."""

    logits: npt.NDArray[np.float16]  # 10 or 11, 256, 256, in the square of `look`
    scores: tuple[float, ...]  # expected IoU of each, 0..1
    look: Look
    ahead: Look | None = None  # where the next click is answered, if it is as foreseen
    place: float | None = None  # among the levels, 0 .. 9, of what answers a share of the whole; None: not looked for

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes, with the embeddings of its looks, which later clicks there share."""
        return self.logits.nbytes + sum(look.nbytes for look in self.looks)

    @property
    def looks(self) -> tuple[Look, ...]:
        """What is encoded: where it was answered, and where the next click may be."""
        return (self.look,) if self.ahead is None else (self.look, self.ahead)

    def answer(self, prompt: Prompt) -> tuple[FloatMap, float]:
        """Return the logits, 256, 256, and the score of its level or share, else of the phrase."""
        if (place := self.place_for(prompt)) is not None:
            return at_place(self.logits, place), float(np.interp(place, np.arange(LEVELS), self.scores[:LEVELS]))
        return self.at(LEVELS if prompt.granularity is None else prompt.granularity.level - 1)

    def at(self, index: int) -> tuple[FloatMap, float]:
        """Return the logits, 256, 256, and the score of a level, 0 .. 9, or of the phrase, 10."""
        return np.asarray(self.logits[index], np.float32), self.scores[index]

    def settled(self, prompt: Prompt) -> LadderState:
        """Return the state with the place of what answers `prompt`, if that asks for a share."""
        return replace(self, place=self.place_for(prompt))

    def place_for(self, prompt: Prompt) -> float | None:
        """Return where among the levels, 0 .. 9, what answers `prompt` lies if that asks for a share, else None.

        It is looked for once something says what is meant, and kept from then on.
        """
        if prompt.granularity is None or prompt.granularity.share is None or self.place is not None:
            return self.place
        if prompt.box is None and not any(click.positive for click in prompt.clicks):
            return None
        height, width = focus.filled(self.look.fit)
        held = None
        if self.look.embedding is None and prompt.clicks and prompt.clicks[0].positive:
            held = refining.logit_at(prompt.clicks[0], self.look.fit)
        return place_of(self.logits[:LEVELS, :height, :width], prompt.granularity.share, click=held)

    def ladder(self) -> list[int]:
        """Return the levels (0 .. 9) whose masks differ, best score first; of those alike the best stands for all."""
        height, width = focus.filled(self.look.fit)
        masks = self.logits[:LEVELS, :height, :width] > 0
        by_score = sorted(range(LEVELS), key=lambda level: -self.scores[level])
        return differing([(level, masks[level]) for level in by_score])


def rank_of(granularity: Granularity) -> int:
    """Return which of three masks, smallest first, a level stands for.

    >>> [rank_of(Granularity(level)) for level in range(1, 11)]
    [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    """
    return (granularity.level > 3) + (granularity.level > 7)


class LightSegmenter:
    """TinyViT + SAM decoder; see `model.segmenter.Segmenter` for what the methods mean."""

    first_step_serves_all_levels = True
    phrases_are_names = True
    costly_to_encode = True

    def __init__(
        self,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        encoder: EncoderRuntime,
        digest: str,
        device: torch.device,
        adapter: LadderAdapter | None = None,
    ) -> None:
        """Take the network's parts in eval mode, on their device, the digest of its weights, and an adapter."""
        self._prompt_encoder = prompt_encoder
        self._mask_decoder = mask_decoder
        self._grid = prompt_encoder.grid_position()
        self._encoder = encoder
        self._digest = digest
        self._device = device
        self._adapter = adapter

    @classmethod
    def load(
        cls,
        weights: Path,
        *,
        device: Device = "auto",
        encoder: EncoderChoice = "auto",
        threads: int = 0,
        compiled: Path | None = None,
    ) -> Self:
        """Load weights and prepare the encoder; arguments and errors as `model.segmenter.load_segmenter`."""
        target = pick_device(device)
        if target.type == "cuda" and device == "auto":
            try:
                return cls._try(weights, encoder, threads, compiled)
            except RuntimeError as error:  # a GPU that torch lists and cannot use, or one that is full
                log.warning("the GPU cannot be used (%s); the CPU is", str(error).splitlines()[0])
                target = torch.device("cpu")
        return cls._load(weights, target, encoder, threads, compiled)

    @classmethod
    def _try(cls, weights: Path, encoder: EncoderChoice, threads: int, compiled: Path | None) -> Self:
        """Load onto the GPU and answer one click there, so that one that does not work is found now."""
        segmenter = cls._load(weights, torch.device("cuda"), encoder, threads, compiled)
        encoded = segmenter.encode(np.zeros((64, 64, 3), np.uint8))
        segmenter.step(encoded, Prompt(clicks=(Click(x=32, y=32, positive=True),)), None)
        return segmenter

    @classmethod
    def _load(
        cls, weights: Path, target: torch.device, encoder: EncoderChoice, threads: int, compiled: Path | None
    ) -> Self:
        data = read_weights(weights)
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise Refusal(f"weights {weights} are damaged ({error}); restore the file from the repository") from error
        try:
            prompt_encoder = load_part(PromptEncoder(), tensors, PROMPT_ENCODER).to(target)
            mask_decoder = load_part(MaskDecoder(), tensors, MASK_DECODER).to(target)
        except Refusal as refusal:
            raise Refusal(f"weights {weights}: {refusal}") from refusal
        if threads:
            torch.set_num_threads(threads)
        digest = digest_of(data)
        runtime = make_encoder(
            weights,
            digest=digest,
            device=target,
            choice=encoder,
            threads=threads,
            compiled=compiled,
        )
        return cls(prompt_encoder, mask_decoder, runtime, digest, target)

    @property
    def version(self) -> str:
        """Family and digest of the base weights."""
        return f"light-{self._digest[:8]}"

    @property
    def digest(self) -> str:
        """SHA-256 of the base weights' file."""
        return self._digest

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The base's prompt encoder, to train beside; frozen."""
        return self._prompt_encoder

    @property
    def mask_decoder(self) -> MaskDecoder:
        """The base's decoder, to begin a training from; frozen."""
        return self._mask_decoder

    def encoder_tail(self) -> nn.Module:
        """Return the tail of the base's encoder by itself, to train; frozen."""
        return self._encoder.plain_tail()

    @property
    def adapter(self) -> str | None:
        """Name and digest of the adapter."""
        return None if self._adapter is None else self._adapter.id

    def with_adapter(self, adapter: Path | None) -> Self:
        """Return a segmenter with another adapter; it shares everything else."""
        ladder = None
        if adapter is not None:
            ladder = load_ladder(adapter, self._mask_decoder, self._digest, self._encoder.tail)
        parts = self._prompt_encoder, self._mask_decoder, self._encoder, self._digest, self._device
        return type(self)(*parts, ladder)

    def understood(self, prompt: Prompt) -> Prompt:
        """Return `prompt` with its phrase as the adapter's vocabulary knows it, or without."""
        return replace(prompt, phrase=None) if self._adapter is None else self._adapter.understood(prompt)

    @property
    def encoding(self) -> str:
        """Weights and runtime of the encoder, and that features and photo are kept beside the embedding."""
        return f"{self.version}-{self._encoder.name}-features-photo"

    def encode(self, image: RGBImage) -> Encoded:
        """Return features and embedding of `image`, fp16 so that a cached one answers alike, and a copy to crop from.

        The features are for adapters that move the encoder's tail.
        """
        fit = Fit(image.shape[0], image.shape[1], SIDE)
        copies: list[Tensor] = []
        copying = threading.Thread(target=lambda: copies.append(focus.kept(image)))  # up to a tenth of a second
        copying.start()
        try:
            seen = self._see(fit.resize(image))
        finally:
            copying.join()
        photo = copies[0] if copies else focus.kept(image)  # where the thread failed, this says why
        return Encoded({**seen, "photo": photo}, fit.height, fit.width)

    def _see(self, resized: RGBImage) -> dict[str, Tensor]:
        """Return what the encoder makes of an image that is resized to its square, fp16.

        These are features 1, 160, 64, 64 and the embedding 1, 256, 64, 64.
        """
        read = torch.from_numpy(resized.copy()).permute(2, 0, 1).float()
        pixels = torch.zeros(1, 3, SIDE, SIDE)
        pixels[0, :, : read.shape[1], : read.shape[2]] = (read - _MEAN) / _STD
        seen = self._encoder(pixels)
        kept = {"features": seen.features, "embedding": seen.embedding}
        return {name: value.half().cpu().contiguous() for name, value in kept.items()}

    def step(
        self, encoded: Encoded, prompt: Prompt, state: LightState | LadderState | None
    ) -> LightState | LadderState:
        """Return the decoder's answer to all clicks of `prompt`, the chosen mask of `state` as its previous mask."""
        if self._adapter is not None and (prompt.granularity is not None or prompt.phrase is not None):
            assert not isinstance(state, LightState)
            return self._climb(self._adapter, encoded, prompt, state)
        return self._base_step(encoded, prompt, None if state is None else _logits_of(_before(prompt), state))

    def _base_step(
        self, encoded: Encoded, prompt: Prompt, previous: FloatMap | None, *, padded: bool = True
    ) -> LightState:
        """Return the base's answer to all clicks of `prompt`, given its previous mask.

        Args:
            encoded: the image.
            prompt: what is asked.
            previous: logits 256, 256; None: there is no mask yet.
            padded: read the cells of the square outside the image too, as published; without, it is sooner and a little
                different.
        """
        fit = Fit(encoded.height, encoded.width, SIDE)
        rows, columns = (GRID, GRID) if padded else cells(*fit.resized)
        with _DECODING, torch.inference_mode():
            dense, points = self._asked(prompt, _whole(encoded), previous)
            image = self._on_device(encoded.tensors["embedding"]) + dense
            position = self._grid[..., :rows, :columns]
            logits, scores = self._mask_decoder(image[..., :rows, :columns], position, points)
        values = fill_square(logits)[0].float().cpu().numpy()
        height, width = focus.filled(fit)
        areas = [np.count_nonzero(values[token, :height, :width] > 0) for token in _MULTI]
        return LightState(
            values,
            tuple(float(s) for s in scores[0].clamp(0, 1)),
            tuple(_MULTI[i] for i in np.argsort(areas, kind="stable")),
        )

    def _on_device(self, embedding: Tensor) -> Tensor:
        return embedding.to(self._device).float()

    def _asked(self, prompt: Prompt, seen: Focus, previous: FloatMap | None) -> tuple[Tensor, Tensor]:
        """Return what a decoder reads of a prompt: what is added to the embedding, and the vectors of its points."""
        xy, kinds = _points(prompt, seen)
        before = None if previous is None else torch.from_numpy(previous).to(self._device)[None, None]
        points = self._prompt_encoder.points(xy.to(self._device), kinds.to(self._device))
        return self._prompt_encoder.dense(before), points

    def steps(
        self, encoded: Encoded, prompts: Sequence[Prompt], states: Sequence[LightState | LadderState | None]
    ) -> list[LightState | LadderState]:
        """Return the states after the last clicks of several prompts, one by one: a pass is cheap."""
        return [self.step(encoded, prompt, state) for prompt, state in zip(prompts, states, strict=True)]

    def _climb(
        self, adapter: LadderAdapter, encoded: Encoded, prompt: Prompt, state: LadderState | None
    ) -> LadderState:
        """Return the ladder's answer to all clicks of `prompt`."""
        count = len(prompt.clicks)
        look, previous, place = Look(_whole(encoded)), None, None
        if state is not None:
            state = state.settled(_before(prompt))
            look, previous, place = state.look, _logits_of(_before(prompt), state), state.place
            if count >= focus.FIRST_CLICK:
                look = self._next_look(adapter, encoded, prompt, previous, state)
            if look is not state.look:
                previous = focus.moved(previous, state.look, look)
        if look.embedding is not None:  # what lies outside a focus is left out already
            inside = (click for click in prompt.clicks if click.positive or look.focus.covers(click.x, click.y))
            prompt = replace(prompt, clicks=tuple(inside))
        whole = prompt.granularity == _WHOLE or place == LEVELS - 1
        with_base = whole and prompt.phrase is None and count >= _FIRST_WITH_BASE
        return replace(self._pass(adapter, encoded, prompt, look, previous, with_base=with_base), place=place)

    def _pass(
        self,
        adapter: LadderAdapter,
        encoded: Encoded,
        prompt: Prompt,
        look: Look,
        previous: FloatMap | None,
        *,
        within: tuple[slice, slice] | None = None,
        with_base: bool = False,
    ) -> LadderState:
        """Return what one pass of the ladder answers.

        Args:
            adapter: answers.
            encoded: the image.
            prompt: what is asked.
            look: what is seen of the image.
            previous: logits 256, 256 in the square of `look`; None: there is no mask yet.
            within: rows and columns of the cells that are read, the fewer the sooner; what lies around them is outside.
                None: all that hold something of the image.
            with_base: whether the base has a say in the whole.
        """
        rows, columns = cells(*look.fit.resized)
        if look.embedding is None:
            plain, seen = encoded.tensors["embedding"], adapter.sees(encoded)
        else:
            plain, seen = look.embedding, look.embedding if look.adapted is None else look.adapted
        with _DECODING, torch.inference_mode():
            dense, points = self._asked(prompt, look.focus, previous)
            image = self._on_device(seen) + dense
            read = (..., *((slice(rows), slice(columns)) if within is None else within))
            ladder = adapter.answer(image[read], self._grid[read], points, prompt.phrase)
            answers = ladder.logits.float()
            if within is not None:
                answers = placed(answers, within, rows, columns)
            if previous is None:
                answers[:, :LEVELS] = growing(answers[:, :LEVELS])
            if with_base:  # the score stays the ladder's, which is calibrated
                single = self._mask_decoder(self._on_device(plain) + dense, self._grid, points)[0][:, _SINGLE]
                height, width = answers.shape[-2:]
                answers[:, LEVELS - 1] = (answers[:, LEVELS - 1] + single[:, :height, :width]) / 2
            logits = fill_square(answers)[0].half().cpu().numpy()
        return LadderState(logits, tuple(float(s) for s in ladder.scores[0].sigmoid()), look)

    def refine(self, encoded: Encoded, prompt: Prompt, state: LightState | LadderState) -> LightState | LadderState:
        """Return the ladder's answer to a first click with the middle and the box of what `state` found.

        Its scores stay those of `state`, which are calibrated: beside a box the network is too sure of itself. Where
        the click is no longer in the mask, it is `state`.
        """
        adapter = self._adapter
        if adapter is None or isinstance(state, LightState) or not prompt.clicks or not prompt.clicks[0].positive:
            return state
        look, refined = state.look, state.settled(prompt)
        found = _found(prompt, refined)
        if found.any() and (middle := refining.middle(found, prompt.clicks[0], look.fit)) is not None:
            centred = replace(prompt, clicks=(*prompt.clicks, middle))
            refined = self._pass(adapter, encoded, centred, look, None).settled(prompt)
            found = _found(prompt, refined)
        if not found.any():
            return state
        (left, top), (right, bottom) = focus.corners_of(found, look.fit).tolist()
        boxed = replace(prompt, box=Box(left=left, top=top, right=right, bottom=bottom))
        within, place = refining.around(found), refined.place
        refined = self._pass(adapter, encoded, boxed, look, _logits_of(prompt, refined), within=within)
        refined = replace(refined, place=place)
        row, column = refining.logit_at(prompt.clicks[0], look.fit)
        if not _logits_of(prompt, refined)[row, column] > 0:
            return state
        return replace(refined, scores=state.scores)

    def foresee(
        self, encoded: Encoded, prompt: Prompt, state: LightState | LadderState
    ) -> Callable[[], LadderState] | None:
        """Return what encodes the focus of the next click, as it is if that click adds nothing to look at."""
        adapter = self._adapter
        if adapter is None or not isinstance(state, LadderState) or len(prompt.clicks) + 1 < focus.FIRST_CLICK:
            return None
        wanted = self._wanted(encoded, prompt, _logits_of(prompt, state), state.look)
        if wanted == _whole(encoded) or any(look.focus == wanted for look in state.looks):
            return None
        return lambda: replace(state, ahead=self._look_at(adapter, encoded, wanted))

    def _next_look(
        self, adapter: LadderAdapter, encoded: Encoded, prompt: Prompt, found: FloatMap, last: LadderState
    ) -> Look:
        """Return where the last click of `prompt` is answered, encoding it if it was not encoded before.

        Args:
            adapter: sees it.
            encoded: the image.
            prompt: all clicks so far.
            found: logits that answered all but the last, 256, 256.
            last: the state that they are of.
        """
        wanted = self._wanted(encoded, prompt, found, last.look)
        for look in last.looks:
            if look.focus == wanted:
                return look
        return Look(wanted) if wanted == _whole(encoded) else self._look_at(adapter, encoded, wanted)

    def _wanted(self, encoded: Encoded, prompt: Prompt, found: FloatMap, last: Look) -> Focus:
        """Return where to look after what was found in the square of `last`, whether it is encoded or not."""
        places = [(click.x, click.y) for click in prompt.clicks if click.positive]
        if prompt.box is not None:
            places += [(prompt.box.left, prompt.box.top), (prompt.box.right, prompt.box.bottom)]
        return focus.next_focus(found, last, places, _whole(encoded))

    def _look_at(self, adapter: LadderAdapter, encoded: Encoded, wanted: Focus) -> Look:
        """Return the look at a focus, which is encoded now."""
        seen = self._see(focus.seen_in(encoded.tensors["photo"], wanted, encoded.height, encoded.width))
        adapted = None if adapter.tail is None else adapter.moved(seen["features"])
        return Look(wanted, seen["embedding"], adapted)

    def render(
        self, encoded: Encoded, prompt: Prompt, state: LightState | LadderState, *, proposals: int = 1
    ) -> Prediction:
        """Return the chosen mask; with no level perhaps several, best first: the ladder's, or the base's."""
        shown: list[tuple[FloatMap, float, Granularity | None]]  # logits, score, where it stands
        open_question = prompt.granularity is None and prompt.phrase is None
        if isinstance(state, LadderState) and open_question:
            levels = (state.ladder() or [LEVELS - 1])[:proposals]
            shown = [(*state.at(level), Granularity(level + 1)) for level in levels]
        elif (
            isinstance(state, LightState)
            and proposals > 1
            and prompt.granularity is None
            and state.token(prompt) != _SINGLE
        ):
            ranks = dict(zip(state.by_area, _RANK_LEVELS, strict=True))
            ranked = sorted(_MULTI, key=lambda token: -state.scores[token])
            shown = [(state.logits[token], state.scores[token], ranks[token]) for token in ranked[:proposals]]
        else:
            shown = [(*_answer_of(prompt, state), prompt.granularity)]
        found = [
            Proposal(mask=_map_of(encoded, state, logits) > 0, score=score, granularity=granularity)
            for logits, score, granularity in shown
        ]
        return Prediction(
            proposals=tuple(found),
            adapter=self.adapter if isinstance(state, LadderState) else None,
        )

    def base_offers(self, encoded: Encoded, prompt: Prompt, state: LightState) -> Iterator[Proposal]:
        """Yield the base's three masks of a click, then what it finds at eight places around; of a box, its mask."""
        here = self.render(encoded, prompt, state, proposals=len(_MULTI)).proposals
        if not prompt.clicks:
            yield from here
            return
        slope, start = _TRUE_PER_SCORE
        for one in itertools.chain(here, self._beside(encoded, prompt.clicks[0])):
            yield replace(one, score=float(np.clip(slope * one.score + start, 0, 1)), granularity=None)

    def _beside(self, encoded: Encoded, click: Click) -> Iterator[Proposal]:
        """Yield the base's masks of clicks around `click` that hold it and differ, best score first: eight passes."""
        fit = Fit(encoded.height, encoded.width, SIDE)
        place, edge = np.array([click.x, click.y]), np.array([encoded.width, encoded.height]) - 0.5
        around = (place + _RING * max(encoded.height, encoded.width)).clip(0.5, edge)
        states = []
        for x, y in dict.fromkeys(map(tuple, around.tolist())):  # at a corner some are one
            beside = Prompt(clicks=(Click(x=x, y=y, positive=True),))
            states.append(self._base_step(encoded, beside, None, padded=False))
        ranked = [(state, token) for state in states for token in _MULTI]
        ranked.sort(key=lambda one: -one[0].scores[one[1]])
        height, width = focus.filled(fit)
        column, row = (fit.to_square(place[None])[0] * (LOW_RES / SIDE)).astype(int).clip(0, (width - 1, height - 1))
        masks = ((one, one[0].logits[one[1], :height, :width] > 0) for one in ranked)
        pixel = min(int(click.y), encoded.height - 1), min(int(click.x), encoded.width - 1)
        for state, token in differing((one, mask) for one, mask in masks if mask[row, column]):
            mask = _map_of(encoded, state, state.logits[token]) > 0
            if mask[pixel]:
                yield Proposal(mask=mask, score=state.scores[token])

    def probability(self, encoded: Encoded, prompt: Prompt, state: LightState | LadderState) -> FloatMap:
        """Return the probability map of the chosen mask."""
        logits = _map_of(encoded, state, _answer_of(prompt, state)[0])
        return np.asarray(torch.from_numpy(logits).sigmoid().numpy(), np.float32)


def _whole(encoded: Encoded) -> Focus:
    return Focus(0, encoded.height - 1, 0, encoded.width - 1)


def _found(prompt: Prompt, state: LadderState) -> Mask:
    """Return the mask that answers `prompt`, of the logits that the image fills, without specks."""
    return focus.what_was_found(_logits_of(prompt, state), state.look.fit)


def _logits_of(prompt: Prompt, state: LightState | LadderState) -> FloatMap:
    """Return the logits of the mask that answers `prompt`, 256, 256."""
    return state.answer(prompt)[0]


def _answer_of(prompt: Prompt, state: LightState | LadderState) -> tuple[FloatMap, float]:
    """Return what is shown: the answer's logits, 256, 256, bent to what later clicks of the ladder say, its score."""
    logits, score = state.answer(prompt)
    if isinstance(state, LadderState) and len(prompt.clicks) + (prompt.box is not None) > 1:
        logits = obeying.obeyed(logits, prompt.clicks, state.look)
    return logits, score


def _before(prompt: Prompt) -> Prompt:
    """Return `prompt` without its last click."""
    return replace(prompt, clicks=prompt.clicks[:-1])


def _map_of(encoded: Encoded, state: LightState | LadderState, logits: FloatMap) -> FloatMap:
    """Return logits of a state, 256, 256, at the image's size, H, W."""
    if isinstance(state, LadderState):
        return focus.pasted(logits, state.look, encoded.height, encoded.width)
    return Fit(encoded.height, encoded.width, SIDE).paste_back(logits)


def _points(prompt: Prompt, seen: Focus) -> tuple[Tensor, Tensor]:
    """Return what the prompt encoder reads: points 1, N, 2 of the square of what is seen, and their kinds 1, N."""
    xy = [(click.x, click.y) for click in prompt.clicks]
    kinds = [POINT_POSITIVE if click.positive else POINT_NEGATIVE for click in prompt.clicks]
    if prompt.box is not None:
        box = clip_box(prompt.box, seen.bottom + 1, seen.right + 1)
        xy += [(box.left, box.top), (box.right, box.bottom)]
        kinds += [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]
    places = np.array(xy, dtype=np.float64) - (seen.left, seen.top)
    points = Fit(*seen.shape, SIDE).to_square(places)
    if prompt.box is None:
        points, kinds = np.vstack([points, np.zeros((1, 2), np.float32)]), [*kinds, POINT_PADDING]
    return torch.from_numpy(points)[None], torch.tensor([kinds])
