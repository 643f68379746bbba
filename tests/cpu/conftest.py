"""Compiles the kernels of every format at once, on all cores, instead of one by one where a test first needs them."""

from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> None:
    if not find_spec("numba"):
        return
    from labinfer.backends.cpu import machine_code
    from labinfer.backends.cpu.features import has_matrix_unit
    from labinfer.backends.cpu.layout import PANEL_FORMATS, product_kernel

    forms = {format: (1, 2) if layout.quantized else (0,) for format, layout in PANEL_FORMATS.items()}
    if has_matrix_unit():
        forms |= {
            format: (*forms[format], -1, -2 if PANEL_FORMATS[format].quantized else -3)
            for format in PANEL_FORMATS
            if format != "f32"
        }
    products = [product_kernel(format, form) for format, every in forms.items() for form in every]
    machine_code.prepare([*products, *(f"{kind}/{format}" for format in PANEL_FORMATS for kind in ("pack", "unpack"))])
