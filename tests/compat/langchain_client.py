"""langchain-openai: an answer, a stream, a typed answer."""

import os
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: Literal["Rome", "Oslo"]


model = ChatOpenAI(model=os.environ["MODEL"], temperature=0, max_tokens=100)
answer = model.invoke("Name a city.").content
assert "".join(chunk.content for chunk in model.stream("Name a city.")) == answer
assert model.with_structured_output(City, method="json_schema").invoke("Name a city.").name in ("Rome", "Oslo")
assert model.with_structured_output(City, method="function_calling").invoke("Name a city.").name in ("Rome", "Oslo")
