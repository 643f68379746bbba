"""/v1/embeddings: texts as vectors, pooled from what the head of the model reads."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

import numpy as np

from labinfer.compiler.fold import unfold_ops
from labinfer.compiler.plan import Stage
from labinfer.runtime.request import Request
from labinfer.runtime.sampling import SamplingParams
from labinfer.service.call import Call
from labinfer.service.errors import ApiError
from labinfer.service.generation import Generation
from labinfer.service.prompts import list_prompts, text_tokens
from labinfer.service.schema.embeddings import EmbeddingRequest


async def embeddings(call: Call, body: EmbeddingRequest) -> Any:
    """Answer a request."""
    value = last_hidden_state(call.service.model.plan.stages)
    generation = await asyncio.to_thread(prepare, call, body, value)
    vectors: dict[int, np.ndarray] = {}
    async with aclosing(generation.pieces()) as found:
        async for pieces in found:
            for piece in pieces:
                vectors[piece.index] = pooled(piece.captured[value], body.pooling or "last")
    width = len(vectors[0])
    if body.dimensions not in (None, width):
        raise ApiError(400, f"dimensions: this model's embeddings have {width}", param="dimensions")
    data = [
        {"object": "embedding", "index": index, "embedding": written(vector, body.encoding_format)}
        for index, vector in sorted(vectors.items())
    ]
    usage = {"prompt_tokens": generation.usage.prompt, "total_tokens": generation.usage.prompt}
    answer = {"object": "list", "data": data, "model": body.model or call.service.name, "usage": usage}
    return answer | ({"warnings": call.warnings} if call.warnings else {})


def prepare(call: Call, body: EmbeddingRequest, value: str) -> Generation:
    """Requests that compute each text once and keep the rows of ``value``; the token that is made is dropped."""
    service, params = call.service, SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    salt = f"{call.salt}{body.cache_salt or ''}"
    lora = service.adapters.get(body.model or "")
    requests = [
        Request(
            text_tokens(service, prompt, body.add_special_tokens), params, body.priority or 0, salt, [value], lora=lora
        )
        for prompt in list_prompts(body.input, service.options.max_prompts, "input")
    ]
    return Generation(call, requests, streamed=False)


def last_hidden_state(stages: Iterable[Stage]) -> str:
    """The value, a row for each token, from which the rows for the head are taken."""
    for stage in stages:
        for op, _ in unfold_ops(stage):
            for part in op.primitives():
                if part.kind == "select_rows":
                    return part.inputs[0]
    message = "this model gives no embeddings: its map selects no rows of a last hidden state"
    raise ApiError(400, message, code="no_embeddings")


def pooled(rows: np.ndarray, pooling: str) -> np.ndarray:
    """One vector of length 1, float32 [features], of float32 ``rows`` [tokens, features]."""
    vector = rows[-1].astype(np.float64) if pooling == "last" else rows.mean(0, dtype=np.float64)
    unit: np.ndarray = (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)
    return unit


def written(vector: np.ndarray, encoding_format: str | None) -> list[float] | str:
    """A vector as numbers, or as the base64 of its little-endian float32."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    found: list[float] = vector.tolist()
    return found
