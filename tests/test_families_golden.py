"""Every family against logits that transformers computed once (tests/golden/make_golden.py): no torch needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .hf.agreement import assert_model_agrees

_FOLDERS = sorted(expected.parent for expected in (Path(__file__).parent / "golden").glob("*/expected.npz"))
_FAMILIES = {
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3", "gemma2", "gemma3_text"),
    *("olmo2", "starcoder2", "gpt2", "gpt_neox", "deepseek_v2"),
}


def test_every_family_has_a_golden_case() -> None:
    assert {folder.name.partition("-")[0] for folder in _FOLDERS} == _FAMILIES


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: folder.name)
def test_golden(folder: Path) -> None:
    with np.load(folder / "expected.npz") as expected:
        assert_model_agrees(
            folder,
            expected["prompt"].tolist(),
            expected["generated"].tolist(),
            expected["prompt_logits"],
            expected["step_logits"],
        )
