"""When two implementations agree: the tolerance, and the runs of a labinfer model that are held against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import labinfer

TOLERANCE = 2e-5


def assert_agree(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Float32 logits of the same shape, apart by at most 2e-5 of the largest expected logit."""
    assert actual.dtype == np.float32, f"{what}: dtype {actual.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    error = np.abs(actual.astype(np.float64) - expected)
    relative = float(error.max() / np.abs(expected).max())
    row, token = (int(index) for index in np.unravel_index(error.argmax(), error.shape))
    assert relative <= TOLERANCE, f"{what}: off by {relative:.1e} of the largest logit, at row {row}, token {token}"


def assert_model_agrees(
    folder: Path, prompt: list[int], generated: list[int], prompt_logits: np.ndarray, step_logits: np.ndarray
) -> None:
    """Every position of the prompt at once, then the prompt and each decode step on a cache, then greedy generation."""
    model = labinfer.load(folder)
    assert_agree(model.logits(prompt), prompt_logits, "prompt")
    session = model.session()
    assert_agree(session.append(prompt), prompt_logits, "prefill")
    for step, (token, expected) in enumerate(zip(generated, step_logits, strict=False)):
        assert_agree(session.append([token]), expected[np.newaxis], f"decode step {step}")
    assert greedy(folder, prompt, len(step_logits)) == generated[: len(step_logits)]


def greedy(folder: Path, prompt: list[int], max_tokens: int, **engine: Any) -> list[int]:
    """The greedy continuation of one prompt by the engine."""
    sampling = labinfer.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return list(labinfer.LLM(folder, **engine).generate([prompt], sampling)[0].token_ids)
