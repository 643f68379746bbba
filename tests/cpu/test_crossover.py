"""From how many tokens on a plan uses the matrix unit, and what that changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

import labinfer
from labinfer.backends.cpu import crossover
from labinfer.backends.cpu.features import has_matrix_unit
from labinfer.compiler.plan import Plan, load_plan
from tests.cpu.test_models import LARGE, write_llama

needs_matrix_unit = pytest.mark.skipif(not has_matrix_unit(), reason="this CPU has no matrix unit")
PROMPT = [int(token) for token in np.random.default_rng(0).integers(0, 90, 60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model") / "m.gguf", {}, LARGE, "q4_0")


def logits(model: Any, **options: Any) -> np.ndarray:
    with labinfer.load(model, **options) as loaded:
        result: np.ndarray = loaded.logits(PROMPT)
        return result


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_int8_activations_are_faithful_but_not_exact(model: Path) -> None:
    reference = logits(model, devices="reference", max_model_len=64)
    exact = error(logits(model, devices="cpu", max_model_len=64), reference)
    assert 10 * exact < error(logits(model, devices="cpu", max_model_len=64, activations="int8"), reference) < 0.1


def test_the_reference_is_always_exact(model: Path) -> None:
    with pytest.raises(labinfer.errors.DoesNotFit, match="'reference' cannot compute with int8 activations"):
        labinfer.compile(model, devices="reference", activations="int8")


@needs_matrix_unit
def test_the_plan_says_where_the_matrix_unit_begins(model: Path, tmp_path: Path) -> None:
    plan = labinfer.compile(model, devices="cpu", max_model_len=64, max_logits_rows=64)
    assert plan.devices["cpu"].matrix_unit == {"q4_0": crossover.fewest_tokens("exact")["q4_0"]}
    (tmp_path / "plan.json").write_text(plan.dump())
    assert load_plan(tmp_path / "plan.json") == plan
    np.testing.assert_array_equal(logits(plan), logits(changed(plan, {})))  # it changes no bit of quantized products


@pytest.mark.parametrize(
    ("format", "activations"),
    [*((each, "exact") for each in ("q4_0", "q8_0", "q6_k", "bf16", "f32", "f16")), ("bf16", "int8")],
)
def test_company_changes_no_bit(format: str, activations: str, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m.gguf", {}, LARGE, format)
    options: dict[str, Any] = {"max_model_len": 64, "max_logits_rows": 64, "activations": activations}
    with labinfer.load(model, devices="cpu", **options) as loaded:
        whole = loaded.logits(PROMPT)
        for size in (1, 3, 33):
            with loaded.session() as session:
                pieces = [session.append(PROMPT[start : start + size]) for start in range(0, len(PROMPT), size)]
            np.testing.assert_array_equal(np.concatenate(pieces), whole)


def changed(plan: Plan, matrix_unit: dict[str, int]) -> Plan:
    device = plan.devices["cpu"].model_copy(update={"matrix_unit": matrix_unit})
    return plan.model_copy(update={"devices": {"cpu": device}})


@needs_matrix_unit
def test_what_was_measured_here_counts(home: Path) -> None:
    built_in = dict(crossover.fewest_tokens("exact"))
    crossover.tune(["q4_0", "f32", "f16"])
    measured = json.loads(crossover._file().read_text())
    assert (set(measured["exact"]), set(measured["int8"])) == ({"q4_0"}, {"q4_0", "f16"})  # exact float16: on vectors
    assert dict(crossover.fewest_tokens("exact")) == built_in | measured["exact"]
    for text in ("", "[]", '{"exact": 3}', '{"exact": {"q4_0": "x"}}', '{"exact": {"q4_0": 0, "nonsense": 3}}'):
        crossover._file().write_text(text)
        assert dict(crossover.fewest_tokens("exact")) == built_in


def test_no_matrix_unit_at_lower_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    from labinfer.backends.cpu import features

    monkeypatch.setattr(features, "LEVEL", "avx2")
    assert not features.has_matrix_unit.__wrapped__()
