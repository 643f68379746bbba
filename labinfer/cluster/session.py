"""What an agent does for one head: it starts stages, has them rest when others are lost, ends them with the head."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from labinfer.cluster.control import END_SECONDS, Address, Control, notice_cuts
from labinfer.cluster.neighbours import Neighbour
from labinfer.cluster.profiler import echo_hops, hops, profiling
from labinfer.errors import LabinferError
from labinfer.runtime.pipeline.process import BEAT, StageProcess, stopped
from labinfer.runtime.pipeline.transport import ChannelClosed, Keys
from labinfer.runtime.pipeline.transport.sealed import connect

if TYPE_CHECKING:
    from labinfer.cluster.agent import Agent

REST_SECONDS = 2.0
"""How long a stage may go on with its step, or with loading, once the others of its pipeline are lost."""


class HostedStage:
    """The process of a device, which runs a stage for a head, and the thread that passes on what it says.

    It rests when its ``channels`` are closed, and then keeps its weights for the next stage that it is given.
    """

    def __init__(self, session: Session, device: str, process: StageProcess) -> None:
        self.session, self.device, self.process = session, device, process
        self.rests, self.ended = threading.Event(), False
        self.run, self.number, self.channels = 0, 0, list[socket.socket]()
        self.thread = threading.Thread(target=self.listen, daemon=True)

    def begin(self, message: dict[str, Any], channels: list[socket.socket]) -> None:
        """It runs what the head's ``message`` says, over ``channels``, from now on."""
        self.run, self.number, self.channels = message["run"], message["stage"], channels
        self.rests.clear()
        if not self.thread.ident:
            self.thread.start()
        elif self.ended:  # meanwhile, so that it was told of what it ran before
            self.say(died=f"{self.process.name} died: {self.process.cause()}")

    def listen(self) -> None:
        """Pass on what it says, and how it ended."""
        while (lines := self.process.read()) is not None:
            for line in lines:
                self.process.ready |= "ready" in line
                if "rests" in line:
                    if self.channels:  # the head may be the only one that still waits for it
                        self.say(died=f"{self.process.name} has lost the connection to another stage, or to the head")
                    self.rests.set()
                elif "beat" not in line:
                    self.say(**line)
        self.ended = True
        self.say(died=f"{self.process.name} died: {self.process.cause()}")
        self.rests.set()
        self.interrupt()

    def say(self, **message: Any) -> None:
        """Tell the head, if it is there."""
        with contextlib.suppress(ChannelClosed):
            self.session.control.say(run=self.run, stage=self.number, **message)

    def look(self) -> None:
        """Tell the head if it is stopped, or stuck once it is loaded, and end it."""
        reason = None if self.ended else self.process.silent()
        if reason is not None and (self.process.ready or stopped(self.process.process.pid)):
            self.say(died=f"{self.process.name} died: {reason}")
            self.process.process.kill()

    def interrupt(self) -> None:
        """Have it rest: nothing comes and goes any more."""
        channels, self.channels = self.channels, []
        for each in channels:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def end(self) -> None:
        """End it, with all that it keeps."""
        self.interrupt()
        self.process.process.kill()  # it has nothing to lose, and others wait for its memory
        self.thread.join(END_SECONDS)
        self.process.close()

    def report(self) -> dict[str, Any]:
        """What it is and whether it runs."""
        state = "loading" if not self.process.ready else "running" if self.process.missed < 4 else "silent"
        state = "resting" if self.rests.is_set() else state
        return {"stage": self.process.name, "pid": self.process.process.pid, "state": state}


class Session:
    """What an agent does for one head. ``run`` is the head's number of the stages that it has started last."""

    def __init__(self, agent: Agent, control: Control) -> None:
        self.agent, self.control, self.owner = agent, control, ""
        self.stages: list[HostedStage] = []
        self.neighbours: list[Neighbour] = []
        self.profilers: list[subprocess.Popen[str]] = []
        self.closing = threading.Lock()
        self.closed, self.current = False, 0
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
                case "rest":
                    self.rest(int(message["run"]), list(message["devices"]))
                    self.control.say()
                case "start":
                    threading.Thread(target=self.start, args=(message,), daemon=True).start()
                case "profile" | "hops" | "echo":
                    threading.Thread(target=self.measure, args=(message,), daemon=True).start()
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

    def rest(self, run: int, devices: Collection[str]) -> None:
        """Have all stages rest, for run ``run`` to go on with; end those of other devices, and who does not rest."""
        with self.closing:
            self.current = run
            self.close_neighbours()
            for stage in self.stages:
                stage.interrupt()
            until = time.monotonic() + REST_SECONDS
            for stage in list(self.stages):
                rests = stage.device in devices and stage.rests.wait(max(0.0, until - time.monotonic()))
                if not rests or stage.ended:
                    self.drop(stage)

    def drop(self, stage: HostedStage) -> None:
        """End a stage."""
        self.stages.remove(stage)
        stage.end()

    def start(self, message: dict[str, Any]) -> None:
        """Wire and start a stage; whatever keeps it from starting is told as its death."""
        links, channels = {}, list[socket.socket]()
        try:
            # What it connects comes first: others wait for that, as it may wait for them.
            for name, link in sorted(message["links"].items(), key=lambda each: "address" not in each[1]):
                if "address" in link:
                    connection, keys = self.connect(link, message["run"])
                else:
                    connection, keys = self.agent.claim(link["channel"].encode())
                notice_cuts(connection)
                channels.append(connection)
                *pair, tls = keys
                sealed = {"keys": [key.hex() for key in pair], "tls": tls}
                links[name] = [{"transport": "tcp", "descriptors": [connection.fileno()], **sealed}]
            start = {**message["start"], "stage": message["stage"], "links": links, "stays": True}
            with self.closing:
                if not self.closed and self.current == message["run"]:
                    self.give(message, start, channels)
                    channels = []
        except Exception as error:  # whatever it is, the head must not wait for a stage that will never come
            self.say_died(message["run"], f"{message.get('name')} could not be wired: {error}")
        finally:
            for each in channels:
                each.close()

    def give(self, message: dict[str, Any], start: dict[str, Any], channels: list[socket.socket]) -> None:
        """Give what to run to the process that rests on its device, or to a new one."""
        name, device, descriptors = message["name"], message["device"], [each.fileno() for each in channels]
        resting = next((each for each in self.stages if each.device == device), None)
        if resting is not None and resting.ended:
            self.drop(resting)
            resting = None
        if resting is None:
            stage = HostedStage(self, device, StageProcess(name, start, descriptors))
            self.stages.append(stage)
            stage.begin(message, channels)
        else:
            resting.begin(message, channels)
            resting.process.give(name, start, descriptors)

    def connect(self, link: dict[str, Any], run: int) -> tuple[socket.socket, Keys]:
        """The channel of ``link``, connected to another host; the head is told once that is silent."""
        address: Address = str(link["address"][0]), int(link["address"][1])
        connection, keys = connect(address, self.agent.credentials, link["channel"].encode())
        self.listen_to(link["host"], address, run)
        return connection, keys

    def listen_to(self, name: str, address: Address, run: int) -> None:
        """Tell the head once another host, to which a stage sends from here, is silent."""
        neighbour = Neighbour(name, address, self.agent.credentials, lambda reason: self.say_died(run, reason))
        with self.closing:
            if not self.closed and self.current == run:
                self.neighbours.append(neighbour)
                return
        neighbour.close()

    def measure(self, message: dict[str, Any]) -> None:
        """Measure a device, or the way to another host, beside what the head says meanwhile; tell what was found."""
        try:
            if message["do"] == "profile":
                for line in profiling(message["order"], self.profilers):
                    self.control.say(**line)
                return
            purpose, size = message["channel"].encode(), int(message["size"])
            if message["do"] == "echo":
                echo_hops(*self.agent.claim(purpose), size)
            else:
                address = str(message["address"][0]), int(message["address"][1])
                connection, keys = connect(address, self.agent.credentials, purpose)
                self.control.say(seconds=hops(connection, keys, size))
        except Exception as error:  # the head waits for an answer, but to the one who only sends back
            if message["do"] != "echo":
                with contextlib.suppress(ChannelClosed):
                    self.control.say(error=f"{type(error).__name__}: {error}")

    def say_died(self, run: int, reason: str) -> None:
        """Tell the head that the stages cannot go on, and why."""
        with contextlib.suppress(ChannelClosed):
            self.control.say(run=run, died=reason)

    def watch(self) -> None:
        """Tell the head of stages that are stopped, or stuck once they are loaded."""
        while not self.closed:
            time.sleep(BEAT)
            for stage in list(self.stages):
                stage.look()

    def close_neighbours(self) -> None:
        """Listen to nobody any more."""
        for neighbour in self.neighbours:
            neighbour.close()
        self.neighbours.clear()

    def close(self) -> None:
        """End the stages and the connection; returns when they have ended."""
        with self.closing:
            self.closed = True
            self.control.close()
            self.close_neighbours()
            for profiler in list(self.profilers):
                profiler.kill()
            for stage in list(self.stages):
                self.drop(stage)
