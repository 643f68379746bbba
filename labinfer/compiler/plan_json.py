"""JSON as plans have it: as much on a line as fits, an op always on one, and no key twice."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def compact_json(data: Any, indent: str = "", width: int = 150) -> str:
    """JSON with every container that fits on one line on one line: readable, and one op a line in a diff."""
    line = json.dumps(data, ensure_ascii=False)
    if len(line) + len(indent) <= width or not isinstance(data, dict | list) or not data:
        return line
    inner = indent + " "
    if isinstance(data, dict):
        if "op" in data:  # an op stays on its line, however long
            return line
        items = [f"{inner}{json.dumps(key)}: {compact_json(value, inner, width)}" for key, value in data.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + compact_json(value, inner, width) for value in data) + f"\n{indent}]"


class DuplicateKeyError(ValueError):
    """A key stands in an object twice."""


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: an object; raises ``DuplicateKeyError``."""
    key, count = Counter(key for key, _ in pairs).most_common(1)[0] if pairs else ("", 0)
    if count > 1:
        raise DuplicateKeyError(f"duplicate key {key!r}")
    return dict(pairs)
