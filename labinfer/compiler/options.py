"""The options of a compile: what they mean, their defaults, and which values make no sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from labinfer.compiler.ranks import tensor_split
from labinfer.errors import UsageError

Fuse = Literal["auto", "all", "none"]
FUSE: tuple[Fuse, ...] = get_args(Fuse)
DEFAULT_LORA = {"max_loras": 4, "max_lora_rank": 16}
"""Limits of a plan with adapters that names none."""


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """Bounds of the plan, as in vLLM; None asks for the default.

    ``max_num_batched_tokens`` tokens and ``max_num_seqs`` sequences a step, ``max_logits_rows`` rows of logits
    (default: one a sequence), ``max_model_len`` tokens a sequence (default: the model's, at most 4096). The cache has
    ``num_blocks`` blocks of ``block_size`` tokens, or as many as ``kv_memory`` bytes hold (default: enough for all
    sequences at full length, or as many as fit); ``swap_space`` GiB of host memory are for blocks swapped out.
    ``kv_dtype`` is how keys and values are kept, ``threads`` how many a CPU uses (default: its physical cores).
    ``streamed_layers`` of each stage are copied to the device when they are needed, from the host or from disk.
    ``activations`` ``int8`` trades exactness for speed where devices can.
    ``fuse``: ``auto`` uses the fused kernels that the devices have, ``all`` every declared fusion, ``none`` no fusion.
    ``enable_lora`` makes room for ``max_loras`` adapters a step (default: 4) of rank ``max_lora_rank`` at most
    (default: 16); giving one of these enables it too.
    ``tensor_parallel_size`` devices run each stage together, a part each: equal ones, or as ``tensor_split`` (``3,1``)
    says.
    """

    max_num_batched_tokens: int = 512
    max_num_seqs: int = 8
    max_logits_rows: int | None = None
    max_model_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    kv_memory: int | None = None
    swap_space: float = 0
    kv_dtype: Literal["f32", "bf16", "f16"] = "f32"
    threads: int | None = None
    activations: Literal["exact", "int8"] = "exact"
    streamed_layers: int = 0
    stream_from: Literal["host", "disk"] = "host"
    fuse: Fuse = "auto"
    enable_lora: bool | None = None
    max_loras: int | None = None
    max_lora_rank: int | None = None
    tensor_parallel_size: int = 1
    tensor_split: str | Sequence[float] | None = None
    arena_effort_seconds: float = 1.0

    @property
    def split(self) -> tuple[float, ...]:
        """The shares of the ranks that run a stage together; one where a stage is one device's."""
        return tensor_split(self.tensor_parallel_size, self.tensor_split)


def check_options(options: CompileOptions) -> None:
    """Raise ``UsageError`` for a number that cannot be meant."""
    for name in (
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_logits_rows",
        "max_model_len",
        "block_size",
        "num_blocks",
        "kv_memory",
        "max_loras",
        "max_lora_rank",
    ):
        value, bound = getattr(options, name), 1 << (60 if name == "kv_memory" else 31)
        default = CompileOptions.__dataclass_fields__[name].default
        if value != default and not (isinstance(value, int) and 0 < value < bound):
            raise UsageError("limits.range", f"{name} must be a positive whole number, got {value!r}")
    if not isinstance(options.streamed_layers, int) or options.streamed_layers < 0:
        raise UsageError("limits.range", f"streamed_layers must be a whole number, got {options.streamed_layers!r}")
    if options.stream_from not in ("host", "disk"):
        raise UsageError("limits.range", f"stream_from must be 'host' or 'disk', got {options.stream_from!r}")
    for name, most in (("arena_effort_seconds", float("inf")), ("swap_space", 1 << 20)):
        value = getattr(options, name)
        if not isinstance(value, int | float) or not 0 <= value <= most:
            raise UsageError("limits.range", f"{name} must be a number from 0 on, got {value!r}")
    if len(options.split) > 1 and lora_limits(options)["max_loras"]:
        raise UsageError("shard.adapters", "adapters cannot be used where several ranks run a stage together")
    if options.num_blocks and options.kv_memory:
        raise UsageError("limits.cache", "num_blocks and kv_memory both say how large the cache is", remedy="give one")


def lora_limits(options: CompileOptions) -> dict[str, int]:
    """The plan's ``max_loras`` and ``max_lora_rank``, zeros without adapters."""
    given = {"max_loras": options.max_loras, "max_lora_rank": options.max_lora_rank}
    if options.enable_lora is False or (options.enable_lora is None and not any(given.values())):
        return dict.fromkeys(given, 0)
    return {name: value or DEFAULT_LORA[name] for name, value in given.items()}
