"""What the command line writes: data on stdout; notes, progress and errors on stderr.

Colour only on a terminal and never with ``--no-color`` or ``NO_COLOR``. Progress only when stderr is a terminal
and ``CI`` is not set. ``--quiet`` leaves data and errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

import click

from labinfer.errors import Errors, LabinferError

if TYPE_CHECKING:
    from rich.console import Console

    from labinfer.progress import Progress


@dataclass
class Output:
    """How this run of the command line talks; ``current()`` gives the one in force."""

    quiet: bool = False
    verbosity: int = 0
    color: bool = True

    def data(self, text: str = "") -> None:
        """A line of the answer itself, on stdout."""
        click.echo(text)

    def json(self, value: object) -> None:
        """The answer as one JSON document on stdout."""
        click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))

    def note(self, text: str) -> None:
        """A line about what is going on, on stderr unless ``--quiet``."""
        if not self.quiet:
            click.echo(text, err=True)

    def detail(self, text: str) -> None:
        """A line that only ``-v`` shows, on stderr."""
        if self.verbosity:
            click.echo(text, err=True)

    def console(self, stream: TextIO) -> Console:
        """A rich console on ``stream``: coloured and as wide as the terminal, or plain and never wrapped in a pipe."""
        from rich.console import Console

        width = None if stream.isatty() else 10_000
        return Console(file=stream, no_color=not self.color, width=width, highlight=False, soft_wrap=width is not None)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
        """A table on stdout; the columns named in ``right`` are aligned to the right."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console = self.console(sys.stdout)
        with console.capture() as captured:
            console.print(table)
        self.data("\n".join(line.rstrip() for line in captured.get().splitlines()))

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A progress bar on stderr; nothing with ``--quiet`` or where stderr is no terminal."""
        from labinfer.progress import bar, silent

        if self.quiet:
            yield silent
            return
        with bar(color=self.color) as progress:
            yield progress

    def error(self, error: LabinferError, as_json: bool) -> None:
        """Report a failure: text on stderr, or with ``--json`` one document on stdout so that stdout always parses."""
        if as_json:
            errors = error.errors if isinstance(error, Errors) else (error,)
            self.json({"errors": [e.to_json() for e in errors], "exit_code": error.exit_code})
        else:
            click.echo(str(error), err=True)


def current() -> Output:
    """The output of the running command; a plain one outside of the command line."""
    context = click.get_current_context(silent=True)
    found = context.find_object(Output) if context else None
    return found or Output()
