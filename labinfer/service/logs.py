"""The log: a line, or a JSON object, for each thing that happens, on stderr."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time

FIELDS = ("request_id", "method", "path", "status", "seconds")

MOST_LINES = 10_000
"""Lines that may wait to be written."""

FLUSH_SECONDS = 1.0
"""How long the end of the process waits for them."""


class JsonFormatter(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found = {"time": f"{stamp}.{int(record.msecs):03}Z", "level": record.levelname, "logger": record.name}
        found["message"] = record.getMessage()
        found |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found)


class WriterThread(logging.Handler):
    """Writes the log to the file ``descriptor`` in a thread of its own: a pipe that nobody reads, or a full disk, holds
    up no answer. Lines that find no room or cannot be written are dropped; the next one that is written tells how many.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor, self.dropped = descriptor, 0
        self.lines: queue.Queue[str] = queue.Queue(MOST_LINES)
        threading.Thread(target=self.run, name="labinfer-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written soon."""
        try:
            self.lines.put_nowait(self.format(record))
        except queue.Full:
            self.dropped += 1

    def run(self) -> None:
        """Write lines as they come."""
        while True:
            line, dropped = self.lines.get(), self.dropped
            told = f"{line}\n" if not dropped else f"{line}\n{dropped} lines of the log were dropped\n"
            try:
                write_all(self.descriptor, told.encode(errors="replace"))
                self.dropped -= dropped
            except OSError:
                self.dropped += 1
            self.lines.task_done()

    def flush(self) -> None:
        """Wait for what is to be written, but not for long; ``logging`` calls it at the end of the process."""
        end = time.monotonic() + FLUSH_SECONDS
        while self.lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)


def write_all(descriptor: int, data: bytes) -> None:
    """Write ``data`` to a file, past Python's buffers, whose locks a blocked thread would keep at the end."""
    while data:
        data = data[os.write(descriptor, data) :]


def configure_logging(log_format: str) -> None:
    """Write what the service logs to stderr; what uvicorn would add is told by the guard in its own way."""
    handler = logging.NullHandler() if sys.__stderr__ is None else WriterThread(sys.__stderr__.fileno())
    text = logging.Formatter("%(asctime)s %(levelname)s %(request_id)s %(message)s", defaults={"request_id": "-"})
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    for name, level in (("labinfer", logging.INFO), ("asyncio", logging.WARNING), ("uvicorn", logging.CRITICAL)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
