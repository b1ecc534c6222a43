"""The admin's pages on corrections: counts by day, kind and annotator, and the latest ones with their pictures."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from flask import Blueprint, Response, abort, render_template, request

from active_learning.corrections import Correction, Counts, held_out
from active_learning.images import ImageStore
from ml_backend import charts, overlays
from ml_backend.admin_common import Answer, given, ledger, number
from ml_backend.service import Service
from model.types import Refusal

_PER_PAGE = 12
_MOST_PAGES = 10_000
_DAYS = 30
_PROJECT = re.compile(r"[0-9]{1,19}")
_DRAWN_AT_ONCE = 2  # pictures, so that clicks keep their cores
_DRAWING_S = 10.0  # that one waits for its turn


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """One correction as it is shown."""

    one: Correction
    place: int  # among its annotation's
    held_out: bool
    shares: tuple[float, float, float] | None  # IoU with the proposal, added, taken away


def add_corrections(admin: Blueprint, service: Service) -> None:
    """Add the pages to the blueprint."""
    settings = service.settings
    drawing = threading.BoundedSemaphore(_DRAWN_AT_ONCE)

    @admin.get("/corrections")
    def corrections() -> Answer:
        project = given("project") or None
        page = number("page", default=1, least=1, most=_MOST_PAGES)
        with ledger(settings) as store:
            projects = sorted(store.projects(), key=lambda name: (len(name), name))
            if project is not None and project not in projects:
                abort(404, "There are no corrections of such a project.")
            counts = store.counts(project)
            found = store.corrections(project, limit=_PER_PAGE, offset=(page - 1) * _PER_PAGE)
            of_annotation = {
                key: [one.region for one in store.get(*key)] for key in {(one.project, one.annotation) for one in found}
            }
        cards = [
            _Card(
                one=one,
                place=of_annotation[one.project, one.annotation].index(one.region),
                held_out=held_out(one.image),
                shares=overlays.changed_shares(one),
            )
            for one in found
        ]
        return render_template(
            "admin/corrections.html",
            project=project,
            projects=projects,
            counts=counts,
            days=(days := _days(counts)),
            chart=charts.bars("days", f"Corrections by day, the last {_DAYS} days with any", days),
            cards=cards,
            page=page,
            pages=max(1, -(-counts.corrections // _PER_PAGE)),
        )

    @admin.get("/corrections/<project>/<int:annotation>/<int:place>.jpg")
    def correction_picture(project: str, annotation: int, place: int) -> Answer:
        if not _PROJECT.fullmatch(project) or annotation >= 2**63:
            abort(404, "That names no correction.")
        with ledger(settings) as store:
            found = store.get(project, annotation)
        if place >= len(found):
            abort(404, "There is no such correction any more.")
        one = found[place]
        path = ImageStore(settings.data_dir / "images").path(one.image)
        if path is None:
            abort(404, "The photo is not kept any more.")
        etag = f"{one.updated_s}-{one.image[:16]}"
        if etag in request.if_none_match:
            return Response(status=304)
        if not drawing.acquire(timeout=_DRAWING_S):
            abort(503, "Too many pictures are being drawn; reload the page.")
        try:
            data = overlays.draw_correction(path, one, max_pixels=settings.image_max_megapixels * 10**6)
        except Refusal as refusal:
            abort(404, str(refusal))
        finally:
            drawing.release()
        answer = Response(data, content_type="image/jpeg")
        answer.set_etag(etag)
        answer.headers["Cache-Control"] = "private, max-age=3600"
        return answer


def _days(counts: Counts) -> list[tuple[str, int]]:
    """Return the last days up to the last one with corrections, those without any too."""
    if not counts.days:
        return []
    last = datetime.strptime(max(counts.days), "%Y-%m-%d").replace(tzinfo=UTC)
    names = [(last - timedelta(days=back)).strftime("%Y-%m-%d") for back in range(_DAYS - 1, -1, -1)]
    first = min(counts.days)
    return [(name, counts.days.get(name, 0)) for name in names if name >= first]
