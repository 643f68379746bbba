"""A model that is served, and what all of its requests share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from labinfer.errors import UsageError
from labinfer.llm import LLM
from labinfer.runtime.engine import Engine
from labinfer.runtime.lora import LoRARequest
from labinfer.runtime.replicas import Replicas
from labinfer.runtime.tokenizer import Tokenizer
from labinfer.service.admission import Admission
from labinfer.service.metrics import Metrics
from labinfer.service.options import ServiceOptions
from labinfer.service.tracing import Tracing

if TYPE_CHECKING:
    from labinfer.service.call import Call


class Service:
    """``model`` behind HTTP, and ``replicas`` that are like it; the first ``num_prefill`` of all only compute prompts.
    ``startup`` are the seconds of each phase of the start.

    Clients call it ``name``, or as its plan does. ``adapters`` are models too, by their names: the same one with that
    LoRA adapter. One that does not fit is an error here. ``open_streams`` are the calls whose answer is being streamed.
    """

    def __init__(
        self,
        model: LLM,
        options: ServiceOptions,
        startup: Mapping[str, float] | None = None,
        adapters: Sequence[LoRARequest] = (),
        name: str | None = None,
        replicas: Sequence[LLM] = (),
        num_prefill: int = 0,
    ) -> None:
        self.model, self.options, self.models = model, options, (model, *replicas)
        self.replicas = Replicas([each.engine for each in self.models], num_prefill)
        self.name = name or model.plan.source.name
        self.adapters = {each.name: each for each in adapters}
        self.names = [self.name, *(each.name for each in adapters)]
        for each in adapters:
            for one in self.models:
                one.adapters.check(each)
        self.created, self.startup = int(time.time()), dict(startup or {})
        self.admission = Admission(model.plan.limits.max_num_seqs * len(self.models) + options.max_queue)
        self.metrics = Metrics(self)
        endpoint = options.otlp_traces_endpoint
        self.tracing = None if endpoint is None else Tracing(endpoint, self.name)
        self.open_streams: set[Call] = set()
        self.stalled = False

    @property
    def engines(self) -> list[Engine]:
        """Those of the replicas."""
        return [each.engine for each in self.models]

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ``UsageError`` for a model without one."""
        if self.model.tokenizer is None:
            raise UsageError("run.no-tokenizer", "this model has no tokenizer: give token ids instead of text")
        return self.model.tokenizer
