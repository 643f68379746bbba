"""Reading maps: inheritance entry by entry, places of everything, and the shipped maps."""

from __future__ import annotations

from pathlib import Path

import pytest

from labinfer.compiler.blueprint import OpLine, RepeatLine, UseLine, read_map
from labinfer.errors import InvalidFile, LabinferError
from labinfer.home import graphs_dir

from .tiny import MAP, tiny_map

SHIPPED = sorted(graphs_dir().glob("*.yaml"))

CHILD = """\
labmap: 1
family: child
extends: tiny
match: {model_type: child}
config:
  vocab_size: {value: 32}
blocks:
  layer:
    - {op: linear, in: h, out: out, weight: out, out_features: hidden_size}
    - {op: add, in: [h, out], out: h}
weights:
  layers: {out: {hf: proj}}
ignore: ["*.bias"]
"""


def child(folder: Path, text: str = CHILD) -> Path:
    tiny_map(folder)
    path = folder / "child.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_maps(path: Path) -> None:
    blueprint = read_map(path)
    assert blueprint.files[0] == path
    assert blueprint.outputs == ["logits"]
    assert blueprint.example is not None
    for line in (*blueprint.graph, *(line for block in blueprint.blocks.values() for line in block)):
        place = line.place()
        assert place is not None
        assert place.text is not None
        assert place.text[place.column - 1 :].startswith(("{", "op", "use", "repeat"))


def test_a_map_inherits_entry_by_entry(tmp_path: Path) -> None:
    merged, base = read_map(child(tmp_path)), read_map(tmp_path / "tiny.yaml")
    assert [file.name for file in merged.files] == ["child.yaml", "tiny.yaml"]
    assert merged.family == "child"
    assert list(merged.config) == ["hidden_size", "num_layers", "vocab_size"]
    assert (merged.config["vocab_size"].value, merged.config["vocab_size"].hf) == (32, None)
    assert merged.config["hidden_size"] == base.config["hidden_size"]
    assert len(merged.blocks["layer"]) == 2
    assert merged.graph == base.graph
    assert set(merged.weights["layers"]) == {"prefix", "qkv", "out", "out_bias"}
    assert merged.weights["layers"]["out"].hf == "proj"
    assert merged.ignore == ["*.bias"]
    assert merged.example == base.example
    place = merged.config["hidden_size"].place("hf")
    assert place is not None
    assert (Path(place.file).name, place.line) == ("tiny.yaml", 5)


def test_lines_are_told_apart_by_their_key(tmp_path: Path) -> None:
    blueprint = read_map(
        tiny_map(tmp_path, lambda text: text.replace("  layer:\n", "  layer:\n    - {use: none}\n  none:\n"))
    )
    kinds = [type(line) for line in blueprint.graph]
    assert kinds == [OpLine, RepeatLine, OpLine, OpLine]
    assert isinstance(blueprint.blocks["layer"][0], UseLine)


def test_a_place_is_that_of_the_value(tmp_path: Path) -> None:
    line = read_map(tiny_map(tmp_path)).graph[1]
    place = line.place("times")
    assert place is not None
    assert place.text is not None
    assert place.text[place.column - 1 :].startswith("num_layers, carry")


@pytest.mark.parametrize(
    ("old", "new", "key", "meant"),
    [
        ("hf: vocab_size, default:", "hf: vocab_size, defualt:", "config.vocab_size.defualt", "default"),
        ("config:", "confg: {}\nconfig:", "confg", "config"),
        ("times: num_layers", "times: num_layers, cary: h", "graph.1.cary", "carry"),
        ("{hf: bias, optional: true}", "{hf: bias, optinal: true}", "weights.layers.out_bias.optinal", "optional"),
        ("{hf: qkv}", "{hf: qkv, hf_fix: {trnspose: true}}", "weights.layers.qkv.hf_fix.trnspose", "transpose"),
        ("model_type: tiny}", "model_type: tiny, gguf_hass: x}", "match.gguf_hass", "gguf_has"),
    ],
)
def test_an_unknown_key_is_compared_with_those_of_its_level(
    tmp_path: Path, old: str, new: str, key: str, meant: str
) -> None:
    assert old in MAP
    with pytest.raises(InvalidFile) as caught:
        read_map(tiny_map(tmp_path, lambda text: text.replace(old, new, 1)))
    assert (caught.value.code, caught.value.message) == ("map.unknown-key", f"unknown key '{key}'")
    assert caught.value.remedy == f"did you mean '{meant}'?"


def test_an_unknown_attribute_is_marked_itself_and_not_its_value(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile) as caught:
        read_map(tiny_map(tmp_path, lambda text: text.replace("op: select_rows", "op: select_rows, rows: 3")))
    place = caught.value.place
    assert caught.value.code == "map.unknown-attribute"
    assert place is not None
    assert place.text is not None
    assert place.text[place.column - 1 :].startswith("rows: 3")


def test_errors_of_a_base_are_told_at_the_base(tmp_path: Path) -> None:
    path = child(tmp_path)
    tiny_map(tmp_path, lambda text: text.replace("op: select_rows", "op: select_row"))
    with pytest.raises(InvalidFile) as caught:
        read_map(path)
    assert caught.value.code == "map.unknown-op"
    assert caught.value.place is not None
    assert caught.value.place.file.endswith("tiny.yaml")


@pytest.mark.parametrize("name", ["../child", "/etc/passwd", "tiny/../tiny", "", "a" * 5000, "tiny.yaml"])
def test_extends_names_a_family_not_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidFile) as caught:
        read_map(child(tmp_path, CHILD.replace("extends: tiny", f"extends: '{name}'")))
    assert caught.value.code == "map.unknown-family"


def test_maps_that_extend_one_another(tmp_path: Path) -> None:
    path = child(tmp_path)
    tiny_map(tmp_path, lambda text: text.replace("family: tiny", "family: tiny\nextends: child"))
    with pytest.raises(InvalidFile) as caught:
        read_map(path)
    assert caught.value.code == "map.extends-cycle"


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("times: num_layers, ", "", "graph.1"),
        ("family: tiny", "family: [tiny]", "family"),
        ("inputs: [token_ids, positions]", "inputs: [token_id, positions]", "inputs.0"),
        ("{op: select_rows", "{ops: select_rows", "graph.2"),
        ("repeat: layer", "repeat: layer, until: 3", "graph.1"),
    ],
)
def test_schema_errors_say_where(tmp_path: Path, old: str, new: str, where: str) -> None:
    assert old in MAP
    with pytest.raises(LabinferError) as caught:
        read_map(tiny_map(tmp_path, lambda text: text.replace(old, new)))
    assert where in caught.value.message
    assert caught.value.place is not None
    assert caught.value.place.line == MAP[: MAP.index(old)].count("\n") + 1
