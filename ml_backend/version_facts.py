"""What is told of an adapter version, on the command line and on the admin page."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands that need no model shall not load torch
    from active_learning.registry import AdapterVersion

VERDICTS = {True: "yes", False: "no", None: "not judged"}
"""Whether the comparison accepted a version."""


def why_rejected(version: AdapterVersion) -> str:
    """Return a sentence on a version that was rejected."""
    return f"{version.line} {version.id} was rejected: {version.note or 'no reason is kept'}"


def facts_of(version: AdapterVersion) -> dict[str, object]:
    """Return a version's scores, and what it was made of, by name."""
    known: dict[str, object] = {
        **{"made, UTC": made_at(version), "parent": version.parent, "base": version.base[:12]},
        **{"snapshot": version.snapshot, "seed": version.seed, "accepted": version.accepted, "note": version.note},
    }
    return dict(numbers_in(version.scores)) | known


def side_by_side(first: AdapterVersion, second: AdapterVersion) -> list[tuple[str, str, str, str]]:
    """Return name, both values, and for numbers their difference, of all that is known of two versions."""
    told = [facts_of(first), facts_of(second)]
    rows = []
    for name in dict.fromkeys([*told[0], *told[1]]):
        values = [one.get(name) for one in told]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        difference = f"{numbers[1] - numbers[0]:+.3f}" if len(numbers) == 2 and name != "seed" else ""
        rows.append((name, shown(values[0]), shown(values[1]), difference))
    return rows


def numbers_in(scores: dict[str, Any], before: str = "") -> Iterator[tuple[str, object]]:
    """Yield the numbers of nested scores by path: reference noc90; curves are left out."""
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from numbers_in(value, f"{before}{name} ")
        elif not isinstance(value, list):
            yield f"{before}{name}", value


def shown(value: object) -> str:
    """Return a fact in few characters."""
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def made_at(version: AdapterVersion) -> str:
    """Return when a version was made, UTC."""
    return datetime.fromtimestamp(version.created_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
