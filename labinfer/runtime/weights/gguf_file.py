"""Read GGUF files (versions 2 and 3, little endian): metadata and tensor table, every size checked before use.

Specification: ggml, docs/gguf.md. Layout: magic, version, counts, key-value metadata, tensor table, padding, data.
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import Any

from labinfer.errors import ErrorSink, LabinferError, Place, WeightsError
from labinfer.ops.formats import FORMATS, stored_bytes
from labinfer.runtime.weights.mapped_file import map_file
from labinfer.runtime.weights.tensor_info import TensorInfo, check_extents, check_tensor, quoted

MAX_METADATA_BYTES = 24 << 20  # a vocabulary of 262,144 tokens with merges needs about 15 MB
MAX_ARRAY_ELEMENTS = 1_500_000  # over all arrays of a file; that vocabulary takes 1.3 million
MAX_METADATA_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 65_535
MAX_GGML_DIMS = 4
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# The ids of ggml_type; only those whose lower-case name is in FORMATS can be read.
_GGML_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class _Cursor:
    """A read position in the mapped header; every read is checked against the end of the file and the size cap."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.position, self.size = data, 0, len(data)
        self.end = min(self.size, MAX_METADATA_BYTES)
        self.place = Place(str(path))
        self.array_elements = 0

    def fail(self, code: str, message: str, remedy: str = "download or convert the file again") -> LabinferError:
        return WeightsError(code, message, place=self.place, remedy=remedy)

    def need(self, count: int, what: str) -> None:
        """Raise unless ``count`` more bytes may be read."""
        if self.position + count <= self.end:
            return
        if self.position + count > self.size:
            message = f"{what} at byte {self.position} needs {count} bytes, the file ends at {self.size}"
            raise self.fail("weights.truncated", message)
        raise self.fail("weights.too-large", f"metadata is larger than {MAX_METADATA_BYTES >> 20} MiB")

    def u32(self, what: str) -> int:
        return int(self.scalar(_U32, what))

    def u64(self, what: str) -> int:
        return int(self.scalar(_U64, what))

    def scalar(self, kind: struct.Struct, what: str) -> Any:
        self.need(kind.size, what)
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def name(self, what: str) -> str:
        """A key or tensor name: short and strictly UTF-8."""
        length = self.u64(what)
        if length > MAX_NAME_BYTES:
            raise self.fail("weights.corrupt", f"{what} of {length} bytes at byte {self.position}")
        self.need(length, what)
        raw = self.data[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            message = f"{what} at byte {self.position - length} is not UTF-8"
            raise self.fail("weights.corrupt", message) from None

    def strings(self, count: int, what: str) -> list[str]:
        """``count`` strings in one tight loop: vocabularies have several hundred thousand."""
        self.need(8 * count, what)
        data, position, end, length_at = self.data, self.position, self.end, _U64.unpack_from
        values = []
        for _ in range(count):
            start = position + 8
            if start > end or (stop := start + length_at(data, position)[0]) > end:
                self.position = position
                self.need(8 if start > end else stop - position, what)
            # llama.cpp never checks that values are UTF-8, so a bad byte becomes U+FFFD instead of an error.
            values.append(data[start:stop].decode("utf-8", "replace"))
            position = stop
        self.position = position
        return values

    def value(self, kind: int, what: str) -> Any:
        """One metadata value; arrays come as lists."""
        if kind == _STRING:
            return self.strings(1, what)[0]
        if kind == _ARRAY:
            return self.array(what)
        return self.scalars(kind, 1, what)[0]

    def array(self, what: str) -> list[Any]:
        """An array value: element type, count, elements. Arrays of arrays are refused, as llama.cpp does."""
        kind, count = self.u32(what), self.u64(what)
        self.array_elements += count
        if self.array_elements > MAX_ARRAY_ELEMENTS:
            message = f"{what} brings the metadata arrays to {self.array_elements} elements, over {MAX_ARRAY_ELEMENTS}"
            raise self.fail("weights.too-large", message)
        if kind == _STRING:
            return self.strings(count, what)
        return self.scalars(kind, count, what)

    def scalars(self, kind: int, count: int, what: str) -> list[Any]:
        """``count`` numbers or booleans of metadata type ``kind``."""
        code = _SCALARS.get(kind)
        if code is None:
            kind_name = "an array inside an array" if kind == _ARRAY else f"unknown metadata type {kind}"
            raise self.fail("weights.corrupt", f"{what} is {kind_name}")
        size = struct.calcsize("<" + code)
        self.need(size * count, what)
        start, self.position = self.position, self.position + size * count
        if kind == _BOOL and not set(self.data[start : self.position]) <= {0, 1}:
            raise self.fail("weights.corrupt", f"{what} holds a boolean that is neither 0 nor 1")
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))


def read_gguf(path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Metadata (keys as stored) and tensors of a GGUF model; a split model is read whole from any of its parts.

    Raises WeightsError, or Errors with one entry per broken tensor.
    """
    metadata, tensors = _read_file(path)
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return metadata, tensors
    parts = [(metadata, tensors) if part == path else _read_file(part) for part in _split_parts(path, count)]
    tensors = [tensor for _, part in parts for tensor in part]
    _check_split(path, [part[0] for part in parts], tensors)
    return parts[0][0], tensors


def split_number(path: Path) -> int:
    """The part number (from 1) in a name such as ``model-00002-of-00003.gguf``; 0 for any other name."""
    match = _SPLIT_NAME.fullmatch(path.name)
    return int(match["number"]) if match else 0


def _split_parts(path: Path, count: int) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        message = f"the file says it is one of {count} parts, but it is not named like one"
        remedy = f"name the parts NAME-00001-of-{count:05d}.gguf and so on, or merge them with llama-gguf-split"
        raise WeightsError("weights.split", message, place=Place(str(path)), remedy=remedy)
    parts = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    sink = ErrorSink()
    for part in parts:
        if not part.is_file():
            remedy = "download all parts"
            sink.add(WeightsError("weights.missing-file", "a part is missing", place=Place(str(part)), remedy=remedy))
    sink.check()
    return parts


def _check_split(path: Path, metadata: list[dict[str, Any]], tensors: list[TensorInfo]) -> None:
    """The parts must be numbered 0.. in order, agree on their number, and hold every tensor exactly once."""
    sink = ErrorSink()
    remedy = "download all parts of the same model again"
    numbers = [part.get("split.no") for part in metadata]
    if numbers != list(range(len(metadata))) or {part.get("split.count") for part in metadata} != {len(metadata)}:
        message = f"the parts call themselves {numbers} of {len(metadata)}"
        sink.add(WeightsError("weights.split", message, place=Place(str(path)), remedy=remedy))
    expected = metadata[0].get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        message = f"the parts hold {len(tensors)} tensors, the first part promises {expected}"
        sink.add(WeightsError("weights.split", message, place=Place(str(path)), remedy=remedy))
    first: dict[str, TensorInfo] = {}
    for tensor in tensors:
        if (other := first.setdefault(tensor.name, tensor)) is not tensor:
            message = f"tensor {quoted(tensor.name)} is also in {other.file.name}"
            sink.add(WeightsError("weights.duplicate-tensor", message, place=Place(str(tensor.file)), remedy=remedy))
    sink.check()


def _read_file(path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    with map_file(path) as data:
        cursor = _Cursor(data, path)
        tensor_count, key_count = _read_preamble(cursor)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.name("metadata key")
            if key in metadata:
                raise cursor.fail("weights.corrupt", f"metadata key {quoted(key)} appears twice")
            metadata[key] = cursor.value(cursor.u32("metadata type"), f"metadata {quoted(key)}")
        return metadata, _read_tensors(cursor, path, tensor_count, _alignment(cursor, metadata))


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Magic, version and the two counts; returns (tensor_count, metadata key count)."""
    if cursor.data[:4] != b"GGUF":
        message = "not a GGUF file: it does not start with 'GGUF'"
        raise cursor.fail("weights.corrupt", message, "download it again, or give the path of a .gguf file")
    cursor.position = 4
    version = cursor.u32("version")
    if version and version & 0xFFFF == 0:
        message = "big-endian GGUF is not supported"
        raise cursor.fail("weights.unsupported-format", message, "convert it with gguf_convert_endian.py to little")
    if version not in (2, 3):
        message = f"GGUF version {version} is not supported (2 and 3 are)"
        raise cursor.fail("weights.unsupported-format", message, "convert the model again with a current llama.cpp")
    tensor_count, key_count = cursor.u64("tensor count"), cursor.u64("metadata count")
    for count, limit, what in ((tensor_count, MAX_TENSORS, "tensors"), (key_count, MAX_METADATA_KEYS, "metadata keys")):
        if count > limit:
            raise cursor.fail("weights.corrupt", f"the header claims {count} {what}, at most {limit} are allowed")
    return tensor_count, key_count


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail("weights.corrupt", f"general.alignment is {str(alignment)[:80]}, not a power of two")
    return alignment


def _read_tensors(cursor: _Cursor, path: Path, count: int, alignment: int) -> list[TensorInfo]:
    """The tensor table; errors of single tensors are collected and raised together."""
    entries = [_read_entry(cursor) for _ in range(count)]
    data_start = -(-cursor.position // alignment) * alignment
    sink = ErrorSink()
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        where = f"tensor {quoted(name)}"
        if name in tensors:
            sink.add(cursor.fail("weights.duplicate-tensor", f"{where} appears twice"))
        if offset % alignment:
            sink.add(cursor.fail("weights.corrupt", f"{where} starts at {offset}, not a multiple of {alignment}"))
        if problem := check_tensor(name, shape):
            sink.add(cursor.fail("weights.corrupt", f"{where} has {problem}"))
            continue
        type_name = _GGML_TYPES.get(kind, f"unknown type {kind}")
        format = type_name.lower()
        if format not in FORMATS:
            remedy = "quantize the model to Q4_K_M, Q8_0 or another supported type: " + ", ".join(FORMATS)
            message = f"{where} is stored as {type_name}, which LABInfer cannot read"
            sink.add(cursor.fail("weights.unsupported-format", message, remedy))
            continue
        try:
            nbytes = stored_bytes(format, shape)
        except WeightsError as error:
            sink.add(cursor.fail("weights.corrupt", f"{where}: {error.message}"))
            continue
        tensors[name] = TensorInfo(name, format, shape, nbytes, path, data_start + offset)
    check_extents(tensors.values(), data_start, cursor.size, sink)
    sink.check()
    return list(tensors.values())


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """One row of the tensor table: name, shape (GGUF stores the fastest dimension first), type id, data offset."""
    name = cursor.name("tensor name")
    dims = cursor.u32("dimension count")
    if dims > MAX_GGML_DIMS:
        raise cursor.fail(
            "weights.corrupt", f"tensor {quoted(name)} has {dims} dimensions, GGUF allows {MAX_GGML_DIMS}"
        )
    shape = tuple(cursor.u64("dimension") for _ in range(dims))[::-1]
    return name, shape, cursor.u32("tensor type"), cursor.u64("tensor offset")
