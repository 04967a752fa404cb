"""instructor's modes; prints a JSON report. usage: python instructor_client.py URL MODEL"""

import json
import sys
from collections.abc import Iterable
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

URL, MODEL = sys.argv[1:]
QUESTION = [
    {"role": "user", "content": "What is the weather in Paris?"},
    {"role": "assistant", "content": '{"city": "Paris", "degrees": 7}'},
    {"role": "user", "content": "What is the weather in Rome?"},
    {"role": "assistant", "content": '{"city": "Rome", "degrees": 21}'},
    {"role": "user", "content": "And tomorrow?"},
]
SETTINGS = {"model": MODEL, "max_tokens": 200, "temperature": 0, "seed": 1, "max_retries": 0, "frequency_penalty": 0.5}


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int = Field(ge=-50, le=60)


class Capital(BaseModel):
    """A country with its capital."""

    country: Literal["Italy", "France"]


def run(mode: str, response_model: object) -> str:
    client = instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key="none"), mode=getattr(instructor.Mode, mode))
    # It asks with "auto"; a small model does not call a tool by choice.
    more = {"extra_body": {"tool_choice": "required", "parallel_tool_calls": True}} if mode == "PARALLEL_TOOLS" else {}
    try:
        answer = client.chat.completions.create(response_model=response_model, messages=QUESTION, **SETTINGS, **more)
        if mode == "PARALLEL_TOOLS":
            answers = list(answer)
            return "ok" if answers and all(isinstance(each, (Weather, Capital)) for each in answers) else repr(answers)
        return "ok" if isinstance(answer, Weather) else repr(answer)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


report = {mode: run(mode, Weather) for mode in ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA")}
report["PARALLEL_TOOLS"] = run("PARALLEL_TOOLS", Iterable[Weather | Capital])
print(json.dumps(report))
