"""``labinfer serve``: a model behind HTTP, for every client of OpenAI's API."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from labinfer.cli.config_file import config_option
from labinfer.cli.options import (
    COUNT,
    cluster_options,
    given,
    json_option,
    load_over_cluster,
    lora_request,
    plan_options,
)
from labinfer.cli.output import current
from labinfer.errors import UsageError

if TYPE_CHECKING:
    from labinfer.llm import LLM
    from labinfer.runtime.lora import LoRARequest
    from labinfer.service.service import Service

SEQUENCES = 16
"""Sequences of a step, unless a plan or an option says otherwise."""

CACHE_BYTES = 1 << 30
"""Bytes of the KV cache, likewise: sequences share it, and few of them are as long as they may be."""


@click.command(context_settings={"auto_envvar_prefix": "LABINFER_SERVE"})
@click.argument("model", required=False)
@config_option
@click.option("--host", default="127.0.0.1", show_default=True, metavar="H", help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="P", help="Port; 0: any."
)
@click.option(
    "--api-key", envvar="LABINFER_API_KEY", metavar="KEY", help="Key that clients must give (default: a kept one)."
)
@click.option("--api-key-file", metavar="FILE", help="File with such keys, one a line.")
@click.option("--served-model-name", metavar="NAME", help="Name that clients ask for (default: the model's).")
@click.option(
    "--allowed-host", "allowed_hosts", multiple=True, metavar="NAME", help="Host name to answer to (repeatable)."
)
@click.option("--lora", multiple=True, metavar="NAME=PATH", help="LoRA adapter to serve as model NAME (repeatable).")
@click.option("--max-queue", type=COUNT, default=256, show_default=True, metavar="N", help="Requests that may wait.")
@click.option("--drain", type=float, default=30.0, show_default=True, metavar="S", help="Seconds to finish on SIGTERM.")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Of the log."
)
@cluster_options
@plan_options
@json_option
def serve(
    model: str | None,
    host: str,
    port: int,
    api_key: str | None,
    api_key_file: str | None,
    lora: tuple[str, ...],
    weights: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve a model to every client of OpenAI's API.

    MODEL is a plan.json or whatever `labinfer compile` takes; without it, the embedded SmolLM2-135M-Instruct. Prints
    where the service is and the key that it asks for. Options may also be environment variables, LABINFER_SERVE_PORT
    for --port, or lines of a YAML file (--config); `labinfer config show --origin` tells which is which.

    \b
    labinfer serve
    labinfer serve model.gguf --port 9000 --max-model-len 8k
    labinfer serve model.gguf --lora french=./french-adapter
    labinfer serve plan.json --host 0.0.0.0 --api-key-file keys.txt
    """  # fmt: skip
    from labinfer.runtime.chat_template import render_chat_template
    from labinfer.service.logs import configure_logging
    from labinfer.service.options import ServiceOptions
    from labinfer.service.server import Server, bind
    from labinfer.service.service import Service

    keys, key_file = _keys(host, api_key, api_key_file)
    names = ("served_model_name", "allowed_hosts", "max_queue", "drain", "log_format")
    chosen = {name: options.pop(name) for name in names}
    settings = ServiceOptions(host=host, port=port, api_keys=keys, drain_seconds=chosen.pop("drain"), **chosen)
    configure_logging(settings.log_format)
    phases: dict[str, float] = {}
    # The process that renders chat templates starts while the model is loaded, not with the first request.
    threading.Thread(target=render_chat_template, args=("", ()), daemon=True).start()
    listener = bind(settings)  # before the weights are loaded: a port that is taken is told at once
    settings = replace(settings, port=listener.getsockname()[1])
    adapters = [lora_request(each) for each in lora]
    with listener, _load(model, weights, given(options), adapters, phases) as llm:
        service = Service(llm, settings, phases, adapters)
        Server(service, listener).run(lambda: _announce(service, key_file, as_json))


def _keys(host: str, api_key: str | None, api_key_file: str | None) -> tuple[tuple[str, ...], str | None]:
    """The keys, and the file of a key that was made here; one made here is for this machine only."""
    from labinfer.service.keys import check_key, kept_key, read_keys
    from labinfer.service.options import is_loopback

    if api_key is not None and api_key_file is not None:
        raise UsageError("cli.usage", "give --api-key or --api-key-file, not both")
    if api_key_file is not None:
        return read_keys(api_key_file), None
    if api_key is not None:
        return (check_key(api_key),), None
    if not is_loopback(host):
        message = f"{host} can be reached from other machines, so it needs a key of your own"
        raise UsageError("serve.no-key", message, remedy="give one: --api-key KEY or --api-key-file FILE")
    key, file = kept_key()
    return (key,), str(file)


def _load(
    model: str | None,
    weights: str | None,
    options: dict[str, Any],
    adapters: list[LoRARequest],
    phases: dict[str, float],
) -> LLM:
    """The model, compiled for several sequences a step and its adapters; ``phases`` gets the seconds of each phase."""
    from labinfer.api import find_plan, is_plan
    from labinfer.llm import LLM
    from labinfer.runtime.lora import adapter_rank

    started = time.perf_counter()
    with current().progress() as progress:
        if model is not None and is_plan(model):
            llm = LLM(model, weights=weights, progress=progress, **options)  # errors name the file
        else:
            defaults = {"max_num_seqs": SEQUENCES, "max_logits_rows": SEQUENCES}
            if "num_blocks" not in options:
                defaults["kv_memory"] = CACHE_BYTES
            if "cluster" in options:
                if adapters:
                    raise UsageError("cli.usage", "over a cluster there are no adapters")
                llm = load_over_cluster(model, weights, progress, {**defaults, **options})
            else:
                if adapters:
                    ranks = [adapter_rank(each.path) for each in adapters]
                    defaults |= {"max_loras": len(adapters), "max_lora_rank": max(ranks)}
                plan = find_plan(model, weights=weights, progress=progress, defaults=defaults, **options)
                phases["compile"], started = time.perf_counter() - started, time.perf_counter()
                llm = LLM(plan, weights=weights, progress=progress)
    phases["load"] = time.perf_counter() - started
    return llm


def _announce(service: Service, key_file: str | None, as_json: bool) -> None:
    """Tell where the service is and how to use it; a key that was given is not shown again."""
    url, out = service.options.url, current()
    key = service.options.api_keys[0] if key_file else None
    if as_json:
        out.json({"url": url, "model": service.name, "api_key": key, "api_key_file": key_file})
        return
    out.data(f"{service.name} is served at {url}/v1")
    if key:
        out.data(f"Open {url}/#key={key}")
    out.data(f"API key: {key}  (kept in {key_file})" if key else "API key: one of yours")
    out.data(
        f"curl {url}/v1/chat/completions -H 'Authorization: Bearer {key or 'KEY'}' "
        """-H 'Content-Type: application/json' -d '{"messages": [{"role": "user", "content": "Hello"}]}'"""
    )
