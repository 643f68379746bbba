"""Prompts to measure with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from labinfer.errors import UsageError

FEWEST_TOKENS = 1000
"""Token ids below this exist in every vocabulary that people serve; the first hundred may be special ones."""


def random_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """``count`` prompts of ``length`` random token ids, which no prefix cache knows."""
    source = random.Random(seed)
    return [[source.randrange(100, FEWEST_TOKENS) for _ in range(length)] for _ in range(count)]


def file_prompts(file: str | Path, count: int) -> list[str]:
    """The first ``count`` prompts of a file with a ``{"prompt": TEXT}`` in each line."""
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("bench.dataset", f"{file}: {error}") from None
    found = []
    for number, line in enumerate(lines[:count], 1):
        try:
            value: Any = json.loads(line)
            found.append(str(value["prompt"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UsageError("bench.dataset", f'{file}:{number}: the line should be {{"prompt": TEXT}}') from None
    if not found:
        raise UsageError("bench.dataset", f"{file} has no prompt")
    return found
