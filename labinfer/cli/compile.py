"""``labinfer compile``: a map or a model becomes a plan."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from labinfer.cli.options import given, json_option, plan_options
from labinfer.cli.output import current
from labinfer.errors import UsageError

if TYPE_CHECKING:
    from labinfer.compiler.passes import Tracer
    from labinfer.compiler.plan import Plan


OBJECTIVES = ("latency", "throughput", "balanced")


@click.command("compile")
@click.argument("model")
@click.option("-o", "--output", default="plan.json", show_default=True, metavar="FILE", help="The plan; - is stdout.")
@click.option("--config", metavar="FILE", help="A config.json to compile a map for, without weights.")
@plan_options
@click.option("--cluster", metavar="FILE", help="Devices and links instead: measured costs decide who runs what.")
@click.option("--objective", type=click.Choice(OBJECTIVES), help="With --cluster: what is best (default: latency).")
@click.option(
    "--workload", metavar="LIST", help="With --cluster: prompt=512,output=128,concurrency=1,replicas=1,rate=60."
)
@click.option("--trace", is_flag=True, help="Show each pass: its time, the ops before and after, its effect.")
@click.option("--dry-run", is_flag=True, help="Compile and sum up, write nothing.")
@json_option
def compile_command(
    model: str,
    output: str,
    trace: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile a model map into a plan.

    MODEL is a map (llama.yaml, or a name in graphs/: llama), a model directory, a config.json, a .gguf or .safetensors
    file, or a name from `labinfer ls`. A map without --weights or --config is compiled for its example model.

    \b
    labinfer compile llama.yaml
    labinfer compile ~/models/Qwen3-0.6B -o qwen.json --max-model-len 8k
    labinfer compile model.gguf --devices reference:0=0-14,reference:1=15-29
    labinfer compile model.gguf --cluster cluster.yaml --workload prompt=1000,output=200

    Over a cluster file, what the ops of the model cost is measured where it is not known yet (a quick measurement;
    `labinfer profile` makes a better one).
    """
    if as_json and output == "-" and not dry_run:
        raise UsageError("cli.usage", "--json and -o - both want stdout")
    with uncollected():
        from labinfer.api import compile
        from labinfer.compiler.passes import Tracer

    out, tracer = current(), Tracer()
    options = given(options)
    measure(model, options)
    with uncollected():
        plan = compile(model, tracer=tracer, **options)
        text = plan.dump()
    if trace and not as_json:
        click.echo("\n".join(trace_table(tracer)), err=True)
    if not dry_run:
        save(text, output)
    if as_json:
        out.json(summary(plan, None if dry_run else os.path.abspath(output), tracer if trace else None))
        return
    for line in stage_lines(plan):
        out.note(line)
    size = f"{len(text.encode()):,} bytes"
    out.note(f"dry run: {size}, nothing written" if dry_run else f"wrote {output}, {size}" if output != "-" else size)


@contextmanager
def uncollected() -> Iterator[None]:
    """Within the context nobody looks for reference cycles: a compile makes few, and looking takes a sixth of it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(model: str, options: dict[str, Any]) -> None:
    """Measure what is not known yet of the devices of a cluster file, if one is given."""
    cluster = options.get("cluster")
    if cluster is None:
        if "objective" in options or "workload" in options:
            raise UsageError("cli.usage", "--objective and --workload need --cluster")
        return
    if "devices" in options:
        raise UsageError("cli.usage", "the cluster file names the devices; give it or --devices, not both")
    from labinfer.profile.quiet import Patience
    from labinfer.profile.session import profile_cluster

    known = {name: value for name, value in options.items() if name != "cluster"}
    with current().progress() as progress:
        profile_cluster(model, cluster, progress, Patience(), quick=True, **known)


def save(text: str, output: str) -> None:
    """Write a plan whole or not at all."""
    if output == "-":
        click.echo(text, nl=False)
        return
    from labinfer.files import atomic_write

    with atomic_write(output) as stream:
        stream.write(text.encode())


def stage_lines(plan: Plan) -> list[str]:
    """The model and its stages in a few lines."""
    from labinfer.render.placement import verdict
    from labinfer.render.report import num_parameters
    from labinfer.render.report_text import device_table

    lines = [f"{plan.source.name}: {num_parameters(plan):,} parameters", *device_table(plan)]
    for number, arena in enumerate(stage.arena for stage in plan.stages):
        bound = "its lower bound" if arena.optimal else f"lower bound {arena.lower_bound:,}"
        lines.append(f"arena of stage {number}: peak {arena.size:,} bytes, {bound}")
    if plan.placement is not None:
        lines.append(f"{plan.placement.objective}: {verdict(plan.placement)}")
    return lines


def trace_table(tracer: Tracer) -> list[str]:
    """The passes of a compile as a table."""
    from labinfer.render.report_lines import align

    rows = [["pass", "ms", "ops before", "after", "effect"]]
    for step in tracer.traces:
        ops = (str(step.ops_before), str(step.ops_after))
        rows.append([step.name, f"{step.milliseconds:.1f}", *ops, step.effect])
    rows.append(["in all", f"{sum(step.milliseconds for step in tracer.traces):.1f}", "", "", ""])
    return align(rows, right=(1, 2, 3))


def summary(plan: Plan, path: str | None, tracer: Tracer | None) -> dict[str, Any]:
    """The same as plain data."""
    stages = [
        {"device": stage.device, "bytes": stage.bytes.model_dump(), "arena": stage.arena.model_dump()}
        for stage in plan.stages
    ]
    found: dict[str, Any] = {"plan": path, "source": plan.source.model_dump(), "stages": stages}
    if tracer:
        found["trace"] = [asdict(step) for step in tracer.traces]
    return found
