"""Open a model's weights, whatever files they come in, without reading more than their headers."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from labinfer.errors import InvalidFile, Place, UsageError, WeightsError, did_you_mean
from labinfer.runtime.weights.gguf_file import read_gguf, split_number
from labinfer.runtime.weights.json_text import read_json_object
from labinfer.runtime.weights.mapped_file import map_file
from labinfer.runtime.weights.safetensors_file import read_safetensors, read_sharded
from labinfer.runtime.weights.tensor_info import TensorInfo, quoted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["safetensors", "gguf"]


class Checkpoint:
    """The tensors and the config of a model on disk; a context manager.

    ``config`` is the content of config.json ({} when a safetensors checkpoint has none), or GGUF metadata, keys as
    stored ("general.architecture", "llama.block_count", "tokenizer.ggml.tokens", ...). ``tensors`` maps names to
    TensorInfo. Bytes are mapped into memory on first use and read from disk page by page as they are touched.
    """

    def __init__(self, path: Path, kind: Kind, config: dict[str, Any], tensors: Iterable[TensorInfo]) -> None:
        self.path = path
        self.kind: Kind = kind
        self.config = config
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({tensor.name: tensor for tensor in tensors})
        self._maps: dict[Path, mmap.mmap] | None = {}

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of a tensor, uint8 [nbytes], read-only and not copied.

        Raises WeightsError for an unknown name or a file that changed since it was opened, UsageError after close().
        """
        import numpy as np  # here, since compiling reads tables but no tensors

        if self._maps is None:
            raise UsageError("weights.closed", "the checkpoint is closed", place=Place(str(self.path)))
        info = self.tensors.get(name)
        if info is None:
            remedy = did_you_mean(name, islice(self.tensors, 2000)) or "see Checkpoint.tensors for the names"
            message = f"the checkpoint has no tensor {quoted(name)}"
            raise WeightsError("weights.missing-tensor", message, place=Place(str(self.path)), remedy=remedy)
        data = self._maps.get(info.file)
        if data is None:
            data = self._maps[info.file] = map_file(info.file)
        if info.offset + info.nbytes > len(data):
            message = f"the file was cut to {len(data)} bytes after it was opened"
            raise WeightsError("weights.truncated", message, place=Place(str(info.file)), remedy="open it again")
        return np.frombuffer(data, np.uint8, info.nbytes, info.offset)

    def release(self, name: str) -> None:
        """Let go of the memory that holds a tensor's bytes; they are read from the file again when next touched."""
        info = self.tensors[name]
        data = (self._maps or {}).get(info.file)
        if data is not None and hasattr(mmap, "MADV_DONTNEED"):
            start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
            data.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def close(self) -> None:
        """Unmap the files; arrays from ``raw`` that are still in use keep theirs mapped until they go."""
        maps, self._maps = self._maps or {}, None
        for data in maps.values():
            try:
                data.close()
            except BufferError:  # an array still points into it; its last reference unmaps the file
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model directory, a .safetensors file, a model.safetensors.index.json or a .gguf file.

    A directory may hold model.safetensors, an index with its shards, one other .safetensors file, or one .gguf model
    (split or not), looked for in this order. Only headers are read. Raises WeightsError, or Errors with every fault.
    """
    path = Path(path)
    file = _find_weights(path) if os.path.isdir(path) else path
    if not os.path.exists(file):
        remedy = "check the path"
        raise WeightsError("weights.missing-file", "no such file or directory", place=Place(str(file)), remedy=remedy)
    if file.suffix == ".gguf":
        metadata, tensors = read_gguf(file)
        return Checkpoint(path, "gguf", metadata, tensors)
    if file.suffix == ".safetensors":
        tensors = read_safetensors(file)
    elif file.name.endswith(_INDEX_SUFFIX):
        tensors = read_sharded(file)
    else:
        message = f"'{file.suffix}' files are not read as weights"
        raise WeightsError("weights.unsupported-format", message, place=Place(str(path)), remedy=_CONVERT)
    config = file.with_name("config.json")
    return Checkpoint(path, "safetensors", _read_json(config) if os.path.exists(config) else {}, tensors)


def read_config(path: str | Path) -> dict[str, Any]:
    """The config alone: of a model directory (weights need not be there), of a .json file, or a .gguf file's metadata.

    Raises WeightsError when there is none, InvalidFile when config.json is not a JSON object.
    """
    file = Path(path)
    if os.path.isdir(file):
        config = file / "config.json"
        file = config if os.path.exists(config) else _only_file(file, ".gguf") or config
    if file.suffix == ".gguf":
        return read_gguf(file)[0]
    if file.name.endswith((".safetensors", _INDEX_SUFFIX)):
        file = file.with_name("config.json")
    if file.suffix == ".json" and os.path.exists(file):
        return _read_json(file)
    remedy = "give a model directory with a config.json, a config.json, or a .gguf file"
    raise WeightsError("weights.missing-file", "there is no config here", place=Place(str(file)), remedy=remedy)


_INDEX_SUFFIX = ".safetensors.index.json"
_CONVERT = "use a .safetensors or .gguf version of the model (pickle files can run code and are never opened)"


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, InvalidFile)


def _find_weights(directory: Path) -> Path:
    """The file to open in a model directory: an index, a .safetensors file, or the (first part of the) GGUF model."""
    for name in ("model.safetensors", "model" + _INDEX_SUFFIX):
        if os.path.exists(directory / name):
            return directory / name
    found = _only_file(directory, ".safetensors") or _only_file(directory, ".gguf")
    if found is None:
        message = "no weights in this directory"
        raise WeightsError("weights.missing-file", message, place=Place(str(directory)), remedy=_CONVERT)
    return found


def _only_file(directory: Path, suffix: str) -> Path | None:
    """The one file with ``suffix``, counting a split GGUF model as its first part; None when there is none."""
    found = sorted(file for file in directory.glob("*" + suffix) if split_number(file) <= 1)
    if len(found) > 1:
        message = f"{len(found)} {suffix} files and no index: " + ", ".join(quoted(file.name) for file in found[:8])
        remedy = "give the path of one of them"
        raise WeightsError("weights.ambiguous", message, place=Place(str(directory)), remedy=remedy)
    return found[0] if found else None
