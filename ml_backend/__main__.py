"""The commands: python -m ml_backend run | worker | prepare | label-config | doctor."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from ml_backend import logs
from ml_backend.fetch import make_fetcher
from ml_backend.label_config import check_config, make_config
from ml_backend.settings import Settings
from model.types import Refusal

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
log = logging.getLogger(__name__)


class Output(StrEnum):
    """Kinds of region a mask can be answered as."""

    brush = "brush"
    bitmask = "bitmask"
    polygon = "polygon"
    rectangle = "rectangle"


def read_settings() -> Settings:
    """Return the settings, or end with one line for each variable that is wrong."""
    try:
        settings = Settings()
        make_fetcher(settings)  # reads address, token and allow-list more closely
    except ValidationError as error:
        for problem in error.errors():
            name = "_".join(str(part) for part in problem["loc"]).upper()
            name = name if name.startswith("LABEL_STUDIO") else f"GRACO_{name}"
            given = "" if name.endswith(("_URL", "_KEY")) else f" (it is {problem['input']!r})"  # may hold a password
            typer.secho(f"{name}: {problem['msg']}{given}", fg="red", err=True)
        raise typer.Exit(2) from error
    except Refusal as refusal:
        typer.secho(str(refusal), fg="red", err=True)
        raise typer.Exit(2) from refusal
    logs.configure(settings.log_level, as_json=settings.log_json)
    return settings


@app.command()
def run() -> None:
    """Start everything this machine needs: Redis, the encode worker and the web server."""
    from ml_backend.supervisor import run as supervise

    settings = read_settings()
    log.info("starting on http://%s:%d, data under %s", settings.host, settings.port, settings.data_dir.resolve())
    try:
        raise typer.Exit(supervise(settings))
    except OSError as error:
        log.error("%s: choose another GRACO_DATA_DIR, or mend its permissions", error)
        raise typer.Exit(1) from error


@app.command()
def worker(burst: Annotated[bool, typer.Option(help="end when no job is left")] = False) -> None:
    """Encode imported images ahead, from the queue on GRACO_REDIS_URL."""
    from ml_backend.jobs import work

    work(read_settings(), burst=burst)


@app.command()
def prepare() -> None:
    """Compile the image encoder for this machine, and see that all weights load, so that the first start is quick."""
    from ml_backend.service import FAMILY, WEIGHTS, adapter_file
    from model.segmenter import load_segmenter

    settings = read_settings()
    try:
        with Console(stderr=True).status("compiling the image encoder for this machine"):
            segmenter = load_segmenter(
                *(FAMILY, WEIGHTS),
                adapter=adapter_file(settings),
                device=settings.device,
                compiled=settings.cache_dir,
            )
    except Refusal as refusal:
        typer.secho(str(refusal), fg="red", err=True)
        raise typer.Exit(1) from refusal
    print(f"{segmenter.encoding} with adapter {segmenter.adapter or 'none'} is ready")


@app.command("label-config")
def label_config(
    classes: Annotated[list[str] | None, typer.Argument(help="class labels, such as: Car Wheel")] = None,
    output: Annotated[Output, typer.Option(help="kind of region a mask is answered as")] = Output.brush,
    check: Annotated[
        Path | None, typer.Option(help="check this labelling configuration instead of printing one")
    ] = None,
) -> None:
    """Print a ready labelling configuration for given classes, or check a file and say what is missing and why."""
    if check is None:
        if not classes:
            raise typer.BadParameter("name at least one class, or a file to check with --check")
        try:
            print(make_config(classes, output=output.value))
        except Refusal as refusal:
            raise typer.BadParameter(str(refusal)) from refusal
        return
    console = Console()
    try:
        findings = check_config(check.read_text())
    except (OSError, UnicodeDecodeError, Refusal) as error:
        console.print(f"[red]error[/red] {escape(str(error))}")
        raise typer.Exit(1) from error
    colours = {"error": "red", "warning": "yellow", "info": "cyan"}
    for finding in findings:
        said = escape(f"{finding.tag}: {finding.sentence}")
        console.print(f"[{colours[finding.severity]}]{finding.severity}[/] {said}")
    if not findings:
        console.print("[green]nothing to mend[/green]")
    raise typer.Exit(1 if any(finding.severity == "error" for finding in findings) else 0)


@app.command()
def doctor() -> None:
    """Check Label Studio, token, webhook, images, Redis, weights and adapter, and print the remedy for each failure."""
    from ml_backend.doctor import examine, show

    raise typer.Exit(0 if show(examine(read_settings())) else 1)


if __name__ == "__main__":
    app()
