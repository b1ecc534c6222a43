"""The commands: python -m model propose | evaluate."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from model.annotations import Source, read_annotations
from model.bars import progress_bar
from model.evaluation.command import evaluate
from model.files import remedy_of
from model.propose import Progress, options_for
from model.propose import propose as run
from model.segmenter import BUNDLED, EncoderChoice, load_segmenter
from model.types import Refusal

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.command()(evaluate)


@app.command()
def propose(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Photos with or without annotations: a folder or a COCO file.")
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("proposals.json"),
    kind: Annotated[Source, typer.Option(help="Format of the source; auto looks at what is there.")] = "auto",
    split: Annotated[str, typer.Option(help="Split to take, where the source names splits; all: every one.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same file.")] = 0,
    sources: Annotated[
        str,
        typer.Option(
            help="Ways to find masks: agg (negative clicks), decoder, grid, trie (merged parts), points (anywhere)."
        ),
    ] = "decoder,agg",
    per_object: Annotated[int, typer.Option(min=1, help="Masks kept of those found in each object.")] = 6,
    points_per_image: Annotated[int, typer.Option(min=1, help="Positive clicks in each photo, at most.")] = 4,
    weights: Annotated[Path, typer.Option(help="Base weights.")] = BUNDLED,
    adapter: Annotated[Path | None, typer.Option(help="Adapter file; without it the base weights answer.")] = None,
    encoder: Annotated[
        EncoderChoice, typer.Option(help="fast is compiled for this CPU, exact is torch fp32.")
    ] = "auto",
    compiled: Annotated[Path, typer.Option(help="Folder of the compiled encoder.")] = Path("~/.cache/graco"),
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: one per core.")] = 0,
    embeddings: Annotated[Path | None, typer.Option(help="Folder to keep encoded photos in, for further runs.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many photos.")] = None,
) -> None:
    """Find masks of parts at any granularity and write them beside those a set has.

    A run that was stopped goes on where it was when started again with the same options.
    """
    console = Console(stderr=True)
    logging.basicConfig(level="INFO", format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    try:
        options = options_for(
            [name.strip() for name in sources.split(",") if name.strip()],
            per_object=per_object,
            points_per_image=points_per_image,
            seed=seed,
        )
        annotations = read_annotations(source, kind=kind, split=None if split == "all" else split)
        if limit is not None:
            annotations = replace(annotations, images=annotations.images[:limit])
        segmenter = load_segmenter(
            "light", weights, adapter=adapter, encoder=encoder, threads=threads, compiled=compiled.expanduser()
        )
        with progress_bar(console) as bar:
            task = bar.add_task("photos", total=len(annotations.images))

            def report(progress: Progress) -> None:
                bar.update(
                    task, completed=progress.done, description=f"photos, {progress.passes_per_second:.0f} passes/s"
                )

            done = run(
                annotations,
                segmenter,
                out,
                options,
                embeddings=embeddings,
                report=report,
            )
    except Refusal as refusal:
        console.print(f"[red]{escape(str(refusal))}[/red]")
        raise typer.Exit(2) from refusal
    except OSError as error:
        said = f"{error}{remedy_of(error, {'--out': out, '--embeddings': embeddings})}"
        console.print(f"[red]{escape(said)}[/red]")
        raise typer.Exit(2) from error
    for sentence in done.refusals:
        console.print(f"[yellow]left out:[/yellow] {escape(sentence)}")
    print(
        f"{out}: {done.proposals} proposals on {done.done - len(done.refusals)} photos, {done.reused} done before; "
        f"{done.passes} decoder passes, {done.passes_per_second:.1f} a second"
    )
    raise typer.Exit(1 if done.refusals else 0)


if __name__ == "__main__":
    app()
