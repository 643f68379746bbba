"""``labinfer.compile``: from whatever names a model to its plan.

Finds the map, the configuration and the tensor table; loads no weights and imports nothing that computes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from labinfer.compiler.blueprint import Blueprint, Match, read_map
from labinfer.compiler.check_names import check_names
from labinfer.compiler.compile import compile_plan
from labinfer.compiler.lower import lower, map_name
from labinfer.compiler.options import CompileOptions
from labinfer.compiler.passes import Tracer
from labinfer.compiler.plan import Plan, load_plan
from labinfer.compiler.rules import verify_graph
from labinfer.compiler.settings import ModelSource, TensorEntry, as_list, lookup
from labinfer.compiler.target import Target
from labinfer.errors import Errors, ErrorSink, InvalidFile, LabinferError, Place, UsageError, WeightsError, did_you_mean
from labinfer.home import graphs_dir, models_dir
from labinfer.ops.formats import FORMATS
from labinfer.progress import Progress
from labinfer.runtime.weights import Checkpoint, open_checkpoint, read_config
from labinfer.targets import real_target

DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
ONE_SEQUENCE = {"max_num_seqs": 1, "max_logits_rows": 1}
"""Limits of a plan that answers one prompt at a time."""

MODEL_SUFFIXES = (".yaml", ".yml", ".gguf", ".safetensors", ".json")
KINDS: dict[str, Literal["hf", "gguf"]] = {"safetensors": "hf", "gguf": "gguf"}


def compile(
    model: str | Path,
    *,
    weights: str | Path | None = None,
    config: str | Path | None = None,
    devices: str | Sequence[str] | None = None,
    cluster: str | Path | None = None,
    objective: str = "latency",
    workload: str = "",
    tracer: Tracer | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """The plan for ``model``: a map (path, or name in graphs/), a model directory, a GGUF or safetensors file, a name.

    A map without ``weights`` or ``config`` is compiled for its own example model. ``devices`` names the devices, with
    layers if placed by hand: ``"reference:0=0-7,reference:1=8-15"``. Over the devices of a ``cluster`` file, costs that
    were measured before (``labinfer profile``) decide: what is best for ``objective`` (``latency``, ``throughput`` or
    ``balanced``) and ``workload`` (``prompt=512,output=128,concurrency=8``). ``options`` are ``CompileOptions``'.
    ``progress`` shows the download of a model that is not here yet; without it a bar on stderr does. Raises a
    ``LabinferError`` that says what is wrong and where.
    """
    blueprint, source, checkpoint = read_model(model, weights, config, progress)
    if cluster is None:
        checked = compile_options(options)
        named = targets(devices or default_devices(len(checked.split)))
        return compile_plan(blueprint, source, named, checked, checkpoint, tracer)
    if devices is not None:
        raise UsageError("device.list", "the cluster file names the devices; give it or devices, not both")
    from labinfer.placing import cluster_goal  # numpy, which a plan for devices by name does without

    places, goal = cluster_goal(cluster, objective, workload)
    chosen = compile_options({"max_num_seqs": goal.workload.concurrency, **options})
    if len(chosen.split) > 1:
        raise UsageError("shard.cluster", "costs place whole layers only", remedy="name the ranks with --devices")
    return compile_plan(blueprint, source, places, chosen, checkpoint, tracer, goal)


def validate(
    model: str | Path,
    *,
    weights: str | Path | None = None,
    config: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check a map, its configuration and, where there are weights, their names and shapes; loads none of them.

    Returns what was checked: ``map``, ``family``, ``model``, and the number of ``weights`` and ``parameters``. Raises
    every error together, in branches of the map that this model does not take too.
    """
    blueprint, source, _ = read_model(model, weights, config, progress)
    sink = ErrorSink()
    for error in check_names(blueprint):
        sink.add(error)
    try:
        graph = lower(blueprint, source)
        verify_graph(graph, "lower")
    except LabinferError as failure:
        for error in failure.errors if isinstance(failure, Errors) else (failure,):
            sink.add(error)
    sink.check()
    return {
        "map": map_name(blueprint.files[0]),
        "family": blueprint.family,
        "model": source.name,
        "weights": len(graph.weights),
        "parameters": sum(math.prod(weight.shape) for weight in graph.weights.values()),
    }


def find_plan(
    model: str | Path | Plan | None,
    *,
    weights: str | Path | None = None,
    progress: Progress | None = None,
    defaults: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """The plan that ``model`` is, or the one compiled for it; None is the embedded default model.

    A plan has decided all ``options``, so giving one is a ``UsageError``; ``defaults`` are taken where it is compiled.
    """
    if not isinstance(model, Plan) and not (model is not None and is_plan(model)):
        from labinfer.catalogue import resolve

        found = resolve(None, progress) if model is None else model
        return compile(found, weights=weights, progress=progress, **{**(defaults or {}), **options})
    if options:
        what = "the plan" if isinstance(model, Plan) else f"{model} is a plan and"
        raise UsageError("run.plan-decides", f"{what} has decided {', '.join(options)}", remedy="compile it again")
    return model if isinstance(model, Plan) else load_plan(model)


def is_plan(model: str | Path) -> bool:
    """Whether ``model`` is meant as a plan file: a .json file that is not a model's config.json."""
    return Path(model).suffix == ".json" and Path(model).name != "config.json"


def compile_options(options: Mapping[str, Any]) -> CompileOptions:
    """``options`` by name; an unknown one is a ``UsageError``."""
    known = CompileOptions.__dataclass_fields__
    for name in options:
        if name not in known:
            raise UsageError("limits.unknown", f"there is no option '{name}'", remedy=did_you_mean(name, known))
    return CompileOptions(**options)


def read_model(
    model: str | Path,
    weights: str | Path | None = None,
    config: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Blueprint, ModelSource, str | None]:
    """The map, the configuration and the checkpoint path (None without weights) that ``model`` stands for."""
    map_path = find_map(model)
    if map_path is None and Path(model).name == "config.json":
        config = model
    elif map_path is None:
        weights = weights or find_model(model, progress)
    blueprint = read_map(map_path) if map_path else None
    if weights is not None and has_weights(Path(weights)):
        with open_checkpoint(weights) as checkpoint:
            source = checkpoint_source(checkpoint)
    elif weights is not None or config is not None:
        path = Path(config or weights or "")
        source = config_source(read_config(path), str(path), path.parent.name if path.is_file() else path.name)
    elif blueprint is not None and blueprint.example is not None:
        source = config_source(blueprint.example.config, f"{map_path} (example)", blueprint.example.name)
    else:
        raise UsageError("map.no-example", f"{model} has no example model: give --weights or --config")
    blueprint = blueprint or read_map(family_map(source))
    digest = sha256(*(file.read_bytes() for file in blueprint.files))
    source = ModelSource(
        source.kind, source.config, source.place, source.tensors, source.format, source.name,
        {"map": digest, **source.digests},
    )  # fmt: skip
    found = str(Path(weights).resolve()) if source.tensors is not None and weights is not None else None
    return blueprint, source, found


def find_map(model: str | Path) -> Path | None:
    """The map file that ``model`` names, by path or by name in graphs/ (``llama.yaml``, ``llama``), else None."""
    path = Path(model)
    is_map, is_name = path.suffix in (".yaml", ".yml"), path.name == str(path)
    if is_map and path.is_file():
        return path
    shipped = graphs_dir() / (path.name if is_map else f"{path.name}.yaml")
    if is_name and shipped.is_file() and (is_map or not path.exists()):
        return shipped
    if not is_map:
        return None
    names = [file.name for file in graphs_dir().glob("*.yaml")]
    raise InvalidFile("map.missing", f"there is no map '{model}'", remedy=did_you_mean(path.name, names))


def names_model(text: str) -> bool:
    """Whether ``text`` names a model (a path, a map, a name of the catalogue) rather than being something to say.

    A word that is close to a known name is a ``UsageError``.
    """
    if os.path.exists(text) or text.startswith("hf:"):
        return True
    if any(character.isspace() for character in text):
        return False
    if "/" in text or Path(text).suffix in MODEL_SUFFIXES:
        return True
    from labinfer.catalogue import load

    known = {*load(), *(file.stem for file in graphs_dir().glob("*.yaml"))}
    if text not in known and (remedy := did_you_mean(text, known)):
        raise UsageError("model.unknown", f"no file and no model is called '{text}'", remedy=remedy)
    return text in known


def find_model(model: str | Path, progress: Progress | None = None) -> Path:
    """The file or folder that ``model`` names, pulled first when it is the name of a model that is not here."""
    path = Path(model)
    if os.path.exists(path):
        return path
    if path.suffix in (".gguf", ".safetensors") or str(model).startswith(("/", "./", "../", "~")):
        message = "no such file or directory"
        raise WeightsError("weights.missing-file", message, place=Place(str(model)), remedy="check the path")
    from labinfer.catalogue import resolve

    return resolve(str(model), progress)


def family_map(source: ModelSource) -> Path:
    """The shipped map whose ``match`` has the model's type or architecture."""
    key = "model_type" if source.kind == "hf" else "general.architecture"
    wanted = source.config.get(key)
    if not isinstance(wanted, str):
        raise InvalidFile(
            "config.no-model-type",
            f"{source.place} states no {key}",
            remedy="name the map, and the model with --weights",
        )
    texts = {file: file.read_text("utf-8") for file in graphs_dir().glob("*.yaml")}
    files = sorted(texts, key=lambda file: (source.kind == "hf" or "gguf_has" not in texts[file], file.stem != wanted))
    for file in files:
        if wanted in texts[file] and matches(read_map(file).match, source, wanted):  # reading a map costs milliseconds
            return file
    remedy = did_you_mean(wanted, [file.stem for file in files]) or "write one: docs/add-a-family.md"
    raise InvalidFile("map.unknown-family", f"{source.place}: no map matches {key} '{wanted}'", remedy=remedy)


def matches(match: Match, source: ModelSource, wanted: str) -> bool:
    """Whether a map that states ``match`` is for a model of type ``wanted``."""
    if source.kind == "hf":
        return wanted in as_list(match.model_type)
    return wanted in as_list(match.gguf) and (match.gguf_has is None or lookup(source, match.gguf_has) is not None)


def has_weights(path: Path) -> bool:
    """Whether ``path`` is or holds weights, rather than a config alone."""
    if path.is_file():
        return path.name != "config.json"
    return not path.is_dir() or any(path.glob("*.safetensors*")) or any(path.glob("*.gguf"))


def checkpoint_source(checkpoint: Checkpoint) -> ModelSource:
    """What the compiler needs of an open checkpoint."""
    tensors = {name: TensorEntry(info.shape, info.format) for name, info in checkpoint.tensors.items()}
    stated = {name: value for name, value in checkpoint.config.items() if not name.startswith("tokenizer.")}
    table = [[info.name, info.format, list(info.shape), info.offset] for info in checkpoint.tensors.values()]
    digests = {"config": digest_json(stated), "weights": digest_json(sorted(table))}
    path = Path(checkpoint.path)
    pulled = path.resolve().parent.parent == models_dir().resolve()  # its file is known, what it calls itself is not
    title = None if pulled else checkpoint.config.get("general.name")
    name = str(title or (path.name if path.is_dir() else path.stem))
    kind = KINDS[checkpoint.kind]
    return ModelSource(kind, checkpoint.config, str(path), tensors, "f32", name, digests)


def config_source(config: Mapping[str, Any], place: str, name: str) -> ModelSource:
    """What the compiler needs of a config.json alone; weights are assumed stored in its dtype."""
    stated = config.get("dtype") or config.get("torch_dtype") or "float32"
    stored = DTYPES.get(str(stated), "f32")
    assert stored in FORMATS
    return ModelSource("hf", config, place, None, stored, name, {"config": digest_json(config)})


def sha256(*parts: bytes) -> str:
    """The digest of ``parts``, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def digest_json(value: object) -> str:
    """The digest of plain data, whatever the order of its keys."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode())


def default_devices(ranks: int = 1) -> str:
    """The devices when none are named: ``$LABINFER_DEVICES``, else ``cpu`` where its kernels can be compiled.

    Several ranks get one each of that kind.
    """
    from importlib.util import find_spec

    found = os.environ.get("LABINFER_DEVICES") or ("cpu" if find_spec("numba") else "reference")
    return found if ranks == 1 or not found.isidentifier() else ",".join(f"{found}:{rank}" for rank in range(ranks))


def replica_options(options: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """What to compile each of ``count`` replicas with, for ``options`` of all: each gets its part of the devices.

    Without devices each gets one of the default kind, and CPUs share the cores.
    """
    if count == 1:
        return [dict(options)]
    names = str(options.get("devices") or default_devices(count * (options.get("tensor_parallel_size") or 1))).split(
        ","
    )
    if len(names) % count:
        message = f"{len(names)} devices cannot be divided among {count} replicas"
        raise UsageError("replicas.devices", message, remedy="name as many for each, in order: --devices")
    size, threads = len(names) // count, real_target(names[0].partition("=")[0].strip()).threads
    shared = {"threads": max(1, threads // len(names))} if threads else {}
    return [{**shared, **options, "devices": ",".join(names[part * size :][:size])} for part in range(count)]


def targets(devices: str | Sequence[str] | None) -> list[Target]:
    """Devices as the compiler sees them, from ``"reference"`` or ``"reference:0=0-7,reference:1=8-15"`` or a list."""
    devices = devices or default_devices()
    items = devices.split(",") if isinstance(devices, str) else devices
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise UsageError("device.list", f"devices are names, got {devices!r}")
    found = [_target(item.strip()) for item in items if item.strip()]
    names = [target.name for target in found]
    if not found or len(set(names)) < len(names):
        raise UsageError("device.list", f"devices must be named once each, got '{', '.join(items)}'")
    return found


def _target(item: str) -> Target:
    name, assigned, layers = item.partition("=")
    target = real_target(name)
    if not assigned:
        return target
    match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", layers)
    span = (int(match[1]), int(match[2] or match[1])) if match else None
    if span is None or span[1] < span[0]:
        raise UsageError("device.layers", f"'{item}' should be like '{name}=0-7'")
    return replace(target, layers=span)
