"""Beam search against Hugging Face's, on random tiny models."""

from pathlib import Path

import numpy as np
import pytest

import labinfer
from labinfer import BeamSearchParams

pytest.importorskip("torch", reason="the live comparison needs torch")
pytest.importorskip("transformers", reason="the live comparison needs transformers")

import torch

from . import make_checkpoint
from .families import CASES

FAMILIES = [case for case in CASES if case.id in ("llama-plain", "gemma2-odd_heads", "gpt2-untied_inner")]
PROMPTS = [[5, 6, 7], [9] * 12, list(range(30, 50))]
LENGTH = 9
SEARCHES = [(1, 1.0, []), (4, 1.0, []), (3, 0.0, [2]), (4, 1.0, [*range(0, 128, 9)]), (5, 2.0, [*range(0, 128, 5)]),
            (4, -1.0, [*range(0, 128, 9)])]  # fmt: skip
"""Width, length penalty, and the tokens that end a text."""


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.id)
def test_beams_and_their_scores(case: make_checkpoint.Case, tmp_path: Path) -> None:
    reference = make_checkpoint.make_model(case)
    make_checkpoint.save(reference, tmp_path)
    ended = 0
    with labinfer.load(tmp_path, block_size=4) as model:
        for width, penalty, ends in SEARCHES:
            model.engine.eos_ids = frozenset(ends)
            outputs = model.beam_search(PROMPTS, BeamSearchParams(width, LENGTH, length_penalty=penalty))
            for prompt, output in zip(PROMPTS, outputs, strict=True):
                with torch.no_grad():
                    found = reference.generate(
                        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), num_beams=width,
                        num_return_sequences=width, max_new_tokens=LENGTH, length_penalty=penalty, do_sample=False,
                        early_stopping="never", eos_token_id=ends or None, pad_token_id=0,
                        output_scores=True, return_dict_in_generate=True,
                    )  # fmt: skip
                for answer, tokens in zip(output.sequences, found.sequences.tolist(), strict=True):
                    assert answer.tokens == tokens[: len(answer.tokens)]
                    assert not any(tokens[len(answer.tokens) :])  # padding
                if width > 1:  # greedy search has no scores
                    scores = [answer.score for answer in output.sequences]
                    np.testing.assert_allclose(scores, found.sequences_scores.numpy(), rtol=1e-4)
                ended += sum(answer.finish_reason == "stop" for answer in output.sequences)
    assert ended
