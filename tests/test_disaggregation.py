"""Disaggregated replicas: prompts computed by one engine, answers made by another, with the tokens of one."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import labinfer
from labinfer import SamplingParams
from labinfer.cluster.fleet import load
from labinfer.compiler.plan import CacheGroup, Limits
from labinfer.errors import LabinferError, UsageError
from labinfer.llm import LLM
from labinfer.runtime import prompt_job
from labinfer.runtime.engine import Engine
from labinfer.runtime.kv_cache import block_bytes
from labinfer.runtime.moved_blocks import MovedBlocks
from labinfer.runtime.pipeline.message import FETCH, FILL, LOGITS, decode_block
from labinfer.runtime.pipeline.workers import StageProcesses
from labinfer.runtime.replicas import Replicas
from labinfer.runtime.request import Request
from labinfer.runtime.step_memory import StepBatch
from labinfer.service.errors import of_engine

from .hosts import Hosts
from .service import Served, wait_for
from .test_service_process import end, serving
from .tiny import GOLDEN

LLAMA, WINDOWS, LATENT = "llama-llama3", "gemma3_text-linear_global", "deepseek_v2-group_limited"
LIMITS = {"max_model_len": 128, "max_num_seqs": 4, "block_size": 4}
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def prompts(count: int = 4) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 90, length).tolist() for length in (33, 50, 24, 61)[:count]]


PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.7, top_p=0.9, seed=4, n=2, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, presence_penalty=0.5, logprobs=1),
]


@contextmanager
def models(name: str, options: Sequence[dict[str, Any]]) -> Iterator[list[LLM]]:
    """A model for each of ``options``; all that they had is given back at the end."""
    with ExitStack() as stack:
        found = []
        for number, each in enumerate(options):
            given = {"devices": f"reference:{number}", **LIMITS, **each}
            found.append(stack.enter_context(labinfer.load(GOLDEN / name, **given)))
        yield found
        for model in found:
            wait_for(lambda model=model: model.blocks.usage == 0)
            with model.lock:
                model.blocks.check_integrity()


@cache
def alone(name: str) -> list[list[list[int]]]:
    """What one engine answers."""
    with labinfer.load(GOLDEN / name, devices="reference", **LIMITS) as model:
        return [[list(each.token_ids) for each in answer.outputs] for answer in model.generate(prompts(), PARAMS)]


def moved_of(replicas: Replicas) -> list[MovedBlocks]:
    return [each.moved for each in replicas.all if each.moved is not None]


async def answer(replicas: Replicas, request: Request) -> list[list[int]]:
    made: list[list[int]] = []
    async for output in replicas.stream(request):
        made = [list(each.token_ids) for each in output.outputs]
    return made


async def all_answers(replicas: Replicas) -> list[list[list[int]]]:
    requests = [Request(prompt, params) for prompt, params in zip(prompts(), PARAMS, strict=True)]
    return await asyncio.gather(*(answer(replicas, request) for request in requests))


@pytest.mark.parametrize("name", [LLAMA, WINDOWS, LATENT])
@pytest.mark.parametrize(
    "options",
    [
        [{}, {}],
        [{"transport": "local"}, {"devices": "reference:1,reference:2", "transport": "local"}],
        [{"devices": "reference,reference:1", "transport": "shm"}, {"devices": "reference:2"}],
        [{"transport": "tcp"}, {"devices": "reference:1,reference:2", "transport": "tcp"}],
    ],
    ids=["one process", "threads", "shm to one process", "tcp"],
)
def test_tokens_are_those_of_one_engine(name: str, options: list[dict[str, Any]]) -> None:
    with models(name, options) as [prefill, decode]:
        replicas = Replicas([prefill.engine, decode.engine], num_prefill=1)
        assert asyncio.run(all_answers(replicas)) == alone(name)
        [moved] = moved_of(replicas)
        size = 4
        whole = sum((len(prompt) - 1) // size for prompt in prompts())
        assert moved.num_blocks >= whole  # in every cache group that sees all
        assert decode.engine.num_tokens < sum(size + 2 * 12 for _ in prompts())  # nobody computed a prompt there
        assert not moved.contents
        assert [each.num_sent for each in replicas.all] == [4, 4]


@pytest.mark.parametrize("name", ["llama-dynamic_crossed", "phi3-longrope_crossed"])
def test_tokens_are_those_of_one_engine_where_keys_depend_on_lengths(name: str) -> None:
    with models(name, [{}, {}]) as found:
        replicas = Replicas([model.engine for model in found], num_prefill=1)
        assert asyncio.run(all_answers(replicas)) == alone(name)
        [moved] = moved_of(replicas)
        sent = sum(bool(found[1].blocks._reusable(len(prompt))) for prompt in prompts())
        assert replicas.all[0].num_sent == sent  # no prompt is computed whose blocks nobody else could use
        assert bool(moved.num_blocks) == bool(sent)


def pid_of(model: LLM) -> int:
    """The process of the model's only stage."""
    assert model.pipeline is not None
    assert isinstance(model.pipeline.workers, StageProcesses)
    return model.pipeline.workers.stages[0].process.pid


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1], ids=["prefill", "decode"])
def test_requests_complete_when_an_engine_dies(victim: int, number: int) -> None:
    with models(LLAMA, [{"transport": "shm"}, {"transport": "tcp"}]) as found:
        replicas = Replicas([model.engine for model in found], num_prefill=1)
        os.kill(pid_of(found[victim]), number)  # whoever is sent a request does not know yet
        assert asyncio.run(all_answers(replicas)) == alone(LLAMA)
        [moved] = moved_of(replicas)
        assert not moved.contents
        wait_for(lambda: replicas.all[victim].alive)
        moved.num_blocks = 0
        again = Request([*range(40)], PARAMS[0])
        assert asyncio.run(answer(replicas, again)) == [list(found[1].generate([again.prompt], PARAMS[0])[0].token_ids)]
        assert moved.num_blocks == 9


def test_a_prompt_that_fails_elsewhere_is_computed_by_who_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LabinferError("run.failed", "broken")

    with models(LLAMA, [{}, {}]) as [prefill, decode]:
        replicas = Replicas([prefill.engine, decode.engine], num_prefill=1)
        monkeypatch.setattr(prefill, "run", fail)
        monkeypatch.setattr(prefill, "decode", fail)
        assert asyncio.run(all_answers(replicas)) == alone(LLAMA)
        [moved] = moved_of(replicas)
        assert (moved.num_blocks, moved.contents) == (0, {})


def test_blocks_that_are_evicted_before_they_are_sent_are_computed_by_who_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send = prompt_job.send_blocks

    def evicting(source: Engine, *rest: Any) -> None:
        source.model.blocks.forget()
        send(source, *rest)

    monkeypatch.setattr(prompt_job, "send_blocks", evicting)
    with models(LLAMA, [{}, {}]) as [prefill, decode]:
        replicas = Replicas([prefill.engine, decode.engine], num_prefill=1)
        assert asyncio.run(all_answers(replicas)) == alone(LLAMA)
        [moved] = moved_of(replicas)
        assert moved.num_blocks < 40
        assert replicas.all[0].num_sent == 4


class Held:
    """Keeps the blocks that a model sends until ``release``."""

    def __init__(self, model: LLM) -> None:
        self.model, self.fetch, self.calls = model, model.cache.fetch, list[Any]()
        model.cache.fetch = lambda *call: self.calls.append(call)  # type: ignore[method-assign]

    def release(self) -> None:
        self.model.cache.fetch = self.fetch  # type: ignore[method-assign]
        while self.calls:
            self.fetch(*self.calls.pop(0))


def placed_anew(model: LLM) -> None:
    """The stages of ``model`` are on devices of another kind from now on, as after a host was lost."""
    model.plan = model.plan.model_copy(deep=True)
    for device in model.plan.devices.values():
        device.kind = "another"


@pytest.mark.parametrize("number", [0, 1], ids=["prefill", "decode"])
def test_no_prompt_is_computed_on_devices_of_another_kind(number: int) -> None:
    with models(LLAMA, [{}, {}]) as found:
        replicas = Replicas([model.engine for model in found], num_prefill=1)
        placed_anew(found[number])
        assert asyncio.run(all_answers(replicas)) == alone(LLAMA)
        assert [each.num_sent for each in replicas.all] == [0, 4]
        placed_anew(found[1 - number])
        found[1].blocks.forget()
        assert asyncio.run(all_answers(replicas)) == alone(LLAMA)
        assert [each.num_sent for each in replicas.all] == [4, 8]


@pytest.mark.parametrize("when", ["on its way", "come"])
def test_blocks_of_devices_of_another_kind_are_not_taken_over(when: str) -> None:
    with models(LLAMA, [{}, {}]) as [prefill, decode]:
        replicas = Replicas([prefill.engine, decode.engine], num_prefill=1)
        [moved], held, prompt = moved_of(replicas), Held(prefill), prompts()[1]

        async def run() -> list[list[int]]:
            task = asyncio.create_task(answer(replicas, Request(prompt, PARAMS[0])))
            while not held.calls:
                await asyncio.sleep(0)
            with decode.lock:
                if when == "come":
                    held.release()
                placed_anew(decode)
            held.release()
            return await task

        expected = prefill.generate([prompt], PARAMS[0])[0].token_ids
        assert asyncio.run(run()) == [list(expected)]
        assert decode.engine.num_tokens == len(prompt) + 12 - 1
        assert not moved.contents


@pytest.mark.parametrize("when", ["computed", "sent"])
def test_a_request_that_is_aborted_meanwhile_leaves_nothing(when: str) -> None:
    with models(LLAMA, [{}, {}]) as [prefill, decode]:
        replicas = Replicas([prefill.engine, decode.engine], num_prefill=1)
        [moved], held = moved_of(replicas), Held(prefill)
        room, request = moved.room, Request(prompts()[1], PARAMS[0])

        async def run() -> None:
            if when == "computed":
                prefill.lock.acquire()
            task = asyncio.create_task(answer(replicas, request))
            while not (moved.contents if when == "computed" else held.calls):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            if when == "computed":
                prefill.lock.release()

        asyncio.run(run())
        assert (moved.room, moved.contents) == (room, {})
        held.release()
        assert (moved.room, moved.contents, moved.num_blocks) == (room, {}, 0)
        assert request.number == -1  # it never came to the engine that answers
        wait_for(lambda: not prefill.engine.busy)
        assert prefill.blocks.usage == 0
        assert asyncio.run(answer(replicas, Request(prompts()[0], PARAMS[0]))) == alone(LLAMA)[0]


def test_a_prompt_whose_engine_stops_all_requests_is_answered_by_nobody() -> None:
    with models(LLAMA, [{}, {}]) as [prefill, decode]:
        replicas = Replicas([prefill.engine, decode.engine], num_prefill=1)
        [moved], request = moved_of(replicas), Request(prompts()[1], PARAMS[0])

        async def run() -> None:
            with prefill.lock:
                task = asyncio.create_task(answer(replicas, request))
                while not moved.contents:
                    await asyncio.sleep(0)
                prefill.engine.submit(prefill.engine.abort_all)
            await task

        with pytest.raises(LabinferError, match="told to stop") as error:
            asyncio.run(run())
        assert of_engine(error.value).status == 503
        assert not moved.contents
        assert decode.engine.num_tokens == 0


def test_a_prompt_whose_engine_is_closed_is_answered_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with models(LLAMA, [{"max_num_batched_tokens": 16}] * 2) as [prefill, decode]:
        replicas = Replicas([prefill.engine, decode.engine], num_prefill=1)
        [moved], request = moved_of(replicas), Request(prompts()[1], PARAMS[0])
        before = {each for each in threading.enumerate() if each.name == "labinfer-engine"}
        step, running = prefill.run, threading.Event()

        def late(batch: StepBatch) -> np.ndarray:
            """The first of several steps, which ends once the engine is being closed."""
            running.set()
            wait_for(lambda: prefill.engine.closed)
            return step(batch)

        async def run() -> None:
            monkeypatch.setattr(prefill, "run", late)
            task = asyncio.create_task(answer(replicas, request))
            while not running.is_set():
                await asyncio.sleep(0)
            await asyncio.to_thread(prefill.close)
            await asyncio.wait_for(task, 60)

        with pytest.raises(LabinferError, match="told to stop"):
            asyncio.run(run())
        assert not moved.contents
        assert {each for each in threading.enumerate() if each.name == "labinfer-engine"} <= before


def test_prompts_wait_where_there_is_no_room_for_their_blocks() -> None:
    with models(LLAMA, [{}, {}]) as [prefill, decode]:
        replicas = Replicas([prefill.engine, decode.engine], num_prefill=1)
        [moved] = moved_of(replicas)
        size = moved.sizes[0]
        moved.room = room = 20 * size  # the prompts are of 8, 12, 5 and 15 blocks

        async def run() -> list[list[list[int]]]:
            with decode.lock:
                task = asyncio.create_task(all_answers(replicas))
                while replicas.all[0].num_sent < 4:
                    await asyncio.sleep(0)
                while not moved.waiting or any(content is None for content in moved.contents.values()):
                    await asyncio.sleep(0)
                assert 0 <= moved.room == room - len(moved.contents) * size
                assert len(moved.contents) == moved.num_blocks
            return await task

        assert asyncio.run(run()) == alone(LLAMA)
        assert (moved.room, moved.num_blocks) == (room, 40)


def test_a_follow_up_is_computed_where_the_conversation_is() -> None:
    with models(LLAMA, [{}, {}]) as [prefill, decode]:
        replicas = Replicas([prefill.engine, decode.engine], num_prefill=1)
        question = prompts()[0]
        long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        [made] = asyncio.run(answer(replicas, Request(question, long)))
        follow_up = Request([*question, *made, 7, 8, 9, 10, 11, 12, 13], PARAMS[0])
        asyncio.run(answer(replicas, follow_up))
        assert [each.num_sent for each in replicas.all] == [1, 2]
        assert follow_up.metrics.num_cached_tokens >= 92
        other = Request(follow_up.prompt, PARAMS[0], cache_salt="another tenant")
        asyncio.run(answer(replicas, other))
        assert [each.num_sent for each in replicas.all] == [2, 3]
        assert other.metrics.num_cached_tokens == 0


def test_who_wants_something_of_every_token_of_the_prompt_gets_it() -> None:
    wants = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)
    with models(LLAMA, [{}, {}]) as [prefill, decode]:
        replicas, request = Replicas([prefill.engine, decode.engine], num_prefill=1), Request(prompts()[0], wants)
        asyncio.run(answer(replicas, request))
        assert replicas.all[0].num_sent == 0
        assert len(request.prompt_logprobs) == len(request.prompt)


@pytest.mark.parametrize(
    ("options", "num_prefill", "why"),
    [
        ([{}, {}], 2, "2 of 2 replicas"),
        ([{}, {"block_size": 8}], 1, "different models, limits"),
        ([{}, {"enable_prefix_caching": False}], 1, "part of the prefix cache"),
        ([{"devices": "reference,reference:1", "tensor_parallel_size": 2}] * 2, 1, "several ranks"),
    ],
    ids=["nobody answers", "other blocks", "no prefix cache", "ranks"],
)  # fmt: skip
def test_what_cannot_be_moved_is_refused(options: list[dict[str, Any]], num_prefill: int, why: str) -> None:
    with models(LLAMA, options) as found, pytest.raises(UsageError, match=why):
        Replicas([model.engine for model in found], num_prefill)


def test_the_service_tells_of_moved_blocks() -> None:
    with models(LLAMA, [{}, {}]) as found:
        api = Served(found[0], replicas=found[1:], num_prefill=1)
        try:
            body = {"model": "tiny", "temperature": 0, "max_tokens": 4, "prompt": [*range(18)]}
            usage = api.http.post("/v1/completions", json=body).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 0
            text = api.http.get("/metrics").text
            [moved] = moved_of(api.service.replicas)
            for name, value in (("moved_blocks", 4), ("moved_bytes", 4 * moved.sizes[0])):
                assert f'labinfer:{name}_total{{engine="1",model_name="tiny"}} {value:.1f}' in text
                assert f'labinfer:{name}_total{{engine="0"' not in text
            assert 'labinfer:moving_seconds_total{engine="1"' in text
        finally:
            api.close()


def words(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


@needs_proc
def test_a_stage_that_is_sent_what_is_no_block_is_started_anew_and_writes_nothing() -> None:
    with models(LLAMA, [{"transport": "shm"}]) as [model]:
        [[size]] = block_bytes(model.plan)
        block, some = np.full(size, 255, np.uint8), model.plan.limits.groups[0].num_blocks
        hostile = [
            (FILL, [words(1, 0), block]),
            (FILL, [words(0, some), block]),
            (FILL, [words(0, -1), block]),
            (FILL, [words(0, 0), block[1:]]),
            (FILL, [words(0, 0), block, block]),
            (FILL, [words(0, 0, 0, 0, some), block]),
            (FILL, [words(0, 0, 0), block]),
            (FETCH, [words(0, 0), block]),
            (LOGITS, [words(0, 0), block]),
        ]
        for kind, sections in hostile:
            pid = pid_of(model)
            assert model.pipeline is not None
            model.pipeline.send(kind, 1, sections)
            wait_for(lambda: model.pipeline is not None and model.pipeline.broken is not None)
            assert list(model.generate([prompts()[0]], PARAMS[0])[0].token_ids) == alone(LLAMA)[0][0]
            assert pid_of(model) != pid


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=8) | st.lists(st.integers(-1, 20), max_size=8))
def test_only_blocks_of_the_plan_are_decoded(numbers: list[int]) -> None:
    groups = [CacheGroup(num_blocks=10), CacheGroup(num_blocks=5, window=8)]
    limits = Limits(
        max_num_batched_tokens=8, max_num_seqs=1, max_logits_rows=1, max_model_len=8, block_size=4, groups=groups
    )
    try:
        frame = decode_block(words(*numbers), limits)
    except LabinferError:
        return
    assert frame.encode().tolist() == numbers
    for group, *blocks in [[frame.group, frame.block], *frame.copies.tolist()]:
        assert all(0 <= block < groups[group].num_blocks for block in blocks)


def test_a_block_that_nobody_asked_for_breaks_the_pipeline() -> None:
    with models(LLAMA, [{"transport": "local"}]) as [model]:
        assert model.pipeline is not None
        with pytest.raises(LabinferError, match="not asked for"):
            model.pipeline.tell(99, np.zeros(8, np.uint8))


@needs_proc
def test_tokens_over_hosts_and_after_a_host_is_lost(home: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("prefill", "decode")]
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        hosts = [stack.enter_context(closing(Hosts(folder, [folder.name, f"{folder.name}2"]))) for folder in folders]
        found = [stack.enter_context(load(GOLDEN / LLAMA, each.file, **LIMITS)) for each in hosts]
        replicas = Replicas([model.engine for model in found], num_prefill=1)
        [moved] = moved_of(replicas)
        assert asyncio.run(all_answers(replicas)) == alone(LLAMA)
        assert moved.num_blocks == 40
        hosts[0].kill("prefill2")
        for model in found:
            model.blocks.forget()
        assert asyncio.run(all_answers(replicas)) == alone(LLAMA)
        assert not moved.contents


@needs_proc
@pytest.mark.parametrize("over_hosts", [False, True], ids=["devices", "hosts"])
def test_the_command_serves_so(over_hosts: bool, home: Path, tmp_path: Path) -> None:
    options = ["--max-model-len", "128", "--block-size", "4", "--prefill-replicas", "1"]
    with ExitStack() as stack:
        if over_hosts:
            files = []
            for name in ("prefill", "decode"):
                (tmp_path / name).mkdir()
                files.append(str(stack.enter_context(closing(Hosts(tmp_path / name, [name]))).file))
            options += ["--cluster", ",".join(files)]
        else:
            options += ["--replicas", "2", "--devices", "reference:0,reference:1"]
        process, client = stack.enter_context(serving(GOLDEN / LLAMA, home, *options))
        body = {"prompt": prompts()[0], "max_tokens": 12, "ignore_eos": True, "temperature": 0}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        assert usage["completion_tokens"] == 12
        text = client.get("/metrics").text
        assert re.search(r'^labinfer:moved_blocks_total\{engine="1",[^}]*\} 8\.0$', text, re.MULTILINE)
        assert end(process) == 0
