"""The cache of real models: no reuse, fork, swap or colder tier changes a token, and windows bound what is used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labinfer
from labinfer import SamplingParams, catalogue
from labinfer.api import read_model, targets
from labinfer.compiler.compile import compile_plan
from labinfer.compiler.options import CompileOptions
from labinfer.errors import DoesNotFit, UsageError
from labinfer.llm import LLM
from labinfer.runtime.batch import part_of
from labinfer.runtime.model import Model

from .tiny import FOLDERS, GOLDEN

PROMPT = [5, 9, 2, 7, 11, 3, 8, 1, 6, 4, 10, 12] * 3
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
WINDOWED = ("mistral-window", "mixtral-window", "starcoder2-window", "qwen2-window", "gemma2-odd_heads",
            "gemma3_text-linear_global", "phi3-window_odd_heads")  # fmt: skip


def start(model: Model, prompt: list[int], salt: tuple[str, ...] = ()) -> int:
    """A row that begins with what is cached of ``prompt``."""
    row = model.batch.add(prompt, salt)
    model.batch.attach(row)
    return row


def greedy(model: Model, row: int, count: int) -> list[int]:
    """``count`` more tokens of ``row``."""
    made, batch = [], model.batch
    for _ in range(count):
        while (left := int(batch.num_tokens[row] - batch.num_computed[row])) > 0:
            size = min(left, model.plan.limits.max_num_batched_tokens)
            logits = model.compute(part_of(row, size, int(size == left)))
        made.append(int(logits[0].argmax()))
        batch.extend(row, made[-1:])
        model.blocks.check_integrity()
    return made


def fill(model: Model, prompts: int, length: int = 40) -> None:
    """Compute other texts, so that what is cached must go."""
    for number in range(prompts):
        other = start(model, [13 + number % 40] * length)
        greedy(model, other, 1)
        model.batch.remove(other)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_cached_prefix_changes_no_token(folder: Path, block_size: int) -> None:
    limits: dict[str, Any] = {"block_size": block_size, "max_num_batched_tokens": 10, "max_model_len": 60}
    with labinfer.load(folder, enable_prefix_caching=False, **limits) as model:
        expected = [result.token_ids for result in model.generate([PROMPT[:30], PROMPT[:33]], GREEDY)]
        assert model.blocks.counters.hits == 0
    with labinfer.load(folder, **limits) as model:
        for _ in range(2):
            for prompt, tokens in zip((PROMPT[:30], PROMPT[:33]), expected, strict=True):
                assert model.generate(prompt, GREEDY)[0].token_ids == tokens
        assert model.blocks.counters.hits > 60
        assert model.blocks.usage == 0
        model.blocks.check_integrity()


def test_prompts_whose_keys_depend_on_their_length_share_nothing() -> None:
    with labinfer.load(GOLDEN / "llama-dynamic_crossed", block_size=4, max_model_len=64) as model:
        assert model.blocks.reuse_until is not None
        long = (PROMPT * 2)[: model.blocks.reuse_until + 5]
        first = model.generate(long, GREEDY)[0].token_ids
        assert model.generate([long, long[:-2]], GREEDY)[0].token_ids == first
        assert model.blocks.counters.hits == 0
        model.generate([long[:12], long], GREEDY)
        assert model.generate(long[:12], GREEDY)
        assert model.blocks.counters.hits == 11  # two blocks, and what the third begins with


@pytest.mark.parametrize("name", WINDOWED)
def test_what_a_window_has_passed_is_given_back(name: str) -> None:
    limits = {"block_size": 4, "max_num_batched_tokens": 6, "max_num_seqs": 1, "max_model_len": 60}
    with labinfer.load(GOLDEN / name, **limits) as model, labinfer.load(GOLDEN / name, block_size=64) as whole:
        narrow = [number for number, group in enumerate(model.plan.limits.groups) if group.window]
        assert narrow
        prompt = PROMPT[:9]
        row = start(model, prompt)
        for length in range(len(prompt), 58):
            greedy(model, row, 1)
            for number in narrow:
                group = model.plan.limits.groups[number]
                held = model.blocks.held(row, number)
                assert held <= model.plan.limits.blocks_needed(group, length) <= group.num_blocks < 15
        params = SamplingParams(temperature=0, max_tokens=49, ignore_eos=True)
        assert whole.generate(prompt, params)[0].token_ids == model.batch.tokens(row)[len(prompt) :].tolist()


def test_groups_follow_the_windows() -> None:
    def groups(name: str, **limits: Any) -> list[tuple[int | None, int]]:
        plan = labinfer.compile(GOLDEN / name, max_num_batched_tokens=16, **limits)
        return [(group.window, group.num_blocks) for group in plan.limits.groups]

    assert groups("llama-llama3", max_model_len=64) == [(None, 32)]
    assert groups("mistral-window", max_model_len=64) == [(8, 20)]  # 8 + (8 * (8 + 16 - 2) + 16) // 16
    assert groups("mistral-window", max_model_len=8) == [(None, 8)]  # no sequence outgrows the window
    assert groups("gemma2-odd_heads", max_model_len=64) == [(None, 32), (8, 20)]
    assert groups("gemma2-odd_heads", max_model_len=64, num_blocks=7) == [(None, 7), (8, 7)]


@pytest.mark.parametrize("devices", ["reference", "reference,reference:1"])
@pytest.mark.parametrize("name", ["llama-llama3", "mistral-window", "gemma2-odd_heads"])
def test_kv_memory_is_used_to_the_last_block(name: str, devices: str) -> None:
    for memory in (20_000, 33_333, 1_000_000):
        plan = labinfer.compile(GOLDEN / name, devices=devices, kv_memory=memory, max_model_len=64, block_size=4)
        taken = sum(stage.bytes.kv_cache for stage in plan.stages)
        states = [4 * 4 * sum(s.widths.values()) * (s.layers[1] - s.layers[0] + 1) for s in plan.states if s.layers]
        assert memory - sum(states) < taken <= memory
    with pytest.raises(DoesNotFit) as caught:
        labinfer.compile(GOLDEN / name, devices=devices, kv_memory=1000)
    assert caught.value.code == "device.memory"


@pytest.mark.parametrize("name", ["llama-llama3", "mistral-window", "gemma2-odd_heads"])
def test_the_cache_takes_what_a_device_has_left(name: str) -> None:
    blueprint, source, _ = read_model(GOLDEN / name)
    options = CompileOptions(max_model_len=64, max_num_batched_tokens=16, block_size=4)
    whole = compile_plan(blueprint, source, targets("reference"), options)
    [full] = whole.stages
    for less in (1, full.bytes.kv_cache // 2):
        [target] = targets("reference")
        target = replace(target, memory=full.bytes.total - less)
        plan = compile_plan(blueprint, source, [target], options)
        each = full.bytes.kv_cache // min(group.num_blocks for group in whole.limits.groups)
        assert target.memory is not None
        assert target.memory - each < plan.stages[0].bytes.total <= target.memory
        assert (plan.limits.groups == whole.limits.groups) is False
    with pytest.raises(DoesNotFit):
        compile_plan(blueprint, source, [replace(target, memory=full.bytes.arena)], options)


@pytest.mark.parametrize("options", [
    {"kv_memory": 1.5}, {"kv_memory": 0}, {"swap_space": -1}, {"swap_space": float("nan")}, {"swap_space": "4"},
    {"kv_memory": 10**6, "num_blocks": 4}, {"swap_space": 1e-9},
], ids=str)  # fmt: skip
def test_sizes_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        labinfer.compile(GOLDEN / "llama-llama3", **options)
    assert caught.value.code in ("limits.range", "limits.cache", "limits.swap-space")


SWAP = {"block_size": 4, "max_num_batched_tokens": 10, "max_model_len": 60, "swap_space": 0.001}


@pytest.mark.parametrize("devices", ["reference", "reference,reference:1"])
@pytest.mark.parametrize("name", ["llama-llama3", "deepseek_v2-group_limited", *WINDOWED, "phi3-longrope_crossed"])
def test_a_swapped_sequence_goes_on_as_if_nothing_had_been(name: str, devices: str) -> None:
    with labinfer.load(GOLDEN / name, devices=devices, num_blocks=16, **SWAP) as model:
        pool, swap = model.cache.swap and model.cache.swap.pool, model.cache.swap
        assert swap is not None
        assert pool is not None
        assert pool.nbytes == sum(stage.bytes.swap for stage in model.plan.stages) > 0
        row = start(model, PROMPT[:12])
        expected = greedy(model, row, 10)
        model.batch.remove(row)
        model.blocks.evict_into(pool)
        row = start(model, [0, *PROMPT[1:12]])
        greedy(model, row, 3)
        model.batch.remove(row)
        row = start(model, PROMPT[:12], ("nothing cached",))
        made = greedy(model, row, 4)
        handle = swap.swap_out(row)
        assert handle is not None
        assert swap.num_out == sum(map(len, handle.places)) > 0
        fill(model, 3)
        assert swap.swap_in(handle, row)
        assert swap.num_in == swap.num_out
        assert made + greedy(model, row, 6) == expected
        assert 0 < swap.seconds(row) < 1
    assert model.cache.swap is None


class Fading(OrderedDict[bytes, int]):
    """Evicted texts of which each is gone once somebody has seen it, as when the engine's thread needs its place."""

    def __contains__(self, digest: object) -> bool:
        return self.pop(digest, None) is not None


def test_a_text_that_goes_while_another_thread_asks_for_it_is_not_there() -> None:
    with labinfer.load(GOLDEN / "llama-llama3", **SWAP) as model:
        assert model.cache.swap is not None
        pool = model.cache.swap.pool
        pool.cold[0] = Fading({b"here": 1})
        assert pool.has(0, b"here")
        assert not pool.has(0, b"gone")
        pool.cold[0] = OrderedDict()


def test_a_fork_writes_to_blocks_of_its_own() -> None:
    with labinfer.load(GOLDEN / "gemma2-odd_heads", block_size=4, max_num_batched_tokens=10) as model:
        expected = [greedy(model, start(model, [*PROMPT[:14], token], (str(token),)), 8) for token in (3, 50)]
        one = start(model, PROMPT[:14])
        greedy(model, one, 1)
        model.batch.num_tokens[one] -= 1
        two = model.batch.fork(one)
        model.batch.extend(one, [3])
        model.batch.extend(two, [50])
        made = [greedy(model, row, 1) for row in (one, two)]
        assert model.blocks.counters.copies == 2
        for _ in range(7):
            for number, row in enumerate((one, two)):
                made[number] += greedy(model, row, 1)
        assert made == expected


@pytest.mark.parametrize("name", ["llama-llama3", "mistral-window", "gemma2-odd_heads"])
def test_evicted_prefixes_come_back_from_host_memory_and_from_disk(name: str, tmp_path: Path) -> None:
    options = SWAP | {"num_blocks": 18, "swap_space": 40_000 / 2**30}

    def run(model: LLM, folder: Path) -> int:
        row = start(model, PROMPT)
        cached = int(model.batch.num_computed[row])
        assert greedy(model, row, 6) == expected
        model.batch.remove(row)
        return cached

    with labinfer.load(GOLDEN / name, enable_prefix_caching=False, **SWAP) as model:
        expected = model.generate(PROMPT, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0].token_ids
    with labinfer.load(GOLDEN / name, cold_folder=tmp_path, **options) as model:
        assert run(model, tmp_path) == 0
        fill(model, 3, 30)
        assert model.blocks.counters.evictions > 0
        assert run(model, tmp_path) == 32
        assert model.blocks.counters.cold_hits > 0
        fill(model, 25)  # beyond what host memory holds
        assert list(tmp_path.glob("*/*"))
    with labinfer.load(GOLDEN / name, cold_folder=tmp_path, **options) as model:  # another process, later
        assert run(model, tmp_path) == 32
        assert model.cache.swap is not None
        assert model.cache.swap.pool.disk is not None
    for file in tmp_path.glob("*/*"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    with labinfer.load(GOLDEN / name, cold_folder=tmp_path, **options) as model:
        assert run(model, tmp_path) < 32
    with labinfer.load(GOLDEN / name, cold_folder=tmp_path, **options | {"block_size": 8}) as model:
        assert run(model, tmp_path) == 0  # blocks of another size are not looked at


def test_a_folder_needs_host_memory_and_leave_to_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        labinfer.load(GOLDEN / "llama-llama3", cold_folder=tmp_path)
    assert "swap-space" in str(caught.value.remedy)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as caught:
        labinfer.load(GOLDEN / "llama-llama3", cold_folder=tmp_path / "file", **SWAP)
    assert caught.value.code == "run.cache-folder"


@pytest.fixture
def smollm2() -> Iterator[LLM]:
    pytest.importorskip("numba", reason="the CPU backend needs numba")
    path = catalogue.find("smollm2-135m").pulled()
    if path is None:
        pytest.skip("SmolLM2 is not in the cache: labinfer pull smollm2-135m")
    with labinfer.load(path, devices="cpu", max_model_len=256, num_blocks=24, swap_space=0.02) as model:
        yield model


def test_smollm2_gives_the_same_tokens_reused_swapped_and_restored(smollm2: LLM) -> None:
    prompt = np.random.default_rng(0).integers(100, 40_000, 100).tolist()
    swap = smollm2.cache.swap
    assert swap is not None
    row = start(smollm2, prompt)
    expected = greedy(smollm2, row, 12)
    smollm2.batch.remove(row)
    row = start(smollm2, prompt)
    assert smollm2.batch.num_computed[row] == 96
    made = greedy(smollm2, row, 6)
    handle = swap.swap_out(row)
    assert handle is not None
    fill(smollm2, 3, 200)
    assert swap.swap_in(handle, row)
    assert made + greedy(smollm2, row, 6) == expected
    smollm2.batch.remove(row)
    fill(smollm2, 2, 200)
    row = start(smollm2, prompt)
    assert smollm2.batch.num_computed[row] == 96
    assert smollm2.blocks.counters.cold_hits > 0
    assert greedy(smollm2, row, 12) == expected
