"""What schemathesis asks for is kept short, answers of a few tokens, so that thousands of requests end in minutes."""

from typing import Any

import schemathesis

FIELDS = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 16, "n": 2, "best_of": 2}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Bound what a body asks for; what is no number stays as wrong as it is."""
    if not isinstance(case.body, dict):
        return
    path = case.operation.path
    if path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
        default = "max_tokens"
    elif path == "/v1/responses":
        default = "max_output_tokens"
    else:
        return
    if case.body.get(default) is None:
        case.body[default] = FIELDS[default]
    for name, most in FIELDS.items():
        value = case.body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            case.body[name] = most
