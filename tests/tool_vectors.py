"""What models of each family write, and the answers that it means."""

from __future__ import annotations

from typing import NamedTuple

from tests.answer_parsing import ParsedAnswer

WEATHER = ("get_weather", {"city": "Paris"})
TIME = ("get_time", {"zone": "CET", "hours": [1, 2], "note": 'say "}" ]'})


class ToolVector(NamedTuple):
    """``text`` of the model in a format, and the answer that clients get."""

    format: str
    text: str
    expected: ParsedAnswer


def calls(*made: tuple[str, object], content: str = "", reasoning: str = "") -> ParsedAnswer:
    return ParsedAnswer(content, reasoning, made)


VECTORS: tuple[ToolVector, ...] = (
    ToolVector(
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        calls(WEATHER),
    ),
    ToolVector(
        "hermes",
        "I look it up.\n\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"zone": "CET", "hours": [1, 2], "note": "say \\"}\\" ]"}, "name": "get_time"}\n'
        "</tool_call>\n",
        calls(WEATHER, TIME, content="I look it up."),
    ),
    ToolVector(
        "hermes",
        '<tool_call>[{"name":"get_weather","arguments":{"city":"Paris"}},{"name":"now"}]</tool_call>',
        calls(WEATHER, ("now", {})),
    ),
    ToolVector(
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        calls(WEATHER),
    ),
    ToolVector("hermes", '<tool_call>{"name": "now", "arguments": {}}\n</tool_c', calls(("now", {}))),
    ToolVector("hermes", '<tool_call>{"name": "now", "arguments": {}} or', calls(("now", {}), content="or")),
    ToolVector("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', calls(("now", {}))),
    ToolVector("hermes", "The tag <tool_call> begins a call.", calls(content="The tag <tool_call> begins a call.")),
    ToolVector("hermes", "1 < 2 and <tool", calls(content="1 < 2 and <tool")),
    ToolVector("hermes", '<tool_call>\n{"colour": "red"}', calls(content='<tool_call>\n{"colour": "red"}')),
    ToolVector(
        "hermes_compact",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>',
        calls(WEATHER),
    ),
    ToolVector("llama3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', calls(WEATHER)),
    ToolVector(
        "llama3",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
        calls(WEATHER),
    ),
    ToolVector(
        "llama3",
        '{"type": "function", "function": {"name": "get_weather", "parameters": {"city": "Paris"}}}',
        calls(WEATHER),
    ),
    ToolVector(
        "llama3",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}',
        calls(WEATHER, ("now", {})),
    ),
    ToolVector("llama3", '{"city": "Paris"}', calls(content='{"city": "Paris"}')),
    ToolVector("llama3", "It is sunny.", calls(content="It is sunny.")),
    ToolVector(
        "llama3",
        '<|python_tag|>brave_search.call(query="Paris")',
        calls(content='<|python_tag|>brave_search.call(query="Paris")'),
    ),
    ToolVector("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', calls(WEATHER)),
    ToolVector(
        "mistral",
        'Well.[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}',
        calls(WEATHER, ("now", {}), content="Well."),
    ),
    ToolVector("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', calls(WEATHER)),
    ToolVector(
        "mistral_list",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, '
        '{"name": "now", "arguments": {}}]',
        calls(WEATHER, ("now", {})),
    ),
    ToolVector(
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        calls(WEATHER, ("now", {})),
    ),
    ToolVector(
        "deepseek_v31",
        'Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}'
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        calls(WEATHER, ("now", {}), content="Let me see."),
    ),
    ToolVector(
        "cohere",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}},\n'
        '    {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
        calls(WEATHER, ("now", {})),
    ),
    ToolVector(
        "apertus",
        '<|tools_prefix|>[{"get_weather": {"city": "Paris"}}, {"now": {}}]<|tools_suffix|>',
        calls(WEATHER, ("now", {})),
    ),
    ToolVector(
        "nemotron",
        '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]'
        "</TOOLCALL>",
        calls(WEATHER, ("now", {})),
    ),
    ToolVector(
        "phi4",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|/tool_call|>',
        calls(WEATHER),
    ),
    ToolVector("phi4", 'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]', calls(WEATHER)),
    ToolVector(
        "granite",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]',
        calls(WEATHER, ("now", {})),
    ),
    ToolVector(
        "hunyuan", '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_calls>', calls(WEATHER)
    ),
    ToolVector("glm4", 'get_weather\n{"city": "Paris"}', calls(WEATHER)),
    ToolVector("glm4", "get_weather needs a city.", calls(content="get_weather needs a city.")),
    ToolVector(
        "qwen3_coder",
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
        "</tool_call>\n<tool_call>\n<function=get_time>\n<parameter=zone>\nCET\n</parameter>\n"
        "<parameter=hours>\n[1, 2]\n</parameter>\n"
        '<parameter=note>\nsay "}" ]\n</parameter>\n</function>\n</tool_call>',
        calls(WEATHER, TIME, content="I look."),
    ),
    ToolVector(
        "qwen3_coder",
        "<function=get_weather>\n<parameter=city>\n12\n</parameter>\n</function>\n</tool_call>",
        calls(("get_weather", {"city": "12"})),
    ),
    ToolVector(
        "seed_oss",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>",
        calls(WEATHER),
    ),
    ToolVector(
        "olmo3",
        "<function_calls>\nget_weather(city='Paris')\nget_time(zone=\"CET\", hours=[1, 2], note='say \"}\" ]')\n"
        "</function_calls>",
        calls(WEATHER, TIME),
    ),
    ToolVector(
        "olmo3",
        "<function_calls>\n1 + 1\n</function_calls>",
        calls(content="<function_calls>\n1 + 1\n</function_calls>"),
    ),
    ToolVector(
        "harmony",
        "<|channel|>analysis<|message|>They ask for the weather.<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}',
        calls(WEATHER, reasoning="They ask for the weather."),
    ),
    ToolVector(
        "harmony",
        '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
        calls(WEATHER),
    ),
    ToolVector(
        "harmony",
        "<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant<|channel|>final<|message|>Hi.<|return|>",
        calls(content="Hi.", reasoning="A greeting."),
    ),
    ToolVector("harmony", "Plain text.", calls(content="Plain text.")),
)
