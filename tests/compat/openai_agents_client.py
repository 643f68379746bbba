"""openai-agents: an agent by chats and by responses, with an answer, a stream and a type."""

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
    client = AsyncOpenAI()
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model=os.environ["MODEL"], openai_client=client)
        settings = ModelSettings(temperature=0, max_tokens=60)
        plain = Agent(name="A", instructions="Be brief.", model=model, model_settings=settings)
        assert (await Runner.run(plain, "Name a city.")).final_output
        typed = Agent(name="B", model=model, model_settings=settings, output_type=City)
        streamed = Runner.run_streamed(typed, "Name a city.")
        assert [event async for event in streamed.stream_events()]
        assert streamed.final_output.name in ("Rome", "Oslo")


set_tracing_disabled(True)
asyncio.run(main())
