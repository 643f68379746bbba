"""``labinfer config``: the options of ``labinfer serve``, and where each comes from."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from labinfer.cli.config_file import PLACES, key_of
from labinfer.cli.options import json_option
from labinfer.cli.output import current

SECRET = ("api_key",)
"""Options whose value is never shown."""


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("action", type=click.Choice(["show"]))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTION]...")
@click.option("--origin", is_flag=True, help="Tell where each value comes from, and its environment variable.")
@json_option
def config(action: str, arguments: tuple[str, ...], origin: bool, as_json: bool) -> None:
    """Show the options that `labinfer serve` would have.

    A flag goes before an environment variable, that before the file of `--config`, and that before the default.

    \b
    labinfer config show --origin --config serve.yaml --port 9000
    """
    from labinfer.cli.serve import serve

    with serve.make_context("serve", list(arguments), parent=None) as context:
        found = [
            _described(context, each) for each in serve.params if each.name in context.params and each.name != "as_json"
        ]
    if as_json:
        current().json({each.pop("option"): each for each in found})
        return
    columns = ["option", "value", *(["origin", "environment"] if origin else [])]
    current().table(columns, [[_shown(each[column]) for column in columns] for each in found])


def _described(context: click.Context, parameter: click.Parameter) -> dict[str, Any]:
    """The value of a parameter and where it comes from."""
    assert parameter.name is not None
    value = context.params[parameter.name]
    source = context.get_parameter_source(parameter.name)
    variable = parameter.envvar or f"{context.auto_envvar_prefix}_{parameter.name.upper()}"
    origins = {
        ParameterSource.COMMANDLINE: "command line",
        ParameterSource.ENVIRONMENT: f"environment: {variable}",
        ParameterSource.DEFAULT_MAP: f"file: {context.meta.get(PLACES, {}).get(parameter.name)}",
    }
    if parameter.name in SECRET and value is not None:
        value = "***"
    origin = "default" if source is None else origins.get(source, "default")
    return {"option": key_of(parameter), "value": value, "origin": origin, "environment": variable}


def _shown(value: Any) -> str:
    """A value in the table."""
    return " ".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
