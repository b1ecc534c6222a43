"""What the docs name is there: links and their anchors, commands with their options, make targets, variables."""

from __future__ import annotations

import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from ml_backend.settings import Settings
from tests.conftest import ROOT

DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "docker" / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
ROOMS = ("ml_backend", "model", "active_learning")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`([^`]+)`", re.DOTALL)

each_page = pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an ellipsis, an apostrophe: no shell would take it, readers do
        return line.split()


def lines_of_code(page: Path) -> list[str]:
    """Return the lines of code blocks, continued ones as one, and what stands between backticks."""
    found = []
    for code in _CODE.finditer(page.read_text()):
        if code[1] is not None:
            found.append(" ".join(code[1].split()))
        else:
            found += code[0].replace("\\\n", " ").split("\n")[1:-1]
    return found


@cache
def commands_of(room: str) -> TyperGroup:
    return get_group(importlib.import_module(f"{room}.__main__").app)


def what_is_wrong(command: TyperCommand | TyperGroup, given: list[str]) -> str | None:
    """Return what of a command line as docs write it the command does not have, or None."""
    while isinstance(command, TyperGroup):
        if not given or not re.fullmatch(r"[a-z-]+", given[0]) or given[0].startswith("-"):
            return None  # named as a group, or with an ellipsis
        if given[0] not in command.commands:
            return f"{command.name} has no command {given[0]!r}"
        command, given = command.commands[given[0]], given[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in given:
        if word in ("|", "&&", ";", ">"):
            break
        if word.startswith("--") and (name := word.partition("=")[0]) not in options | {"--help"}:
            return f"{command.name} has no option {name}"
    return None


def test_this_test_sees_what_is_not_there():
    group = commands_of("ml_backend")
    assert what_is_wrong(group, ["connect", "--project", "3"]) is None
    assert what_is_wrong(group, ["connect", "--projekt", "3"])
    assert what_is_wrong(group, ["train", "begin"])
    assert "jobs-in-depth" in anchors_of(ROOT / "docs" / "admins.md")


@each_page
def test_every_link_leads_somewhere(page):
    for target in _LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors_of(there), f"{target}: there is no such heading"


@each_page
def test_every_command_exists_with_the_options_named(page):
    for line in lines_of_code(page):
        for room, rest in re.findall(rf"-m ({'|'.join(ROOMS)})\b(?!\.)([^`]*)", line):
            assert (wrong := what_is_wrong(commands_of(room), words(rest))) is None, f"{line}: {wrong}"
        first, *rest = words(line) or [""]
        if first in commands_of("ml_backend").commands and rest:
            assert (wrong := what_is_wrong(commands_of("ml_backend"), [first, *rest])) is None, f"{line}: {wrong}"
        for target in re.findall(r"(?:^| )make ([a-z]+)(?= |$)", line):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{line}: no such target"


@cache
def variables() -> set[str]:
    """Return all variables that something reads: settings, the compose file's own, those of the tests."""
    known = {f"GRACO_{name.upper()}" for name in Settings.model_fields}
    readers = [*ROOT.glob("docker/compose.yml"), *ROOT.glob("tests/**/*.py")]
    used = (re.findall(r"\$\{(GRACO_\w+)|environ(?:\.get\(|\[)\"(GRACO_\w+)", path.read_text()) for path in readers)
    return known | {name for found in used for pair in found for name in pair if name} | {"GRACO_X_FILE"}  # of any X


@each_page
def test_every_variable_is_one_that_something_reads(page):
    named = set(re.findall(r"\bGRACO_[A-Z][A-Z_]*[A-Z]\b", page.read_text()))
    assert named - variables() == set()
