"""Large products by cuBLAS, called directly: CuPy refuses it inside a graph, and its workspace must be the plan's."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache

from labinfer.backends.cuda import nvrtc
from labinfer.backends.cuda.layout import CUBLAS_BYTES
from labinfer.errors import LabinferError

TRANSPOSED, PLAIN = 1, 0
NUMBERS = {"f16": 2, "bf16": 14}
F32, COMPUTE_F32, DEFAULT = 0, 68, -1


@cache
def library() -> ctypes.CDLL | None:
    """cuBLAS of the compiler's CUDA major, or None: our own kernels then do all products."""
    import cupy_backends.cuda.libs.cublas  # noqa: F401  loads the one that CuPy has found

    try:
        return ctypes.CDLL(f"libcublas.so.{nvrtc.version()[0]}")
    except OSError:
        return None


class Blas:
    """A handle on the current device. Its calls need a workspace of ``CUBLAS_BYTES`` each."""

    def __init__(self) -> None:
        self.handle = c_void_p()
        found = library()
        if found is None:
            raise LabinferError("cuda.no-cublas", "there is no cuBLAS")
        self.library = found
        self.check(found.cublasCreate_v2(byref(self.handle)))

    def check(self, code: int) -> None:
        """Raise for a failed call."""
        if code:
            raise LabinferError("cuda.cublas", f"cuBLAS reports error {code}")

    def close(self) -> None:
        """Give the handle back."""
        self.library.cublasDestroy_v2(self.handle)


@dataclass(frozen=True, slots=True)
class Product:
    """``y (+)= x @ w.T``: x [tokens, columns] and w [rows, columns] in 16 bits, y float32; calling it runs it.

    ``x``, ``w``, ``y`` and ``workspace`` are addresses; rows of x and w lie ``columns`` numbers apart, y's ``y_row``.
    """

    blas: Blas
    format: str
    tokens: int
    rows: int
    columns: int
    x: int
    w: int
    y: int
    y_row: int
    accumulate: bool
    workspace: int

    def __call__(self, stream: int) -> None:
        """On the stream with this handle."""
        blas, number, one, beta = self.blas, NUMBERS[self.format], c_float(1), c_float(self.accumulate)
        library, handle = blas.library, blas.handle
        blas.check(library.cublasSetStream_v2(handle, c_void_p(stream)))
        blas.check(library.cublasSetWorkspace_v2(handle, c_void_p(self.workspace), c_size_t(CUBLAS_BYTES)))
        columns = c_int(self.columns)
        blas.check(
            library.cublasGemmEx(
                handle, TRANSPOSED, PLAIN, self.rows, self.tokens, columns, byref(one),
                c_void_p(self.w), number, columns, c_void_p(self.x), number, columns, byref(beta),
                c_void_p(self.y), F32, self.y_row, COMPUTE_F32, DEFAULT,
            )
        )  # fmt: skip
