"""Cluster files, and plans whose layers are placed by cost."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import labinfer
from labinfer.compiler import place_by_cost
from labinfer.compiler.cluster import cluster_schema, read_cluster
from labinfer.compiler.costs.roofline import specifications
from labinfer.compiler.costs.store import store_profile
from labinfer.compiler.partition import service
from labinfer.compiler.partition.service import (
    SHORT,
    SHORT_STALL,
    STALL,
    EngineTimes,
    Load,
    serve,
    stall_of,
    ways_to_serve,
)
from labinfer.compiler.plan import Plan, load_plan
from labinfer.compiler.source import load_yaml
from labinfer.compiler.workload import parse_workload
from labinfer.errors import DoesNotFit, LabinferError, UsageError
from labinfer.profile import measure
from labinfer.profile.quiet import Patience
from labinfer.profile.session import profile_cluster
from labinfer.progress import silent
from labinfer.render import render
from labinfer.render.placement import placement_lines, seconds
from labinfer.runtime.scheduler import Policy
from tests.mutation import damaged
from tests.test_profile import timed_by_hand

_GOLDEN = Path(__file__).parent / "golden"
_MODEL = _GOLDEN / "llama-llama3"
_DECLARED = """\
devices:
  fast: {like: l4, memory: 150kB}
  slow: {like: t4, host: far}
  slower: {like: epyc-9654, host: far}
links:
  - {between: [here, far], latency: 1us, bandwidth: 10GB/s}
"""
_LIMITS: dict[str, Any] = {"max_model_len": 64, "max_num_batched_tokens": 16}


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BUDGET_SECONDS", 0)


def _cluster(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def _compile(folder: Path, text: str, workload: str = "prompt=32,output=8", **options: Any) -> Plan:
    return labinfer.compile(_MODEL, cluster=_cluster(folder, text), workload=workload, **{**_LIMITS, **options})


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("devices: {}", 1, "devices"),
        ("devices:\n  a: {like: l4, memry: 3GB}", 2, "did you mean 'memory'"),
        ("devices:\n  a: {like: l4, memory: much}", 2, "no size"),
        ("devices:\n  a: {like: l4, profile: x.json}", 2, "not both"),
        ("devices:\n  a: {like: l4}\nlinks:\n  - {between: [a, b], latency: 1us, bandwidth: 1GB/s}", 4, "'b'"),
        ("devices:\n  a: {like: l4}\nlinks:\n  - {between: [a, a], latency: soon, bandwidth: 1GB/s}", 4, "no time"),
        ("devices:\n  a: {like: l4}\npins:\n  end: c", 4, "'c'"),
        ("devices:\n  a: {like: a100-80gb}", 2, "did you mean 'a100-80g'"),
        ("devices:\n  a: {profile: ../x.json}", 2, "does not lie beside"),
        ("devices:\n  cpux: {}", 2, "did you mean 'cpu'"),
    ],
)
def test_errors_of_a_cluster_file_have_a_place(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(LabinferError, match=message) as raised:
        labinfer.compile(_MODEL, cluster=_cluster(tmp_path, text))
    assert raised.value.place is not None
    assert raised.value.place.line == line
    assert raised.value.exit_code in (3, 4)


@given(st.integers(0, 2**32))
def test_a_damaged_cluster_file_never_gives_a_traceback(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    tree = load_yaml("declared", text=_DECLARED).plain()
    text = json.dumps(damaged(tree, random.Random(seed)), default=str)
    path = _cluster(tmp_path_factory.getbasetemp(), text)
    with contextlib.suppress(LabinferError):
        labinfer.compile(_MODEL, cluster=path, **_LIMITS)


def test_sizes_times_and_rates_are_read_with_their_units(tmp_path: Path) -> None:
    cluster = read_cluster(_cluster(tmp_path, _DECLARED))
    assert cluster.devices["fast"].memory == 150_000
    assert (cluster.links[0].latency, cluster.links[0].bandwidth) == (1e-6, 10_000_000_000)


def test_the_catalogue_has_plausible_devices() -> None:
    assert len(specifications()) >= 12
    for spec in specifications().values():
        assert 10 < spec.gb_per_second < 10_000
        assert spec.source


@pytest.mark.parametrize("text", ["prompt=0", "prompt", "promt=3", "output=1e3", "concurrency=-1", "replicas=17"])
def test_bad_workloads_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"workload|should be like"):
        parse_workload(text)


@pytest.mark.parametrize("objective", ["latency", "throughput", "balanced"])
def test_a_placement_states_what_it_was_decided_by(tmp_path: Path, objective: str) -> None:
    plan = _compile(tmp_path, _DECLARED, "prompt=32,output=8,concurrency=4", objective=objective)
    found = plan.placement
    assert found is not None
    assert 0 < found.lower_bound <= found.value
    assert [each.device for each in found.stages] == [stage.device for stage in plan.stages]
    assert set(found.reasons) == {"fast", "slow", "slower"}
    assert set(plan.devices) == {stage.device for stage in plan.stages}  # those that do not help are left out
    assert found.origins["fast"] == "derived"
    assert found.value >= max(each.unit for each in found.stages) * (1 - 1e-6)
    latency = sum(each.unit for each in found.stages)
    hops = zip(found.stages, found.stages[1:], strict=False)
    if objective == "latency":
        steps = found.workload["output"], 2  # of decode; of prefill, 16 tokens each
        latency += sum(steps[0] * a.decode_hop + steps[1] * a.prefill_hop for a, _ in hops)
        assert found.value == pytest.approx(latency, rel=1e-4)


def test_the_costs_of_ops_add_up_to_the_stage(tmp_path: Path) -> None:
    plan = _compile(tmp_path, "devices: {only: {like: l4}}")
    (stage,), placement = plan.stages, plan.placement
    assert placement is not None
    decode = prefill = 0.0
    for entry in stage.schedule:
        times = 1 if entry.layers is None else entry.layers[1] - entry.layers[0] + 1
        for op in stage.blocks[entry.block]:
            assert op.cost is not None
            decode, prefill = decode + times * op.cost[0], prefill + times * op.cost[1]
    overhead = placement.stages[0].decode - decode
    assert overhead == pytest.approx(10 * specifications()["l4"].op_microseconds * 1e-6, rel=1e-3)
    assert placement.stages[0].prefill == pytest.approx(prefill + overhead, rel=1e-3)


def test_a_plan_with_a_placement_is_read_back_as_it_was(tmp_path: Path) -> None:
    plan = _compile(tmp_path, _DECLARED)
    path = tmp_path / "plan.json"
    path.write_text(plan.dump())
    assert load_plan(path) == plan


@given(st.integers(0, 2**32))
def test_a_damaged_placement_never_gives_a_traceback(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    plan = json.loads(_compile(folder, _DECLARED + "pins: {start: slow}").dump())
    plan["placement"] = damaged(plan["placement"], random.Random(seed))
    (folder / "damaged.json").write_text(json.dumps(plan))
    with contextlib.suppress(LabinferError):
        read = load_plan(folder / "damaged.json")
        list(placement_lines(read, 100))
        render(read, "perfetto")


def test_many_devices_are_placed_in_a_moment(tmp_path: Path) -> None:
    devices = "".join(f"  d{n}: {{like: {'t4' if n % 3 else 'l4'}, memory: 2MB, host: h{n % 4}}}\n" for n in range(26))
    plan = _compile(tmp_path, f"devices:\n{devices}", "prompt=32,output=2000,concurrency=4", objective="throughput")
    assert plan.placement is not None
    assert len(plan.placement.reasons) == 26
    assert 0 < plan.placement.lower_bound <= plan.placement.value


def test_devices_of_a_kind_are_searched_as_one_group(tmp_path: Path) -> None:
    devices = "".join(f"  d{n}: {{like: {'t4' if n % 2 else 'l4'}, memory: 2MB}}\n" for n in range(40))
    found = _compile(tmp_path, f"devices:\n{devices}", objective="latency").placement
    assert found is not None
    assert (found.algorithm, found.gap) == ("counts of devices", 0.0)  # 2 ** 40 sets of devices, 441 counts


def test_memory_caps_hold_and_say_what_is_missing(tmp_path: Path) -> None:
    plan = _compile(tmp_path, _DECLARED)
    used = [stage for stage in plan.stages if stage.device == "fast"]
    assert all(stage.bytes.total <= 150_000 for stage in used)
    group = plan.limits.groups[0]
    assert group.num_blocks * plan.limits.block_size >= 32 + 8  # what the workload was promised
    with pytest.raises(DoesNotFit, match="no chain of stages fits"):
        _compile(tmp_path, "devices: {tiny: {like: l4, memory: 10kB}}")


def test_a_cache_that_is_asked_for_counts(tmp_path: Path) -> None:
    text = "devices: {fast: {like: l4, memory: 200kB}, slow: {like: t4}}"
    few, many = (_compile(tmp_path, text, num_blocks=count) for count in (4, 40))
    assert [stage.device for stage in few.stages] == ["fast"]
    assert [stage.device for stage in many.stages] != ["fast"]


def test_pins_are_honoured_or_told(tmp_path: Path) -> None:
    plan = _compile(tmp_path, _DECLARED + "pins: {layers.1: slow, end: slower}")
    runs = {unit: each.device for each in plan.placement.stages for unit in each.units} if plan.placement else {}
    assert runs["end"] == "slower"
    assert "slow" in runs.values()
    for pins, message in (("layers.9: slow", "no layer is called"), ("layers.?: slow, layers.1: fast", "pin it once")):
        with pytest.raises(LabinferError, match=message):
            _compile(tmp_path, _DECLARED + f"pins: {{{pins}}}")


@pytest.mark.alone
@pytest.mark.usefixtures("home")
def test_measured_devices_run_what_was_placed_with_the_same_tokens(tmp_path: Path) -> None:
    text = "devices: {'reference:0': {memory: 450kB}, 'reference:1': {memory: 450kB}}"
    apart = text + "\npins: {start: 'reference:1', end: 'reference:0'}"
    with pytest.raises(DoesNotFit, match="was never measured"):
        _compile(tmp_path, text)
    options = {"max_num_batched_tokens": 16, "quick": True}
    for profile in profile_cluster(_MODEL, _cluster(tmp_path, text), silent, Patience(0), **options).values():
        store_profile(timed_by_hand(profile))
    plan, two = _compile(tmp_path, text), _compile(tmp_path, apart)
    assert two.placement is not None
    assert set(two.placement.origins.values()) == {"measured"}
    assert set(two.placement.transports) == {"local", "shm", "tcp"}
    assert all(0 < 4 * decode < prefill for decode, prefill in two.placement.transports.values())
    assert any("alone in it take" in str(line) for line in placement_lines(two, 400))
    assert [stage.device for stage in two.stages] == ["reference:1", "reference:0"]
    prompt, greedy = [5, 6, 7, 8], labinfer.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    expected = labinfer.LLM(_MODEL, devices="reference", **_LIMITS).generate([prompt], greedy)[0].token_ids
    for each in (plan, two):
        with labinfer.LLM(each) as model:
            assert model.generate([prompt], greedy)[0].token_ids == expected


def test_plans_for_devices_that_are_not_here_do_not_run(tmp_path: Path) -> None:
    plan = _compile(tmp_path, _DECLARED)
    with pytest.raises(DoesNotFit, match="can be explained, not run"):
        labinfer.LLM(plan)


@pytest.mark.usefixtures("home")
def test_a_profile_of_another_machine_is_borrowed(tmp_path: Path) -> None:
    options = {"max_num_batched_tokens": 16, "quick": True}
    path = _cluster(tmp_path, "devices: {reference: {}}")
    (profile,) = profile_cluster(_MODEL, path, silent, Patience(0), **options).values()
    (tmp_path / "lab.json").write_text(profile.dump())
    plan = _compile(tmp_path, "devices: {lab: {profile: lab.json}}")
    assert plan.placement is not None
    assert plan.placement.origins == {"lab": "borrowed"}
    assert plan.devices["lab"].declared


_TIMES = EngineTimes(tuple(0.01 + 0.001 * n for n in range(16)), 0.001, 512, 0.2, 0.02, 8)


def test_the_scheduler_and_its_simulation_let_prompts_lengthen_steps_alike() -> None:
    assert (Policy.stall, Policy.short, Policy.short_stall) == (STALL, SHORT, SHORT_STALL)
    assert (stall_of(512), stall_of(513)) == (1.0, 0.2)


def test_one_request_takes_what_its_steps_add_up_to() -> None:
    load = Load(prompt=600, output=11, rate=0.001)
    alone, moved = serve(_TIMES, load, 2, 0), serve(_TIMES, load, 2, 1)
    assert alone.first == pytest.approx(0.6)
    assert moved.first == pytest.approx(0.6 + 0.02 + 0.008)
    for each in (alone, moved):
        assert each.wait == pytest.approx(0.01)
        assert each.longest == pytest.approx(0.01)
        assert each.request == pytest.approx(each.first + 0.1)


def test_prompts_lengthen_steps_only_where_answers_are_made_too() -> None:
    load = Load(prompt=600, output=100, rate=1.5)
    both, divided = serve(_TIMES, load, 2, 0), serve(_TIMES, load, 2, 1)
    assert divided.first < 0.7 < both.first  # the prompt that comes while answers are made waits for its turns
    assert divided.longest < both.longest
    assert divided.wait < both.wait
    ways = ways_to_serve(_TIMES, load, 3)
    assert sorted(each.prefill for each in ways) == [0, 1, 2]
    assert [each.request for each in ways] == sorted(each.request for each in ways)


@pytest.mark.parametrize(("prefill", "load"), [(0, Load(3000, 1000, 0.02)), (1, Load(200, 2000, 0.03))])
def test_a_part_of_long_requests_says_what_all_of_them_take(
    prefill: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MOST_REQUESTS", 0)  # as few in both cases as there must be
    whole = serve(_TIMES, load, 2, prefill)
    monkeypatch.setattr(service, "MOST_WORK", 4 * (load.prompt + load.output))
    part = serve(_TIMES, load, 2, prefill)
    assert part != whole
    for name in ("request", "first", "wait"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.1), name


class Counted(list[float]):
    """Seconds of decode steps that count how often they are asked for."""

    asked = 0

    def __getitem__(self, place: Any) -> Any:
        Counted.asked += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("load", [Load(99_999_999, 8, 1.0), Load(32, 99_999_999, 1.0), Load(10**8, 10**8, 1e8)])
@pytest.mark.parametrize("replicas", [2, 16])
def test_no_workload_is_simulated_for_ever(load: Load, replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_WORK", 20_000)
    monkeypatch.setattr(Counted, "asked", 0)
    ways = ways_to_serve(replace(_TIMES, decode=Counted(_TIMES.decode)), load, replicas)  # type: ignore[arg-type]
    assert len(ways) == replicas
    assert Counted.asked <= 2 * 20_000


def test_units_that_take_for_ever_are_simulated_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, found = "prompt=320,output=4000,concurrency=4", []
    for most in (10**9, 20_000):
        monkeypatch.setattr(place_by_cost, "MOST_VISITS", most)
        monkeypatch.setattr(place_by_cost, "MOST_UNITS", place_by_cost.FEWEST_UNITS)
        placement = _compile(tmp_path, _DECLARED, workload, objective="throughput", num_blocks=2000).placement
        assert placement is not None
        found.append(placement.served)
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_a_plan_says_whether_replicas_should_only_compute_prompts(tmp_path: Path) -> None:
    plan = _compile(tmp_path, _DECLARED, "prompt=32,output=8,concurrency=4,replicas=3,rate=6000")
    assert plan.placement is not None
    assert plan.placement.workload == {"prompt": 32, "output": 8, "concurrency": 4, "replicas": 3, "rate": 6000}
    ways = plan.placement.services
    assert sorted(each.prefill for each in ways) == [0, 1, 2]
    assert all(0 < each.wait <= each.longest < each.request for each in ways)
    lines = [line.text for line in placement_lines(plan, 200)]
    [best] = [line for line in lines if line.startswith("  replicas")]
    assert f"{seconds(ways[0].request)}, its first token {seconds(ways[0].first)}" in best
    assert sum("requests a minute" in line for line in lines) == 3
    alone = _compile(tmp_path, _DECLARED)
    assert alone.placement is not None
    assert alone.placement.services == []


@pytest.mark.usefixtures("home")
def test_the_command_compiles_over_a_cluster_and_explains(
    tmp_path: Path, labinfer_cli: Callable[..., CompletedProcess[str]]
) -> None:
    _cluster(tmp_path, _DECLARED)
    more = ("--max-model-len", 64, "--max-num-batched-tokens", 16)
    done = labinfer_cli("compile", _MODEL, "--cluster", "cluster.yaml", "--workload", "prompt=32,output=8", *more)
    assert done.returncode == 0, done.stderr
    assert "latency: " in done.stderr
    shown = labinfer_cli("explain", "plan.json").stdout
    assert "Placement: best latency for prompt 32, output 8, concurrency 1" in shown
    assert "derived times" in shown
    told = json.loads(labinfer_cli("explain", "plan.json", "--json").stdout)
    assert told["placement"]["objective"] == "latency"
    assert labinfer_cli("compile", _MODEL, "--objective", "latency").returncode == 2


def test_predicted_steps_are_drawn_along_time(tmp_path: Path) -> None:
    plan = _compile(tmp_path, _DECLARED + "pins: {start: fast, end: slow}")
    assert plan.placement is not None
    trace = json.loads(render(plan, "perfetto"))
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    expected = [
        f"{phase}, predicted: {s.device} (stage {n})"
        for phase in ("decode", "prefill")
        for n, s in enumerate(plan.stages)
    ]
    assert names == expected
    ops = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 0 and e["tid"] == 0]
    seconds = sum(e["dur"] for e in ops) * 1e-6
    assert seconds == pytest.approx(plan.placement.stages[0].decode, abs=5e-5)
    assert '"placement":{' in render(plan, "html")


@pytest.mark.usefixtures("home")
def test_measured_steps_are_drawn_beside_predicted_ones(
    tmp_path: Path, labinfer_cli: Callable[..., CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABINFER_PATIENCE", "0")
    labinfer_cli("compile", _MODEL, "--max-num-batched-tokens", 16, "--max-model-len", 64)
    steps = labinfer_cli("profile", "plan.json", "--quick", "--validate", "--json")
    (tmp_path / "steps.json").write_text(steps.stdout)
    drawn = labinfer_cli("graph", "plan.json", "-f", "perfetto", "--measured", "steps.json", "-o", "-")
    names = [e["args"]["name"] for e in json.loads(drawn.stdout)["traceEvents"] if e["name"] == "process_name"]
    assert names[0].endswith("predicted: reference (stage 0)")
    assert names[1].endswith("measured: reference (stage 0)")
    (tmp_path / "bad.json").write_text('[{"what": 1}]')
    assert labinfer_cli("graph", "plan.json", "-f", "perfetto", "--measured", "bad.json", "-o", "-").returncode == 3


def test_the_schema_of_cluster_files_accepts_what_is_read() -> None:
    jsonschema.validate(load_yaml("declared", text=_DECLARED).plain(), cluster_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"devices": {"a": {"lik": "l4"}}}, cluster_schema())


@pytest.mark.usefixtures("home")
def test_layers_that_do_not_fit_are_streamed_with_the_same_tokens(tmp_path: Path) -> None:
    options = {"max_num_seqs": 1, **_LIMITS}
    resident, streamed = (labinfer.compile(_MODEL, devices="reference", streamed_layers=n, **options) for n in (0, 3))
    cap = streamed.stages[0].bytes.total + 1000  # the arena is reserved as a quick packing has it
    assert cap < resident.stages[0].bytes.total
    text = f"devices: {{reference: {{memory: {cap}}}}}"
    profile_cluster(_MODEL, _cluster(tmp_path, text), silent, Patience(0), max_num_batched_tokens=16, quick=True)
    plan = _compile(tmp_path, text, "prompt=32,output=32", max_num_seqs=1)
    (stage,) = plan.stages
    assert len(stage.streamed) == 3
    assert stage.bytes.total <= cap
    assert "start - end, 3 streamed" in "\n".join(line.text for line in placement_lines(plan, 100))
    prompt, greedy = [5, 6, 7, 8], labinfer.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    answers = []
    for each in (resident, plan):
        with labinfer.LLM(each) as model:
            answers.append(model.generate([prompt], greedy)[0].token_ids)
    assert answers[0] == answers[1]
