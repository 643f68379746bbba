"""Several engines of one model: a request goes where it ends soonest, which is where its beginning is cached.

Some may only compute prompts for the others, so that no answer waits while a prompt is computed.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial

from labinfer.errors import LabinferError, UsageError
from labinfer.runtime.block_digests import Salt, block_digests, root_digest
from labinfer.runtime.cache import content_key
from labinfer.runtime.engine import Engine
from labinfer.runtime.lora import fingerprint
from labinfer.runtime.model import Model
from labinfer.runtime.moved_blocks import MovedBlocks, kind_of
from labinfer.runtime.outputs import RequestOutput, RequestOutputKind
from labinfer.runtime.pipeline.engine import PipelinedEngine
from labinfer.runtime.prompt_job import prompt_job, run_job
from labinfer.runtime.request import Request
from labinfer.runtime.streaming import stream

RETRY_SECONDS = 10.0
"""After so long a replica that died, and could not be started anew, is tried with a request, which goes on elsewhere
if that fails again."""

FOLLOW_UP = 0.25
"""The next question of a conversation: an engine that has so much of it cached that only this part is left of what
another would compute, or less, computes that itself."""

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

    It ``prefills``, that is, computes prompts only, or gets blocks from such engines (``moved``), or neither.
    """

    engine: Engine
    prefills: bool = False
    moved: MovedBlocks | None = None
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
    """``engines`` of one model, in the order of their numbers, of which the first ``num_prefill`` only compute prompts.

    ``choose`` says where a request should run. Where the stages of one die and others live, what it had to do goes on
    there at once, with the same tokens, and it starts its stages anew.
    """

    def __init__(self, engines: Sequence[Engine], num_prefill: int = 0) -> None:
        if num_prefill:
            check_movable([engine.model for engine in engines], num_prefill)
        self.all = [
            Replica(engine, number < num_prefill, MovedBlocks(engine.model) if number >= num_prefill > 0 else None)
            for number, engine in enumerate(engines)
        ]
        self.lock = threading.Lock()
        for replica in self.all:
            if isinstance(replica.engine, PipelinedEngine):
                replica.engine.elsewhere = partial(self.elsewhere, replica)

    async def stream(
        self, request: Request, kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    ) -> AsyncIterator[RequestOutput]:
        """Run ``request`` where it is best; see ``Engine.stream``."""
        async with AsyncExitStack() as moving:
            answer = stream(self.all[0].engine, request, kind, partial(self.place, moving))
            outputs = await moving.enter_async_context(aclosing(answer))  # type: ignore[type-var]
            async for output in outputs:
                yield output

    async def place(self, moving: AsyncExitStack, request: Request) -> Engine:
        """Where ``request`` is to be run; its prompt may be computed elsewhere, and its blocks be there by then.

        ``moving`` drops what is left of them.
        """
        engine = self.choose(request)
        [best] = [each for each in self.all if each.engine is engine]
        if best.moved is None or request.computes_all:
            return engine
        lacking = engine.model.blocks.lacking(request.prompt, salt_of(request))
        if lacking and (sources := self.sources(request, best)):
            job = prompt_job(request)
            source = self.send(job, sources).engine
            keys = await best.moved.reserve(lacking)
            moving.callback(best.moved.drop, keys)
            await run_job(job, source, best.moved, keys)
            if any(each.finish_reason == "abort" for each in job.sequences):
                raise LabinferError("run.aborted", "the engine that computed the prompt was told to stop all requests")
            request.metrics.first_scheduled_time = job.metrics.first_scheduled_time
            request.metrics.num_cached_tokens = job.metrics.num_cached_tokens
        return engine

    def sources(self, request: Request, target: Replica) -> list[Replica]:
        """Which replicas could compute the prompt of ``request`` for ``target``; none where that has most of it."""
        now, salt, length = time.monotonic(), salt_of(request), len(request.prompt)
        kind = kind_of(target.engine.model.plan)  # its stages may have been placed anew
        alike = [each for each in self.all if each.prefills and kind and kind_of(each.engine.model.plan) == kind]
        found = [each for each in alike if each.alive or each.worth_a_try(now)]
        cached = [each.engine.model.blocks.match(request.prompt, salt) for each in found]
        left = length - target.engine.model.blocks.match(request.prompt, salt)
        return found if left > FOLLOW_UP * (length - max(cached, default=length)) else []

    def choose(self, request: Request) -> Engine:
        """Where ``request``, which is checked and about to be run, ends soonest; it counts as sent there."""
        if len(self.all) == 1:
            return self.all[0].engine
        answering = [each for each in self.all if not each.prefills]
        return self.send(request, answering if any(each.alive for each in answering) else self.all).engine

    def send(self, request: Request, among: Sequence[Replica]) -> Replica:
        """Which of some replicas ends ``request`` soonest; it counts as sent there."""
        salt, size = salt_of(request), self.all[0].engine.model.blocks.block_size
        digests = list(block_digests(root_digest(salt), request.prompt, size))
        with self.lock:
            now, number = time.monotonic(), 1 + sum(each.num_sent for each in self.all)
            for each in self.all:
                each.running = [sent for sent in each.running if not sent.ended]
            dead = next((each for each in among if each.worth_a_try(now)), None)
            candidates = [dead] if dead else [each for each in among if each.alive] or among
            cached = {each: each.cached(request, salt, digests) for each in candidates}
            costs = {each: self.seconds(each, request, len(request.prompt) - cached[each]) for each in candidates}
            best = min(candidates, key=lambda each: (costs[each], -cached[each], len(each.running), each.last))
            best.num_sent, best.last, best.tried = best.num_sent + 1, number, now
            best.running.append(Sent(weakref.ref(request), frozenset(digests), len(request.prompt) - cached[best]))
        return best

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
        """The engine that takes over what ``dead`` had to do: of those that live the one with the least, where it can
        one that does the same."""
        with self.lock:
            others = [each for each in self.all if each is not dead and each.alive]
            best = min(others, key=lambda each: (each.prefills is not dead.prefills, len(each.running)), default=None)
            if best is None:
                return None
            best.running, dead.running = best.running + dead.running, []
            assert isinstance(best.engine, PipelinedEngine)
            return best.engine


def salt_of(request: Request) -> Salt:
    """What keeps the cached blocks of ``request`` apart from those of others, as its engine does."""
    adapter = () if request.lora is None else (fingerprint(request.lora.path),)
    return (request.cache_salt, *adapter) if request.cache_salt or adapter else ()


def check_movable(models: Sequence[Model], num_prefill: int) -> None:
    """Raise ``UsageError`` unless some of ``models``, besides those that prefill, can take over cache blocks of all."""
    if not 0 < num_prefill < len(models):
        message = f"{num_prefill} of {len(models)} replicas cannot compute prompts for the others"
        raise UsageError("replicas.prefill", message, remedy="leave at least one that answers")
    for model in models:
        plan, first = model.plan, models[0].plan
        if plan.ranks > 1:
            raise UsageError("replicas.prefill", "cache blocks of several ranks cannot be moved between replicas")
        if not model.blocks.caching:
            remedy = "leave the prefix cache on"
            raise UsageError("replicas.prefill", "blocks that are moved become part of the prefix cache", remedy=remedy)
        if not kind_of(plan) or kind_of(plan) != kind_of(first) or content_key(plan, ()) != content_key(first, ()):
            message = "cache blocks cannot be moved between replicas of different models, limits or kinds of devices"
            raise UsageError("replicas.prefill", message, remedy="give all the same options, and devices of one kind")
