"""Devices of this machine as the compiler sees them."""

from __future__ import annotations

from labinfer.backends.base import capabilities, device_kind
from labinfer.compiler.target import Target


def real_target(name: str) -> Target:
    """A device of this machine as the compiler sees it."""
    known = capabilities(name)
    return Target(
        name=name,
        kind=device_kind(name),
        parameters=known.parameters,
        weight_bytes=known.weight_bytes,
        fusions=known.fusions,
        workspace=known.workspace,
        kv_dtypes=known.kv_dtypes,
        tables=known.tables,
        threads=known.threads(),
        block_multiple=known.block_multiple,
        activations=known.activations,
        matrix_unit=known.matrix_unit,
        sampling=known.sampling,
        exchange=known.exchange,
    )
