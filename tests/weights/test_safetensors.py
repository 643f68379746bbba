import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from labinfer.errors import Errors, InvalidFile, LabinferError, UsageError, WeightsError
from labinfer.runtime.weights import dequantize, open_checkpoint, read_config

from .files import entry, safetensors

TENSORS = {
    "model.embed.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "model.norm.weight": np.ones(3, np.float16),
    "model.position_ids": np.arange(4).reshape(1, 4),
    "model.mask": np.array([True, False, True]),
    "model.empty": np.zeros((0, 3), np.float32),
    "scale": np.array(0.5, np.float64),
}


def codes(error: pytest.ExceptionInfo[LabinferError]) -> list[str]:
    """Codes of what was raised, after checking that each error has a place and a remedy and is about weights."""
    errors = error.value.errors if isinstance(error.value, Errors) else (error.value,)
    assert all(single.place and single.remedy for single in errors)
    assert error.value.exit_code == 5
    return [single.code for single in errors]


def open_codes(path: Path) -> list[str]:
    with pytest.raises(LabinferError) as error:
        open_checkpoint(path)
    return codes(error)


def open_header(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> list[str]:
    file = path / "bad.safetensors"
    file.write_bytes(safetensors(header, data))
    return open_codes(file)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 3}')
    return tmp_path


def test_reads_what_the_safetensors_package_wrote(model_dir: Path) -> None:
    with open_checkpoint(model_dir) as checkpoint:
        assert checkpoint.kind == "safetensors"
        assert checkpoint.config == {"model_type": "llama", "hidden_size": 3}
        assert set(checkpoint.tensors) == set(TENSORS)
        for name, expected in TENSORS.items():
            info, raw = checkpoint.tensors[name], checkpoint.raw(name)
            assert info.shape == expected.shape
            assert info.nbytes == expected.nbytes
            assert raw.tobytes() == expected.tobytes()
            assert not raw.flags.writeable
            np.testing.assert_array_equal(dequantize(raw, info.format, info.shape), expected.astype(np.float32))
    formats = {name: info.format for name, info in checkpoint.tensors.items()}
    assert formats["model.norm.weight"] == "f16"
    assert formats["model.mask"] == "bool"


def test_bf16(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors({"__metadata__": None, "w": entry("BF16", [2], 0, 4)}, b"\x80\x3f\x00\xc0"))
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.config == {}
        assert dequantize(checkpoint.raw("w"), "bf16", (2,)).tolist() == [1.0, -2.0]


def test_arrays_outlive_the_checkpoint(model_dir: Path) -> None:
    checkpoint = open_checkpoint(model_dir)
    raw = checkpoint.raw("model.norm.weight")
    checkpoint.close()
    checkpoint.close()
    assert raw.tobytes() == TENSORS["model.norm.weight"].tobytes()
    with pytest.raises(UsageError, match="closed"):
        checkpoint.raw("model.norm.weight")


def test_unknown_tensor_names_the_closest(model_dir: Path) -> None:
    with open_checkpoint(model_dir) as checkpoint, pytest.raises(WeightsError, match=r"mean 'model\.norm\.weight'"):
        checkpoint.raw("model.norm.weigth")


def test_file_cut_after_opening(model_dir: Path) -> None:
    with open_checkpoint(model_dir) as checkpoint:
        os.truncate(model_dir / "model.safetensors", 100)
        with pytest.raises(WeightsError, match="was cut to 100 bytes"):
            checkpoint.raw("scale")


HUGE = 1 << 62


@pytest.mark.parametrize(
    ("header", "data", "code"),
    [
        (b"", b"", "json.invalid"),
        (b"[]", b"", "json.invalid"),
        (b'{"a": 1', b"", "json.invalid"),
        (b'{"a\xff": 1}', b"", "json.invalid"),
        (b"[" * 100_000, b"", "json.invalid"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "json.invalid"),
        (b'{"a": {}, "a": {}}', b"", "json.repeated-key"),
        ({"__metadata__": {"n": 1}}, b"", "weights.corrupt"),
        ({"w": 3}, b"", "weights.corrupt"),
        ({"w": entry("F32", [1], 0, 4) | {"extra": 1}}, bytes(4), "weights.corrupt"),
        ({"w": {"dtype": "F32", "shape": [1]}}, b"", "weights.corrupt"),
        ({"w": entry("F8_E4M3", [4], 0, 4)}, bytes(4), "weights.unsupported-format"),
        ({"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, bytes(4), "weights.unsupported-format"),
        ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4), "weights.corrupt"),
        ({"w": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, bytes(4), "weights.corrupt"),
        ({"w": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, bytes(4), "weights.corrupt"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4), "weights.corrupt"),
        ({"w": entry("F32", [-1], 0, 4)}, bytes(4), "weights.corrupt"),
        ({"w": entry("F32", [10**4000], 0, 4)}, bytes(4), "weights.corrupt"),
        ({"w": entry("F32", [HUGE, 4], 0, 0)}, b"", "weights.corrupt"),
        ({"w": entry("F32", [0, HUGE], 0, 0)}, b"", "weights.corrupt"),
        ({"w": entry("F32", [1] * 9, 0, 4)}, bytes(4), "weights.corrupt"),
        ({"w": entry("F32", [2], 0, 4)}, bytes(4), "weights.corrupt"),
        ({"w": entry("F32", [1], 4, 0)}, bytes(4), "weights.corrupt"),
        ({"w": entry("F32", [2], 0, 8)}, bytes(4), "weights.truncated"),
        ({"w": entry("U8", [HUGE // 2**16], 0, HUGE // 2**16)}, b"", "weights.truncated"),
        ({"v": entry("F32", [2], 0, 8), "w": entry("F32", [2], 4, 12)}, bytes(12), "weights.overlap"),
        ({"w": entry("F32", [1], 0, 4)}, bytes(5), "weights.corrupt"),
        ({"w": entry("F32", [1], 4, 8)}, bytes(8), "weights.corrupt"),
        ({"\x1b[2Jw": entry("F32", [1], 0, 4)}, bytes(4), "weights.corrupt"),
    ],
)
def test_broken_header(tmp_path: Path, header: dict[str, Any] | bytes, data: bytes, code: str) -> None:
    assert open_header(tmp_path, header, data) == [code]


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0", b"\xff" * 8 + b"{}", b"\x10" + bytes(7) + b"{}"])
def test_broken_length(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert open_codes(tmp_path / "x.safetensors")[0] in ("weights.truncated", "weights.too-large")


def test_all_errors_of_a_file_in_one_run(tmp_path: Path) -> None:
    header = {"a": entry("F32", [2], 0, 4), "b": entry("F9", [1], 4, 8), "c": entry("F32", [4], 8, 24)}
    expected = ["weights.corrupt", "weights.unsupported-format", "weights.truncated"]
    assert open_header(tmp_path, header, bytes(12)) == expected


@pytest.mark.alone
@pytest.mark.parametrize("piece", [b"[],", b"{},", b"1,"])
def test_json_bombs_are_refused_quickly(tmp_path: Path, piece: bytes) -> None:
    start = time.perf_counter()
    header = b'{"w":[' + piece * (8_000_000 // len(piece)) + b"0]}"
    assert open_header(tmp_path, header) == ["json.too-large"]
    assert time.perf_counter() - start < 2  # 0.1 s on an idle machine


def shard(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    save_file(tensors, path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Laid out as the Hugging Face cache does: the snapshot holds links into ../../blobs."""
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    weight_map = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        shard(blobs / str(number), {f"layer.{number}.{part}": np.full(3, number, np.float32) for part in "ab"})
        (snapshot / name).symlink_to(f"../../blobs/{number}")
        weight_map |= {f"layer.{number}.{part}": name for part in "ab"}
    write_index(snapshot, weight_map)
    return snapshot


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(directory: Path) -> dict[str, str]:
    result: dict[str, str] = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    return result


def test_sharded_through_links(sharded: Path) -> None:
    for path in (sharded, sharded / "model.safetensors.index.json"):
        with open_checkpoint(path) as checkpoint:
            assert sorted(checkpoint.tensors) == ["layer.1.a", "layer.1.b", "layer.2.a", "layer.2.b"]
            assert checkpoint.raw("layer.2.b").view(np.float32).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0",
        "x.bin",
    ],
)
def test_unsafe_shard_names(sharded: Path, name: str) -> None:
    write_index(sharded, read_index(sharded) | {"evil": name})
    assert open_codes(sharded) == ["weights.unsafe-path"]


@pytest.mark.parametrize("name", ["x" * 5000 + ".safetensors", "\ud800.safetensors", "model-9.safetensors"])
def test_missing_shards(sharded: Path, name: str) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    write_index(sharded, read_index(sharded) | {"more": name})
    assert open_codes(sharded) == ["weights.missing-file"] * 2


def test_index_and_shards_must_agree(sharded: Path) -> None:
    weight_map = read_index(sharded)
    weight_map["layer.9"] = weight_map["layer.1.a"]
    weight_map["layer.1.b"] = weight_map["layer.2.a"]
    del weight_map["layer.2.b"]
    write_index(sharded, weight_map)
    bad, missing = "weights.bad-index", "weights.missing-tensor"
    assert open_codes(sharded) == [bad, bad, missing, missing]


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, "x"])
def test_bad_weight_map(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    assert open_codes(sharded) == ["weights.bad-index"]


def test_errors_of_all_shards_in_one_run(sharded: Path) -> None:
    for file in sharded.glob("model-*"):
        file.resolve().write_bytes(b"12345678")
    assert open_codes(sharded) == ["weights.too-large"] * 2


def test_pipe_and_directory_are_not_opened(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*"))
    first.unlink()
    second.unlink()
    os.mkfifo(first)
    second.mkdir()
    assert open_codes(sharded) == ["weights.unreadable"] * 2


def test_directories_without_usable_weights(tmp_path: Path) -> None:
    assert open_codes(tmp_path) == ["weights.missing-file"]
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="pickle"):
        open_checkpoint(tmp_path)
    assert open_codes(tmp_path / "pytorch_model.bin") == ["weights.unsupported-format"]
    assert open_codes(tmp_path / "nowhere") == ["weights.missing-file"]
    assert open_codes(tmp_path / ("x" * 5000)) == ["weights.missing-file"]
    for name in "ab":
        shard(tmp_path / f"{name}.safetensors", {"w": np.zeros(1)})
    assert open_codes(tmp_path) == ["weights.ambiguous"]


def test_read_config_alone(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "qwen3"}')
    assert read_config(tmp_path) == read_config(config) == {"model_type": "qwen3"}
    assert read_config(tmp_path / "model.safetensors") == {"model_type": "qwen3"}
    for nowhere in (tmp_path / "other", tmp_path / "other" / "model.safetensors", tmp_path / "x.txt"):
        with pytest.raises(WeightsError) as missing:
            read_config(nowhere)
        assert codes(missing) == ["weights.missing-file"]
    config.write_text('{\n  "model_type": "qwen3",\n  "x": }\n')
    with pytest.raises(InvalidFile) as error:
        read_config(tmp_path)
    assert error.value.place is not None
    assert (error.value.place.line, error.value.place.column, error.value.place.text) == (3, 8, '  "x": }')


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / "x.safetensors"


VALID = safetensors(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("F32", [2, 3], 0, 24),
        "b.weight": entry("BF16", [5], 24, 34),
    },
    bytes(range(34)),
)
JSON_BITS = st.sampled_from([b"[", b"]", b"{", b"}", b",", b'"', b"9", b"-", b"e9", b"null", b"\xff", b"\\u0000"])


@settings(max_examples=400, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(VALID)), st.integers(0, 3), JSON_BITS | st.binary(max_size=3)), max_size=4
    ),
    keep_length=st.booleans(),
    cut=st.none() | st.integers(0, len(VALID)),
)
def test_mutated_files_never_crash(
    scratch: Path, edits: list[tuple[int, int, bytes]], keep_length: bool, cut: int | None
) -> None:
    content = VALID
    for position, removed, inserted in edits:
        content = content[:position] + inserted + content[position + removed :]
    if not keep_length and len(content) > 42:  # let the header's length follow the edits, to get past that check
        content = (len(content) - 42).to_bytes(8, "little") + content[8:]
    scratch.write_bytes(content[:cut])
    start, exit_code = time.perf_counter(), 0
    try:
        with open_checkpoint(scratch) as checkpoint:
            for name, info in checkpoint.tensors.items():
                assert dequantize(checkpoint.raw(name), info.format, info.shape).shape == info.shape
    except LabinferError as error:
        exit_code = error.exit_code
        str(error).encode()  # printable
    assert exit_code in (0, 5)
    assert time.perf_counter() - start < 1
