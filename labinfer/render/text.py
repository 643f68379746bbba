"""The drawing as text for other tools: Graphviz DOT and Mermaid, layers folded, one cluster for each block."""

from __future__ import annotations

from collections.abc import Iterator

from labinfer.render.drawing import Drawing, Node, layers_text, outside_reads
from labinfer.render.palette import GROUND, HUES, mix

Edge = tuple[str, str, bool]
"""From, to, and whether it goes through the cache."""


def render_dot(drawing: Drawing) -> str:
    """Graphviz DOT: ``dot -Tsvg``."""
    lines = [
        f"digraph {_dot(drawing.plan.source.name)} {{",
        '  graph [fontname="Helvetica", fontsize=12, rankdir=TB, nodesep=0.25, ranksep=0.3, pencolor="#c9ccd3"]',
        '  node [fontname="Helvetica", fontsize=11, shape=box, style="rounded,filled", fillcolor=white]',
        '  edge [color="#8a909c", arrowsize=0.6, fontname="Helvetica", fontsize=9]',
    ]
    for name in _inputs(drawing):
        lines.append(f"  {_dot('in.' + name)} [label={_dot(name)}, shape=oval]")
    for number, section in enumerate(drawing.sections):
        indent = "  "
        if section.layers:
            lines += [
                f"  subgraph {_dot(f'cluster_{number}')} {{",
                f"    label={_dot(_section_title(drawing, number))}; labeljust=l",
            ]
            indent = "    "
        for index, node in enumerate(drawing.blocks[section.block].nodes):
            fill, line = (mix(HUES[node.category][0], GROUND[0]["surface"], share) for share in (0.12, 0.6))
            label, tip = _dot("\n".join(_label(node))), _dot(_tip(node))
            look = f'label={label}, fillcolor="{fill}", color="{line}", tooltip={tip}'
            lines.append(f"{indent}{_dot(_key(number, index))} [{look}]")
        if section.layers:
            lines.append("  }")
    for name in drawing.plan.stages[-1].outputs:
        lines.append(f"  {_dot('out.' + name)} [label={_dot(name)}, shape=oval]")
    for source, target, cache in _edges(drawing):
        lines.append(f"  {_dot(source)} -> {_dot(target)}" + (" [style=dashed]" if cache else ""))
    return "\n".join([*lines, "}", ""])


def render_mermaid(drawing: Drawing) -> str:
    """A Mermaid flowchart, as GitHub shows it inside a ```mermaid fence."""
    lines = ["flowchart TB"]
    for name in _inputs(drawing):
        lines.append(f"  {_id('in.' + name)}([{_quoted(name)}])")
    for number, section in enumerate(drawing.sections):
        indent = "  "
        if section.layers:
            lines.append(f"  subgraph section{number}[{_quoted(_section_title(drawing, number))}]")
            indent = "    "
        for index, node in enumerate(drawing.blocks[section.block].nodes):
            label = "<br/>".join(_mermaid_text(text) for text in _label(node))
            lines.append(f'{indent}{_id(_key(number, index))}["{label}"]:::{node.category}')
        if section.layers:
            lines.append("  end")
    for name in drawing.plan.stages[-1].outputs:
        lines.append(f"  {_id('out.' + name)}([{_quoted(name)}])")
    for source, target, cache in _edges(drawing):
        lines.append(f"  {_id(source)} {'-.->' if cache else '-->'} {_id(target)}")
    for category, (hue, _) in HUES.items():
        fill, line = (mix(hue, GROUND[0]["surface"], share) for share in (0.12, 0.6))
        lines.append(f"  classDef {category} fill:{fill},stroke:{line},color:#1c1e24")
    lines.append("  classDef frame fill:none,stroke:#9aa1ad")
    lines += [f"  class section{number} frame" for number, section in enumerate(drawing.sections) if section.layers]
    return "\n".join([*lines, ""])


def _inputs(drawing: Drawing) -> list[str]:
    made = {name for instance in drawing.instances for name in instance.slots}
    taken = dict.fromkeys(name for section in drawing.sections for name in outside_reads(section.first))
    return [name for name in taken if name not in made]


def _key(section: int, index: int) -> str:
    return f"s{section}.{index}"


def _section_title(drawing: Drawing, number: int) -> str:
    section = drawing.sections[number]
    name, count = drawing.blocks[section.block].title.split(".")[0], len(section.layers)
    title = f"{name} × {count}, layers {layers_text(section.layers)}"
    return title if len(drawing.plan.stages) == 1 else f"{title}, on {drawing.device(section.stage)}"


def _label(node: Node) -> list[str]:
    types = ", ".join(str(kind) for _, kind in node.outputs)
    return [text for text in (node.op.kind, node.short_name, types) if text]


def _tip(node: Node) -> str:
    weights = "".join(f"\n{slot}: {name}" for slot, name in node.weights.items())
    return f"{node.name}{weights}\n{node.op.origin}"


def _edges(drawing: Drawing) -> Iterator[Edge]:
    """Links inside of each section, and from section to section, as the first of its layers has them."""
    made: dict[str, str] = {name: "in." + name for name in _inputs(drawing)}
    sections: dict[tuple[int, int, int | None], int] = {}
    for number, section in enumerate(drawing.sections):
        sections.update({(section.stage, section.block, layer): number for layer in section.layers or (None,)})
    for instance in drawing.instances:
        number = sections[instance.stage, instance.block, instance.layer]
        first = drawing.sections[number].first is instance
        if first:
            for link in drawing.blocks[instance.block].links:
                if link.source is not None and link.target is not None:
                    yield _key(number, link.source), _key(number, link.target), link.cache
            for index, op in enumerate(instance.ops):
                for name in dict.fromkeys(name for name in op.inputs if name in made):
                    yield made[name], _key(number, index), False
        for index, op in enumerate(instance.ops):
            made.update({name: _key(number, index) for part in op.primitives() for name in part.outputs})
    for name in drawing.plan.stages[-1].outputs:
        yield made[name], "out." + name, False


def _dot(text: str) -> str:
    """A DOT string: quotes and backslashes escaped, line breaks as ``\\n``."""
    text = "".join(c for c in text if c >= " " or c == "\n").replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("\n", "\\n") + '"'


def _id(key: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in key)


def _quoted(text: str) -> str:
    return f'"{_mermaid_text(text)}"'


def _mermaid_text(text: str) -> str:
    """Text inside quotes: whatever Mermaid could read as syntax or HTML becomes a character code."""
    plain = "".join(c for c in text if c >= " ")
    return "".join(f"#{ord(c)};" if c in '"#&<>;`{}|\\' else c for c in plain)
