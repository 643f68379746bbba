"""Lines of a report, and how facts and tables become them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

LABEL = 12
"""Columns of the label before each fact."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the report and what it is: the title, the head of a section, or text."""

    text: str = ""
    kind: Literal["title", "head", "text"] = "text"


def align(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as lines of columns two spaces apart; the columns numbered in ``right`` end flush."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    lines = []
    for row in rows:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return lines


def fact(label: str, text: str, width: int) -> Iterator[Line]:
    """A label and its text, folded under itself."""
    first, rest = f"  {label.ljust(LABEL)}", " " * (LABEL + 2)
    for line in textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False):
        yield Line(line)
