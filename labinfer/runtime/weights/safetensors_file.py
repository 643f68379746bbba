"""Read the table of contents of .safetensors files and of sharded checkpoints with an index.

Specification: https://github.com/huggingface/safetensors#format. Layout: header length (u64), JSON header, data. The
header is parsed here, from a memory map, so that every fault of a file is found, named and reported in one run.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from labinfer.errors import Errors, ErrorSink, Place, WeightsError
from labinfer.ops.formats import FORMATS, stored_bytes
from labinfer.runtime.weights.json_text import MAX_JSON_BYTES, parse_json_object, read_json_object
from labinfer.runtime.weights.mapped_file import map_file
from labinfer.runtime.weights.tensor_info import TensorInfo, check_extents, check_tensor, quoted

_REMEDY = "the file is corrupt: download or convert it again"
_DTYPES = {name.upper(): name for name, stored in FORMATS.items() if stored.block_size == 1}


def read_safetensors(path: Path) -> list[TensorInfo]:
    """The tensors of one .safetensors file, in the header's order.

    Raises WeightsError, or Errors with one entry per broken tensor.
    """
    place = Place(str(path))
    with map_file(path) as data:
        size = len(data)
        if size < 8:
            raise WeightsError("weights.truncated", f"{size} bytes hold no header", place=place, remedy=_REMEDY)
        (length,) = struct.unpack_from("<Q", data)
        if length > MAX_JSON_BYTES:
            message = f"the header claims {length} bytes, at most {MAX_JSON_BYTES} are allowed"
            raise WeightsError("weights.too-large", message, place=place, remedy=_REMEDY)
        if 8 + length > size:
            message = f"the header of {length} bytes does not fit the file of {size}"
            raise WeightsError("weights.truncated", message, place=place, remedy=_REMEDY)
        header = parse_json_object(data[8 : 8 + length], "safetensors header", path, WeightsError)
    sink = ErrorSink()
    _check_metadata(header.pop("__metadata__", None), place, sink)
    tensors = []
    for name, entry in header.items():
        try:
            tensors.append(_read_entry(name, entry, path, 8 + length))
        except WeightsError as error:
            sink.add(error)
    check_extents(tensors, 8 + length, size, sink)
    sink.check()
    _check_no_gaps(tensors, 8 + length, size, place)
    return tensors


def _check_metadata(metadata: object, place: Place, sink: ErrorSink) -> None:
    if metadata is None:  # absent or null
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        sink.add(WeightsError("weights.corrupt", "__metadata__ must map text to text", place=place, remedy=_REMEDY))


def _read_entry(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    """Check one header entry ``{"dtype": ..., "shape": [...], "data_offsets": [begin, end]}``."""

    def fail(message: str, code: str = "weights.corrupt", remedy: str = _REMEDY) -> WeightsError:
        return WeightsError(code, f"tensor {quoted(name)} {message}", place=Place(str(path)), remedy=remedy)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise fail("has a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise fail("has data_offsets that are not [begin, end]")
    if not isinstance(dtype, str) or (format := _DTYPES.get(dtype)) is None:
        remedy = "use a checkpoint stored as " + ", ".join(_DTYPES)
        raise fail(f"has dtype {str(dtype)[:40]!r}, which LABInfer cannot read", "weights.unsupported-format", remedy)
    if problem := check_tensor(name, tuple(shape)):
        raise fail(f"has {problem}")
    nbytes = stored_bytes(format, shape)
    if offsets[1] - offsets[0] != nbytes:
        raise fail(
            f"takes {nbytes} bytes as {dtype} {shape}, its data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, format, tuple(shape), nbytes, path, data_start + offsets[0])


def _are_sizes(values: object) -> bool:
    # No bool, which is an int too; no number beyond 64 bits, which nothing stores and messages could not print.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 64 for value in values)


def _check_no_gaps(tensors: list[TensorInfo], start: int, end: int, place: Place) -> None:
    """The format forbids bytes that no tensor owns: they could hide another file. Called after the overlap check."""
    unowned = end - start - sum(tensor.nbytes for tensor in tensors)
    if unowned:
        message = f"{unowned} bytes of the data belong to no tensor"
        raise WeightsError("weights.corrupt", message, place=place, remedy=_REMEDY)


def read_sharded(index: Path) -> list[TensorInfo]:
    """The tensors of all shards that a ``model.safetensors.index.json`` names, each in exactly the shard it says.

    Shards are found by name beside the index and may be symbolic links, as in the Hugging Face cache; a name that
    would leave the directory is refused. Raises WeightsError, or Errors listing every fault.
    """
    place = Place(str(index))
    weight_map = read_json_object(index, WeightsError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        message = "weight_map must map tensor names to file names"
        raise WeightsError("weights.bad-index", message, place=place, remedy="download the index again")
    sink = ErrorSink()
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if problem := _unsafe_name(shard):
            message = f"shard name {quoted(shard)} {problem}"
            remedy = "do not trust this checkpoint: an index may only name files beside it"
            sink.add(WeightsError("weights.unsafe-path", message, place=place, remedy=remedy))
        elif not os.path.exists(index.parent / shard):  # unlike Path.exists, never raises (name too long, ...)
            remedy = "download the missing shard"
            sink.add(
                WeightsError("weights.missing-file", f"shard {quoted(shard)} is missing", place=place, remedy=remedy)
            )
    sink.check()
    tensors = []
    for shard in shards:
        try:
            tensors += read_safetensors(index.parent / shard)
        except (WeightsError, Errors) as error:
            for single in error.errors if isinstance(error, Errors) else [error]:
                sink.add(single)
    sink.check()
    _check_index(index, weight_map, tensors, sink)
    sink.check()
    return tensors


def _unsafe_name(shard: str) -> str | None:
    """Why ``shard`` may not be opened, or None for a plain file name relative to the index."""
    if "\0" in shard or "\\" in shard or ":" in shard:
        return "has a character that file names must not have"
    if shard.startswith("/") or ".." in shard.split("/"):
        return "leaves the model directory"
    if not shard.endswith(".safetensors"):
        return "is not a .safetensors file"
    return None


def _check_index(index: Path, weight_map: dict[str, str], tensors: list[TensorInfo], sink: ErrorSink) -> None:
    """Index and shards must agree on every tensor, both ways."""
    remedy = "download the index and all shards of one revision"
    unread = dict(weight_map)
    for tensor in tensors:
        if weight_map.get(tensor.name) is None or index.parent / weight_map[tensor.name] != tensor.file:
            says = quoted(weight_map[tensor.name]) if tensor.name in weight_map else "no file"
            message = f"tensor {quoted(tensor.name)} is in this shard, the index says {says}"
            sink.add(WeightsError("weights.bad-index", message, place=Place(str(tensor.file)), remedy=remedy))
        else:
            del unread[tensor.name]
    for name, shard in unread.items():
        message = f"tensor {quoted(name)} is not in {quoted(shard)}, where the index says it is"
        sink.add(WeightsError("weights.missing-tensor", message, place=Place(str(index)), remedy=remedy))
