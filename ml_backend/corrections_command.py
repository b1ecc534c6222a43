"""The commands `python -m ml_backend corrections list | show | export | counts | forget`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from active_learning.corrections import Correction, CorrectionStore, held_out
from active_learning.images import ImageStore
from ml_backend.command_line import require_ledger
from ml_backend.settings import Settings
from model.types import Refusal

app = typer.Typer(no_args_is_help=True, help="Look at what annotators corrected, take it elsewhere, forget it.")

_WIDE = 200  # columns, where the output is no terminal
_LOOKED_AT = 500  # corrections whose level is found out, the newest

Project = Annotated[int | None, typer.Option(help="its id in Label Studio; unset: all")]
Since = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="last changed on this UTC day or later")]
Annotator = Annotated[int | None, typer.Option(help="their id in Label Studio")]


class KindOption(StrEnum):
    """What became of a region."""

    accepted = "accepted"
    corrected = "corrected"
    drawn = "drawn"
    predicted = "predicted"
    predicted_changed = "predicted-changed"


Kinds = Annotated[list[KindOption] | None, typer.Option("--kind", help="may be given several times; unset: all")]


@app.command("list")
def show_list(
    context: typer.Context,
    project: Project = None,
    since: Since = None,
    kind: Kinds = None,
    annotator: Annotator = None,
    limit: Annotated[int, typer.Option(min=1, help="the newest so many")] = 50,
) -> None:
    """List corrections, the newest first."""
    with _store(context) as store:
        found = _found(store, project, since, kind, annotator, limit)
    _print_corrections(found)


@app.command()
def show(
    context: typer.Context,
    annotation: Annotated[int, typer.Argument(help="its id in Label Studio")],
    project: Annotated[int, typer.Option(help="its id in Label Studio")],
) -> None:
    """Show all that is known of one annotation's regions."""
    with _store(context) as store:
        found = store.get(str(project), annotation)
    if not found:
        typer.secho(f"nothing is in use of annotation {annotation} in project {project}", fg="red", err=True)
        raise typer.Exit(1)
    for one in found:
        table = Table.grid(padding=(0, 2))
        for name, value in _details(one).items():
            table.add_row(name, escape(value))
        _console().print(table, "")


@app.command()
def export(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(help="folder to make; it must not hold anything yet")],
    project: Project = None,
    since: Since = None,
    kind: Kinds = None,
    annotator: Annotator = None,
) -> None:
    """Write corrections and their pictures as COCO, in a folder that others can read."""
    from active_learning.exports import write_coco

    settings: Settings = context.obj
    with _store(context) as store:
        found = _found(store, project, since, kind, annotator, None)
    try:
        written = write_coco(found, ImageStore(settings.data_dir / "images").path, target)
    except (Refusal, OSError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from error
    print(f"{written} corrections are in {target}")


@app.command()
def counts(context: typer.Context, project: Project = None) -> None:
    """Count corrections by kind, annotator and day, and the events that wait or failed; say what they suggest."""
    from ml_backend.inbox import Inbox

    settings: Settings = context.obj
    with _store(context) as store:
        name = None if project is None else str(project)
        found, strays = store.counts(name), store.strays(name)
        advice = None if settings.default_granularity is not None else _advice(store, name)
    with closing(Inbox(settings.data_dir / "inbox.sqlite")) as inbox:
        events, failures = inbox.counts(), inbox.failures()
    print(f"{found.corrections} corrections in {found.annotations} annotations on {found.images} images")
    print(f"held out to judge by: {found.held_out} on {found.held_out_images} images")
    for what, group in (("kind", found.kinds), ("annotator", found.annotators), ("day", found.days)):
        print(f"by {what}: {', '.join(f'{key} {count}' for key, count in group.items()) or 'none'}")
    print(f"events: {events['undone']} wait, {events['failed']} failed, {events['done']} done in the last week")
    for key, action, error in failures[:10]:
        print(f"  {key} {action}: {error}")
    for owner, classes in strays.items():
        listed = ", ".join(f"{label} {count}" for label, count in classes.items())
        typer.secho(
            f"project {owner} has no such class any more: {listed}. These corrections keep it, and are learned from as "
            "before: masks are, classes are not",
            fg="yellow",
            err=True,
        )
    if advice is not None:
        print(advice)


@app.command()
def forget(
    context: typer.Context,
    project: Annotated[int, typer.Option(help="its id in Label Studio")],
    task: Annotated[int | None, typer.Option(help="its id in Label Studio; unset: the whole project")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Forget a task's photo for good: its corrections, its file, what was encoded of it and answered on it."""
    from ml_backend import forgetting
    from ml_backend.answers import AnswerStore

    settings: Settings = context.obj
    path = settings.data_dir / "answers.sqlite"
    where = f"project {project}" if task is None else f"task {task} of project {project}"
    with _store(context) as store, closing(AnswerStore(path, limit=settings.remembered_answers)) as answers:
        found = forgetting.find(store, answers, str(project), task)
        print(f"{where}: {len(found.corrections)} corrections on {len(found.photos)} photos that nothing else names")
        if found.shared:
            print(f"{len(found.shared)} photos stay, since other corrections name them")
        if not yes:
            typer.confirm("Forget them? This cannot be undone", abort=True)
        try:
            gone = forgetting.forget(settings, store, answers, found)
        except (OSError, sqlite3.Error) as error:
            typer.secho(f"not all could be forgotten ({error}); run this again", fg="red", err=True)
            raise typer.Exit(1) from error
    print(f"forgotten, with {gone} answers. Delete {where} in Label Studio, too: an edit there brings a photo back")


def _advice(store: CorrectionStore, project: str | None) -> str | None:
    """Return what the levels of the newest corrections suggest for clicks without one, or None."""
    from active_learning.snapshots import usual_level

    level = usual_level(store.corrections(project, limit=_LOOKED_AT))
    if level is None:
        return None
    said = "whole objects" if level == 1 else f"parts of level about {level:g}"
    return (
        f'most corrections are {said}: write graco="{level:g}" on the granularity tag of the project, or set '
        f"GRACO_DEFAULT_GRANULARITY={level:g} for all, and clicks without a level are answered by what was learned "
        "from them (docs/learning.md)"
    )


@contextmanager
def _store(context: typer.Context) -> Iterator[CorrectionStore]:
    settings: Settings = context.obj
    require_ledger(settings)
    with closing(CorrectionStore(settings.data_dir / "corrections.sqlite")) as store:
        yield store


def _found(
    store: CorrectionStore,
    project: int | None,
    since: datetime | None,
    kinds: list[KindOption] | None,
    annotator: int | None,
    limit: int | None,
) -> list[Correction]:
    return store.corrections(
        None if project is None else str(project),
        since_s=since.replace(tzinfo=UTC).timestamp() if since else 0,
        kinds=[kind.value for kind in kinds] if kinds else None,
        annotator=annotator,
        limit=limit,
    )


def _print_corrections(found: list[Correction]) -> None:
    if not found:
        print("no corrections yet")
        return
    table = Table("changed, UTC", "project", "task", "annotation", "region", "kind", "class", "level", "annotator")
    for one in found:
        cells = (
            *(_moment(one.updated_s), one.project, str(one.task or ""), str(one.annotation), one.region, one.kind),
            *(one.label, _number(one.granularity), str(one.annotator or "")),
        )
        table.add_row(*(escape(cell) for cell in cells))
    _console().print(table)


def _details(one: Correction) -> dict[str, str]:
    return {
        "region": one.region,
        "kind": one.kind,
        "class": one.label or "none",
        "level": _number(one.granularity) or "not given",
        "phrase": one.phrase or "none",
        "clicks": ", ".join(f"{'+' if c.positive else '-'}({c.x:.0f}, {c.y:.0f})" for c in one.clicks) or "not known",
        "proposed": "known" if one.proposed is not None else "not known",
        "adapter": one.adapter or "none",
        "annotator": str(one.annotator or "not known") + (", ground truth" if one.ground_truth else ""),
        "changed": f"{_moment(one.updated_s)} UTC",
        "image": f"{one.image}, {one.width} x {one.height} pixels{', held out' if held_out(one.image) else ''}",
    }


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
