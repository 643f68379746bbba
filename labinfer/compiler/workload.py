"""What a plan is made for: how long prompts and answers are, how many at once, and what should be best."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from labinfer.compiler.costs import StepShape
from labinfer.compiler.partition import Objective
from labinfer.compiler.partition import Workload as UnitOfWork
from labinfer.compiler.partition.service import MOST_REPLICAS
from labinfer.compiler.plan import Limits
from labinfer.errors import UsageError, did_you_mean


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens of a prompt and of its answer, and sequences served at once.

    Where so many ``replicas`` of the plan serve, requests come at a ``rate`` of so many a minute for all of them.
    """

    prompt: int = 512
    output: int = 128
    concurrency: int = 1
    replicas: int = 1
    rate: int = 60

    def parts(self, objective: Objective, devices: int) -> int:
        """Micro-batches that sequences are in: as many as there are devices to keep busy, but for latency."""
        return 1 if objective is Objective.LATENCY else max(1, min(self.concurrency, devices))

    def decode_step(self, objective: Objective, devices: int) -> StepShape:
        """The decode step of a micro-batch in the middle of the answers; for latency, of one sequence alone."""
        alone = objective is Objective.LATENCY
        sequences = 1 if alone else -(-self.concurrency // self.parts(objective, devices))
        return StepShape.decode(sequences, self.prompt + self.output // 2)

    def prefill_step(self, limits: Limits) -> StepShape:
        """The prefill step in the middle of a prompt."""
        tokens = min(self.prompt, limits.max_num_batched_tokens)
        return StepShape.prefill(tokens, (self.prompt - tokens) // 2)

    def told(self) -> dict[str, int]:
        """What a plan says of it."""
        found = {"prompt": self.prompt, "output": self.output, "concurrency": self.concurrency}
        return found | ({"replicas": self.replicas, "rate": self.rate} if self.replicas > 1 else {})

    def unit(self, objective: Objective, devices: int, limits: Limits, kv_tokens: int) -> UnitOfWork:
        """A micro-batch from its prompts to its last tokens, for the partition.

        The cache has room for all sequences that are served at once, and for ``kv_tokens`` at least.
        """
        sequences, step = self.decode_step(objective, devices).sequences, self.prefill_step(limits)
        length = -(-(self.prompt + self.output) // limits.block_size) * limits.block_size
        return UnitOfWork(
            prefill_steps=sequences * -(-self.prompt // step.tokens),
            decode_steps=self.output,
            prefill_tokens=step.tokens,
            decode_tokens=sequences,
            kv_tokens=max(kv_tokens, self.concurrency * length),
            micro_batches=self.parts(objective, devices),
        )


def parse_workload(text: str) -> Workload:
    """``prompt=512,output=128,concurrency=8``; what is left out is as by default. Raises ``UsageError``."""
    known, found = [each.name for each in fields(Workload)], {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = item.partition("=")
        if name not in known:
            raise UsageError("workload.unknown", f"a workload has no '{name}'", remedy=did_you_mean(name, known))
        if not re.fullmatch(r"[1-9][0-9]{0,8}", number):
            raise UsageError("workload.number", f"'{item}' should be like {name}=128")
        found[name] = int(number)
    if found.get("replicas", 1) > MOST_REPLICAS:
        raise UsageError("workload.number", f"a workload has at most {MOST_REPLICAS} replicas")
    return Workload(**found)
