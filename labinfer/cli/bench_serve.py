"""``labinfer bench serve``: how fast a running service answers."""

from __future__ import annotations

import json
from typing import Any

import click

from labinfer.cli.options import COUNT, json_option
from labinfer.cli.output import current
from labinfer.errors import UsageError
from labinfer.files import atomic_write

ENDPOINT = "/v1/completions"


class Rate(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """Requests a second: a number above 0, or inf."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The rate; a bad one is a usage error that names the option."""
        try:
            rate = float(value)
        except ValueError:
            rate = 0.0
        if not rate > 0:
            self.fail(f"'{value}' is no number above 0, nor inf", param, ctx)
        return rate


@click.command("serve")
@click.option("--base-url", default="http://127.0.0.1:8000", show_default=True, metavar="URL", help="The service.")
@click.option("--api-key", envvar="OPENAI_API_KEY", metavar="KEY", help="Its key (default: the kept one).")
@click.option("--model", metavar="NAME", help="Model to ask for (default: whatever is served).")
@click.option("--num-prompts", type=COUNT, default=100, show_default=True, metavar="N", help="Requests.")
@click.option("--request-rate", type=Rate(), default="inf", show_default=True, metavar="X", help="Requests a second.")
@click.option("--max-concurrency", type=COUNT, metavar="N", help="Requests at a time (default: all).")
@click.option("--dataset-path", metavar="FILE", help='Lines of {"prompt": TEXT} instead of random prompts.')
@click.option("--random-input-len", type=COUNT, default=128, show_default=True, metavar="N", help="Tokens of a prompt.")
@click.option(
    "--random-output-len", type=COUNT, default=128, show_default=True, metavar="N", help="Tokens of an answer."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of prompts and arrivals.")
@click.option(
    "--goodput", multiple=True, metavar="NAME:MS", help="Bound that good requests keep: ttft:500 (repeatable)."
)
@click.option("--metric-percentiles", default="50,90,99", show_default=True, metavar="LIST", help="Percentiles.")
@click.option("--save-result", metavar="FILE", help="Write the figures as JSON.")
@click.option("--save-report", metavar="FILE", help="Write them with plots as an HTML page.")
@json_option
def bench_serve(
    base_url: str,
    api_key: str | None,
    model: str | None,
    num_prompts: int,
    request_rate: float,
    max_concurrency: int | None,
    dataset_path: str | None,
    random_input_len: int,
    random_output_len: int,
    seed: int,
    goodput: tuple[str, ...],
    metric_percentiles: str,
    save_result: str | None,
    save_report: str | None,
    as_json: bool,
) -> None:
    """Measure a running service under load.

    Flags have the names of `vllm bench serve`. Answers are streamed and made to their full length.

    \b
    labinfer bench serve --num-prompts 200 --max-concurrency 16
    labinfer bench serve --request-rate 4 --goodput ttft:500 --goodput tpot:50 --save-report load.html
    """  # fmt: skip
    import asyncio

    from labinfer.bench.load import bounds_of, load, summary, target
    from labinfer.bench.load_report import load_report
    from labinfer.bench.prompts import file_prompts, random_prompts
    from labinfer.service.keys import kept_key

    bounds, percents = bounds_of(goodput), _percentiles(metric_percentiles)
    if dataset_path is None:
        prompts: list[Any] = random_prompts(num_prompts, random_input_len, seed)
    else:
        prompts = file_prompts(dataset_path, num_prompts)
    common = {
        "max_tokens": random_output_len, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, **({"model": model} if model else {}),
    }  # fmt: skip
    to = target(base_url, ENDPOINT, api_key or kept_key()[0])
    bodies = [{"prompt": prompt, **common} for prompt in prompts]
    samples, seconds = asyncio.run(load(to, bodies, request_rate, max_concurrency, seed))
    found = summary(samples, seconds, percents, bounds)
    if save_result is not None:
        with atomic_write(save_result) as stream:
            stream.write(f"{json.dumps(found, indent=2)}\n".encode())
    if save_report is not None:
        with atomic_write(save_report) as stream:
            stream.write(load_report(found, samples).encode())
    _show(found, as_json)


def _show(found: dict[str, Any], as_json: bool) -> None:
    """Print the figures."""
    if as_json:
        current().json(found)
        return
    texts = {name: f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" for name, value in found.items()}
    current().table(["figure", "value"], [[name.replace("_", " "), text] for name, text in texts.items()], ["value"])


def _percentiles(text: str) -> list[float]:
    """Percentages with commas between them."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= each <= 100 for each in found):
        raise UsageError("cli.usage", f"--metric-percentiles: '{text}' is no list such as 50,90,99")
    return found
