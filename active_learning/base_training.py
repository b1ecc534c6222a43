"""The training of the shipped adapter: from a recipe and annotated photos to one adapter file.

Each stage leaves its result in the output folder and is skipped when that is there: proposals, encoded photos, the
level branch, the phrase branch. A run that was stopped goes on where it was; what was made by another recipe, of other
annotations or photos, or on another base is not taken for this run's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from accelerate import PartialState
from torch import Tensor

from active_learning.dataset import PLAIN, EmbeddingFiles, Sampler, TrainingPhoto, photos_of, views_of
from active_learning.train import TrainingConfig, fine_tune, plain_state, prepare
from active_learning.training_run import Progress, seeded
from model.adapter import load_lora, lora_state, read_adapter, write_adapter
from model.annotations import AnnotationSet, Level, read_annotations
from model.evaluation.protocol import Bench, Models, Options, Scene
from model.evaluation.report import draw_sheet
from model.light.adapter import LEVEL, PHRASE, VOCABULARY
from model.light.ladder import LadderDecoder
from model.light.segmenter import LightSegmenter
from model.propose import RunOptions, options_for, propose
from model.segmenter import Device
from model.text import Vocabulary, load_phrase_encoder
from model.types import Refusal

log = logging.getLogger(__name__)

_SHEET_ROWS = 8
_WAIT = timedelta(hours=12)  # of one process for another; torch's 30 minutes are less than encoding takes on CPUs

Group = tuple[float, list[TrainingPhoto]]  # share of the lessons, photos
Found = tuple["SetPart", AnnotationSet, str]  # a set, as it was read, and a digest of that


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPart:
    """One annotated set and its part in the lessons."""

    path: str
    split: str = "train"
    share: float = 1.0
    views: int = 0
    proposals: float = 0.0
    named: bool = False
    phrase_share: float | None = None  # in the phrase branch's lessons; else as in the level branch's
    phrase_views: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides what is trained, read from a TOML file."""

    sets: tuple[SetPart, ...]
    level: TrainingConfig
    phrase: TrainingConfig
    proposals: RunOptions
    smallest_view: float
    view_seed: int
    phrase_threshold: float
    digest: str  # of all it says

    def __post_init__(self) -> None:
        level, phrase = ((branch.rank, branch.alpha) for branch in (self.level, self.phrase))
        if level != phrase:  # a file states one rank and one alpha, by which all of its branches are scaled
            raise Refusal(
                f"rank and alpha are {level} in [level] but {phrase} in [phrase]; an adapter has one of each, so give "
                "both branches the same"
            )

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> Recipe:
        """Return the recipe in a file; `overrides` replace values of both branches' training (device, precision).

        Raises:
            Refusal: it cannot be read, or names something that is not there.
        """
        try:
            content = tomllib.loads(path.read_text())
            _check(content, _RECIPE, "the recipe", needed=_RECIPE)
            for part in content["sets"]:
                _check(part, _SET, "[[sets]]", needed=["path"])
            _check(content["proposals"], _PROPOSALS, "[proposals]", needed=_PROPOSALS)
            _check(content["views"], _VIEWS, "[views]", needed=_VIEWS)
            return cls(
                sets=tuple(SetPart(**part) for part in content["sets"]),
                level=_config(content["level"], LEVEL, overrides),
                phrase=_config(content["phrase"], PHRASE, overrides),
                proposals=options_for(**content["proposals"]),
                smallest_view=float(content["views"]["smallest"]),
                view_seed=content["views"]["seed"],
                phrase_threshold=float(content["phrase_threshold"]),
                digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
            )
        except OSError as error:
            raise Refusal(f"recipe {path} cannot be read: {error}") from error
        except ValueError as error:  # of TOML, of UTF-8, or what a check refuses
            raise Refusal(f"recipe {path} is not understood: {error}") from error


def _config(values: dict[str, Any], branch: str, overrides: dict[str, Any]) -> TrainingConfig:
    for given in (values, overrides):
        _check(given, _TRAINING, f"[{branch}]")
    return TrainingConfig(**values | overrides, branch=branch)


class _Allowed(NamedTuple):
    """What a value of a recipe may be."""

    said: str
    holds: Callable[[Any], bool]


def _check(values: dict[str, Any], allowed: dict[str, _Allowed], where: str, *, needed: Collection[str] = ()) -> None:
    """Refuse a part of a recipe that lacks something, or sets anything that it cannot, or to what it cannot be."""
    for name in needed:
        if name not in values:
            raise Refusal(f"{where} lacks {name!r}; see active_learning/recipes for a complete one")
    for name, value in values.items():
        if name not in allowed:
            raise Refusal(f"{where} cannot set {name!r}; it may set {', '.join(sorted(allowed))}")
        if not allowed[name].holds(value):
            raise Refusal(f"{name} = {value!r} in {where} is not allowed; give {allowed[name].said}")


def _is_number(value: Any, most: float = math.inf) -> bool:
    """Return whether a value is a finite number from 0 to `most`; true and false are none."""
    return type(value) in (int, float) and 0 <= value <= most and value != math.inf


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, kind) for item in value)


def _weigh_levels(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= set(get_args(Level)) and all(map(_is_number, value.values()))


def _one_of(*words: str) -> _Allowed:
    return _Allowed(" or ".join(words), lambda value: value in words)


_COUNT = _Allowed("a whole number from 1 on", partial(_is_count, least=1))
_COUNT_OR_NONE = _Allowed("a whole number from 0 on", partial(_is_count, least=0))
_SHARE = _Allowed("a number from 0 to 1", partial(_is_number, most=1))
_SIDE = _Allowed("a number above 0, 1 at most", lambda value: _is_number(value, 1) and value > 0)
_WEIGHT = _Allowed("a number from 0 on", _is_number)
_RATE = _Allowed("a number above 0", lambda value: _is_number(value) and value > 0)
_TEXT = _Allowed("a text", lambda value: isinstance(value, str) and value != "")
_TABLE = _Allowed("a table", lambda value: isinstance(value, dict))

_RECIPE = {
    "phrase_threshold": _SHARE,
    "sets": _Allowed("a list of tables", partial(_is_list, kind=dict)),
    **dict.fromkeys(("proposals", "views", LEVEL, PHRASE), _TABLE),
}
_SET = {
    **dict.fromkeys(("path", "split"), _TEXT),
    **dict.fromkeys(("share", "proposals", "phrase_share"), _WEIGHT),
    **dict.fromkeys(("views", "phrase_views"), _COUNT_OR_NONE),
    "named": _Allowed("true or false", lambda value: isinstance(value, bool)),
}
_PROPOSALS = {
    "sources": _Allowed("a list of names", partial(_is_list, kind=str)),
    **dict.fromkeys(("per_object", "points_per_image"), _COUNT),
    "seed": _COUNT_OR_NONE,
}
_VIEWS = {"smallest": _SIDE, "seed": _COUNT_OR_NONE}
_TRAINING = {
    **dict.fromkeys(("steps", "clicks", "most_clicks", "rank", "alpha", "checkpoint_every", "log_every"), _COUNT),
    **dict.fromkeys(("warmup", "seed"), _COUNT_OR_NONE),
    **dict.fromkeys(("central", "further", "boxed", "refined", "average"), _SHARE),
    **dict.fromkeys(("learning_rate", "head_learning_rate", "clip"), _RATE),
    **dict.fromkeys(("weight_decay", "level_power", "focal", "overlap", "growth", "score"), _WEIGHT),
    "kind_weights": _Allowed(f"numbers from 0 on for {', '.join(get_args(Level))}", _weigh_levels),
    "precision": _one_of("bf16", "no"),
    "device": _one_of(*get_args(Device)),
}
"""All of `TrainingConfig` but its branch."""


def train_base(
    recipe: Recipe,
    segmenter: LightSegmenter,
    data: Path,
    out: Path,
    *,
    embeddings: Path,
    stage: Callable[[str, int], Callable[[int, str], None]],
) -> Path:
    """Train both branches and return the adapter file, OUT/light-granularity.safetensors.

    Args:
        recipe: what to do.
        segmenter: the base, without adapter.
        data: folder of the recipe's sets.
        out: gets proposals, checkpoints, TensorBoard's files, picture sheets and the adapter.
        embeddings: folder of encoded photos, read and added to.
        stage: opens a progress bar of a name and a number of steps; what it returns is told the steps done and a text.

    Raises:
        Refusal: a set is missing or damaged, or what is in `out` belongs to another recipe, other data or another base.
        OSError: a file cannot be written.
    """
    sets = _read(recipe, data)
    made_of = {
        "base": segmenter.digest,
        "recipe": recipe.digest,
        "sets": [asdict(part) | {"digest": digest} for part, _, digest in sets],
    }
    out.mkdir(parents=True, exist_ok=True)  # where nothing can be written, nobody waits for encoding first
    for branch in (LEVEL, PHRASE):
        _refuse_others(_branch_file(out, branch), made_of)
    files = EmbeddingFiles(embeddings, segmenter)
    state = PartialState(cpu=recipe.level.device == "cpu", timeout=_WAIT)
    with state.main_process_first():  # of several processes, the first prepares everything and the others find it
        groups, named, sheet = _photos(recipe, sets, segmenter, out, embeddings, stage)
        _encode(files, [photo for _, photos in groups + named for photo in photos], stage)
    vocabulary = _vocabulary([photo for _, photos in named for photo in photos], recipe.phrase_threshold)
    with seeded(recipe.level.seed):
        network = LadderDecoder(segmenter.mask_decoder, vocabulary.vectors.shape[1])
    card: dict[str, Any] = made_of | {
        "rank": recipe.level.rank,
        "alpha": recipe.level.alpha,
        "phrase_width": vocabulary.vectors.shape[1],
        "phrase_encoder": load_phrase_encoder().name,
        "phrase_threshold": recipe.phrase_threshold,
        "vocabulary": list(vocabulary.names),
    }
    branches: list[str] = []

    def save(path: Path) -> None:
        if not state.is_main_process:
            return
        lora = {branch: lora_state(network.transformer, branch) for branch in branches}
        write_adapter(path, card=card, plain=plain_state(network) | {VOCABULARY: vocabulary.vectors}, lora=lora)

    def vectors_of(names: Sequence[str]) -> Tensor:
        matches = [vocabulary.match(name) for name in names]
        return torch.stack([match.vector for match in matches if match is not None])

    def train(config: TrainingConfig, lessons: Sequence[Group], folder: Path) -> None:
        sampler = Sampler(
            lessons, level_power=config.level_power, kind_weights=config.kind_weights, central=config.central
        )
        bar = stage(f"{config.branch} branch", config.steps)

        def report(progress: Progress) -> None:
            bar(progress.step, ", ".join(f"{name} {value:.3g}" for name, value in progress.figures.items()))

        def look(step: int) -> None:
            save(folder / "latest.safetensors")
            _draw(folder / f"sheet-{step:06}.png", segmenter, folder / "latest.safetensors", sheet, files)

        fine_tune(
            config,
            network,
            segmenter.prompt_encoder,
            sampler,
            files,
            folder,
            recipe=json.dumps(made_of, sort_keys=True),
            phrases=vectors_of,
            report=report,
            each_checkpoint=look,
        )

    for config, lessons in ((recipe.level, groups), (recipe.phrase, named)):
        folder = out / config.branch
        branches.append(config.branch)
        prepare(network, config)
        done = _branch_file(out, config.branch)
        if not done.is_file():
            train(config, lessons, folder)
            save(done)
        state.wait_for_everyone()
        found = read_adapter(done, base=segmenter.digest)  # as kept: a run that goes on from here does not differ
        network.load_state_dict({k: v for k, v in found.plain.items() if k != VOCABULARY}, strict=False)
        load_lora(network.transformer, config.branch, found.lora[config.branch])
    path = out / "light-granularity.safetensors"
    save(path)
    return path


def _read(recipe: Recipe, data: Path) -> list[Found]:
    """Return the sets of a recipe, each with a digest of all that it teaches: annotations and photos."""
    sets = []
    for part in recipe.sets:
        found = read_annotations(data / part.path, split=part.split)
        said = " ".join([found.fingerprint(), *(image.digest() for image in found.images)])
        sets.append((part, found, hashlib.sha256(said.encode()).hexdigest()))
    return sets


def _branch_file(out: Path, branch: str) -> Path:
    return out / branch / "adapter.safetensors"


def _refuse_others(path: Path, made_of: dict[str, Any]) -> None:
    """Refuse the file of a finished branch whose card says that it was made of anything else."""
    if path.is_file():
        card = read_adapter(path).card
        if any(card.get(name) != value for name, value in made_of.items()):
            raise Refusal(
                f"{path} was trained by another recipe, on other data or on another base; name another output folder, "
                "or delete it"
            )


def _photos(
    recipe: Recipe,
    sets: Sequence[Found],
    segmenter: LightSegmenter,
    out: Path,
    embeddings: Path,
    stage: Callable[[str, int], Callable[[int, str], None]],
) -> tuple[list[Group], list[Group], list[TrainingPhoto]]:
    """Return photos by group with their shares, the groups with names among them, and photos for the sheet."""
    groups: list[Group] = []
    named: list[Group] = []
    sheet: list[TrainingPhoto] = []

    views = partial(views_of, smallest=recipe.smallest_view, seed=recipe.view_seed)
    for part, found, digest in sets:
        photos = photos_of(found, partial(views, further=part.views))
        groups.append((part.share, photos))
        sheet += [photo for photo in photos if photo.view == PLAIN][:: max(1, len(photos) // 3)][:3]
        if part.named:
            if nameless := [photo for photo in photos if not all(photo.names)]:
                raise Refusal(
                    f"{part.path} has named = true, but a mask of {nameless[0].image.path.name} has no name; "
                    "give every mask one, or set named = false"
                )
            if part.phrase_views is not None:
                photos = photos_of(found, partial(views, further=part.phrase_views))
            named.append((part.share if part.phrase_share is None else part.phrase_share, photos))
        if part.proposals:
            key = hashlib.sha256(f"{part} {recipe.proposals} {digest} {segmenter.digest}".encode()).hexdigest()[:8]
            path = out / "proposals" / f"{part.path}-{key}.json"
            if not path.is_file():
                bar = stage(f"proposals on {part.path}", len(found.images))
                path.parent.mkdir(parents=True, exist_ok=True)
                done = propose(
                    found,
                    segmenter,
                    path,
                    recipe.proposals,
                    embeddings=embeddings,
                    report=lambda p, bar=bar: bar(p.done, f"{p.passes_per_second:.0f} passes a second"),  # type: ignore[misc]
                )
                for sentence in done.refusals:
                    log.warning("a photo of %s has no part in its proposals: %s", part.path, sentence)
            groups.append((part.proposals, photos_of(read_annotations(path, split=part.split))))
    return groups, named, sheet[:_SHEET_ROWS]


def _encode(
    files: EmbeddingFiles, photos: list[TrainingPhoto], stage: Callable[[str, int], Callable[[int, str], None]]
) -> None:
    missing = files.missing(photos)
    if missing:
        bar = stage("encoding photos", len(missing))
        for count, photo in enumerate(missing, 1):
            files.encoded(photo)
            bar(count, "")


def _vocabulary(photos: Sequence[TrainingPhoto], threshold: float) -> Vocabulary:
    names = sorted({name for photo in photos for name in photo.names if name})
    if not names:
        raise Refusal("no set of the recipe has named = true and names, so there is nothing to train phrases on")
    return Vocabulary(names, load_phrase_encoder(), threshold)


def _draw(
    path: Path, base: LightSegmenter, adapter: Path, photos: Sequence[TrainingPhoto], files: EmbeddingFiles
) -> None:
    """Draw photos with a click, and what base and adapter answer at all levels."""
    models = Models(base=base, adapted=base.with_adapter(adapter))
    rows = []
    for photo in photos:
        scene = Scene(set_name="", image=photo.image, encoded=files.encoded(photo), pixels=photo.image.pixels)
        parts = [mask for mask in photo.image.masks if mask.level == "part"] or list(photo.image.masks)
        rows.append(Bench(models, scene, max(parts, key=lambda mask: mask.area), Options()))
    draw_sheet(path, rows)
