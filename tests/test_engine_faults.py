"""What goes wrong with one request, or with whoever asked for it, is no affair of the others."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import labinfer
from labinfer.errors import DoesNotFit, LabinferError, UsageError
from labinfer.llm import LLM
from labinfer.runtime import streaming
from labinfer.runtime.engine import Engine
from labinfer.runtime.outputs import RequestOutput, output_of
from labinfer.runtime.request import Request

from .test_engine_requests import LLAMA, PROMPTS, greedy


@pytest.fixture
def model() -> Iterator[LLM]:
    with labinfer.load(LLAMA) as loaded:
        yield loaded
        assert loaded.blocks.usage == 0


async def last(engine: Engine, request: Request) -> RequestOutput:
    found = [output async for output in engine.stream(request)]
    return found[-1]


def with_another(model: LLM, request: Request) -> list[Any]:
    """What comes of ``request`` and of an ordinary one beside it."""

    async def both() -> list[Any]:
        running = [last(model.engine, each) for each in (Request(PROMPTS[1], greedy(30)), request)]
        return await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 60)

    return asyncio.run(both())


def test_a_stream_that_wants_an_unknown_value_is_refused(model: LLM) -> None:
    other, error = with_another(model, Request([1], greedy(), capture=["layers.0.attn.out", "layers.9.attn.out"]))
    assert isinstance(error, UsageError)
    assert error.code == "run.unknown-value"
    assert len(other.token_ids) == 30
    assert not model.engine.capture.wanted


def test_an_idle_engine_that_finds_its_books_wrong_answers_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "IDLE_SECONDS", 0.01)
    with labinfer.load(LLAMA) as model:
        assert len(asyncio.run(last(model.engine, Request([1], greedy(3)))).outputs[0].token_ids) == 3
        time.sleep(0.1)
        assert len(asyncio.run(last(model.engine, Request([1], greedy(3)))).outputs[0].token_ids) == 3
        with model.lock:
            model.blocks.groups[0].owners[0] += 1
        model.engine.start()
        until = time.monotonic() + 60
        while model.engine.fault is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        with pytest.raises(LabinferError) as caught:
            asyncio.run(last(model.engine, Request([1], greedy(3))))
        assert caught.value.code == "run.cache-integrity"
        model.blocks.groups[0].owners[0] -= 1


@pytest.mark.parametrize("started", [True, False], ids=["own thread", "main thread"])
def test_ctrl_c_stops_no_step(started: bool) -> None:
    with labinfer.load(LLAMA) as model:
        expected = model.generate(PROMPTS, greedy(60))
        if started:
            model.engine.start()
        for turn in range(30):
            begun = model.engine.num_tokens + 8 * sum(map(len, PROMPTS))
            watcher = threading.Thread(target=interrupt, args=(model, begun, 0.0007 * turn))
            with pytest.raises(KeyboardInterrupt):
                generate_until(watcher, model)
            watcher.join()
            model.blocks.check_integrity()
            assert model.blocks.usage == 0
        answers = model.generate(PROMPTS, greedy(60))
        assert [each.token_ids for each in answers] == [each.token_ids for each in expected]


def interrupt(model: LLM, begun: int, seconds: float) -> None:
    """Signal so much later than ``begun`` tokens have been computed, those of all prompts."""
    while model.engine.num_tokens < begun:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGINT)


def generate_until(watcher: threading.Thread, model: LLM) -> None:
    """A long generation, which the signal of ``watcher`` stops."""
    watcher.start()
    model.generate(PROMPTS * 8, greedy(120))
    time.sleep(10)


def test_a_stream_that_cannot_begin_fails_alone(model: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    [interpreter], inner = model.interpreters, "layers.1.attn.out"
    listen = interpreter.listen

    def no_room_to_take_apart(value: str, callback: Any) -> Any:
        if value == inner:
            raise DoesNotFit("device.memory", "there is no room")
        return listen(value, callback)

    monkeypatch.setattr(interpreter, "listen", no_room_to_take_apart)
    other, error = with_another(model, Request([1], greedy(), capture=["logits", inner]))
    assert isinstance(error, DoesNotFit)
    assert len(other.token_ids) == 30
    assert not model.engine.capture.wanted
    assert not interpreter.listeners


def test_a_stream_that_was_not_begun_ends_when_the_model_is_closed() -> None:
    model = labinfer.load(LLAMA)
    engine, request = model.engine, Request([1], greedy())
    engine.check(request)
    engine.submit(lambda: engine.queue(request))
    model.close()
    assert request.finished
    assert output_of(request).finish_reason == "abort"


def test_a_closed_model_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = labinfer.load(LLAMA)
    engine, before = model.engine, set(threading.enumerate())
    engine.check(late := Request([1], greedy()))
    model.close()
    with pytest.raises(UsageError, match="the model is closed"):
        asyncio.run(last(engine, Request([1], greedy())))
    with pytest.raises(UsageError, match="the model is closed"):
        engine.add(Request([1], greedy()))
    monkeypatch.setattr(engine, "check", lambda request: None)  # it was closed between that and the start
    with pytest.raises(UsageError, match="the model is closed"):
        asyncio.run(last(engine, late))
    engine.start()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("overlap", ["0", "1"])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_failing_on_token_is_its_callers_affair(
    overlap: str, in_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABINFER_OVERLAP", overlap)

    def fail(index: int, text: str) -> None:
        raise ValueError("no")

    with labinfer.load(LLAMA) as model, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "labinfer.runtime.delivery.Delivery.write", lambda self, sequence, *_: sequence.pieces.append("x")
        )
        other = model.engine.add(Request(PROMPTS[2], greedy(30)))
        if in_thread:
            model.engine.start()
        with pytest.raises(ValueError, match="no"):
            model.generate(PROMPTS[:2], greedy(), fail)
        model.engine.finish([other])
        assert other.error is None
        assert len(other.generated) == 30
        assert model.blocks.usage == 0


@pytest.mark.parametrize("overlap", ["0", "1"])
def test_a_request_that_is_done_leaves_the_listeners_of_others(overlap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABINFER_OVERLAP", overlap)
    names = ["layers.0.attn.out", "layers.1.attn.out"]
    with labinfer.load(LLAMA) as model:
        engine = model.engine
        slow = Request([1], greedy(8), listener=lambda sequence: time.sleep(0.01))
        brief = Request([2], greedy(3), capture=names[:1])
        other = Request(PROMPTS[2], greedy(8), capture=names[1:])
        engine.add(slow)
        engine.add(brief)
        with model.listen(names[1], lambda array: time.sleep(0.03)):  # told of brief's end meanwhile, if ever
            engine.add(other)
            engine.finish([slow, brief, other])
        for request, name in ((brief, names[0]), (other, names[1])):
            rows = len(request.prompt) + len(request.generated) - 1
            assert len(output_of(request).outputs[0].captured[name]) == rows


def test_waiting_for_room_is_not_counted_as_looking_up() -> None:
    with labinfer.load(LLAMA, num_blocks=6, max_model_len=96) as model:
        requests = [model.engine.add(Request(np.arange(at, at + 60).tolist(), greedy(8))) for at in (0, 10, 20)]
        model.engine.finish(requests)
        assert model.blocks.counters.queries == 180


def test_a_closed_session_touches_no_row() -> None:
    with labinfer.load(LLAMA, max_num_seqs=1) as model:
        with model.session() as closed:
            closed.append([1, 2])
        with model.session() as session:
            session.append([3])
            with pytest.raises(UsageError) as caught:
                closed.append([4])
            assert caught.value.code == "run.closed"
            assert model.batch.num_tokens[session.row] == 1


def test_threads_that_ask_at_once_share_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labinfer.runtime.engine.speculation_of", lambda *_: time.sleep(0.02))
    found: list[object] = []
    with labinfer.load(LLAMA) as model:
        threads = [threading.Thread(target=lambda: found.append(model.engine)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


def test_event_loops_are_forgotten(model: LLM) -> None:
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def run() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await last(model.engine, Request([1], greedy(3)))

    asyncio.run(run())
    model.generate([[1]], greedy(1))  # an engine remembers what its last step finished
    gc.collect()
    assert loops[0]() is None
