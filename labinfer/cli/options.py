"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from labinfer.units import parse_bytes, parse_count

if TYPE_CHECKING:
    from labinfer.llm import LLM
    from labinfer.progress import Progress
    from labinfer.runtime.lora import LoRARequest

Function = TypeVar("Function", bound=Callable[..., Any])


class Number(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """A positive number, read by ``parse``."""

    def __init__(self, name: str, parse: Callable[[str], int]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; a bad one is a usage error that names the option."""
        from labinfer.errors import UsageError

        if isinstance(value, int):
            return value
        try:
            return self.parse(value)
        except UsageError as error:
            self.fail(error.message, param, ctx)


COUNT = Number("count", parse_count)
"""Typed as 4096, 4k (4096) or 1M."""


PLAN_OPTIONS = {
    "devices": "Devices, in order: cpu, reference; or by layers: cpu=0-7,reference=8-15.",
    "max_model_len": "Tokens a sequence may have, prompt and answer (default: the model's, at most 4k).",
    "max_num_seqs": "Sequences a step may compute.",
    "max_num_batched_tokens": "Tokens a step may compute (default: 512).",
    "max_logits_rows": "Rows of logits a step may compute (default: one a sequence).",
    "block_size": "Tokens in a block of the KV cache (default: 16).",
    "kv_dtype": "How keys and values are kept: f32 (default), bf16 or f16.",
    "activations": "Bits of activations in products: exact (about 16, the default), or int8: lossy, faster on cpu.",
    "threads": "Threads of a CPU device (default: its physical cores).",
    "num_blocks": "Blocks of the KV cache (default: enough for all sequences at full length).",
    "kv_memory": "Memory for the KV cache instead: 500MB, 2GiB.",
    "swap_space": "GiB of host memory for cache blocks that are swapped out (default: 0).",
    "max_loras": "LoRA adapters a step may use (default: none).",
    "max_lora_rank": "Greatest rank of a LoRA adapter (default: 16).",
    "streamed_layers": "Layers of each stage that are copied to the device when they are needed (default: 0).",
    "stream_from": "Where streamed layers are kept: host memory (default), or disk, the checkpoint itself.",
    "tensor_parallel_size": "Devices that run each stage together, a part each (default: 1).",
    "tensor_split": "Shares of these devices, in their order: 3,1 (default: equal ones).",
    "fuse": "Fused ops: those the devices have (auto, the default), all that are declared, or none.",
}
"""Options that decide the plan, by the compiler's name for them, and their help."""


CHOICES = {
    "fuse": ["auto", "all", "none"],
    "kv_dtype": ["f32", "bf16", "f16"],
    "activations": ["exact", "int8"],
    "stream_from": ["host", "disk"],
}
"""What may be given for the options that are a choice."""

KINDS: dict[str, tuple[Any, str]] = {
    "devices": (str, "LIST"), "kv_memory": (Number("size", parse_bytes), "SIZE"), "swap_space": (float, "GIB"),
    "tensor_split": (str, "LIST"),
}  # fmt: skip
"""Types and placeholders of the options that are neither a choice nor a count."""

ALIASES = {"tensor_parallel_size": ["--tensor-parallel"]}
"""Other names of options."""


def plan_options(function: Function) -> Function:
    """Give a command ``--weights`` and every option of ``PLAN_OPTIONS``; those not given arrive as None."""
    for name, text in reversed(PLAN_OPTIONS.items()):
        kind, metavar = (click.Choice(CHOICES[name]), None) if name in CHOICES else KINDS.get(name, (COUNT, "N"))
        flags = [f"--{name.replace('_', '-')}", *ALIASES.get(name, []), name]
        function = click.option(*flags, type=kind, metavar=metavar, help=text)(function)
    return click.option("--weights", metavar="PATH", help="Model directory or file to take the weights from.")(function)


def cluster_options(function: Function) -> Function:
    """Give a command ``--cluster`` and ``--token-file``."""
    token = click.option("--token-file", metavar="FILE", help="With --cluster: its token (default: a kept one).")
    text = "Hosts whose agents run the stages (see `labinfer cluster`); auto or ray://HOST:PORT: of a Ray cluster."
    return click.option("--cluster", metavar="FILE|RAY", help=text)(token(function))


def check_cluster_options(options: dict[str, Any], others: dict[str, object]) -> None:
    """Refuse those of ``others``, by their names, that were given beside ``--cluster``, which knows none of them."""
    from labinfer.errors import UsageError

    wrong = [name for name, value in others.items() if value]
    if "cluster" in options and "devices" in options:
        raise UsageError("cli.usage", "the cluster file names the devices; give it or --devices, not both")
    if "cluster" in options and wrong:
        raise UsageError("cli.usage", f"over a cluster there is no {' and no '.join(wrong)}")


def load_over_cluster(model: str | None, weights: str | None, progress: Progress, options: dict[str, Any]) -> LLM:
    """The model over the hosts of ``options['cluster']``, which ``check_cluster_options`` has seen."""
    from pathlib import Path

    from labinfer.cluster.fleet import load

    options = dict(options)
    token_file, cluster = options.pop("token_file", None), options.pop("cluster")
    token = None if token_file is None else Path(token_file)
    return load(model, cluster, weights=weights, token_file=token, progress=progress, **options)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def lora_request(text: str) -> LoRARequest:
    """The adapter that ``--lora NAME=PATH`` names."""
    from labinfer.errors import UsageError
    from labinfer.runtime.lora import LoRARequest

    name, _, path = text.partition("=")
    if not name or not path:
        raise UsageError("cli.lora", f"'{text}' should be NAME=PATH, such as french=./french-adapter")
    return LoRARequest(name, path)


def device_quota(text: str) -> tuple[str, int]:
    """The device and the bytes that ``--quota DEVICE=SIZE`` names."""
    from labinfer.backends.base import backend_class
    from labinfer.errors import UsageError

    device, _, size = text.partition("=")
    if not device or not size:
        raise UsageError("cli.quota", f"'{text}' should be DEVICE=SIZE, such as cpu=4GiB")
    backend_class(device)  # an error that names it where there is none
    return device, parse_bytes(size)


def transport_option(function: Function) -> Function:
    """Give a command ``--transport``, and ``--rebalance``, which arrives as None where it is not given."""
    text = "Move layers between processes that were measured to take unequal times."
    function = click.option("--rebalance", is_flag=True, default=None, help=text)(function)
    return click.option(
        "--transport",
        type=click.Choice(["local", "shm", "tcp"]),
        help="Run the plan's stages at the same time: in threads (local), or in processes over shm or tcp.",
    )(function)


def json_option(function: Function) -> Function:
    """Give a command ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(function)
