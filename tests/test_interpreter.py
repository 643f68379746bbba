"""The interpreter: fused and unfused agree to the bit, poison finds nothing, values can be watched and changed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import labinfer
from labinfer.errors import DoesNotFit, LabinferError, UsageError
from labinfer.llm import LLM
from labinfer.runtime.interpreter import MAX_TAPES
from labinfer.runtime.manager import Manager
from labinfer.runtime.poison import Poison
from labinfer.runtime.variables import Parameter, Tensor

from .tiny import FOLDERS, GOLDEN, tiny_plan

PROMPT = list(range(3, 30))


def logits(folder: Path, **options: Any) -> np.ndarray:
    with labinfer.load(folder, **options) as model:
        return model.logits(PROMPT)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_fused_equals_unfused_to_the_bit(folder: Path) -> None:
    plain = logits(folder, fuse="none", max_num_batched_tokens=10)
    np.testing.assert_array_equal(logits(folder, fuse="all", max_num_batched_tokens=10), plain)
    assert np.isfinite(plain).all()


@pytest.mark.parametrize(
    ("folder", "fused"),
    [
        ("llama-llama3", {"norm_qkv", "norm_glu", "rope_attention", "linear_add", "norm_head"}),
        ("qwen3-bias", {"norm_rope_attention"}),
    ],
)
def test_fusing_changes_the_schedule(folder: str, fused: set[str]) -> None:
    def kinds(fuse: Literal["none", "all"]) -> set[str]:
        plan = labinfer.compile(GOLDEN / folder, fuse=fuse)
        return {op.op for stage in plan.stages for block in stage.blocks.values() for op in block}

    assert fused <= kinds("all")
    assert not fused & kinds("none")


@pytest.mark.parametrize("options", [{}, {"fuse": "all"}, {"devices": "reference,reference:1"}], ids=str)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_poison_changes_no_bit(folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = logits(folder, max_num_batched_tokens=10, **options)
    monkeypatch.setenv("LABINFER_POISON", "1")
    with labinfer.load(folder, max_num_batched_tokens=10, **options) as model:
        assert all(isinstance(each.listeners[0], Poison) for each in model.interpreters)
        np.testing.assert_array_equal(model.logits(PROMPT), plain)


def test_poison_finds_a_value_that_dies_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = tiny_plan(tmp_path, max_num_batched_tokens=4)
    monkeypatch.setenv("LABINFER_POISON", "1")
    with labinfer.load(path) as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()
        [interpreter] = model.interpreters
        [poison] = interpreter.listeners
        assert isinstance(poison, Poison)
        span = poison.spans["h"]
        poison.live = [[each for each in live if each != span] for live in poison.live]
        assert np.isnan(model.logits([1, 2, 3])).any()


@pytest.fixture
def model() -> Any:
    with labinfer.load(GOLDEN / "phi3-window_odd_heads", max_num_batched_tokens=10) as opened:
        yield opened


def watch(model: LLM, name: str) -> list[np.ndarray]:
    seen: list[np.ndarray] = []
    with model.listen(name, seen.append):
        model.logits(PROMPT)
    return seen


def test_values_of_every_kind_can_be_watched(model: LLM) -> None:
    names = [name for interpreter in model.interpreters for name in interpreter.slots]
    ops = [op for interpreter in model.interpreters for op in interpreter.ops]
    windows = [name for op in ops if op.kind == "split" for name in op.outputs]
    assert windows
    for name in names:
        seen = watch(model, name)
        type_ = model.interpreters[0].slots[name].type
        rows = [10, 10, 7]
        assert [array.shape for array in seen] == [(count, *type_.shape[1:]) for count in rows], name
        assert all(np.isfinite(array).all() for array in seen), name
    qkv, parts = (np.concatenate(watch(model, name)) for name in ("layers.0.attn.qkv.qkv", windows[0]))
    np.testing.assert_array_equal(parts, qkv[:, : parts.shape[1]])


def test_what_is_watched_is_a_copy(model: LLM) -> None:
    plain = model.logits(PROMPT)

    def spoil(array: np.ndarray) -> None:
        array[:] = np.nan

    with model.listen("layers.0.attn.out", spoil):
        np.testing.assert_array_equal(model.logits(PROMPT), plain)


def test_every_value_can_be_replaced(model: LLM) -> None:
    plain = model.logits(PROMPT)
    for name in model.interpreters[0].slots:
        with model.listen(name, lambda array: array * 1.5 + 0.25):
            changed = model.logits(PROMPT)
        assert not np.array_equal(changed, plain), name
        with model.listen(name, lambda array: array):
            np.testing.assert_array_equal(model.logits(PROMPT), plain)


def test_a_replaced_window_changes_that_window_alone(model: LLM) -> None:
    ops = [op for op in model.interpreters[0].ops if op.kind == "split" and len(op.outputs) == 3]
    q, k, v = ops[0].outputs
    before = {name: np.concatenate(watch(model, name)) for name in (q, k, v)}
    seen: list[np.ndarray] = []
    with (
        model.listen(k, lambda array: np.zeros_like(array)),
        model.listen(k, seen.append),
        model.listen(v, seen.append),
    ):
        model.logits(PROMPT)
    assert not seen[0].any()
    np.testing.assert_array_equal(np.concatenate(seen[1::2]), before[v])


def test_ablation_by_hand() -> None:
    """An attention block whose output is replaced by zeros adds nothing to the residual stream."""
    with labinfer.load(GOLDEN / "llama-llama3") as model:
        seen: dict[str, np.ndarray] = {}

        def keep(name: str) -> Any:
            return lambda array: seen.update({name: array})

        with (
            model.listen("h", keep("h")),
            model.listen("layers.0.attn.out", lambda array: 0.0),  # type: ignore[arg-type, return-value]
            model.listen("layers.0.h", keep("after")),
        ):
            model.logits(PROMPT)
        np.testing.assert_array_equal(seen["h"], seen["after"])


def test_values_at_a_stage_boundary() -> None:
    folder = GOLDEN / "llama-llama3"
    with labinfer.load(folder) as one, labinfer.load(folder, devices="reference,reference:1") as two:
        [boundary] = two.interpreters[1].stage.inputs
        np.testing.assert_array_equal(watch(two, boundary)[0], watch(one, boundary)[0])
        with two.listen(boundary, np.negative), one.listen(boundary, np.negative):
            np.testing.assert_array_equal(two.logits(PROMPT), one.logits(PROMPT))


def test_the_plain_loop_comes_back_after_listening(model: LLM) -> None:
    [interpreter] = model.interpreters
    assert interpreter.listeners == []
    with model.listen("logits", lambda array: None):
        assert len(interpreter.listeners) == 1
    assert interpreter.listeners == []

    def fail() -> None:
        with model.listen("logits", lambda array: None):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert interpreter.listeners == []


def test_an_unknown_value_has_a_suggestion(model: LLM) -> None:
    with pytest.raises(UsageError) as caught, model.listen("layers.0.attn.ot", lambda array: None):
        pass
    assert caught.value.code == "run.unknown-value"
    assert caught.value.remedy == "did you mean 'layers.0.attn.out'?"


def test_a_replacement_of_another_shape_is_told(model: LLM) -> None:
    with model.listen("layers.0.attn.out", lambda array: array[:, :-1]), pytest.raises(UsageError) as caught:
        model.logits(PROMPT)
    assert caught.value.code == "run.edit"
    assert "layers.0.attn.out" in caught.value.message


@pytest.mark.parametrize("listening", [False, True])
def test_an_error_in_a_kernel_names_the_op_and_its_origin(tmp_path: Path, listening: bool) -> None:
    path, _ = tiny_plan(tmp_path, max_num_batched_tokens=4)
    with labinfer.load(path) as model:
        [interpreter] = model.interpreters
        if listening:
            interpreter.listen("logits", lambda array: None)

        def broken(call: Any) -> None:
            raise FloatingPointError("out of luck")

        interpreter.device.F.kernels["attention"] = broken  # type: ignore[index]
        with pytest.raises(LabinferError) as caught:
            model.logits([1, 2])
    assert (caught.value.code, caught.value.exit_code) == ("run.op-failed", 1)
    for part in ("'layers.0.context'", "attention", f"{tmp_path}/tiny.yaml:21:7", "out of luck"):
        assert part in caught.value.message


def test_an_op_without_a_kernel_is_told_before_weights_are_loaded(tmp_path: Path) -> None:
    path, _ = tiny_plan(tmp_path)
    with closing(Manager()) as manager:
        del manager.device("reference").F.kernels["attention"]  # type: ignore[attr-defined]
        with pytest.raises(DoesNotFit) as caught:
            labinfer.load(path, manager=manager)
        assert manager.device("reference").allocator.peak == 0
    assert (caught.value.code, caught.value.exit_code) == ("device.no-kernel", 4)
    for part in ("'reference'", "'attention'", "'layers.0.context'", f"{tmp_path}/tiny.yaml:21:7"):
        assert part in caught.value.message
    assert "--devices" in (caught.value.remedy or "")


def test_steps_of_mixed_sizes_reuse_their_tapes(model: LLM) -> None:
    expected = {size: model.logits(list(range(size))) for size in (1, 3, 10)}
    [interpreter] = model.interpreters
    tapes = dict(interpreter.tapes)
    for size in (3, 1, 10, 1, 3, 10, 3):
        np.testing.assert_array_equal(model.logits(list(range(size))), expected[size])
    assert dict(interpreter.tapes) == tapes


def test_only_so_many_tapes_are_kept() -> None:
    with labinfer.load(GOLDEN / "llama-llama3", max_num_batched_tokens=96, max_logits_rows=96) as model:
        expected = model.logits(PROMPT)
        for size in range(1, MAX_TAPES + 10):
            model.logits([1] * size)
        [interpreter] = model.interpreters
        assert len(interpreter.tapes) == MAX_TAPES
        np.testing.assert_array_equal(model.logits(PROMPT), expected)


def test_variables_by_name() -> None:
    with labinfer.load(GOLDEN / "llama-biases") as model:
        weight = model.variable("layers.0.q_proj")
        assert isinstance(weight, Parameter)
        assert weight.array.shape == weight.weight.shape
        out = model.variable("layers.0.attn.out")
        assert isinstance(out, Tensor)
        assert (out.device, out.slot.type.shape[0]) == ("reference", "T")
        with pytest.raises(UsageError, match=r"did you mean 'layers\.0\.q_proj'"):
            model.variable("layers.0.q_porj")
