"""Compiled kernels: kept, found again, loaded by ourselves or by LLVM; what is damaged is said and made anew."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from ctypes import c_int64
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from labinfer.backends.cpu import machine_code, object_file
from labinfer.backends.cpu.machine_code import address, folder, object_path
from tests.cpu.weights import aligned


def step(code: int, *numbers: float) -> None:
    """Run the step function at ``code`` alone, for one sequence; floats are passed as float64."""
    row = np.zeros(len(numbers), np.int64)
    for i, number in enumerate(numbers):
        row[i : i + 1].view(np.float64 if isinstance(number, float) else np.int64)[0] = number
    ctypes.CFUNCTYPE(None, *[c_int64] * 4)(code)(row.ctypes.data, 1, 0, 1)


def doubled(code: int) -> np.ndarray:
    """What the kernel ``scale_step`` at ``code`` makes of 0 ... 19, by a factor of 2."""
    x, y = np.arange(20, dtype=np.float32), np.zeros(20, np.float32)
    step(code, 1, x.ctypes.data, 20, y.ctypes.data, 20, 20, 2.0)
    return y


def test_both_ways_of_loading_run() -> None:
    wanted = 2 * np.arange(20, dtype=np.float32)
    np.testing.assert_array_equal(doubled(address("scale_step")), wanted)
    code = object_path("scale_step", folder()).read_bytes()
    np.testing.assert_array_equal(doubled(object_file.load(code)), wanted)
    np.testing.assert_array_equal(doubled(object_file.load_with_llvm(code)), wanted)


def test_code_that_calls_libm_runs() -> None:
    """``dynamic_table_step`` needs pow and sincos: angles 0 and 1 with a frequency of 1."""
    start, length = np.array([0, 2], np.int32), np.array([2], np.int32)
    positions, rows, table = np.array([0, 1], np.int32), np.zeros(2, np.int32), aligned(64).view(np.float32)
    batch = (start.ctypes.data, length.ctypes.data, positions.ctypes.data)
    step(address("dynamic_table_step"), *batch, 0, 4, 1, table.ctypes.data, rows.ctypes.data, 100, 10000.0, 1.0)
    np.testing.assert_allclose(table[:4], [1, 0, np.cos(1), np.sin(1)], rtol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere LLVM reads the files")
@pytest.mark.parametrize("damage", ["empty", "cut", "no kernel", "noise"])
def test_damaged_code_is_a_value_error(damage: str) -> None:
    code = object_path("scale_step", folder()).read_bytes() if address("scale_step") else b""
    damaged = {
        "empty": b"",
        "cut": code[:200],
        "no kernel": code.replace(b"kernel\0", b"kernal\0"),
        "noise": b"x" * 500,
    }
    with pytest.raises(ValueError, match=r"."):
        object_file.load(damaged[damage])


PROGRAM = """
import sys
from labinfer.backends.cpu import machine_code
from labinfer.errors import LabinferError
said = []
try:
    machine_code.prepare(sys.argv[1:], lambda done, total: said.append((done, total)))
except LabinferError as error:
    print(error.code, error.remedy)
assert "numba" not in sys.modules and "llvmlite" not in sys.modules
print(said, machine_code.folder())
"""


def prepare(*names: str) -> str:
    """What a new process says that prepares the kernels called ``names``."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, check=True)
    return done.stdout


def test_kernels_are_compiled_once_and_damage_is_mended(home: Path) -> None:
    assert prepare("announce", "lead").startswith("[(0, 2), (1, 2), (2, 2)]")
    assert prepare("announce", "lead").startswith("[]")
    [path] = home.glob("jit/*/announce.o")
    path.write_bytes(path.read_bytes()[:100])
    assert prepare("announce").startswith("device.machine-code start again: it is compiled anew")
    assert prepare("announce").startswith("[(0, 1), (1, 1)]")
    assert "device.compile `labinfer doctor`" in prepare("no_such_step")


def test_code_that_nothing_uses_goes(home: Path) -> None:
    old, young = home / "jit" / "old", home / "jit" / "young"
    for each in (old / "inner", young):
        each.mkdir(parents=True)
        (each / "x.o").write_bytes(b"x")
    before = time.time() - 2 * machine_code.KEEP_SECONDS
    os.utime(old, (before, before))
    prepare("announce")
    assert not old.exists()
    assert (young / "x.o").exists()


@pytest.mark.skipif("os.geteuid() == 0", reason="root writes everywhere")
def test_without_a_place_to_keep_code_it_is_compiled_anew(home: Path) -> None:
    home.chmod(0o500)
    assert "labinfer-jit-" in prepare("announce")
