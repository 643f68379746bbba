"""Greedy tokens do not depend on how the work is cut: chunked prefill, company in the batch, devices."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labinfer

_GOLDEN = Path(__file__).parent / "golden"
_FOLDERS = sorted(expected.parent for expected in _GOLDEN.glob("*/expected.npz"))
# One per mechanism that could leak between sequences or chunks: windows, experts, latent cache, learned positions.
_MIXED = [
    _GOLDEN / name
    for name in (
        "llama-llama3",
        "mistral-window",
        "gemma3_text-linear_global",
        "mixtral-window",
        "gpt_neox-serial",
        "gpt2-untied_inner",
        "phi3-longrope_crossed",
        "deepseek_v2-group_limited",
    )
]
_STEPS = 12
_ONE_DEVICE = "reference"
_TWO_DEVICES = "reference,reference:1"


@cache
def _expected(folder: Path) -> tuple[list[int], list[int]]:
    with np.load(folder / "expected.npz") as expected:
        return expected["prompt"].tolist(), expected["generated"].tolist()[:_STEPS]


def _greedy(folder: Path, prompts: list[list[int]], **engine: Any) -> list[list[int]]:
    sampling = labinfer.SamplingParams(temperature=0, max_tokens=_STEPS, ignore_eos=True)
    results = labinfer.LLM(folder, devices=engine.pop("devices", _ONE_DEVICE), **engine).generate(prompts, sampling)
    return [list(result.token_ids) for result in results]


@cache
def _alone(folder: Path) -> list[list[int]]:
    """What each of ``_others`` gets from a model of its own."""
    return [_greedy(folder, [other])[0] for other in _others(folder)]


def _others(folder: Path) -> list[list[int]]:
    """Seven other prompts of unequal lengths, one as short as a token."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, 96, length).tolist() for length in (1, 3, 17, 40, 33, 8, 25)]


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: folder.name)
def test_chunked_prefill(folder: Path, chunk: int) -> None:
    prompt, generated = _expected(folder)
    assert _greedy(folder, [prompt], max_num_batched_tokens=chunk) == [generated]


@pytest.mark.parametrize("chunk", [7, 64, 512])
@pytest.mark.parametrize("folder", _MIXED, ids=lambda folder: folder.name)
def test_beside_seven_others(folder: Path, chunk: int) -> None:
    prompt, generated = _expected(folder)
    others, alone = _others(folder), _alone(folder)
    together = _greedy(folder, [*others[:3], prompt, *others[3:]], max_num_batched_tokens=chunk)
    assert together == [*alone[:3], generated, *alone[3:]]


@pytest.mark.parametrize("folder", _MIXED, ids=lambda folder: folder.name)
def test_split_over_two_devices(folder: Path) -> None:
    prompt, generated = _expected(folder)
    assert [stage.device for stage in labinfer.compile(folder, devices=_TWO_DEVICES).stages] == _TWO_DEVICES.split(",")
    assert _greedy(folder, [prompt], devices=_TWO_DEVICES) == [generated]
    assert _greedy(folder, [*_others(folder), prompt], devices=_TWO_DEVICES)[-1] == generated


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("folder", _MIXED, ids=lambda folder: folder.name)
def test_session_in_chunks(folder: Path, chunk: int) -> None:
    prompt, generated = _expected(folder)
    model = labinfer.load(folder)
    whole = model.logits(prompt)
    session = model.session()
    pieces = [session.append(prompt[start : start + chunk]) for start in range(0, len(prompt), chunk)]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=2e-5 * np.abs(whole).max())
    assert int(pieces[-1][-1].argmax()) == generated[0]
