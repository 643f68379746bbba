"""The agent of a host: ``python -m labinfer.cluster.agent``, started by ``labinfer cluster up``.

It listens on one port. A connection is a head's control connection, over which stages are started, or a channel of a
stage that starts here. Stages are children of the agent and end with the head's connection, or with the agent.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from labinfer.cluster.checkpoints import Store
from labinfer.cluster.control import CONTROL_PURPOSE, Control
from labinfer.cluster.session import Session
from labinfer.cluster.token import read_token
from labinfer.errors import LabinferError
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials, Distrusted, Keys, Tls
from labinfer.runtime.pipeline.transport.sealed import accept
from labinfer.runtime.pipeline.transport.tls import context_of

HEAD_SILENCE = 5.0
"""Seconds after which a head that says nothing is taken for lost."""

CLAIM_SECONDS = 10.0
"""How long a channel waits for the stage that it belongs to, and a stage for its channel."""

MAX_STRANGERS = 64
"""Connections whose other end has not shown that it knows the token."""


class Agent:
    """Serves heads on ``listener`` until closed."""

    def __init__(self, listener: socket.socket, credentials: Credentials) -> None:
        self.listener, self.credentials = listener, credentials
        self.store, self.started = Store(), time.time()
        self.strangers = threading.Semaphore(MAX_STRANGERS)
        self.channels: dict[bytes, tuple[socket.socket, Keys, float]] = {}  # that no stage has claimed yet
        self.arrived = threading.Condition()
        self.sessions: list[Session] = []

    def serve(self) -> None:
        """Accept connections; each is seen to by a thread, so that none keeps another waiting."""
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                connection, _ = self.listener.accept()
                if not self.strangers.acquire(blocking=False):
                    connection.close()
                    continue
                threading.Thread(target=self.greet, args=(connection,), daemon=True).start()

    def greet(self, connection: socket.socket) -> None:
        """Find out what a connection is for; one that does not know the token is closed."""
        try:
            purpose, keys = accept(connection, self.credentials)
        except ChannelClosed:
            connection.close()
            return
        finally:
            self.strangers.release()
        if purpose == CONTROL_PURPOSE:
            self.serve_head(connection, keys)
            return
        with self.arrived:
            self.channels[purpose] = connection, keys, time.monotonic()
            self.forget_old()
            self.arrived.notify_all()

    def serve_head(self, connection: socket.socket, keys: Keys) -> None:
        """Do what a head says until it is gone; one that has no certificate that is believed is refused."""
        try:
            control = Control(connection, keys, HEAD_SILENCE)
        except (ChannelClosed, LabinferError) as error:
            if not isinstance(error, ChannelClosed) or isinstance(error, Distrusted):
                print(f"refused a connection: {error}", file=sys.stderr, flush=True)
            connection.close()
            return
        session = Session(self, control)
        self.sessions.append(session)
        try:
            session.run()
        finally:
            self.sessions.remove(session)

    def claim(self, purpose: bytes) -> tuple[socket.socket, Keys]:
        """The channel that was connected for ``purpose``; waits for it."""
        with self.arrived:
            if not self.arrived.wait_for(lambda: purpose in self.channels, CLAIM_SECONDS):
                raise ChannelClosed("the stage before or behind it did not connect")
            connection, keys, _ = self.channels.pop(purpose)
            return connection, keys

    def forget_old(self) -> None:
        """Close channels that nobody claims."""
        now = time.monotonic()
        for purpose, (connection, _, arrived) in list(self.channels.items()):
            if now - arrived > CLAIM_SECONDS:
                connection.close()
                del self.channels[purpose]

    def report(self) -> dict[str, Any]:
        """What ``labinfer cluster status`` shows of this host."""
        from labinfer.runtime.devices import list_devices

        stages = [stage.report() for session in list(self.sessions) for stage in list(session.stages)]
        devices = [each.to_json() for each in list_devices() if each.available]
        return {"pid": os.getpid(), "started": self.started, "stages": stages, "devices": devices}

    def close(self) -> None:
        """End all stages."""
        self.listener.close()
        for session in list(self.sessions):
            session.close()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m labinfer.cluster.agent", description="The agent of a host.")
    parser.add_argument("--address", default="127.0.0.1:7700", help="where to listen; port 0 is any")
    parser.add_argument("--token-file", type=Path, required=True, help="the cluster's token")
    parser.add_argument("--tls", nargs=3, metavar=("CERTIFICATE", "KEY", "CA"), help="PEM files, to encrypt all")
    options = parser.parse_args()
    host, _, port = options.address.rpartition(":")
    try:
        tls = Tls(*options.tls) if options.tls else None
        if tls is not None:
            context_of(tls)
        credentials = Credentials(read_token(options.token_file), tls)
        listener = socket.create_server((host, int(port)), backlog=64)
    except (LabinferError, OSError) as error:
        sys.exit(str(error))
    agent = Agent(listener, credentials)
    signal.signal(signal.SIGTERM, lambda *_: agent.close())
    print(f"listening on {host}:{listener.getsockname()[1]}", flush=True)
    agent.serve()
    agent.close()


if __name__ == "__main__":
    main()
