"""The engine loop: schedule, run, postprocess."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from secrets import randbits

from labinfer.errors import LabinferError, UsageError
from labinfer.runtime.model import Model
from labinfer.runtime.sampling import SamplingParams, SamplingRules, SamplingState, sample
from labinfer.runtime.scheduler import Request, Scheduler


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token just made for a request; ``finish_reason`` is ``stop`` or ``length`` with the last one.

    A token that only ends the answer is not ``in_text``.
    """

    request: Request
    token_id: int
    finish_reason: str | None
    in_text: bool


class Engine:
    """Runs requests on a model, many in each step. ``eos_ids`` are the tokens that end a text."""

    def __init__(self, model: Model, eos_ids: Iterable[int] = ()) -> None:
        self.model, self.eos_ids = model, frozenset(eos_ids)
        self.scheduler = Scheduler(model)
        self.numbers = count()

    def add(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Queue a prompt of token ids; one that can never fit is a ``UsageError``."""
        tokens = self.model.check_tokens(prompt)
        if not tokens:
            raise UsageError("run.empty-prompt", "the prompt has no tokens")
        if len(tokens) >= self.model.max_len:
            message = f"a prompt of {len(tokens)} tokens leaves no room in a context of {self.model.max_len}"
            raise UsageError("run.too-long", message, remedy="compile with a larger --max-model-len")
        if params.n > 1 or (params.best_of or 1) > 1 or (params.logprobs, params.prompt_logprobs) != (None, None):
            raise UsageError("sampling.unsupported", "n, best_of, logprobs and prompt_logprobs are not supported yet")
        rules = SamplingRules(params, self.model.vocab_size, self.eos_ids, self.model.tokenizer)
        seed = randbits(64) if params.seed is None else params.seed
        request = Request(next(self.numbers), tokens, params, SamplingState(rules, seed, 0, tokens))
        self.scheduler.add(request)
        return request

    def step(self) -> list[NewToken]:
        """Compute one step; the tokens it made."""
        parts = self.scheduler.schedule()
        if not parts:
            raise LabinferError("run.cache-full", "no cache blocks are left: sessions hold them all")
        logits = self.model.compute([part for _, part in parts])
        ready = [request for request, part in parts if part.num_rows]
        states = {row: request.state for row, request in enumerate(ready) if not request.state.rules.plain}
        sampled = sample(logits, states, self.model.interpreters[-1].device.draw)
        for error in sampled.errors.values():
            raise error
        return [self.postprocess(*each) for each in zip(ready, sampled.tokens.tolist(), strict=True)]

    def postprocess(self, request: Request, token: int) -> NewToken:
        """Append ``token`` to its sequence and finish the request where that ends it."""
        sequence = request.sequence
        before = len(sequence.token_ids)
        sequence.token_ids.append(token)
        if self.model.must_recompute(sequence, before):
            self.model.blocks.release(sequence.row)
            sequence.num_computed = 0
        reason = None
        if stop := request.state.accept(token):
            reason = "stop"
        elif len(request.generated) == request.params.max_tokens or before + 1 >= self.model.max_len:
            reason = "length"
        if reason:
            self.scheduler.finish(request, reason)
        return NewToken(request, token, reason, stop is None or stop.in_text)

    def run(self) -> Iterator[NewToken]:
        """Step until every request is done; each token as it is made."""
        while self.scheduler.waiting or self.scheduler.running:
            yield from self.step()

    def abort(self) -> None:
        """Drop every request that is not done."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.finish(request, "abort")
