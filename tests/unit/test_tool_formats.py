"""Calls are found in what models of each family write, however the text is cut."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from adapter_format.sidecar import ToolFormatName
from server.text.answer import AnswerParser, ToolCallPart
from server.text.detokenizer import TextPiece
from server.text.grammar.schema import Source
from server.text.stepped_parser import PartWriter, SteppedParser
from server.text.tools.families import FORMATS, tool_format
from server.text.tools.tool import MAX_FAILED_CALLS, Tool, ToolFormat
from tests.answer_parsing import joined, parsed
from tests.tool_vectors import TIME, VECTORS, WEATHER, ToolVector

ROOT = Path(__file__).parents[2]
SOURCE = Source("tools[0].function.parameters", "tool")
TOOLS = (
    Tool("get_weather", SOURCE, "", {"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool(
        "get_time",
        SOURCE,
        "",
        {
            "type": "object",
            "properties": {
                "zone": {"enum": ["CET", "UTC"]},
                "hours": {"type": "array", "items": {"type": "integer"}},
                "note": {"type": "string"},
            },
            "required": ["zone"],
        },
    ),
    Tool("now", SOURCE),
)


def parser(format: ToolFormat, *, max_calls: int | None = None) -> AnswerParser:
    return SteppedParser(lambda reader, writer: format.read(reader, writer, TOOLS), PartWriter(max_calls=max_calls))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector.format}-{vector.text[:24]!r}")
def test_the_text_of_a_model_is_read(vector: ToolVector) -> None:
    assert parsed(lambda: parser(FORMATS[vector.format]), vector.text) == vector.expected


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_the_calls_that_it_writes(name: str) -> None:
    """So the text that a grammar forces, and the text of a replayed call, are the same."""
    format = FORMATS[name]
    made = (WEATHER,) if format.separator is None else (WEATHER, TIME)
    texts = [format.text(called, arguments) for called, arguments in made]
    text = format.opening + (format.separator or "").join(texts) + format.closing
    assert text.startswith(format.trigger)
    assert parsed(lambda: parser(format), text).calls == made


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_vector(name: str) -> None:
    assert any(vector.format == name and vector.expected.calls for vector in VECTORS)


def test_the_page_and_the_sidecar_know_every_format() -> None:
    page = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page.partition("| a call |")[2], re.MULTILINE)
    schema = json.loads((ROOT / "tests" / "contract" / "sidecar.schema.json").read_text(encoding="utf-8"))
    assert sorted(rows) == sorted(FORMATS) == sorted(get_args(ToolFormatName))
    assert schema["properties"]["tool_format"]["enum"] == [*get_args(ToolFormatName), None]


def test_arguments_arrive_while_they_are_written() -> None:
    running = parser(FORMATS["hermes"])
    running.push(TextPiece('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa'))
    (more,) = running.push(TextPiece("ris, Fr"))
    assert isinstance(more, ToolCallPart) and more.arguments == "ris, Fr" and more.id is None


def test_a_call_is_announced_with_its_whole_name_and_an_id() -> None:
    running = parser(FORMATS["hermes"])
    assert running.push(TextPiece('<tool_call>\n{"name": "get_wea')) == []
    (first,) = running.push(TextPiece('ther", '))
    assert isinstance(first, ToolCallPart) and first.name == "get_weather" and first.arguments == ""
    assert first.id is not None and len(first.id) == 29 and first.id.startswith("call_") and first.id[5:].isalnum()


def test_at_most_the_wanted_calls_are_written() -> None:
    format = FORMATS["hermes"]
    text = "\n".join([format.text(*WEATHER), format.text(*TIME)])
    parts = [*parser(format, max_calls=1).push(TextPiece(text))]
    assert joined(parts).calls == (WEATHER,)


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_full_of_broken_calls_is_read_in_linear_time(name: str) -> None:
    """Every attempt to read a call may end at the end of the text, so their number is limited."""
    format = FORMATS[name]
    begin = (format.opening + format.text("get_weather", {})).split("{")[0]
    text = 200 * f'{begin}{{"arguments": [[' + "x" * 2000
    running = parser(format)
    parts = [*running.push(TextPiece(text)), *running.finish()]
    assert sum(len(json.dumps(part)) for part in parts) >= 2000 and MAX_FAILED_CALLS < 200


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ('<tool_call>\\n{"name": <function-name>, ...}', "hermes"),
        ("{{ '<tool_call>' + (call | tojson) + '</tool_call>' }}", "hermes_compact"),
        ("{{ messages }}", "hermes"),
        (None, "hermes"),
        ("<|start_header_id|> <|python_tag|>", "llama3"),
        ('<|start_header_id|> {"name": function name, "parameters": dictionary}', "llama3"),
        ("[TOOL_CALLS] name [ARGS]", "mistral"),
        ("[TOOL_CALLS] [", "mistral_list"),
        ("<｜tool▁call▁begin｜>' + '```json'", "deepseek_v3"),
        ("<｜tool▁call▁begin｜>", "deepseek_v31"),
        ("<|START_ACTION|>", "cohere"),
        ("<|tools_prefix|>", "apertus"),
        ("<TOOLCALL>", "nemotron"),
        ("'<|tool|>' + message['tools'] + '<|/tool|>'", "phi4"),
        ("<|tool_call|>[", "granite"),
        ("<function_calls>", "olmo3"),
        ("<tool_calls>", "hunyuan"),
        ("<|observation|>", "glm4"),
        ("<tool_call>\\n<function=", "qwen3_coder"),
        ("<seed:tool_call> <function=", "seed_oss"),
        ("<|start|>assistant<|channel|>final<|message|>", "harmony"),
    ],
)
def test_a_template_tells_its_format(template: str | None, name: str) -> None:
    assert tool_format(template).name == name
