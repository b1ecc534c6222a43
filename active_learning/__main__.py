"""The commands: python -m active_learning train-base, bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn

from active_learning.base_training import Recipe, train_base
from active_learning.bundle import BUNDLED_SETS, bundle
from model.bars import progress_bar
from model.files import remedy_of
from model.segmenter import BUNDLED, Device, EncoderChoice, load_segmenter
from model.types import Refusal

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

_HERE = Path(__file__).resolve().parent


@app.callback()
def _commands() -> None:
    """Training of adapters."""


@app.command("train-base")
def train_base_command(
    config: Annotated[Path, typer.Option(help="The recipe, a TOML file.")] = _HERE
    / "recipes"
    / "light-granularity.toml",
    data: Annotated[Path, typer.Option(help="Folder that holds the recipe's sets.")] = Path("../shared/data"),
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, sheets and the adapter.")] = Path("data/training"),
    embeddings: Annotated[Path, typer.Option(help="Folder of encoded photos.")] = Path("data/embeddings"),
    weights: Annotated[Path, typer.Option(help="Base weights.")] = BUNDLED,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
    encoder: Annotated[EncoderChoice, typer.Option(help="How photos are encoded.")] = "auto",
    compiled: Annotated[Path, typer.Option(help="Folder of the compiled encoder.")] = Path("~/.cache/graco"),
    precision: Annotated[str | None, typer.Option(help="bf16, or no: fp32; else what the recipe says.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: one per core.")] = 0,
) -> None:
    """Train the granularity adapter that ships, from the sets and settings of a recipe; a stopped run goes on."""
    console = Console(stderr=True)
    logging.basicConfig(level="INFO", format="%(message)s")
    if threads:
        torch.set_num_threads(threads)
    try:
        overrides = {"device": device} if precision is None else {"device": device, "precision": precision}
        recipe = Recipe.read(config, **overrides)
        segmenter: Any = load_segmenter(
            "light", weights, device=device, encoder=encoder, threads=threads, compiled=compiled.expanduser()
        )
        with progress_bar(console, TextColumn("{task.fields[said]}")) as bars:

            def stage(name: str, steps: int) -> Callable[[int, str], None]:
                task = bars.add_task(name, total=steps, said="")

                def told(done: int, said: str) -> None:
                    bars.update(task, completed=done, said=said)

                return told

            path = train_base(recipe, segmenter, data, out, embeddings=embeddings, stage=stage)
    except Refusal as refusal:
        console.print(f"[red]{escape(str(refusal))}[/red]")
        raise typer.Exit(2) from refusal
    except OSError as error:
        said = f"{error}{remedy_of(error, {'--out': out, '--embeddings': embeddings})}"
        console.print(f"[red]{escape(said)}[/red]")
        raise typer.Exit(2) from error
    print(path)


@app.command("bundle")
def bundle_command(
    data: Annotated[Path, typer.Option(help="Folder that holds the source, ccp-person-clothing.")] = Path(
        "../shared/data"
    ),
    out: Annotated[
        Path, typer.Option(help="Gets replay/ and reference/; those that are there are replaced.")
    ] = BUNDLED_SETS,
    replay: Annotated[int, typer.Option(min=1, help="Photos of the replay set.")] = 24,
    reference: Annotated[int, typer.Option(min=1, help="Photos of the reference set.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Decides among photos that are equally good.")] = 0,
) -> None:
    """Make the small sets that ship: photos to train on again, so that nothing is forgotten, and photos to see that."""
    try:
        bundle(data, out, replay=replay, reference=reference, seed=seed)
    except Refusal as refusal:
        Console(stderr=True).print(f"[red]{escape(str(refusal))}[/red]")
        raise typer.Exit(2) from refusal
    except OSError as error:
        said = f"{error}{remedy_of(error, {'--out': out})}"
        Console(stderr=True).print(f"[red]{escape(said)}[/red]")
        raise typer.Exit(2) from error
    print(out)


if __name__ == "__main__":
    app()
