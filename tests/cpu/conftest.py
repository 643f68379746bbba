"""Compiles the kernels of every format at once, on all cores, instead of one by one where a test first needs them."""

from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> None:
    if not find_spec("numba"):
        return
    from labinfer.backends.cpu import machine_code
    from labinfer.backends.cpu.layout import PANEL_FORMATS, activation_digits

    products = [f"linear/{format}/{activation_digits(format, digits)}" for format in PANEL_FORMATS for digits in (1, 2)]
    machine_code.prepare([*products, *(f"{kind}/{format}" for format in PANEL_FORMATS for kind in ("pack", "unpack"))])
