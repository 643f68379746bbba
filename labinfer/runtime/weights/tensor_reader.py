"""Reads the same tensors again and again, where mapped pages would have to be faulted in and given back each time."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labinfer.errors import Place, WeightsError

if TYPE_CHECKING:
    from labinfer.runtime.weights.checkpoint import Checkpoint


class TensorReader:
    """The stored bytes of a checkpoint's tensors, for any number of threads; a bad disk is an error, not a signal."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors = checkpoint.tensors
        self.descriptors: dict[Path, int] = {}
        self.opening = threading.Lock()
        self.scratch = threading.local()

    def read(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8, which hold until the same thread reads again; ``WeightsError``."""
        info = self.tensors[name]
        memory: np.ndarray = getattr(self.scratch, "memory", np.empty(0, np.uint8))
        if len(memory) < info.nbytes:
            memory = self.scratch.memory = np.empty(info.nbytes, np.uint8)
        place = Place(str(info.file))
        done = 0
        try:
            descriptor = self.open(info.file)
            while done < info.nbytes:
                count = os.preadv(descriptor, [memory.data[done : info.nbytes]], info.offset + done)
                if count == 0:
                    message = f"the file ends within tensor '{name}', which it held when it was opened"
                    raise WeightsError("weights.truncated", message, place=place, remedy="restore the file")
                done += count
        except OSError as error:
            message = f"cannot read tensor '{name}': {error.strerror}"
            raise WeightsError("weights.unreadable", message, place=place, remedy="check the disk") from error
        return memory[: info.nbytes]

    def expect(self, name: str) -> None:
        """Have the system read a tensor that is needed soon, where it can; what is wrong shows when it is read."""
        info = self.tensors[name]
        with suppress(OSError, AttributeError):  # not every system can be told
            descriptor = self.open(info.file)
            try:  # telling it looks at every page, so a tensor whose end is in memory is taken for all there
                os.preadv(descriptor, [bytearray(1)], info.offset + info.nbytes - 1, os.RWF_NOWAIT)
            except BlockingIOError:
                os.posix_fadvise(descriptor, info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)

    def open(self, file: Path) -> int:
        """The descriptor of a file."""
        with self.opening:
            if file not in self.descriptors:
                self.descriptors[file] = os.open(file, os.O_RDONLY)
            return self.descriptors[file]

    def close(self) -> None:
        """Close the files."""
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])
