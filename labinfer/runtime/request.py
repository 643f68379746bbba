"""A request, the sequences that answer it, and how long everything took."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from labinfer.errors import LabinferError
from labinfer.ops.base import NO_ADAPTER
from labinfer.runtime.sampling import AnswerText, Logprob, SamplingParams, SamplingRules, SamplingState

if TYPE_CHECKING:
    from labinfer.runtime.batch import Batch
    from labinfer.runtime.engine import Engine
    from labinfer.runtime.lora import LoRARequest
    from labinfer.runtime.swap import SwappedRow


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request in seconds of ``time.perf_counter``, None for what has not happened yet, and counts.

    ``num_cached_tokens`` of the prompt were found in the prefix cache.
    """

    arrival_time: float = field(default_factory=time.perf_counter)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_generation_tokens: int = 0

    @property
    def queue_seconds(self) -> float | None:
        """From arrival to the first step with a part of it."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def first_token_seconds(self) -> float | None:
        """From arrival to the first token (TTFT)."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def seconds(self) -> float | None:
        """From arrival to the end."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time

    @property
    def inter_token_seconds(self) -> float | None:
        """The mean time from token to token, of a request with one sequence."""
        if self.finished_time is None or self.first_token_time is None or self.num_generation_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (self.num_generation_tokens - 1)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    """A prompt of token ids and what is wanted of it.

    Of two waiting requests the one with the smaller ``priority`` goes first, then the one that came first.
    ``cache_salt`` keeps its cached prefix apart from requests with another one. ``capture`` names values of the plan,
    such as ``layers.3.attn.out``, whose rows for the request's tokens are wanted. ``interactive`` says that somebody
    waits for each token. ``listener(sequence)`` is called after every token; without one, text is made at the end only.
    ``lora`` is the adapter that it runs with. ``moved_to`` is the engine that took it over from the one it was sent to.
    """

    prompt: Listing[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    cache_salt: str = ""
    capture: Listing[str] = ()
    interactive: bool = False
    listener: Callable[[Sequence], None] | None = None
    text: str | None = None
    lora: LoRARequest | None = None
    number: int = -1
    seed: int = 0
    rules: SamplingRules = field(init=False)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    sequences: list[Sequence] = field(default_factory=list)
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: LabinferError | None = None
    moved_to: Engine | None = None

    @property
    def computes_all(self) -> bool:
        """Whether something is wanted of every token of the prompt, so that none may be taken from the cache."""
        return bool(self.capture) or self.params.prompt_logprobs is not None

    @property
    def num_made(self) -> int:
        """How many answers are made; ``n`` of them are given back."""
        return self.params.best_of or self.params.n

    @property
    def finished(self) -> bool:
        """Whether nothing more will be made for it."""
        return bool(self.sequences) and all(each.done for each in self.sequences)

    @property
    def generated(self) -> list[int]:
        """Tokens made for its first sequence."""
        return self.sequences[0].generated


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer of a request. While it runs its tokens are those of its ``row`` of ``batch``, else ``saved``.

    ``owner`` is its request, kept by whoever runs it: a cycle would outlive its last user until garbage is collected.

    ``finish_reason`` is ``stop``, ``length``, ``abort`` or ``error``; ``stop_reason`` the token or text it stopped at.
    ``state`` is None where the likeliest token is all that is wanted. ``told`` are the tokens, and ``pieces`` the text,
    that have been told; once ``done`` there is nothing more to tell. Its last token may not belong to the text
    (``ends_in_text``). While it waits after preemption, ``swapped`` are its blocks in host memory, with
    ``num_computed`` tokens. ``captured`` are rows of values by name and position. ``adapter`` is a slot that it
    holds while it has a row.
    """

    owner: weakref.ref[Request]
    index: int
    batch: Batch
    saved: np.ndarray
    row: int = -1
    state: SamplingState | None = None
    answer: AnswerText | None = None
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    ends_in_text: bool = True
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    told: list[int] = field(default_factory=list)
    done: bool = False
    swapped: SwappedRow | None = None
    num_computed: int = 0
    adapter: int = NO_ADAPTER
    captured: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    @property
    def request(self) -> Request:
        """Whose answer it is; ``ReferenceError`` for one that has ended and that nobody has kept."""
        request = self.owner()
        if request is None:
            raise ReferenceError("the request of this sequence is gone: keep the request, which has its sequences")
        return request

    @property
    def heard(self) -> bool:
        """Whether each of its tokens is told at once: somebody listens, or its text may end it."""
        return self.request.listener is not None or bool(self.request.params.stop)

    @property
    def watched(self) -> bool:
        """Whether each of its tokens is looked at: the first too, and those that its sampling depends on."""
        unseen = len(self.token_ids) == len(self.request.prompt)
        return unseen or self.heard or self.state is not None or bool(self.request.params.stop_token_ids)

    @property
    def token_ids(self) -> np.ndarray:
        """Prompt and answer, int32."""
        return self.saved if self.row < 0 else self.batch.tokens(self.row)

    @property
    def text(self) -> str:
        """Text of the answer, as far as it was told."""
        return "".join(self.pieces)

    @property
    def generated(self) -> list[int]:
        """Tokens of the answer, as far as they were told: all of them once it is done."""
        return self.generated_after(0)

    def generated_after(self, count: int) -> list[int]:
        """``generated`` without the first ``count`` tokens."""
        if self.done and not self.heard:
            made: list[int] = self.saved[len(self.request.prompt) + count :].tolist()
            return made
        return self.told[count:]
