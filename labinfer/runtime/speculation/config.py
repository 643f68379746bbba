"""What may be asked of speculation, under the names that vLLM uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from labinfer.errors import UsageError, did_you_mean

Method = Literal["ngram", "draft_model"]

MAX_TOKENS = 64
"""More guesses than this are never right together often enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are guessed: at most ``num_speculative_tokens`` of each sequence a step.

    ``ngram`` looks the last ``prompt_lookup_max`` tokens up in the text so far, then fewer of them, down to
    ``prompt_lookup_min``. ``draft_model`` asks ``model``, a smaller one with the same vocabulary: whatever ``LLM``
    takes. Without ``method``, a ``model`` decides. Raises ``UsageError`` for what cannot be.
    """

    method: Method | None = None
    model: Any = None
    num_speculative_tokens: int = 4
    prompt_lookup_max: int = 5
    prompt_lookup_min: int = 3

    def __post_init__(self) -> None:
        if self.method is None:
            object.__setattr__(self, "method", "ngram" if self.model is None else "draft_model")
        wrong = []
        if self.method not in get_args(Method):
            wrong.append(f"method must be one of {', '.join(get_args(Method))}, got {self.method!r}")
        elif (self.method == "draft_model") != (self.model is not None):
            wrong.append("draft_model needs a model" if self.model is None else "ngram takes no model")
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_TOKENS:
                wrong.append(f"{name} must be a whole number from 1 to {MAX_TOKENS}, got {value!r}")
        if not wrong and self.prompt_lookup_min > self.prompt_lookup_max:
            wrong.append("prompt_lookup_min must be at most prompt_lookup_max")
        if wrong:
            raise UsageError("speculation.config", "; ".join(wrong))

    @classmethod
    def of(cls, given: SpeculativeConfig | Mapping[str, Any]) -> SpeculativeConfig:
        """``given``, which may be a mapping as in vLLM."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            message = f"speculative_config must be a SpeculativeConfig or a mapping, got {given!r}"
            raise UsageError("speculation.config", message)
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                message = f"there is no speculative option '{name}'"
                raise UsageError("speculation.config", message, remedy=did_you_mean(str(name), known))
        return cls(**given)
