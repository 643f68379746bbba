"""Requests to a service, as many as are wanted at the times that are wanted, and when each of their tokens came.

Reads answers as bytes, so that the one who measures takes little of the machine from the one who is measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from labinfer.errors import LabinferError, UsageError


@dataclass(frozen=True, slots=True)
class Target:
    """A service, one of its paths, and the headers that requests have."""

    host: str
    port: int
    path: str
    headers: dict[str, str]

    def request(self, body: dict[str, Any]) -> bytes:
        """A request as bytes."""
        data = json.dumps(body).encode()
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = {
            "Host": f"{host}:{self.port}", "Content-Type": "application/json", "Content-Length": str(len(data)),
            "Connection": "close", **self.headers,
        }  # fmt: skip
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        return f"POST {self.path} HTTP/1.1\r\n{lines}\r\n".encode() + data


@dataclass(slots=True)
class Sample:
    """One answer: when it was asked for, when its pieces came (``time.perf_counter``), its tokens, and what failed."""

    asked: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    error: str | None = None

    @property
    def first(self) -> float:
        """Seconds to the first token (TTFT)."""
        return self.times[0] - self.asked

    @property
    def total(self) -> float:
        """Seconds to the end."""
        return self.times[-1] - self.asked

    @property
    def per_token(self) -> float | None:
        """Mean seconds from token to token after the first (TPOT)."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds from piece to piece (ITL)."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def target(base_url: str, path: str, api_key: str | None) -> Target:
    """What requests go to."""
    try:
        parts = urlsplit(base_url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port or 80
    except ValueError:  # an IPv6 address without its end, or a port beyond 65535
        scheme, host, port = "", None, 0
    if scheme != "http" or not host:
        raise UsageError("bench.url", f"'{base_url}' is no URL such as http://127.0.0.1:8000")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return Target(host, port, path, headers)


async def ask(to: Target, body: dict[str, Any]) -> Sample:
    """One request and its answer."""
    sample = Sample(time.perf_counter())
    try:
        reader, writer = await asyncio.open_connection(to.host, to.port)
        try:
            writer.write(to.request(body))
            await read(reader, sample)
        finally:
            writer.close()
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        sample.error = str(error) or type(error).__name__
    return sample


async def read(reader: asyncio.StreamReader, sample: Sample) -> None:
    """Read an answer; pieces that come at once count as one. ``ValueError`` for one that is no stream of tokens."""
    head = await reader.readuntil(b"\r\n\r\n")
    _, _, status = head.partition(b"\r\n")[0].partition(b" ")
    if not status.startswith(b"200"):
        raise ValueError(f"status {status.decode('latin-1')}: {(await reader.read(300)).decode(errors='replace')}")
    held = b""
    while data := await reader.read(1 << 16):
        now = time.perf_counter()
        *lines, held = (held + data).split(b"\n\n")
        if any(b'"text":"' in line or b'"content":"' in line for line in lines):
            sample.times.append(now)
        for line in lines:
            if b'"error":' in line and "error" in (found := payload(line)):  # a token's text may be a key too
                raise ValueError(json.dumps(found["error"])[:300])
            if b'"usage":{' in line:
                usage = payload(line).get("usage", {})
                sample.tokens, sample.prompt_tokens = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
    if not sample.times or not sample.tokens:
        raise ValueError("the answer has no token")


def payload(line: bytes) -> dict[str, Any]:
    """What an event says."""
    found: dict[str, Any] = json.loads(line[line.index(b"{") :])
    return found


async def load(
    to: Target, bodies: Sequence[dict[str, Any]], rate: float, concurrency: int | None, seed: int = 0
) -> tuple[list[Sample], float]:
    """Ask for all ``bodies``, ``rate`` a second (a Poisson process; infinite: all at once) and at most ``concurrency``
    at a time. The samples and the seconds that it took.
    """
    gate = asyncio.Semaphore(concurrency or len(bodies))
    began = time.perf_counter()

    async def later(wait: float, body: dict[str, Any]) -> Sample:
        await asyncio.sleep(wait)
        async with gate:
            return await ask(to, body)

    asked = [later(wait, body) for wait, body in zip(arrivals(len(bodies), rate, seed), bodies, strict=True)]
    samples = await asyncio.gather(*asked)
    return list(samples), time.perf_counter() - began


def arrivals(count: int, rate: float, seed: int) -> Iterable[float]:
    """When each of ``count`` requests comes."""
    source, now = random.Random(seed), 0.0
    for _ in range(count):
        yield now
        now += source.expovariate(rate) if rate != float("inf") else 0.0


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that ``percent`` of ``values`` do not exceed, interpolated as numpy does."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)


def bounds_of(texts: Iterable[str]) -> dict[str, float]:
    """``ttft:500`` and the like as bounds in ms by name."""
    found = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not found[name] >= 0:
            raise UsageError("bench.goodput", f"'{text}' should be ttft:MS, tpot:MS or e2el:MS")
    return found


def keeps(sample: Sample, bounds: Mapping[str, float]) -> bool:
    """Whether an answer came within all ``bounds``."""
    measured = {"ttft": sample.first, "tpot": sample.per_token or 0.0, "e2el": sample.total}
    return all(1000 * measured[name] <= bound for name, bound in bounds.items())


def summary(
    samples: Sequence[Sample], seconds: float, percents: Sequence[float], bounds: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The figures, under the names of vLLM's result files, times in ms; good requests keep ``bounds``."""
    good = [each for each in samples if each.error is None]
    if not good:
        reason = samples[0].error if samples else "there was none"
        raise LabinferError("bench.failed", f"no request was answered: {reason}")
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(samples) - len(good),
        "total_input_tokens": sum(each.prompt_tokens for each in good),
        "total_output_tokens": sum(each.tokens for each in good),
        "request_throughput": len(good) / seconds,
        "output_throughput": sum(each.tokens for each in good) / seconds,
    }
    if bounds:
        found["request_goodput"] = sum(keeps(each, bounds) for each in good) / seconds
    measured = {
        "ttft": [each.first for each in good],
        "tpot": [value for each in good if (value := each.per_token) is not None],
        "itl": [gap for each in good for gap in each.gaps],
        "e2el": [each.total for each in good],
    }
    for name, values in measured.items():
        if values:
            found[f"mean_{name}_ms"] = 1000 * sum(values) / len(values)
            found[f"median_{name}_ms"] = 1000 * percentile(values, 50)
            found |= {f"p{percent:g}_{name}_ms": 1000 * percentile(values, percent) for percent in percents}
    return found
