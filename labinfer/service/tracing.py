"""Requests as OpenTelemetry's spans, sent to a collector: one for each, with its queue, prefill and decode inside."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from labinfer.extras import missing
from labinfer.runtime.request import Request

SECONDS = 2
"""How long to wait for a collector, which is tried again meanwhile."""


class Tracing:
    """Sends the spans of ended requests to ``endpoint``, OTLP over HTTP, from a thread of its own.

    Attributes have the names of vLLM and of OpenTelemetry's conventions for models. A collector that is slow or gone
    costs spans, never time of a request. ``LabinferError`` without the extra ``otel``.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise missing("opentelemetry") from None
        self.model = model
        self.provider = TracerProvider(resource=Resource.create({"service.name": "labinfer"}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=SECONDS)
        self.provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self.tracer: Any = self.provider.get_tracer("labinfer")

    def ended(self, request: Request, reason: str, request_id: str, headers: Mapping[str, str]) -> None:
        """Tell of a request that has ended, as part of the trace that a W3C ``traceparent`` among ``headers`` names."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        metrics, wall = request.metrics, time.time_ns() - time.perf_counter_ns()
        end = time.perf_counter() if metrics.finished_time is None else metrics.finished_time
        outer = TraceContextTextMapPropagator().extract(headers)
        span = self.tracer.start_span(
            "llm_request", outer, SpanKind.SERVER, self.attributes(request, reason, request_id, end),
            start_time=wall + nanoseconds(metrics.arrival_time),
        )  # fmt: skip
        if reason == "error":
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span)
        times = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, end]
        for name, begun, done in zip(("queue", "prefill", "decode"), times, times[1:], strict=False):
            if begun is not None:
                part = self.tracer.start_span(name, inside, start_time=wall + nanoseconds(begun))
                part.end(wall + nanoseconds(end if done is None else done))
        span.end(wall + nanoseconds(end))

    def attributes(self, request: Request, reason: str, request_id: str, end: float) -> dict[str, Any]:
        """What a span tells of its request."""
        metrics, params = request.metrics, request.params
        found = {
            "gen_ai.response.model": self.model,
            "gen_ai.response.finish_reasons": (reason,),
            "gen_ai.request.id": request_id,
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": len(request.prompt),
            "gen_ai.usage.completion_tokens": metrics.num_generation_tokens,
            "gen_ai.latency.time_in_queue": metrics.queue_seconds,
            "gen_ai.latency.time_to_first_token": metrics.first_token_seconds,
            "gen_ai.latency.e2e": end - metrics.arrival_time,
        }
        return {name: value for name, value in found.items() if value is not None}

    def close(self) -> None:
        """Send what is left, if the collector takes it soon."""
        self.provider.shutdown()


def nanoseconds(seconds: float) -> int:
    """A time of ``time.perf_counter`` in the unit of spans."""
    return int(seconds * 1e9)
