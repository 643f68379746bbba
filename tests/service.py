"""A service of the tiny model in this process, behind a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import labinfer
from labinfer import LoRARequest
from labinfer.compiler.plan import Plan
from labinfer.llm import LLM
from labinfer.service.options import ServiceOptions
from labinfer.service.server import Server, bind
from labinfer.service.service import Service
from labinfer.service.services import Services

KEY = "test-key-0123456789"
OTHER_KEY = "other-key-0123456789"


class Served:
    """A running service: ``http`` is a client with the key."""

    def __init__(
        self,
        model: LLM,
        adapters: Sequence[LoRARequest] = (),
        replicas: Sequence[LLM] = (),
        num_prefill: int = 0,
        **options: Any,
    ) -> None:
        listener = bind(ServiceOptions(port=0))
        settings = ServiceOptions(port=listener.getsockname()[1], api_keys=(KEY, OTHER_KEY), **options)
        self.model = model
        self.service = Service(model, settings, None, adapters, "tiny", replicas, num_prefill)
        self.server, started = Server(Services(self.service), listener), threading.Event()
        self.thread = threading.Thread(target=self.server.run, args=(started.set,))
        self.thread.start()
        assert started.wait(60)
        self.url = settings.url
        self.http = httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    def stop(self) -> None:
        """Ask the server to end, as SIGTERM does."""
        assert self.server.loop is not None
        self.server.loop.call_soon_threadsafe(self.server.stop)

    def close(self) -> None:
        """End at once."""
        self.http.close()
        if self.thread.is_alive():
            self.stop()
            self.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until ``condition`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def served(model: Path, limits: dict[str, Any] | None = None, **options: Any) -> Iterator[Served]:
    """A service of ``model``, compiled with ``limits``."""
    with labinfer.load(model, **{"max_num_seqs": 4, **(limits or {})}) as llm:
        running = Served(llm, **options)
        try:
            yield running
        finally:
            running.close()
            assert llm.blocks.usage == 0
            llm.blocks.check_integrity()


def placed_plan(model: Path, folder: Path) -> Plan:
    """A plan over the device that is here, with the predictions of a placement by cost over a declared one."""
    cluster = folder / "cluster.yaml"
    cluster.write_text("devices: {reference: {like: epyc-9654}}")
    declared = labinfer.compile(model, cluster=cluster, workload="prompt=3,output=8,concurrency=1")
    return labinfer.compile(model).model_copy(update={"placement": declared.placement})


def api_fixture(model: str, **limits: Any) -> Any:
    """The fixture ``api`` of a module: one service, for all its tests, of the model that another fixture names."""

    @pytest.fixture(scope="module", name="api")
    def api(request: pytest.FixtureRequest) -> Iterator[Served]:
        with served(request.getfixturevalue(model), limits) as running:
            yield running

    return api
