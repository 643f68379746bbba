"""Large products by cuBLAS, called directly: CuPy refuses it inside a graph, and its workspace must be the plan's."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache

from labinfer.backends.cuda import nvrtc
from labinfer.backends.cuda.layout import CUBLAS_BYTES
from labinfer.errors import LabinferError

TRANSPOSED, PLAIN = 1, 0
NUMBERS = {"f32": 0, "f16": 2, "bf16": 14}
COMPUTE_F32, DEFAULT = 68, -1


@cache
def library() -> ctypes.CDLL | None:
    """cuBLAS of the compiler's CUDA major, or None: our own kernels then do all products."""
    import cupy_backends.cuda.libs.cublas  # noqa: F401  loads the one that CuPy has found

    try:
        return ctypes.CDLL(f"libcublas.so.{nvrtc.version()[0]}")
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Product:
    """``y = x @ w.T``, or ``y +=``: x [tokens, columns], w [rows, columns] in ``format``, y in ``out``."""

    tokens: int
    rows: int
    columns: int
    format: str
    out: str = "f32"
    accumulate: bool = False


class Blas:
    """A handle on the current device, for so many of its multiprocessors, or 0 for all."""

    def __init__(self, multiprocessors: int) -> None:
        self.handle = c_void_p()
        found = library()
        if found is None:
            raise LabinferError("cuda.no-cublas", "there is no cuBLAS")
        self.library = found
        self.check(found.cublasCreate_v2(byref(self.handle)))
        self.check(found.cublasSetSmCountTarget(self.handle, multiprocessors))

    def check(self, code: int) -> None:
        """Raise for a failed call."""
        if code:
            raise LabinferError("cuda.cublas", f"cuBLAS reports error {code}")

    def bind(self, product: Product, x: int, w: int, y: int, y_row: int, workspace: int) -> BoundProduct:
        """``product`` at addresses; rows of y lie ``y_row`` numbers apart, ``workspace`` has ``CUBLAS_BYTES``."""
        return BoundProduct(self, product, x, w, y, y_row, workspace)

    def close(self) -> None:
        """Give the handle back."""
        self.library.cublasDestroy_v2(self.handle)


@dataclass(frozen=True, slots=True)
class BoundProduct:
    """A product with its addresses; calling it puts it on a stream."""

    blas: Blas
    product: Product
    x: int
    w: int
    y: int
    y_row: int
    workspace: int

    def __call__(self, stream: int) -> None:
        """On the stream with this handle."""
        blas, product, one, beta = self.blas, self.product, c_float(1), c_float(self.product.accumulate)
        library, handle, number = blas.library, blas.handle, NUMBERS[product.format]
        blas.check(library.cublasSetStream_v2(handle, c_void_p(stream)))
        blas.check(library.cublasSetWorkspace_v2(handle, c_void_p(self.workspace), c_size_t(CUBLAS_BYTES)))
        blas.check(
            library.cublasGemmEx(
                handle, TRANSPOSED, PLAIN, product.rows, product.tokens, product.columns, byref(one),
                c_void_p(self.w), number, product.columns, c_void_p(self.x), number, product.columns, byref(beta),
                c_void_p(self.y), NUMBERS[product.out], self.y_row, COMPUTE_F32, DEFAULT,
            )
        )  # fmt: skip
