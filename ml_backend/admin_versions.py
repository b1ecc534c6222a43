"""The admin's pages on versions: what each scored, which one serves, the way there and back, and two side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flask import Blueprint, abort, flash, render_template, send_file

from active_learning.registry import AdapterVersion
from ml_backend.admin_common import Answer, given, known_lines, line_or_404, number, show_at, telling
from ml_backend.comparisons import CONFIGURED, PHOTOS, Comparisons, judged_together
from ml_backend.scoring import ask_for_lines_scores
from ml_backend.service import Service
from ml_backend.version_facts import VERDICTS, facts_of, shown, side_by_side, why_rejected
from model.types import Refusal

_PICTURES = {"sheet.png": "Photos whose first answer changed most", "curves.png": "IoU over clicks"}
_BY = "admin page"
_KEEP = 10  # versions, unless another number is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    name: str
    active: str | None
    before: str | None  # served before the active one, and can do so again
    versions: list[AdapterVersion]  # newest first
    broken: str | None  # why it cannot be told what serves


def add_versions(admin: Blueprint, service: Service) -> None:
    """Add the pages to the blueprint."""
    registry, comparisons = service.registry, Comparisons(service)

    def version_or_404(line: str, version: str) -> AdapterVersion:
        try:
            return registry.get(line_or_404(service, line), version)
        except Refusal:
            abort(404, "There is no such version.")

    def active_of(line: str) -> str | None:
        try:
            return registry.active_id(line)
        except Refusal:
            return None

    def pair_or_404(line: str, first: str, second: str) -> list[AdapterVersion | None]:
        return [None if one == CONFIGURED else version_or_404(line, one) for one in (first, second)]

    @admin.get("/versions")
    def versions() -> Answer:
        lines = [_look(service, line) for line in known_lines(service)]
        return render_template("admin/versions.html", lines=lines, verdicts=VERDICTS, configured=CONFIGURED, keep=_KEEP)

    @admin.get("/versions/<line>/<version>")
    def version(line: str, version: str) -> Answer:
        found = version_or_404(line, version)
        folder = registry.path(found).parent
        return render_template(
            "admin/version.html",
            active=active_of(line),
            version=found,
            facts=[(name, shown(value)) for name, value in facts_of(found).items() if name != "note"],
            pictures={name: title for name, title in _PICTURES.items() if (folder / name).is_file()},
            verdict=VERDICTS[found.accepted],
        )

    @admin.get("/versions/<line>/<version>/<picture>")
    def version_picture(line: str, version: str, picture: str) -> Answer:
        if picture not in _PICTURES:
            abort(404, "There is no such picture.")
        path = registry.path(version_or_404(line, version)).with_name(picture)
        return _picture(path if path.is_file() and not path.is_symlink() else None)  # a link could lead anywhere

    @admin.post("/versions/<line>/activate")
    def activate(line: str) -> Answer:
        name, wanted = line_or_404(service, line), given("version")
        with telling():
            if wanted == CONFIGURED:
                registry.activate(name, None, by=_BY)
                flash(f"Line {name} serves no version of its own now.", "done")
            else:
                found = registry.get(name, wanted)
                if found.accepted is False and not given("force"):
                    raise Refusal(f"{why_rejected(found)} To serve it all the same, tick its box")
                registry.activate(name, found.id, by=_BY)
                flash(f"Version {found.id} serves {name} within a second.", "done")
            ask_for_lines_scores(service.settings, name)
        return show_at("admin.versions", name)

    @admin.post("/versions/<line>/rollback")
    def roll_back(line: str) -> Answer:
        name = line_or_404(service, line)
        with telling():
            if registry.active_id(name) != given("serves"):  # sent twice, or by two people
                raise Refusal("nothing was changed: another version serves by now")
            way = registry.roll_back(name, by=_BY)
            ask_for_lines_scores(service.settings, name)
            now = way.now.id if way.now else "no version of its own"
            passed_over = "".join(f" Passed over: {why}." for why in way.passed_over)
            flash(f"{way.was} was rolled back: {now} serves {name}.{passed_over}", "done")
        return show_at("admin.versions", name)

    @admin.get("/versions/<line>/prune")
    def ask_prune(line: str) -> Answer:
        name = line_or_404(service, line)
        keep = number("keep", default=_KEEP, least=0, most=10_000)
        return render_template("admin/prune.html", line=name, keep=keep, going=registry.prunable(name, keep=keep))

    @admin.post("/versions/<line>/prune")
    def prune(line: str) -> Answer:
        name = line_or_404(service, line)
        with telling():
            removed = registry.prune(name, keep=number("keep", default=_KEEP, least=0, most=10_000))
            flash(f"Removed {len(removed)} versions of {name}: {', '.join(removed) or 'none'}.", "done")
        return show_at("admin.versions", name)

    @admin.get("/versions/<line>/compare")
    def compare(line: str) -> Answer:
        first, second = given("first"), given("second")
        pair = pair_or_404(line, first, second)
        both: dict[str, Any] = {"facts": [], "judged": {}}
        if pair[0] is not None and pair[1] is not None:
            both = {"facts": side_by_side(pair[0], pair[1]), "judged": judged_together(registry, line, first, second)}
        return render_template(
            "admin/compare.html",
            line=line,
            first=first,
            second=second,
            live=comparisons.get(line, first, second),
            photos=PHOTOS,
            active=active_of(line),
            configured=CONFIGURED,
            **both,
        )

    @admin.post("/versions/<line>/compare")
    def start_compare(line: str) -> Answer:
        first, second = given("first"), given("second")
        pair_or_404(line, first, second)
        with telling():
            comparisons.ask(line, first, second)
            flash("Both versions are asked now; their answers appear below, one after another.", "done")
        return show_at("admin.compare", "live", line=line, first=first, second=second)

    @admin.get("/versions/<line>/compare/<first>/<second>/<int:place>.png")
    def compare_picture(line: str, first: str, second: str, place: int) -> Answer:
        pair_or_404(line, first, second)
        return _picture(comparisons.picture(line, first, second, place))


def _picture(path: Any) -> Answer:
    if path is None:
        abort(404, "There is no such picture.")
    answer = send_file(path.resolve(), mimetype="image/png", conditional=True)
    answer.headers["Cache-Control"] = "private, no-cache"
    return answer


def _look(service: Service, line: str) -> _Line:
    registry, broken = service.registry, None
    active = before = None
    try:
        active = registry.active_id(line)
        way = registry.way_back(line) if active is not None else None
        before = None if way is None or way.now is None else way.now.id
    except Refusal as refusal:
        broken = str(refusal)
    versions = registry.versions(line)[::-1]
    return _Line(name=line, active=active, before=before, versions=versions, broken=broken)
