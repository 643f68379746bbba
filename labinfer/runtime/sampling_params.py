"""How the next token is chosen, per request, under the names vLLM uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from labinfer.errors import UsageError

_KINDS = {"temperature": Real, "top_p": Real, "top_k": Integral, "max_tokens": Integral, "seed": Integral}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 are off. ``seed`` makes a request repeatable.

    Generation ends at an end-of-text token (unless ``ignore_eos``, which goes on and bans nothing), at one of
    ``stop_token_ids``, after ``max_tokens`` (None: no limit), or at the plan's max_model_len.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name in ("max_tokens", "seed")):
                raise UsageError("sampling.params", f"{name} must be a number, got {value!r}")
        wrong = [
            (not self.temperature >= 0 or self.temperature == float("inf"), "temperature must be 0 or more"),
            (self.top_k < -1, "top_k must be 0 (off) or more"),
            (not 0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (self.max_tokens is not None and self.max_tokens < 1, "max_tokens must be 1 or more"),
            (self.seed is not None and self.seed < 0, "seed must be 0 or more"),
        ]
        if messages := [message for failed, message in wrong if failed]:
            raise UsageError("sampling.params", "; ".join(messages))
