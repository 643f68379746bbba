"""What goes wrong, as a client sees it: error bodies and statuses of OpenAI, and of Anthropic on its path."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from labinfer.errors import DoesNotFit, LabinferError, UsageError
from labinfer.runtime.pipeline.process import StageDied

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    421: "invalid_request_error", 503: "overloaded_error",
}  # fmt: skip
"""The ``type`` of an error by its status; any other is a ``server_error``."""

ANTHROPIC_PATH = "/v1/messages"

CONTEXT_CODE = "context_length_exceeded"
MAX_PROBLEMS = 10


class ApiError(Exception):
    """An answer that is an error: its HTTP status, message, and the field and code that clients look at.

    ``retry_after`` are the seconds after which to try again. Official clients try every 5xx again, unless told not to:
    ``final`` says that it would fail again. ``extra`` are further fields of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        final: bool = False,
        **extra: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.final, self.extra = retry_after, final, extra

    @property
    def kind(self) -> str:
        """OpenAI's ``type``."""
        return KINDS.get(self.status, "server_error")

    def body(self, path: str = "") -> dict[str, Any]:
        """The body that clients of ``path`` read; the two forms are alike, and Anthropic's says that it is an error."""
        found = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code} | self.extra
        if not path.startswith(ANTHROPIC_PATH):
            return {"error": found}
        return {"type": "error", "error": found | ({"type": "api_error"} if self.kind == "server_error" else {})}

    def headers(self) -> dict[str, str]:
        """The headers that tell a client whether and when to try again."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return found | ({"x-should-retry": "false"} if self.final else {})


def of_engine(error: LabinferError) -> ApiError:
    """An error of the engine. What is wrong with a request is told as it is, anything else without details."""
    if isinstance(error, UsageError):
        code = CONTEXT_CODE if error.code == "run.too-long" else error.code
        return ApiError(400, error.message, code=code)
    if error.code in ("sampling.no-token", "sampling.grammar-failed"):
        return ApiError(400, error.message, code=error.code)
    if isinstance(error, StageDied | DoesNotFit):  # what is left of hosts or processes cannot run the model
        return ApiError(503, "a part of the model's pipeline is lost", code=error.code, retry_after=5)
    if error.code == "run.aborted":
        return ApiError(503, "the server stopped the request", code="aborted", retry_after=5)
    if error.code in ("run.not-a-number", "run.cache-full"):
        return ApiError(500, error.message, code=error.code, final=True)
    return ApiError(500, "the server failed; its log has the details", code=error.code, final=True)


def of_schema(error: ValidationError) -> ApiError:
    """What is wrong with a body, field by field."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{place(each['loc'])}: {each['msg']}" for each in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        told.append(f"and {len(problems) - MAX_PROBLEMS} more")
    return ApiError(400, "; ".join(told), param=place(problems[0]["loc"]), code="invalid_value")


def place(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "role")`` as ``messages[0].role``; the names of a union's members are left out."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):
            text += f".{part}" if text else part
    return text[:200] or "body"
