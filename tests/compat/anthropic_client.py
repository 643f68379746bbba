"""Anthropic's client: messages, a stream, counted tokens."""

import os

import anthropic

base = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
client, model = anthropic.Anthropic(base_url=base, api_key=os.environ["OPENAI_API_KEY"]), os.environ["MODEL"]
messages = [{"role": "user", "content": "Name a city."}]
answer = client.messages.create(model=model, max_tokens=8, messages=messages)
assert answer.content[0].text
with client.messages.stream(model=model, max_tokens=8, messages=messages) as stream:
    assert "".join(stream.text_stream) == stream.get_final_message().content[0].text
assert client.messages.count_tokens(model=model, messages=messages).input_tokens > 4
