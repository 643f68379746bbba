"""GPUs with CPUs and with each other: pipelines, streamed layers, swapping, memory; tokens are those of one device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

import labinfer
from labinfer.compiler.costs import StepShape
from labinfer.compiler.plan import StageBytes
from labinfer.profile.quiet import Patience
from labinfer.runtime.manager import Manager
from tests.test_pipeline import greedy, on_one_device, prompts
from tests.tiny import GOLDEN

FAMILIES = ("llama-odd_heads_tied", "gemma3_text-linear_global", "deepseek_v2-group_limited")
OPTIONS: dict[str, Any] = {"max_model_len": 64, "arena_effort_seconds": 0.05}
LLAMA = GOLDEN / "llama-llama3"


@pytest.mark.parametrize("devices", ["cuda,cpu", "cpu,cuda"])
@pytest.mark.parametrize(
    ("name", "transport"), [*product(FAMILIES, (None, "local")), (FAMILIES[0], "shm"), (FAMILIES[0], "tcp")]
)
def test_a_gpu_and_a_cpu_give_the_tokens_of_one_device(
    gpu: Any, in_float32: Callable[[Path], Path], name: str, devices: str, transport: str | None
) -> None:
    with closing(Manager()) as manager:
        options = {"devices": devices, "transport": transport, "manager": manager, "threads": 1}
        with labinfer.load(in_float32(GOLDEN / name), **OPTIONS, **options) as model:
            assert [stage.device for stage in model.plan.stages] == devices.split(",")
            assert greedy(model, prompts(name)) == on_one_device(name)


@pytest.mark.parametrize("transport", [None, "local", "shm"])
def test_two_gpus_give_the_tokens_and_logits_of_one(gpu: Any, transport: str | None) -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("this machine has one GPU")
    name = FAMILIES[0]
    with labinfer.load(GOLDEN / name, devices="cuda:0", **OPTIONS) as model:
        expected, logits = greedy(model, prompts(name)), model.logits(prompts(name)[0])
    with labinfer.load(GOLDEN / name, devices="cuda:0,cuda:1", transport=transport, **OPTIONS) as model:
        assert greedy(model, prompts(name)) == expected
        np.testing.assert_array_equal(model.logits(prompts(name)[0]), logits)


def test_values_go_from_gpu_to_gpu_in_the_order_of_their_work(gpu: Any) -> None:
    import cupy

    names = [f"cuda:{number}" for number in range(cupy.cuda.runtime.getDeviceCount())]
    with closing(Manager()) as manager:
        opened = [manager.device(name) for name in (names if len(names) > 1 else ["cuda:0", "cuda:0.0"])]
        arrays = []
        for device in opened:
            buffer = device.allocate(4 << 20, "test")
            arrays.append(device.view(buffer, 0, (1 << 20,), "i32"))
        ends = [*zip(opened, arrays, strict=True)]
        for round in range(20):
            opened[0].move_in(np.full(1 << 20, round, np.int32), arrays[0])
            for (source, made), (target, place) in pairwise(ends):
                target.move_from(source, made, place)
            opened[0].move_in(np.full(1 << 20, -1, np.int32), arrays[0])  # must not overtake the copy
            found = opened[-1].move_out(arrays[-1])
            assert (found == round).all(), f"round {round}: {np.unique(found)}"


@pytest.mark.parametrize("stream_from", ["host", "disk"])
@pytest.mark.parametrize("layers", [1, 2, 3, 100])
@pytest.mark.parametrize("graphs", [True, False])
def test_streamed_layers_give_the_logits_of_resident_ones(
    gpu: Any, layers: int, stream_from: str, graphs: bool
) -> None:
    manager, was = Manager(devices={"cuda": gpu}), gpu.graphs
    given, sampling = [[3, 4, 5], list(range(20))], labinfer.SamplingParams(temperature=0, max_tokens=20)
    with labinfer.load(LLAMA, devices="cuda", manager=manager, **OPTIONS) as model:
        expected = [each.token_ids for each in model.generate(given, sampling)], model.logits(given[1])
    gpu.graphs = graphs
    try:
        options = {"streamed_layers": layers, "stream_from": stream_from, "manager": manager}
        with labinfer.load(LLAMA, devices="cuda", **options, **OPTIONS) as model:
            assert 0 < len(model.plan.stages[0].streamed) <= layers
            for _ in range(3):
                assert [each.token_ids for each in model.generate(given, sampling)] == expected[0]
                np.testing.assert_array_equal(model.logits(given[1]), expected[1])
    finally:
        gpu.graphs = was


def test_swapped_rows_go_on_as_if_nothing_had_been(gpu: Any) -> None:
    """Four sequences in the cache of two: rows wait in pinned memory, and their tokens stay what they were."""
    manager = Manager(devices={"cuda": gpu})
    rng = np.random.default_rng(3)
    given = [rng.integers(0, 96, 24).tolist() for _ in range(4)]
    sampling = labinfer.SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    limits = {"max_num_seqs": 4, "enable_prefix_caching": False}
    with labinfer.load(LLAMA, devices="cuda", manager=manager, **limits, **OPTIONS) as model:
        expected = [each.token_ids for each in model.generate(given, sampling)]
    limits |= {"num_blocks": 9, "swap_space": 0.01}
    with labinfer.load(LLAMA, devices="cuda", manager=manager, **limits, **OPTIONS) as model:
        model.engine.costs.prompt_seconds = lambda tokens: float("inf")  # else it computes them again, which is quicker
        assert [each.token_ids for each in model.generate(given, sampling)] == expected
        swap = model.cache.swap
        assert swap is not None
        print(f"{swap.num_out} blocks out, {swap.num_in} in, {1e-9 / swap.pool.seconds_per_byte:.2f} GB/s")
        assert swap.num_out > 0


def test_blocks_keep_their_bytes_on_the_way_to_the_host_and_back(gpu: Any) -> None:
    with labinfer.load(LLAMA, devices="cuda", manager=Manager(devices={"cuda": gpu}), **OPTIONS) as model:
        [cache] = model.cache.arrays
        rng, [arrays] = np.random.default_rng(1), cache.blocks
        content = [np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape) for array in arrays]
        for array, host in zip(arrays, content, strict=True):
            gpu.move_in(host, array)
        [host] = cache.host_blocks([3])
        cache.move_out(0, [2, 0, 1], host, [0, 1, 2])
        cache.move_in(0, host, [0, 1], [3, 0])
        for array, before in zip(arrays, content, strict=True):
            after = gpu.move_out(array).view(np.uint8)
            np.testing.assert_array_equal(after[[3, 0]], before.view(np.uint8)[[2, 0]])


def test_calls_are_timed_on_the_gpu(gpu: Any) -> None:
    from labinfer.profile.measure import measure_step

    with labinfer.load(LLAMA, devices="cuda", manager=Manager(devices={"cuda": gpu}), **OPTIONS) as model:
        for shape in (StepShape.decode(1, 16), StepShape.prefill(32)):
            times = measure_step(model, shape, Patience(0))
            ops = sum(seconds for _, seconds in times.of_ops(0))
            print(f"{shape}: {times.whole * 1e6:.0f} us, its ops {ops * 1e6:.0f} us")
            assert ops > 0


def test_the_gpu_holds_what_the_plan_says(gpu: Any) -> None:
    """A model of about 1 GB, most of it cache; what the first model brings (kernels, graphs) is there already."""
    manager = Manager(devices={"cuda": gpu})

    def held(num_blocks: int) -> tuple[int, StageBytes]:
        before = gpu.memory()[0]
        options = {"devices": "cuda", "manager": manager, "num_blocks": num_blocks}
        with labinfer.load(LLAMA, **options, **OPTIONS) as model:
            model.generate([[1, 2, 3], list(range(20))], labinfer.SamplingParams(max_tokens=5))
            return before - gpu.memory()[0], model.plan.stages[0].bytes

    _, small = held(64)
    taken, planned = held(64 * (1 << 30) // small.kv_cache)
    print(f"the GPU holds {taken / 1e6:.1f} MB more, the plan says {planned.total / 1e6:.1f} MB")
    assert planned.total >= 1 << 30
    assert abs(taken - planned.total) <= 0.02 * planned.total
