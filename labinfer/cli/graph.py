"""``labinfer graph``: a plan as a page, a picture, or a file for another viewer."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from labinfer.cli.options import given, json_option, plan_options
from labinfer.cli.output import current
from labinfer.errors import UsageError
from labinfer.render import FORMATS


def _format_list() -> str:
    """The formats and what they are, for the help text."""
    width = max(map(len, FORMATS))
    return "\b\n" + "\n".join(f"{name.ljust(width)}  {what}" for name, (_, _, what) in FORMATS.items())


@click.command(epilog=_format_list())
@click.argument("model")
@click.option(
    "-f", "--format", "format_", type=click.Choice(list(FORMATS)), default="html", show_default=True, help="See below."
)
@click.option("-o", "--output", metavar="FILE", help="Where to write; - is stdout (default: see below).")
@click.option("--config", metavar="FILE", help="A config.json to compile a map for, without weights.")
@click.option("--measured", metavar="FILE", help="Steps of the plan, from `labinfer profile PLAN --validate --json`.")
@plan_options
@json_option
def graph(
    model: str,
    format_: str,
    output: str | None,
    config: str | None,
    weights: str | None,
    measured: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw a map or a plan.

    MODEL is a plan.json, or whatever `labinfer compile` takes. The html page and, on a terminal, every other format go
    to a file named after the model; without a terminal text goes to stdout. --json is short for -f json -o -.

    \b
    labinfer graph llama.yaml                        llama.html
    labinfer graph plan.json -f svg -o plan.svg
    labinfer graph qwen3.yaml -f dot | dot -Tpdf > qwen3.pdf
    labinfer graph plan.json -f perfetto --measured steps.json
    """
    from labinfer.api import compile, find_plan
    from labinfer.render import render
    from labinfer.render.measured import read_measured

    out = current()
    if as_json:
        if output is not None or format_ not in ("html", "json"):
            raise UsageError("cli.usage", "--json prints the graph as JSON", remedy="to write a file: -f json -o FILE")
        format_, output = "json", "-"
    if config is not None:
        plan = compile(model, weights=weights, config=config, **given(options))
    else:
        with out.progress() as progress:
            plan = find_plan(model, weights=weights, progress=progress, **given(options))
    text = render(plan, format_, read_measured(measured) if measured else ())
    if output is None:
        output = default_name(model, format_) if format_ == "html" or sys.stdout.isatty() else "-"
    if output == "-":
        click.echo(text, nl=False)
        return
    from labinfer.files import atomic_write

    with atomic_write(output) as stream:
        stream.write(text.encode())
    out.note(f"wrote {output}, {len(text.encode()):,} bytes")


def default_name(model: str, format_: str) -> str:
    """``llama.html`` for ``graphs/llama.yaml``: a file in the working directory, named after the model."""
    stem = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    stem = re.sub(r"\.(yaml|yml|json|gguf|safetensors)$", "", stem)
    stem = re.sub(r"[^\w.+-]", "_", stem).lstrip(".") or "model"
    return stem + FORMATS[format_][1]
