"""NVRTC, NVIDIA's run-time compiler: CUDA C++ to the machine code of a kind of GPU. Needs no GPU and no headers."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from labinfer.errors import LabinferError
from labinfer.extras import pip_command

MAJORS = (13, 12)
"""CUDA majors that are tried, best first."""


class CompileError(LabinferError):
    """A kernel does not compile: a defect of this package, or a GPU too new for the compiler."""


def libraries(stem: str, majors: Sequence[int] = MAJORS) -> Iterator[str]:
    """Where a CUDA library may be: in NVIDIA's wheels, else wherever the system's loader looks."""
    folders: list[Path] = []
    for package in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        spec = find_spec(package) if find_spec("nvidia") else None
        folders += [Path(place) / "lib" for place in (spec.submodule_search_locations or () if spec else ())]
    for major in majors:
        name = f"lib{stem}.so.{major}"
        yield from (str(folder / name) for folder in folders if (folder / name).exists())
        yield name


@cache
def library() -> ctypes.CDLL:
    """The compiler, of CuPy's CUDA major where that is loaded; an error with a remedy where there is none."""
    majors = [_cupy_major()] if "cupy" in sys.modules else MAJORS
    for path in libraries("nvrtc", majors):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    remedy = f"{pip_command('cupy')} brings it"
    raise LabinferError("cuda.no-compiler", "NVRTC, which compiles the CUDA kernels, was not found", remedy=remedy)


def _cupy_major() -> int:
    import cupy

    return int(cupy.cuda.runtime.runtimeGetVersion()) // 1000


def version() -> tuple[int, int]:
    """Major and minor version of CUDA that the compiler belongs to."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile(source: str, name: str, arch: str, defines: Sequence[str]) -> tuple[bytes, str]:
    """``source`` for ``arch`` (``sm_90a``) as a cubin, and what the assembler says of registers and spills."""
    nvrtc, program = library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None)
    options = [f"-arch={arch}", "--std=c++17", "--ptxas-options=-v", *(f"-D{define}" for define in defines)]
    listed = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(options), listed)
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        if failed:
            raise CompileError("cuda.compile", f"kernel '{name}' does not compile for {arch}: {log.strip()[:2000]}")
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of: Callable[..., int], read: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw[: size.value]
