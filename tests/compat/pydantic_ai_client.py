"""pydantic-ai: a typed answer, which it asks for as a tool that must be called."""

import os
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    name: Literal["Rome", "Oslo"]


provider = OpenAIProvider(base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
agent = Agent(
    OpenAIChatModel(os.environ["MODEL"], provider=provider), output_type=City, model_settings={"temperature": 0}
)
assert agent.run_sync("Name a city.").output.name in ("Rome", "Oslo")
