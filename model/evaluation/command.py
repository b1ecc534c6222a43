"""The command `evaluate`: options in, a folder with results and report out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.console import Console

from model.annotations import Level, Source
from model.bars import progress_bar
from model.embeddings import EmbeddingFolder
from model.evaluation.protocol import PAPER, PROTOCOLS, Bench, Models, Options, Row
from model.evaluation.report import draw_sheet, write_report
from model.evaluation.runner import ModelSource, Results, Task, key_of, left_of, plan, run, scene_of
from model.evaluation.sets import Selection, evenly_spaced, select
from model.evaluation.summary import figures_of, groups_of, numbers_of
from model.files import remedy_of
from model.segmenter import BUNDLED, BUNDLED_ADAPTER, Device, EncoderChoice, Speed
from model.types import Granularity, Refusal

Family = Literal["light", "graco"]

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(
    sets: Annotated[list[Path], typer.Argument(metavar="SET...", help="Annotated photos: folders or COCO files.")],
    kind: Annotated[Source, typer.Option(help="Format of the sets; auto looks at what is there.")] = "auto",
    split: Annotated[str, typer.Option(help="Split to measure, where a set names splits; all: every one.")] = "val",
    family: Annotated[Family, typer.Option(help="light, or graco: published SimpleClick and GraCo weights.")] = "light",
    adapter: Annotated[
        str, typer.Option(help="Adapter file; none; shipped: that of light in model/weights, or none.")
    ] = "shipped",
    weights: Annotated[
        Path | None, typer.Option(help="Base weights: a file, or the folder of an import; not given: light's.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="CLIP's weights for phrases in graco: a file, or the folder they lie in.")
    ] = None,
    speed: Annotated[Speed, typer.Option(help="Of graco: exact is as published, fast in lower precision.")] = "exact",
    size: Annotated[
        int, typer.Option(min=0, help="Of graco: side of the network's input; 0: that of the weights, 672 for DAVIS.")
    ] = 0,
    protocols: Annotated[
        str, typer.Option(help=f"What to measure, separated by commas; also {', '.join(PAPER)}.")
    ] = ",".join(PROTOCOLS),
    budget: Annotated[int, typer.Option(min=1, max=100, help="Clicks on one mask at most.")] = 20,
    targets: Annotated[str, typer.Option(help="IoU that counts as done, for NoC.")] = "0.85,0.90",
    fixed_level: Annotated[list[float] | None, typer.Option(help="Level of `fixed`, 0..1; may be repeated.")] = None,
    level: Annotated[str, typer.Option(help="Masks to measure: object, part, subpart; all.")] = "all",
    name: Annotated[list[str] | None, typer.Option(help="Name of the masks to measure; may be repeated.")] = None,
    part_of: Annotated[list[str] | None, typer.Option(help="Name of their whole; may be repeated.")] = None,
    support: Annotated[int, typer.Option(min=1, help="Annotators who drew a mask at least, where the set says.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of results and report.")] = Path("data/evaluation"),
    limit: Annotated[
        int | None, typer.Option(min=1, help="Masks of each set and level at most, spread evenly.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random clicks.")] = 0,
    embeddings: Annotated[Path | None, typer.Option(help="Folder to keep encoded photos in, for further runs.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, each with one thread; 1: this one, all threads.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of this process; 0: one per core.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
    encoder: Annotated[
        EncoderChoice, typer.Option(help="fast is compiled for this CPU, exact is torch fp32.")
    ] = "auto",
    compiled: Annotated[Path, typer.Option(help="Folder of the compiled encoder.")] = Path("~/.cache/graco"),
    sheet: Annotated[int, typer.Option(min=0, help="Masks on each set's picture sheet.")] = 6,
) -> None:
    """Measure the model on annotated photos with simulated clicks, and write a report.

    A run that was stopped goes on where it was when started again with the same --out.
    """
    try:
        options = Options(
            budget=budget,
            targets=_numbers(targets),
            fixed_levels=tuple(Granularity.from_value(value) for value in fixed_level or (1.0,)),
            support=support,
            seed=seed,
        )
        chosen = _listed(protocols, (*PROTOCOLS, *PAPER), "protocol")
        levels = () if level == "all" else _listed(level, get_args(Level), "level")
        found = [
            select(
                path,
                kind=kind,
                split=None if split == "all" else split,
                levels=levels,
                limit=limit,
                support=support,
                names=name or (),
                wholes=part_of or (),
            )
            for path in sets
        ]
        for shared, count in Counter(selection.name for selection in found).items():
            if count > 1:
                raise Refusal(
                    f"{count} of the sets are called {shared!r}; evaluate them one by one, or rename a folder"
                )
        source = ModelSource(
            family=family,
            weights=_weights_file(family, weights),
            adapter=_adapter_file(family, adapter),
            clip=_clip_file(clip),
            speed=speed,
            size=size,
            device=device,
            encoder=encoder,
            threads=threads,
            compiled=compiled.expanduser(),
        )
        results = Results(out / "results.jsonl")
        _Evaluation(found, chosen, options, source, EmbeddingFolder(embeddings), results, jobs, Console()).run(sheet)
    except (Refusal, OSError) as error:
        remedy = remedy_of(error, {"--out": out, "--embeddings": embeddings}) if isinstance(error, OSError) else ""
        Console(stderr=True).print(f"error: {error}{remedy}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error


@dataclass(frozen=True, slots=True, eq=False)
class _Evaluation:
    selections: list[Selection]
    protocols: tuple[str, ...]
    options: Options
    source: ModelSource
    embeddings: EmbeddingFolder
    results: Results
    jobs: int
    console: Console

    def run(self, sheet: int) -> None:
        models = self.source.load()
        digest, encoding = self.source.adapter_digest(), self.source.fingerprint(models)
        clock = self.source.clock()

        def key(protocol: str, selection: Selection) -> str:
            return key_of(protocol, selection, self.options, encoding=encoding, adapter=digest, clock=clock)

        tasks = plan(self.selections, self.protocols, key)
        self._measure(tasks, models)
        groups = groups_of(row for task in tasks for row in self.results.of(task))
        numbers, figures = [numbers_of(group, self.options) for group in groups], figures_of(groups, self.options)
        folder = self.results.path.parent
        for table in write_report(folder, self._facts(models, digest), numbers, figures, self.options):
            self.console.print(table.rich())
        for selection in self.selections if sheet else ():
            draw_sheet(folder / f"sheet-{selection.name}.png", self._benches(selection, models, sheet))
        self.console.print(f"report: {folder / 'report.md'}")

    def _measure(self, tasks: Sequence[Task], models: Models) -> None:
        total = sum(task.rows for task in tasks)
        parts = (left_of(task, self.results, timed=timed) for timed in (False, True) for task in tasks)
        left = sum(part.rows for part in parts if part)
        if left < total:
            self.console.print(f"{total - left} of {total} rows are there already; going on")
        with progress_bar(self.console) as progress:
            bar = progress.add_task("measuring", total=left)

            def done(row: Row) -> None:
                progress.update(bar, advance=1, description=f"{row['set']} {row['protocol']}")

            run(
                tasks,
                self.results,
                self.options,
                self.embeddings,
                models=models,
                source=self.source,
                jobs=self.jobs,
                done=done,
            )

    def _facts(self, models: Models, digest: str | None) -> dict[str, Any]:
        options = self.options
        return {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "family": self.source.family,
            "weights": models.base.version,
            "encoding": models.base.encoding,
            "adapter": f"{self.source.adapter} (sha256 {digest})" if self.source.adapter else "none",
            "protocols": self.protocols,
            "budget": options.budget,
            "targets": options.targets,
            "fixed levels": [fixed.value for fixed in options.fixed_levels],
            "support": options.support,
            "seed": options.seed,
            "sets": {s.name: f"{s.masks} of {s.of} masks ({s.licence or 'no licence named'})" for s in self.selections},
        }

    def _benches(self, selection: Selection, models: Models, count: int) -> list[Bench]:
        pairs = [(image, mask) for image, masks in selection.chosen for mask in masks]
        return [
            Bench(models, scene_of(selection.name, image, models, self.embeddings), mask, self.options)
            for image, mask in evenly_spaced(pairs, count)
        ]


def _weights_file(family: Family, weights: Path | None) -> Path:
    if weights is None:
        if family != "light":
            raise Refusal(f"no weights of {family} are shipped; import them (docs/checkpoints.md) and give --weights")
        return BUNDLED
    return weights / "weights.safetensors" if weights.is_dir() else weights


def _clip_file(clip: Path | None) -> Path | None:
    if clip is None or not clip.is_dir():
        return clip
    from model.graco.text import FILES, find_clip

    if (found := find_clip(clip)) is None:
        raise Refusal(f"{clip} holds no weights of CLIP under a name they are published by: {', '.join(FILES)}")
    return found


def _adapter_file(family: Family, name: str) -> Path | None:
    if name == "shipped":
        name = str(BUNDLED_ADAPTER) if family == "light" else "none"
    if name == "none":
        return None
    if not Path(name).is_file():
        raise Refusal(f"adapter {name} is not a file; give one, or none, or shipped")
    return Path(name)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise Refusal(f"targets {text!r} are not numbers separated by commas, such as 0.85,0.90") from error


def _listed(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The words of a list, in the order in which they are known, each once."""
    words = {word.strip() for word in text.split(",") if word.strip()}
    if not words or words - set(known):
        unknown = ", ".join(sorted(words - set(known))) or "nothing"
        raise Refusal(f"{what} {unknown} is unknown; choose among {', '.join(known)}")
    return tuple(word for word in known if word in words)
