"""Answers as they are made, for asyncio: a thread runs the engine, coroutines wait for what it tells."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

from labinfer.errors import LabinferError
from labinfer.runtime.outputs import Deltas, RequestOutput, RequestOutputKind, output_of
from labinfer.runtime.request import Request, Sequence

if TYPE_CHECKING:
    from labinfer.runtime.engine import Engine


IDLE_SECONDS = 1.0
"""How long nothing is to be done before the cache's books are checked."""


class EngineThread:
    """Runs the steps of an engine whenever there is something to do, and checks the cache's books when there is not."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.wake, self.closing = engine, threading.Event(), False
        self.thread = threading.Thread(target=self.run, name="labinfer-engine", daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Step until closed. What a step raises ends every request, and the thread goes on."""
        while not self.closing:
            if not self.engine.busy:
                self.rest()
                continue
            try:
                self.engine.step()
            except LabinferError as error:
                self.engine.fail_all(error)
            except Exception as error:
                self.engine.fail_all(LabinferError("run.failed", f"{type(error).__name__}: {error}"))

    def rest(self) -> None:
        """Wait until there is something to do."""
        if not self.wake.wait(IDLE_SECONDS):
            with self.engine.model.lock:
                try:
                    self.engine.batch.blocks.check_integrity()
                except LabinferError as error:
                    self.engine.fault = error
            self.wake.wait()
        self.wake.clear()

    def close(self) -> None:
        """End the thread after the step it is in."""
        self.closing = True
        self.wake.set()
        if self.thread is not threading.current_thread():
            self.thread.join()


class Mailbox:
    """Wakes coroutines of one event loop from other threads; many of them at a time, since waking a loop is slow."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = weakref.ref(loop)  # which the mailboxes would else keep for ever
        self.events: deque[asyncio.Event] = deque()
        self.called = False

    def post(self, event: asyncio.Event) -> None:
        """Set ``event`` soon."""
        self.events.append(event)
        if not self.called:
            self.called, loop = True, self.loop()
            try:
                if loop is not None:
                    loop.call_soon_threadsafe(self.flush)
            except RuntimeError:  # the loop is closed, nobody waits any more
                self.events.clear()

    def flush(self) -> None:
        """Set all events; runs in the loop."""
        self.called = False
        while self.events:
            self.events.popleft().set()


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = weakref.WeakKeyDictionary()


def mailbox() -> Mailbox:
    """The mailbox of the running event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _mailboxes:
        _mailboxes[loop] = Mailbox(loop)
    return _mailboxes[loop]


async def stream(
    engine: Engine,
    request: Request,
    kind: RequestOutputKind,
    choose: Callable[[Request], Awaitable[Engine]] | None = None,
) -> AsyncIterator[RequestOutput]:
    """Run ``request``, which is new, and yield what it has made whenever there is more; see ``Engine.stream``.

    It runs on ``engine``, or on one like it that ``choose`` names once the request is known to be good.
    """
    await asyncio.to_thread(engine.check, request)  # a grammar takes a while
    engine = await choose(request) if choose else engine
    if request.num_made > request.params.n:
        kind = RequestOutputKind.FINAL_ONLY
    box, event, deltas = mailbox(), asyncio.Event(), Deltas(request)

    def listener(sequence: Sequence) -> None:
        if sequence.done or kind is not RequestOutputKind.FINAL_ONLY:
            box.post(event)

    def begin() -> None:
        try:
            engine.queue(request)
        except LabinferError as error:  # that of this request alone
            request.error = error
            box.post(event)

    request.listener, request.interactive = listener, kind is not RequestOutputKind.FINAL_ONLY
    engine.submit(begin)
    engine.start()
    engine.check_open()  # else nobody may ever begin
    try:
        finished = False
        while not finished:
            await event.wait()
            event.clear()
            if request.error is not None:
                raise request.error
            output = deltas.take() if kind is RequestOutputKind.DELTA else output_of(request)
            finished = output.finished
            if finished or (output.outputs and kind is not RequestOutputKind.FINAL_ONLY):
                yield output
    finally:
        if not request.finished:
            runs = request.moved_to or engine
            runs.submit(lambda: runs.abort(request))
            runs.start()
