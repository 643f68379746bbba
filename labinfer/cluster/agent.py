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
from labinfer.cluster.control import CONTROL_PURPOSE, END_SECONDS, Address, Control
from labinfer.cluster.neighbours import Neighbour
from labinfer.cluster.token import read_token
from labinfer.errors import LabinferError
from labinfer.runtime.pipeline.process import BEAT, StageProcess, stopped
from labinfer.runtime.pipeline.transport import ChannelClosed, Keys
from labinfer.runtime.pipeline.transport.sealed import accept, connect

HEAD_SILENCE = 5.0
"""Seconds after which a head that says nothing is taken for lost."""

CLAIM_SECONDS = 10.0
"""How long a channel waits for the stage that it belongs to, and a stage for its channel."""

MAX_STRANGERS = 64
"""Connections whose other end has not shown that it knows the token."""


class Agent:
    """Serves heads on ``listener`` until closed."""

    def __init__(self, listener: socket.socket, token: bytes) -> None:
        self.listener, self.token = listener, token
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
            purpose, keys = accept(connection, self.token)
        except ChannelClosed:
            connection.close()
            return
        finally:
            self.strangers.release()
        if purpose == CONTROL_PURPOSE:
            session = Session(self, Control(connection, keys, HEAD_SILENCE))
            self.sessions.append(session)
            try:
                session.run()
            finally:
                self.sessions.remove(session)
            return
        with self.arrived:
            self.channels[purpose] = connection, keys, time.monotonic()
            self.forget_old()
            self.arrived.notify_all()

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


class HostedStage:
    """A stage that runs here for a head, and the thread that passes on what it says."""

    def __init__(self, session: Session, number: int, process: StageProcess) -> None:
        self.session, self.number, self.process = session, number, process
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self) -> None:
        """Pass on what it says, and how it ended."""
        with contextlib.suppress(ChannelClosed):
            while (lines := self.process.read()) is not None:
                for line in lines:
                    if "beat" not in line:
                        self.session.control.say(stage=self.number, **line)
                    self.process.ready |= "ready" in line
            self.session.control.say(stage=self.number, died=f"{self.process.name} died: {self.process.cause()}")

    def report(self) -> dict[str, Any]:
        """What it is and whether it runs."""
        state = "loading" if not self.process.ready else "running" if self.process.missed < 4 else "silent"
        return {"stage": self.process.name, "pid": self.process.process.pid, "state": state}


class Session:
    """What an agent does for one head."""

    def __init__(self, agent: Agent, control: Control) -> None:
        self.agent, self.control, self.owner = agent, control, ""
        self.stages: list[HostedStage] = []
        self.neighbours: list[Neighbour] = []
        self.closing = threading.Lock()
        self.closed = False
        self.watching = threading.Thread(target=self.watch, daemon=True)
        self.watching.start()

    def run(self) -> None:
        """Do what the head says until it is gone; then end its stages."""
        try:
            while True:
                message, payload = self.control.hear()
                self.do(message, payload)
        except ChannelClosed:
            pass
        finally:
            self.close()
            self.watching.join(END_SECONDS)
            self.control.release()

    def do(self, message: dict[str, Any], payload: bytes) -> None:
        """One thing that the head says. What it says wrongly is told to it, and nothing else happens."""
        try:
            match message.get("do"):
                case "hello":
                    self.take_over(str(message["owner"]))
                    self.control.say(**self.agent.report() if message.get("report") else {})
                case "checkpoint":
                    self.control.say(**self.agent.store.find(message))
                case "piece":
                    self.control.say(**self.agent.store.add(message, payload))
                case "start":
                    threading.Thread(target=self.start, args=(message,), daemon=True).start()
                case "shutdown":
                    self.control.say()
                    os.kill(os.getpid(), signal.SIGTERM)
                case unknown:
                    self.control.say(error=f"this agent cannot do {unknown!r:.60}")
        except (LookupError, TypeError, ValueError, OSError, LabinferError) as error:
            self.control.say(error=f"{type(error).__name__}: {error}")

    def take_over(self, owner: str) -> None:
        """End what an earlier connection of the same head has left, so that its memory is free.

        Whoever only asks has no name, nor has a head that has not said its own yet: nobody takes over from those.
        """
        self.owner = owner
        for session in list(self.agent.sessions):
            if owner and session is not self and session.owner == owner:
                session.close()

    def start(self, message: dict[str, Any]) -> None:
        """Wire and start a stage; whatever keeps it from starting is told as its death."""
        number, links, sockets = message["stage"], {}, []
        try:
            # What it connects comes first: others wait for that, as it may wait for them.
            for name, link in sorted(message["links"].items(), key=lambda each: "address" not in each[1]):
                purpose = link["channel"].encode()
                connection, keys = self.connect(link.get("address"), purpose)
                sockets.append(connection)
                links[name] = [
                    {"transport": "tcp", "descriptors": [connection.fileno()], "keys": [key.hex() for key in keys]}
                ]
            start = {**message["start"], "stage": number, "links": links}
            with self.closing:
                if not self.closed:
                    process = StageProcess(message["name"], start, [each.fileno() for each in sockets])
                    self.stages.append(HostedStage(self, number, process))
        except Exception as error:  # whatever it is, the head must not wait for a stage that will never come
            self.say_died(f"{message.get('name')} could not be wired: {error}")
        finally:
            for each in sockets:
                each.close()

    def connect(self, address: list[Any] | None, purpose: bytes) -> tuple[socket.socket, Keys]:
        """The channel ``purpose``: connected to the agent at ``address``, or by it."""
        if address is None:
            connection, keys = self.agent.claim(purpose)
        else:
            target: Address = str(address[0]), int(address[1])
            connection, keys = connect(target, self.agent.token, purpose)
            self.listen_to(target)
        notice_cuts(connection)
        return connection, keys

    def listen_to(self, address: Address) -> None:
        """Tell the head once another host, to which a stage sends from here, is silent."""
        neighbour = Neighbour(address, self.agent.token, self.say_died)
        with self.closing:
            if not self.closed:
                self.neighbours.append(neighbour)
                return
        neighbour.close()

    def say_died(self, reason: str) -> None:
        """Tell the head that the stages cannot go on, and why."""
        with contextlib.suppress(ChannelClosed):
            self.control.say(died=reason)

    def watch(self) -> None:
        """Tell the head of stages that are stopped, or stuck once they are loaded."""
        with contextlib.suppress(ChannelClosed):
            while not self.closed:
                time.sleep(BEAT)
                for stage in list(self.stages):
                    reason, pid = stage.process.silent(), stage.process.process.pid
                    if reason is not None and (stage.process.ready or stopped(pid)):
                        self.control.say(stage=stage.number, died=f"{stage.process.name} died: {reason}")
                        stage.process.process.kill()

    def close(self) -> None:
        """End the stages and the connection; returns when they have ended."""
        with self.closing:
            self.closed = True
            self.control.close()
            for neighbour in self.neighbours:
                neighbour.close()
            for stage in self.stages:
                stage.process.process.kill()  # it has nothing to lose, and others wait for its memory
                stage.thread.join(END_SECONDS)
                stage.process.close()
            self.stages.clear()
            self.neighbours.clear()


def notice_cuts(connection: socket.socket) -> None:
    """Have the system close a connection whose other host cannot be reached for about three seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m labinfer.cluster.agent", description="The agent of a host.")
    parser.add_argument("--address", default="127.0.0.1:7700", help="where to listen; port 0 is any")
    parser.add_argument("--token-file", type=Path, required=True, help="the cluster's token")
    options = parser.parse_args()
    host, _, port = options.address.rpartition(":")
    try:
        token = read_token(options.token_file)
        listener = socket.create_server((host, int(port)), backlog=64)
    except (LabinferError, OSError) as error:
        sys.exit(str(error))
    agent = Agent(listener, token)
    signal.signal(signal.SIGTERM, lambda *_: agent.close())
    print(f"listening on {host}:{listener.getsockname()[1]}", flush=True)
    agent.serve()
    agent.close()


if __name__ == "__main__":
    main()
