"""Profiles: tables of measured times, signatures, what is measured and kept, and predictions from it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import labinfer
from labinfer.compiler.costs import (
    CostTable,
    DeviceProfile,
    Fingerprint,
    LinkProfile,
    Measured,
    StepShape,
    StreamProfile,
    load_profile,
)
from labinfer.compiler.costs.plans import predict_pipeline, predict_plan, stage_ops, stage_signer
from labinfer.compiler.costs.store import profile_path, store_link, store_profile, stored_links
from labinfer.compiler.costs.table import interpolate
from labinfer.errors import LabinferError, UsageError
from labinfer.ops.dequantization import dequantize
from labinfer.profile import measure, quiet, validate
from labinfer.profile.grid import MOST_CACHED_TOKENS, grid_for
from labinfer.profile.hops import measure_hop
from labinfer.profile.measure import StepTimes, measure_step
from labinfer.profile.quiet import Foreign, Patience
from labinfer.profile.sample import layer_ops, sampled
from labinfer.profile.session import profile_device, profile_hops, profile_links
from labinfer.profile.streaming import measure_stage_streaming, own_cores
from labinfer.profile.synthetic import BYTES, SyntheticCheckpoint
from labinfer.profile.validate import validate_plan
from labinfer.progress import silent
from labinfer.runtime.cores import available_cores, call_on
from labinfer.runtime.model import Model
from labinfer.runtime.pipeline.transport import TRANSPORTS

pytestmark = pytest.mark.alone

_GOLDEN = Path(__file__).parent / "golden"
_MODEL = _GOLDEN / "llama-llama3"
_SMALL = {"max_num_batched_tokens": 16}


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BUDGET_SECONDS", 0)


def _profile(model: Path, name: str = "reference") -> DeviceProfile:
    return profile_device(model, name, None, silent, Patience(0), quick=True, **_SMALL)


def test_interpolation_goes_through_the_points_and_on_with_the_last_slope() -> None:
    points = [(1, 2.0), (4, 2.0), (8, 6.0)]
    assert [interpolate(points, x) for x in (0, 1, 4, 6, 8, 10)] == [2, 2, 2, 4, 6, 8]
    assert interpolate([(1, 5.0), (2, 3.0)], 4) == 3.0  # a time that falls, as noise makes it, falls no further
    assert interpolate([], 3) == 0.0


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 1e3)), min_size=1, unique_by=lambda point: point[0]))
def test_interpolated_times_are_never_negative(points: list[tuple[int, float]]) -> None:
    assert all(interpolate(sorted(points), x) >= 0 for x in range(0, 3000, 7))


def test_a_table_is_linear_in_context_and_in_tokens() -> None:
    points = [(n, past, (1 + 2 * n) * (3.0 + past), 0.0) for n in (1, 4) for past in (0, 10)]
    table = CostTable(decode=points)
    assert table.seconds("decode", 2, 5) == pytest.approx(5 * 8)
    assert table.seconds("decode", 4, 20) == pytest.approx(9 * 23)


def test_grids_keep_to_the_bounds_and_measure_both_sides_of_a_crossing() -> None:
    grid = grid_for(False, 64, 4, 256, [16])
    assert max(grid.decode) == 4
    assert {15, 16, 64} <= set(grid.prefill)
    assert all(shape.sequences * shape.past <= MOST_CACHED_TOKENS for shape in grid.steps())
    assert all(shape.past + shape.tokens // shape.sequences <= 256 for shape in grid.steps())


@pytest.mark.parametrize(
    "format", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"]
)
def test_made_up_weights_are_ordinary_numbers(format: str) -> None:
    from labinfer.ops.formats import stored_bytes

    raw = np.random.default_rng(1).choice(BYTES, stored_bytes(format, (64, 256)))
    values = dequantize(raw, format, (64, 256))
    assert np.isfinite(values).all()
    assert 1e-6 < np.abs(values).mean() < 1e4
    assert values.min() < 0 < values.max()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("folder", ["llama-llama3", "mixtral-window", "gemma3_text-linear_global", "gpt2-untied_inner"])
def test_every_op_of_a_model_is_measured_once_and_kept(folder: str) -> None:
    profile = _profile(_GOLDEN / folder)
    plan = labinfer.compile(_GOLDEN / folder, devices="reference")
    (stage,) = plan.stages
    signer = stage_signer(plan, stage)
    assert {signer.signature(op) for op in stage_ops(stage)} == set(profile.ops)
    assert all(point[2] > 0 for table in profile.ops.values() for point in [*table.step, *table.decode])
    written = profile_path(profile.device).stat().st_mtime_ns
    assert _profile(_GOLDEN / folder) == profile  # nothing is measured again
    assert profile_path(profile.device).stat().st_mtime_ns == written
    assert load_profile(profile_path(profile.device)) == profile


def timed_by_hand(profile: DeviceProfile) -> DeviceProfile:
    """``profile`` as if all took a millisecond a token: noise may turn which of two measured times is longer."""

    def timed(table: CostTable) -> CostTable:
        given = {
            phase: [(tokens, past, 1e-3 * tokens, 0.0) for tokens, past, _, _ in getattr(table, phase)]
            for phase in ("decode", "prefill", "step")
        }
        return CostTable(**given, quick=table.quick)

    assert profile.pipeline is not None
    profile.ops = {signature: timed(table) for signature, table in profile.ops.items()}
    profile.overhead, profile.pipeline.around = timed(profile.overhead), timed(profile.pipeline.around)
    return profile


@pytest.mark.usefixtures("home")
def test_predictions_add_up_the_ops_of_each_stage() -> None:
    profile = timed_by_hand(_profile(_MODEL))
    plan = labinfer.compile(_MODEL, devices="reference:0=0-0,reference:1=1-2", **_SMALL)
    links = profile_links({"reference:0": None, "reference:1": None})
    costs = dict.fromkeys(plan.devices, Measured(profile))
    one, two = predict_plan(plan, costs, links, StepShape.decode(1, 10))
    assert [stage.seconds for stage in (one, two)] == pytest.approx(
        [1e-3 * (len(stage_ops(stage)) + 1) for stage in plan.stages]
    )
    link = links["reference:0", "reference:1"]
    assert one.hop == pytest.approx(link.latency + 4 * 24 / link.bandwidth)
    assert sum(seconds for _, seconds in one.ops) + one.overhead == one.seconds
    more = predict_plan(plan, costs, links, StepShape.prefill(16, 10))
    signer = stage_signer(plan, plan.stages[1])
    by_rows = [seconds for op, seconds in more[1].ops if signer.axis(op) == "rows"]  # the last token's
    assert by_rows == pytest.approx([1e-3] * len(by_rows))
    others = one.seconds + two.seconds - sum(by_rows)
    assert sum(stage.seconds for stage in more) == pytest.approx(16 * others + sum(by_rows))


@pytest.mark.usefixtures("home")
def test_the_hops_of_every_transport_are_measured_once() -> None:
    hops = profile_hops()
    assert set(hops) == set(TRANSPORTS)
    assert profile_hops() == stored_links().transports == hops  # nothing is measured again
    store_link("cpu", "cpu", hops["shm"])
    assert stored_links().transports == hops


@pytest.mark.usefixtures("home")
def test_a_pipeline_takes_its_stages_the_hops_between_them_and_what_is_around() -> None:
    profile, step = _profile(_MODEL), StepShape.prefill(16)
    assert profile.pipeline is not None
    around = profile.pipeline.around
    assert around.seconds("prefill", 16, 0) > 0 < around.seconds("decode", 1, 0)
    plan = labinfer.compile(_MODEL, devices="reference:0=0-0,reference:1=1-2", streamed_layers=1, **_SMALL)
    links, hop = profile_links(dict.fromkeys(plan.devices)), LinkProfile(latency=1.0, bandwidth=4.0)
    for streamed in (None, 100.0):  # the latter on own cores
        profile.pipeline.streamed = streamed
        costs = dict.fromkeys(plan.devices, Measured(profile))
        stages = predict_plan(plan, costs, links, step)
        alone = predict_pipeline(plan, stages, costs, hop, step)
        assert alone.around == pytest.approx(around.seconds("prefill", 16, 0) + 1 + 16 * 24)  # of float32
        for stage, cost, seconds in zip(plan.stages, stages, alone.stages, strict=True):
            waits = cost.streaming if streamed is None else stage.bytes.host / streamed
            assert seconds == pytest.approx(sum(each for _, each in cost.ops) + waits)
        assert alone.seconds == pytest.approx(sum(alone.stages) + alone.around)


def test_a_stage_keeps_to_as_many_cores_as_its_device_has_threads() -> None:
    pytest.importorskip("numba", reason="the CPU backend needs numba")
    cores = available_cores()
    plans = [labinfer.compile(_MODEL, devices="cpu", threads=count) for count in range(1, len(cores) + 1)]
    assert [own_cores(plan) for plan in plans] == [cores[:count] for count in range(1, len(cores))] + [[]]
    assert own_cores(labinfer.compile(_MODEL, devices="reference")) == []


@pytest.mark.skipif(len(available_cores()) < 2, reason="needs two cores")
def test_streaming_to_a_stage_is_measured_on_its_own_cores() -> None:
    pytest.importorskip("numba", reason="the CPU backend needs numba")
    resident, streamed = (
        labinfer.compile(_MODEL, devices="cpu", threads=1, streamed_layers=count, **_SMALL) for count in (0, 1)
    )
    measured = call_on(own_cores(resident), lambda: measure_stage_streaming(resident, streamed, Patience(0)))
    assert measured > 0
    assert available_cores() != own_cores(resident)  # this thread may use all of them still


def test_a_hop_whose_other_end_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    for transport in ("shm", "tcp"):
        with pytest.raises(LabinferError, match="other end of a hop"):
            measure_hop(transport)


@pytest.mark.usefixtures("home")
def test_validation_compares_every_step_stage_and_op(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = labinfer.compile(_MODEL, devices="reference,reference:1", **_SMALL)
    costs = {name: Measured(_profile(_MODEL, name)) for name in plan.devices}
    measured = list[StepTimes]()

    def given(*arguments: Any) -> StepTimes:
        """The step as it was measured, but for its times."""
        measured.append(measure_step(*arguments))
        runs = [np.full_like(runs, 1e-3) for runs in measured[-1].op_runs]
        return replace(measured[-1], runs=np.full(5, 0.5), op_runs=runs)

    monkeypatch.setattr(validate, "measure_step", given)
    links = profile_links(dict.fromkeys(plan.devices))
    steps = validate_plan(plan, costs, links, Patience(0))
    assert len(measured) == len(steps)
    assert all((runs > 0).all() for times in measured for runs in (times.runs, *times.op_runs))
    assert {step.what.split()[0] for step in steps} == {"decode", "prefill"}
    for step in steps:
        assert len(step.stages) == 2
        assert [[op.name for op in ops] for ops in step.stages] == [
            [op.name for op in stage_ops(stage)] for stage in plan.stages
        ]
        assert all(op.measured == pytest.approx(1e-3) for ops in step.stages for op in ops)
        assert step.measured == 0.5


def test_seconds_of_ops_add_up_though_each_run_is_disturbed_in_another() -> None:
    runs = np.full((9, 9), 1.0) + np.eye(9) * 10  # a pause hits another op in every run
    times = StepTimes(np.full(9, 20.0), [[]], [runs], 0.5)
    assert times.of_stage(0).sum() == pytest.approx(19)
    assert times.rest() == pytest.approx(1)


@pytest.mark.usefixtures("home")
def test_streamed_layers_lengthen_predicted_steps() -> None:
    profile = _profile(_MODEL)
    assert profile.stream is not None
    resident, streamed = (
        predict_plan(plan, {"reference": Measured(profile)}, {}, StepShape.decode(1, 10))[0].seconds
        for plan in (labinfer.compile(_MODEL, devices="reference", streamed_layers=n, **_SMALL) for n in (0, 3))
    )
    assert streamed >= resident
    way = StreamProfile(bandwidth=100, overlap=0.5)
    assert [way.added(computing, 200) for computing in (1.0, 2.0, 8.0)] == [1.5, 1.0, 1.0]


def test_patience_is_a_number_of_seconds_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(0)
    patience.wait()
    assert patience.left == 0
    monkeypatch.setenv("LABINFER_PATIENCE", "long")
    with pytest.raises(UsageError, match="no number of seconds"):
        Patience()


def test_others_are_busy_by_the_share_of_all_processors_that_they_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(busy: list[float | None], seconds: list[float]) -> float:
        monkeypatch.setattr(quiet, "busy_seconds", iter(busy).__next__)
        monkeypatch.setattr(quiet.time, "perf_counter", iter(seconds).__next__)
        return Foreign().share()

    monkeypatch.setattr(quiet.os, "cpu_count", lambda: 4)
    assert share([100.0, 102.0], [7.0, 8.0]) == 0.5
    assert share([100.0, 99.9], [7.0, 8.0]) == 0  # clocks that are read one after another
    assert share([None, None], [7.0, 8.0]) == share([1.0, 2.0], [7.0, 7.0]) == 0


def test_who_waits_for_others_to_be_quiet_does_so_for_as_long_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, waited = [1.0, 1.0, 0.0], list[float]()
    monkeypatch.setattr(quiet.time, "sleep", waited.append)
    monkeypatch.setattr(Foreign, "share", lambda _: busy[len(waited) - 1])
    patience = Patience(1.0)
    patience.wait()
    assert waited == [quiet.WINDOW_SECONDS] * 3
    assert patience.left == pytest.approx(1.0 - 2 * quiet.WINDOW_SECONDS)  # what was quiet counts for nothing
    busy[:], waited[:] = [1.0] * 100, []
    patience.wait()
    assert patience.left == pytest.approx(0)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="looks at /proc")
def test_what_others_use_is_known_where_the_system_says_so() -> None:
    busy = quiet.busy_seconds()
    assert busy is not None
    assert busy > 0


def test_made_up_checkpoints_have_what_a_plan_names() -> None:
    plan = labinfer.compile(_GOLDEN / "mixtral-window", devices="reference")
    checkpoint = SyntheticCheckpoint(plan)
    with labinfer.LLM(_GOLDEN / "mixtral-window", devices="reference") as model:
        known = model.checkpoint.tensors
        assert {name: (t.shape, t.format) for name, t in checkpoint.tensors.items()} == {
            name: (known[name].shape, known[name].format) for name in checkpoint.tensors
        }


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"labinfer_profile": 2, "device": {}}', '{"device": {}, "ops": {"x": {"step": [[1]]}}}']
)
def test_a_bad_profile_is_told_with_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(LabinferError, match=r"profile\.") as raised:
        load_profile(path)
    assert str(raised.value.place) == str(path)
    assert raised.value.exit_code == 3


@pytest.mark.usefixtures("home")
def test_profiles_are_short_readable_json() -> None:
    profile = DeviceProfile(
        device=Fingerprint(kind="x", machine="y", kernels="1"), ops={"op": CostTable(step=[(1, 0, 1e-6, 0.0)])}
    )
    text = store_profile(profile).read_text()
    assert json.loads(text)["ops"] == {"op": {"step": [[1, 0, 1e-6, 0.0]]}}


@pytest.mark.usefixtures("home")
def test_the_command_measures_and_validates(
    labinfer_cli: Callable[..., CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABINFER_PATIENCE", "0")
    found = labinfer_cli(
        "profile", _MODEL, "--devices", "reference", "--quick", "--json", "--max-num-batched-tokens", 16
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["reference"]["device"]["kind"] == "reference"
    shown = labinfer_cli("profile", _MODEL, "--devices", "reference", "--quick", "--max-num-batched-tokens", 16)
    assert "linear(f32[T, 24])" in shown.stdout
    assert labinfer_cli("compile", _MODEL, "--devices", "reference", "--max-num-batched-tokens", 16).returncode == 0
    checked = labinfer_cli("profile", "plan.json", "--quick", "--validate")
    assert "median error of" in checked.stdout
    labinfer_cli("compile", "llama", "--devices", "reference", "-o", "map.json")
    refused = labinfer_cli("profile", "map.json")
    assert refused.returncode == 2
    assert "compiled without weights" in refused.stderr


@pytest.mark.parametrize(
    "folder", ["llama-llama3", "gemma3_text-linear_global", "deepseek_v2-group_limited", "gpt2-untied_inner"]
)
def test_a_sample_of_layers_has_every_kind_of_op_and_runs(folder: str) -> None:
    plan = labinfer.compile(_GOLDEN / folder, devices="reference", **_SMALL)
    part = sampled(plan, 1)
    layers, kept = (layer_ops(each.stages[0]) for each in (plan, part))
    assert 0 < len(kept) < len(layers)
    signatures = [
        {stage_signer(each, each.stages[0]).signature(op) for op in stage_ops(each.stages[0])} for each in (plan, part)
    ]
    assert signatures[0] == signatures[1]
    with Model(part, SyntheticCheckpoint(part)) as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()
    assert sampled(plan) is plan
