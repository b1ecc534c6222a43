"""docs/checks.md names tests that exist, and has every check."""

import re

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "checks.md").read_text()


def test_every_check_has_a_pass_line_a_result_and_tests_that_exist():
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| **")]
    names = [re.match(r"\| \*\*([RS]\d+)\*\*", row[0])[1] for row in rows]
    assert names == [f"R{n}" for n in range(1, 11)] + [f"S{n}" for n in range(1, 10)]
    for row in rows:
        assert len(row) == 4
        assert all(cell.strip(" |") for cell in row)
        found = re.findall(r"`(tests/[a-z_/]+\.py)::(test_\w+)`( \*soak\*)?", row[2])
        assert found, row[0]
        for path, name, soak in found:
            text = (ROOT / path).read_text()
            before = re.search(rf"((?:^@.*\n|^    .*\n|^\]?\)\n)*)^def {name}\(", text, re.MULTILINE)
            assert before is not None, f"{path} has no {name}"
            marked = "pytest.mark.soak" in before[1] or "\npytestmark = pytest.mark.soak" in text
            assert marked == bool(soak), f"{name}: marked soak is not what the page says"
