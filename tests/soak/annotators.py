"""Annotators at a real backend for minutes: python -m tests.soak.annotators --training --report FILE.json

The backend runs as `make run` starts it, with all its processes and with auth. Annotators think, open tasks with new
images of mixed sizes and formats, click, choose levels, type phrases, draw boxes, and submit; Label Studio asks for
/health and /setup in between, and with --training a training runs on what they submit, begun anew whenever one ends.

Before the clock starts, images are opened until the cache of encoded images is full, and a first training is carried
out on a version that serves already, so that the one to go back to is in memory too: a day's work does all that, and
what then still grows is a leak. Exits 1 where a figure is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
from rich.console import Console

from active_learning.corrections import CorrectionStore
from active_learning.lines import line_of
from active_learning.registry import AdapterRegistry
from active_learning.status import ENDED, TrainingFolder
from ml_backend.inbox import Inbox
from ml_backend.label_config import make_config
from ml_backend.simulate import Backend
from model.segmenter import BUNDLED, BUNDLED_ADAPTER, digest_of_file
from tests.bench.report import Row, machine, show
from tests.soak.memory import Process, Watch, growth
from tests.soak.people import CLICKS, PROJECT, Annotator, Caller, Team
from tests.soak.pictures import Pictures
from tests.soak.recorder import Recorder, percentiles

Json = dict[str, Any]
REACH_P95_S, REACH_GROWTH = 0.6, 5.0
_LITTLE_MB = 4.0  # a process that grew by less is not blamed: 5 % of a small one is one page of a database
_PASSING = ("training", "a job of the worker", "other")  # processes that come and go
_LEVELS = tuple(level / 10 for level in range(1, 11))
_FIRST_SUBMITTED = 12  # before a training can begin
_FILLING_CLICKS = 4  # on each image that is opened before the clock starts
_HEALTH_EVERY_S, _SCRAPE_EVERY_S = 2.0, 5.0
_BEGIN_S, _TAKEN_IN_S = 900.0, 180.0
_LONG_MINUTES = 5  # shorter runs are to try things out


def soak(options: argparse.Namespace, folder: Path) -> Json:
    """Return the report of one run."""
    secret = secrets.token_urlsafe()
    environment = {"GRACO_WEBHOOK_SECRET": secret, "GRACO_EMBEDDING_MEMORY_MB": str(options.embedding_memory)}
    photos, data = folder / "photos", folder / "data"
    photos.mkdir()
    backend = Backend(data, photos, environment=environment)
    try:
        team = Team(
            *(backend, Pictures(photos), Recorder(), make_config(["Object", "Part"], levels=_LEVELS), secret),
            *(options.think, threading.Event()),
        )
        trainings = TrainingFolder(data / "trainings", f"project-{PROJECT}")
        filled = _fill(team, options.embedding_memory)
        if options.training:
            _publish_bundled(data)
            filled |= _first_training(team, trainings, whole=options.minutes >= _LONG_MINUTES)
        filled |= {"errors": team.recorder.to_json()["first_errors"]}  # shown, not judged: everything starts up
        team.recorder = Recorder()
        watch = Watch(psutil.Process(), every_s=max(0.5, min(5.0, options.minutes / 2)))
        scrapes: list[dict[str, float]] = []
        trained: list[float] = []
        jobs = [Annotator(team, seed).work for seed in range(options.annotators)]
        jobs += [lambda: _ask_for_health(team), lambda: _scrape(team, scrapes)]
        jobs += [lambda: _keep_training(team, trainings, trained)] if options.training else []
        with ThreadPoolExecutor(len(jobs)) as people:
            futures = [people.submit(job) for job in jobs]
            until_s = time.monotonic() + 60 * options.minutes
            while time.monotonic() < until_s and not any(future.done() for future in futures):
                time.sleep(0.2)
            team.ending.set()
        lasted_s = watch.stop()
        for future in futures:
            future.result()
        lost = _lost(team, data)
        log = _faults(data / "simulate.log")
        return _report(
            options,
            team,
            lasted_s,
            watch,
            scrapes,
            filled=filled,
            lost=lost,
            log=log,
            training=_trainings(trainings, trained, lasted_s) if options.training else None,
        )
    finally:
        backend.close()


def _fill(team: Team, memory_mb: int) -> Json:
    """Open images until the cache of encoded ones is full, and submit what a first training needs."""
    start_s = time.monotonic()
    first = Annotator(team, 10**6)
    pictures = [team.pictures.new() for _ in range(_FIRST_SUBMITTED)]
    for picture in pictures:
        first.submit_drawn(picture)
    opened, held = 0, -1.0
    while (now := _metrics(team).get("graco_embedding_memory_bytes", 0.0)) < 0.97 * memory_mb * 2**20 and now > held:
        held = now
        with ThreadPoolExecutor(2) as people:  # enough to keep two cores busy
            list(people.map(lambda _: first.open(team.pictures.new(), _FILLING_CLICKS), range(8)))
        opened += 8
    while _metrics(team).get("graco_inbox_oldest_seconds", 0.0) and time.monotonic() - start_s < _BEGIN_S:
        time.sleep(1)
    return {"seconds": round(time.monotonic() - start_s), "images": opened, "embeddings_mb": round(now / 2**20)}


def _publish_bundled(data: Path) -> None:
    """Have the project served by a version of its own."""
    registry = AdapterRegistry(data / "adapters", base=digest_of_file(BUNDLED))
    registry.publish(line_of(PROJECT), BUNDLED_ADAPTER, card={"note": "as it comes"}, activate=True)


def _first_training(team: Team, trainings: TrainingFolder, *, whole: bool) -> Json:
    """Have a training begin, and where there is time end, so that its worker is there and its version is loaded."""
    start_s = time.monotonic()
    Caller(team).send("start training", "/webhook", _start_training(team), secret=True)
    wanted = ENDED if whole else ("running", "judging", *ENDED)
    while time.monotonic() - start_s < _BEGIN_S:
        status = trainings.status()
        if status is not None and status.state in wanted:
            break
        time.sleep(1)
    return {"first_training_s": round(time.monotonic() - start_s), "first_training": status and status.state}


def _start_training(team: Team) -> Json:
    return {"action": "START_TRAINING", "project": {"id": PROJECT, "title": "soak", "label_config": team.config}}


def _metrics(team: Team) -> dict[str, float]:
    answer = requests.get(f"{team.backend.url}/metrics", auth=team.backend.session.auth, timeout=20)
    return {m[1]: float(m[2]) for m in re.finditer(r"^(graco_\S+) (\S+)$", answer.text, re.MULTILINE)}


def _ask_for_health(team: Team) -> None:
    caller = Caller(team)
    while not team.ending.wait(_HEALTH_EVERY_S):
        caller.send("health", "/health", None)


def _scrape(team: Team, scrapes: list[dict[str, float]]) -> None:
    while not team.ending.wait(_SCRAPE_EVERY_S):
        try:
            scrapes.append(_metrics(team))
        except requests.RequestException as error:
            team.recorder.wrong("metrics", f"no answer ({type(error).__name__})")


def _keep_training(team: Team, trainings: TrainingFolder, trained: list[float]) -> None:
    """Press Start Training whenever none runs, and note for how long one did, each second."""
    caller = Caller(team)
    asked_s = -10.0
    while not team.ending.is_set():
        status = trainings.status()
        if (status is None or status.state in ENDED) and time.monotonic() - asked_s > 5:
            caller.send("start training", "/webhook", _start_training(team), secret=True)
            asked_s = time.monotonic()
        begin_s = time.monotonic()
        team.ending.wait(1)
        if status is not None and status.state in ("running", "judging"):
            trained.append(time.monotonic() - begin_s)


def _trainings(trainings: TrainingFolder, trained: list[float], lasted_s: float) -> Json:
    last = trainings.status()
    ended = trainings.history()
    return {
        "share_of_time": round(sum(trained) / lasted_s, 3),
        "ended": [{"state": one.state, "masks": one.masks, "steps": one.step, "said": one.said} for one in ended],
        "at_the_end": None if last is None else {"state": last.state, "step": last.step, "steps": last.steps},
    }


def _lost(team: Team, data: Path) -> Json:
    """Return how many annotations were answered and are not in the ledger, once all events are taken in."""
    until_s = time.monotonic() + _TAKEN_IN_S
    with closing(Inbox(data / "inbox.sqlite")) as inbox:
        while inbox.counts()["undone"] and time.monotonic() < until_s:
            time.sleep(0.5)
        counts = inbox.counts()
    with closing(CorrectionStore(data / "corrections.sqlite")) as store:
        kept = {one.annotation for one in store.corrections(str(PROJECT))}
    return {"submitted": len(team.submitted), "lost": len(team.submitted - kept), "events": counts}


def _faults(log: Path) -> list[str]:
    return [line[:300] for line in log.read_text().splitlines() if re.search(r"\b(ERROR|CRITICAL|Traceback)\b", line)]


def _report(
    options: argparse.Namespace,
    team: Team,
    lasted_s: float,
    watch: Watch,
    scrapes: list[dict[str, float]],
    *,
    filled: Json,
    lost: Json,
    log: list[str],
    training: Json | None,
) -> Json:
    recorded = team.recorder.to_json()
    clicks = team.recorder.seconds(*CLICKS)
    memory = _memory(list(watch.processes.values()), lasted_s)
    queues = {
        name: {"longest_s": round(max(found), 1), "p95_s": round(float(np.percentile(found, 95)), 1)}
        for name in sorted({name for scrape in scrapes for name in scrape if "oldest_seconds" in name})
        if (found := [scrape.get(name, 0.0) for scrape in scrapes])
    }
    grown = {role: one for role, one in memory.items() if one["growth_percent"] is not None}
    worst = max((one["growth_percent"] for one in grown.values() if _to_blame(one)), default=0.0)
    web = grown.get("web", {"growth_percent": None})["growth_percent"]
    p95 = float(np.percentile(clicks, 95)) if clicks else float("inf")
    errors = recorded["errors"] + len(log) + lost["lost"] + lost["events"]["failed"]
    rows = [
        Row(
            what=f"errors of {sum(one['count'] for one in recorded['milliseconds'].values())} requests by "
            f"{options.annotators} annotators in {lasted_s / 60:.1f} minutes",
            reach="0",
            measured=f"{recorded['errors']}; in the log {len(log)}; lost {lost['lost']} of {lost['submitted']}",
            reached=errors == 0,
        ),
        Row(
            what=f"clicks, p50 / p95 / p99 of {len(clicks)}, first ones included",
            reach="p95 < 600 ms",
            measured=_shown(percentiles(clicks)),
            reached=p95 < REACH_P95_S,
        ),
        *(
            Row(what=f"of these: {kind}", measured=_shown(recorded["milliseconds"].get(kind, {"count": 0})))
            for kind in CLICKS
        ),
        Row(
            what="growth of what each lasting process holds at the least, after the warm-up (RSS)",
            reach=f"< {REACH_GROWTH:g} %",
            measured=", ".join(
                f"{role} {one['growth_percent']:+.1f} % of {one['rss_mb']:.0f} MB" for role, one in grown.items()
            ),
            reached=web is not None and worst < REACH_GROWTH,
        ),
    ]
    if training is not None:
        states = [one["state"] for one in training["ended"]]
        rows.append(
            Row(
                what="a training ran meanwhile",
                reach="> 80 % of the time",
                measured=f"{100 * training['share_of_time']:.0f} %; ended: {', '.join(states) or 'none yet'}",
                reached=training["share_of_time"] > 0.8 and "failed" not in states,
            )
        )
    return {
        "passed": all(row.reached is not False for row in rows),
        "options": {name: value for name, value in vars(options).items() if name != "report"},
        "machine": machine("python -m tests.soak.annotators", os.getloadavg()[2]),
        "lasted_s": round(lasted_s),
        "before_the_clock": filled,
        "rows": [asdict(row) for row in rows],
        **recorded,
        "slow_clicks": team.recorder.slow(REACH_P95_S, *CLICKS),
        "clicks_a_second": round(len(clicks) / lasted_s, 2),
        "annotations": lost,
        "log": log[:20],
        "memory": memory,
        "queues": queues,
        "steps": _steps(scrapes),
        "training": training,
    }


def _steps(scrapes: list[dict[str, float]]) -> Json:
    """Return how often each step of an answer was taken between the first scrape and the last, and its mean time."""
    found: Json = {}
    for name in scrapes[-1] if scrapes else ():
        step = re.fullmatch(r'graco_step_seconds_count\{step="(\w+)"\}', name)
        count = scrapes[-1][name] - scrapes[0].get(name, 0.0)
        if step and count:
            total = name.replace("_count{", "_sum{")
            seconds = scrapes[-1][total] - scrapes[0].get(total, 0.0)
            found[step[1]] = {"count": round(count), "mean_ms": round(1000 * seconds / count, 1)}
    return found


def _to_blame(one: Json) -> bool:
    return bool(one["growth_percent"] / 100 * one["rss_mb"] > _LITTLE_MB)


def _memory(processes: list[Process], lasted_s: float) -> Json:
    """Return by role what processes held; of those that come and go (a training, a job) the highest of each."""
    by_role: defaultdict[str, list[Process]] = defaultdict(list)
    for process in processes:
        if process.rss_mb:  # else it had ended before its first measurement
            by_role[process.role].append(process)
    found: Json = {}
    for role, several in sorted(by_role.items()):
        last = several[-1]
        lasting = len(several) == 1 and role not in _PASSING
        grown = growth(last.times_s, last.rss_mb, lasted_s) if lasting else None
        found[role] = {
            "processes": len(several),
            "rss_mb": round(last.rss_mb[-1], 1),
            "uss_mb": round(last.uss_mb[-1], 1),
            "growth_percent": grown,
            "growth_percent_uss": None if grown is None else growth(last.times_s, last.uss_mb, lasted_s),
            "highest_rss_mb": [round(max(one.rss_mb), 1) for one in several[-20:]],
        }
        if grown is not None:
            step = -(-len(last.times_s) // 120)
            series = zip(last.times_s[::step], last.rss_mb[::step], last.uss_mb[::step], strict=True)
            found[role]["seconds_rss_uss"] = [[round(value, 1) for value in three] for three in series]
    return found


def _shown(one: Json) -> str:
    return f"{one['p50']:.0f} / {one['p95']:.0f} / {one['p99']:.0f} ms ({one['count']})" if one["count"] else "none"


def main() -> None:
    """Run, write the report, print its figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.annotators", description=__doc__)
    parser.add_argument("--annotators", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--think", type=float, default=2, help="seconds from click to click of one annotator")
    parser.add_argument("--training", action="store_true", help="have a training run the whole time")
    parser.add_argument(
        "--embedding-memory", type=int, default=256, help="MB, GRACO_EMBEDDING_MEMORY_MB; less: a short run"
    )
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="graco-soak-") as folder:
        report = soak(options, Path(folder))
    options.report.write_text(json.dumps(report, indent=1, default=str) + "\n")
    console = Console()
    show([Row(**row) for row in report["rows"]], console)
    for line in [*report["machine"], *report["first_errors"][:5], *report["log"][:5]]:
        console.print(line)
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
