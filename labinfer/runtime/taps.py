"""Taps: write any value of a running model to a .npy file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labinfer.files import atomic_write

if TYPE_CHECKING:
    from labinfer.runtime.model import Model


@contextmanager
def tapped(model: Model, files: Mapping[str, Path | str]) -> Iterator[None]:
    """Within the context, record the values named in ``files``; at its end, write each to its file.

    A file holds [tokens, features]: one row for every token computed, prompt and answer, in order (for a value after
    ``select_rows``, every row of logits computed). An unknown name is a ``UsageError``; after a failure no file is
    written.
    """
    seen: dict[str, list[np.ndarray]] = {name: [] for name in files}
    with ExitStack() as listening:
        for name, arrays in seen.items():
            listening.enter_context(model.listen(name, arrays.append))
        yield
    for name, file in files.items():
        if seen[name]:
            with atomic_write(file) as stream:
                np.save(stream, np.concatenate(seen[name]), allow_pickle=False)
