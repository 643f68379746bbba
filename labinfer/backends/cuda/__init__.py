"""The CUDA backend: small CUDA C kernels, compiled when they are first needed, and steps replayed as CUDA graphs."""

from labinfer.backends.base import Capabilities
from labinfer.backends.cuda.layout import sampling_bytes, weight_bytes
from labinfer.backends.cuda.workspace import scratch_bytes
from labinfer.backends.rope_tables import table_bytes

CAPABILITIES = Capabilities(
    parameters="planes",
    weight_bytes=weight_bytes,
    fusions=("norm_qkv", "norm_glu", "rope_attention", "rope_kv_write", "linear_add"),
    workspace=scratch_bytes,
    kv_dtypes=("f32", "bf16", "f16"),
    tables=table_bytes,
    sampling=sampling_bytes,
)
