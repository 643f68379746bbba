"""Models of tests/golden against what transformers says of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

import labinfer
from labinfer.llm import LLM

from .hf.agreement import assert_agree
from .tiny import GOLDEN


@cache
def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / name / "expected.npz") as expected:
        return dict(expected)


def assert_golden(model: LLM, name: str) -> None:
    """Logits of every position within the tolerance of one device, and the same tokens."""
    expected, prompt = golden(name), golden(name)["prompt"].tolist()
    assert_agree(model.logits(prompt), expected["prompt_logits"], name)
    steps = len(expected["step_logits"])
    greedy = labinfer.SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    [answer] = model.generate([prompt], greedy)
    assert list(answer.token_ids) == expected["generated"].tolist()[:steps]
