"""Lines of adapter versions, by name: `shared`, or one for each project. Nothing heavy is imported here."""

from __future__ import annotations

import re

SHARED = "shared"
_LINE = re.compile(r"shared|project-[0-9]{1,19}")


def line_of(project: int | str) -> str:
    """Return the line of a project.

    >>> line_of(7)
    'project-7'
    """
    return f"project-{project}"


def project_of(line: str) -> str | None:
    """Return the project of a line; None: all of them.

    >>> project_of("project-3"), project_of("shared")
    ('3', None)
    """
    return None if line == SHARED else line.removeprefix("project-")


def is_line(text: str) -> bool:
    """Whether this may name a line; of what a line is named after nothing else reaches a path."""
    return _LINE.fullmatch(text) is not None
