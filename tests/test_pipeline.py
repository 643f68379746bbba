"""Stages in threads and processes: the tokens of one device, values crossing stages, and errors of a step."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labinfer
from labinfer.errors import LabinferError, UsageError
from labinfer.llm import LLM
from labinfer.runtime.pipeline.message import FAILED, FETCH, LOGITS, TOKENS
from labinfer.runtime.pipeline.process import StageDied
from labinfer.runtime.pipeline.transport import TRANSPORTS
from labinfer.runtime.pipeline.workers import StageThreads

from .choosing import choosing
from .tiny import GOLDEN

# One per mechanism that a cut between stages could break: windows, experts, latent cache, learned positions, tied ends.
FAMILIES = ("llama-odd_heads_tied", "gemma3_text-linear_global", "mixtral-window", "gpt2-untied_inner",
            "phi3-longrope_crossed", "deepseek_v2-group_limited")  # fmt: skip
DEVICES = "reference,reference:1,reference:2"
STEPS = 12
GREEDY = labinfer.SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)


@cache
def prompts(name: str) -> list[list[int]]:
    """The golden prompt and three others."""
    rng = np.random.default_rng(7)
    with np.load(GOLDEN / name / "expected.npz") as expected:
        return [expected["prompt"].tolist(), *(rng.integers(0, 96, length).tolist() for length in (1, 17, 40))]


@cache
def on_one_device(name: str) -> list[list[int]]:
    """Tokens of the four prompts; the first are the golden ones."""
    with np.load(GOLDEN / name / "expected.npz") as expected:
        golden = expected["generated"].tolist()[:STEPS]
    with labinfer.load(GOLDEN / name, devices="reference") as model:
        tokens = greedy(model, prompts(name))
    assert tokens[0] == golden
    return tokens


def greedy(model: LLM, given: list[list[int]]) -> list[list[int]]:
    return [list(answer.token_ids) for answer in model.generate(given, GREEDY)]


def open_model(name: str, transport: str, devices: str = DEVICES, **options: Any) -> LLM:
    return labinfer.load(GOLDEN / name, devices=devices, transport=transport, **options)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("devices", ["reference", "reference,reference:1", DEVICES])
def test_tokens_are_those_of_one_device(name: str, devices: str) -> None:
    layers = len(labinfer.compile(GOLDEN / name, devices=devices).stages)
    assert layers == devices.count(",") + 1 or layers == 2  # some have two layers
    with open_model(name, "local", devices, max_num_batched_tokens=24) as model:
        assert greedy(model, prompts(name)) == on_one_device(name)
        assert model.blocks.usage == 0
        model.blocks.check_integrity()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 2}])
def test_a_request_that_is_alone_has_the_tokens_of_one_device(name: str, params: dict[str, Any]) -> None:
    """No other group has anything to compute then, and the last step of all is one of its group."""
    asked = labinfer.SamplingParams(**{"temperature": 0, "max_tokens": STEPS, "ignore_eos": True} | params)
    found = []
    for devices, transport in (("reference", None), ("reference,reference:1", "local")):
        with labinfer.load(GOLDEN / name, devices=devices, transport=transport) as model:
            found.append([answer.token_ids for each in prompts(name) for answer in model.generate([each], asked)])
    assert found[0] == found[1]


def test_a_last_device_that_chooses_tokens_takes_the_likeliest() -> None:
    """Those that are not simply the likeliest the engine still chooses."""
    name = FAMILIES[0]
    drawn = labinfer.SamplingParams(temperature=1.0, seed=2, max_tokens=STEPS, ignore_eos=True)
    with open_model(name, "local") as model:
        expected = [answer.token_ids for answer in model.generate(prompts(name), drawn)]
    likeliest = on_one_device(name)
    with choosing() as samplers, open_model(name, "local") as model:
        assert greedy(model, prompts(name)) == likeliest
        [sampler] = samplers
        assert sampler.chosen >= STEPS * len(prompts(name))
        assert [answer.token_ids for answer in model.generate(prompts(name), drawn)] == expected


@pytest.mark.parametrize("transport", [None, "local"])
def test_rows_that_fill_a_step_up_spoil_no_cache(transport: str | None) -> None:
    """Devices that fill decode steps up do so on the first stage only: later ones get no values for such rows."""
    name = FAMILIES[0]
    drawn = labinfer.SamplingParams(temperature=1.0, seed=2, max_tokens=STEPS, ignore_eos=True)
    found = []
    ways: list[AbstractContextManager[Any]] = [nullcontext(), choosing()]
    for filling in ways:
        with filling, labinfer.load(GOLDEN / name, devices=DEVICES, transport=transport) as model:
            found.append([answer.token_ids for answer in model.generate(prompts(name), drawn)])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama-odd_heads_tied", "gemma3_text-linear_global"])
@pytest.mark.parametrize("transport", [each for each in TRANSPORTS if each != "local"])
def test_tokens_over_processes(name: str, transport: str) -> None:
    with open_model(name, transport) as model:
        assert greedy(model, prompts(name)) == on_one_device(name)
        logits = model.logits(prompts(name)[0])
    with labinfer.load(GOLDEN / name, devices=DEVICES) as model:
        np.testing.assert_array_equal(logits, model.logits(prompts(name)[0]))


def test_values_can_be_seen_in_threads_only() -> None:
    with open_model(FAMILIES[0], "local") as model:
        seen: list[np.ndarray] = []
        [name] = model.interpreters[1].stage.outputs[:1]
        with model.listen(name, seen.append):
            model.logits([1, 2, 3])
        assert seen[0].shape[0] == 3
    with open_model(FAMILIES[0], "shm") as model, pytest.raises(UsageError, match="other processes"):
        model.listen(name, seen.append).__enter__()


@pytest.mark.parametrize("error", [LabinferError("device.lost", "the device is gone"), ValueError("no such place")])
def test_a_block_that_a_thread_cannot_move_ends_what_waits(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads cannot be started anew: whoever asks for anything from then on is told so."""
    told, arrived = list[np.ndarray | None](), threading.Event()

    def tell(place: int, content: np.ndarray | None) -> None:
        told.append(content)
        arrived.set()

    def fail(*_: object) -> None:
        raise error

    with open_model(FAMILIES[0], "local") as model:
        greedy(model, prompts(FAMILIES[0]))
        monkeypatch.setattr(model.stages[1].cache, "read", fail)
        assert model.pipeline is not None
        model.pipeline.fetch([(0, 1)], tell)
        assert arrived.wait(60)
        assert told == [None]
        with pytest.raises(LabinferError, match=f"stage 1 has failed: .*{error.args[0]}") as caught:
            greedy(model, prompts(FAMILIES[0]))
        assert caught.value.remedy == "load the model again"
        assert model.blocks.usage == 0


@pytest.mark.parametrize(("kind", "sections"), [(TOKENS, [4]), (LOGITS, [4, 48, 8]), (FAILED, [2]), (FETCH, [8, 8])])
def test_what_is_no_result_ends_what_waits(kind: int, sections: list[int]) -> None:
    with open_model(FAMILIES[0], "local") as model:
        assert model.pipeline is not None
        assert isinstance(model.pipeline.workers, StageThreads)
        [last] = model.pipeline.workers.links[-1].outbound
        last.send(kind, 5, [memoryview(bytearray(size)) for size in sections])
        with pytest.raises(LabinferError):
            model.pipeline.wait(5)


def test_why_a_process_cannot_move_a_block_is_told() -> None:
    with open_model(FAMILIES[0], "shm") as model:
        assert model.pipeline is not None
        model.pipeline.send(FETCH, 7, [np.zeros(1, np.int32)])  # which is no block
        with pytest.raises(StageDied, match=r"stage 0 \(reference\) died: a block arrived that has no number"):
            model.pipeline.wait(99)
        assert greedy(model, prompts(FAMILIES[0])) == on_one_device(FAMILIES[0])


def test_an_unknown_transport_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no transport 'smh'") as error:
        open_model(FAMILIES[0], "smh")
    assert error.value.remedy == "did you mean 'shm'?"
