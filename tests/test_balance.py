"""Layers move between the stages of a pipeline where they take unequal times, once, and requests go on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import labinfer
from labinfer.errors import DoesNotFit, UsageError
from labinfer.llm import LLM
from labinfer.replanning import with_layers
from labinfer.runtime.manager import Manager
from labinfer.runtime.pipeline.balance import (
    PAYS_WITHIN,
    WINDOW,
    WINDOWS,
    Balance,
    BalancedFleet,
    balanced,
    beside_layers,
)
from labinfer.runtime.pipeline.workers import StageProcesses
from labinfer.runtime.request import Request

from .tiny import CONFIG, GOLDEN, tensors, tiny_map

PROMPTS = [[5], [1, 2, 3], [4, 4]]
LONG = labinfer.SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
ENOUGH = WINDOW * WINDOWS


def test_layers_are_shared_out_by_what_they_take() -> None:
    assert balanced([6, 6], np.zeros(2), np.array([6.0, 12.0])).tolist() == [8, 4]
    assert balanced([4, 4, 4], np.zeros(3), np.array([4.0, 4.0, 4.0])).tolist() == [4, 4, 4]
    assert balanced([2, 2], np.zeros(2), np.array([1.0, 100.0])).tolist() == [3, 1]


def test_what_is_beside_the_layers_stays_when_they_move() -> None:
    assert balanced([15, 15], np.array([0.0, 8.0]), np.array([15.0, 23.0])).tolist() == [19, 11]
    assert balanced([6, 6], np.array([0.0, 3.0]), np.array([6.0, 18.0])).tolist() == [10, 2]


def test_the_matrix_of_the_vocabulary_is_beside_the_layers(deep: dict[str, Path]) -> None:
    plan = labinfer.compile(**deep, devices="reference,reference:1")
    assert beside_layers(plan).tolist() == pytest.approx([0, 96 * 64 / (4 * 64 * 64)])


def test_prompts_have_little_part_in_what_is_beside_the_layers() -> None:
    """The second stage is as quick in layers as the first; only decoding has it wait for the vocabulary's matrix."""
    for ended, counts in ((1.0, [8, 4]), (0.0, None)):
        balance = Balance([6, 6], np.array([0.0, 4.0]))
        seconds = np.array([6.0, 6.0 + 4.0 * ended])
        moves = [balance.observe(seconds, ended, step) for step in range(ENOUGH)]
        assert moves[-1] == counts


def simulated(balance: Balance, layers: list[int], each: list[float], steps: int, now: float) -> list[list[int]]:
    """The moves within ``steps`` of a second each whose layers take ``each``, and some time more or less."""
    rng, moves = np.random.default_rng(0), []
    for _ in range(steps):
        counts = balance.observe(np.array(layers) * each * rng.uniform(0.7, 1.4, len(each)), 1.0, now := now + 1)
        if counts is not None:
            moves.append(counts)
            balance.begin(layers := counts, np.zeros(len(each)), 1.0)
    return moves


def test_layers_move_once_and_not_back_and_forth() -> None:
    balance = Balance([6, 6], np.zeros(2), restart_seconds=1.0)
    assert simulated(balance, [6, 6], [1.0, 2.0], 5000, 0) == [[8, 4]]
    assert simulated(balance, [8, 4], [1.0, 2.0], 5000, 5000) == []


def test_a_stage_that_is_slow_for_a_while_keeps_its_layers() -> None:
    balance = Balance([6, 6], np.zeros(2), restart_seconds=1.0)
    assert simulated(balance, [6, 6], [1.0, 4.0], ENOUGH - WINDOW, 0) == []
    assert simulated(balance, [6, 6], [1.0, 1.0], ENOUGH, ENOUGH) == []


def test_a_move_that_does_not_pay_is_not_made() -> None:
    assert simulated(Balance([6, 6], np.zeros(2), restart_seconds=PAYS_WITHIN), [6, 6], [1.0, 2.0], 1000, 0) == []
    assert simulated(Balance([6, 6], np.zeros(2)), [6, 6], [1.0, 1.1], 1000, 0) == []


def test_layers_rest_after_a_move() -> None:
    balance = Balance([6, 6], np.zeros(2))
    assert simulated(balance, [6, 6], [1.0, 3.0], ENOUGH, 0) == [[9, 3]]
    assert simulated(balance, [9, 3], [3.0, 1.0], int(PAYS_WITHIN) - 1, ENOUGH) == []
    assert len(simulated(balance, [9, 3], [3.0, 1.0], ENOUGH, ENOUGH + PAYS_WITHIN)) == 1


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny map with twelve layers, and its checkpoint."""
    folder = tmp_path_factory.mktemp("deep")
    small = {name: array / 10 for name, array in tensors(12, 64, 96).items()}
    save_file(small, folder / "model.safetensors")
    config = {**CONFIG, "num_layers": 12, "hidden_size": 64, "vocab_size": 96}
    (folder / "config.json").write_text(json.dumps(config))
    return {"model": tiny_map(folder), "weights": folder}


def open_model(deep: dict[str, Path], **options: Any) -> LLM:
    return labinfer.load(
        **deep, devices="reference,reference:1", transport="shm", rebalance=True, max_model_len=256, **options
    )


@pytest.fixture(scope="module")
def answers(deep: dict[str, Path]) -> list[list[int]]:
    """What one device answers to ``PROMPTS``."""
    with labinfer.load(**deep, devices="reference", max_model_len=256) as model:
        return [list(answer.token_ids) for answer in model.generate(PROMPTS, LONG)]


def layers_of(model: LLM) -> list[int]:
    return [len(stage.layers) for stage in model.plan.stages]


@contextmanager
def slowed(model: LLM, stage: int) -> Iterator[None]:
    """Within the context, the process of ``stage`` is stopped most of the time, whichever process that is by then."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            assert model.pipeline is not None
            assert isinstance(model.pipeline.workers, StageProcesses)
            with suppress(ProcessLookupError, IndexError):
                pid = model.pipeline.workers.stages[stage].process.pid
                os.kill(pid, signal.SIGSTOP)
                over.wait(0.02)
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.005)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.alone
def test_a_slow_stage_gives_layers_away_once_and_tokens_stay(deep: dict[str, Path], answers: list[list[int]]) -> None:
    with open_model(deep) as model:
        engine, seen = model.engine, []
        with slowed(model, 1):
            requests = [engine.add(Request(prompt, LONG)) for prompt in PROMPTS]
            while not all(request.finished for request in requests):
                engine.step()
                seen.append(tuple(layers_of(model)))
        assert [request.generated for request in requests] == answers
        before, after = dict.fromkeys(seen)
        assert before == (6, 6)
        assert after[0] > 6
        assert sum(after) == 12
        assert {grant.device: grant.nbytes for grant in model.manager.grants.given} == {
            stage.device: stage.bytes.total for stage in model.plan.stages
        }
        assert model.blocks.usage == 0


def test_layers_that_do_not_start_elsewhere_go_back(
    deep: dict[str, Path], answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Balance, "observe", lambda *_: None)  # other work on the machine must not move more
    with open_model(deep) as model:
        engine, plan = model.engine, model.plan
        requests = [engine.add(Request(prompt, LONG)) for prompt in PROMPTS]
        for _ in range(20):
            engine.step()
        assert isinstance(model.fleet, BalancedFleet)
        model.fleet.better = model.moved(plan, [7, 5])
        model.fleet.better.weights[-1].tensor = "nowhere"
        engine.finish(requests)
        assert [request.generated for request in requests] == answers
        assert model.plan is plan


def test_layers_stay_where_a_quota_has_no_room_for_more(deep: dict[str, Path]) -> None:
    with closing(Manager()) as manager, open_model(deep, manager=manager) as model:
        manager.quotas["reference"] = model.plan.stages[0].bytes.total
        before = list(manager.grants.given)
        with pytest.raises(DoesNotFit, match="quota"):
            model.moved(model.plan, [7, 5])
        assert manager.grants.given == before


@pytest.mark.parametrize("name", ["llama-odd_heads_tied", "gemma3_text-linear_global", "mixtral-window"])
def test_a_plan_is_made_again_with_the_same_limits(name: str) -> None:
    plan = labinfer.compile(GOLDEN / name, devices="reference,reference:1", max_num_seqs=3, kv_dtype="f32")
    again = with_layers(plan, [len(stage.layers) for stage in plan.stages], GOLDEN / name)
    assert again == plan


@pytest.mark.parametrize(("options", "message"), [
    ({"transport": "local"}, "between the processes"),
    ({"transport": None}, "between the processes"),
    ({"transport": "shm", "fuse": "all"}, "cannot be moved"),
    ({"transport": "shm", "streamed_layers": 1}, "cannot be moved"),
    ({"transport": "shm", "tensor_parallel_size": 2}, "cannot be moved"),
])  # fmt: skip
def test_layers_that_cannot_move_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        labinfer.load(GOLDEN / "llama-odd_heads_tied", devices="reference,reference:1", rebalance=True, **options)
