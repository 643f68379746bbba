"""Reading packing problems: CSV with the columns id, lower, upper, size (the format of the MiniMalloc benchmarks)."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from labinfer.compiler.packing.problem import Buffer
from labinfer.errors import ErrorSink, InvalidFile, Place, did_you_mean

COLUMNS = ("id", "lower", "upper", "size")
MAX_BYTES = 16 << 20
MAX_ROWS = 200_000
MAX_NUMBER = 1 << 60


def read_problem(path: str | PathLike[str]) -> list[Buffer]:
    """The buffers of a CSV file: a header naming id, lower, upper and size in any order, then a row per buffer.

    Further columns are ignored, as are empty lines; lifetimes are half-open. Raises ``InvalidFile``
    (``pack.unreadable``, ``pack.too-large``, ``pack.header``, ``pack.row``, ``pack.number``, ``pack.lifetime``,
    ``pack.duplicate-id``) with file, line and column, all of a file's errors together.
    """
    name = str(path)
    lines = _lines(Path(path), name)
    header = [cell for cell, _ in _cells(lines[0])] if lines else []
    sink = ErrorSink()
    for column in COLUMNS:
        if header.count(column) != 1:
            problem = "is missing" if column not in header else "appears twice"
            place = Place(name, 1, 1, lines[0] if lines else None)
            remedy = did_you_mean(column, header) or f"the first line must name the columns {', '.join(COLUMNS)}"
            sink.add(InvalidFile("pack.header", f"the column '{column}' {problem}", place=place, remedy=remedy))
    sink.check()
    buffers: list[Buffer] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines[1:], 2):
        if line.strip() and (buffer := _row(header, line, name, number, seen, sink)):
            buffers.append(buffer)
    sink.check()
    return buffers


def _lines(path: Path, name: str) -> list[str]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidFile("pack.unreadable", f"cannot read the file: {error.strerror}", place=Place(name)) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidFile("pack.unreadable", "the file is not UTF-8 text", place=Place(name, line, 1)) from None
    lines = text.replace("\r\n", "\n").split("\n")
    if len(data) > MAX_BYTES or len(lines) > MAX_ROWS:
        limit = f"the limit is {MAX_BYTES >> 20} MiB and {MAX_ROWS} rows"
        raise InvalidFile("pack.too-large", f"the file is too large; {limit}", place=Place(name))
    return lines


def _cells(line: str) -> list[tuple[str, int]]:
    """The cells of a line without blanks and quotes, each with its column counted from 1."""
    cells, column = [], 1
    for raw in line.split(","):
        cells.append((raw.strip().strip('"'), column + len(raw) - len(raw.lstrip())))
        column += len(raw) + 1
    return cells


def _row(header: list[str], line: str, name: str, number: int, seen: dict[str, int], sink: ErrorSink) -> Buffer | None:
    """The buffer of one row, or None with what is wrong added to ``sink``."""
    cells = _cells(line)

    def reject(code: str, message: str, column: int = 1) -> None:
        sink.add(InvalidFile(code, message, place=Place(name, number, column, line)))

    if len(cells) != len(header):
        reject("pack.row", f"expected {len(header)} values as in the header, found {len(cells)}")
        return None
    row = dict(zip(header, cells, strict=True))
    values: dict[str, int] = {}
    for field in ("lower", "upper", "size"):
        text, column = row[field]
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 19 and int(digits) <= MAX_NUMBER):
            reject("pack.number", f"{field} must be an integer of at most 2**60, not '{text[:40]}'", column)
            return None
        values[field] = int(text)
    if values["size"] < 0:
        reject("pack.number", f"the size {values['size']} is negative", row["size"][1])
        return None
    if values["upper"] < values["lower"]:
        message = f"the lifetime ends at {values['upper']}, before it starts at {values['lower']}"
        reject("pack.lifetime", message, row["upper"][1])
        return None
    identifier, column = row["id"]
    if identifier in seen:
        reject("pack.duplicate-id", f"the id '{identifier[:40]}' is that of line {seen[identifier]}", column)
        return None
    seen[identifier] = number
    return Buffer(identifier, values["lower"], values["upper"], values["size"])
