"""Progress of long work on stderr: one bar with bytes, rate and time left."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

Progress = Callable[[str, int, int | None], None]
"""Called as ``progress(phase, bytes_done, bytes_total or None)``; each new phase gets its own bar."""


def silent(phase: str, done: int, total: int | None) -> None:
    """Show nothing."""


@contextmanager
def bar(color: bool = True) -> Iterator[Progress]:
    """A progress bar, gone when the work is done; silent where stderr is no terminal or ``CI`` is set."""
    if os.environ.get("CI") or not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True, no_color=not color or None)
    with Bars(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def update(phase: str, done: int, total: int | None) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield update
