"""Make the golden checkpoints and logits that `make test` checks without torch.

Run from the repository root with the test-hf extra installed: ``python -m tests.golden.make_golden``. Each case becomes
a folder with the checkpoint as save_pretrained writes it and expected.npz with what transformers computes from it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from ..hf import make_checkpoint
from ..hf.families import GOLDEN_CASES

_FOLDER = Path(__file__).parent
_SHARDED = {"mistral-window": "16KB"}
_BFLOAT16 = ("qwen2-window",)
_SIZE_LIMIT = 2_500_000


def main() -> None:
    """Write every golden case afresh."""
    for old in _FOLDER.glob("*/expected.npz"):
        shutil.rmtree(old.parent)
    for case in GOLDEN_CASES:
        folder = _FOLDER / case.id
        dtype = torch.bfloat16 if case.id in _BFLOAT16 else torch.float16
        model = make_checkpoint.make_model(case, dtype)
        make_checkpoint.save(model, folder, dtype, _SHARDED.get(case.id))
        (folder / "generation_config.json").unlink(missing_ok=True)
        reference = make_checkpoint.evaluate(case, model)
        np.savez_compressed(
            folder / "expected.npz",
            prompt=np.array(reference.prompt, np.int32),
            generated=np.array(reference.generated, np.int32),
            prompt_logits=reference.prompt_logits,
            step_logits=reference.step_logits,
        )
    size = sum(file.stat().st_size for file in _FOLDER.rglob("*") if file.is_file())
    assert size <= _SIZE_LIMIT, f"{size} bytes of golden files: over {_SIZE_LIMIT}"
    print(f"{len(GOLDEN_CASES)} cases, {size} bytes")


if __name__ == "__main__":
    main()
