"""Numbers for people: sizes as they are shown, and counts as they are typed."""

from __future__ import annotations

import re

from labinfer.errors import UsageError

_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.ASCII | re.IGNORECASE)
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmM]?)", re.ASCII)
_SCALES = {"": 1, "k": 1 << 10, "m": 1 << 20}


def human_bytes(count: int) -> str:
    """``98362432`` as ``'98.4 MB'``: decimal units, three digits."""
    return f"{count} B" if count < 1000 else f"{human_count(count)}B"


def human_count(count: float) -> str:
    """``269000000`` as ``'269 M'``: decimal units, three digits, ready for a unit to follow."""
    if count < 1000:
        return f"{count:.0f} "
    size, unit = float(count), 0
    while size >= 999.5 and unit < 6:
        size, unit = size / 1000, unit + 1
    return f"{size:.{0 if size >= 99.95 else 1}f} {'kMGTPE'[unit - 1]}"


def parse_count(text: str) -> int:
    """``4096``, ``4k`` or ``0.5M`` as a number: k is 1024, as context lengths are counted. Raises ``UsageError``."""
    match = _COUNT.fullmatch(text.strip())
    value = float(match[1]) * _SCALES[match[2].lower()] if match and len(text) < 32 else 0.0
    if value < 1 or value != int(value):
        raise UsageError("cli.count", f"'{text}' is no positive whole number such as 4096 or 4k (4096)")
    return int(value)


def parse_bytes(text: str) -> int:
    """``1000000``, ``512MB`` (decimal) or ``2GiB`` (binary) as a number of bytes. Raises ``UsageError``."""
    match = _BYTES.fullmatch(text.strip())
    power = " kmgt".index(match[2].lower() or " ") if match else 0
    value = float(match[1]) * (1024 if match[3] else 1000) ** power if match and len(text) < 32 else 0.0
    if value < 1 or (match and match[3] and not match[2]):
        raise UsageError("cli.bytes", f"'{text}' is no size such as 500MB or 2GiB")
    return int(value)
