"""LiteLLM's calls of an OpenAI-compatible server; prints a JSON report. usage: python litellm_client.py URL MODEL"""

import json
import sys

import litellm

URL, MODEL = sys.argv[1:]
OPENAI = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0, "num_retries": 0}
ASKED = {**OPENAI, "messages": [{"role": "user", "content": "What is 2 times 3?"}], "max_tokens": 64}
TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {"name": "number", "schema": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}},
          "required": ["n"], "additionalProperties": False}, "strict": True}  # fmt: skip


def whole() -> object:
    answer = litellm.completion(**ASKED)
    return answer.choices[0].message.content and answer.usage.total_tokens > 0


def streamed() -> object:
    chunks = list(litellm.completion(**ASKED, stream=True, stream_options={"include_usage": True}))
    return litellm.stream_chunk_builder(chunks, messages=ASKED["messages"]).choices[0].message.content


def tool() -> object:
    answer = litellm.completion(**ASKED, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    return call.function.name == "multiply" and set(json.loads(call.function.arguments)) == {"a", "b"}


def schema() -> object:
    answer = litellm.completion(**ASKED, response_format={"type": "json_schema", "json_schema": SCHEMA})
    return isinstance(json.loads(answer.choices[0].message.content)["n"], int)


def embedding() -> object:
    answer = litellm.embedding(
        model=OPENAI["model"], api_base=OPENAI["api_base"], api_key="none", input=["hello", "world"]
    )
    return len(answer.data) == 2


def completion() -> object:
    return litellm.text_completion(
        **{**OPENAI, "model": f"text-completion-openai/{MODEL}"}, prompt="Once", max_tokens=8
    )


def unknown_model() -> object:
    try:
        litellm.completion(**{**ASKED, "model": "openai/no-such-model"})
    except litellm.NotFoundError:
        return True
    return False


def too_long() -> object:
    try:
        litellm.completion(**{**ASKED, "messages": [{"role": "user", "content": "word " * 200_000}]})
    except litellm.ContextWindowExceededError:
        return True
    return False


def run(case: object) -> str:
    try:
        return "ok" if case() else "not true"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


CASES = (whole, streamed, tool, schema, embedding, completion, unknown_model, too_long)
print(json.dumps({case.__name__: run(case) for case in CASES}))
