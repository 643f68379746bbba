"""The CPU backend: numba kernels that read weights in their stored format, with the machine's vector instructions."""

from labinfer.backends.base import Capabilities
from labinfer.backends.cpu.crossover import fewest_tokens
from labinfer.backends.cpu.layout import weight_bytes
from labinfer.backends.cpu.machine import default_threads
from labinfer.backends.cpu.workspace import BLOCK_MULTIPLE, scratch_bytes
from labinfer.backends.rope_tables import table_bytes


def kernels() -> str:
    """What compiled kernels depend on."""
    from labinfer.backends.cpu.machine_code import cache_key

    return cache_key()


CAPABILITIES = Capabilities(
    parameters="panels",
    weight_bytes=weight_bytes,
    fusions=("norm_qkv", "norm_glu", "rope_kv_write", "linear_add"),
    workspace=scratch_bytes,
    kv_dtypes=("f32", "bf16", "f16"),
    tables=table_bytes,
    threads=default_threads,
    block_multiple=BLOCK_MULTIPLE,
    activations=("exact", "int8"),
    matrix_unit=fewest_tokens,
    kernels=kernels,
)
