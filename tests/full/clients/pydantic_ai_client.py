"""pydantic-ai's three ways to an object, over chat completions and responses; prints a JSON report.

usage: python pydantic_ai_client.py URL MODEL
"""

import asyncio
import json
import sys
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, MODEL = sys.argv[1:]
QUESTION = 'A ticket: the printer on floor 3 is on fire. Answer like {"urgency": "low", "floor": 1}.'


class Ticket(BaseModel):
    """A support ticket."""

    urgency: Literal["low", "high"]
    floor: int = Field(ge=0, le=99)


async def run(agent: Agent, question: str = QUESTION) -> str:
    try:
        result = await agent.run(question)
        streamed = None
        async with agent.run_stream(question) as stream:
            streamed = await stream.get_output()
        return "ok" if isinstance(result.output, type(streamed)) else f"{result.output!r} {streamed!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


async def main() -> None:
    provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
    settings = {"max_tokens": 200, "temperature": 0.0, "seed": 1, "frequency_penalty": 0.5}
    report = {}
    for api, model_class in (("chat", OpenAIChatModel), ("responses", OpenAIResponsesModel)):
        model = model_class(MODEL, provider=provider, settings=settings)
        report[f"{api} text"] = await run(Agent(model))
        report[f"{api} tool"] = await run(Agent(model, output_type=ToolOutput(Ticket)))
        report[f"{api} native"] = await run(Agent(model, output_type=NativeOutput(Ticket)))
        if api == "chat":  # responses have no frequency penalty, without which the model does not end such an object
            report[f"{api} prompted"] = await run(Agent(model, output_type=PromptedOutput(Ticket)))
    print(json.dumps(report))


asyncio.run(main())
