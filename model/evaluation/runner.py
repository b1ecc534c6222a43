"""A run over sets: one line of JSON for each mask and protocol that is done, so that a killed run goes on.

A row's key is a digest of all that could change its numbers (weights, encoder, adapter, options, the set as read; for
seconds the machine, device and threads, too), so a folder may serve many runs; rows of other keys are left alone. Masks
of one image are done together.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.annotations import AnnotatedImage, AnnotatedMask
from model.embeddings import EmbeddingFolder
from model.evaluation.protocol import BASE_ONLY, PAPER, Bench, Models, Options, Row, Scene
from model.evaluation.sets import Selection, evenly_spaced
from model.segmenter import Device, EncoderChoice, Speed, load_segmenter, pick_device
from model.types import MAX_PROPOSALS, Refusal

TIMED_MASKS = 10
_FORMAT = 5  # of the rows; a new one makes old rows be measured again


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """The files and settings that models are loaded from, in this process or another."""

    family: str = "light"
    weights: Path
    adapter: Path | None
    device: Device = "auto"
    encoder: EncoderChoice = "auto"
    speed: Speed = "exact"
    size: int = 0  # of the network's input; 0: that of the weights
    clip: Path | None = None
    threads: int = 0
    compiled: Path | None = None

    def load(self) -> Models:
        """Load the base, and put the adapter on it where there is one.

        Raises:
            Refusal: a file is missing or damaged, or the adapter belongs to other weights.
        """
        base = load_segmenter(
            self.family,
            self.weights,
            device=self.device,
            encoder=self.encoder,
            speed=self.speed,
            size=self.size,
            clip=self.clip,
            threads=self.threads,
            compiled=self.compiled,
        )
        return Models(base=base, adapted=base.with_adapter(self.adapter) if self.adapter else base)

    def fingerprint(self, models: Models) -> str:
        """Return all of the base that numbers depend on: weights, input, precision, and what reads phrases."""
        if self.family == "light":
            return models.base.encoding
        clip = f"{self.clip} {self.clip.stat().st_size}" if self.clip else "none"
        return f"{models.base.version} {self.size} {self.speed} clip {clip}"

    def clock(self) -> str:
        """Return what seconds depend on besides: this machine, the device, and the threads of a CPU."""
        return f"{platform.node()} {pick_device(self.device)} {self.threads or torch.get_num_threads()}"

    def adapter_digest(self) -> str | None:
        """Return the SHA-256 of the adapter's file, None without one.

        Raises:
            Refusal: the file cannot be read.
        """
        if self.adapter is None:
            return None
        try:
            return hashlib.sha256(self.adapter.read_bytes()).hexdigest()
        except OSError as error:
            raise Refusal(f"adapter {self.adapter} cannot be read ({error}); give its file, or none") from error


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Task:
    """What is left to do on one image."""

    set_name: str
    image: AnnotatedImage
    todo: tuple[tuple[AnnotatedMask, tuple[tuple[str, str], ...]], ...]  # each mask's (protocol, key)

    @property
    def rows(self) -> int:
        """How many rows it makes."""
        return sum(len(protocols) for _, protocols in self.todo)


class Results:
    """`results.jsonl`: rows added one at a time; a line cut off by a kill is measured again."""

    def __init__(self, path: Path) -> None:
        """Read what is there; make the folder where it is not."""
        self.path = path
        self._rows: dict[tuple[str, int], Row] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().split(b"\n") if path.exists() else []
            if lines and lines[-1]:
                with path.open("ab") as file:
                    file.write(b"\n")  # a cut line must not swallow the next one
        except OSError as error:
            raise Refusal(f"results {path} cannot be used ({error}); give another --out") from error
        for line in lines:
            try:
                row = json.loads(line)
                self._rows[row["key"], row["mask"]] = row
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, key: str, mask: int) -> Row | None:
        """Return a row that is there already."""
        return self._rows.get((key, mask))

    def of(self, task: Task) -> list[Row]:
        """Return all rows of a task that are there."""
        found = (self.get(key, mask.id) for mask, protocols in task.todo for _, key in protocols)
        return [row for row in found if row is not None]

    def add(self, row: Row) -> None:
        """Write a row to the file at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
        self._rows[row["key"], row["mask"]] = row


def key_of(
    protocol: str, selection: Selection, options: Options, *, encoding: str, adapter: str | None, clock: str = ""
) -> str:
    """Return the key of a protocol's rows on a set: what they depend on, and nothing else.

    Args:
        protocol: what is measured.
        selection: of which masks.
        options: of the protocols.
        encoding: of the base, as `ModelSource.fingerprint` returns it.
        adapter: its digest, None without one.
        clock: what seconds depend on, as `ModelSource.clock` returns it.

    >>> from types import SimpleNamespace
    >>> pets = SimpleNamespace(fingerprint="ab")
    >>> keys = [key_of("base", pets, Options(), encoding="light", adapter=a) for a in (None, "1a2b")]
    >>> keys[0] == keys[1]
    True
    """
    facts: dict[str, object] = {
        "format": _FORMAT,
        "protocol": protocol,
        "set": selection.fingerprint,
        "encoding": encoding,
        "adapter": None if protocol in BASE_ONLY else adapter,
    }
    if protocol in ("base", "level", "oracle", "fixed", "curve", *PAPER):
        facts["budget"] = options.budget
    if protocol in ("base", "level", "oracle", "fixed", *PAPER):
        facts["target"] = max(options.targets)
    if protocol in ("fixed", "paper-fixed"):
        facts["levels"] = [level.value for level in options.fixed_levels]
    if protocol == "levels":
        facts["support"] = options.support
        facts["proposals"] = MAX_PROPOSALS
    if protocol == "phrase":
        facts["seed"] = options.seed
    if protocol == "time":
        facts["clock"] = clock
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def plan(selections: Sequence[Selection], protocols: Sequence[str], key: Callable[[str, Selection], str]) -> list[Task]:
    """Return the tasks of a whole run, whether done or not, in the order of the sets."""
    tasks = []
    for selection in selections:
        masks = [mask.id for _, chosen in selection.chosen for mask in chosen]
        timed = set(evenly_spaced(masks, TIMED_MASKS))
        keys = {protocol: key(protocol, selection) for protocol in protocols}
        for image, chosen in selection.chosen:
            todo = tuple(
                (mask, tuple((name, keys[name]) for name in protocols if name != "time" or mask.id in timed))
                for mask in chosen
            )
            tasks.append(Task(set_name=selection.name, image=image, todo=todo))
    return tasks


def left_of(task: Task, results: Results, *, timed: bool) -> Task | None:
    """Return what of a task is not done yet, either the timed part or the rest; None: nothing."""
    left = tuple(
        (mask, tuple((name, key) for name, key in todo if (name == "time") is timed and not results.get(key, mask.id)))
        for mask, todo in task.todo
    )
    left = tuple((mask, todo) for mask, todo in left if todo)
    return replace(task, todo=left) if left else None


def scene_of(set_name: str, image: AnnotatedImage, models: Models, embeddings: EmbeddingFolder) -> Scene:
    """Return an image of a set, encoded."""
    encoded = embeddings.encoded(models.base, image.digest(), image.pixels, height=image.height, width=image.width)
    return Scene(set_name=set_name, image=image, encoded=encoded, pixels=image.pixels)


def measure(models: Models, task: Task, options: Options, embeddings: EmbeddingFolder) -> Iterator[Row]:
    """Yield the rows of a task as they are done.

    Raises:
        Refusal: the photo, its embedding or a mask is damaged.
    """
    scene = scene_of(task.set_name, task.image, models, embeddings)
    for mask, protocols in task.todo:
        bench = Bench(models, scene, mask, options)
        for protocol, key in protocols:
            yield {
                "key": key,
                "set": task.set_name,
                "protocol": protocol,
                "mask": mask.id,
                "image": task.image.id,
                "name": mask.name,
                "mask_level": mask.level,
                "own": bench.own.level,
                **bench.run(protocol),
            }


def run(
    tasks: Sequence[Task],
    results: Results,
    options: Options,
    embeddings: EmbeddingFolder,
    *,
    models: Models,
    source: ModelSource | None = None,
    jobs: int = 1,
    done: Callable[[Row], None] = lambda row: None,
) -> None:
    """Do what is left of the tasks and write it down; the clock runs last and alone.

    Args:
        tasks: all tasks, whether done or not.
        results: where rows are looked up and added.
        options: of the protocols.
        embeddings: where embeddings may be.
        models: those of this process.
        source: what other processes load theirs from; needed for more than one job.
        jobs: processes, each with one thread.
        done: called with each new row.
    """
    left = [task for task in (left_of(task, results, timed=False) for task in tasks) if task]
    timed = [task for task in (left_of(task, results, timed=True) for task in tasks) if task]

    def keep(row: Row) -> None:
        results.add(row)
        done(row)

    if jobs > 1 and source is not None and len(left) > 1:
        for row in _in_processes(left, options, embeddings, replace(source, threads=1), jobs):
            keep(row)
        left = []
    for task in (*left, *timed):
        for row in measure(models, task, options, embeddings):
            keep(row)


def _in_processes(
    tasks: Sequence[Task], options: Options, embeddings: EmbeddingFolder, source: ModelSource, jobs: int
) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_load, initargs=(source, options, embeddings))
    try:
        for future in as_completed([pool.submit(_measured, task) for task in tasks]):
            yield from future.result()
    except BrokenProcessPool as error:
        raise Refusal(
            f"a process ended early ({error}); run again with fewer --jobs, it goes on where it was"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Models, Options, EmbeddingFolder] | None = None  # of a process that `_in_processes` started


def _load(source: ModelSource, options: Options, embeddings: EmbeddingFolder) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = (source.load(), options, embeddings)


def _end_with_parent() -> None:
    """A run that is killed cannot end its processes, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _measured(task: Task) -> list[Row]:
    assert _worker is not None
    models, options, embeddings = _worker
    return list(measure(models, task, options, embeddings))
