"""CASES.md: every case has its tests, or says why it has none."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent
ROWS = [line.strip("| ").split(" | ") for line in (FOLDER / "CASES.md").read_text().splitlines() if line[:3] != "| N"]
CASES = [row for row in ROWS if row[0].isdigit()]


def test_the_cases_are_numbered_to_the_last() -> None:
    assert [int(number) for number, _, _ in CASES] == list(range(1, 81))


def test_the_tests_of_the_cases_exist() -> None:
    for number, _, said in CASES:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", said)
        assert named or "not tested: " in said, f"case {number} has neither a test nor a reason"
        for file, test in named:
            assert re.search(rf"^def {test}\(", (FOLDER / file).read_text(), re.MULTILINE), (number, test)
