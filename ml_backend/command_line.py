"""What commands have in common: how they end where something cannot be done, or not on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ml_backend.settings import Settings
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


def require_ledger(settings: Settings) -> None:
    """End the command with a sentence and status 2 on a machine that keeps no corrections.

    It would make a ledger of its own there, empty and learned from by nobody.
    """
    if settings.ledger == "elsewhere":
        typer.secho(
            "corrections are kept by another machine (GRACO_LEDGER=elsewhere); run this there, beside the worker that "
            "takes them in. In the Kubernetes example: "
            "kubectl -n graco exec deploy/graco-worker -- python -m ml_backend corrections list",
            fg="red",
            err=True,
        )
        raise typer.Exit(2)
