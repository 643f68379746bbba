"""How well predicted times of plans match measured ones, and how good the plan is that costs choose.

    python benchmarks/prediction.py MODEL.gguf ...       # thirteen plans of each: one process, and pipelines of two
    python benchmarks/prediction.py --plans 8 9 MODEL    # some of them
    python benchmarks/prediction.py --choose MODEL.gguf  # the chosen plan beside others, where memory is capped
    python benchmarks/prediction.py --of FILE ...        # the summary of what was written with --json

Devices are CPUs of unequal threads in one process, and of a thread each in the processes of a pipeline. Profiles are
measured first where they are missing (--quick: at few sizes of steps; --again: just before each plan, since what else
a machine does changes within minutes), on made-up weights as always. Steps run on the model's own, on a machine as
quiet as LABINFER_PATIENCE seconds of waiting make it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import labinfer
from labinfer.compiler.costs import Costs, LinkProfile, Measured, StepShape
from labinfer.compiler.costs.plans import predict_pipeline, predict_plan, stage_ops
from labinfer.compiler.plan import Plan
from labinfer.errors import DoesNotFit
from labinfer.profile.measure import (
    BUDGET_SECONDS,
    FEWEST_RUNS,
    MOST_RUNS,
    measure_step,
    prepared_step,
    settle,
    warm_up,
)
from labinfer.profile.quiet import Patience
from labinfer.profile.session import profile_device, profile_hops, profile_links
from labinfer.progress import silent
from labinfer.runtime.model import Model

DEVICES = {"cpu:0": 2, "cpu:1": 1}
"""Threads of each device."""

STEPS = (
    StepShape.decode(1, 16), StepShape.decode(1, 700), StepShape.decode(8, 300), StepShape.prefill(512),
    StepShape.prefill(256, 256),
)  # fmt: skip
LIMITS: dict[str, Any] = {"max_num_seqs": 8, "max_model_len": 1024, "num_blocks": 256}
PROMPT, OUTPUT, ROUNDS = 512, 128, 2
PIPELINES = (("shm", 2, 0), ("shm", 3, 0), ("shm", 4, 0), ("tcp", 2, 0), ("tcp", 4, 0), ("shm", 3, 5))
"""Pipelines: how the stages talk, sixths of the units that are on the first, streamed layers of each."""


class Room:
    """What is known of the devices for one model."""

    def __init__(self, model: str, patience: Patience, devices: Mapping[str, int | None] = DEVICES, **how: Any) -> None:
        self.model, self.patience = model, patience
        alike = {(name.partition(":")[0], threads): name for name, threads in devices.items()}
        known = {
            kind: Measured(profile_device(model, name, kind[1], silent, patience, **how))
            for kind, name in alike.items()
        }
        self.costs: dict[str, Costs] = {
            name: known[name.partition(":")[0], threads] for name, threads in devices.items()
        }
        self.links: dict[tuple[str, str], LinkProfile] = profile_links(devices)
        self.hops = profile_hops(how["again"])
        layers = {
            op.layer for op in stage_ops(labinfer.compile(model, devices="cpu").stages[0]) if op.layer is not None
        }
        self.units = ["start", *(f"layers.{layer}" for layer in sorted(layers)), "end"]

    def compile(self, devices: str, pins: str = "", **options: Any) -> Plan:
        """The plan over these devices, as a cluster file has them, with further options of a compile."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cluster.yaml"
            path.write_text(f"devices: {{{devices}}}\npins: {{{pins}}}\n")
            workload = f"prompt={PROMPT},output={OUTPUT}"
            return labinfer.compile(self.model, cluster=path, workload=workload, **LIMITS, **options)


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan that is run; without a ``transport`` in this process."""

    name: str
    room: Room
    plan: Plan
    transport: str | None = None


def by_itself(device: str, part: float, path: str, patience: Patience, **how: bool) -> Trial:
    """A device alone, with a part of its layers streamed."""
    threads = DEVICES[device]
    room = Room(path, patience, {device: threads}, **how)
    layers = int(part * len(room.units))
    plan = room.compile(f"'{device}': {{threads: {threads}}}", **({"streamed_layers": layers} if layers else {}))
    return Trial(f"{threads} threads, {len(plan.stages[0].streamed)} streamed", room, plan)


def in_turn(path: str, patience: Patience, **how: bool) -> Trial:
    """Both devices in this process, a third of the layers on the slower one."""
    room = Room(path, patience, DEVICES, **how)
    devices = ", ".join(f"'{name}': {{threads: {threads}}}" for name, threads in DEVICES.items())
    return Trial("1 + 2 threads", room, room.compile(devices, pins(room.units, len(room.units) // 3, 1, 0)))


def pipelined(transport: str, sixths: int, streamed: int, path: str, patience: Patience, **how: bool) -> Trial:
    """Two processes of a thread each."""
    room = Room(path, patience, dict.fromkeys(DEVICES, 1), **how)
    cut = sixths * len(room.units) // 6
    devices = ", ".join(f"'{name}': {{threads: 1}}" for name in DEVICES)
    options = {"streamed_layers": streamed} if streamed else {}
    plan = room.compile(devices, pins(room.units, cut, 0, 1), **options)
    name = f"{cut} + {len(room.units) - cut}, {transport}"
    return Trial(f"{name}, {streamed} streamed each" if streamed else name, room, plan, transport)


TRIALS: list[Callable[..., Trial]] = [
    *(partial(by_itself, device, part) for device in DEVICES for part in (0, 1 / 3, 1)),
    in_turn,
    *(partial(pipelined, *each) for each in PIPELINES),
]


def pins(units: Sequence[str], cut: int, first: int, second: int) -> str:
    """The units before ``cut`` on one CPU device, the others on another."""
    return ", ".join(f"{unit}: 'cpu:{first if number < cut else second}'" for number, unit in enumerate(units))


def accuracy(trial: Trial, patience: Patience) -> list[dict[str, Any]]:
    """Predicted and measured milliseconds of every step of a plan, of the whole and of each stage."""
    found, room, plan = [], trial.room, trial.plan
    with labinfer.LLM(plan, transport=trial.transport, enable_prefix_caching=False) as model:
        if trial.transport is None:
            warm_up(model)
        for step in reversed(STEPS):  # long ones first: memory is then as it is in a service
            stages = predict_plan(plan, room.costs, room.links, step)
            if trial.transport:
                alone = predict_pipeline(plan, stages, room.costs, room.hops[trial.transport], step)
                predicted = [alone.seconds, *alone.stages]
                measured = seconds_of_step(model, step, patience)
            else:
                times = measure_step(model, step, patience)
                measured = [times.whole, *(float(times.of_stage(number).sum()) for number in range(len(stages)))]
                computing = (sum(seconds for _, seconds in stage.ops) for stage in stages)
                predicted = [sum(stage.total for stage in stages), *computing]
            names = ["whole", *(f"stage on {stage.device}" for stage in plan.stages)]
            what = f"{step.phase} {step.tokens} after {step.past}"
            each = {"model": Path(room.model).stem, "plan": trial.name, "step": what}
            for name, *both in zip(names, predicted, measured, strict=True):
                found.append({**each, "of": name, **milliseconds(*both)})
                print("  ".join(map(str, found[-1].values())), flush=True)
    return found


def seconds_of_step(model: Model, step: StepShape, patience: Patience) -> list[float]:
    """Medians of some runs of a step in a pipeline: of the whole, and of each stage from its batch to its results."""
    assert model.pipeline is not None
    patience.wait()
    with prepared_step(model, step) as batch:
        settle(model, batch)
        runs: list[list[float]] = []
        while len(runs) < FEWEST_RUNS or (len(runs) < MOST_RUNS and sum(run[0] for run in runs) < BUDGET_SECONDS):
            started = time.perf_counter()
            model.run(batch)
            whole = time.perf_counter() - started
            spans = model.pipeline.spans[-1]
            runs.append([whole, *(spans[:, 1] - spans[:, 0])])
    return [median(column) for column in zip(*runs, strict=True)]


def summary(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Median and worst errors by what was run."""
    plans = {(row["model"], row["plan"]) for row in found}
    yield f"{len(plans)} plans"
    for phase, of in product(("decode", "prefill"), ("whole", "stage")):
        rows = [row for row in found if row["step"].startswith(phase) and row["of"].startswith(of)]
        errors = [100 * abs(row["error"]) for row in rows]
        yield f"{phase}, {of}: median error of {len(errors)} {median(errors):.1f} %, worst {max(errors):.1f} %"


def milliseconds(predicted: float, measured: float) -> dict[str, float]:
    """Both times, and by what part the prediction is too high."""
    return {
        "predicted_ms": round(1e3 * predicted, 4), "measured_ms": round(1e3 * measured, 4),
        "error": round(predicted / measured - 1, 4),
    }  # fmt: skip


def choice(path: str, patience: Patience, **how: bool) -> list[dict[str, Any]]:
    """The chosen plan and others, where the quick device has room for half of the weights, best first.

    Each has its best of some rounds in turn: others only ever make a step longer.
    """
    room = Room(path, patience, **how)
    taken = labinfer.compile(path, devices="cpu", **LIMITS).stages[0].bytes
    cap = taken.total - taken.weights // 2 - taken.kv_cache // 2
    devices = f"'cpu:0': {{threads: 2, memory: {cap}}}, 'cpu:1': {{threads: 1}}"
    candidates = {"chosen": room.compile(devices)}
    units = room.units
    for eighths in range(2, 9, 2):
        for quick_first in (True, False):
            cut = len(units) * eighths // 16
            mine, others = (units[:cut], units[cut:]) if quick_first else (units[-cut:], units[:-cut])
            placed = [f"{unit}: 'cpu:0'" for unit in mine] + [f"{unit}: 'cpu:1'" for unit in others]
            name = f"cpu:0 has {mine[0]} to {mine[-1]}"
            with suppress(DoesNotFit):
                plan = room.compile(devices, ", ".join(placed))
                if plan.stages != candidates["chosen"].stages:
                    candidates[name] = plan
    rounds = [[seconds_of(room, name, plan) for name, plan in candidates.items()] for _ in range(ROUNDS)]
    best = (min(rows, key=lambda row: row["measured_ms"]) for rows in zip(*rounds, strict=True))
    return sorted(best, key=lambda row: row["measured_ms"])


def seconds_of(room: Room, name: str, plan: Plan) -> dict[str, Any]:
    """Predicted and measured milliseconds of a prompt and its answer."""
    prefill, decode = StepShape.prefill(PROMPT), StepShape.decode(1, PROMPT + OUTPUT // 2)
    with labinfer.LLM(plan, enable_prefix_caching=False) as model:
        warm_up(model)
        measured = [measure_step(model, step, room.patience).whole for step in (prefill, decode)]
    steps = (predict_plan(plan, room.costs, room.links, step) for step in (prefill, decode))
    predicted = [sum(stage.total for stage in stages) for stages in steps]
    total = (each[0] + OUTPUT * each[1] for each in (predicted, measured))
    return {"plan": name, **milliseconds(*total)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--plans", type=int, nargs="+", default=range(len(TRIALS)), help="by number, from 0")
    parser.add_argument("--of", nargs="+", default=[], metavar="FILE", help="sum these results up")
    parser.add_argument("--choose", action="store_true", help="compare the chosen plan with others")
    parser.add_argument("--quick", action="store_true", help="measure few sizes of steps for the profiles")
    parser.add_argument("--again", action="store_true", help="measure profiles that are known, too")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    patience, how = Patience(), {"quick": options.quick, "again": options.again}
    if options.choose:
        found = [{"model": path, **row} for path in options.models for row in choice(path, patience, **how)]
        for row in found:
            print(f"{row['measured_ms']:10.2f} ms, predicted {row['predicted_ms']:10.2f}  {row['plan']}")
    else:
        found = [row for path in options.of for row in json.loads(Path(path).read_text())]
        for path, number in product(options.models, options.plans):
            found += accuracy(TRIALS[number](path, patience, **how), patience)
        print("\n".join(summary(found)))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
