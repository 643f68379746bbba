"""Costs of a device that is not here, from its published numbers: an op takes as long as its bytes or its arithmetic.

Published peaks are not reached. ``efficiency`` says how much of each is, as measured on real ones (see
``devices.yaml``); each op also takes a fixed time to start. After Williams, Waterman and Patterson, "Roofline: an
insightful visual performance model" (2009).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import Field, PositiveFloat

from labinfer.compiler.costs.predict import StepShape
from labinfer.compiler.costs.signature import Signer
from labinfer.compiler.costs.table import LinkProfile, Origin, PipelineProfile, Record, StreamProfile
from labinfer.compiler.graph import Op
from labinfer.compiler.source import load_yaml
from labinfer.errors import DoesNotFit, Place, did_you_mean
from labinfer.ops import OPS
from labinfer.ops.base import ITEM_SIZE
from labinfer.ops.formats import stored_bytes


class Specification(Record):
    """A device by its published numbers."""

    name: str = Field(description="what it is")
    memory_gb: PositiveFloat = Field(description="GB of memory")
    gb_per_second: PositiveFloat = Field(description="GB/s that it reads of its memory")
    tflops: PositiveFloat = Field(description="TFLOP/s of dense products in 16 bits, in float32 where it has no others")
    read: float = Field(gt=0, le=1, description="part of the memory's rate that decoding reaches")
    computed: float = Field(gt=0, le=1, description="part of the arithmetic that a prefill reaches")
    op_microseconds: float = Field(ge=0, description="microseconds that an op takes to start")
    source: str = Field(description="where the numbers are from")

    @property
    def memory(self) -> int:
        """Bytes of memory."""
        return int(self.memory_gb * 1e9)


@dataclass(frozen=True, slots=True)
class Roofline:
    """The costs that follow from a specification, of which ``share`` is granted."""

    specification: Specification
    share: float = 1.0

    @property
    def origin(self) -> Origin:
        """Derived."""
        return "derived"

    @property
    def out(self) -> LinkProfile | None:
        """Not modelled: what leaves the last stage is small."""
        return None

    @property
    def stream(self) -> StreamProfile | None:
        """Not modelled: no layer is streamed to it."""
        return None

    @property
    def pipeline(self) -> PipelineProfile | None:
        """Not modelled."""
        return None

    def op_seconds(self, signer: Signer, op: Op, step: StepShape) -> float:
        """The longer of reading its bytes and of its arithmetic, and the time to start it."""
        spec, flops, nbytes = self.specification, 0, 0.0
        for part in op.primitives():
            inputs = [signer.types[name] for name in part.inputs if name in signer.types]
            context = step.past + step.tokens // step.sequences
            flops += OPS[part.kind].flops(part.attrs, inputs, step.tokens, step.rows, context)
            for name in part.weights.values():
                weight = signer.weights[name]
                gathered = part.kind == "embedding"
                rows = min(step.tokens, weight.shape[0]) / weight.shape[0] if gathered else 1
                nbytes += rows * stored_bytes(weight.format, weight.shape)
            if part.state and part.outputs:
                width = signer.states[part.state].width
                nbytes += step.sequences * context * width * ITEM_SIZE[signer.limits.kv_dtype]
        names = [*op.inputs, *op.outputs]
        nbytes += sum(signer.types[n].nbytes(step.tokens, step.rows) for n in names if n in signer.types)
        reading = nbytes / (1e9 * spec.gb_per_second * spec.read)
        computing = flops / (1e12 * spec.tflops * spec.computed)
        return max(reading, computing) / self.share + 1e-6 * spec.op_microseconds

    def overhead_seconds(self, step: StepShape) -> float:
        """As long as ten ops take to start."""
        return 1e-5 * self.specification.op_microseconds


@cache
def specifications() -> dict[str, Specification]:
    """The catalogue of devices, by the name that ``like:`` takes."""
    found = load_yaml(Path(__file__).with_name("devices.yaml")).plain()
    return {name: Specification.model_validate(each) for name, each in found.items()}


def specification(name: str, place: Place | None = None) -> Specification:
    """A device of the catalogue; an unknown one, named at ``place``, is a ``DoesNotFit``."""
    known = specifications()
    if name not in known:
        remedy = did_you_mean(name, known) or f"known: {', '.join(known)}"
        raise DoesNotFit("device.unknown", f"no device of the catalogue is called '{name}'", place=place, remedy=remedy)
    return known[name]
