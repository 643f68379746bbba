"""Options that say how an answer is sampled and what ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from labinfer.cli.options import COUNT
from labinfer.errors import UsageError

if TYPE_CHECKING:
    from labinfer.runtime.sampling import SamplingParams

Function = TypeVar("Function", bound=Callable[..., Any])

MAX_SCHEMA_BYTES = 1 << 20

_OPTIONS: dict[str, tuple[Any, str, str]] = {
    "temperature": (
        float, "X",
        "0 takes the likeliest token each time (the default: an answer can be repeated); chats often use 0.8.",
    ),
    "top_k": (int, "N", "Choose among the N likeliest tokens (0: all)."),
    "top_p": (float, "X", "Choose among the likeliest that make up X."),
    "min_p": (float, "X", "Choose among those with X of the likeliest one's probability."),
    "repetition_penalty": (float, "X", "Make tokens of prompt and answer less likely (1: off)."),
    "presence_penalty": (float, "X", "Make tokens of the answer less likely (0: off)."),
    "frequency_penalty": (float, "X", "The same, each time they are there."),
    "seed": (int, "N", "Make a sampled answer repeatable."),
    "max_new_tokens": (COUNT, "N", "Tokens of the answer (default: as many as fit)."),
}  # fmt: skip


def sampling_options(function: Function) -> Function:
    """Give a command the options that ``take_params`` takes."""
    more = [
        click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT (repeatable)."),
        click.option("--json-schema", metavar="FILE", help="Answer in JSON of this schema (needs llguidance)."),
        click.option("--regex", metavar="PATTERN", help="Answer what the expression matches (needs llguidance)."),
        click.option("--ignore-eos", is_flag=True, help="Go on past the end of the text."),
    ]
    for option in reversed(more):
        function = option(function)
    for name, (kind, metavar, text) in reversed(_OPTIONS.items()):
        function = click.option(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)(function)
    return function


def take_params(options: dict[str, Any]) -> SamplingParams:
    """The sampling parameters that ``options`` give, which are taken out of them."""
    from labinfer.runtime.sampling import SamplingParams, StructuredOutputs

    numbers: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": None}
    numbers |= {name: value for name in _OPTIONS if (value := options.pop(name)) is not None}
    form = {"json": options.pop("json_schema"), "regex": options.pop("regex")}
    if form["json"] is not None:
        form["json"] = read_schema(form["json"])
    structure = StructuredOutputs(**form) if any(each is not None for each in form.values()) else None
    return SamplingParams(
        max_tokens=numbers.pop("max_new_tokens"),
        **numbers,
        structured_outputs=structure,
        stop=options.pop("stop"),
        ignore_eos=options.pop("ignore_eos"),
    )


def read_schema(file: str) -> str:
    """The text of a file with a JSON schema."""
    try:
        with open(file, "rb") as stream:
            data = stream.read(MAX_SCHEMA_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise UsageError("cli.json-schema", f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError("cli.json-schema", f"{file} is not UTF-8 text") from None
    if len(data) > MAX_SCHEMA_BYTES:
        raise UsageError("cli.json-schema", f"{file} is larger than 1 MiB")
    return text
