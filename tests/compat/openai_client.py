"""The official client: models, chats, streams, parsed answers, tools, completions, responses, errors."""

import contextlib
import os
from typing import Literal

import openai
from pydantic import BaseModel


class City(BaseModel):
    name: Literal["Rome", "Oslo"]


client, model = openai.OpenAI(), os.environ["MODEL"]
messages = [{"role": "user", "content": "Name a city."}]
assert client.models.list().data[0].id == model
answer = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
assert answer.usage.completion_tokens <= 8
stream = client.chat.completions.create(
    model=model, messages=messages, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == answer.choices[0].message.content
assert chunks[-1].usage == answer.usage or chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
parsed = client.chat.completions.parse(model=model, messages=messages, response_format=City, temperature=0)
assert parsed.choices[0].message.parsed.name in ("Rome", "Oslo")
schema = {**City.model_json_schema(), "additionalProperties": False}
tool = {"type": "function", "function": {"name": "weather", "parameters": schema, "strict": True}}
called = client.chat.completions.create(
    model=model, messages=messages, tools=[tool], tool_choice="required", temperature=0, max_tokens=200
)
assert called.choices[0].message.tool_calls[0].function.name == "weather"
echoed = client.completions.create(model=model, prompt="Rome is", max_tokens=1, echo=True, logprobs=1)
assert echoed.choices[0].logprobs.token_logprobs[0] is None
assert client.responses.create(model=model, input="Hi", max_output_tokens=8).output_text
with client.responses.stream(model=model, input="Hi", max_output_tokens=8) as events:
    kinds = [event.type for event in events]
assert kinds[0] == "response.created"
assert kinds[-1] in ("response.completed", "response.incomplete")
assert "response.output_text.delta" in kinds
assert client.responses.parse(model=model, input="Name a city.", text_format=City).output_parsed
answer = client.with_options(max_retries=0).chat.completions.with_raw_response
with contextlib.suppress(openai.BadRequestError):
    raise AssertionError(answer.create(model=model, messages=messages, temperature=-1).text)
