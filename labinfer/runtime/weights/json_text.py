"""Parse JSON from files we do not trust: size, nesting and repeated keys are checked, errors carry their place."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from labinfer.errors import LabinferError, Place
from labinfer.runtime.weights.mapped_file import map_file

MAX_JSON_BYTES = 16 << 20
MAX_JSON_TOKENS = 1_200_000  # about 100,000 tensors; keeps the parsed form well under 200 MB


class _RepeatedKeyError(ValueError):
    """A JSON object names a key twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _RepeatedKeyError(counts.most_common(1)[0][0])
    return result


def parse_json_object(data: bytes, what: str, file: Path, error: type[LabinferError]) -> dict[str, Any]:
    """The JSON object in ``data``; anything else raises ``error`` naming ``what`` and ``file``."""

    remedy = "correct the file or download it again"

    def fail(code: str, message: str, place: Place | None = None) -> LabinferError:
        return error(code, f"{what} {message}", place=place or Place(str(file)), remedy=remedy)

    if len(data) > MAX_JSON_BYTES or sum(data.count(sign) for sign in b"[{,:") > MAX_JSON_TOKENS:
        raise fail("json.too-large", f"is too large: over {MAX_JSON_BYTES >> 20} MiB or {MAX_JSON_TOKENS} values")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as problem:
        line = problem.doc.split("\n")[problem.lineno - 1]
        place = Place(str(file), problem.lineno, problem.colno, line if line.isprintable() else None)
        raise fail("json.invalid", f"is not valid JSON: {problem.msg}", place) from None
    except _RepeatedKeyError as problem:
        raise fail("json.repeated-key", f"has the key {str(problem)[:120]!r} twice in one object") from None
    except UnicodeDecodeError as problem:
        raise fail("json.invalid", f"is not UTF-8 at byte {problem.start}") from None
    except ValueError:  # an integer of thousands of digits
        raise fail("json.invalid", "holds a number that is too long") from None
    except RecursionError:
        raise fail("json.invalid", "is nested too deeply") from None
    if not isinstance(value, dict):
        raise fail("json.invalid", "is not a JSON object")
    return value


def read_json_object(path: Path, error: type[LabinferError]) -> dict[str, Any]:
    """The JSON object in the file ``path``; raises WeightsError when it cannot be opened, else ``error``."""
    if os.path.isfile(path) and os.path.getsize(path) == 0:  # which cannot be mapped
        return parse_json_object(b"", path.name, path, error)
    with map_file(path) as data:
        return parse_json_object(data[: MAX_JSON_BYTES + 1], path.name, path, error)
