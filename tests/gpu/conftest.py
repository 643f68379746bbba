"""Tests that need an NVIDIA GPU; skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from labinfer.errors import LabinferError
from labinfer.runtime.manager import Manager

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def gpu() -> Iterator[Any]:
    """The device ``cuda``."""
    manager = Manager()
    try:
        device = manager.device("cuda")
    except LabinferError as error:
        pytest.skip(f"no CUDA device: {error.message}")
    yield device
    manager.close()


@pytest.fixture
def manager(gpu: Any) -> Manager:
    """A manager that has the session's device open."""
    return Manager(devices={"cuda": gpu})


@pytest.fixture(scope="session")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A golden model with its weights widened to float32: with the checkpoints' own f16, activations are f16 too."""
    made: dict[Path, Path] = {}

    def widen(folder: Path) -> Path:
        if folder not in made:
            made[folder] = tmp_path_factory.mktemp("float32") / folder.name
            shutil.copytree(folder, made[folder])
            for file in made[folder].glob("*.safetensors"):
                save_file({name: tensor.astype(np.float32) for name, tensor in load_file(file).items()}, file)
        return made[folder]

    return widen


@pytest.fixture(scope="module")
def two(gpu: Any) -> Iterator[Manager]:
    """A manager with two GPUs open."""
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("this machine has one GPU")
    with closing(Manager()) as manager:
        for name in ("cuda:0", "cuda:1"):
            manager.device(name)
        yield manager
