"""Adapters of requests through all that happens to a request: company, preemption, several answers, aborts, errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import labinfer
from labinfer import LoRARequest, SamplingParams
from labinfer.errors import LabinferError
from labinfer.llm import LLM
from labinfer.runtime.engine import Engine
from labinfer.runtime.request import Request

from .adapters import save_adapter
from .tiny import GOLDEN

LLAMA = GOLDEN / "llama-llama3"
PROMPTS = [[token] * 30 for token in range(1, 7)]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest | None]:
    """The adapter of each of ``PROMPTS``: one of three, or none."""
    folder = tmp_path_factory.mktemp("adapters")
    first, second, third = (LoRARequest(str(seed), save_adapter(folder / str(seed), LLAMA, seed)) for seed in range(3))
    return [first, None, second, first, third, second]


@pytest.fixture(scope="module")
def alone(wanted: list[LoRARequest | None]) -> list[list[int]]:
    """What each prompt gets with its adapter, greedy and then seeded, with nobody beside it."""
    with labinfer.LLM(LLAMA, max_loras=1, max_lora_rank=4) as llm:
        return [
            llm.generate([prompt], params, lora_request=lora)[0].token_ids
            for params in (GREEDY, SEEDED)
            for prompt, lora in zip(PROMPTS, wanted, strict=True)
        ]


def add_all(
    engine: Engine, wanted: list[LoRARequest | None], params: SamplingParams, priority: int = 0
) -> list[Request]:
    pairs = zip(PROMPTS, wanted, strict=True)
    return [engine.add(Request(prompt, params, priority, lora=lora)) for prompt, lora in pairs]


def assert_idle(llm: LLM) -> None:
    assert llm.blocks.usage == 0
    assert not any(slot.users for slot in llm.adapters.slots)
    llm.blocks.check_integrity()


@pytest.mark.parametrize("way", ["swap", "recompute"])
@pytest.mark.parametrize("overlap", ["0", "1"])
def test_preempted_requests_get_their_adapter_again(
    way: str, overlap: str, wanted: list[LoRARequest | None], alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABINFER_OVERLAP", overlap)
    room = {"num_blocks": 9, "max_num_seqs": 6, "swap_space": 0.01 if way == "swap" else 0}
    with labinfer.LLM(LLAMA, max_loras=2, max_lora_rank=4, **room) as llm:
        engine = llm.engine
        if way == "swap":
            engine.costs.prompt_seconds = lambda tokens: float("inf")  # type: ignore[method-assign]
        requests = add_all(engine, wanted, GREEDY)
        for _ in range(5):
            engine.step()
        requests += add_all(engine, wanted, SEEDED, priority=-1)
        engine.finish(requests)
        assert [request.generated for request in requests] == alone
        assert engine.scheduler.num_preemptions >= 2
        assert_idle(llm)


def test_all_answers_to_a_prompt_have_its_adapter(wanted: list[LoRARequest | None]) -> None:
    params = SamplingParams(temperature=1.5, n=4, seed=7, max_tokens=12, ignore_eos=True)
    for rows in (8, 2):  # all of them run at once, or two
        with labinfer.LLM(LLAMA, max_loras=2, max_lora_rank=4, max_num_seqs=rows) as llm:
            answers = llm.generate(PROMPTS, params, lora_request=wanted)
            singles = [
                [llm.generate([prompt], params, lora_request=lora)[0]]
                for prompt, lora in zip(PROMPTS, wanted, strict=True)
            ]
            for answer, [single] in zip(answers, singles, strict=True):
                assert [each.token_ids for each in answer.outputs] == [each.token_ids for each in single.outputs]
            [plain] = llm.generate([PROMPTS[0]], params)
            assert plain.outputs[1].token_ids != answers[0].outputs[1].token_ids
            assert_idle(llm)


@pytest.mark.parametrize("overlap", ["0", "1"])
def test_an_adapter_that_vanished_ends_only_its_request(
    overlap: str, wanted: list[LoRARequest | None], alone: list[list[int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LABINFER_OVERLAP", overlap)
    lost = LoRARequest("lost", save_adapter(tmp_path / "lost", LLAMA, 9))
    with labinfer.LLM(LLAMA, max_loras=2, max_lora_rank=4, max_num_seqs=4) as llm:
        engine = llm.engine
        requests = add_all(engine, wanted, GREEDY) + add_all(engine, wanted, SEEDED)
        doomed = [engine.add(Request(PROMPTS[0], GREEDY, -1, lora=lost)), engine.add(Request([1], SEEDED, lora=lost))]
        shutil.rmtree(lost.path)
        engine.finish([*requests, *doomed])
        assert [request.generated for request in requests] == alone
        for request in doomed:
            assert isinstance(request.error, LabinferError)
            assert (request.error.code, request.sequences[0].finish_reason) == ("lora.missing-file", "error")
        assert_idle(llm)


def test_aborts_give_slots_back(wanted: list[LoRARequest | None], alone: list[list[int]]) -> None:
    with labinfer.LLM(LLAMA, max_loras=1, max_lora_rank=4, max_num_batched_tokens=16) as llm:
        engine = llm.engine
        requests = add_all(engine, wanted, GREEDY) + add_all(engine, wanted, SEEDED)
        engine.step()
        assert llm.adapters.slots[0].users == 1  # the third waits for the slot, and the others behind it
        for request in requests[:6]:
            engine.abort(request)
        assert not llm.adapters.slots[0].users
        engine.finish(requests)
        assert [request.generated for request in requests[6:]] == alone[6:]
        assert_idle(llm)


def test_a_request_fails_where_sessions_hold_every_slot(
    wanted: list[LoRARequest | None], alone: list[list[int]]
) -> None:
    with labinfer.LLM(LLAMA, max_loras=1, max_lora_rank=4) as llm:
        with llm.session(wanted[0]) as session:
            with pytest.raises(LabinferError) as caught:
                llm.generate([PROMPTS[2]], GREEDY, lora_request=wanted[2])
            assert caught.value.code == "run.cache-full"
            assert session.append(PROMPTS[0]).shape == (30, llm.vocab_size)
        assert llm.generate([PROMPTS[2]], GREEDY, lora_request=wanted[2])[0].token_ids == alone[2]
        session.close()
        assert_idle(llm)


@pytest.fixture(scope="module")
def salted(wanted: list[LoRARequest | None]) -> Iterator[LLM]:
    with labinfer.LLM(LLAMA, max_loras=2, max_lora_rank=4) as llm:
        yield llm


def test_a_cache_salt_never_means_an_adapter(salted: LLM, wanted: list[LoRARequest | None]) -> None:
    prompt = list(range(50))
    engine, adapter = salted.engine, wanted[0]
    engine.finish([engine.add(Request(prompt, GREEDY, lora=adapter))])
    [fingerprint] = [slot.salt for slot in salted.adapters.slots if slot.salt]
    found = []
    for salt, lora in (
        (fingerprint, None),
        ("tenant", adapter),
        ("", adapter),
        ("tenant", adapter),
        (fingerprint, None),
    ):
        request = engine.add(Request(prompt, GREEDY, cache_salt=salt, lora=lora))
        engine.finish([request])
        found.append(request.metrics.num_cached_tokens)
    assert found == [0, 0, 48, 48, 48]
