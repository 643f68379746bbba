"""``LLM``: what every keyword of its constructor does, seeds, and chats."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import labinfer
from labinfer import LLM, SamplingParams
from labinfer.compiler.options import CompileOptions
from labinfer.errors import UsageError
from labinfer.runtime.eviction import LeastRecentlyUsed
from labinfer.runtime.manager import Manager
from labinfer.runtime.pipeline.workers import StageThreads
from labinfer.runtime.scheduler import Policy

from .tiny import GOLDEN, tiny_checkpoint, tiny_map

LLAMA = GOLDEN / "llama-llama3"


class Evicting(LeastRecentlyUsed):
    """A policy that can be told from the default one."""


class Plain(Policy):
    """A policy that can be told from the default one."""


def limit(name: str) -> Callable[[LLM, Any], bool]:
    return lambda llm, value: getattr(llm.plan.limits, name) == value


def swap_blocks(llm: LLM) -> int:
    return llm.plan.limits.groups[0].swap_blocks


def ops(llm: LLM) -> set[str]:
    return {op.kind for interpreter in llm.interpreters for op in interpreter.ops}


KEYWORDS: dict[str, tuple[Any, Callable[[LLM, Any], bool]]] = {
    "devices": ("reference:1", lambda llm, value: [stage.device for stage in llm.plan.stages] == [value]),
    "seed": (7, lambda llm, value: llm.seed == value),
    "speculative_config": ({"num_speculative_tokens": 2}, lambda llm, value: llm.proposer is not None),
    "enable_prefix_caching": (False, lambda llm, value: llm.blocks.caching is value),
    "eviction_policy": (Evicting, lambda llm, value: isinstance(llm.blocks.groups[0].policy, value)),
    "policy": (Plain(), lambda llm, value: llm.engine.scheduler.policy is value),
    "max_num_batched_tokens": (9, limit("max_num_batched_tokens")),
    "max_num_seqs": (3, limit("max_num_seqs")),
    "max_logits_rows": (5, limit("max_logits_rows")),
    "max_model_len": (50, limit("max_model_len")),
    "block_size": (8, limit("block_size")),
    "num_blocks": (11, lambda llm, value: llm.plan.limits.groups[0].num_blocks == value),
    "kv_memory": (100_000, lambda llm, value: 0.9 * value < llm.plan.stages[0].bytes.kv_cache <= value),
    "swap_space": (0.001, lambda llm, value: swap_blocks(llm) > 0 and llm.cache.swap is not None),
    "kv_dtype": ("f16", limit("kv_dtype")),
    "threads": (1, lambda llm, value: llm.plan.devices["cpu"].threads == value),
    "activations": ("int8", lambda llm, value: llm.plan.devices["cpu"].options.activations == value),
    "fuse": ("none", lambda llm, value: not any("norm_" in kind for kind in ops(llm))),
    "enable_lora": (True, lambda llm, value: llm.plan.limits.max_loras > 1),
    "max_loras": (1, limit("max_loras")),
    "max_lora_rank": (3, limit("max_lora_rank")),
    "streamed_layers": (1, lambda llm, value: len(llm.plan.stages[0].streamed) == value),
    "stream_from": ("disk", lambda llm, value: llm.plan.stages[0].streamed_from == value),
    "transport": (
        "local",
        lambda llm, value: llm.pipeline is not None and isinstance(llm.pipeline.workers, StageThreads),
    ),
    "arena_effort_seconds": (0.0, lambda llm, value: llm.plan.stages[0].arena.size > 0),
}
ON_THE_CPU = {"threads", "activations", "fuse", "kv_dtype"}
TESTED_ALONE = {
    "model", "weights", "manager", "progress", "cold_folder", "cold_bytes", "options", "tensor_parallel_size",
    "tensor_split", "rebalance",
}  # fmt: skip


def test_every_keyword_is_tested() -> None:
    named = set(inspect.signature(LLM).parameters) | set(CompileOptions.__dataclass_fields__)
    assert named == set(KEYWORDS) | TESTED_ALONE


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_keyword_does_what_it_says(name: str) -> None:
    value, holds = KEYWORDS[name]
    devices = {"devices": "cpu"} if name in ON_THE_CPU else {}
    with LLM(LLAMA, **devices) as plain, LLM(LLAMA, **{**devices, name: value}) as llm:
        assert holds(llm, value)
        assert name == "arena_effort_seconds" or not holds(plain, value)
        assert len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_weights_come_from_the_folder_that_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    with LLM(tiny_map(tmp_path), weights=folder) as llm:
        assert llm.checkpoint.path == folder
        assert llm.logits([1]).shape == (1, 16)


def test_a_manager_that_is_given_stays_open() -> None:
    manager = Manager()
    with LLM(LLAMA, manager=manager) as one, LLM(LLAMA, manager=manager) as other:
        assert one.manager is other.manager is manager
        assert (one.logits([1, 2]) == other.logits([1, 2])).all()
    assert not any(device.allocator.allocated for device in manager.devices.values())
    with LLM(LLAMA, manager=manager) as again:
        assert again.logits([1]).shape == (1, 96)


def test_progress_tells_of_all_bytes() -> None:
    told: list[tuple[str, int, int]] = []
    with LLM(LLAMA, progress=lambda what, done, total: told.append((what, done, total))):
        loaded = [(done, total) for what, done, total in told if what == "loading weights"]
        assert loaded[-1][0] == loaded[-1][1] > 0


def test_evicted_blocks_reach_the_cold_folder_and_no_more_than_its_bytes(tmp_path: Path) -> None:
    room: dict[str, Any] = {"num_blocks": 8, "swap_space": 2e-5, "cold_folder": tmp_path / "cold", "cold_bytes": 40_000}
    with LLM(LLAMA, **room) as llm:
        for token in range(1, 9):
            llm.generate([[token] * 80], SamplingParams(temperature=0, max_tokens=1))
    sizes = [file.stat().st_size for file in (tmp_path / "cold").rglob("*") if file.is_file()]
    assert 0 < sum(sizes) <= 40_000


def test_a_seed_repeats_requests_that_have_none() -> None:
    params = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)

    def answers(seed: int | None) -> list[list[int]]:
        with LLM(LLAMA, seed=seed) as llm:
            return [each.token_ids for each in llm.generate([[1, 2], [1, 2]], params)]

    assert answers(5) == answers(5) != answers(6)
    assert answers(5)[0] != answers(5)[1]
    assert answers(None) != answers(None)
    for wrong in ("5", 1.5, True):
        with pytest.raises(UsageError, match="seed must be a whole number"):
            LLM(LLAMA, seed=wrong)  # type: ignore[arg-type]


def test_an_unknown_keyword_is_refused() -> None:
    with pytest.raises(UsageError, match="max_model_length") as caught:
        LLM(LLAMA, max_model_length=5)
    assert "max_model_len" in str(caught.value.remedy)


USER = [{"role": "user", "content": "w10 w11"}]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def test_chat_is_generate_on_the_template(tiny_model: Path) -> None:
    longer = [*USER, {"role": "assistant", "content": "w12"}, {"role": "user", "content": "w13"}]
    with LLM(tiny_model) as llm:
        assert llm.tokenizer is not None
        prompts = [llm.tokenizer.encode_chat(each) for each in (USER, longer)]
        expected = llm.generate(prompts, GREEDY)
        told: list[str] = []
        [one] = llm.chat(USER, GREEDY, lambda index, text: told.append(text))
        assert (one.prompt_token_ids, one.token_ids) == (prompts[0], expected[0].token_ids)
        assert "".join(told) == one.text
        both = llm.chat([USER, longer], [GREEDY, GREEDY])
        assert [each.token_ids for each in both] == [each.token_ids for each in expected]
        assert llm.chat([], GREEDY) == []


def test_what_else_the_template_is_told(tmp_path: Path, tiny_model: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = "{{ messages[0].content }} {% for t in tools or [] %}{{ t.name }} {% endfor %}{{ think }} "
    template += "{% if add_generation_prompt %}assistant{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with LLM(folder) as llm:
        assert llm.tokenizer is not None
        [answer] = llm.chat(USER, GREEDY, tools=[{"name": "w20"}], chat_template_kwargs={"think": "w30"})
        assert answer.prompt_token_ids == llm.tokenizer.encode("w10 w11 w20 w30 assistant")
        [answer] = llm.chat(USER, GREEDY, add_generation_prompt=False)
        assert answer.prompt_token_ids == llm.tokenizer.encode("w10 w11")


@pytest.mark.parametrize(
    ("messages", "code"),
    [("hello", "chat.messages"), (None, "chat.messages"), (["hello"], "chat.messages"), ([USER, 7], "chat.messages"),
     ([*USER, "hello"], "chat.messages"), ([[object()]], "chat.messages"), ({"role": "user"}, "chat.messages")],
)  # fmt: skip
def test_messages_that_cannot_be_meant(messages: Any, code: str, tiny_model: Path) -> None:
    with LLM(tiny_model) as llm, pytest.raises(UsageError) as caught:
        llm.chat(messages, GREEDY)
    assert caught.value.code == code


def test_a_template_is_told_its_messages_once(tiny_model: Path) -> None:
    with LLM(tiny_model) as llm:
        for name in ("messages", "source"):
            with pytest.raises(UsageError, match=f"the name '{name}'"):
                llm.chat(USER, GREEDY, chat_template_kwargs={name: 1})


def test_a_chat_needs_a_tokenizer() -> None:
    with labinfer.load(LLAMA) as llm, pytest.raises(UsageError) as caught:
        llm.chat(USER, GREEDY)
    assert caught.value.code == "run.no-tokenizer"
