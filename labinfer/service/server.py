"""The process: a socket, an event loop, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from labinfer.errors import LabinferError
from labinfer.extras import missing
from labinfer.service.options import ServiceOptions
from labinfer.service.services import Services
from labinfer.service.watchdog import Watchdog

_log = logging.getLogger(__name__)


def bind(options: ServiceOptions) -> socket.socket:
    """A listening socket; an address that is taken or unknown is an error that names it."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        remedy = "choose another one: --port 8001"
        message = f"cannot listen on {options.host} port {options.port}: {error.strerror or error}"
        raise LabinferError("serve.address", message, remedy=remedy) from None
    return listener


class Server:
    """Serves ``services`` on ``listener`` until it is told to ``stop``."""

    def __init__(self, services: Services, listener: socket.socket) -> None:
        try:
            import uvicorn

            from labinfer.service.app import application
            from labinfer.service.protocol import connection_class
        except ImportError as error:
            raise missing((error.name or "uvicorn").partition(".")[0]) from None
        self.services, self.listener = services, listener
        options = services.options
        config = uvicorn.Config(
            application(services), http=connection_class(options), ws="none", lifespan="off", log_config=None,
            access_log=False, server_header=False, date_header=True, timeout_keep_alive=75, proxy_headers=False,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        self.uvicorn: Any = uvicorn.Server(config)
        self.uvicorn.capture_signals = contextlib.nullcontext
        self.loop: asyncio.AbstractEventLoop | None = None
        self.config = config

    def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Serve; ``started`` is called once requests are welcome."""
        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            runner.run(self.main(started))

    async def main(self, started: Callable[[], None]) -> None:
        """Serve, and look after the services meanwhile."""
        self.loop = asyncio.get_running_loop()
        with contextlib.suppress(ValueError, RuntimeError):  # signals come to the main thread only
            for number in (signal.SIGTERM, signal.SIGINT):
                self.loop.add_signal_handler(number, self.stop)
        for engine in self.services.engines:
            engine.start()
        care = asyncio.ensure_future(self.care())
        started()
        try:
            await self.uvicorn.serve([self.listener])
        finally:
            care.cancel()
            for each in self.services.all:
                if each.tracing is not None:
                    await asyncio.to_thread(each.tracing.close)

    def stop(self) -> None:
        """Take on nothing more, let what runs finish within the time for that, then end; called again, end now."""
        if self.services.draining:
            _log.warning("stopping at once")
            self.finish()
            return
        self.services.drain()
        _log.info("stopping: %d answers are being made", self.services.active)
        assert self.loop is not None
        self.draining = self.loop.create_task(self.drain())

    async def drain(self) -> None:
        """Wait until all answers are made, or it has taken too long."""
        end = time.monotonic() + self.services.options.drain_seconds
        while self.services.active and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.finish()

    def finish(self) -> None:
        """Stop what still runs, and serve no more."""
        for engine in self.services.engines:
            engine.submit(engine.abort_all)
        self.uvicorn.should_exit = True

    async def care(self) -> None:
        """Watch the engine and the streams."""
        watchdogs = [Watchdog(each) for each in self.services.all]
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            for watchdog in watchdogs:
                watchdog.look()
                watchdog.service.metrics.count_steps()
                for call in list(watchdog.service.open_streams):
                    call.care(now)
