"""Write small GGUF and safetensors files, right or deliberately wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
GGML = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 8, "q2_k": 10, "q4_k": 12, "i32": 26, "f64": 28, "bf16": 30}


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table; ``dims`` fastest first, as GGUF stores them; ``offset`` from the data's start."""

    name: str
    format: str | int
    dims: Sequence[int]
    offset: int

    def pack(self) -> bytes:
        kind = self.format if isinstance(self.format, int) else GGML[self.format]
        dims = struct.pack(f"<I{len(self.dims)}Q", len(self.dims), *self.dims)
        return text(self.name) + dims + struct.pack("<IQ", kind, self.offset)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: Any, element: int = U32) -> bytes:
    """A metadata entry; for an array, ``element`` is its element type."""
    return text(key) + struct.pack("<I", kind) + _value(kind, value, element)


def _value(kind: int, value: Any, element: int) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        return struct.pack("<IQ", element, len(value)) + b"".join(_value(element, item, U32) for item in value)
    return struct.pack("<" + CODES[kind], value)


def gguf(
    pairs: Iterable[bytes], tensors: Sequence[GgufTensor], data: bytes, version: int = 3, alignment: int = 32
) -> bytes:
    """A GGUF file from packed metadata entries, the tensor table and the data section."""
    pairs = list(pairs)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    head += b"".join(pairs) + b"".join(tensor.pack() for tensor in tensors)
    return head + b"\0" * (-len(head) % alignment) + data


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header, taken literally."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
