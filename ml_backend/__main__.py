"""The commands: python -m ml_backend run | worker | trainer | train | adapters | corrections | ... (see README)."""

from __future__ import annotations

import logging
import signal
import sys
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from ml_backend import adapters_command, corrections_command, logs, training_command, weights_command
from ml_backend.fetch import make_fetcher
from ml_backend.label_config import check_config, make_config
from ml_backend.settings import Settings
from model.types import Refusal

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.add_typer(training_command.app, name="train")
app.add_typer(adapters_command.app, name="adapters")
app.add_typer(corrections_command.app, name="corrections")
app.add_typer(weights_command.app, name="weights")
log = logging.getLogger(__name__)


class Order(StrEnum):
    """In which order a simulated team takes photos."""

    random = "random"
    active = "active"
    both = "both"


class Output(StrEnum):
    """Kinds of region a mask can be answered as."""

    brush = "brush"
    bitmask = "bitmask"
    polygon = "polygon"
    rectangle = "rectangle"


class ProcessName(StrEnum):
    """Processes that `run` starts, besides Redis."""

    web = "web"
    worker = "worker"
    trainer = "trainer"


def read_settings() -> Settings:
    """Return the settings, or end with one line for each variable that is wrong."""
    try:
        settings = Settings()
        make_fetcher(settings)  # reads address, token and allow-list more closely
    except ValidationError as error:
        for problem in error.errors():
            name = "_".join(str(part) for part in problem["loc"]).upper()
            name = name if name.startswith("LABEL_STUDIO") else f"GRACO_{name}"
            private = name.endswith(("_URL", "_KEY", "PASSWORD", "_SECRET"))
            given = "" if private else f" (it is {problem['input']!r})"
            typer.secho(f"{name}: {problem['msg']}{given}", fg="red", err=True)
        raise typer.Exit(2) from error
    except Refusal as refusal:
        typer.secho(str(refusal), fg="red", err=True)
        raise typer.Exit(2) from refusal
    logs.hide(settings.secrets())
    logs.configure(settings.log_level, as_json=settings.log_json)
    return settings


@adapters_command.app.callback()
def adapters(context: typer.Context) -> None:
    """Look at adapter versions, choose which one serves, move them about."""
    context.obj = read_settings()


@corrections_command.app.callback()
def corrections(context: typer.Context) -> None:
    """Look at what annotators corrected, take it elsewhere, forget it."""
    context.obj = read_settings()


@weights_command.app.callback()
def weights(context: typer.Context) -> None:
    """Take in published checkpoints for the graco family, look at them, write them back."""
    context.obj = read_settings()


@app.command()
def run() -> None:
    """Start everything this machine needs: Redis, workers and the web server."""
    from ml_backend.credentials import open_secrets
    from ml_backend.supervisor import run as supervise

    settings = read_settings()
    log.info("starting on http://%s:%d, data under %s", settings.host, settings.port, settings.data_dir.resolve())
    try:
        open_secrets(settings)
        raise typer.Exit(supervise(settings))
    except Refusal as refusal:
        typer.secho(str(refusal), fg="red", err=True)
        raise typer.Exit(1) from refusal
    except OSError as error:
        log.error("%s: choose another GRACO_DATA_DIR, or mend its permissions", error)
        raise typer.Exit(1) from error


@app.command()
def worker(burst: Annotated[bool, typer.Option(help="end when no job is left")] = False) -> None:
    """Take in corrections and encode imported images ahead, from the queues on GRACO_REDIS_URL."""
    from ml_backend.jobs import work

    work(read_settings(), burst=burst)


@app.command()
def trainer(once: Annotated[bool, typer.Option(help="end when no training is asked for")] = False) -> None:
    """Carry out the trainings that are asked for, one after another, each in a process of its own."""
    from ml_backend.trainings import work

    work(read_settings(), once=once)


@app.command()
def reconcile(
    project: Annotated[int | None, typer.Option(help="only this one; unset: all that have this backend")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="try events again that were given up")] = False,
) -> None:
    """Fetch the corrections that webhooks lost, and take in what waits."""
    from contextlib import closing

    from ml_backend.command_line import require_ledger
    from ml_backend.connections import NOT_CONNECTED
    from ml_backend.ingest import open_intake
    from ml_backend.reconcile import reconcile as compare
    from ml_backend.reconcile import take_in
    from model.bars import progress_bar

    settings = read_settings()
    require_ledger(settings)
    with closing(open_intake(settings)) as intake, progress_bar(Console(stderr=True)) as bar:
        if retry:
            intake.inbox.retry()
        looked = bar.add_task("tasks", total=None)
        try:
            found = compare(
                *(settings, intake),
                project=project,
                report=lambda number, done, total: bar.update(
                    looked, description=f"tasks of project {number}", completed=done, total=total
                ),
            )
        except Refusal as refusal:
            typer.secho(str(refusal), fg="red", err=True)
            raise typer.Exit(1) from refusal
        taken = bar.add_task("events", total=None)
        take_in(intake, lambda done, total: bar.update(taken, completed=done, total=total))
        failures = intake.inbox.failures()
        waiting = intake.inbox.counts()["undone"]
    if not found.projects:
        typer.secho(NOT_CONNECTED, fg="yellow", err=True)
    print(f"{len(found.ids)} projects: {found.added} annotations were missing, {found.deleted} are gone")
    if waiting or failures:
        typer.secho(f"{waiting} events wait to be tried again, {len(failures)} were given up", fg="yellow", err=True)
    for key, action, error in failures[:10]:
        typer.secho(f"  {key} {action}: {error}", fg="yellow", err=True)


@app.command()
def prepare() -> None:
    """Compile the image encoder for this machine, and see that all weights load, so that the first start is quick."""
    from ml_backend.families import adapter_file, load_model

    settings = read_settings()
    try:
        with Console(stderr=True).status("compiling the image encoder for this machine"):
            segmenter = load_model(settings, adapter=adapter_file(settings))
    except Refusal as refusal:
        typer.secho(str(refusal), fg="red", err=True)
        raise typer.Exit(1) from refusal
    print(f"{segmenter.encoding} with adapter {segmenter.adapter or 'none'} is ready")


@app.command("label-config")
def label_config(
    classes: Annotated[list[str] | None, typer.Argument(help="class labels, such as: Car Wheel")] = None,
    output: Annotated[Output, typer.Option(help="kind of region a mask is answered as")] = Output.brush,
    usual: Annotated[
        str | None, typer.Option(help="what a click without a level gets: all (levels at once), or one, 0..1")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="check this labelling configuration instead of printing one")
    ] = None,
) -> None:
    """Print a ready labelling configuration for given classes, or check a file and say what is missing and why."""
    if check is None:
        if not classes:
            raise typer.BadParameter("name at least one class, or a file to check with --check")
        try:
            print(make_config(classes, output=output.value, usual=usual))
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


@app.command()
def start(
    name: Annotated[ProcessName, typer.Argument(help="the process to become")],
) -> None:
    """Become one of the processes that `run` starts, with its environment: for containers, which have one each."""
    from ml_backend.supervisor import become

    become(read_settings(), name.value)


@app.command()
def health(
    ready: Annotated[bool, typer.Option("--ready", help="also the model, Redis and a corrections worker")] = False,
    of_worker: Annotated[bool, typer.Option("--worker", help="of this machine's corrections worker instead")] = False,
) -> None:
    """Ask the web process on this machine whether it is alive, or ready; ends with status 1 if it is not."""
    from ml_backend.health_command import ask_health, ask_worker

    settings = read_settings()
    told = ask_worker(settings) if of_worker else ask_health(settings, ready=ready)
    for sentences, colour in ((told.reasons, "red"), (told.notes, "yellow")):
        for sentence in sentences:
            typer.secho(sentence, fg=colour, err=True)
    raise typer.Exit(1 if told.reasons else 0)


@app.command("connect")
def connect_command(
    project: Annotated[int | None, typer.Option(help="its id in Label Studio")] = None,
    create: Annotated[str | None, typer.Option(help="title of the project to make, or to use if there is one")] = None,
    url: Annotated[
        str | None, typer.Option(help="this backend's address as Label Studio reaches it; unset: on this machine")
    ] = None,
    label_config: Annotated[Path | None, typer.Option(help="file of the labelling configuration to set")] = None,
    classes: Annotated[str | None, typer.Option(help="or class labels to make one for: Car,Wheel")] = None,
    output: Annotated[Output, typer.Option(help="with --classes: kind of region a mask is answered as")] = Output.brush,
    force: Annotated[
        bool, typer.Option("--force", help="replace a labelling configuration that annotations were made with")
    ] = False,
) -> None:
    """Connect this backend to a project: password, labels, a webhook that is let in; twice changes nothing."""
    from ml_backend.connect import Wish, connect, default_url

    if (project is None) == (create is None):
        raise typer.BadParameter("name the project: --project ID, or --create TITLE")
    if label_config is not None and classes is not None:
        raise typer.BadParameter("give --label-config or --classes, not both")
    settings = read_settings()
    try:
        config = label_config.read_text() if label_config is not None else None
        if classes is not None:
            config = make_config([name.strip() for name in classes.split(",")], output=output.value)
        wish = Wish(url=url or default_url(settings), project=project, create=create, label_config=config, force=force)
        for line in connect(settings, wish):
            print(line)
    except (Refusal, OSError, UnicodeDecodeError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from error


@app.command("next-tasks")
def next_tasks(
    project: Annotated[int, typer.Option(help="its id in Label Studio")],
    limit: Annotated[int | None, typer.Option(min=1, help="tasks looked at in this run; the next one goes on")] = None,
    best: Annotated[
        int | None, typer.Option(min=1, help="tasks that get a score; unset: all, or 20 where several people annotate")
    ] = None,
    set_sampling: Annotated[
        bool, typer.Option("--set-sampling", help="switch the project to uncertainty sampling by these scores")
    ] = False,
) -> None:
    """Score a project's unlabelled tasks so that Label Studio shows the one most worth correcting first."""
    from ml_backend.next_tasks import score_tasks
    from ml_backend.service import Service

    service = Service(read_settings())
    try:
        outcome = score_tasks(
            service, project, limit=limit, best=best, set_sampling=set_sampling, console=Console(stderr=True)
        )
    except Refusal as refusal:
        typer.secho(str(refusal), fg="red", err=True)
        raise typer.Exit(1) from refusal
    finally:
        service.close()
    print(outcome)


@app.command("simulate")
def simulate_command(
    data: Annotated[Path, typer.Argument(help="annotated photos: a folder as ../shared/data has them")],
    report: Annotated[Path, typer.Option(help="JSON file for the figures; curves are drawn beside it")],
    rounds: Annotated[str, typer.Option(help="corrections after which a training is asked for")] = "100,300",
    budget: Annotated[int, typer.Option(min=1, max=100, help="clicks on one object at most, when measured")] = 20,
    limit: Annotated[int, typer.Option(min=1, help="objects measured of hold-out and reference set")] = 40,
    seed: Annotated[int, typer.Option(help="of the order of the photos")] = 0,
    order: Annotated[Order, typer.Option(help="in which photos come; both: one team each, and what that saves")] = (
        Order.random
    ),
    keep: Annotated[Path | None, typer.Option(help="empty folder for the backend's data; unset: none is kept")] = None,
    thorough: Annotated[bool, typer.Option(help="ask for a thorough training too after each, as at night")] = False,
) -> None:
    """Simulate a team that annotates photos and trains, and report the clicks an object takes before and after."""
    import tempfile

    from ml_backend.simulate import Plan, simulate, write_report
    from model.annotations import read_annotations

    console = Console(stderr=True)
    ends = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]

    def end(number: int, _: FrameType | None) -> NoReturn:
        for one in ends:  # a second one must not disturb: the backends are stopped on the way out
            signal.signal(one, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in ends:
        signal.signal(number, end)
    try:
        plan = Plan(
            rounds=tuple(int(text) for text in rounds.split(",")),
            budget=budget,
            limit=limit,
            seed=seed,
            orders=("random", "active")
            if order == Order.both
            else ("active",)
            if order == Order.active
            else ("random",),
            thorough=thorough,
        )
        found = read_annotations(data)
        with tempfile.TemporaryDirectory() as spare:
            done = simulate(found, plan, keep or Path(spare), say=lambda text: console.print(escape(text)))
        figures = write_report(report, found, plan, done)
    except (Refusal, ValueError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from error
    for name in ("noc85_before", "noc85_after", "noc90_reference_before", "noc90_reference_after"):
        print(f"{name}: {figures[name]:.2f}")
    if (needed := figures["active_against_random"]) is not None:
        print(
            f"NoC@85 {needed['noc85']:.2f} takes {needed['random']:.0f} corrections in random order and "
            f"{needed['active']:.0f} in active order: {needed['ratio']:.2f} x"
        )


if __name__ == "__main__":
    app()
