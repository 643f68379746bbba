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
        case.body.setdefault("max_tokens", 4)
    elif path == "/v1/responses":
        case.body.setdefault("max_output_tokens", 16)
    for name, most in FIELDS.items():
        value = case.body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            case.body[name] = most
