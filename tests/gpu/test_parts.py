"""Parts of a GPU: kernels stay on the multiprocessors that are granted, and models say there what they say on all."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest

import labinfer
from labinfer.errors import DoesNotFit, LabinferError
from labinfer.profile.quiet import Patience
from labinfer.profile.session import profile_cluster
from labinfer.progress import silent
from labinfer.runtime.grants import all_grants
from labinfer.runtime.manager import Manager
from tests.tiny import GOLDEN

HALVES = {"cuda:0.0": 0.5, "cuda:0.1": 0.5}
GREEDY = labinfer.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
PROMPTS = [[3, 4, 5], list(range(20))]
FOLDER = GOLDEN / "qwen3-bias"

WHERE = """
extern "C" __global__ void where(int *seen) {
    unsigned sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    if (threadIdx.x == 0) seen[blockIdx.x] = sm;
    for (long long start = clock64(); clock64() - start < 20000;);
}
"""
"""Each block notes its multiprocessor and stays long enough that others get blocks, too."""

BLOCKS = 4096


@pytest.fixture
def halves(gpu: Any) -> Iterator[list[Any]]:
    """Two devices of half a GPU each."""
    with closing(Manager(shares=HALVES)) as manager:
        try:
            yield [manager.device(name) for name in HALVES]
        except LabinferError as error:
            if error.code != "device.share":
                raise
            pytest.skip(error.message)


def multiprocessors_of(device: Any, graph: bool) -> set[int]:
    """Those that a kernel runs on, launched or as a node of a graph."""
    from labinfer.backends.cuda import driver, nvrtc

    device.use()
    code, _ = nvrtc.compile(WHERE, "where", device.arch, ())
    buffer = device.allocate(4 * BLOCKS, "test")
    seen = device.view(buffer, 0, (BLOCKS,), "i32")
    launch = driver.Launch(driver.Function(driver.load_module(code), "where"), (BLOCKS, 1, 1), 1024, 0, (seen,), False)
    if graph:
        device.capture(launch).launch(device.stream)
    else:
        launch(device.stream.ptr)
    found = set(device.move_out(seen).tolist())
    device.deallocate(buffer)
    return found


@pytest.mark.parametrize("graph", [False, True])
def test_kernels_stay_on_their_part(halves: list[Any], graph: bool) -> None:
    one, other = (multiprocessors_of(device, graph) for device in halves)
    print(f"granted {[device.describe() for device in halves]}; ran on {sorted(one)} and {sorted(other)}")
    assert [len(one), len(other)] == [device.multiprocessors for device in halves]
    assert not one & other


def test_a_part_says_what_it_is(halves: list[Any]) -> None:
    for device in halves:
        assert device.compute_share == pytest.approx(0.5, abs=0.06)
        assert f"{device.multiprocessors} of {device.all_multiprocessors} multiprocessors" in device.describe()


def test_parts_are_given_back(gpu: Any) -> None:
    with closing(Manager(shares=HALVES | {"cuda:0.2": 0.5})) as manager:
        for name in HALVES:
            manager.device(name)
        with pytest.raises(DoesNotFit, match="left of GPU 0"):
            manager.device("cuda:0.2")
    for share in (0.5, 0.9):
        with closing(Manager(shares={"cuda:0.2": share})) as manager:
            assert manager.device("cuda:0.2").compute_share == pytest.approx(share, abs=0.06)


def test_two_models_at_once_say_what_one_says_on_all(gpu: Any) -> None:
    with labinfer.load(FOLDER, devices="cuda", manager=Manager(devices={"cuda": gpu}), max_model_len=64) as model:
        expected = [each.token_ids for each in model.generate(PROMPTS, GREEDY)]
        logits = model.logits(PROMPTS[1])
    with closing(Manager(shares=HALVES)) as manager:
        models = [labinfer.load(FOLDER, devices=name, manager=manager, max_model_len=64) for name in HALVES]
        shown = {grant.device: grant.processors for grant in all_grants()}
        assert shown == manager.processors
        with ThreadPoolExecutor(2) as pool:
            for _ in range(4):
                made = pool.map(lambda model: [each.token_ids for each in model.generate(PROMPTS, GREEDY)], models)
                assert list(made) == [expected, expected]
        for model in models:
            found = model.logits(PROMPTS[1])
            print(f"logits off by {np.linalg.norm(found - logits) / np.linalg.norm(logits):.1e} of those on all")
            np.testing.assert_allclose(found, logits, rtol=1e-3, atol=1e-3)
            model.close()


def test_a_quota_bounds_a_part(gpu: Any) -> None:
    size = labinfer.compile(FOLDER, devices="cuda:0.0", max_model_len=64).stages[0].bytes.total
    with closing(Manager(shares=HALVES, quotas={"cuda:0.0": size - 1})) as manager:
        with pytest.raises(DoesNotFit, match="quota"):
            labinfer.load(FOLDER, devices="cuda:0.0", manager=manager, max_model_len=64)
        labinfer.load(FOLDER, devices="cuda:0.1", manager=manager, max_model_len=64).close()


@pytest.mark.usefixtures("home")
def test_a_share_of_a_cluster_file_is_measured_and_granted(gpu: Any, tmp_path: Any) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("devices:\n  cuda:0:\n    share: 0.25\n")
    profile_cluster(FOLDER, file, silent, Patience(0), quick=True)
    plan = labinfer.compile(FOLDER, cluster=file, max_model_len=64)
    assert plan.devices["cuda:0"].threads == round(gpu.multiprocessors / 4)
    with closing(Manager()) as manager, labinfer.load(plan, manager=manager) as model:
        assert manager.devices["cuda:0"].compute_share == pytest.approx(0.25, abs=0.06)
        assert len(model.generate([1, 2, 3], GREEDY)[0].token_ids) == 20


def test_stages_on_two_parts_hand_values_over_on_the_gpu(gpu: Any) -> None:
    with labinfer.load(FOLDER, devices="cuda", manager=Manager(devices={"cuda": gpu}), max_model_len=64) as model:
        expected = [each.token_ids for each in model.generate(PROMPTS, GREEDY)]
    with closing(Manager(shares=HALVES)) as manager:
        for transport in (None, "local"):
            options = {"devices": ",".join(HALVES), "transport": transport, "max_model_len": 64}
            with labinfer.load(FOLDER, manager=manager, **options) as model:
                assert len(model.stages) == 2
                found = [each.token_ids for each in model.generate(PROMPTS, GREEDY)]
            assert found == expected, f"with transport {transport}"
