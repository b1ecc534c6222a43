"""The commands of `python -m ml_backend adapters`: list, show, compare, activate, rollback, prune, export, import."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from active_learning.lines import line_of
from ml_backend.command_line import refusing
from ml_backend.scoring import ask_for_lines_scores
from ml_backend.settings import Settings
from ml_backend.version_facts import VERDICTS, made_at, numbers_in, shown, side_by_side, why_rejected
from model.types import Refusal

if TYPE_CHECKING:  # torch is loaded by the command that runs, not by each
    from active_learning.registry import AdapterRegistry, AdapterVersion

app = typer.Typer(no_args_is_help=True)

Line = Annotated[str, typer.Argument(help="shared, or a project by its id: 7 or project-7")]
Version = Annotated[str, typer.Argument(help="a version's id, or its number: v0003-1a2b3c4d or 3")]


@app.command("list")
def list_(
    context: typer.Context,
    line: Annotated[str | None, typer.Argument(help="shared, or a project by its id; none: all lines")] = None,
) -> None:
    """List the versions of a line or of all, and say which one serves."""
    with _refusing(context) as registry:
        lines = registry.lines() if line is None else [_line(line)]
        table = Table("", "line", "version", "made, UTC", "accepted", "parent", "scores", "note")
        for name in lines:
            active = registry.active_id(name)
            for version in registry.versions(name):
                serves = "serves" if version.id == active else ""
                table.add_row(*(escape(text) for text in (serves, *_cells(version))))
        if table.row_count:
            Console().print(table)
        else:
            print("no version is kept yet; the configured adapter serves")


@app.command()
def show(context: typer.Context, line: Line, version: Version) -> None:
    """Print all that is known of a version, as JSON."""
    with _refusing(context) as registry:
        found = _find(registry, line, version)
        print(json.dumps(registry.card(found.line, found.id), indent=2, sort_keys=True, ensure_ascii=False))
        for path in sorted(registry.path(found).parent.iterdir()):
            print(path)


@app.command()
def compare(context: typer.Context, line: Line, first: Version, second: Version) -> None:
    """Print the scores of two versions of a line side by side, with what each was made of."""
    with _refusing(context) as registry:
        versions = [_find(registry, line, version) for version in (first, second)]
        table = Table("", *(escape(version.id) for version in versions), "difference")
        for row in side_by_side(*versions):
            table.add_row(*map(escape, row))
        Console().print(table)


@app.command()
def activate(
    context: typer.Context,
    line: Line,
    version: Annotated[str, typer.Argument(help="a version's id or number, or none: what is configured")],
    force: Annotated[bool, typer.Option("--force", help="also one that its comparison rejected")] = False,
) -> None:
    """Have a version serve its line within a second; none: the shared line or the configured adapter does."""
    with _refusing(context) as registry:
        name = _line(line)
        if version == "none":
            registry.activate(name, None)
            ask_for_lines_scores(context.ensure_object(Settings), name)
            print(f"{name}: none of its own")
            return
        found = _find(registry, line, version)
        if found.accepted is False and not force:
            raise Refusal(f"{why_rejected(found)}; to serve it: --force")
        before = registry.active_id(name)
        registry.activate(name, found.id)
        ask_for_lines_scores(context.ensure_object(Settings), name)
        print(f"{name}: {before or 'none of its own'} -> {found.id}")


@app.command()
def rollback(context: typer.Context, line: Line) -> None:
    """Serve again what served a line before; once more: what served before that. What is damaged is passed over."""
    with _refusing(context) as registry:
        name = _line(line)
        way = registry.roll_back(name)
        ask_for_lines_scores(context.ensure_object(Settings), name)
        for why in way.passed_over:
            print(f"passed over: {why}")
        print(f"{name}: {way.was} -> {way.now.id if way.now else 'none of its own'}")


@app.command()
def prune(
    context: typer.Context, line: Line, keep: Annotated[int, typer.Option(min=0, help="newest versions to keep")] = 10
) -> None:
    """Remove old versions; what serves stays, and so do its parent and the one to go back to."""
    with _refusing(context) as registry:
        removed = registry.prune(_line(line), keep=keep)
        print("\n".join(f"removed {version}" for version in removed) or "nothing to remove")


@app.command()
def export(
    context: typer.Context,
    line: Line,
    version: Version,
    target: Annotated[Path, typer.Argument(help="a file to write, or a folder to put it in")] = Path("."),
) -> None:
    """Write a version as one file, to be imported elsewhere."""
    with _refusing(context) as registry:
        found = _find(registry, line, version)
        print(registry.export(found.line, found.id, target))


@app.command("import")
def import_(
    context: typer.Context,
    line: Line,
    source: Annotated[Path, typer.Argument(help="an exported version, or an adapter file")],
) -> None:
    """Keep a version that was exported elsewhere; it serves once it is activated."""
    with _refusing(context) as registry:
        found = registry.import_(_line(line), source)
        print(
            f"{found.line}: {found.id} is kept; to serve it: python -m ml_backend adapters activate {line} {found.id}"
        )


@contextmanager
def _refusing(context: typer.Context) -> Iterator[AdapterRegistry]:
    """Give the registry; end with a sentence where something cannot be done."""
    from ml_backend.service import open_registry

    with refusing():
        yield open_registry(context.ensure_object(Settings))


def _line(text: str) -> str:
    return line_of(int(text)) if text.isascii() and text.isdigit() else text


def _find(registry: AdapterRegistry, line: str, version: str) -> AdapterVersion:
    """Return a version by its id, or by its number where that is clear."""
    name = _line(line)
    if not (version.isascii() and version.isdigit()):
        return registry.get(name, version)
    found = [one for one in registry.versions(name) if int(one.id[1:].partition("-")[0]) == int(version)]
    if not found:
        known = ", ".join(one.id for one in registry.versions(name)) or "none"
        raise Refusal(f"line {name} has no version number {version}; it has: {known}")
    return found[-1]


def _cells(version: AdapterVersion) -> tuple[str, ...]:
    scores = (f"{name} {shown(value)}" for name, value in numbers_in(version.scores))
    return (
        *(version.line, version.id, made_at(version), VERDICTS[version.accepted]),
        *(version.parent or "configured", ", ".join(list(scores)[:4]), version.note[:120]),
    )
