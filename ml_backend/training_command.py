"""The commands `python -m ml_backend train start | status | cancel`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from active_learning.status import TrainingStatus, lines_in
from ml_backend.settings import Settings
from ml_backend.trainings import cancel, folder_of, line_of, request

app = typer.Typer(no_args_is_help=True, help="Ask for a training, look at trainings, stop one.")

Project = Annotated[int | None, typer.Option(help="The project; none: the shared line.")]


@app.callback()
def _settings(context: typer.Context) -> None:
    from ml_backend.__main__ import read_settings  # which imports this

    context.obj = read_settings()


@app.command()
def start(
    context: typer.Context,
    project: Project = None,
    wait: Annotated[bool, typer.Option(help="wait until it has come to an end")] = False,
    thorough: Annotated[bool, typer.Option(help="up to four times as long, as at night")] = False,
) -> None:
    """Ask for a training on all corrections of a project; one that is pending is as good (not for a thorough one)."""
    settings: Settings = context.obj
    status = request(settings, _line(settings, project), "asked for by command", thorough=thorough)
    print(f"{status.id}: {status.state}")
    if thorough and not status.thorough:
        print("it was asked for before, and is not a thorough one: ask again once it has ended")
        raise typer.Exit(1)
    if not wait:
        return
    while True:
        ended = [one for one in folder_of(settings, status.line).history() if one.id == status.id]
        if ended:
            print(f"{ended[0].state}: {ended[0].said}")
            raise typer.Exit(1 if ended[0].state == "failed" else 0)
        time.sleep(1)


@app.command("status")
def show(
    context: typer.Context,
    project: Project = None,
    last: Annotated[int, typer.Option(min=1, help="trainings of each line to show")] = 10,
) -> None:
    """Show trainings that run, wait or ended, by line."""
    settings: Settings = context.obj
    folder = settings.shared / "trainings"
    lines = lines_in(folder) if project is None else [_line(settings, project)]
    table = Table("training", "asked, UTC", "why", "state", "masks", "steps", "loss", "left", "version", "said")
    for line in lines:
        trainings = folder_of(settings, line)
        pending = trainings.pending()
        for status in [*trainings.history()[-last:], *([] if pending is None else [pending])]:
            table.add_row(*(escape(text) for text in _cells(status)))
    if table.row_count:
        Console().print(table)
    else:
        print("no training was asked for yet")


@app.command("cancel")
def stop(context: typer.Context, project: Project = None) -> None:
    """Stop the training that is pending; nothing of it is served."""
    settings: Settings = context.obj
    line = _line(settings, project)
    found = cancel(settings, line)
    if found is None:
        print(f"no training of {line} is pending")
        raise typer.Exit(1)
    status, ended = found
    print(f"{status.id} {'is cancelled' if ended else 'will stop at its next step'}")


def _line(settings: Settings, project: int | None) -> str:
    return "shared" if project is None else line_of(settings, project)


def _cells(status: TrainingStatus) -> tuple[str, ...]:
    return (
        status.id,
        datetime.fromtimestamp(status.asked_s, UTC).strftime("%Y-%m-%d %H:%M:%S"),
        status.why,
        status.state,
        str(status.masks),
        f"{status.step}/{status.steps}" if status.steps else "",
        "" if status.loss is None else f"{status.loss:.3f}",
        "" if status.left_s is None else f"{status.left_s:.0f} s",
        status.version or "",
        status.said,
    )
