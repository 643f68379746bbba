"""``labinfer bench``: figures of a tiny model, costs against a count by hand, and a comparison with a stand-in peer."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

import labinfer
from labinfer.bench import ceiling, measure, peers
from labinfer.bench.cost import decode_bytes, prefill_flops
from labinfer.bench.measure import Workload, limits, plan_tests
from labinfer.errors import LabinferError, UsageError

from .tiny import tiny_plan

Cli = Callable[..., CompletedProcess[str]]
SHORT = ("--prompt-lengths", "7", "--decode-lengths", "5", "--batch", "1,3", "--repeat", "2")
TESTS = plan_tests([7], [5], [1, 3])


def test_plan_tests_and_their_room() -> None:
    assert [test.name for test in TESTS] == ["prefill 7 x 1", "decode 5 x 1", "decode 5 x 3"]
    room = limits(plan_tests([512], [100], [1, 8]))
    assert room["max_num_seqs"] == room["max_logits_rows"] == 8
    assert room["max_model_len"] == 512 + 16
    assert room["num_blocks"] == 8 * (7 + 1)  # 8 sequences of 100 tokens need more blocks than one of 512


def test_decode_bytes_are_those_counted_by_hand(tiny_model: Path) -> None:
    plan = labinfer.compile(tiny_model)
    layer = 2 * 16 + 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 32 * 16  # norms, q, k and v, o, mlp
    weights = 4 * (2 * layer + 16 + 64 * 16)  # two layers, the last norm, the embedding as the head: read whole
    kv = 4 * 2 * (8 + 8)  # f32, two layers, keys and values of two heads of four
    assert decode_bytes(plan, 1, 10) == weights + 10 * kv
    assert decode_bytes(plan, 3, 10) == weights + 3 * 10 * kv


def test_decode_bytes_count_the_experts_that_are_read() -> None:
    maps = Path(labinfer.__file__).parents[1] / "graphs"
    plan = labinfer.compile(maps / "qwen3_moe.yaml")
    one, two, many = (decode_bytes(plan, batch, 0) for batch in (1, 2, 10_000))
    assert one < two < 2 * one
    assert many == pytest.approx(sum(stage.bytes.weights for stage in plan.stages), rel=0.01)


def test_prefill_flops_are_two_for_each_weight_and_token(tiny_model: Path) -> None:
    plan = labinfer.compile(tiny_model)
    products = 2 * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 32 * 16)
    least = 2 * (100 * products + 64 * 16)  # the head sees the last token only
    attention = 2 * 2 * 100 * 50 * 16 * 2
    assert least + attention <= prefill_flops(plan, 100) < 1.5 * (least + attention)


def test_bandwidth_counts_every_byte_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(ceiling.time, "perf_counter", lambda: next(clock))
    memory = [np.ones(4_000_001, np.uint8), np.ones(1_000_000, np.uint8)]
    assert ceiling.read_bandwidth(memory, threads=3, rounds=2) == pytest.approx(5_000_001)


def test_measuring_gives_back_the_cache(tiny_model: Path) -> None:
    with labinfer.load(tiny_model, **limits(TESTS)) as model:
        found = measure.measure(model, TESTS, repeat=2)
        assert model.blocks.usage == 0
    assert len(measure.weight_memory(model)) == 0
    assert found["peak_rss_bytes"] > 1 << 20
    assert found["machine"]["read_bytes_per_second"] > 0


def test_decode_figures_by_hand(tiny_model: Path) -> None:
    plan = labinfer.compile(tiny_model, devices="reference")
    nbytes = decode_bytes(plan, 2, 1.5)
    times = [[1.0, 3.0], [1.0, 1.0], [2.0, 2.0]]
    found = measure.decode_figures(plan, Workload("decode", 2, 2), times, [nbytes * 1.0, nbytes * 4.0, nbytes * 1.0])
    assert found["bytes_per_token"] == nbytes / 2
    assert found["bytes_per_second"] == nbytes * 2 / 4
    assert found["share_of_ceiling"] == 0.5  # of 0.5, 0.25 and 0.5
    assert found["inter_token_p50_seconds"] == 1.5
    assert measure.decode_figures(plan, Workload("decode", 2, 2), times, [])["share_of_ceiling"] is None


def test_decode_runs_the_steps_it_says(tiny_model: Path) -> None:
    with labinfer.load(tiny_model, **limits(TESTS)) as model:
        seen: list[tuple[int, int]] = []
        run = model.run
        model.run = lambda step: seen.append((len(step.token_ids), int(step.context_len.max()))) or run(step)  # type: ignore[func-returns-value]
        assert len(measure.run_test(model, Workload("decode", 4, 3))) == 4
        assert seen == [(3, 1), (3, 2), (3, 3), (3, 4)]
        seen.clear()
        assert len(measure.run_test(model, Workload("prefill", 7))) == 1
        assert seen == [(7, 7)]


@pytest.mark.alone
def test_steps_in_one_call_are_timed_by_their_part(tiny_model: Path) -> None:
    pytest.importorskip("numba")
    with labinfer.load(tiny_model, devices="cpu", **limits([Workload("decode", 64)])) as model:
        seconds = measure.run_test(model, Workload("decode", 64))
        assert len(seconds) == 64
        assert max(each.num_steps for each in model.engine.stats) > 1
        assert seconds[20:24] == pytest.approx([seconds[20]] * 4)


def test_bench_prints_one_document(labinfer_cli: Cli, tiny_model: Path) -> None:
    done = labinfer_cli("bench", tiny_model, *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [test["name"] for test in found["tests"]] == [test.name for test in TESTS]
    prefill, one, three = found["tests"]
    assert prefill["tokens_per_second"] == pytest.approx(7 / prefill["time_to_first_token_seconds"])
    assert one["bytes_per_second"] == pytest.approx(one["bytes_per_token"] * one["tokens_per_second"])
    assert three["bytes_per_token"] < one["bytes_per_token"]
    assert 0 < one["inter_token_p50_seconds"] <= one["inter_token_p99_seconds"]
    assert found["planned_bytes"].keys() == {"weights", "kv_cache", "arena"}
    assert found["load_seconds"] > 0


def test_bench_prints_a_table(labinfer_cli: Cli, tiny_model: Path) -> None:
    done = labinfer_cli("bench", tiny_model, *SHORT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tiny on reference: ")
    assert [line.split("  ")[0] for line in lines[-3:]] == ["prefill 7", "decode 5", "decode 5 x 3"]


def test_a_plan_keeps_its_limits(labinfer_cli: Cli, tmp_path: Path) -> None:
    path, _ = tiny_plan(tmp_path, max_model_len=16, max_num_seqs=2)
    fits = labinfer_cli("bench", path, "--prompt-lengths", 15, "--decode-lengths", 4, "--batch", 2, "--repeat", 1)
    assert fits.returncode == 0, fits.stderr
    for words in (["--prompt-lengths", 17], ["--prompt-lengths", 16, "--batch", 3, "--decode-lengths", 4]):
        refused = labinfer_cli("bench", path, *words)
        assert refused.returncode == 2
        assert "bench.plan-limits" in refused.stderr


@pytest.mark.parametrize("words", [["--batch", "1,,2"], ["--prompt-lengths", "0"], ["--repeat", "none"]])
def test_bad_numbers_are_usage_errors(labinfer_cli: Cli, tiny_model: Path, words: list[str]) -> None:
    assert labinfer_cli("bench", tiny_model, *words).returncode == 2


def test_pairs_alternate_and_their_ratios_count() -> None:
    order: list[str] = []
    speeds = {"ours": iter([10.0, 20.0, 60.0]), "theirs": iter([10.0, 10.0, 20.0])}

    def run(side: str) -> peers.Run:
        return lambda: order.append(side) or {"decode 5 x 1": next(speeds[side])}  # type: ignore[func-returns-value]

    found = peers.pairwise(run("ours"), run("theirs"), 3)["decode 5 x 1"]
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert found == {"labinfer": 20.0, "peer": 10.0, "ratio": 2.0, "ratio_range": [1.0, 3.0]}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A peer for safetensors whose program claims 1 token/s, and notes what it was asked."""
    program = tmp_path / "peer.py"
    program.write_text(
        "import json, sys, pathlib\n"
        "pathlib.Path(__file__).with_name('task.json').write_text(sys.argv[1])\n"
        "tests = json.loads(sys.argv[1])['tests']\n"
        "print(json.dumps({f'{kind} {tokens} x {batch}': 1.0 for kind, tokens, batch in tests}))\n"
    )
    monkeypatch.setattr(peers, "PEERS", (peers.Peer("stand-in", "json", str(program), "hf"),))
    return program


def test_compare_runs_both_sides_in_their_own_processes(
    labinfer_cli: Cli, tiny_model: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(labinfer.__file__).parents[1]))
    words = ("--prompt-lengths", 7, "--decode-lengths", 5, "--batch", "1,3", "--repeat", 1)
    done = labinfer_cli("bench", tiny_model, *words, "--compare", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["peers"]["stand-in"]
    assert list(found) == [test.name for test in TESTS]
    assert all(test["ratio"] == pytest.approx(test["labinfer"]) and test["labinfer"] > 1 for test in found.values())
    task = json.loads(stand_in.with_name("task.json").read_text())
    assert task["model"] == str(tiny_model)
    assert task["tests"] == [["prefill", 7, 1], ["decode", 5, 1], ["decode", 5, 3]]


def test_a_failing_peer_says_why(stand_in: Path) -> None:
    stand_in.write_text("raise SystemExit('out of luck')")
    with pytest.raises(LabinferError, match="out of luck"):
        peers.PEERS[0].run(sys.executable, "model", 1, TESTS)


def test_a_peer_that_writes_something_else_is_said(stand_in: Path) -> None:
    stand_in.write_text("print('hello')")
    with pytest.raises(LabinferError, match="hello"):
        peers.PEERS[0].run(sys.executable, "model", 1, TESTS)


def test_compare_without_a_peer_names_the_remedy(
    labinfer_cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS", (peers.Peer("nobody", "no_such_module_anywhere", "x.py", "hf"),))
    done = labinfer_cli("bench", tiny_model, *SHORT, "--compare")
    assert done.returncode == 1
    assert "LABINFER_BENCH_PYTHON" in done.stderr


def test_peer_programs_compile() -> None:
    for peer in peers.PEERS:
        path = Path(peers.__file__).parent / peer.program
        compile(path.read_text(), str(path), "exec")


def test_room_is_checked_before_anything_runs(tiny_model: Path) -> None:
    with labinfer.load(tiny_model, max_model_len=8) as model, pytest.raises(UsageError):
        measure.measure(model, [Workload("prefill", 9)], repeat=1)
