"""How well predicted times of plans match measured ones, and how good the plan is that costs choose.

    python benchmarks/prediction.py MODEL.gguf ...             # each model on 1 thread, on 2, and split over both
    python benchmarks/prediction.py --pipeline MODEL.gguf ...  # two stages of a thread each, by shm
    python benchmarks/prediction.py --choose MODEL.gguf        # the chosen plan beside others, where memory is capped

Devices are CPUs of unequal threads in one process, those of a pipeline in a process each. Profiles are measured first
where they are missing (--quick: at few sizes of steps). Steps run on made-up weights, those of a pipeline on the
model's, on a machine as quiet as LABINFER_PATIENCE seconds of waiting make it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import labinfer
from labinfer.compiler.costs import Costs, LinkProfile, Measured, StepShape
from labinfer.compiler.costs.plans import pipeline_seconds, predict_plan, stage_ops
from labinfer.compiler.plan import Plan
from labinfer.errors import DoesNotFit
from labinfer.profile.measure import measure_step, prepared_step, warm_up
from labinfer.profile.quiet import Patience
from labinfer.profile.session import profile_device, profile_hops, profile_links
from labinfer.profile.synthetic import SyntheticCheckpoint
from labinfer.profile.validate import validate_step
from labinfer.progress import silent
from labinfer.render.measured import MeasuredStep
from labinfer.runtime.cache import CacheOptions
from labinfer.runtime.model import Model

DEVICES = {"cpu:0": 2, "cpu:1": 1}
"""Threads of each device."""

STEPS = (
    StepShape.decode(1, 16), StepShape.decode(1, 700), StepShape.decode(8, 300), StepShape.prefill(512),
    StepShape.prefill(256, 256),
)  # fmt: skip
LIMITS: dict[str, Any] = {"max_num_seqs": 8, "max_model_len": 1024, "num_blocks": 256}
PROMPT, OUTPUT, ROUNDS = 512, 128, 2
TRANSPORT, RUNS = "shm", 9
"""How the stages of a pipeline talk, and how often each of its steps is run."""


class Room:
    """What is known of the devices for one model."""

    def __init__(
        self, model: str, patience: Patience, devices: Mapping[str, int | None] = DEVICES, **how: bool
    ) -> None:
        self.model, self.patience = model, patience
        self.costs: dict[str, Costs] = {
            name: Measured(profile_device(model, name, threads, silent, patience, **how))
            for name, threads in devices.items()
        }
        self.links: dict[tuple[str, str], LinkProfile] = profile_links(devices)
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


def plans(room: Room) -> Iterator[tuple[str, Plan]]:
    """Each device alone, with none, a third and all of its layers streamed; a third of them on the slower one."""
    each = [f"'{name}': {{threads: {threads}}}" for name, threads in DEVICES.items()]
    for device, threads in zip(each, DEVICES.values(), strict=True):
        yield f"{threads} threads", room.compile(device)
        for streamed in (len(room.units) // 3, len(room.units)):
            plan = room.compile(device, streamed_layers=streamed)
            yield f"{threads} threads, {len(plan.stages[0].streamed)} streamed", plan
    cut = len(room.units) // 3
    pins = [f"{unit}: 'cpu:1'" for unit in room.units[:cut]] + [f"{unit}: 'cpu:0'" for unit in room.units[cut:]]
    yield "1 + 2 threads", room.compile(", ".join(each), ", ".join(pins))


def accuracy(models: list[str], patience: Patience, **how: bool) -> list[dict[str, Any]]:
    """Predicted and measured milliseconds of every step of every plan."""
    found = []
    for path in models:
        room = Room(path, patience, **how)
        for name, plan in plans(room):
            with Model(plan, SyntheticCheckpoint(plan), cache=CacheOptions(enable_prefix_caching=False)) as model:
                warm_up(model)
                for step in STEPS:
                    checked = validate_step(model, room.costs, room.links, step, patience)
                    each = {"model": Path(path).stem, "plan": name, "step": checked.what}
                    times = {"whole": (checked.predicted, checked.measured)}
                    for stage, ops in zip(plan.stages, checked.stages, strict=True):
                        sums = sum(op.predicted for op in ops), sum(op.measured for op in ops)
                        times[f"ops on {stage.device}"] = sums
                    found += [{**each, "of": what, **milliseconds(*both)} for what, both in times.items()]
                    print(f"{each['model']:16} {name:14} {line(checked)}", flush=True)
    return found


def pipelines(models: list[str], patience: Patience, **how: bool) -> list[dict[str, Any]]:
    """Predicted and measured milliseconds of single steps of two stages with a thread each, first one after another in
    this process, then in a process and on a core each."""
    found, hop = [], profile_hops()[TRANSPORT]
    for path in models:
        room = Room(path, patience, dict.fromkeys(DEVICES, 1), **how)
        for transport, (name, plan) in product((None, TRANSPORT), two_stages(room)):
            with labinfer.LLM(plan, transport=transport, enable_prefix_caching=False) as model:
                for step in reversed(STEPS):  # long ones first: memory is then as it is in a service
                    stages = predict_plan(plan, room.costs, room.links, step)
                    predicted = sum(stage.total for stage in stages)
                    predicted += pipeline_seconds(stages, hop) if transport else 0.0
                    what = f"{step.phase} {step.tokens} tokens after {step.past}"
                    each = {"model": Path(path).stem, "plan": name, "transport": str(transport), "step": what}
                    found.append({**each, **milliseconds(predicted, seconds_of_step(model, step, patience))})
                    print("  ".join(map(str, found[-1].values())), flush=True)
    return found


def two_stages(room: Room) -> Iterator[tuple[str, Plan]]:
    """A third, and two thirds, of the layers on the first of two devices that are alike."""
    devices = ", ".join(f"'{name}': {{threads: 1}}" for name in DEVICES)
    for cut in (len(room.units) // 3, 2 * len(room.units) // 3):
        pins = [f"{unit}: 'cpu:{int(number >= cut)}'" for number, unit in enumerate(room.units)]
        yield f"{cut} + {len(room.units) - cut} units", room.compile(devices, ", ".join(pins))


def seconds_of_step(model: Model, step: StepShape, patience: Patience) -> float:
    """The median of some runs of a step."""
    patience.wait()
    with prepared_step(model, step) as batch:
        seconds = []
        for _ in range(RUNS):
            started = time.perf_counter()
            model.run(batch)
            seconds.append(time.perf_counter() - started)
    return median(seconds)


def milliseconds(predicted: float, measured: float) -> dict[str, float]:
    """Both times, and by what part the prediction is too high."""
    return {
        "predicted_ms": round(1e3 * predicted, 4), "measured_ms": round(1e3 * measured, 4),
        "error": round(predicted / measured - 1, 4),
    }  # fmt: skip


def line(step: MeasuredStep) -> str:
    """A comparison in columns."""
    error = 100 * (step.predicted / step.measured - 1)
    return f"{step.what:32} {1e3 * step.predicted:9.3f} {1e3 * step.measured:9.3f} ms {error:+6.1f} %"


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
            pins = [f"{unit}: 'cpu:0'" for unit in mine] + [f"{unit}: 'cpu:1'" for unit in others]
            name = f"cpu:0 has {mine[0]} to {mine[-1]}"
            with suppress(DoesNotFit):
                plan = room.compile(devices, ", ".join(pins))
                if plan.stages != candidates["chosen"].stages:
                    candidates[name] = plan
    rounds = [[seconds_of(room, name, plan) for name, plan in candidates.items()] for _ in range(ROUNDS)]
    best = (min(rows, key=lambda row: row["measured_ms"]) for rows in zip(*rounds, strict=True))
    return sorted(best, key=lambda row: row["measured_ms"])


def seconds_of(room: Room, name: str, plan: Plan) -> dict[str, Any]:
    """Predicted and measured milliseconds of a prompt and its answer."""
    prefill, decode = StepShape.prefill(PROMPT), StepShape.decode(1, PROMPT + OUTPUT // 2)
    with Model(plan, SyntheticCheckpoint(plan), cache=CacheOptions(enable_prefix_caching=False)) as model:
        warm_up(model)
        measured = [measure_step(model, step, room.patience).whole for step in (prefill, decode)]
    steps = (predict_plan(plan, room.costs, room.links, step) for step in (prefill, decode))
    predicted = [sum(stage.total for stage in stages) for stages in steps]
    total = (each[0] + OUTPUT * each[1] for each in (predicted, measured))
    return {"plan": name, **milliseconds(*total)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--choose", action="store_true", help="compare the chosen plan with others")
    what.add_argument("--pipeline", action="store_true", help="run plans as pipelines of two processes")
    parser.add_argument("--quick", action="store_true", help="measure few sizes of steps for the profiles")
    parser.add_argument("--again", action="store_true", help="measure profiles that are known, too")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    patience, how = Patience(), {"quick": options.quick, "again": options.again}
    if options.choose:
        found = [{"model": path, **row} for path in options.models for row in choice(path, patience, **how)]
        for row in found:
            print(f"{row['measured_ms']:10.2f} ms, predicted {row['predicted_ms']:10.2f}  {row['plan']}")
    elif options.pipeline:
        found = pipelines(options.models, patience, **how)
        for transport in ("None", TRANSPORT):
            errors = [abs(row["error"]) for row in found if row["transport"] == transport]
            print(f"median error of {len(errors)} steps, transport {transport}: {100 * median(errors):.1f} %")
    else:
        found = accuracy(options.models, patience, **how)
        whole = [row for row in found if row["of"] == "whole"]
        stages = [row for row in found if row["of"] != "whole"]
        for name, rows in (("whole steps", whole), ("stages", stages)):
            errors = [abs(row["error"]) for row in rows]
            print(f"median error of {len(rows)} {name}: {100 * median(errors):.1f} %, worst {100 * max(errors):.1f} %")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
