"""Several engines of one model: a request goes where it ends soonest, which is where its beginning is cached."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from labinfer.runtime.block_digests import Salt, block_digests, root_digest
from labinfer.runtime.engine import Engine
from labinfer.runtime.lora import fingerprint
from labinfer.runtime.outputs import RequestOutput, RequestOutputKind
from labinfer.runtime.pipeline.engine import PipelinedEngine
from labinfer.runtime.request import Request
from labinfer.runtime.streaming import stream

RETRY_SECONDS = 10.0
"""After so long a replica that died, and could not be started anew, is tried with a request, which goes on elsewhere
if that fails again."""

ANSWER_TOKENS = 128
"""How long an answer is taken to become whose request does not say."""


@dataclass(slots=True)
class Sent:
    """A request that was sent somewhere: the digests of its blocks, and how many of its tokens were not cached."""

    request: weakref.ref[Request]
    digests: frozenset[bytes]
    uncached: int

    @property
    def ended(self) -> bool:
        """Whether nothing more is computed for it."""
        request = self.request()
        return request is None or request.finished or request.error is not None

    @property
    def unread(self) -> bool:
        """Whether its prompt is still to be computed, or a part of it."""
        request = self.request()
        return request is not None and request.metrics.first_token_time is None


@dataclass(slots=True, eq=False)
class Replica:
    """An engine, what it was sent and has not ended (``running``), how many requests that were, and when it was last
    sent one (``last``, a count of all), or tried after its death (``tried``, ``time.monotonic``).
    """

    engine: Engine
    running: list[Sent] = field(default_factory=list)
    num_sent: int = 0
    last: int = 0
    tried: float = -RETRY_SECONDS

    @property
    def alive(self) -> bool:
        """Whether its stages run, as far as is known."""
        pipeline = self.engine.model.pipeline
        return pipeline is None or pipeline.broken is None

    def worth_a_try(self, now: float) -> bool:
        """Whether it is dead, and is sent a request nevertheless, so that it starts its stages anew."""
        busy = isinstance(self.engine, PipelinedEngine) and self.engine.recovering
        return not self.alive and not busy and now - self.tried > RETRY_SECONDS

    def cached(self, request: Request, salt: Salt, digests: Sequence[bytes]) -> int:
        """Tokens at the beginning of ``request`` that it has in its cache, or is to compute for another request."""
        blocks, promised = self.engine.model.blocks, 0
        for sent in self.running:
            while promised < len(digests) and digests[promised] in sent.digests:
                promised += 1
        return max(blocks.match(request.prompt, salt), promised * blocks.block_size)


class Replicas:
    """``engines`` of one model, in the order of their numbers.

    ``choose`` says where a request should run. Where the stages of one die and others live, what it had to do goes on
    there at once, with the same tokens, and it starts its stages anew.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.all = [Replica(engine) for engine in engines]
        self.lock = threading.Lock()
        for replica in self.all:
            if isinstance(replica.engine, PipelinedEngine):
                replica.engine.elsewhere = partial(self.elsewhere, replica)

    def stream(
        self, request: Request, kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    ) -> AsyncIterator[RequestOutput]:
        """Run ``request`` where it is best; see ``Engine.stream``."""
        return stream(self.all[0].engine, request, kind, self.choose)

    def choose(self, request: Request) -> Engine:
        """Where ``request``, which is checked and about to be run, ends soonest; it counts as sent there."""
        if len(self.all) == 1:
            return self.all[0].engine
        salt, size = salt_of(request), self.all[0].engine.model.blocks.block_size
        digests = list(block_digests(root_digest(salt), request.prompt, size))
        with self.lock:
            now, number = time.monotonic(), 1 + sum(each.num_sent for each in self.all)
            for each in self.all:
                each.running = [sent for sent in each.running if not sent.ended]
            dead = next((each for each in self.all if each.worth_a_try(now)), None)
            candidates = [dead] if dead else [each for each in self.all if each.alive] or self.all
            cached = {each: each.cached(request, salt, digests) for each in candidates}
            costs = {each: self.seconds(each, request, len(request.prompt) - cached[each]) for each in candidates}
            best = min(candidates, key=lambda each: (costs[each], -cached[each], len(each.running), each.last))
            best.num_sent, best.last, best.tried = best.num_sent + 1, number, now
            best.running.append(Sent(weakref.ref(request), frozenset(digests), len(request.prompt) - cached[best]))
        return best.engine

    def seconds(self, replica: Replica, request: Request, uncached: int) -> float:
        """About how long ``request`` takes: prompts before it, its own, and steps with all that run there.

        0 before anything was measured. All count with the costs of the quickest, since they are alike, and what one
        has computed only once tells more of the kernels that were compiled meanwhile.
        """
        costs = [each.engine.costs for each in self.all]
        tokens = uncached + sum(sent.uncached for sent in replica.running if sent.unread)
        steps = [cost.decode_seconds(len(replica.running) + 1) for cost in costs]
        a_token = min((cost.prompt_seconds(1) for cost in costs if cost.prompt_seconds(1)), default=0.0)
        a_step = min((each for each in steps if each is not None), default=0.0)
        return tokens * a_token + min(request.params.max_tokens or ANSWER_TOKENS, ANSWER_TOKENS) * a_step

    def elsewhere(self, dead: Replica) -> PipelinedEngine | None:
        """The engine that takes over what ``dead`` had to do: of those that live, the one with the least."""
        with self.lock:
            others = [each for each in self.all if each is not dead and each.alive]
            best = min(others, key=lambda each: len(each.running), default=None)
            if best is None:
                return None
            best.running, dead.running = best.running + dead.running, []
            assert isinstance(best.engine, PipelinedEngine)
            return best.engine


def salt_of(request: Request) -> Salt:
    """What keeps the cached blocks of ``request`` apart from those of others, as its engine does."""
    adapter = () if request.lora is None else (fingerprint(request.lora.path),)
    return (request.cache_salt, *adapter) if request.cache_salt or adapter else ()
