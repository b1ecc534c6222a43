"""Proposals for a whole set of photos, written as one COCO-style JSON file; a run that dies goes on where it was.

Each finished image leaves a small file in OUT.parts, which appears by rename and is known by a digest of all that
decides its content; at the end they are joined. Chance is drawn anew for each image from the seed and the image's
bytes, so the order of the images and the number of runs change no byte of the result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from pycocotools import mask as coco

from model.annotations import AnnotatedImage, AnnotatedMask, AnnotationSet, encode
from model.embeddings import EmbeddingFolder
from model.granularity import estimate
from model.proposals import GeneratorOptions, Source, free_chains, generate, whole_image
from model.segmenter import Encoded, Segmenter
from model.trie import ORIGIN as TRIE
from model.trie import merge_siblings
from model.types import Mask, Prompt, Refusal

log = logging.getLogger(__name__)

AnySource = Literal["agg", "decoder", "grid", "trie", "points"]
SOURCES: tuple[AnySource, ...] = get_args(AnySource)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What is done with each image."""

    trie: bool = False  # merge sibling parts into the levels between them and their whole
    generator: GeneratorOptions | None = field(default_factory=GeneratorOptions)  # None: no parts are looked for
    points_per_image: int = 4  # positive clicks of the generator; larger objects come first
    least_of_image: float = 0.01  # area below which an object has no parts worth finding
    free_points: int = 0  # clicks anywhere in the photo, for things and parts that nobody annotated
    whole_grid: int = 6  # clicks along each side where an image has no masks, and its objects are found first
    seed: int = 0


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    images: int  # in all
    done: int = 0
    reused: int = 0  # of these, taken from an earlier run
    proposals: int = 0
    passes: int = 0  # of the decoder, in this run
    decoding_s: float = 0.0  # seconds this run spent on proposals, encoding left out
    refusals: list[str] = field(default_factory=list)  # a sentence for each image left out

    @property
    def passes_per_second(self) -> float:
        """Decoder passes for each second spent on proposals, whatever else is done between them included."""
        return self.passes / self.decoding_s if self.decoding_s else 0.0


def options_for(sources: Sequence[str], *, per_object: int, points_per_image: int, seed: int) -> RunOptions:
    """Return the options of a run that uses these sources.

    Raises:
        Refusal: a source is unknown, or a number too small.
    """
    unknown = [source for source in sources if source not in SOURCES]
    if unknown or not sources:
        raise Refusal(f"source {', '.join(unknown) or 'none'} is unknown; choose from {', '.join(SOURCES)}")
    if points_per_image < 1 or seed < 0:
        raise Refusal("points per image must be 1 or more, and the seed 0 or more")
    in_objects = [source for source in SOURCES if source in sources and source not in ("trie", "points")]
    asked = cast(tuple[Source, ...], tuple(in_objects))
    return RunOptions(
        trie="trie" in sources,
        generator=GeneratorOptions(sources=asked, per_object=per_object) if asked else None,
        points_per_image=points_per_image,
        free_points=2 * points_per_image if "points" in sources else 0,
        seed=seed,
    )


def propose(
    annotations: AnnotationSet,
    segmenter: Segmenter,
    out: Path,
    options: RunOptions,
    *,
    embeddings: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Write the masks of a set and proposals beside them to `out`, to be read by `read_annotations`.

    An image that is damaged is left out, with a sentence in the progress returned; then OUT.parts stays, so that a run
    after the image was mended does only that one.

    Args:
        annotations: the photos and the masks they have; those without any get whole objects from the segmenter.
        segmenter: makes the proposals.
        out: the JSON file.
        options: what is done with each image.
        embeddings: folder of encoded images, read and added to: <encoding>/<digest of the photo>.safetensors.
        report: called after each image.

    Raises:
        OSError: a file cannot be written.
    """
    parts = out.with_name(f"{out.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    counted, kept = _Counted(segmenter), EmbeddingFolder(embeddings)
    progress = Progress(images=len(annotations.images))
    finished: list[tuple[AnnotatedImage, Path]] = []
    for image in annotations.images:
        try:
            digest = image.digest()
            key = _key(image, digest, options, f"{segmenter.version} {segmenter.encoding} {segmenter.adapter}")
            path = parts / f"{image.id}-{key[:16]}.json"
            if _is_finished(path):
                progress.reused += 1
            else:
                encoded = kept.encoded(segmenter, digest, image.pixels, height=image.height, width=image.width)
                began = time.perf_counter()
                seed = [options.seed, *np.frombuffer(bytes.fromhex(digest), np.uint32).tolist()]
                masks = _masks(image, cast(Segmenter, counted), encoded, np.random.default_rng(seed), options)
                progress.decoding_s += time.perf_counter() - began
                _write(path, _annotations(masks))
            finished.append((image, path))
        except Refusal as refusal:
            progress.refusals.append(str(refusal))
        progress.done, progress.passes = progress.done + 1, counted.passes
        report(progress)
    progress.proposals = _join(annotations, finished, out)
    if not progress.refusals:
        shutil.rmtree(parts)
    return progress


def _is_finished(path: Path) -> bool:
    """Return whether an earlier run left an image's masks; what is damaged is made anew."""
    if not path.is_file():
        return False
    try:
        return isinstance(json.loads(path.read_bytes()), list)
    except ValueError as error:
        log.warning("the masks of an earlier run in %s are damaged (%s) and are made anew", path, error)
        return False


def _masks(
    image: AnnotatedImage, segmenter: Segmenter, encoded: Encoded, rng: np.random.Generator, options: RunOptions
) -> list[AnnotatedMask]:
    """Return the masks of an image with its proposals, whose ids are below 0: nobody knows yet which are free."""
    masks = [*image.masks]
    following = -1

    def add(mask: Mask, *, origin: str, granularity: float, parent: int | None) -> AnnotatedMask:
        nonlocal following
        made = AnnotatedMask(
            id=following,
            image_id=image.id,
            name="",
            level="object" if parent is None else "part",
            parent_id=parent,
            origin=origin,
            area=int(np.count_nonzero(mask)),
            segmentation=encode(mask),
            granularity=granularity,
        )
        following -= 1
        masks.append(made)
        return made

    if not masks:
        objects = whole_image(
            segmenter,
            encoded,
            grid=options.whole_grid,
            largest=True,
            least_of_image=options.least_of_image,
            most_of_image=0.9,
        )
        for found in objects:
            add(found.mask, origin="proposal-grid", granularity=1.0, parent=None)
    if options.trie:
        merged = merge_siblings(masks, following=1 + max((mask.id for mask in masks), default=0))
        ids = {m.id: following - k for k, m in enumerate(m for m in merged if m.origin == TRIE)}
        following -= len(ids)
        masks = [
            replace(
                m, id=ids.get(m.id, m.id), parent_id=None if m.parent_id is None else ids.get(m.parent_id, m.parent_id)
            )
            for m in merged
        ]
        known = replace(image, masks=tuple(masks))
        masks = [
            m
            if m.origin != TRIE
            else replace(m, granularity=_rounded(estimate(segmenter, encoded, m.mask(), known.whole(m).mask())))
            for m in masks
        ]
    if options.generator is not None:
        points = options.points_per_image
        known = replace(image, masks=tuple(masks))
        wholes = [mask for mask in masks if known.whole(mask) is mask]
        for whole in sorted(wholes, key=lambda mask: -mask.area):
            if points < 1 or whole.area < options.least_of_image * image.height * image.width:
                break
            here = min(points, options.generator.points)
            points -= here
            generator = replace(options.generator, points=here, walks=min(here, options.generator.walks))
            there = [mask.mask() for mask in known.masks if known.whole(mask) is whole]
            for one in generate(segmenter, encoded, whole.mask(), rng, generator, known=there):
                add(one.mask, origin=one.origin, granularity=_rounded(one.granularity), parent=whole.id)
    if options.free_points:
        taken = [mask.mask() for mask in masks if mask.parent_id is None]
        for chain in free_chains(segmenter, encoded, rng, options.free_points, taken):
            parent = add(chain[-1], origin="proposal-points", granularity=1.0, parent=None)
            for part in chain[:-1]:
                level = _rounded(estimate(segmenter, encoded, part, chain[-1]))
                add(part, origin="proposal-points", granularity=level, parent=parent.id)
    return masks


def _rounded(granularity: float) -> float:
    return round(granularity, 4)


def _key(image: AnnotatedImage, digest: str, options: RunOptions, model: str) -> str:
    """Return a digest of all that an image's proposals depend on."""
    masks = [
        (m.id, m.parent_id, m.name, m.level, m.origin, m.granularity, m.support, m.segmentation["counts"].decode())
        for m in image.masks
    ]
    content = json.dumps([asdict(options), model, digest, masks], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _annotations(masks: Sequence[AnnotatedMask]) -> list[dict[str, Any]]:
    return [
        {
            "id": mask.id,
            "image_id": mask.image_id,
            "name": mask.name,
            "parent_id": mask.parent_id,
            "level": mask.level,
            "origin": mask.origin,
            "granularity": mask.granularity,
            **({} if mask.support is None else {"support": mask.support}),
            "area": mask.area,
            "bbox": [int(side) for side in coco.toBbox(mask.segmentation)],
            "iscrowd": 0,
            "segmentation": {**mask.segmentation, "counts": mask.segmentation["counts"].decode()},
        }
        for mask in masks
    ]


def _join(annotations: AnnotationSet, finished: Sequence[tuple[AnnotatedImage, Path]], out: Path) -> int:
    """Write one file of all finished images; return how many proposals it holds."""
    following = 1 + max((mask.id for image in annotations.images for mask in image.masks), default=0)
    root = Path(os.path.commonpath([image.path.resolve().parent for image, _ in finished])) if finished else out.parent
    notes: list[dict[str, Any]] = []
    proposals = 0
    for _, path in finished:
        of_image = json.loads(path.read_bytes())
        ids = {note["id"]: following + place for place, note in enumerate(n for n in of_image if n["id"] < 0)}
        following += len(ids)
        proposals += len(ids)
        for note in of_image:
            note["id"], note["parent_id"] = (
                ids.get(note["id"], note["id"]),
                ids.get(note["parent_id"], note["parent_id"]),
            )
        notes += of_image
    names = {name: number for number, name in enumerate(sorted({note["name"] for note in notes}), 1)}
    for note in notes:
        note["category_id"] = names[note.pop("name")]
    content = {
        "info": {
            "name": f"{annotations.name}, with proposals",
            "license": annotations.licence,
            "images_root": str(root),
        },
        "images": [
            {
                "id": image.id,
                "file_name": image.path.resolve().relative_to(root).as_posix(),
                "width": image.width,
                "height": image.height,
                "split": image.split,
            }
            for image, _ in finished
        ],
        "categories": [{"id": number, "name": name, "supercategory": ""} for name, number in names.items()],
        "annotations": notes,
    }
    _write(out, content)
    return proposals


def _write(path: Path, content: object) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(content, separators=(",", ":")))
    draft.replace(path)


class _Counted:
    """A segmenter that counts its decoder passes."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self.passes = 0

    def step(self, encoded: Encoded, prompt: Prompt, state: Any) -> Any:
        self.passes += 1
        return self._segmenter.step(encoded, prompt, state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._segmenter, name)
