"""Names of lines."""

import pytest

from active_learning.lines import is_line, line_of, project_of


def test_a_line_names_its_project():
    assert (project_of("project-12"), project_of("shared")) == ("12", None)
    assert project_of(line_of(12)) == "12"


@pytest.mark.parametrize("name", ["", "project-x", "project-3/..", "shared\n", "Shared", "project-" + "1" * 20])
def test_nothing_else_names_a_line(name):
    assert not is_line(name)
