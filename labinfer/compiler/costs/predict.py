"""What a step costs, by the tables of the device that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, Self

from labinfer.compiler.costs.signature import Signer
from labinfer.compiler.costs.table import DeviceProfile, LinkProfile, Origin, PipelineProfile, StreamProfile
from labinfer.compiler.graph import Op
from labinfer.errors import DoesNotFit


@dataclass(frozen=True, slots=True)
class StepShape:
    """The size of a step: ``tokens`` of ``sequences`` that had ``past`` tokens each, and rows of logits."""

    tokens: int
    sequences: int
    past: int
    rows: int

    @classmethod
    def decode(cls, sequences: int, past: int) -> Self:
        """A token for each sequence."""
        return cls(sequences, sequences, past, sequences)

    @classmethod
    def prefill(cls, tokens: int, past: int = 0) -> Self:
        """So many tokens of one prompt, its last among them."""
        return cls(tokens, 1, past, 1)

    @property
    def phase(self) -> Literal["decode", "prefill"]:
        """Whether every sequence gets one token."""
        return "decode" if self.tokens == self.sequences else "prefill"


class Costs(Protocol):
    """What ops cost on a device, measured (``DeviceProfile``) or derived from a specification (``Roofline``)."""

    @property
    def origin(self) -> Origin:
        """How the times are known."""

    @property
    def out(self) -> LinkProfile | None:
        """The way from the device's memory to the host's."""

    @property
    def stream(self) -> StreamProfile | None:
        """How layers are streamed to it from the host; None where they are not."""

    @property
    def pipeline(self) -> PipelineProfile | None:
        """What differs for a stage of a pipeline; None where nobody knows."""

    def op_seconds(self, signer: Signer, op: Op, step: StepShape) -> float:
        """Seconds of one op, which is no view, in a step; ``DoesNotFit`` where nobody knows."""

    def overhead_seconds(self, step: StepShape) -> float:
        """Seconds of a stage beside its ops."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The costs of a device by its profile."""

    profile: DeviceProfile
    origin: Origin = "measured"

    @property
    def out(self) -> LinkProfile | None:
        """The way from the device's memory to the host's."""
        return self.profile.out

    @property
    def stream(self) -> StreamProfile | None:
        """How layers are streamed to it from the host."""
        return self.profile.stream

    @property
    def pipeline(self) -> PipelineProfile | None:
        """What differs for a stage of a pipeline."""
        return self.profile.pipeline

    def op_seconds(self, signer: Signer, op: Op, step: StepShape) -> float:
        """Between what was measured."""
        signature, axis = signer.signature(op), signer.axis(op)
        table = self.profile.ops.get(signature)
        if table is None:
            message = f"what '{signature}' costs on '{self.profile.device.kind}' was never measured"
            remedy = "measure the model there first: labinfer profile MODEL --cluster FILE"
            raise DoesNotFit("profile.unmeasured", message, remedy=remedy)
        if axis == "context":
            return table.seconds(step.phase, step.tokens, step.past)
        return table.seconds("step", step.rows if axis == "rows" else step.tokens, step.past)

    def overhead_seconds(self, step: StepShape) -> float:
        """Between what was measured."""
        return self.profile.overhead.seconds("step", step.tokens, 0)
