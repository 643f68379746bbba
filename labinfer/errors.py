"""Every failure a user can meet: a stable code, a place, a cause and a remedy.

Codes are stable strings such as ``map.undefined-name``; exit codes follow the command line's contract
(1 runtime, 2 usage, 3 invalid map or plan, 4 does not fit or no device, 5 weights, 6 plan stale).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a text file; ``line`` and ``column`` count from 1, ``text`` is that whole line."""

    file: str
    line: int = 0
    column: int = 0
    text: str | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file

    def caret(self) -> str:
        """The source line with a caret under the column, or '' when the line is unknown."""
        if self.text is None:
            return ""
        start = max(0, self.column - 100)  # a very long line is shown around its column
        shown = self.text[start : start + 160].replace("\t", " ")
        return f"    {shown}\n    {' ' * (self.column - 1 - start)}^"


class LabinferError(Exception):
    """Base of all errors raised on purpose.

    ``code`` names the kind of failure for scripts, ``place`` says where, ``remedy`` what to do about it.
    """

    exit_code = 1

    def __init__(self, code: str, message: str, *, place: Place | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.place, self.remedy = code, message, place, remedy

    def __str__(self) -> str:
        head = f"{self.place}: " if self.place else ""
        lines = [f"{head}error[{self.code}]: {self.message}"]
        if self.place and (caret := self.place.caret()):
            lines.append(caret)
        if self.remedy:
            lines.append(f"  help: {self.remedy}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """The error as plain data, for ``--json``."""
        place = self.place
        return {
            "code": self.code,
            "message": self.message,
            "file": place.file if place else None,
            "line": place.line if place else None,
            "column": place.column if place else None,
            "remedy": self.remedy,
        }


class UsageError(LabinferError):
    """The caller asked for something that cannot be meant (a bad option, argument or call)."""

    exit_code = 2


class InvalidFile(LabinferError):
    """A map, config, cluster file or plan is wrong."""

    exit_code = 3


class DoesNotFit(LabinferError):
    """The model does not fit the devices, or a device does not exist."""

    exit_code = 4


class WeightsError(LabinferError):
    """Weights or tokenizer files are missing, corrupt, or do not match the map."""

    exit_code = 5


class StalePlan(LabinferError):
    """A plan was made from a map, config or checkpoint that has changed since."""

    exit_code = 6


class Errors(LabinferError):
    """Several errors of one input, reported together; the exit code is the first one's."""

    def __init__(self, errors: Iterable[LabinferError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        super().__init__(first.code, first.message, place=first.place, remedy=first.remedy)
        self.exit_code = first.exit_code

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class ErrorSink:
    """Collects the errors of one input so that one run shows them all; ``check()`` raises what was collected."""

    def __init__(self, limit: int = 50) -> None:
        self.errors: list[LabinferError] = []
        self.limit = limit

    def add(self, error: LabinferError) -> None:
        """Keep ``error`` (each of several); raises everything at once when the limit is reached."""
        if isinstance(error, Errors):
            for each in error.errors:
                self.add(each)
            return
        known = {(e.code, e.message, e.place) for e in self.errors}
        if (error.code, error.message, error.place) in known:
            return
        self.errors.append(error)
        if len(self.errors) >= self.limit:
            self.check()

    def check(self) -> None:
        """Raise the collected errors, one alone as itself, several as ``Errors``."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise Errors(self.errors)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A remedy naming the closest known name, or None when nothing is close; looks at 500 short names at most."""
    candidates = list(islice((each for each in known if len(each) <= 100), 500))
    close = difflib.get_close_matches(name[:100], candidates, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else None
