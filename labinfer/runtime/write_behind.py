"""Blocks on their way to a slow store: a thread writes them, so that no step waits for a disk."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from labinfer.runtime.host_pool import BlockStore

MAX_PENDING_BYTES = 256 << 20
"""So much may wait to be written; what is put beyond is lost, which only means that a prompt is computed again."""


class WriteBehind:
    """A ``BlockStore`` before ``store``: what is put is copied, found at once, and written later. ``lost`` counts."""

    def __init__(self, store: BlockStore, max_bytes: int = MAX_PENDING_BYTES) -> None:
        self.store, self.max_bytes = store, max_bytes
        self.pending: dict[tuple[int, bytes], list[np.ndarray]] = {}
        self.nbytes = self.lost = 0
        self.books = threading.Lock()
        self.writer = ThreadPoolExecutor(1, "labinfer-disk")

    def has(self, group: int, digest: bytes) -> bool:
        """Whether the block of ``digest`` is written, or will be."""
        return (group, digest) in self.pending or self.store.has(group, digest)

    def put(self, group: int, digest: bytes, content: Sequence[np.ndarray]) -> None:
        """Keep a block, if not too many wait."""
        size = sum(array.nbytes for array in content)
        with self.books:
            if (group, digest) in self.pending:
                return
            if self.nbytes + size > self.max_bytes:
                self.lost += 1
                return
            self.pending[group, digest] = [array.copy() for array in content]
            self.nbytes += size
        self.writer.submit(self.write, group, digest)

    def write(self, group: int, digest: bytes) -> None:
        """Write a block that waits; runs in the thread."""
        content = self.pending[group, digest]
        try:
            self.store.put(group, digest, content)
        finally:
            with self.books:
                del self.pending[group, digest]
                self.nbytes -= sum(array.nbytes for array in content)

    def get(self, group: int, digest: bytes, content: Sequence[np.ndarray]) -> bool:
        """Fill ``content`` with a block; False if there is none."""
        waiting = self.pending.get((group, digest))
        if waiting is None:
            return self.store.get(group, digest, content)
        for into, array in zip(content, waiting, strict=True):
            into[...] = array
        return True

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self.writer.shutdown()
