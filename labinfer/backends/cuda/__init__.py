"""The CUDA backend: small CUDA C kernels, compiled when they are first needed, and steps replayed as CUDA graphs."""

from labinfer.backends.base import Capabilities, local_name
from labinfer.backends.cuda import driver
from labinfer.backends.cuda.layout import exchange_bytes, sampling_bytes, weight_bytes
from labinfer.backends.cuda.workspace import scratch_bytes
from labinfer.backends.rope_tables import table_bytes
from labinfer.errors import DoesNotFit


def machine() -> str:
    """The kind of the first GPU, which measured times depend on; where there is none, what is missing."""
    try:
        return driver.gpu_name(0)
    except DoesNotFit as lack:
        return lack.message


def processors(name: str) -> int:
    """The multiprocessors of the GPU that device ``name`` is on."""
    return driver.multiprocessors(gpu_number(name))


def gpu_number(name: str) -> int:
    """1 for ``cuda:1`` and for each part of it, ``cuda:1.0``; 0 for ``cuda``."""
    return int(local_name(name).partition(":")[2].partition(".")[0] or 0)


CAPABILITIES = Capabilities(
    parameters="planes",
    weight_bytes=weight_bytes,
    fusions=(
        "norm_qkv",
        "norm_glu",
        "norm_head",
        "norm_rope_attention",
        "rope_attention",
        "rope_kv_write",
        "linear_add",
        "all_reduce_add",
    ),
    workspace=scratch_bytes,
    kv_dtypes=("f32", "bf16", "f16"),
    tables=table_bytes,
    machine=machine,
    processors=processors,
    sampling=sampling_bytes,
    exchange=exchange_bytes,
)
