"""``labinfer bench``: how fast a model is here, and how fast it could be."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from labinfer.cli.options import (
    CHOICES,
    COUNT,
    PLAN_OPTIONS,
    check_cluster_options,
    cluster_options,
    json_option,
    load_over_cluster,
)
from labinfer.cli.output import current
from labinfer.errors import UsageError
from labinfer.units import parse_count

if TYPE_CHECKING:
    from labinfer.bench.measure import Workload

BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class Counts(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """Positive numbers with commas between them: 128,512."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The numbers; a bad one is a usage error that names the option."""
        try:
            return value if isinstance(value, list) else [parse_count(part) for part in value.split(",")]
        except UsageError as error:
            self.fail(error.message, param, ctx)


class BenchCommand(click.Command):
    """``labinfer bench MODEL``, and ``labinfer bench serve``, which measures a service and has options of its own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of whichever is meant."""
        if args[:1] == ["serve"]:
            from labinfer.cli.bench_serve import bench_serve

            return bench_serve.make_context(f"{info_name} serve", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command(cls=BenchCommand)
@click.argument("model", required=False)
@click.option("--prompt-lengths", type=Counts(), default="512", show_default=True, metavar="LIST", help="Tokens.")
@click.option("--decode-lengths", type=Counts(), default="128", show_default=True, metavar="LIST", help="New tokens.")
@click.option(
    "--batch", type=Counts(), default="1,8", show_default=True, metavar="LIST", help="Sequences decoded at once."
)
@click.option(
    "--repeat", type=COUNT, default=5, show_default=True, metavar="N", help="Rounds, or pairs with --compare."
)
@click.option("--devices", metavar="LIST", help="Devices to compile for (default: cpu, where it is installed).")
@click.option("--threads", type=COUNT, metavar="N", help="Threads (default: one a physical core).")
@click.option("--kv-dtype", type=click.Choice(["f32", "bf16", "f16"]), help="What keys and values are kept in.")
@click.option("--activations", type=click.Choice(CHOICES["activations"]), help=PLAN_OPTIONS["activations"])
@click.option("--weights", metavar="PATH", help="Model directory or file to take the weights from.")
@cluster_options
@click.option("--compare", is_flag=True, help="Take turns with the installed peers: llama.cpp, transformers.")
@json_option
def bench(
    model: str | None,
    prompt_lengths: list[int],
    decode_lengths: list[int],
    batch: list[int],
    repeat: int,
    compare: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a model, beside what the machine can do.

    Tokens/s of prefill and decode, time to the first token and between tokens, bytes read, load time and peak memory.

    MODEL is a plan or anything `labinfer compile` takes; the default is the embedded model. Decode starts from an empty
    cache, as with llama-bench. The machine's read bandwidth is measured on the weights themselves, in the same run and
    with as many threads. Peers run in LABINFER_BENCH_PYTHON, or in this Python.

    \b
    labinfer bench model.gguf --devices cpu
    labinfer bench model.gguf --devices cpu --prompt-lengths 128,512,2k --batch 1,4,16 --json
    labinfer bench model.gguf --cluster cluster.yaml
    LABINFER_BENCH_PYTHON=peers/bin/python labinfer bench model.gguf --devices cpu --compare
    labinfer bench serve --help
    """
    options = {name: value for name, value in options.items() if value is not None}
    check_cluster_options(options, {"--compare": compare})
    if "threads" in options:
        os.environ.update(dict.fromkeys(BLAS_THREADS, str(options["threads"])))  # read when numpy is imported
    from labinfer.bench.measure import plan_tests

    tests = plan_tests(prompt_lengths, decode_lengths, batch)
    if compare:
        _compare(model, tests, repeat, options, as_json)
        return
    found = _measure(model, tests, repeat, options)
    if as_json:
        current().json(found)
        return
    from labinfer.bench.report import COLUMNS, head_lines, rows

    for line in head_lines(found):
        current().data(line)
    current().table(COLUMNS, rows(found), right=COLUMNS[1:])


def _measure(model: str | None, tests: list[Workload], repeat: int, options: dict[str, Any]) -> dict[str, Any]:
    """Load the model and measure it in this process, or over the hosts of a cluster."""
    from labinfer.bench.measure import measure
    from labinfer.llm import LLM

    with current().progress() as progress:
        started = time.perf_counter()
        compiled = _compile_options(model, tests, options)
        if "cluster" in options:
            llm = load_over_cluster(model, compiled.pop("weights", None), progress, compiled)
        else:
            llm = LLM(model, progress=progress, **compiled)
        load_seconds = time.perf_counter() - started
    with llm:
        stages = [stage.bytes for stage in llm.plan.stages]
        return {
            "model": llm.plan.source.name,
            "devices": list(llm.plan.devices),
            "load_seconds": load_seconds,
            "planned_bytes": {
                name: sum(getattr(stage, name) for stage in stages) for name in ("weights", "kv_cache", "arena")
            },
            **measure(llm, tests, repeat),
        }


def _compile_options(model: str | None, tests: list[Workload], options: dict[str, Any]) -> dict[str, Any]:
    """The options to compile with: room for the tests, unless ``model`` is a plan, which has decided that."""
    from labinfer.api import is_plan
    from labinfer.bench.measure import limits

    if model is not None and is_plan(model):
        return options
    return {**limits(tests), **options}


def _compare(model: str | None, tests: list[Workload], pairs: int, options: dict[str, Any], as_json: bool) -> None:
    """Take turns with every installed peer that reads this checkpoint, each run in its own process."""
    from labinfer.api import find_plan
    from labinfer.bench.measure import num_threads
    from labinfer.bench.peers import compare
    from labinfer.bench.report import COMPARE_COLUMNS, compare_rows

    out = current()
    with out.progress() as progress:
        plan = find_plan(model, progress=progress, **_compile_options(model, tests, options))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    words += [f"--prompt-lengths={_listed(tests, 'prefill', 'tokens')}", f"--batch={_listed(tests, 'decode', 'batch')}"]
    words += [f"--decode-lengths={_listed(tests, 'decode', 'tokens')}", "--repeat=1", "--json"]
    ours = [sys.executable, "-m", "labinfer", "bench", *([model] if model else []), *words]
    found = compare(plan.source, ours, num_threads(plan), tests, pairs, out.note)
    if as_json:
        out.json({"model": plan.source.name, "threads": num_threads(plan), "pairs": pairs, "peers": found})
        return
    for name, results in found.items():
        columns = [name if column == "peer" else column for column in COMPARE_COLUMNS]
        out.table(columns, compare_rows(results), right=columns[1:])


def _listed(tests: list[Workload], kind: str, field: str) -> str:
    """What an option of ours said: the different values of ``field`` in the tests of a kind."""
    return ",".join(str(value) for value in dict.fromkeys(getattr(test, field) for test in tests if test.kind == kind))
