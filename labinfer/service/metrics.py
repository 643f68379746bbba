"""Measurements for Prometheus. What vLLM measures too has vLLM's names, so that boards made for it work."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from labinfer.errors import LabinferError
from labinfer.runtime.request import Request, Sequence
from labinfer.service.plan_metrics import LABELS, plan_families

if TYPE_CHECKING:
    from labinfer.service.service import Service

LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
TOKENS = tuple(scale * 10**power for power in range(6) for scale in (1, 2, 5))

HISTOGRAMS = {
    "time_to_first_token_seconds": ("from arrival to the first token", FIRST),
    "inter_token_latency_seconds": ("from piece to piece of a stream, by token", BETWEEN),
    "request_time_per_output_token_seconds": ("mean time from token to token of a request", BETWEEN),
    "e2e_request_latency_seconds": ("from arrival to the end", LATENCY),
    "request_queue_time_seconds": ("from arrival to the first step", LATENCY),
    "request_prefill_time_seconds": ("from the first step to the first token", LATENCY),
    "request_decode_time_seconds": ("from the first token to the end", LATENCY),
    "request_inference_time_seconds": ("from the first step to the end", LATENCY),
    "request_prompt_tokens": ("tokens of a prompt", TOKENS),
    "request_generation_tokens": ("tokens of an answer", TOKENS),
    "request_num_preemptions": ("how often a request was preempted", (0, 1, 2, 5, 10)),
    "iteration_tokens_total": ("tokens of a step", TOKENS),
}
COUNTERS = {
    "prompt_tokens": "tokens of prompts",
    "prompt_tokens_cached": "tokens of prompts that the prefix cache had",
    "generation_tokens": "tokens of answers",
    "corrupted_requests": "requests whose logits were not numbers",
}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Everything that is measured of a service."""

    def __init__(self, service: Service) -> None:
        self.registry, self.service = CollectorRegistry(auto_describe=False), service
        own = (service.name, "0")
        self.histograms = {
            name: Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=self.registry).labels(*own)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self.counters = {
            name: Counter(f"vllm:{name}", text, LABELS, registry=self.registry).labels(*own)
            for name, text in COUNTERS.items()
        }
        labels = (*LABELS, "finished_reason")
        ends = Counter("vllm:request_success", "requests, by why they ended", labels, registry=self.registry)
        self.ends = {reason: ends.labels(*own, reason) for reason in ("stop", "length", "abort", "error")}
        self.registry.register(State(service))
        self.counted = dict.fromkeys(service.engines, time.perf_counter())  # the last step of each

    def count_steps(self) -> None:
        """Count the steps since the last time; the engines remember 1,024 of them."""
        for engine, last in self.counted.items():
            new = [each for each in list(engine.stats) if each.time > last]
            for each in new:
                for _ in range(each.num_steps):
                    self.histograms["iteration_tokens_total"].observe(each.num_tokens)
            if new:
                self.counted[engine] = new[-1].time

    def told(self, tokens: int, seconds: float | None) -> None:
        """A request has got ``tokens``, so many ``seconds`` after those before; None for its first."""
        self.counters["generation_tokens"].inc(tokens)
        if tokens and seconds is not None:
            self.histograms["inter_token_latency_seconds"].observe(seconds / tokens)

    def failed(self, error: LabinferError) -> None:
        """A request has failed."""
        if error.code == "run.not-a-number":
            self.counters["corrupted_requests"].inc()

    def ended(self, request: Request, reason: str) -> None:
        """A request has ended."""
        metrics = request.metrics
        self.ends[reason].inc()
        self.counters["prompt_tokens"].inc(len(request.prompt))
        self.counters["prompt_tokens_cached"].inc(metrics.num_cached_tokens)
        end = time.perf_counter() if metrics.finished_time is None else metrics.finished_time
        begun, first = metrics.first_scheduled_time, metrics.first_token_time
        found: dict[str, float | None] = {
            "time_to_first_token_seconds": metrics.first_token_seconds,
            "request_time_per_output_token_seconds": metrics.inter_token_seconds,
            "e2e_request_latency_seconds": end - metrics.arrival_time,
            "request_queue_time_seconds": metrics.queue_seconds,
            "request_prefill_time_seconds": None if begun is None or first is None else first - begun,
            "request_decode_time_seconds": None if first is None else end - first,
            "request_inference_time_seconds": None if begun is None else end - begun,
            "request_prompt_tokens": len(request.prompt),
            "request_generation_tokens": metrics.num_generation_tokens,
            "request_num_preemptions": metrics.num_preemptions,
        }
        for name, value in found.items():
            if value is not None:
                self.histograms[name].observe(value)


class Joined:
    """Measurements of several services as those of one registry: each family once, with the samples of all."""

    def __init__(self, all_metrics: Iterable[Metrics]) -> None:
        self.registries = [each.registry for each in all_metrics]

    def collect(self) -> Iterable[Any]:
        """The families that Prometheus reads."""
        families: dict[str, Any] = {}
        for registry in self.registries:
            for family in registry.collect():
                if family.name in families:
                    families[family.name].samples += family.samples
                else:
                    families[family.name] = family
        return families.values()


def joined_text(all_metrics: Iterable[Metrics]) -> bytes:
    """All of it in Prometheus' format."""
    found: bytes = generate_latest(Joined(all_metrics))
    return found


class State:
    """What is so at the moment of a scrape, read from the engine."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Any]:
        """The families that Prometheus reads."""
        service = self.service
        yield from self.of_replicas()
        active = GaugeMetricFamily("labinfer:answers_active", "answers made or waited for", labels=LABELS)
        active.add_metric([service.name, "0"], service.admission.active)
        yield active
        refused = CounterMetricFamily("vllm:admission_rejections", "requests refused", labels=(*LABELS, "reason"))
        for reason, count in service.admission.refusals.items():
            refused.add_metric([service.name, "0", reason], count)
        yield refused
        if service.adapters:
            yield self.of_adapters()
        yield from plan_families(service.models, service.name)

    def of_adapters(self) -> GaugeMetricFamily:
        """Which adapters are in a step and which are waited for, in the labels, as routers of requests read them."""
        schedulers = [engine.scheduler for engine in self.service.engines]
        running = [sequence for each in schedulers for sequence in list(each.running)]
        waiting = [sequence for each in schedulers for _, _, sequence in list(each.waiting)]
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily("vllm:lora_requests_info", "adapters that requests use; when", labels=labels)
        most = str(self.service.model.plan.limits.max_loras)
        family.add_metric([most, *map(adapters_of, (running, waiting))], time.time())
        return family

    def of_replicas(self) -> Iterator[Any]:
        """What each engine does; its number is the label ``engine``."""
        families: dict[str, Any] = {}
        for number, replica in enumerate(self.service.replicas.all):
            engine = replica.engine
            scheduler, blocks, counters = engine.scheduler, engine.model.blocks, engine.model.blocks.counters
            gauges = {
                "vllm:num_requests_running": ("sequences in a step", len(scheduler.running)),
                "vllm:num_requests_waiting": ("sequences that wait", len(scheduler.waiting)),
                "vllm:kv_cache_usage_perc": ("part of the cache in use, 0 to 1", blocks.usage),
                "labinfer:step_seconds": ("the last step", engine.stats[-1].seconds if engine.stats else 0.0),
                "labinfer:replica_up": ("whether its stages run, 1 or 0", float(replica.alive)),
            }
            counts: dict[str, tuple[str, float]] = {
                "vllm:prefix_cache_queries": ("prompt tokens looked up", counters.queries),
                "vllm:prefix_cache_hits": ("prompt tokens found", counters.hits),
                "vllm:num_preemptions": ("sequences preempted", scheduler.num_preemptions),
            }
            if (moved := replica.moved) is not None:
                counts["labinfer:moved_blocks"] = "cache blocks that another engine has computed", moved.num_blocks
                counts["labinfer:moved_bytes"] = "bytes of these blocks", moved.num_bytes
                counts["labinfer:moving_seconds"] = "seconds that moving them took", moved.seconds
            for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counts)):
                for name, (text, value) in values.items():
                    family = families.setdefault(name, kind(name, text, labels=LABELS))
                    family.add_metric([self.service.name, str(number)], value)
            why = "vllm:num_requests_waiting_by_reason"
            family = families.setdefault(
                why, GaugeMetricFamily(why, "sequences that wait, by what for", labels=(*LABELS, "reason"))
            )
            family.add_metric([self.service.name, str(number), "capacity"], len(scheduler.waiting))
        yield from families.values()


def adapters_of(sequences: Iterable[Sequence]) -> str:
    """The names of the adapters that ``sequences`` use, with commas between them."""
    requests = [request for each in sequences if (request := each.owner()) is not None]
    return ",".join(sorted({each.lora.name for each in requests if each.lora is not None}))
