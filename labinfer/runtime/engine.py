"""The engine loop: schedule, run, postprocess."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from labinfer.errors import LabinferError, UsageError
from labinfer.runtime.lora import LoRARequest
from labinfer.runtime.model import Model
from labinfer.runtime.sampler import sample
from labinfer.runtime.sampling_params import SamplingParams
from labinfer.runtime.scheduler import Request, Scheduler


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token just made for a request; ``finish_reason`` is ``stop`` or ``length`` with the last one."""

    request: Request
    token_id: int
    finish_reason: str | None


class Engine:
    """Runs requests on a model, many in each step. ``eos_ids`` are the tokens that end a text."""

    def __init__(self, model: Model, eos_ids: Iterable[int] = ()) -> None:
        self.model, self.eos_ids = model, frozenset(eos_ids)
        self.scheduler = Scheduler(model)
        self.numbers = count()

    def add(self, prompt: Sequence[int], params: SamplingParams, lora: LoRARequest | None = None) -> Request:
        """Queue a prompt of token ids, to run with adapter ``lora``; one that can never run is an error at once."""
        tokens = self.model.check_tokens(prompt)
        if not tokens:
            raise UsageError("run.empty-prompt", "the prompt has no tokens")
        if len(tokens) >= self.model.max_len:
            message = f"a prompt of {len(tokens)} tokens leaves no room in a context of {self.model.max_len}"
            raise UsageError("run.too-long", message, remedy="compile with a larger --max-model-len")
        if lora:
            self.model.adapters.check(lora)
        request = Request(next(self.numbers), tokens, params, lora)
        self.scheduler.add(request)
        return request

    def step(self) -> list[NewToken]:
        """Compute one step; the tokens it made."""
        parts = self.scheduler.schedule()
        if not parts:
            raise LabinferError("run.cache-full", "no cache blocks or adapter slots are left: sessions hold them all")
        logits = self.model.compute([part for _, part in parts])
        device_draw = self.model.interpreters[-1].device.draw
        made, row = [], 0
        for request, part in parts:
            if part.num_rows:
                made.append(self.postprocess(request, sample(logits[row], request.params, request.random, device_draw)))
                row += 1
        return made

    def postprocess(self, request: Request, token: int) -> NewToken:
        """Append ``token`` to its sequence and finish the request where that ends it."""
        sequence, params = request.sequence, request.params
        before = len(sequence.token_ids)
        sequence.token_ids.append(token)
        if self.model.must_recompute(sequence, before):
            self.model.blocks.release(sequence.row)
            sequence.num_computed = 0
        reason = None
        if token in params.stop_token_ids or (token in self.eos_ids and not params.ignore_eos):
            reason = "stop"
        elif len(request.generated) == params.max_tokens or before + 1 >= self.model.max_len:
            reason = "length"
        if reason:
            self.scheduler.finish(request, reason)
        return NewToken(request, token, reason)

    def run(self) -> Iterator[NewToken]:
        """Step until every request is done; each token as it is made."""
        while self.scheduler.waiting or self.scheduler.running:
            yield from self.step()

    def abort(self) -> None:
        """Drop every request that is not done."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.finish(request, "abort")
