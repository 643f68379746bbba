"""OpenTelemetry's spans of requests, read by a collector."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from .service import served, wait_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(HTTPServer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[Any] = []


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        self.server.spans += [
            span for each in sent.resource_spans for scope in each.scope_spans for span in scope.spans
        ]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def values(span: Any) -> dict[str, Any]:
    found = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_of_its_clients_trace_with_its_phases_inside(
    tiny_model: Path, collector: Collector, stream: bool
) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    with served(tiny_model, otlp_traces_endpoint=endpoint) as api:
        body = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": True, "stream": stream}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        before = time.time_ns()
        assert api.http.post("/v1/completions", json=body, headers=headers).status_code == 200
        after = time.time_ns()
        wait_for(lambda: len(collector.spans) >= 4)
    spans = {span.name: span for span in collector.spans}
    assert sorted(spans) == ["decode", "llm_request", "prefill", "queue"]
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    whole = spans.pop("llm_request")
    assert whole.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in spans.values()} == {whole.span_id}
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    ends = [whole.start_time_unix_nano, *(span.end_time_unix_nano for span in phases)]
    assert [span.start_time_unix_nano for span in phases] == ends[:-1]
    assert ends == sorted(ends)
    assert ends[-1] == whole.end_time_unix_nano
    slack = 10**8  # the wall clock may be set meanwhile, a little
    assert before - slack <= ends[0] <= ends[-1] <= after + slack
    found = values(whole)
    assert found["gen_ai.usage.prompt_tokens"] == 3
    assert found["gen_ai.usage.completion_tokens"] == 6
    assert found["gen_ai.request.id"] == "mine"
    assert found["gen_ai.response.model"] == "tiny"
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 <= found["gen_ai.latency.time_in_queue"] <= found["gen_ai.latency.time_to_first_token"]
    assert found["gen_ai.latency.time_to_first_token"] <= found["gen_ai.latency.e2e"]


def test_what_is_left_is_sent_at_the_end(tiny_model: Path, collector: Collector) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    with served(tiny_model, otlp_traces_endpoint=endpoint) as api:
        body = {"input": [[5, 6], [7]]}
        assert api.http.post("/v1/embeddings", json=body, headers={"traceparent": "nonsense"}).status_code == 200
    assert [span.name for span in collector.spans].count("llm_request") == 2
    assert all(not span.parent_span_id for span in collector.spans if span.name == "llm_request")


def test_a_collector_that_is_gone_costs_no_answer(tiny_model: Path) -> None:
    with served(tiny_model, otlp_traces_endpoint="http://127.0.0.1:9/v1/traces") as api:
        for _ in range(3):
            answer = api.http.post("/v1/completions", json={"prompt": [5], "max_tokens": 2})
            assert answer.status_code == 200
