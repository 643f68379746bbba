"""What the bodies of all requests have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from labinfer.service.errors import ApiError


class Body(BaseModel):
    """The body of a request. Numbers are numbers: texts and booleans are not taken for them.

    Fields of ``REFUSED`` would change the answer and are not supported, so that any value but ``IDLE`` ones is an
    error, with the text that the table gives. Fields of ``ACCEPTED`` change nothing here and are ignored, as is every
    field that is unknown; ``ignored`` tells which. ``model`` says which of the models that are served.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    REFUSED: ClassVar[dict[str, str]] = {}
    ACCEPTED: ClassVar[frozenset[str]] = frozenset()
    IDLE: ClassVar[tuple[Any, ...]] = (None, False, [], {}, "")

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse(cls, data: Any) -> Any:
        """Refuse what would be ignored silently otherwise."""
        if isinstance(data, dict):
            for name, why in cls.REFUSED.items():
                if name in data and data[name] not in cls.IDLE:
                    raise ApiError(400, f"'{name}' is not supported: {why}", param=name, code="unsupported_field")
        return data

    @property
    def ignored(self) -> list[str]:
        """What was ignored, and why."""
        given = {name: value for name, value in sorted((self.model_extra or {}).items()) if name not in self.REFUSED}
        unknown = [f"'{name[:64]}' is unknown and was ignored" for name in given.keys() - self.ACCEPTED]
        known = [name for name, value in given.items() if name in self.ACCEPTED and value not in self.IDLE]
        return sorted(unknown) + [f"'{name}' has no effect here" for name in known]


class Part(BaseModel):
    """A part of a body; what is unknown in it is ignored."""

    model_config = ConfigDict(strict=True, extra="allow")


class JsonSchemaFormat(Part):
    """The schema of ``response_format`` ``json_schema``."""

    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    """The form of an answer: OpenAI's three, and a regular expression or a grammar."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    regex: str | None = None
    grammar: str | None = None


class StreamOptions(Part):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
