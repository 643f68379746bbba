"""``labinfer serve``: models behind HTTP, for every client of OpenAI's API."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click

from labinfer.cli.config_file import config_option
from labinfer.cli.options import (
    COUNT,
    check_cluster_options,
    cluster_options,
    device_quota,
    given,
    json_option,
    load_over_cluster,
    lora_request,
    plan_options,
    transport_option,
)
from labinfer.cli.output import current
from labinfer.errors import UsageError

if TYPE_CHECKING:
    from labinfer.llm import LLM
    from labinfer.runtime.lora import LoRARequest
    from labinfer.runtime.manager import Manager
    from labinfer.service.services import Services

OWN = ("allowed_hosts", "max_queue", "log_format", "otlp_traces_endpoint")
"""Options that are the service's under the same names."""

SEQUENCES = 16
"""Sequences of a step, unless a plan or an option says otherwise."""

CACHE_BYTES = 1 << 30
"""Bytes of the KV cache, likewise: sequences share it, and few of them are as long as they may be."""


@click.command(context_settings={"auto_envvar_prefix": "LABINFER_SERVE"})
@click.argument("model", nargs=-1, envvar="LABINFER_SERVE_MODEL")
@config_option
@click.option("--host", default="127.0.0.1", show_default=True, metavar="H", help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="P", help="Port; 0: any."
)
@click.option(
    "--api-key", envvar="LABINFER_API_KEY", metavar="KEY", help="Key that clients must give (default: a kept one)."
)
@click.option("--api-key-file", metavar="FILE", help="File with such keys, one a line.")
@click.option(
    "--served-model-name",
    multiple=True,
    metavar="NAME",
    help="Name that clients ask for (default: the model's); once for each model, in their order.",
)
@click.option("--quota", multiple=True, metavar="DEVICE=SIZE", help="Memory that all models may take (repeatable).")
@click.option(
    "--allowed-host", "allowed_hosts", multiple=True, metavar="NAME", help="Host name to answer to (repeatable)."
)
@click.option("--lora", multiple=True, metavar="NAME=PATH", help="LoRA adapter to serve as model NAME (repeatable).")
@click.option("--max-queue", type=COUNT, default=256, show_default=True, metavar="N", help="Requests that may wait.")
@click.option(
    "--replicas",
    type=COUNT,
    default=1,
    show_default=True,
    metavar="N",
    help="Engines of the model, each on its part of the devices; a request goes where its beginning is cached.",
)
@click.option(
    "--prefill-replicas",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="How many of the replicas only compute prompts, for the others.",
)
@click.option("--drain", type=float, default=30.0, show_default=True, metavar="S", help="Seconds to finish on SIGTERM.")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Of the log."
)
@click.option("--otlp-traces-endpoint", metavar="URL", help="Where to send OpenTelemetry's spans of requests.")
@transport_option
@cluster_options
@plan_options
@json_option
def serve(
    model: tuple[str, ...],
    served_model_name: tuple[str, ...],
    quota: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    api_key_file: str | None,
    lora: tuple[str, ...],
    weights: str | None,
    transport: str | None,
    replicas: int,
    prefill_replicas: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve models to every client of OpenAI's API.

    MODEL is a plan.json or whatever `labinfer compile` takes; without it, the embedded SmolLM2-135M-Instruct. Several
    share the devices, and a request's `model` chooses. Prints where the service is and the key that it asks for.
    Options may also be environment variables, LABINFER_SERVE_PORT for --port, or lines of a YAML file (--config);
    `labinfer config show --origin` tells which is which.

    \b
    labinfer serve
    labinfer serve model.gguf --port 9000 --lora french=./french-adapter
    labinfer serve small.gguf large.gguf --kv-memory 500MB --quota cpu=4GiB
    labinfer serve plan.json --host 0.0.0.0 --api-key-file keys.txt
    """  # fmt: skip
    from labinfer.runtime.chat_template import render_chat_template
    from labinfer.runtime.manager import Manager
    from labinfer.service.descriptors import within_descriptors
    from labinfer.service.logs import configure_logging
    from labinfer.service.options import ServiceOptions
    from labinfer.service.server import Server, bind
    from labinfer.service.service import Service
    from labinfer.service.services import Services

    keys, key_file = _keys(host, api_key, api_key_file)
    chosen = {name: options.pop(name) for name in (*OWN, "drain")}
    parts = _parts(given(options), {"--lora": lora, "--transport": transport}, replicas, prefill_replicas)
    _check_several(model, served_model_name, lora, weights, len(parts))
    manager = Manager(quotas=dict(map(device_quota, quota)))
    settings = ServiceOptions(host=host, port=port, api_keys=keys, drain_seconds=chosen.pop("drain"), **chosen)
    configure_logging(settings.log_format)
    settings = within_descriptors(settings)
    # The process that renders chat templates starts while the model is loaded, not with the first request.
    threading.Thread(target=render_chat_template, args=("", ()), daemon=True).start()
    listener = bind(settings)  # before the weights are loaded: a port that is taken is told at once
    settings = replace(settings, port=listener.getsockname()[1])
    adapters = [lora_request(each) for each in lora]
    with listener, closing(manager), ExitStack() as loaded:
        served = []
        for each, called in zip_longest(model or (None,), served_model_name):
            opened = [_load(loaded, each, weights, transport, part, adapters, manager) for part in parts]
            phases = {name: sum(times[name] for _, times in opened) for name in opened[0][1]}
            first, *others = [llm for llm, _ in opened]
            served.append(Service(first, settings, phases, adapters, called, others, prefill_replicas))
        services = Services(*served)
        Server(services, listener).run(lambda: _announce(services, key_file, as_json))


def _parts(
    options: dict[str, Any], not_over_hosts: dict[str, Any], replicas: int, prefill: int
) -> list[dict[str, Any]]:
    """What to compile each replica with, of which some only compute prompts; each cluster file is one."""
    from labinfer.api import replica_options

    refused = {**not_over_hosts, "--replicas": replicas > 1, "--rebalance": options.get("rebalance")}
    check_cluster_options(options, refused)
    if "cluster" in options:
        parts = [{**options, "cluster": file} for file in options["cluster"].split(",")]
    else:
        parts = replica_options(options, replicas)
    if prefill and prefill >= len(parts):
        message = f"--prefill-replicas {prefill} of {len(parts)} replicas leaves none to answer"
        raise UsageError("cli.usage", message, remedy="give more --replicas")
    return parts


def _check_several(
    models: Sequence[str], names: Sequence[str], lora: Sequence[str], weights: str | None, replicas: int
) -> None:
    """Refuse more names than models, and what is for one model where there are several."""
    if len(names) > max(len(models), 1):
        raise UsageError("cli.usage", f"there are {len(names)} names for {max(len(models), 1)} models")
    for option, value in (("--lora", lora), ("--weights", weights), ("--replicas", replicas > 1)):
        if value and len(models) > 1:
            raise UsageError("cli.usage", f"{option} is for one model, and {len(models)} are served")


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
    loaded: ExitStack,
    model: str | None,
    weights: str | None,
    transport: str | None,
    options: dict[str, Any],
    adapters: list[LoRARequest],
    manager: Manager,
) -> tuple[LLM, dict[str, float]]:
    """The model, which ``loaded`` closes, compiled for several sequences a step and its adapters; and the seconds of
    each phase.
    """
    from labinfer.api import find_plan, is_plan
    from labinfer.llm import LLM
    from labinfer.runtime.lora import adapter_rank

    phases, started, options = {}, time.perf_counter(), dict(options)
    running: dict[str, Any] = {"weights": weights, "transport": transport, "manager": manager}
    running["rebalance"] = options.pop("rebalance", False)
    with current().progress() as progress:
        if model is not None and is_plan(model) and "cluster" not in options:
            llm = LLM(model, progress=progress, **running, **options)  # errors name the file
        else:
            defaults = {"max_num_seqs": SEQUENCES, "max_logits_rows": SEQUENCES}
            if "num_blocks" not in options:
                defaults["kv_memory"] = CACHE_BYTES
            if "cluster" in options:
                llm = load_over_cluster(model, weights, progress, {**defaults, **options})
            else:
                if adapters:
                    ranks = [adapter_rank(each.path) for each in adapters]
                    defaults |= {"max_loras": len(adapters), "max_lora_rank": max(ranks)}
                plan = find_plan(model, weights=weights, progress=progress, defaults=defaults, **options)
                phases["compile"], started = time.perf_counter() - started, time.perf_counter()
                llm = LLM(plan, progress=progress, **running)
    phases["load"] = time.perf_counter() - started
    return loaded.enter_context(llm), phases


def _announce(services: Services, key_file: str | None, as_json: bool) -> None:
    """Tell where the service is and how to use it; a key that was given is not shown again."""
    url, out, names = services.options.url, current(), [each.name for each in services.all]
    key = services.options.api_keys[0] if key_file else None
    if as_json:
        out.json({"url": url, "models": names, "api_key": key, "api_key_file": key_file})
        return
    out.data(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} served at {url}/v1")
    if key:
        out.data(f"Open {url}/#key={key}")
    out.data(f"API key: {key}  (kept in {key_file})" if key else "API key: one of yours")
    out.data(
        f"curl {url}/v1/chat/completions -H 'Authorization: Bearer {key or 'KEY'}' "
        """-H 'Content-Type: application/json' -d '{"messages": [{"role": "user", "content": "Hello"}]}'"""
    )
