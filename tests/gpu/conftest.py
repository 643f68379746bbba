"""Tests that need an NVIDIA GPU; skipped, with the reason, where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labinfer.errors import LabinferError

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def gpu() -> Iterator[Any]:
    """The device ``cuda``."""
    from labinfer.runtime.manager import Manager

    manager = Manager()
    try:
        device = manager.device("cuda")
    except LabinferError as error:
        pytest.skip(f"no CUDA device: {error.message}")
    yield device
    manager.close()
