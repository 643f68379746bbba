"""A host as the head of a model sees it: a connection to its agent that outlives the stages which run there."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from labinfer.cluster.checkpoints import provide
from labinfer.cluster.control import ANSWER_SECONDS, END_SECONDS, Address, open_control
from labinfer.errors import LabinferError
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials


class Host:
    """The agent of host ``name`` at ``address``; ``owner`` names the model to it. Raises ``ChannelClosed``.

    What stages say, or is said of them, goes to ``tell``, of which nothing is said once ``alive`` is False.
    """

    def __init__(self, name: str, address: Address, credentials: Credentials, owner: str) -> None:
        self.name, self.address = name, address
        self.control = open_control(address, credentials)
        self.answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.tell: Callable[[dict[str, Any]], None] = lambda message: None
        self.alive, self.checkpoint = True, ""
        self.thread = threading.Thread(target=self.listen, name=f"labinfer-host-{name}", daemon=True)
        self.thread.start()
        try:
            self.ask(do="hello", owner=owner)  # which ends what is left of an earlier connection
        except BaseException:
            self.close()
            raise

    def listen(self) -> None:
        """Hear what it says until it is gone."""
        try:
            while True:
                message, _ = self.control.hear()
                if "run" in message:
                    self.tell(message)
                else:
                    self.answers.put(message)
        except ChannelClosed as error:
            self.alive = False
            self.answers.put(None)
            reason = f"is lost: {error}" if str(error) else "does not answer"
            self.tell({"died": f"host '{self.name}' {reason}"})

    def ask(self, payload: bytes | memoryview = b"", **message: Any) -> dict[str, Any]:
        """Send a message and wait for the answer; an error that it tells of is raised."""
        self.control.say(payload, **message)
        try:
            answer = self.answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            self.control.close()
            answer = None
        if answer is None:
            raise ChannelClosed(f"host '{self.name}' does not answer")
        if "error" in answer:
            raise LabinferError("cluster.agent", str(answer["error"]))
        return answer

    @property
    def round_trip(self) -> float | None:
        """Seconds that a beat took there and back, the quickest of late; None before one has."""
        return min(list(self.control.clock.samples), default=(None, 0.0))[0]

    def prepare(self, run: int, devices: Collection[str], checkpoint: Path) -> None:
        """Have what runs there rest, on ``devices`` with its weights, and let it have the checkpoint."""
        self.ask(do="rest", run=run, devices=list(devices))
        if not self.checkpoint:
            self.checkpoint = provide(self.ask, checkpoint)

    def close(self) -> None:
        """End the connection, and with it the stages."""
        self.control.close()
        self.thread.join(END_SECONDS)
        self.control.release()
