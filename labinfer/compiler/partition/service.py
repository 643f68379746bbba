"""Replicas that compute prompts and make answers, or some that compute prompts for the others: which serve better?

A simulation of the service, step by step: steps take what was predicted, and where answers are made no prompt may
lengthen a step by more than the scheduler lets it.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from itertools import count
from math import ceil
from statistics import fmean, median

MOST_REPLICAS = 16

MOST_REQUESTS, MOST_TOKENS = 64, 200_000
"""Requests that are simulated, but for fewer whose answers have more tokens together."""

MOST_WORK = 1_000_000
"""Tokens of all simulations; of longer requests a part is simulated, which come as much sooner after one another."""

STALL, SHORT, SHORT_STALL = 0.2, 512, 1.0
"""Those of the scheduler's policy: how much longer a step may get for a prompt, and for one of so few tokens."""


def stall_of(prompt: int) -> float:
    """By what part a step may last longer for a prompt of so many tokens, while answers are made."""
    return SHORT_STALL if prompt <= SHORT else STALL


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """What an engine takes, in seconds.

    ``decode[n]`` is a decode step of n + 1 sequences, more of which do not run; ``token`` a token of a prompt among
    many, of which a step has ``max_tokens``. While answers are made, each prompt may lengthen a step by the part
    ``stall``. ``move`` are the seconds in which the blocks of a prompt go to another engine, which computes its last
    ``rest`` tokens.
    """

    decode: tuple[float, ...]
    token: float
    max_tokens: int
    stall: float
    move: float
    rest: float


@dataclass(frozen=True, slots=True)
class Load:
    """``rate`` requests a second that come evenly, with so many tokens of a prompt and of its answer."""

    prompt: float
    output: int
    rate: float


@dataclass(frozen=True, slots=True)
class Served:
    """How ``replicas`` serve of which ``prefill`` only compute prompts, in seconds.

    ``request`` is a whole request (the mean), ``first`` its first token, ``longest`` the longest wait between two
    tokens of an answer and ``wait`` the usual one (medians).
    """

    replicas: int
    prefill: int
    request: float
    first: float
    longest: float
    wait: float


@dataclass(slots=True, eq=False)
class _Request:
    """Tokens of the prompt that are left, of the answer that were made; times of arrival and of tokens."""

    arrival: float
    left: float
    made: int = 0
    first: float = 0.0
    last: float = 0.0
    longest: float = 0.0


@dataclass(slots=True, eq=False)
class _Engine:
    """``prompts`` and ``answers`` that it has, and whether a step runs, with so many tokens of each prompt."""

    times: EngineTimes
    prefills: bool
    prompts: list[_Request] = field(default_factory=list)
    answers: list[_Request] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)
    runs: bool = False

    def begin(self) -> float:
        """Begin a step; its seconds."""
        times, running = self.times, len(self.answers)
        base = times.decode[running - 1] if running else 0.0
        prompts, room = self.prompts[: len(times.decode) - running], max(0, times.max_tokens - running)
        if running and prompts:
            room = min(room, max(1, int(times.stall * len(prompts) * base / times.token)))
        self.chunks, self.runs = [], True
        for each in prompts:
            self.chunks.append(min(each.left, room - sum(self.chunks)))
        return base + times.token * sum(self.chunks)

    def end(self, now: float, output: int) -> list[_Request]:
        """End the step: the requests whose prompts it has computed; those whose answers are whole leave."""
        self.runs = False
        for each in self.answers:
            each.made, each.longest, each.last = each.made + 1, max(each.longest, now - each.last), now
        for each, chunk in zip(self.prompts, self.chunks, strict=False):
            each.left -= chunk
        computed = [each for each in self.prompts if not each.left]
        self.prompts = [each for each in self.prompts if each.left]
        if not self.prefills:
            for each in computed:
                each.made, each.first, each.last = 1, now, now
            self.answers += computed
        self.answers = [each for each in self.answers if each.made < output]
        return computed


def serve(times: EngineTimes, load: Load, replicas: int, prefill: int) -> Served:
    """Serve some requests of ``load`` with so many alike replicas, of which ``prefill`` only compute prompts."""
    longer = max(1.0, 2 * replicas**2 * (load.prompt + load.output) / MOST_WORK)
    load = Load(load.prompt / longer, ceil(load.output / longer), load.rate * longer)
    times = replace(times, move=times.move / longer, rest=times.rest / longer)
    engines = [_Engine(times, number < prefill) for number in range(replicas)]
    answering, computing = engines[prefill:], engines[:prefill] or engines
    most = MOST_REQUESTS if longer == 1 else 0
    number_of = max(2 * replicas, min(most, MOST_TOKENS // (load.output * replicas)))
    requests = [_Request(number / load.rate, load.prompt) for number in range(number_of)]
    order = count()
    events: list[tuple[float, int, _Engine | None, _Request | None]] = [
        (each.arrival, next(order), None, each) for each in requests
    ]  # what happens: a request comes, to an engine if one is named, or, without one, the step of an engine ends

    def push(when: float, engine: _Engine | None, request: _Request | None) -> None:
        heapq.heappush(events, (when, next(order), engine, request))

    while events:
        now, _, engine, request = heapq.heappop(events)
        if request is None:
            assert engine is not None
            for each in engine.end(now, load.output):
                if engine.prefills:
                    each.left = times.rest
                    push(now + times.move, min(answering, key=_busy), each)
        else:
            engine = engine or min(computing, key=_busy)
            engine.prompts.append(request)
        if not engine.runs and (engine.prompts or engine.answers):
            push(now + engine.begin(), engine, None)
    made = [each for each in requests if each.made > 1]
    waits = [(each.last - each.first) / (each.made - 1) for each in made] or [0.0]
    return Served(
        replicas,
        prefill,
        fmean(each.last - each.arrival for each in requests) * longer,
        median(each.first - each.arrival for each in requests) * longer,
        median(each.longest for each in requests),
        median(waits),
    )


def _busy(engine: _Engine) -> int:
    return len(engine.prompts) + len(engine.answers)


def ways_to_serve(times: EngineTimes, load: Load, replicas: int) -> list[Served]:
    """All ways in which so many replicas can divide the work, the one with the shortest requests first."""
    found = [serve(times, load, replicas, prefill) for prefill in range(replicas)]
    return sorted(found, key=lambda each: (each.request, each.prefill))
