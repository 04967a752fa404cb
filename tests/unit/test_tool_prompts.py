"""What a chat template is given of tools, and of earlier calls and their results."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from server.text.prompt import PromptRenderer
from server.text.tools.families import COMPACT_HERMES, HERMES
from server.text.tools.history import find_form, with_calls_as_text
from server.text.tools.prompt import tool_variables, with_described_tools
from tests.fakes import small_tokenizer

WEATHER = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "tool_calls": [{"id": "call_1", **WEATHER}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "", "parameters": {"type": "object"}}}]
PLAIN_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] + '|' }}{% endfor %}"
OBJECTS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.items() | list }}){% endfor %}"
    "{% endfor %}"
)
TEXTS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] + '' }}"
    "{% for c in m['tool_calls'] or [] %}({{ c['function']['name'] + ' ' + c['function']['arguments'] }}){% endfor %}"
    "{% endfor %}"
)
NULL_CONTENT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for c in m['tool_calls'] %}({{ c['function']['name'] + ' ' + c['function']['arguments'] }}){% endfor %}"
    "{% else %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}"
)


def rendered(template: str, messages: list[dict[str, Any]]) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer().backend_tokenizer, eos_token="<|end|>")
    tokenizer.chat_template = template
    renderer = PromptRenderer(tokenizer)
    return renderer.decode(renderer.chat(messages))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (OBJECTS, "[user]Weather?[assistant](get_weather [('city', 'Paris')])[tool]sunny"),
        (TEXTS, '[user]Weather?[assistant](get_weather {"city": "Paris"})[tool]sunny'),
        (NULL_CONTENT, '[user]Weather?(get_weather {"city": "Paris"})[tool]sunny'),
        (
            PLAIN_TEMPLATE,
            '[user]Weather?|[assistant]<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
            "</tool_call>|[user]<tool_response>\nsunny\n</tool_response>|",
        ),
    ],
)
def test_earlier_calls_have_the_form_that_the_template_takes(template: str, text: str) -> None:
    assert rendered(template, HISTORY) == text


def test_a_template_that_drops_calls_in_silence_gets_them_as_text() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert "get_weather" in rendered(template, HISTORY)


def test_results_that_follow_each_other_are_one_turn() -> None:
    messages = [*HISTORY, {**HISTORY[2], "content": "15 degrees"}, {"role": "user", "content": "Thanks."}]
    turns = with_calls_as_text(messages, HERMES)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert (
        turns[2]["content"].index("sunny")
        < turns[2]["content"].index("15 degrees")
        < turns[2]["content"].index("Thanks.")
    )


def test_a_template_that_refuses_every_form_has_none() -> None:
    def refuse(messages: list[dict[str, Any]]) -> str:
        raise ValueError

    assert find_form(refuse) is None


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    broken = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{oops"}}
    (turn,) = with_calls_as_text([{"role": "assistant", "tool_calls": [broken]}], COMPACT_HERMES)
    assert turn["content"] == '<tool_call>{"name": "f", "arguments": "{oops"}</tool_call>'


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        ("{% if tools %}{{ tools | tojson }}{% endif %}", {"tools"}),
        ("{% if xml_tools %}{% endif %}", {"xml_tools"}),
        ("{# tools #}{{ 'tools' }}{{ messages }}", set()),
        ("{% broken", set()),
    ],
)
def test_a_template_names_the_variables_of_tools(template: str, variables: set[str]) -> None:
    assert tool_variables(template) == variables


def test_tools_are_described_in_the_system_turn_of_a_template_without_them() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    system, user = with_described_tools(messages, TOOLS, PLAIN_TEMPLATE, HERMES)
    assert user == messages[1] and system["content"].startswith("Be brief.\n\n")
    assert json.dumps(TOOLS[0]["function"]) in system["content"]
    assert '<tool_call>\n{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}\n</tool_call>' in system["content"]
    assert with_described_tools(messages[1:], TOOLS, PLAIN_TEMPLATE, HERMES)[0]["role"] == "system"


def test_tools_are_described_in_the_users_turn_of_a_template_that_refuses_a_system_turn() -> None:
    """Gemma 2's: every request with tools was refused."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Yes?"},
    ]
    first, second = with_described_tools(messages, TOOLS, PLAIN_TEMPLATE, HERMES, takes_system_turn=False)
    assert (first["role"], second) == ("user", messages[1])
    assert json.dumps(TOOLS[0]["function"]) in first["content"] and first["content"].endswith("\n\nHi")
    before = with_described_tools(messages[1:], TOOLS, PLAIN_TEMPLATE, HERMES, takes_system_turn=False)[0]
    assert before["role"] == "user" and before["content"].startswith("You can call functions.")


def test_phis_template_gets_the_tools_with_the_system_turn() -> None:
    template = "{{ message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' }}"
    system, _ = with_described_tools([{"role": "user", "content": "Hi"}], TOOLS, template, HERMES)
    assert json.loads(system["tools"]) == [TOOLS[0]["function"]]
