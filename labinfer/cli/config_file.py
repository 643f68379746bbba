"""``--config FILE``: the options of a command from a YAML file, for those that neither flag nor environment gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from labinfer.errors import ErrorSink, InvalidFile, did_you_mean

if TYPE_CHECKING:
    from labinfer.compiler.source import Node

Function = TypeVar("Function", bound=Callable[..., Any])

PLACES = "labinfer.config-places"
"""Key of ``context.meta``: where in the file each parameter stands, by its name."""


def config_option(function: Function) -> Function:
    """Give a command ``--config``."""
    return click.option(
        "--config", metavar="FILE", is_eager=True, expose_value=False, callback=_read, help="YAML file of options."
    )(function)


def key_of(parameter: click.Parameter) -> str:
    """What a file calls ``parameter``: its option without the dashes, or an argument's name."""
    return parameter.opts[0].lstrip("-")


def _read(context: click.Context, _: click.Parameter, file: str | None) -> None:
    """Make the file's values the defaults of the command; all that is wrong with it is told at once."""
    if file is None:
        return
    from labinfer.compiler.source import load_yaml

    node, sink = load_yaml(file), ErrorSink()
    if not isinstance(node.value, dict):
        raise InvalidFile("options.file", "the file should have a line such as port: 9000", place=node.place)
    known = {key_of(each): each for each in context.command.params if each.expose_value and each.name != "as_json"}
    values: dict[str, Any] = {}
    places = context.meta.setdefault(PLACES, {})
    for key, value in node.value.items():
        if key not in known:
            place, remedy = node.key_places[key], did_you_mean(key, known)
            sink.add(InvalidFile("options.unknown-key", f"there is no option '{key}'", place=place, remedy=remedy))
            continue
        parameter = known[key]
        assert parameter.name is not None
        places[parameter.name] = value.place
        try:
            values[parameter.name] = given = _texts(parameter, value)
            parameter.type_cast_value(context, given)
        except click.BadParameter as error:
            sink.add(InvalidFile("options.value", f"{key}: {error.message}", place=value.place))
    sink.check()
    context.default_map = values


def _texts(parameter: click.Parameter, node: Node) -> str | list[str]:
    """A value as the command line would have it: a text, or a list of texts where it may be given several times."""
    repeatable = parameter.multiple or parameter.nargs == -1
    if repeatable and isinstance(node.value, list):
        return [_text(each) for each in node.value]
    return [_text(node)] if repeatable else _text(node)


def _text(node: Node) -> str:
    if isinstance(node.value, bool) or not isinstance(node.value, str | int | float):
        raise click.BadParameter("the value should be a text or a number")
    return str(node.value)
