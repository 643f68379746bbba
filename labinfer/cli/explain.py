"""``labinfer explain``: a plan as a report."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from labinfer.cli.options import given, json_option, plan_options
from labinfer.cli.output import current
from labinfer.errors import UsageError

if TYPE_CHECKING:
    from labinfer.compiler.plan import Plan
    from labinfer.render.report_lines import Line

MIN_WIDTH, MAX_WIDTH = 72, 120
STYLES: dict[str, dict[str, Any]] = {"title": {"bold": True, "fg": "cyan"}, "head": {"bold": True}, "text": {}}


@click.command()
@click.argument("model", required=False)
@click.option("--summary", is_flag=True, help="The model, its limits and its devices only.")
@click.option("--ops", is_flag=True, help="Every op with its types, offsets, weights and attributes.")
@click.option("--values", is_flag=True, help="Every value by name, as --tap takes it, with its place in the arena.")
@plan_options
@json_option
def explain(
    model: str | None, summary: bool, ops: bool, values: bool, weights: str | None, as_json: bool, **options: Any
) -> None:
    """Explain a plan like a report.

    MODEL is a plan.json, or whatever `labinfer compile` takes, compiled as `labinfer run` would; without it, the
    embedded SmolLM2-135M-Instruct.
    """
    if summary and (ops or values):
        raise UsageError("cli.usage", "--summary leaves out what --ops and --values show")
    from labinfer.api import ONE_SEQUENCE, find_plan
    from labinfer.render.report import report

    out = current()
    with out.progress() as progress:
        plan = find_plan(model, weights=weights, progress=progress, defaults=ONE_SEQUENCE, **given(options))
    if as_json:
        found = asdict(report(plan)) | {"source": plan.source.model_dump(), "limits": plan.limits.model_dump()}
        found["placement"] = plan.placement and plan.placement.model_dump()
        out.json(found | ({"plan": plan.model_dump(mode="json", by_alias=True)} if ops or values else {}))
        return
    width = min(max(shutil.get_terminal_size((100, 24)).columns, MIN_WIDTH), MAX_WIDTH)
    for line in _lines(plan, width, summary, ops, values):
        out.data(click.style(line.text, **STYLES[line.kind]) if sys.stdout.isatty() and line.text else line.text)


def _lines(plan: Plan, width: int, summary: bool, ops: bool, values: bool) -> Iterator[Line]:
    from labinfer.render.report import report
    from labinfer.render.report_text import op_lines, report_lines, summary_lines, value_lines

    found = report(plan)
    if summary:
        yield from summary_lines(plan, found, width)
        return
    yield from report_lines(plan, found, width)
    if ops or not values:
        yield from op_lines(plan, width, detail=ops)
    if values:
        yield from value_lines(plan, width)
