"""The loop of one stage: receive a step, run it, pass it on; the last stage sends its tokens back to the first.

The batch comes ahead of the values, so that a stage prepares the step while others compute it. A value arrives straight
in its place in the stage's arena, where the device's memory can be written by the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labinfer.backends.sampling import NOT_A_NUMBER, RULE, Choices
from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError
from labinfer.runtime.cores import make_way, stay_on
from labinfer.runtime.interpreter import Tape
from labinfer.runtime.kv_cache import block_bytes
from labinfer.runtime.pipeline.crossing import CrossingValues
from labinfer.runtime.pipeline.message import (
    FAILED,
    FETCH,
    FILL,
    LOGITS,
    STEP,
    TOKENS,
    VALUES,
    StepMessage,
    decode,
    decode_block,
    decode_error,
    encode_error,
    max_words,
    view,
    views,
)
from labinfer.runtime.pipeline.transport import Channel, ChannelClosed, Header
from labinfer.runtime.pipeline.transport.arrivals import Arrivals
from labinfer.runtime.stage import LoadedStage

TAG_MASK = (1 << 31) - 1
"""Steps are named by their number modulo 2^31 where a token is pending."""


@dataclass(frozen=True, slots=True)
class Links:
    """The ends of channels that a stage has; tokens go back from the last stage to the first.

    Where several ranks run a stage, each receives all that it needs and the first sends to all ranks of the next.
    """

    inbound: Channel
    outbound: Sequence[Channel]
    tokens_in: Channel | None
    tokens_out: Sequence[Channel]

    def named(self) -> dict[str, Sequence[Channel]]:
        """Those that it has, by name."""
        tokens_in = [] if self.tokens_in is None else [self.tokens_in]
        return {
            "inbound": [self.inbound], "outbound": self.outbound, "tokens_in": tokens_in, "tokens_out": self.tokens_out
        }  # fmt: skip

    def all(self) -> list[Channel]:
        """Those that it has."""
        return [end for ends in self.named().values() for end in ends]


class StageLoop:
    """Runs stage ``number`` of ``plan``, which is loaded, for the steps that its links bring, on ``cores`` if any."""

    def __init__(self, plan: Plan, number: int, stage: LoadedStage, links: Links, cores: Sequence[int] = ()) -> None:
        self.cores = cores
        self.number, self.stage, self.links, self.limits = number // plan.ranks, stage, links, plan.limits
        self.values = CrossingValues(plan, self.number, stage)
        self.arrivals = Arrivals(links.tokens_in or links.inbound)
        self.last = self.number + 1 == len(plan.groups)
        self.onwards = links.tokens_out if self.last else links.outbound
        self.words = np.zeros(max_words(plan.limits), np.int32)
        self.block_bytes, self.content = block_bytes(plan), list[np.ndarray]()
        self.times = np.zeros((len(plan.groups), 2))
        self.chosen = np.zeros(plan.limits.max_logits_rows, np.int32)
        self.tokens: dict[int, np.ndarray] = {}  # of recent steps, by number modulo 2^31
        self.message: StepMessage | None = None
        self.tape: Tape | None = None
        self.header = Header(STEP, 0, ())
        self.outgoing: Sequence[memoryview] = ()  # the frame of what the step makes
        self.result: Sequence[memoryview] = ()  # that of its tokens, for the engine
        self.failure = bytearray()
        chooses = self.last and links.outbound
        rows, groups = plan.limits.max_chosen, len(plan.groups)
        self.sampler = stage.device.sampler(rows, plan.vocab_size, groups) if chooses else None

    def run(self) -> None:
        """Run steps until the channels are closed. What goes wrong in a step is told to whoever waits for it.

        Raises what went wrong with a block, after which nobody knows what the cache holds, or came and is no step.
        """
        stay_on(self.cores)
        try:
            while True:
                if self.take_frame() != STEP:
                    if (failure := caught(self.move_block)) is not None:
                        raise failure
                    continue
                unprepared = caught(self.prepare)
                lost = caught(self.take_values) if self.number else None  # they come whether they are wanted or not
                failure = unprepared or lost or caught(self.compute)
                if failure is not None:
                    self.send_failure(failure)
                make_way()  # the next stage may share the core, and nobody waits for what comes now
        except ChannelClosed:
            pass
        finally:
            self.stage.interpreter.leave()
            if self.sampler is not None:
                self.sampler.close()

    def take_frame(self) -> int:
        """Receive what comes next, and give its kind; the next stage has the batch of a step at once."""

        def place(header: Header) -> list[memoryview]:
            self.content = [np.empty(size, np.uint8) for size in header.sizes[1:]]
            return [view(self.words[: header.sizes[0] // 4]), *map(view, self.content)]

        self.header = self.links.inbound.receive(place)
        if self.header.kind == STEP and not self.last:
            self.send_on(STEP, [view(self.frame_words)])
        return self.header.kind

    @property
    def frame_words(self) -> np.ndarray:
        """The words of a step, or of a block, as they came."""
        return self.words[: self.header.sizes[0] // 4]

    def move_block(self) -> None:
        """Add what the stage has of a block that is fetched, or take its part of one that is filled, and pass it on."""
        kind, content, cache = self.header.kind, self.content, self.stage.cache
        frame = decode_block(self.frame_words, self.limits)
        sizes = [each[frame.group] for each in self.block_bytes]
        before, own = sizes[: self.number], np.empty(sizes[self.number], np.uint8)
        if kind not in (FETCH, FILL) or [*map(len, content)] != (before if kind == FETCH else sizes[self.number :]):
            raise LabinferError("pipeline.message", "a block arrived that is not of the plan's size")
        cache.copy_blocks(frame.copies.tolist())
        if kind == FILL:
            own, *content = content
            cache.write((frame.group, frame.block), own)
        else:
            cache.read((frame.group, frame.block), own)
            content = [*content, own]
        if kind == FETCH or not self.last:
            self.send_on(kind, views([self.frame_words, *content]))

    def prepare(self) -> None:
        """Get ready for the step, so that nothing is left to do but compute when its values, or tokens, come."""
        self.values.arriving = []
        message = self.message = decode(self.frame_words, self.limits)
        interpreter, batch = self.stage.interpreter, message.batch
        rows = len(batch.logits_rows)
        self.stage.cache.copy_blocks(message.copies.tolist())
        self.tape = interpreter.prepare(batch)
        self.values.bind(self.tape, len(batch.token_ids), rows)
        makes = [view(self.chosen[:rows])] if self.last else [view(self.times), *self.values.leaving]
        for channel in self.onwards:
            self.outgoing = channel.pack(TOKENS if self.last else VALUES, self.header.tag, makes)
        for channel in self.links.outbound if self.last else ():
            self.result = channel.pack(TOKENS, self.header.tag, [*makes, view(self.times)])
        if self.number:
            self.links.inbound.expect(VALUES, self.header.tag, [view(self.times), *self.values.arriving])
        if self.links.tokens_in is not None and len(message.pending):
            self.fill_in(message)
            interpreter.step_memory.load_token_ids(batch)

    def take_values(self) -> None:
        """Receive what the stages before have made, or raise what went wrong there."""
        self.arrivals.wait()
        if self.links.inbound.receive(self.sections).kind == FAILED:
            raise decode_error(self.failure)
        self.values.move_in()

    def sections(self, header: Header) -> list[memoryview]:
        """Where values go, or what went wrong."""
        if header.kind != FAILED:
            return [view(self.times), *self.values.arriving]
        self.failure = bytearray(header.sizes[0])
        return [memoryview(self.failure)]

    def fill_in(self, message: StepMessage) -> None:
        """Put the pending tokens in, which come from the last stage; waits for them."""
        token_ids, steps = message.batch.token_ids, message.pending[:, 1]
        sources = [(step, *message.pending[steps == step].T[[0, 2]]) for step in set(steps.tolist())]
        for step, places, rows in sources:
            while step not in self.tokens:
                self.arrivals.wait()
                self.take_tokens()
            made = self.tokens[step]
            if not len(made):
                raise LabinferError("pipeline.earlier-step", "the step that makes its tokens failed")
            token_ids[places] = np.maximum(made[rows], 0)

    def take_tokens(self) -> None:
        """Receive the tokens of one step, and forget those of old ones."""

        def place(header: Header) -> list[memoryview]:
            made = self.tokens[header.tag & TAG_MASK] = np.empty(header.sizes[0] // 4, np.int32)
            return [view(made)]

        assert self.links.tokens_in is not None
        self.links.tokens_in.receive(place)
        if len(self.tokens) > 256:
            del self.tokens[next(iter(self.tokens))]

    def compute(self) -> None:
        """Run the step, and send on what it made."""
        assert self.message is not None
        assert self.tape is not None
        batch = self.message.batch
        self.times[self.number, 0] = time.monotonic()
        rows = len(batch.logits_rows)
        self.stage.interpreter.compute(self.tape, len(batch.token_ids), rows)
        if self.links.outbound and self.last:
            self.choose(self.tape.values[self.stage.stage.outputs[-1]], rows, self.message.wants_logits)
        elif self.links.outbound:
            self.values.move_out()
            self.times[self.number, 1] = time.monotonic()
            self.send_outgoing()
        if self.links.tokens_in is not None:
            while self.links.tokens_in.ready():  # nobody may ever ask for them
                self.take_tokens()

    def choose(self, bound: Any, rows: int, wants_logits: bool) -> None:
        """Take the likeliest tokens, on the device where that can and nobody wants the logits, and send them.

        ``bound`` holds at least ``rows`` rows of logits; it is of few sizes, for each of which a sampler has a program.
        """
        tokens, logits = self.chosen[:rows], None
        if wants_logits or self.sampler is None:
            logits = np.ascontiguousarray(self.stage.device.host_array(bound[:rows]))
            if rows:
                tokens[:] = likeliest(logits)
        elif rows:
            nothing = np.zeros(0, np.int32)
            greedy = Choices(np.zeros(rows, RULE), None, nothing, nothing)
            tokens[:] = np.maximum(self.sampler.choose(bound, greedy)(), NOT_A_NUMBER)
        self.send_tokens(logits if wants_logits else None)

    def send_tokens(self, logits: np.ndarray | None) -> None:
        """Close the ring: the first stage may go on with the tokens; then tell the engine, which may want logits."""
        self.times[self.number, 1] = time.monotonic()
        self.send_outgoing()
        if logits is None:
            for channel in self.links.outbound:
                channel.write(self.result)
        else:
            self.send_on(LOGITS, views([self.chosen[: len(logits)], self.times, logits]))

    def send_outgoing(self) -> None:
        """Send what the step has made to whoever computes next."""
        for channel in self.onwards:
            channel.write(self.outgoing)

    def send_on(self, kind: int, sections: Sequence[memoryview]) -> None:
        """Send a frame to whoever is next: all ranks of the next stage, or the engine; only a first rank sends."""
        for channel in self.links.outbound:
            channel.send(kind, self.header.tag, sections)

    def send_failure(self, error: LabinferError) -> None:
        """Tell that the step failed, and send no tokens back."""
        for channel in self.links.tokens_out:
            channel.send(TOKENS, self.header.tag, [memoryview(b"")])
        self.send_on(FAILED, [memoryview(encode_error(error))])


def caught(part: Callable[[], None]) -> LabinferError | None:
    """What goes wrong in a part of the loop, but for a channel that was closed."""
    try:
        part()
    except ChannelClosed:
        raise
    except LabinferError as error:
        return error
    except BaseException as error:  # a listener may raise anything, and somebody waits
        return LabinferError("run.failed", f"{type(error).__name__}: {error}")
    return None


def likeliest(logits: np.ndarray) -> np.ndarray:
    """The first of the greatest logits of each row of [rows, vocab_size], int32; -1 where that is no finite number."""
    best: np.ndarray = logits.argmax(1).astype(np.int32)
    best[~np.isfinite(logits[np.arange(len(best)), best])] = -1
    return best
