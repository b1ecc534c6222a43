"""What all commands have in common: how they end where something cannot be done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from model.types import Refusal


@contextmanager
def refusing() -> Iterator[None]:
    """End the command with a sentence and status 2 where something cannot be done."""
    try:
        yield
    except Refusal as refusal:
        typer.secho(str(refusal), fg="red", err=True)
        raise typer.Exit(2) from refusal
    except OSError as error:
        typer.secho(f"{error}; free some space, or mend permissions, and try again", fg="red", err=True)
        raise typer.Exit(2) from error
