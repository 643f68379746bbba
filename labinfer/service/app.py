"""The table of paths, and the application made of it."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

from labinfer.service.call import Receive, Scope, Send
from labinfer.service.endpoint import Endpoint, Operation
from labinfer.service.errors import ApiError
from labinfer.service.guard import Guard
from labinfer.service.operations.chat import chat_completions
from labinfer.service.operations.completions import completions
from labinfer.service.operations.embeddings import embeddings
from labinfer.service.operations.health import health, ready
from labinfer.service.operations.inspection import devices, metrics, plan, startup, trace
from labinfer.service.operations.messages import count_tokens, messages
from labinfer.service.operations.models import model, models
from labinfer.service.operations.openapi import openapi
from labinfer.service.operations.page import page
from labinfer.service.operations.responses import responses
from labinfer.service.operations.tokens import detokenize, tokenize
from labinfer.service.schema.chat import ChatRequest
from labinfer.service.schema.completions import CompletionRequest
from labinfer.service.schema.embeddings import EmbeddingRequest
from labinfer.service.schema.messages import CountRequest, MessagesRequest
from labinfer.service.schema.responses import ResponsesRequest
from labinfer.service.schema.tokens import DetokenizeRequest, TokenizeRequest
from labinfer.service.services import Services

COMPUTES = "takes the engine's time and cache: bounded by the queue and the context; prompts of other keys stay apart"
TEXTS = "takes time beside the engine: bounded by the body's size, a template runs in a process with limits"
ANYONE = "tells anyone whether the engine goes on, and nothing else"

OPERATIONS = (
    Operation(
        "POST", "/v1/chat/completions", chat_completions, "Go on with a conversation", ChatRequest, threat=COMPUTES
    ),
    Operation("POST", "/v1/completions", completions, "Go on from a text", CompletionRequest, threat=COMPUTES),
    Operation("POST", "/v1/responses", responses, "The same in OpenAI's newer form", ResponsesRequest, threat=COMPUTES),
    Operation("POST", "/v1/embeddings", embeddings, "Texts as vectors", EmbeddingRequest, threat=COMPUTES),
    Operation("POST", "/v1/messages", messages, "The same in Anthropic's form", MessagesRequest, threat=COMPUTES),
    Operation(
        "POST", "/v1/messages/count_tokens", count_tokens, "Tokens of a conversation", CountRequest, threat=TEXTS
    ),
    Operation("GET", "/v1/models", models, "What is served"),
    Operation("GET", "/v1/models/{model:path}", model, "One model"),
    Operation("POST", "/tokenize", tokenize, "Token ids of a text or a conversation", TokenizeRequest, threat=TEXTS),
    Operation("POST", "/detokenize", detokenize, "The text of token ids", DetokenizeRequest, threat=TEXTS),
    Operation(
        "GET", "/", page, "A page to talk to the model and to see it work",
        threat="runs in a browser beside other sites: its policy lets its own script run only, it has no secret",
    ),
    Operation("GET", "/openapi.json", openapi, "This table for programs, with the bodies of requests"),
    Operation("GET", "/metrics", metrics, "Measurements for Prometheus", polled=True),
    Operation("GET", "/labinfer/v1/plan", plan, "The plan that is run", query=("model",)),
    Operation(
        "GET", "/labinfer/v1/devices", devices, "Where the model lies, and how full its cache is", polled=True,
        query=("model",),
    ),
    Operation(
        "GET", "/labinfer/v1/trace", trace, "The last steps, predicted and measured", polled=True,
        query=("model", "after", "format"),
    ),
    Operation("GET", "/labinfer/v1/startup", startup, "How long each phase of the start took", query=("model",)),
    Operation("GET", "/health", health, "Whether the process should go on", public=True, polled=True, threat=ANYONE),
    Operation("GET", "/ready", ready, "Whether new requests are welcome", public=True, polled=True, threat=ANYONE),
)  # fmt: skip


class Paths:
    """The endpoints by path and method; errors of the router in OpenAI's form."""

    operations = OPERATIONS

    def __init__(self, services: Services) -> None:
        routes = [Route(each.path, Endpoint(services, each), methods=[each.method]) for each in OPERATIONS]
        self.router = Router(routes, redirect_slashes=False, default=unknown)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        scope["app"] = self  # tells the router to raise what it refuses
        try:
            await self.router(scope, receive, send)
        except HTTPException as error:
            raise ApiError(error.status_code, f"{scope['method']} is not allowed for this path") from None


async def unknown(scope: Scope, receive: Receive, send: Send) -> None:
    """A path that does not exist."""
    raise ApiError(404, f"there is no {scope['path'][:200]} here", code="unknown_path")


def application(services: Services) -> Any:
    """The ASGI application of ``services``."""
    public, polled = ([each.path for each in OPERATIONS if getattr(each, flag)] for flag in ("public", "polled"))
    return Guard(Paths(services), services.options, public, polled)
