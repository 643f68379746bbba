"""/tokenize and /detokenize: what the model reads."""

from __future__ import annotations

import asyncio
from typing import Any

from labinfer.service.call import Call
from labinfer.service.errors import ApiError
from labinfer.service.prompts import chat_tokens
from labinfer.service.schema.chat import ChatRequest
from labinfer.service.schema.tokens import DetokenizeRequest, TokenizeRequest
from labinfer.service.tools.choice import tool_use


async def tokenize(call: Call, body: TokenizeRequest) -> Any:
    """Token ids of a text or a conversation."""
    return await asyncio.to_thread(tokenized, call, body)


def tokenized(call: Call, body: TokenizeRequest) -> dict[str, Any]:
    """The answer of ``tokenize``."""
    service = call.service
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.prompt is not None:
        tokens = service.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        chat = ChatRequest.model_construct(
            messages=body.messages, tools=body.tools, add_generation_prompt=body.add_generation_prompt,
            chat_template_kwargs=body.chat_template_kwargs,
        )  # fmt: skip
        tokens = chat_tokens(service, chat, tool_use(chat, service.tokenizer.chat_template))
    texts = [service.tokenizer.decode([token], skip_special_tokens=False) for token in tokens]
    found = {"count": len(tokens), "max_model_len": service.model.max_len, "tokens": tokens}
    return found | ({"token_strs": texts} if body.return_token_strs else {})


async def detokenize(call: Call, body: DetokenizeRequest) -> Any:
    """The text of token ids."""
    tokens = call.service.model.check_tokens(body.tokens)
    return {"prompt": call.service.tokenizer.decode(tokens, skip_special_tokens=False)}
