"""The log: a line, or a JSON object, for each thing that happens, on stderr."""

from __future__ import annotations

import json
import logging
import time

FIELDS = ("request_id", "method", "path", "status", "seconds")


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


def configure_logging(log_format: str) -> None:
    """Write what the service logs to stderr; what uvicorn would add is told by the guard in its own way."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(request_id)s %(message)s", defaults={"request_id": "-"})
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    for name, level in (("labinfer", logging.INFO), ("uvicorn", logging.CRITICAL)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
