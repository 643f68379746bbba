"""``labinfer run``: load a model and answer a prompt, or chat."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from labinfer.cli.options import (
    COUNT,
    check_cluster_options,
    cluster_options,
    given,
    json_option,
    load_over_cluster,
    lora_request,
    plan_options,
    transport_option,
)
from labinfer.cli.output import current
from labinfer.cli.sampling_options import sampling_options, take_params
from labinfer.errors import UsageError

if TYPE_CHECKING:
    from labinfer.llm import LLM
    from labinfer.runtime.lora import LoRARequest
    from labinfer.runtime.model import Model
    from labinfer.runtime.outputs import RequestOutput
    from labinfer.runtime.sampling import SamplingParams

MAX_STDIN = 16 << 20
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Answering:
    """How prompts are answered: sampling, system message, whether the chat template is left out, and the adapter."""

    params: SamplingParams
    system: str | None
    raw: bool
    lora: LoRARequest | None

    def uses_template(self, model: Model) -> bool:
        """Whether prompts go through the model's chat template."""
        has_template = model.tokenizer is not None and model.tokenizer.chat_template is not None
        if self.system is not None and (self.raw or not has_template):
            raise UsageError("chat.no-template", "--system needs a chat template" + (", not --raw" if self.raw else ""))
        return has_template and not self.raw

    def encode(self, model: Model, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of a conversation; without a template, of its last message."""
        if model.tokenizer is None:
            remedy = "give --token-ids instead of text"
            raise UsageError("run.no-tokenizer", "this model has no tokenizer", remedy=remedy)
        if not self.uses_template(model):
            return model.tokenizer.encode(messages[-1]["content"])
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return model.tokenizer.encode_chat([*system, *messages])


@click.command()
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@click.option("--prompt", "prompt_option", metavar="TEXT", help="The prompt, instead of the argument.")
@click.option("--token-ids", metavar="LIST", help="The prompt as token ids: 1,2,3.")
@click.option("--system", metavar="TEXT", help="The system message of the chat template.")
@click.option("--raw", is_flag=True, help="Complete the text as it stands, without the chat template.")
@sampling_options
@click.option(
    "--tap",
    "taps",
    multiple=True,
    metavar="NAME=FILE.npy",
    help="Write a value of the plan, such as layers.3.attn.out, for every token (repeatable).",
)
@click.option("--lora", metavar="NAME=PATH", help="Answer with a LoRA adapter: a folder as PEFT saves it.")
@plan_options
@click.option(
    "--speculative-tokens",
    type=COUNT,
    metavar="N",
    help="Guess N tokens a step, from what the text repeats or by --draft.",
)
@click.option(
    "--draft", metavar="MODEL", help="A smaller model of the same vocabulary, which guesses (default: 4 tokens a step)."
)
@transport_option
@cluster_options
@click.option("--stats", is_flag=True, help="Show times, speed and memory on stderr.")
@json_option
def run(
    model: str | None,
    prompt: str | None,
    prompt_option: str | None,
    token_ids: str | None,
    system: str | None,
    raw: bool,
    taps: tuple[str, ...],
    lora: str | None,
    weights: str | None,
    speculative_tokens: int | None,
    draft: str | None,
    transport: str | None,
    stats: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer a prompt, or chat.

    MODEL is a plan.json or whatever `labinfer compile` takes; without it, the embedded SmolLM2-135M-Instruct, which is
    pulled when it is missing. A single argument that names no model is the prompt. Without a prompt it is read from
    stdin, or a chat begins when stdin is a terminal.

    \b
    labinfer run "What is the capital of France?"
    labinfer run model.gguf --system "Answer in French." < question.txt
    labinfer run plan.json --temperature 0.8 --seed 1 --stats
    """  # fmt: skip
    model, text = _model_and_prompt(model, prompt, prompt_option, token_ids)
    ids = _token_ids(token_ids) if token_ids is not None else None
    files = _tap_files(taps)
    answering = Answering(take_params(options), system, raw, None if lora is None else lora_request(lora))
    chatting = text is None and ids is None and sys.stdin.isatty() and sys.stdout.isatty()
    if chatting and (as_json or files):
        raise UsageError("cli.usage", "--json and --tap need a prompt")
    if text is None and ids is None and not chatting:
        text = _read_stdin()
    started = time.perf_counter()
    guessing = given({"num_speculative_tokens": speculative_tokens, "model": draft})
    with _load(model, weights, given(options), answering.lora, guessing, transport) as llm:
        load_seconds = time.perf_counter() - started
        if chatting:
            from labinfer.cli.chat import chat

            chat(llm, answering)
            return
        if ids is None:
            ids = answering.encode(llm, [{"role": "user", "content": text or ""}])
        answer = _answer(llm, answering, ids, files, stream=not as_json)
        _finish(llm, answer, load_seconds, stats, as_json)


def _model_and_prompt(
    model: str | None, prompt: str | None, prompt_option: str | None, token_ids: str | None
) -> tuple[str | None, str | None]:
    """What the arguments mean: a single one is a model if it names one, else the prompt."""
    from labinfer.api import names_model

    if sum(each is not None for each in (prompt, prompt_option, token_ids)) > 1:
        raise UsageError("cli.usage", "give one prompt: as the argument, --prompt or --token-ids")
    if model is not None and prompt is None and prompt_option is None and token_ids is None and not names_model(model):
        return None, model
    return model, prompt if prompt is not None else prompt_option


def _token_ids(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError("cli.token-ids", f"'{text[:60]}' is no list of token ids such as 1,2,3")
    return [int(part) for part in parts]


def _tap_files(taps: tuple[str, ...]) -> dict[str, str]:
    files = {}
    for tap in taps:
        name, _, file = tap.partition("=")
        if not name or not file:
            raise UsageError("cli.tap", f"'{tap}' should be NAME=FILE.npy, such as layers.3.attn.out=out.npy")
        files[name] = file
    return files


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(data) > MAX_STDIN:
        raise UsageError("run.prompt", "the prompt on stdin is longer than 16 MiB")
    try:
        text = data.decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise UsageError("run.prompt", "the prompt on stdin is not UTF-8 text") from None
    if not text:
        raise UsageError("run.prompt", "there is no prompt", remedy='labinfer run "What is the capital of France?"')
    return text


def _load(
    model: str | None,
    weights: str | None,
    options: dict[str, Any],
    lora: LoRARequest | None,
    guessing: dict[str, Any],
    transport: str | None,
) -> LLM:
    """Load a model for one sequence, its adapter and its guesses, unless a plan or an option says more."""
    from labinfer.api import ONE_SEQUENCE, find_plan, is_plan
    from labinfer.llm import LLM
    from labinfer.runtime.lora import adapter_rank
    from labinfer.runtime.speculation import SpeculativeConfig

    config = SpeculativeConfig(**guessing) if guessing else None
    refused = {"speculation": config, "--lora": lora, "--transport": transport, "--rebalance": options.get("rebalance")}
    check_cluster_options(options, refused)
    running: dict[str, Any] = {"transport": transport, "speculative_config": config}
    running["rebalance"] = options.pop("rebalance", False)
    with current().progress() as progress:
        if "cluster" in options:
            return load_over_cluster(model, weights, progress, {**ONE_SEQUENCE, **options})
        if model is not None and is_plan(model):
            return LLM(model, weights=weights, progress=progress, **running, **options)  # errors name the file
        room = {"max_loras": 1, "max_lora_rank": adapter_rank(lora.path)} if lora else {}
        defaults = {**ONE_SEQUENCE, **room}
        if config is not None:
            defaults["max_logits_rows"] += config.num_speculative_tokens
        plan = find_plan(model, weights=weights, progress=progress, defaults=defaults, **options)
        return LLM(plan, weights=weights, progress=progress, **running)


def show(index: int, text: str) -> None:
    """Write a piece of an answer to stdout; what would steer a terminal is left out there."""
    click.echo(_CONTROL.sub("", text) if sys.stdout.isatty() else text, nl=False)


def _answer(llm: Model, answering: Answering, ids: list[int], files: dict[str, str], stream: bool) -> RequestOutput:
    """Answer a prompt, and write the values that are wanted to their files meanwhile."""
    from labinfer.runtime.taps import tapped

    with tapped(llm, files):
        return llm.generate(ids, answering.params, show if stream else None, answering.lora)[0]


def _finish(llm: Model, answer: RequestOutput, load_seconds: float, stats: bool, as_json: bool) -> None:
    """End the output of one answer."""
    figures = measured(answer, load_seconds) | guessed(llm)
    if as_json:
        found = {
            "model": llm.plan.source.name,
            "text": answer.text if llm.tokenizer else None,
            "token_ids": answer.token_ids,
            "prompt_token_ids": answer.prompt_token_ids,
            "finish_reason": answer.finish_reason,
            "stats": figures,
        }
        current().json(found)
        return
    click.echo("" if llm.tokenizer else ",".join(map(str, answer.token_ids)))
    if stats:
        click.echo(stats_text(figures), err=True)


def measured(answer: RequestOutput, load_seconds: float | None = None) -> dict[str, float | int | None]:
    """Times, speed and memory of an answer."""
    from labinfer.bench.memory import peak_rss

    first, total = answer.metrics.first_token_seconds or 0.0, answer.metrics.seconds or 0.0
    decoded, decoding = len(answer.token_ids) - 1, total - first
    rounded: Callable[[float], float] = lambda value: round(value, 4)  # noqa: E731
    return {
        "load_seconds": None if load_seconds is None else rounded(load_seconds),
        "prompt_tokens": len(answer.prompt_token_ids),
        "new_tokens": len(answer.token_ids),
        "first_token_seconds": rounded(first),
        "prompt_tokens_per_second": rounded(len(answer.prompt_token_ids) / first),
        "new_tokens_per_second": rounded(decoded / decoding) if decoded > 0 and decoding > 0 else None,
        "peak_rss_bytes": peak_rss(),
    }


def guessed(llm: Model) -> dict[str, float | int | None]:
    """What speculation did, if there is any."""
    if llm.engine.speculation is None:
        return {}
    counted = llm.engine.speculation.counted
    return {
        "proposed_tokens": counted.proposed,
        "accepted_tokens": counted.accepted,
        "mean_accepted_length": round(counted.mean_accepted_length, 4),
    }


def stats_text(figures: dict[str, Any]) -> str:
    """The figures in a line or two."""
    from labinfer.units import human_bytes

    speed = figures["new_tokens_per_second"]
    parts = [
        f"loaded in {figures['load_seconds']:.2f} s" if figures["load_seconds"] is not None else "",
        f"prompt {figures['prompt_tokens']} tokens, {figures['prompt_tokens_per_second']:.1f} tokens/s",
        f"first token after {figures['first_token_seconds']:.2f} s",
        f"answer {figures['new_tokens']} tokens" + (f", {speed:.1f} tokens/s" if speed else ""),
        f"guessed {figures['proposed_tokens']} tokens, {figures['accepted_tokens']} right"
        if "proposed_tokens" in figures
        else "",
        f"peak memory {human_bytes(figures['peak_rss_bytes'])}",
    ]
    return "; ".join(part for part in parts if part)
