"""What a step costs, by the tables of the device that runs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

from labinfer.compiler.costs.signature import Signer
from labinfer.compiler.costs.table import DeviceProfile
from labinfer.compiler.graph import Op
from labinfer.ops.fusions import is_view


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


def op_seconds(profile: DeviceProfile, signer: Signer, op: Op, step: StepShape) -> float:
    """Seconds of one op in a step; 0 for a view. A ``KeyError`` names a signature that the profile does not have."""
    if is_view(op.kind):
        return 0.0
    table, axis = profile.ops[signer.signature(op)], signer.axis(op)
    if axis == "context":
        return table.seconds(step.phase, step.tokens, step.past)
    return table.seconds("step", step.rows if axis == "rows" else step.tokens, 0)


def unknown_ops(profile: DeviceProfile, signer: Signer, ops: Iterable[Op]) -> list[str]:
    """The signatures among ``ops`` that the profile has no times for."""
    signatures = dict.fromkeys(signer.signature(op) for op in ops if not is_view(op.kind))
    return [each for each in signatures if each not in profile.ops]
