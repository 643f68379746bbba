"""Replicas: requests go where their beginning is cached, and on elsewhere where one dies, with the same tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest

import labinfer
from labinfer.api import replica_options
from labinfer.errors import UsageError
from labinfer.llm import LLM
from labinfer.runtime.pipeline.workers import StageProcesses
from labinfer.runtime.replicas import Replicas
from labinfer.runtime.request import Request

from .service import Served, wait_for
from .tiny import GOLDEN

FOLDER = GOLDEN / "llama-llama3"
LIMITS = {"max_model_len": 256, "max_num_seqs": 4, "block_size": 4}
PROMPTS = [[5], [1, 2, 3], [7, 8], [9]]
SHORT = labinfer.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
LONG = labinfer.SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@contextmanager
def models(count: int, transport: str | None = None) -> Iterator[list[LLM]]:
    """So many models of one kind; all that they had is given back at the end."""
    with ExitStack() as stack:
        found = []
        for number in range(count):
            model = labinfer.load(FOLDER, devices=f"reference:{number}", transport=transport, **LIMITS)
            found.append(stack.enter_context(model))
        yield found
        for model in found:
            assert model.blocks.usage == 0
            model.blocks.check_integrity()


@cache
def answers() -> list[list[int]]:
    """What one device answers to ``PROMPTS``."""
    with labinfer.load(FOLDER, devices="reference", **LIMITS) as model:
        return [list(answer.token_ids) for answer in model.generate(PROMPTS, LONG)]


def sent(replicas: Replicas, prompt: list[int], salt: str = "") -> int:
    """The number of the replica that answers ``prompt``."""
    request = Request(prompt, SHORT, cache_salt=salt)
    engine = replicas.choose(request)
    engine.finish([engine.add(request)])
    return [each.engine for each in replicas.all].index(engine)


def test_a_request_goes_where_its_beginning_is_cached() -> None:
    with models(2) as found:
        replicas = Replicas([model.engine for model in found])
        first, second = [*range(16)], [*range(16, 32)]
        assert [sent(replicas, first), sent(replicas, second)] == [0, 1]
        assert [sent(replicas, [*second, 40]), sent(replicas, [*second, 41])] == [1, 1]
        assert [sent(replicas, [*first, 40]), sent(replicas, [*first, 41])] == [0, 0]
        assert [model.blocks.counters.hits for model in found] == [32, 32]


def test_what_is_to_be_computed_counts_as_cached() -> None:
    with models(2) as found:
        replicas = Replicas([model.engine for model in found])
        kept = [Request([*range(16), number], SHORT) for number in range(3)]
        assert len({replicas.choose(request) for request in kept}) == 1


def test_others_salts_are_not_shared() -> None:
    with models(2) as found:
        replicas = Replicas([model.engine for model in found])
        assert [sent(replicas, [*range(16)], "one"), sent(replicas, [*range(16)], "other")] == [0, 1]


def test_a_beginning_is_computed_again_where_that_is_quicker_than_to_wait() -> None:
    with models(2) as found:
        replicas = Replicas([model.engine for model in found])
        for engine in (model.engine for model in found):
            engine.costs.observe(0, 100, 0.1)
            for count, seconds in ((1, 0.01), (2, 0.02), (4, 0.04)):
                engine.costs.observe(count, 0, seconds)
        prompt = [*range(16)]
        kept = [Request(prompt, SHORT) for _ in range(4)]
        chosen = [replicas.choose(request) for request in kept]
        assert chosen == 2 * [model.engine for model in found]


def pid_of(model: LLM) -> int:
    """The process of the model's only stage."""
    assert model.pipeline is not None
    assert isinstance(model.pipeline.workers, StageProcesses)
    return model.pipeline.workers.stages[0].process.pid


async def tokens_of(replicas: Replicas, request: Request, killed: list[int]) -> list[int]:
    """The tokens of a request; once it has some, the processes ``killed`` are killed."""
    made: list[int] = []
    async for output in replicas.stream(request):
        made = list(output.outputs[0].token_ids)
        if len(made) > 10 and killed:
            os.kill(killed.pop(), signal.SIGKILL)
    return made


@needs_proc
def test_requests_go_on_elsewhere_when_a_replica_dies() -> None:
    with models(2, "shm") as found:
        replicas = Replicas([model.engine for model in found])
        victim = pid_of(found[0])

        async def run() -> list[list[int]]:
            requests = [Request(prompt, LONG) for prompt in PROMPTS]
            return await asyncio.gather(*(tokens_of(replicas, request, killed) for request in requests))

        killed = [victim]
        assert asyncio.run(run()) == answers()
        assert not killed
        assert [each.num_sent for each in replicas.all] == [2, 2]
        assert found[0].engine.scheduler.num_preemptions == 0  # nothing of it was computed there again
        wait_for(lambda: replicas.all[0].alive)
        assert pid_of(found[0]) != victim
        assert found[0].generate(PROMPTS, LONG)[0].token_ids == answers()[0]


@needs_proc
def test_a_request_that_moved_can_be_stopped() -> None:
    with models(2, "shm") as found:
        replicas = Replicas([model.engine for model in found])

        async def run() -> Request:
            request, count = Request(PROMPTS[0], LONG), 0
            stream = replicas.stream(request)
            async for _ in stream:
                count += 1
                if count == 3:
                    os.kill(pid_of(found[0]), signal.SIGKILL)
                if request.moved_to is not None:
                    break
            await stream.aclose()  # type: ignore[attr-defined]
            return request

        request = asyncio.run(run())
        assert request.moved_to is found[1].engine
        wait_for(lambda: request.finished)
        assert request.sequences[0].finish_reason == "abort"


@needs_proc
def test_a_dead_replica_is_tried_again_while_others_answer() -> None:
    with models(2, "shm") as found:
        replicas = Replicas([model.engine for model in found])
        for model in found:
            model.engine.start()
        os.kill(pid_of(found[1]), signal.SIGKILL)
        wait_for(lambda: not replicas.all[1].alive)
        request = Request(PROMPTS[0], LONG)
        assert replicas.choose(request) is found[1].engine
        found[1].engine.add(request)
        wait_for(lambda: request.finished)
        assert request.generated == answers()[0]
        assert request.moved_to is found[0].engine
        wait_for(lambda: replicas.all[1].alive)


def test_the_service_tells_of_its_replicas() -> None:
    with models(2) as found:
        api = Served(found[0], replicas=found[1:])
        try:
            body = {"model": "tiny", "temperature": 0, "max_tokens": 4}
            for prompt in ([*range(16)], [*range(16, 32)]):
                assert api.http.post("/v1/completions", json={**body, "prompt": prompt}).status_code == 200
            text = api.http.get("/metrics").text
            for number in range(2):
                assert f'labinfer:replica_up{{engine="{number}",model_name="tiny"}} 1.0' in text
                assert f'vllm:prefix_cache_queries_total{{engine="{number}",model_name="tiny"}} 16.0' in text
            devices = api.http.get("/labinfer/v1/devices").json()
            assert [(each["device"], each["replica"]) for each in devices["stages"]] == [
                ("reference:0", 0), ("reference:1", 1),
            ]  # fmt: skip
            steps = api.http.get("/labinfer/v1/trace").json()["steps"]
            assert {step["replica"] for step in steps} == {0, 1}
        finally:
            api.close()


def test_devices_are_divided_among_replicas() -> None:
    parts = replica_options({"devices": "reference:0,reference:1,reference:2,reference:3", "max_num_seqs": 2}, 2)
    assert [part["devices"] for part in parts] == ["reference:0,reference:1", "reference:2,reference:3"]
    assert [part["max_num_seqs"] for part in parts] == [2, 2]
    assert [part["devices"] for part in replica_options({"devices": "cpu,cpu:1"}, 2)] == ["cpu", "cpu:1"]
    with pytest.raises(UsageError, match="3 devices"):
        replica_options({"devices": "cpu,cpu:1,cpu:2"}, 2)
