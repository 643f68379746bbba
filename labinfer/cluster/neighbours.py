"""Hosts that the stages of a host send to: the two may be cut off from each other, but not from the head."""

from __future__ import annotations

import threading
from collections.abc import Callable

from labinfer.cluster.control import END_SECONDS, Address, open_control
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials


class Neighbour:
    """The host of ``name``, which is listened to until ``close``; once it is silent, ``lost`` is told why.

    Raises ``ChannelClosed`` where it cannot be reached at all.
    """

    def __init__(self, name: str, address: Address, credentials: Credentials, lost: Callable[[str], None]) -> None:
        self.name, self.lost, self.closed = name, lost, False
        self.control = open_control(address, credentials)
        self.thread = threading.Thread(target=self.listen, name="labinfer-neighbour", daemon=True)
        self.thread.start()

    def listen(self) -> None:
        """Hear its beats."""
        try:
            while True:
                self.control.hear()
        except ChannelClosed:
            if not self.closed:
                self.lost(f"a host cannot reach host '{self.name}' any more")

    def close(self) -> None:
        """End the connection and the thread."""
        self.closed = True
        self.control.close()
        if self.thread is not threading.current_thread():
            self.thread.join(END_SECONDS)
        self.control.release()
