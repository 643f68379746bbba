"""instructor: typed answers by tools, by JSON and by a schema."""

import os
from typing import Literal

import instructor
import openai
from pydantic import BaseModel


class City(BaseModel):
    name: Literal["Rome", "Oslo"]


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(), mode=mode)
    found = client.chat.completions.create(
        model=os.environ["MODEL"], response_model=City, max_retries=0, temperature=0, max_tokens=200,
        messages=[{"role": "user", "content": "Name a city."}],
    )  # fmt: skip
    assert found.name in ("Rome", "Oslo")
