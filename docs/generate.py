"""Write the generated parts of README.md and docs/*.md: ``python docs/generate.py``; ``--check`` only compares.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; ``PARTS`` has a function for each.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, get_type_hints

import click
import yaml

from labinfer.cli.main import COMMANDS, SECTIONS, cli
from labinfer.compiler import blueprint, cluster, placement_record, plan
from labinfer.compiler.blueprint import read_map
from labinfer.compiler.costs.roofline import specifications
from labinfer.errors import LabinferError
from labinfer.home import graphs_dir
from labinfer.ops import OPS
from labinfer.ops.activations import ALIASES, FUNCTIONS, KNOWN_NAMES
from labinfer.ops.base import OpAttrs, OpSpec
from labinfer.ops.formats import FORMATS
from labinfer.ops.fusions import FUSIONS
from labinfer.runtime.sampling import SamplingParams
from labinfer.service.app import OPERATIONS
from labinfer.service.options import ServiceOptions

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")))
_PART = re.compile(r"(<!-- generated: (?P<name>[\w -]+) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def rewritten(page: Path) -> str:
    """The text of ``page`` with its generated parts made afresh."""
    text = page.read_text("utf-8")
    return _PART.sub(lambda found: f"{found[1]}\n{PARTS[found['name']]().strip()}\n\n{found[4]}", text)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


def code(text: object) -> str:
    """Inline code."""
    return f"`{text}`"


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring on one line, reST's double backquotes as Markdown's."""
    return " ".join((text or "").strip().split("\n\n")[0].split()).replace("``", "`")


def whole(text: str | None) -> str:
    """A docstring's paragraphs, each on one line."""
    paragraphs = (text or "").strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()).replace("``", "`") for paragraph in paragraphs)


# Types, from JSON Schema


def type_text(schema: dict[str, Any]) -> str:
    """What a JSON Schema allows, in a few words."""
    if options := schema.get("anyOf") or schema.get("oneOf"):
        kinds = dict.fromkeys(map(type_text, options))
        return "expression" if {"text", "integer", "number"} <= set(kinds) else " or ".join(kinds)
    if "$ref" in schema:
        return NAMES.get(name := schema["$ref"].rsplit("/", 1)[-1], name)
    if set(schema.get("enum", ())) == set(KNOWN_NAMES):
        return "an [activation](#activation-functions)"
    if "enum" in schema or "const" in schema:
        return " or ".join(code(each) for each in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        parts = schema.get("prefixItems")
        return f"[{', '.join(map(type_text, parts))}]" if parts else f"list of {type_text(schema.get('items', {}))}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"mapping of {type_text(inner)}" if isinstance(inner, dict) and inner else "mapping"
    words = {"null": "none", "boolean": "true or false", "string": "text", "integer": "integer", "number": "number"}
    bound = {"minimum": "≥", "exclusiveMinimum": ">"}
    limits = [f" {sign} {schema[key]:g}" for key, sign in bound.items() if key in schema]
    return words.get(str(kind), "anything") + "".join(limits)


NAMES = {
    "ConfigEntry": "[config entry](#config)", "Check": "[check](#check)", "Match": "[match](#match)",
    "OpLine": "[op](#op)", "UseLine": "[use](#use)", "RepeatLine": "[repeat](#repeat)",
    "WeightEntry": "[weight](#weights)", "Regroup": "[transform](#transforms)", "Example": "[example](#example)",
}  # fmt: skip
"""How a part of the map language is named and linked where it is the type of a key."""


def field_type(schema: dict[str, Any]) -> str:
    """``type_text`` in the words of the map language."""
    return type_text(schema).replace("text or list of text", "name or list of names").removesuffix(" or none")


def fields(model: Any, types: Callable[[dict[str, Any]], str] = field_type) -> str:
    """The keys of a pydantic model as a table."""
    schema = model.model_json_schema(by_alias=True)
    schema = schema.get("$defs", {}).get(schema.get("$ref", "").rsplit("/", 1)[-1], schema)  # of a recursive model
    required = set(schema.get("required", ()))
    rows = []
    for name, each in schema.get("properties", {}).items():
        default = "required" if name in required else default_text(each)
        rows.append([code(name), types(each), default, meaning(model, name, each)])
    if not any(row[3] for row in rows):
        return table(["key", "what", "default"], [row[:3] for row in rows])
    return table(["key", "what", "default", "meaning"], rows)


def meaning(model: Any, name: str, schema: dict[str, Any]) -> str:
    """What a key means: its description in the code; only those of an op's attributes stand in a docstring."""
    described = schema.get("description", "")
    assert described or issubclass(model, OpAttrs), f"give {model.__name__}.{name} a description"
    return str(described).replace("``", "`")


def default_text(schema: dict[str, Any]) -> str:
    """The default of a field, in YAML's words."""
    default = schema.get("default")
    if default is None or default in ([], {}, ""):
        return ""
    return code(str(default).lower() if isinstance(default, bool) else default)


# Parts of the pages


def ops() -> str:
    """Every op of the map language."""
    index = ", ".join(f"[`{kind}`](#{kind})" for kind in sorted(OPS))
    return "\n\n".join([f"There are {len(OPS)}: {index}.", *(op(OPS[kind]) for kind in sorted(OPS))])


def activations() -> str:
    """The activation functions and their other names."""
    others = {name: [code(each) for each, canonical in ALIASES.items() if canonical == name] for name in FUNCTIONS}
    return table(["function", "other names"], [[code(name), ", ".join(names)] for name, names in others.items()])


def op(spec: OpSpec) -> str:
    """One op: operands, weights, attributes and rules."""
    needed = len(spec.inputs) - spec.optional_inputs
    inputs = [*spec.inputs[:needed], *(f"{name}?" for name in spec.inputs[needed:])]
    facts = [f"in: {', '.join(map(code, inputs))}", f"out: {', '.join(map(code, spec.outputs)) or 'nothing'}"]
    if spec.weights:
        facts.append("weights: " + ", ".join(code(slot.name + ("?" if slot.optional else "")) for slot in spec.weights))
    if spec.state:
        facts.append("needs `state`")
    if spec.view:
        facts.append("a view: nothing is copied")
    if over := [spec.inputs[i] for i in spec.inplace.get(0, ())]:
        facts.append(f"may be written over {' or '.join(map(code, over))}")
    parts = [f"### {spec.kind}", whole(spec.__doc__), f"{'; '.join(facts)}.", "Shapes: " + shapes(spec)]
    if spec.Attrs.model_fields:
        parts.append(fields(spec.Attrs, type_text))
        if spec.Attrs.__doc__ != OpAttrs.__doc__:
            parts.append(whole(spec.Attrs.__doc__))
    return "\n\n".join(part for part in parts if part)


def shapes(spec: OpSpec) -> str:
    """The shape rules of an op, as its declaration tells them."""
    weights = first_paragraph(spec.weight_shapes.__doc__) if spec.weights else ""
    return " ".join(filter(None, [first_paragraph(spec.infer.__doc__), weights]))


def command_index() -> str:
    """The commands by section."""
    rows = []
    for section, names in SECTIONS.items():
        rows += [[section, f"[{name}](#labinfer-{name})", line.rstrip(".")] for name, (_, line) in names.items()]
    return table(["", "command", ""], rows)


def commands() -> str:
    """The help of every command."""
    return "\n\n".join(f"## labinfer {name}\n\n```\n{help_text(name)}\n```" for name in COMMANDS)


def help_text(name: str) -> str:
    """What ``labinfer NAME --help`` prints on a terminal of 100 columns."""
    outer = click.Context(cli, info_name="labinfer")
    command = cli.get_command(outer, name)  # type: ignore[attr-defined]
    inner = click.Context(command, info_name=name, parent=outer, terminal_width=98)
    return str(command.get_help(inner)).rstrip()


def exit_codes() -> str:
    """The exit codes, from the error classes."""
    rows = [["0", "", "success"], ["1", code("LabinferError"), "a failure while running"]]
    classes = [each for each in LabinferError.__subclasses__() if "exit_code" in vars(each)]
    rows += [
        [str(each.exit_code), code(each.__name__), first_paragraph(each.__doc__).rstrip(".")]
        for each in sorted(classes, key=lambda each: each.exit_code)
    ]
    rows += [["130", "", "interrupted (Ctrl-C)"], ["141", "", "the reader of a pipe went away"]]
    rows += [["143", "", "terminated"]]
    return table(["exit code", "exception", "meaning"], rows)


def families() -> str:
    """The maps in graphs/."""
    rows = []
    for file in sorted(graphs_dir().glob("*.yaml")):
        read = read_map(file)
        types, gguf = ([each] if isinstance(each, str) else each for each in (read.match.model_type, read.match.gguf))
        named = ", ".join(map(code, types)), ", ".join(map(code, gguf)) or "–"
        example = read.example.name if read.example else ""
        text = file.read_text("utf-8")
        models = re.match(r"# (.+?)(?: \(|: |\. | as published)", text)
        assert models, f"the first line of {file.name} should name its models"
        lines = str(len(text.splitlines()))
        rows.append([f"[{read.family}](graphs/{file.name})", models[1], *named, example, lines])
    return table(["map", "models", "`model_type`", "GGUF architecture", "example in the map", "lines"], rows)


def formats() -> str:
    """The weight formats."""
    plain = ", ".join(code(name) for name in ("f32", "f16", "bf16"))
    blocks = ", ".join(code(each.name) for each in FORMATS.values() if each.block_size > 1)
    return f"Weights may be stored as {plain}, and in GGUF files also as {blocks}."


def fusions() -> str:
    """The declared fusions."""
    rows = []
    for fusion in FUSIONS:
        made = [f"{', '.join(part.outputs)} = ".removeprefix(" = ") for part in fusion.parts]
        calls = [f"{part.kind}({', '.join(part.inputs)})" for part in fusion.parts]
        parts = [left + right for left, right in zip(made, calls, strict=True)]
        rows.append([code(fusion.kind), code("; ".join(parts))])
    return table(["fused op", "what it is made of"], rows)


def knobs() -> str:
    """The sampling parameters."""
    rows = []
    for name, hint in get_type_hints(SamplingParams, include_extras=True).items():
        default = SamplingParams.__dataclass_fields__[name].default
        shown = (
            "none" if default in (None, ()) else code(str(default).lower() if isinstance(default, bool) else default)
        )
        limits = [each.limits for each in hint.__metadata__ if not isinstance(each, str)]
        rows.append([code(name), shown, " ".join(limits), hint.__metadata__[-1].replace("``", "`")])
    return table(["parameter", "default", "values", "meaning"], rows)


def plan_fields() -> str:
    """The parts of a plan, field by field."""
    parts = [
        plan.Plan, plan.Source, plan.Limits, plan.CacheGroup, plan.PlanDevice, plan.Stage, plan.Entry, plan.PlanOp,
        plan.PlanValue, plan.Arena, plan.StageBytes, plan.PlanState, plan.PlanWeight, plan.PlanPart,
        placement_record.PlanPlacement, placement_record.StagePrediction, placement_record.PlannedStep,
        placement_record.OtherPlacement, placement_record.Change,
    ]  # fmt: skip
    return "\n\n".join(f"### {each.__name__}\n\n{whole(each.__doc__)}\n\n{fields(each, type_text)}" for each in parts)


def short_plan() -> str:
    """The plan that docs/plan.md begins with: one op of each block, the first weights, short digests."""
    import labinfer
    from labinfer.compiler.plan_json import compact_json

    limits = {"max_model_len": 64, "max_num_batched_tokens": 8, "max_num_seqs": 1}
    model = "tests/golden/llama-llama3"
    found = json.loads(labinfer.compile(ROOT / model, devices="reference", **limits).dump())
    found["source"]["checkpoint"] = f"/…/{model}"
    found["source"]["sha256"] = {name: f"{digest[:4]}…" for name, digest in found["source"]["sha256"].items()}
    for block in found["stages"][0]["blocks"].values():
        block[1:] = ["…"] if len(block) > 1 else []
    found["weights"] = [*found["weights"][:3], "…"]
    return "```\n" + compact_json(found).replace('"…"', "…") + "\n```"


def service_paths() -> str:
    """The paths of the service."""
    rows = [[code(each.method), code(each.path), each.summary] for each in OPERATIONS]
    return table(["Method", "Path", "What for"], rows)


def service_threats() -> str:
    """What could be done with each path, and by whom."""
    rows = [[code(each.path), "anyone" if each.public else "a key", each.threat] for each in OPERATIONS]
    return table(["Path", "Needs", "What it could be used for, and the bound"], rows)


def service_clients() -> str:
    """The clients that ``make compat`` tries, with their versions."""
    clients = yaml.safe_load((ROOT / "tests" / "compat" / "clients.yaml").read_text("utf-8"))
    rows = []
    for name, client in clients.items():
        registry = "python" if "python" in client else "node"
        package, _, version = client[registry][0].rpartition("==" if registry == "python" else "@")
        kind, passed = "PyPI" if registry == "python" else "npm", "yes" if client.get("passed", True) else "not yet"
        rows.append([name, f"{code(package)} {version} ({kind})", client["tried"], passed])
    return table(["client", "version", "what is tried", "passed"], rows)


def service_limits() -> str:
    """The limits of the service that are numbers."""
    units = {"bytes": "bytes", "seconds": "s"}
    rows = [
        [code(each.name), f"{each.default:,} {units.get(each.name.rpartition('_')[2], '')}".strip()]
        for each in fields_of(ServiceOptions)
        if isinstance(each.default, int | float) and each.name != "port"
    ]
    return table(["`ServiceOptions`", "Default"], rows)


def schema_of(name: str) -> Callable[[], str]:
    """The part of one element of the map language."""
    return lambda: fields(getattr(blueprint, name))


def cluster_fields() -> str:
    """The keys of a cluster file."""
    parts = [("The file", cluster.Cluster), ("A device", cluster.ClusterDevice), ("A link", cluster.ClusterLink)]
    parts[2:2] = [("A host", cluster.ClusterHost), ("`tls`", cluster.ClusterTls)]
    return "\n\n".join(f"**{title}**\n\n{fields(each, type_text)}" for title, each in parts)


def catalogue_of_devices() -> str:
    """The devices that ``like:`` takes."""
    rows = [
        [code(name), each.name, f"{each.memory_gb:g}", f"{each.gb_per_second:g}", f"{each.tflops:g}", each.source]
        for name, each in specifications().items()
    ]
    return table(["like", "device", "GB", "GB/s", "TFLOP/s", "source"], rows)


PARTS: dict[str, Callable[[], str]] = {
    "ops": ops, "command index": command_index, "commands": commands,
    "exit codes": exit_codes, "families": families, "formats": formats,
    "fusions": fusions, "activations": activations, "plan fields": plan_fields, "sampling parameters": knobs,
    "short plan": short_plan, "cluster": cluster_fields, "devices": catalogue_of_devices,
    "service paths": service_paths, "service threats": service_threats,
    "service limits": service_limits, "service clients": service_clients,
    "map": schema_of("Blueprint"), "config": schema_of("ConfigEntry"), "check": schema_of("Check"),
    "match": schema_of("Match"), "op": schema_of("OpLine"), "use": schema_of("UseLine"),
    "repeat": schema_of("RepeatLine"),
    "weight": schema_of("WeightEntry"), "transform": schema_of("Regroup"), "example": schema_of("Example"),
}  # fmt: skip


def picture() -> str:
    """The picture of the README."""
    import labinfer
    from labinfer.render import render

    return render(labinfer.compile("llama", devices="reference"), "svg")


def files() -> Iterator[tuple[Path, str]]:
    """Every file with generated parts, and what should be in it."""
    yield from ((page, rewritten(page)) for page in PAGES)
    yield ROOT / "docs" / "images" / "llama.svg", picture()


def main() -> int:
    """Rewrite the files, or name those that would change."""
    stale = [(file, text) for file, text in files() if not file.exists() or file.read_text("utf-8") != text]
    for file, text in stale:
        if "--check" in sys.argv:
            print(f"{file.relative_to(ROOT)} is out of date: python docs/generate.py", file=sys.stderr)
        else:
            file.write_text(text, "utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
