"""Drawings of a plan: a page, pictures, and files for other viewers. ``render(plan, "html")`` gives the text of one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from labinfer.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from labinfer.compiler.plan import Plan
    from labinfer.render.measured import MeasuredStep

FORMATS: dict[str, tuple[str, str, str]] = {
    "html": ("labinfer.render.html:render_html", ".html", "one page with graph, arena and summary"),
    "svg": ("labinfer.render.svg:render_svg", ".svg", "the graph as a picture"),
    "dot": ("labinfer.render.text:render_dot", ".dot", "Graphviz"),
    "mermaid": ("labinfer.render.text:render_mermaid", ".mmd", "Mermaid, for Markdown"),
    "json": ("labinfer.render.data:render_json", ".graph.json", "nodes and edges, for networkx"),
    "onnx": ("labinfer.render.onnx:render_onnx", ".onnx.json", "ONNX as JSON, for Netron"),
    "model-explorer": ("labinfer.render.data:render_model_explorer", ".explorer.json", "for Google's Model Explorer"),
    "perfetto": ("labinfer.render.trace:render_perfetto", ".trace.json", "for Perfetto and chrome://tracing"),
}
"""Format -> (where its function is, the end of its files' names, what it is)."""


def render(plan: Plan, format: str, measured: Sequence[MeasuredStep] = ()) -> str:
    """``plan`` drawn in one of ``FORMATS``, as text; raises ``UsageError`` for any other format.

    What steps of it took is drawn where there is a time axis.
    """
    if format not in FORMATS:
        remedy = did_you_mean(format, FORMATS) or "formats: " + ", ".join(FORMATS)
        raise UsageError("graph.format", f"there is no format '{format}'", remedy=remedy)
    from labinfer.render.drawing import draw

    module, _, function = FORMATS[format][0].partition(":")
    text: str = getattr(import_module(module), function)(draw(plan, measured))
    return text
