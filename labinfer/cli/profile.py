"""``labinfer profile``: what the ops of a model cost on the devices here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from labinfer.cli.options import CHOICES, COUNT, PLAN_OPTIONS, given, json_option
from labinfer.cli.output import current
from labinfer.errors import UsageError

if TYPE_CHECKING:
    from labinfer.compiler.costs import DeviceProfile
    from labinfer.compiler.plan import Plan
    from labinfer.render.measured import MeasuredStep, OpTimes

COLUMNS = ("OP", "1 TOKEN µs", "±", "MOST SEQUENCES µs", "LARGEST STEP µs", "± µs")
LINK_COLUMNS = ("LINK", "LATENCY µs", "GB/s")


@click.command()
@click.argument("model", required=False)
@click.option("--devices", metavar="LIST", help="Devices to measure (default: those of the plan, or cpu).")
@click.option(
    "--cluster", metavar="FILE", help="Measure the devices and links of a cluster file, on its hosts if it has any."
)
@click.option("--token-file", metavar="FILE", help="With --cluster: its token (default: a kept one).")
@click.option("--threads", type=COUNT, metavar="N", help=PLAN_OPTIONS["threads"])
@click.option("--kv-dtype", type=click.Choice(CHOICES["kv_dtype"]), help=PLAN_OPTIONS["kv_dtype"])
@click.option("--activations", type=click.Choice(CHOICES["activations"]), help=PLAN_OPTIONS["activations"])
@click.option("--max-num-batched-tokens", type=COUNT, metavar="N", help=PLAN_OPTIONS["max_num_batched_tokens"])
@click.option("--max-num-seqs", type=COUNT, metavar="N", help="Sequences of the largest decode step (default: 16).")
@click.option("--weights", metavar="PATH", help="Model directory or file to take names and shapes of weights from.")
@click.option("--quick", is_flag=True, help="Measure few sizes of steps.")
@click.option("--again", is_flag=True, help="Measure what is known too.")
@click.option("--validate", is_flag=True, help="Run the plan, and compare what steps take with what was predicted.")
@json_option
def profile(
    model: str | None, cluster: str | None, quick: bool, again: bool, validate: bool, as_json: bool, **options: Any
) -> None:
    """Measure what the ops of a model cost on this machine.

    MODEL is a plan.json, or whatever `labinfer compile` takes; without it, the embedded SmolLM2-135M-Instruct. Every
    distinct op is measured on every device, in steps of many sizes and contexts, as part of whole steps. What is known
    is not measured again. The results lie under LABINFER_HOME/profiles, one file for each device: plain JSON, which a
    cluster file can name on another machine. The hosts of a cluster file measure their own devices, all at the same
    time, and the links between them that the file does not give; their agents must run (`labinfer cluster up`).

    \b
    labinfer profile model.gguf --quick
    labinfer profile plan.json --validate
    labinfer profile model.gguf --cluster cluster.yaml
    """
    token_file = options.pop("token_file")
    if cluster is not None:
        if validate or model is None or options["devices"] or options["threads"]:
            raise UsageError("cli.usage", "--cluster takes a model, and names the devices; --validate takes a plan")
        profiles = measure_cluster(model, cluster, token_file, options, quick=quick, again=again)
    else:
        plan, profiles = measure_plan(model, options, quick=quick, again=again)
    out = current()
    if validate:
        steps = run_plan(plan, profiles)
        if as_json:
            out.json([step.model_dump() for step in steps])
        else:
            show_validation(steps, [stage.device for stage in plan.stages])
    elif as_json:
        out.json({name: each.model_dump(mode="json", exclude_defaults=True) for name, each in profiles.items()})
    else:
        for name, each in profiles.items():
            show_profile(name, each)
        if cluster is not None:
            show_links()


def measure_cluster(
    model: str, cluster: str, token_file: str | None, options: dict[str, Any], **how: bool
) -> dict[str, DeviceProfile]:
    """Profiles of the devices of a cluster file: measured by its hosts, or here if it has none."""
    from labinfer.compiler.cluster import read_cluster
    from labinfer.profile.quiet import Patience
    from labinfer.profile.session import profile_cluster

    with current().progress() as progress:
        if not read_cluster(cluster).hosts:
            return profile_cluster(model, cluster, progress, Patience(), **how, **options)
        from labinfer.cluster.profiling import profile_hosts

        token = None if token_file is None else Path(token_file)
        return profile_hosts(model, cluster, progress, token_file=token, **how, **options)


def measure_plan(model: str | None, options: dict[str, Any], **how: bool) -> tuple[Plan, dict[str, DeviceProfile]]:
    """The plan that ``model`` is or becomes, and profiles of its devices."""
    from labinfer.api import ONE_SEQUENCE, find_plan, is_plan
    from labinfer.profile.quiet import Patience
    from labinfer.profile.session import profile_plan

    defaults = {} if model is not None and is_plan(model) else ONE_SEQUENCE
    with current().progress() as progress:
        plan = find_plan(model, progress=progress, defaults=defaults, **given(options))
        source = plan.source.checkpoint if model is None or is_plan(model) else model
        if source is None:
            message = "the plan was compiled without weights, so it does not say which model it is of"
            raise UsageError("profile.model", message, remedy="give the model instead: labinfer profile MODEL")
        return plan, profile_plan(plan, source, progress, Patience(), weights=options["weights"], **how)


def run_plan(plan: Plan, profiles: dict[str, DeviceProfile]) -> list[MeasuredStep]:
    """Steps of the plan, as predicted from ``profiles`` and as measured."""
    from labinfer.compiler.costs import Measured
    from labinfer.profile.quiet import Patience
    from labinfer.profile.session import profile_links
    from labinfer.profile.validate import validate_plan
    from labinfer.runtime.model import check_devices

    check_devices(plan)
    links = profile_links({name: device.threads for name, device in plan.devices.items()})
    return validate_plan(plan, {name: Measured(each) for name, each in profiles.items()}, links, Patience())


def show_profile(name: str, profile: DeviceProfile) -> None:
    """The profile of a device as a table, the dearest op of a decode step first."""
    from labinfer.compiler.costs.store import profile_path

    out = current()
    facts = ", ".join(f"{key} {value}" for key, value in profile.device if value is not None)
    out.data(f"{name}: {facts}")
    out.data(f"{len(profile.ops)} ops in {profile_path(profile.device)}")
    rows = []
    for signature, table in profile.ops.items():
        decode, prefill = table.step or table.decode, table.step or table.prefill
        most = max(point[0] for point in decode)
        large = max(prefill, key=lambda point: (point[0], -point[1]))
        largest = min(point for point in decode if point[0] == most)
        rows.append((decode[0][2], [signature, *_times(decode[0]), _microseconds(largest[2]), *_times(large)]))
    rows.sort(key=lambda row: -row[0])
    out.table(COLUMNS, [row for _, row in rows], right=COLUMNS[1:])


def show_links() -> None:
    """The links between devices of this machine, the hops of its pipelines, and the ways between hosts."""
    from labinfer.compiler.costs.store import links_path, stored_hosts, stored_links

    out, known = current(), stored_links()
    out.data(f"links in {links_path().parent}")
    named = known.links | {f"hop by {name}": hop for name, hop in known.transports.items()} | stored_hosts().links
    rows = [[name, _microseconds(link.latency), f"{link.bandwidth / 1e9:.2f}"] for name, link in named.items()]
    out.table(LINK_COLUMNS, rows, right=LINK_COLUMNS[1:])


def _times(point: Sequence[float]) -> list[str]:
    return [_microseconds(point[2]), _microseconds(point[3])]


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def show_validation(steps: Sequence[MeasuredStep], devices: Sequence[str]) -> None:
    """Predicted against measured: whole steps, their stages, and kinds of ops."""
    from collections import defaultdict
    from statistics import median

    rows: list[list[str]] = []
    for step in steps:
        rows.append(_row(step.what, 1, step.predicted, step.measured))
        for number, ops in enumerate(step.stages):
            sums = sum(op.predicted for op in ops), sum(op.measured for op in ops)
            rows.append(_row(f"  ops of stage {number} on {devices[number]}", len(ops), *sums))
            kinds: dict[str, list[OpTimes]] = defaultdict(list)
            for op in ops:
                kinds[op.kind].append(op)
            for kind, same in sorted(kinds.items(), key=lambda item: -sum(op.measured for op in item[1])):
                sums = sum(op.predicted for op in same), sum(op.measured for op in same)
                rows.append(_row(f"    {kind}", len(same), *sums))
    columns = ["STEP", "TIMES", "PREDICTED ms", "MEASURED ms", "ERROR"]
    current().table(columns, rows, right=columns[1:])
    middle = median(abs(step.predicted / step.measured - 1) for step in steps)
    current().data(f"median error of {len(steps)} steps: {100 * middle:.1f} %")


def _row(what: str, times: int, predicted: float, measured: float) -> list[str]:
    error = f"{100 * (predicted / measured - 1):+.1f} %" if measured else ""
    return [what, str(times), f"{1e3 * predicted:.3f}", f"{1e3 * measured:.3f}", error]
