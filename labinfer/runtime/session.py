"""One sequence that its user computes piece by piece, outside the engine's requests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from labinfer.errors import UsageError
from labinfer.ops.base import NO_ADAPTER
from labinfer.runtime.batch import part_of
from labinfer.runtime.interrupts import interrupts_held
from labinfer.runtime.lora import LoRARequest

if TYPE_CHECKING:
    from labinfer.runtime.model import Model


class Session:
    """One sequence that is computed piece by piece; a context manager, since it owns cache blocks."""

    def __init__(self, model: Model, lora_request: LoRARequest | None = None) -> None:
        self.model, self.row, self.adapter = model, -1, NO_ADAPTER
        if lora_request:
            model.adapters.check(lora_request)
        with interrupts_held(), model.lock:
            if not model.adapters.give(self, lora_request):
                raise UsageError("lora.no-slot", f"no slot is free for adapter '{lora_request and lora_request.name}'")
            self.row = model.batch.add([])
            model.batch.adapter[self.row] = self.adapter

    def append(self, token_ids: Iterable[int]) -> np.ndarray:
        """Add tokens and compute them in as many steps as it takes: float32 logits [len(token_ids), vocab_size]."""
        model, batch, row = self.model, self.model.batch, self.row
        if row < 0:
            raise UsageError("run.closed", "the session is closed")
        tokens, limits = model.check_tokens(token_ids), model.plan.limits
        result = np.empty((len(tokens), model.vocab_size), np.float32)
        with interrupts_held() as check, model.lock:
            model.mend()
            before = int(batch.num_tokens[row])
            length = before + len(tokens)
            if length > model.max_len:
                message = f"{length} tokens are more than the {model.max_len} the plan has room for"
                raise UsageError("run.too-long", message, remedy="compile with a larger --max-model-len")
            if not batch.blocks.fits(row, length):
                raise UsageError("run.cache-full", f"no cache blocks are left for {length} tokens")
            batch.extend(row, tokens)
            while (start := int(batch.num_computed[row])) < length:
                wanted = start >= before
                size = min(limits.max_num_batched_tokens, limits.max_logits_rows if wanted else before - start)
                size = min(size, length - start)
                logits = model.compute(part_of(row, size, size if wanted else 0))
                if wanted:
                    result[start - before : start - before + size] = logits
                check()
        return result

    def close(self) -> None:
        """Give the cache blocks and the adapter back; the session cannot be used any more."""
        with interrupts_held(), self.model.lock:
            if self.row >= 0:
                self.model.batch.remove(self.row)
                self.model.adapters.take(self)
            self.row = -1

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
