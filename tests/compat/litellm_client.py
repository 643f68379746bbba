"""litellm as a library: an answer and a stream by its two names for servers like this one, a tool, embeddings."""

import os

import litellm

name, base = os.environ["MODEL"], os.environ["OPENAI_BASE_URL"]
messages = [{"role": "user", "content": "Name a city."}]
where = {"api_base": base, "api_key": os.environ["OPENAI_API_KEY"]}
ask = {"messages": messages, "max_tokens": 8, "temperature": 0, "num_retries": 0, **where}
for provider in ("openai", "hosted_vllm"):
    model = f"{provider}/{name}"
    text = litellm.completion(model=model, **ask).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(model=model, stream=True, **ask)]
    assert text
    assert "".join(pieces) == text
schema = {"type": "object", "properties": {"name": {"enum": ["Rome", "Oslo"]}}, "required": ["name"]}
tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
called = litellm.completion(model=model, tools=[tool], tool_choice="required", **ask | {"max_tokens": 200})
assert called.choices[0].message.tool_calls[0].function.name == "weather"
vectors = litellm.embedding(model=f"openai/{name}", input=["Rome", "Oslo"], **where)
assert len(vectors.data) == 2
