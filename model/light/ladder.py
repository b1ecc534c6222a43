"""The decoder that obeys a granularity and a phrase: one pass answers all ten levels, finest to whole.

It is the base's mask decoder with more questions: beside its four mask tokens it asks with ten level tokens (the
granularity embeddings) and, where a phrase was given, with a phrase token; LoRA moves Q and V of its attention. Each
level chooses among the base's three masks, photo by photo, and adds something of its own; all read the same features,
so that a whole ladder costs one pass. Cells of the square that lie outside the photo are left out: they hold nothing,
and cost as much as those inside.

Sources: GraCo (arXiv 2405.00587) for ten granularity embeddings and LoRA on Q and V, one branch for each control
signal; Semantic-SAM (arXiv 2307.04767) for all granularities of one click at once; Segment Anything (2304.02643).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.geometry import FloatMap
from model.light.network import CHANNELS, GRID, SIDE, MaskDecoder, Mlp
from model.types import LEVELS

CELL = SIDE // GRID
"""Pixels of the square along one side of a cell of the embedding."""
LOGITS_PER_CELL = 4
"""Rows and columns of logits that one cell of the embedding becomes."""
OUTSIDE = -10.0
"""Logit of a pixel that was not looked at: surely not in the mask, and yet such as the decoder knows."""
_WHOLE_WEIGHT = 20  # of level 1.0 beside each other level, where a ladder is made to grow: the whole hardly moves
_PLACES = np.linspace(0, LEVELS - 1, 4 * (LEVELS - 1) + 1)  # where masks of a share are looked for: quarters of a level
_ASTRAY = 1.0  # levels that a share's mask may lie beside where the share stands among the levels
_LEAST_SHARE = 0.02  # of each of the base's masks in an untrained level's, so that it can still grow


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """Answers of one pass to B prompts on one photo."""

    logits: Tensor  # B, L, 4 * rows, 4 * columns
    scores: Tensor  # B, L logits of the expected IoU


class LadderDecoder(nn.Module):
    """Embedding and prompt vectors to a mask for each level asked for, and one for a phrase."""

    def __init__(self, base: MaskDecoder, phrase_width: int) -> None:
        """Begin as `base` answers: levels 1, 5.5 and 10 are its three masks, those between lie between.

        Args:
            base: the decoder to begin from; copied. The new one is on its device.
            phrase_width: numbers of a phrase's embedding.
        """
        super().__init__()
        tokens = base.mask_tokens.weight.detach()[1:]  # part of a part, part, whole
        mixing = _between(len(tokens)).to(tokens.device)
        self.transformer = copy.deepcopy(base.transformer)
        self.iou_token = copy.deepcopy(base.iou_token)
        self.mask_tokens = copy.deepcopy(base.mask_tokens)
        self.output_upscaling = copy.deepcopy(base.output_upscaling)
        self.heads = nn.ModuleList(copy.deepcopy(head) for head in list(base.output_hypernetworks_mlps)[1:])
        self.levels = _embedding(mixing @ tokens)  # the granularity embeddings, as tokens that ask
        self.leaning = nn.Parameter((mixing + _LEAST_SHARE).log())  # of each level to each of the base's masks
        self.choice = _zero(nn.Linear(CHANNELS, len(tokens)))  # what a level's token adds to that
        self.own_head = Mlp(CHANNELS, CHANNELS, CHANNELS, CHANNELS // 8)
        _zero(self.own_head.layers[-1])
        self.score_head = Mlp(CHANNELS, CHANNELS, CHANNELS, 1)
        self.phrase_token = _embedding(tokens.mean(0, keepdim=True))
        self.phrase_leaning = nn.Parameter(torch.zeros(1, len(tokens)))
        self.phrase_projection = nn.Linear(phrase_width, CHANNELS)
        nn.init.zeros_(self.phrase_projection.bias)
        self.to(tokens.device)

    def forward(self, image: Tensor, image_pe: Tensor, prompt: Tensor, phrase: Tensor | None = None) -> Ladder:
        """Return the answers of all ten levels, and with a phrase an eleventh, the phrase's own.

        Args:
            image: embedding with the previous mask added, B, 256, rows, columns: the cells of the photo only.
            image_pe: positions of those cells, 1, 256, rows, columns.
            prompt: vectors of points and box corners, B, N, 256.
            phrase: embeddings of phrases, of unit length, B, phrase_width.
        """
        rows, columns = image.shape[-2:]
        asked: Tensor = self.levels.weight
        leaning: Tensor = self.leaning
        if phrase is not None:
            asked, leaning = torch.cat([asked, self.phrase_token.weight]), torch.cat([leaning, self.phrase_leaning])
            prompt = torch.cat([prompt, self.phrase_projection(phrase * phrase.shape[-1] ** 0.5)[:, None]], dim=1)
        outputs = torch.cat([self.iou_token.weight, self.mask_tokens.weight, asked]).expand(len(prompt), -1, -1)
        tokens, seen = self.transformer(
            image.flatten(2).transpose(1, 2).contiguous(),
            image_pe.flatten(2).transpose(1, 2).contiguous(),
            torch.cat([outputs, prompt], dim=1),
        )
        first = 1 + len(self.mask_tokens.weight)
        answers = tokens[:, first : first + len(asked)]  # B, L, C
        # the mask of a level: a choice among the base's three masks, and what it adds of its own
        offered = torch.stack([head(tokens[:, 2 + i]) for i, head in enumerate(self.heads)], dim=1)  # B, 3, 32
        chosen = (leaning + self.choice(answers)).softmax(dim=-1)  # B, L, 3
        weights = chosen @ offered + self.own_head(answers)  # B, L, 32
        cells_again = seen.transpose(1, 2).reshape(len(seen), CHANNELS, rows, columns)
        upscaled = self.output_upscaling(cells_again)  # B, 32, 4 * rows, 4 * columns
        logits = (weights @ upscaled.flatten(2)).reshape(*weights.shape[:2], *upscaled.shape[-2:])
        return Ladder(logits, self.score_head(answers)[..., 0])


def _zero(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _embedding(values: Tensor) -> nn.Embedding:
    rows, width = values.shape
    embedding = nn.Embedding(rows, width, device=values.device)
    embedding.weight.data.copy_(values)
    return embedding


def _between(anchors: int) -> Tensor:
    """Return how much of each of `anchors` evenly spread anchors each level is: LEVELS, anchors, rows sum to 1."""
    place = torch.linspace(0, anchors - 1, LEVELS)
    return (1 - (place[:, None] - torch.arange(anchors)).abs()).clamp(min=0)


def cells(height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of the embedding that hold anything of a resized photo of this size in pixels.

    >>> cells(683, 1024)
    (43, 64)
    """
    return -(-height // CELL), -(-width // CELL)


def growing(logits: Tensor) -> Tensor:
    """Return logits of levels, B, L, rows, columns, whose masks do not shrink from one level to the next.

    Of a prompt where one did, each pixel's logits are replaced by the nearest that fall nowhere (least squares; the
    last level counts most).

    Source: the max-min formula of isotonic regression (Robertson, Wright, Dykstra 1988, theorem 1.4.4).
    """
    areas = (logits > 0).sum((-1, -2))
    shrinks = (areas.diff(dim=1) < 0).any(dim=1)
    if not shrinks.any():
        return logits
    grown = logits.clone()
    grown[shrinks] = _isotonic(logits[shrinks])
    return grown


def _isotonic(values: Tensor) -> Tensor:
    """Return the values nearest to `values`, B, L, rows, columns, that fall nowhere along L; the last counts most."""
    count = values.shape[1]
    weights = values.new_ones(count, 1, 1)
    weights[-1] = _WHOLE_WEIGHT
    sums, masses = (F.pad(x.cumsum(dim=-3), (0, 0, 0, 0, 1, 0)) for x in (values * weights, weights))
    fitted = torch.full_like(values, -torch.inf)
    for first in range(count):
        means = (sums[:, first + 1 :] - sums[:, first : first + 1]) / (masses[first + 1 :] - masses[first])
        least = means.flip(1).cummin(dim=1).values.flip(1)  # of first .. each later one
        fitted[:, first:] = torch.maximum(fitted[:, first:], least)
    return fitted


def standing(share: float) -> float:
    """Return where a share of the whole, 0 .. 1, stands among the levels' tenths: 0 the first .. 9 the last.

    >>> standing(0.02), standing(0.25), standing(1.0)
    (0.0, 1.5, 9.0)
    """
    return min(max(share * LEVELS, 1.0), float(LEVELS)) - 1


def at_place(levels: npt.NDArray[np.floating], place: float) -> FloatMap:
    """Return logits at a place among the levels, of their 10, rows, columns: 0 is the first, 9 the last."""
    low = min(int(place), LEVELS - 2)
    first, second = levels[low].astype(np.float32), levels[low + 1].astype(np.float32)
    return np.asarray(first + (second - first) * np.float32(place - low), np.float32)


def place_of(levels: npt.NDArray[np.floating], share: float, *, click: tuple[int, int] | None = None) -> float:
    """Return where among the levels, 0 .. 9, the mask has `share` of the last one's area.

    That is near where the share itself stands among tenths, one level off at most: what a click means at a level is
    learned, and the last level is not always the whole that was meant.

    Args:
        levels: logits of a ladder's levels, 10, rows, columns, of the photo alone.
        share: of the whole, over 0, 1 at most.
        click: row and column of a logit that the mask shall hold, if one does; between masks apart there may be none.
    """
    near = _PLACES[np.abs(_PLACES - standing(share)) <= _ASTRAY]
    masks = [at_place(levels, place) > 0 for place in near]
    areas = np.array([np.count_nonzero(mask) for mask in masks], np.float64)
    misfit = np.abs(np.log((areas + 1) / (np.count_nonzero(levels[LEVELS - 1] > 0) + 1) / share))
    for good in ([click is not None and mask[click] for mask in masks], areas > 0):
        if np.any(good):
            return float(near[np.where(good, misfit, np.inf).argmin()])
    return float(near[misfit.argmin()])


def placed(logits: Tensor, within: tuple[slice, slice], rows: int, columns: int) -> Tensor:
    """Return logits of some cells among those of all the photo, B, L, 4 * rows, 4 * columns; the others are outside.

    Args:
        logits: B, L, 4 rows and columns for each of the cells of `within`.
        within: which cells: their rows and columns.
        rows: of all cells that hold anything of the photo.
        columns: of these.
    """
    down, across = (slice(LOGITS_PER_CELL * s.start, LOGITS_PER_CELL * s.stop) for s in within)
    all_of_them = logits.new_full((*logits.shape[:2], LOGITS_PER_CELL * rows, LOGITS_PER_CELL * columns), OUTSIDE)
    all_of_them[..., down, across] = logits
    return all_of_them


def fill_square(logits: Tensor) -> Tensor:
    """Return logits of the photo's cells, B, L, 4 * rows, 4 * columns, as logits of the square, B, L, 256, 256.

    The last row and column are repeated, so that nothing from outside bends the photo's border.
    """
    side = GRID * LOGITS_PER_CELL
    return F.pad(logits, (0, side - logits.shape[-1], 0, side - logits.shape[-2]), mode="replicate")
