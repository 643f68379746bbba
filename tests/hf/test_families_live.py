"""Every family against Hugging Face transformers, live: random tiny checkpoints, float32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import labinfer

pytest.importorskip("torch", reason="the live comparison needs torch")
pytest.importorskip("transformers", reason="the live comparison needs transformers")

import torch
from transformers import AutoModelForCausalLM

from . import make_checkpoint
from .agreement import assert_agree, assert_model_agrees
from .families import CASES, Case

_LLAMA = next(case for case in CASES if case.id == "llama-odd_heads_tied")


class Checkpoint(NamedTuple):
    folder: Path
    reference: make_checkpoint.Reference


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.id)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    case: Case = request.param
    folder = tmp_path_factory.mktemp(case.id)
    model = make_checkpoint.make_model(case)
    make_checkpoint.save(model, folder)
    return Checkpoint(folder, make_checkpoint.evaluate(case, model))


def test_prompt_decode_and_greedy(checkpoint: Checkpoint) -> None:
    reference = checkpoint.reference
    assert_model_agrees(
        checkpoint.folder, reference.prompt, reference.generated, reference.prompt_logits, reference.step_logits
    )


def test_whole_sequence_afresh(checkpoint: Checkpoint) -> None:
    reference = checkpoint.reference
    whole = reference.prompt + reference.generated[:-1]
    assert_agree(labinfer.load(checkpoint.folder).logits(whole), reference.full_logits, "whole sequence")


def test_config_as_on_the_hub(checkpoint: Checkpoint, tmp_path: Path) -> None:
    hub = make_checkpoint.hub_copy(checkpoint.folder, tmp_path)
    prompt = checkpoint.reference.prompt
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(hub, attn_implementation="eager", dtype=torch.float32).eval()
        assert_agree(loaded(torch.tensor([prompt])).logits[0].numpy(), checkpoint.reference.prompt_logits, "oracle")
    np.testing.assert_array_equal(labinfer.load(hub).logits(prompt), labinfer.load(checkpoint.folder).logits(prompt))


@pytest.mark.parametrize(("dtype", "shard"), [("float32", "40KB"), ("bfloat16", None), ("float16", None)])
def test_stored_forms(dtype: str, shard: str | None, tmp_path: Path) -> None:
    stored = getattr(torch, dtype)
    model = make_checkpoint.make_model(_LLAMA, stored)
    make_checkpoint.save(model, tmp_path, stored, shard)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert (len(list(tmp_path.glob("model-*.safetensors"))) > 1) == (shard is not None)
    reference = make_checkpoint.evaluate(_LLAMA, model)
    assert_model_agrees(tmp_path, reference.prompt, reference.generated, reference.prompt_logits, reference.step_logits)
