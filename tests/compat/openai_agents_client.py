"""openai-agents: an agent by chats and by responses, with a type, streamed and not; a text by chats alone,
since a response that is cut for its length counts as failed."""

import asyncio
import os
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel


class City(BaseModel):
    name: Literal["Rome", "Oslo"]


async def main() -> None:
    """Run agents of each kind."""
    client, settings = AsyncOpenAI(), ModelSettings(temperature=0, max_tokens=60)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model=os.environ["MODEL"], openai_client=client)
        typed = Agent(name="B", model=model, model_settings=settings, output_type=City)
        streamed = Runner.run_streamed(typed, "Name a city.")
        assert [event async for event in streamed.stream_events()]
        assert streamed.final_output.name in ("Rome", "Oslo")
        assert (await Runner.run(typed, "Name a city.")).final_output.name in ("Rome", "Oslo")
    model = OpenAIChatCompletionsModel(model=os.environ["MODEL"], openai_client=client)
    plain = Agent(name="A", instructions="Be brief.", model=model, model_settings=settings)
    assert (await Runner.run(plain, "Name a city.")).final_output


set_tracing_disabled(True)
asyncio.run(main())
