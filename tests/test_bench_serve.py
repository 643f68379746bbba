"""``labinfer bench serve``: what it counts is what the service made, and what it cannot measure it says."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labinfer.bench.load import Sample, Target, arrivals, ask, keeps, percentile, target
from labinfer.bench.load_report import quantiles, rates

from .service import KEY, Served, served

Cli = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def api(tiny_model: Path) -> Iterator[Served]:
    with served(tiny_model) as running:
        yield running


def test_figures_are_those_of_the_service(api: Served, labinfer_cli: Cli, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{n} w6"}) + "\n" for n in range(5, 17)))
    result = labinfer_cli(
        "bench", "serve", "--base-url", api.url, "--api-key", KEY, "--dataset-path", prompts, "--num-prompts", 10,
        "--random-output-len", 7, "--max-concurrency", 3, "--request-rate", 500, "--goodput", "ttft:60000",
        "--metric-percentiles", "50,99.9", "--save-result", tmp_path / "found.json",
        "--save-report", tmp_path / "found.html", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert json.loads((tmp_path / "found.json").read_text()) == found
    text = (tmp_path / "found.html").read_text()
    page = ElementTree.fromstring(text[text.index("<body>") : text.index("</html>")])
    assert [cell.text for cell in page.iter("td")][2:4] == ["completed", "10.00"]
    assert [len((each.get("points") or "").split()) for each in page.iter("polyline")] == [103, 103, 103, 60]
    assert (found["completed"], found["failed"]) == (10, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 70)
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert 0 <= found[f"median_{name}_ms"] <= found[f"p99.9_{name}_ms"]
    assert found["median_ttft_ms"] > 0  # tokens that arrive together have no time between them
    assert found["median_ttft_ms"] <= found["median_e2el_ms"]


def test_failed_requests_are_counted(api: Served, labinfer_cli: Cli) -> None:
    result = labinfer_cli(
        "bench", "serve", "--base-url", api.url, "--api-key", KEY, "--num-prompts", 2, "--random-input-len", 4
    )
    assert result.returncode == 1
    assert "outside the vocabulary of 64" in result.stderr


@pytest.mark.parametrize("failed", [False, True])
def test_a_token_named_error_is_no_error(failed: bool) -> None:
    choice = {"text": "error", "logprobs": {"top_logprobs": [{"error": -0.1, "usage": -2.0}]}}
    chunk = {"choices": [choice], "usage": None}
    last: dict[str, Any] = {"error": {"message": "lost"}} if failed else {"usage": {"completion_tokens": 1}}
    events = "".join(f"data: {json.dumps(each, separators=(',', ':'))}\n\n" for each in (chunk, last))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(f"HTTP/1.1 200 OK\r\n\r\n{events}".encode())
        writer.close()

    async def asked() -> Sample:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            return await ask(Target("127.0.0.1", server.sockets[0].getsockname()[1], "/", {}), {})

    sample = asyncio.run(asked())
    assert sample.tokens == int(not failed)
    assert sample.error == ('{"message": "lost"}' if failed else None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base-url", "ftp://x"], "ftp://x"),
        (["--base-url", "http://[::1"], "http://[::1"),
        (["--base-url", "http://x:99999"], "http://x:99999"),
        (["--goodput", "speed:5"], "speed:5"),
        (["--goodput", "ttft:²"], "ttft:²"),
        (["--goodput", "ttft:nan"], "ttft:nan"),
        (["--metric-percentiles", "101"], "101"),
        (["--request-rate", "0"], "request-rate"),
        (["--dataset-path", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_options_are_usage_errors(labinfer_cli: Cli, home: Path, arguments: list[str], said: str) -> None:
    result = labinfer_cli("bench", "serve", *arguments)
    assert result.returncode == 2
    assert said in result.stderr


def test_a_service_that_is_not_there_is_said(labinfer_cli: Cli) -> None:
    result = labinfer_cli("bench", "serve", "--base-url", "http://127.0.0.1:9", "--api-key", KEY, "--num-prompts", 1)
    assert result.returncode == 1
    assert "bench.failed" in result.stderr


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"nonsense\r\n\r\n", "status : "),
        (b"x" * 100_000, "Separator"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\nlater", "status 503 Service Unavailable: later"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"text":"a"}\n\ndata: {"usage":{}}\n\n', "no token"),
    ],
)
def test_answers_of_something_else_fail(labinfer_cli: Cli, answer: bytes, said: str) -> None:
    def speak() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        speaker = threading.Thread(target=speak)
        speaker.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        result = labinfer_cli("bench", "serve", "--base-url", url, "--api-key", KEY, "--num-prompts", 1)
        speaker.join()
    assert result.returncode == 1
    assert "bench.failed" in result.stderr
    assert said in result.stderr


def test_an_ipv6_address_is_in_brackets() -> None:
    assert b"\r\nHost: [::1]:8000\r\n" in target("http://[::1]:8000", "/", None).request({})


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


def test_the_plots_are_of_all_answers() -> None:
    samples = [Sample(asked=10.0, times=[11.0, 12.0], tokens=2), Sample(asked=10.0, times=[13.0, 16.0], tokens=2)]
    assert quantiles([each.first for each in samples])[50] == (50, 2000)
    found = rates(samples)
    assert sum(rate for _, rate in found) * 6 / len(found) == pytest.approx(4)  # pieces within 6 s
    assert found[-1] == pytest.approx((5.95, 10))


def test_arrivals_keep_their_rate() -> None:
    times = list(arrivals(4000, 10.0, 3))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(400, rel=0.1)
    assert set(arrivals(5, float("inf"), 0)) == {0.0}


def test_good_requests_keep_all_bounds() -> None:
    sample = Sample(asked=0.0, times=[0.1, 0.2, 0.3], tokens=3)
    assert keeps(sample, {"ttft": 100, "tpot": 100.1, "e2el": 300})
    assert not keeps(sample, {"ttft": 100, "tpot": 99})
