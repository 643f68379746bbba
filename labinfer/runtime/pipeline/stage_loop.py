"""The loop of one stage: receive a step, run it, pass it on; the last stage sends its tokens back to the first.

A value arrives straight in its place in the stage's arena, where the device's memory can be written by the host.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError
from labinfer.ops.base import dim
from labinfer.runtime.cores import stay_on
from labinfer.runtime.interpreter import Tape
from labinfer.runtime.pipeline.message import (
    FAILED,
    LOGITS,
    STEP,
    TOKENS,
    StepMessage,
    crossing,
    decode,
    encode_error,
    max_words,
    view,
    views,
)
from labinfer.runtime.pipeline.transport import Channel, ChannelClosed, Header
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
        arriving = [*crossing(plan), []]
        self.arriving, self.leaving = arriving[self.number], arriving[self.number + 1]
        self.last = self.number + 1 == len(plan.groups)
        self.words = np.zeros(max_words(plan.limits), np.int32)
        self.times = np.zeros((len(plan.groups), 2))
        self.tokens: dict[int, np.ndarray] = {}  # of recent steps, by number modulo 2^31
        self.message: StepMessage | None = None
        self.tape: Tape | None = None
        self.header = Header(STEP, 0, ())
        self.passing: dict[str, np.ndarray] = {}  # values that later stages need as they arrived
        self.failure = b""

    def run(self) -> None:
        """Run steps until the channels are closed. What goes wrong in a step is told to whoever waits for it."""
        stay_on(self.cores)
        try:
            while True:
                self.tape, self.header = None, Header(STEP, 0, ())
                try:
                    self.links.inbound.receive(self.sections)
                    self.pass_on()
                except LabinferError as error:
                    self.fail(error)
                except ChannelClosed:
                    raise
                except BaseException as error:  # a listener may raise anything, and somebody waits
                    self.fail(LabinferError("run.failed", f"{type(error).__name__}: {error}"))
        except ChannelClosed:
            pass
        finally:
            self.stage.interpreter.leave()

    def sections(self, header: Header) -> Iterator[memoryview]:
        """Where a frame goes; prepares the step as soon as its batch is there."""
        self.header = header
        if header.kind == FAILED:
            text = bytearray(header.sizes[0])
            yield memoryview(text)
            self.failure = bytes(text)
            return
        words = self.words[: header.sizes[0] // 4]
        yield view(words)
        yield view(self.times)
        message = self.message = decode(words, self.limits)
        if self.links.tokens_in is not None and len(message.pending):
            self.fill_in(message)
        self.times[self.number, 0] = time.monotonic()
        self.stage.cache.copy_blocks(message.copies.tolist())
        tape = self.tape = self.stage.interpreter.prepare(message.batch)
        yield from self.values(tape, header)

    def values(self, tape: Tape, header: Header) -> Iterator[memoryview]:
        """Where the values go: into the arena, or into host memory where that cannot be or others want them too."""
        slots = self.stage.interpreter.slots
        for name, size in zip(self.arriving, header.sizes[2:], strict=True):
            place = self.rows(tape.values[name], name) if name in slots else None
            if name not in self.leaving and isinstance(place, np.ndarray) and place.flags.c_contiguous:
                yield view(place)
                continue
            held = self.passing[name] = np.empty(size, np.uint8)
            yield view(held)
            if place is not None:
                self.stage.device.move_in(held.view(place.dtype).reshape(place.shape), place)

    def rows(self, array: Any, name: str) -> Any:
        """As much of a value's array as the step has."""
        assert self.message is not None
        batch = self.message.batch
        first = self.stage.interpreter.slots[name].type.shape[0]
        return array[: dim(first, len(batch.token_ids), len(batch.logits_rows))]

    def fill_in(self, message: StepMessage) -> None:
        """Put the pending tokens in, which come from the last stage; waits for them."""
        assert self.links.tokens_in is not None
        for step in np.unique(message.pending[:, 1]).tolist():
            while step not in self.tokens:
                self.take_tokens()
            mine = message.pending[message.pending[:, 1] == step]
            made = self.tokens[step]
            if not len(made):
                raise LabinferError("pipeline.earlier-step", "the step that makes its tokens failed")
            message.batch.token_ids[mine[:, 0]] = np.maximum(made[mine[:, 2]], 0)

    def take_tokens(self) -> None:
        """Receive the tokens of one step, and forget those of old ones."""

        def place(header: Header) -> Iterator[memoryview]:
            made = self.tokens[header.tag & TAG_MASK] = np.empty(header.sizes[0] // 4, np.int32)
            yield view(made)

        assert self.links.tokens_in is not None
        self.links.tokens_in.receive(place)
        if len(self.tokens) > 256:
            del self.tokens[next(iter(self.tokens))]

    def pass_on(self) -> None:
        """Run the step that has arrived, and send on what it made."""
        if self.header.kind == FAILED:
            self.send_failure(self.failure)
            return
        assert self.message is not None
        assert self.tape is not None
        batch = self.message.batch
        made = self.stage.interpreter.execute(self.tape, len(batch.token_ids), len(batch.logits_rows))
        if self.links.outbound:
            self.send(made)
        if self.links.tokens_in is not None:
            while self.links.tokens_in.ready():  # nobody may ever ask for them
                self.take_tokens()

    def send(self, made: Mapping[str, Any]) -> None:
        """Send what the step has made to the next stage, or its tokens to where they go."""
        assert self.message is not None
        batch = self.message.batch
        host = {name: self.on_host(made[name]) for name in made if name in self.leaving or self.last}
        if not self.last:
            self.times[self.number, 1] = time.monotonic()
            values = [host[name] if name in host else self.passing.pop(name) for name in self.leaving]
            words = self.words[: self.header.sizes[0] // 4]
            self.send_on(STEP, views([words, self.times, *values]))
        else:
            logits = host[self.stage.stage.outputs[-1]]
            tokens = likeliest(logits) if len(batch.logits_rows) else np.zeros(0, np.int32)
            self.times[self.number, 1] = time.monotonic()
            self.send_tokens(tokens)
            found = [tokens, self.times] + ([logits] if self.message.wants_logits else [])
            self.send_on(LOGITS if self.message.wants_logits else TOKENS, views(found))

    def send_on(self, kind: int, sections: Sequence[memoryview]) -> None:
        """Send a frame to whoever is next: all ranks of the next stage, or the engine; only a first rank sends."""
        for channel in self.links.outbound:
            channel.send(kind, self.header.tag, sections)

    def on_host(self, array: Any) -> np.ndarray:
        """A value as the host can read it, without gaps: in place where it can."""
        return np.ascontiguousarray(self.stage.device.host_array(array))

    def send_tokens(self, tokens: np.ndarray) -> None:
        """Close the ring: the first stage may go on with these."""
        for channel in self.links.tokens_out:
            channel.send(TOKENS, self.header.tag, views([tokens]))

    def fail(self, error: LabinferError) -> None:
        """Tell that the step failed; without a step that has begun to arrive, the channel is of no use any more."""
        if not self.header.sizes:
            raise ChannelClosed
        self.passing.clear()
        self.send_failure(encode_error(error))

    def send_failure(self, text: bytes) -> None:
        """Send a failure on, and no tokens back."""
        if self.last:
            self.send_tokens(np.zeros(0, np.int32))
        self.send_on(FAILED, [memoryview(text)])


def likeliest(logits: np.ndarray) -> np.ndarray:
    """The first of the greatest logits of each row of [rows, vocab_size], int32; -1 where that is no finite number."""
    best: np.ndarray = logits.argmax(1).astype(np.int32)
    best[~np.isfinite(logits[np.arange(len(best)), best])] = -1
    return best
