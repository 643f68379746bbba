"""What steps of a plan took, as ``labinfer profile PLAN --validate --json`` writes it, and what was predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, NonNegativeFloat, TypeAdapter, ValidationError

from labinfer.errors import InvalidFile, Place

MAX_BYTES = 64_000_000


class OpTimes(NamedTuple):
    """An op that runs, and its seconds."""

    name: str
    kind: str
    predicted: NonNegativeFloat
    measured: NonNegativeFloat


class MeasuredStep(BaseModel):
    """A step: what it was, the seconds of the whole, and the ops of each stage in order."""

    what: str
    predicted: NonNegativeFloat
    measured: NonNegativeFloat
    stages: list[list[OpTimes]]


def read_measured(path: Path | str) -> list[MeasuredStep]:
    """The steps in a file; a fault is an ``InvalidFile``."""
    place = Place(str(path))
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise InvalidFile("measured.too-large", "the file is too large", place=place)
        return TypeAdapter(list[MeasuredStep]).validate_python(json.loads(Path(path).read_text("utf-8")))
    except ValidationError as failure:
        first = failure.errors(include_url=False)[0]
        message = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise InvalidFile("measured.schema", message, place=place, remedy="write it with --validate --json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidFile("measured.json", f"cannot be read as JSON: {error}", place=place) from None
