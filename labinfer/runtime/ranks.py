"""The ranks of a stage that this process runs: at once, since what one asks of its device may wait for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from labinfer.errors import LabinferError
from labinfer.runtime.interpreter import Interpreter

Made = TypeVar("Made")


class Ranks:
    """The interpreters of one stage, by rank; with several each has a thread of its own. ``close`` it."""

    def __init__(self, interpreters: Sequence[Interpreter]) -> None:
        self.interpreters = interpreters
        count = len(interpreters)
        self.threads = [ThreadPoolExecutor(1, f"labinfer-rank-{rank}") for rank in range(count if count > 1 else 0)]

    def each(self, work: Callable[[Interpreter], Made]) -> list[Made]:
        """What ``work`` returns for each; raises what goes wrong with one, of which the others are told."""
        if not self.threads:
            return [work(interpreter) for interpreter in self.interpreters]

        def told(interpreter: Interpreter) -> Made:
            try:
                return work(interpreter)
            except BaseException:
                interpreter.leave()
                raise

        pairs = zip(self.threads, self.interpreters, strict=True)
        running = [thread.submit(told, interpreter) for thread, interpreter in pairs]
        wait(running)
        errors = [error for each in running if (error := each.exception()) is not None]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, LabinferError) and error.code == "run.rank-left")
        return [each.result() for each in running]

    def close(self) -> None:
        """End the threads."""
        for thread in self.threads:
            thread.shutdown()
