"""Digests of blocks of text, by which cached blocks are found again: each covers its block and all text before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

DIGEST_BYTES = 16
"""Bytes of a digest: among 2^32 blocks, two share one with a chance of 2^-65."""

_HASHER = blake2b(digest_size=DIGEST_BYTES)

Tokens = Sequence[int] | np.ndarray
Salt = tuple[str, ...]
"""Keeps texts apart that would share blocks: a tenant's secret, the name of an adapter."""


def root_digest(salt: Salt) -> bytes:
    """What the digest of a text's first block is made on."""
    return blake2b(repr(salt).encode(), digest_size=DIGEST_BYTES).digest()


def block_digest(before: bytes, raw: bytes) -> bytes:
    """The digest of a block whose tokens are ``raw``, int32, after a block of digest ``before``."""
    hasher = _HASHER.copy()  # quicker than to make one
    hasher.update(before + raw)
    return hasher.digest()


def block_digests(root: bytes, token_ids: Tokens, block_size: int) -> Iterator[bytes]:
    """The digest of every full block of ``token_ids``, each made on the one before it, the first on ``root``."""
    count = len(token_ids) // block_size
    raw, size = np.asarray(token_ids[: count * block_size], np.int32).tobytes(), 4 * block_size
    for start in range(0, count * size, size):
        root = block_digest(root, raw[start : start + size])
        yield root
