"""The part of a plan that says why layers are where they are: predictions, a bound, and what else could have been."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt


class PlanModel(BaseModel):
    """Base of all parts of a plan: known keys only."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, defer_build=True)


class StagePrediction(PlanModel):
    """Predicted seconds of a stage, and of handing on what it made, in a step of each phase of the workload."""

    device: str = Field(description="name of the device")
    units: tuple[str, str] = Field(description="first and last of what it runs: `start`, `layers.0`, ..., `end`")
    decode: NonNegativeFloat = Field(description="seconds of a decode step")
    prefill: NonNegativeFloat = Field(description="seconds of a prefill step")
    decode_hop: NonNegativeFloat = Field(default=0.0, description="seconds to hand on a decode step")
    prefill_hop: NonNegativeFloat = Field(default=0.0, description="seconds to hand on a prefill step")
    unit: NonNegativeFloat = Field(description="seconds of a unit of work")


class OtherPlacement(PlanModel):
    """A placement that was not chosen: devices with the first and last of what they would run, and its value."""

    stages: list[tuple[str, str, str]] = Field(description="device, first and last of what it would run")
    value: NonNegativeFloat = Field(description="seconds of the objective")


class Change(PlanModel):
    """Other hardware, and the value of the best plan with it."""

    what: str = Field(description="the change")
    value: NonNegativeFloat = Field(description="seconds of the objective")


class ServicePrediction(PlanModel):
    """A way in which the workload's replicas can serve, and the predicted seconds of its requests."""

    prefill: NonNegativeInt = Field(description="replicas that only compute prompts; 0: all do both")
    request: NonNegativeFloat = Field(description="seconds from a request to its last token, the mean")
    first: NonNegativeFloat = Field(description="seconds to the first token")
    wait: NonNegativeFloat = Field(description="seconds between two tokens of an answer")
    longest: NonNegativeFloat = Field(description="the longest of these of an answer")


class PlannedStep(PlanModel):
    """The size of a step that was predicted."""

    tokens: PositiveInt = Field(description="tokens of the step")
    sequences: PositiveInt = Field(description="sequences of the step")
    past: NonNegativeInt = Field(description="tokens that each had before")


class PlanPlacement(PlanModel):
    """Why layers are where they are: what the plan is best at, how good it is, and how that is known.

    A unit of work is a micro-batch of the workload, from its prompts to its last tokens. ``value`` and ``lower_bound``
    are seconds of the objective: of a unit through all stages (`latency`), of the slowest stage or hop (`throughput`),
    or until all units in flight are through (`balanced`).
    """

    objective: Literal["latency", "throughput", "balanced"] = Field(description="what is best")
    workload: dict[str, PositiveInt] = Field(
        description="tokens of `prompt` and `output`, sequences at once; of several replicas, requests a minute"
    )
    decode: PlannedStep = Field(description="the decode step that was predicted")
    prefill: PlannedStep = Field(description="the prefill step that was predicted")
    micro_batches: PositiveInt = Field(description="units of work in flight")
    value: NonNegativeFloat = Field(description="seconds of the objective")
    lower_bound: NonNegativeFloat = Field(description="seconds that no chain of stages is below")
    gap: NonNegativeFloat = Field(description="by what part of its value the plan may be worse than the best")
    bound_kind: str = Field(description="how the bound is known")
    algorithm: str = Field(description="what found the plan")
    served: NonNegativeFloat = Field(description="sequences per second in a simulation of the service")
    stages: list[StagePrediction] = Field(description="predictions by stage")
    origins: dict[str, str] = Field(description="devices and links: whether numbers are measured, borrowed or derived")
    transports: dict[str, tuple[NonNegativeFloat, NonNegativeFloat]] = Field(
        default={}, description="seconds of a decode and of a prefill step in a pipeline, by transport"
    )
    reasons: dict[str, str] = Field(default={}, description="why each device is used or not")
    runner_ups: list[OtherPlacement] = Field(default=[], description="the best other placements")
    changes: list[Change] = Field(default=[], description="what other hardware would buy, the best first")
    services: list[ServicePrediction] = Field(
        default=[], description="ways in which the workload's replicas can serve, the best first"
    )
