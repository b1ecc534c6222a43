"""The commands of `python -m ml_backend weights`: import, list, show, verify, export, remove."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ml_backend.command_line import refusing
from ml_backend.settings import Settings

if TYPE_CHECKING:  # torch is loaded by the command that runs, not by each
    from ml_backend.weights_store import WeightsStore
    from model.graco.weights import Kind

app = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="as list shows it")]


class Part(StrEnum):
    """What a checkpoint can hold."""

    base = "base"
    adapter = "adapter"


class Form(StrEnum):
    """Formats of an export."""

    pth = "pth"
    safetensors = "safetensors"


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="a published checkpoint: .pth or .safetensors")],
    name: Annotated[str | None, typer.Option(help="to keep it by; unset: made from the file's name")] = None,
    base: Annotated[
        str | None, typer.Option(help="the base that an adapter is for; unset: the only one it fits")
    ] = None,
    part: Annotated[Part | None, typer.Option(help="which to take from a file that holds both")] = None,
) -> None:
    """Convert a checkpoint of SimpleClick or GraCo, checked name by name, and keep it; nothing in it is executed."""
    with _refusing(context) as store:
        kind: Kind | None = None if part is None else part.value
        card = store.import_(file, now=datetime.now(UTC), name=name, base=base, part=kind)
        print(f"{card.name}: {card.kind} for {card.architecture['name']} at {card.input_size} px, {card.digest[:12]}")
        if card.not_used:
            print(
                f"{len(card.not_used)} of its {card.tensors} tensors are not used: {', '.join(card.not_used[:4])}, ..."
            )


@app.command("list")
def list_(context: typer.Context) -> None:
    """List the imported weights."""
    with _refusing(context) as store:
        cards = [store.card(name) for name in store.names()]
        names = {card.digest: card.name for card in cards}
        whole = (Column(header, no_wrap=True) for header in ("name", "kind", "network, px", "digest"))
        table = Table(*whole, "for base", "from")
        for card in cards:
            network = f"{card.architecture['name']} {card.input_size}"
            base = names.get(card.base, "gone") if card.base else ""
            table.add_row(*map(escape, (card.name, card.kind, network, card.digest[:12], base, card.origin)))
        if table.row_count:
            Console().print(table)
        else:
            print("no weights are imported yet; to import some: python -m ml_backend weights import FILE")


@app.command()
def show(context: typer.Context, name: Name) -> None:
    """Print all that is known of imported weights, as JSON."""
    with _refusing(context) as store:
        print(json.dumps(asdict(store.card(name)), indent=2, sort_keys=True))


@app.command()
def verify(context: typer.Context, name: Name) -> None:
    """Read weights through, and compare them with what was imported."""
    with _refusing(context) as store:
        card = store.verify(name)
        print(f"{card.name}: {card.tensors} tensors are as they were imported from {card.origin}")


@app.command()
def export(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="as list shows it, or the file of an adapter that was trained here")],
    file: Annotated[Path, typer.Argument(help="the file to write")],
    form: Annotated[Form | None, typer.Option("--format", help="unset: by the file's name, else pth")] = None,
) -> None:
    """Write weights in the published format, for the published code."""
    with _refusing(context) as store:
        chosen = form or (Form.safetensors if file.suffix == ".safetensors" else Form.pth)
        print(store.export(name, file, chosen.value))


@app.command()
def remove(context: typer.Context, name: Name) -> None:
    """Remove imported weights; a base goes after its adapters."""
    with _refusing(context) as store:
        store.remove(name)
        print(f"removed {name}")


@contextmanager
def _refusing(context: typer.Context) -> Iterator[WeightsStore]:
    """Give the store; end with a sentence where something cannot be done."""
    from ml_backend.weights_store import open_store

    with refusing():
        yield open_store(context.ensure_object(Settings))
