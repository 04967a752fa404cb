"""What the grammars of calls allow, by random walks: calls that follow the schema, which the parser reads back."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.errors import InvalidRequest
from server.sequence import SampledToken
from server.text.answer_format import AnswerFormat
from server.text.detokenizer import Detokenizer
from server.text.grammar.compiler import GrammarCompiler
from server.text.grammar.grammar import json_schema
from server.text.grammar.matcher import GrammarMatcher
from server.text.grammar.schema import Source
from server.text.grammar.tokenizer import GrammarTokenizer
from server.text.prompt import PromptRenderer
from server.text.reasoning import ReasoningFormat, reasoning_format
from server.text.tools.composition import pattern_without
from server.text.tools.families import FORMATS
from server.text.tools.tool import Tool
from tests.answer_parsing import ParsedAnswer, joined

MICRO = Path(__file__).parents[2] / "micro_base"
SOURCE = Source("tools[0].function.parameters", "the tool 'get_weather'")
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rio de Janeiro", "São Paulo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"type": "array", "items": {"enum": ["C", "F"]}, "maxItems": 2},
        "x y": {"type": "boolean"},
    },
    "required": ["city"],
}
TOOLS = (Tool("get_weather", SOURCE, "", WEATHER), Tool("now", SOURCE))
THINK = reasoning_format("<think></think>")


@cache
def micro() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MICRO)
    return loaded


@cache
def renderer() -> PromptRenderer:
    return PromptRenderer(micro())


@cache
def grammar_tokenizer() -> GrammarTokenizer:
    special = {number for number, token in micro().added_tokens_decoder.items() if token.special}
    text = micro().backend_tokenizer.to_str()
    return GrammarTokenizer(text, vocab_size=len(micro()), special_ids=special, eos_id=end_id())


def end_id() -> int:
    (found,) = micro()("<|end|>", add_special_tokens=False)["input_ids"]
    return int(found)


def walk(answers: AnswerFormat, seed: int, *, begin: str = "", content: Any = None) -> ParsedAnswer:
    """A random text that the grammar allows, behind ``begin``, as the parser reads it."""
    grammar = answers.grammar(content)
    assert grammar is not None
    matcher = GrammarCompiler().compile(grammar, grammar_tokenizer()).matcher()
    detokenizer = Detokenizer(renderer().decoder(answers.markers), ())
    parser = answers.parser()
    parts = []
    source = random.Random(seed)
    given = micro()(begin, add_special_tokens=False)["input_ids"] if begin else []
    for _ in range(4000):
        token = given.pop(0) if given else next_token(matcher, source)
        if token == end_id():
            break
        assert matcher.accept(token)
        parts += parser.push(detokenizer.push(SampledToken(token)))
    else:
        pytest.fail("the text has no end")
    return joined([*parts, *parser.push(detokenizer.finish()), *parser.finish()])


def next_token(matcher: GrammarMatcher, source: random.Random) -> int:
    tokens = allowed(matcher)
    return end_id() if end_id() in tokens and source.random() < 0.7 else source.choice(tokens)


def allowed(matcher: GrammarMatcher) -> Sequence[int]:
    (row,) = matcher.rows((), frozenset({end_id()}))
    assert row is not None
    if row.forced is not None:
        return [row.forced]
    assert row.allowed is not None and row.allowed.any()
    return [int(token) for token in np.flatnonzero(row.allowed)]


def check(answer: ParsedAnswer) -> None:
    for name, arguments in answer.calls:
        schema = {"get_weather": WEATHER, "now": {"maxProperties": 0}}[name]
        jsonschema.validate(arguments, schema)
        assert set(arguments) <= set(WEATHER["properties"])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMATS)
def test_required_calls_follow_their_schemas(name: str, seed: int) -> None:
    """GPT-OSS's reasoning ends at a token that ends micro's answers, so its grammar is walked behind reasoning."""
    begin = FORMATS[name].trigger if name == "harmony" else ""
    answer = walk(AnswerFormat(tool_format=FORMATS[name], tools=TOOLS, required=True), seed, begin=begin)
    assert answer.calls and answer.content == "" and len(answer.calls) <= 16
    check(answer)


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_where_there_may_be_no_more(name: str) -> None:
    begin = FORMATS[name].trigger if name == "harmony" else ""
    answers = AnswerFormat(tool_format=FORMATS[name], tools=TOOLS, required=True, parallel=False)
    for seed in range(3):
        assert len(walk(answers, seed, begin=begin).calls) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_was_begun_is_finished(name: str) -> None:
    format = FORMATS[name]
    text = "Hm. " if format.trigger and name != "harmony" else ""
    begin = text + (format.trigger or format.opening + format.grammar(TOOLS[0]).before)
    answer = walk(AnswerFormat(tool_format=format, tools=TOOLS), 1, begin=begin)
    assert answer.calls and answer.content == text.strip()
    check(answer)


@pytest.mark.parametrize("name", FORMATS)
def test_text_is_free_until_a_call_begins(name: str) -> None:
    answers = AnswerFormat(tool_format=FORMATS[name], tools=TOOLS)
    grammar = answers.grammar()
    assert grammar is not None
    matcher = GrammarCompiler().compile(grammar, grammar_tokenizer()).matcher()
    for token in micro()("It is sunny {in Paris} <tool>, \n\n[1] 'get' ", add_special_tokens=False)["input_ids"]:
        assert matcher.accept(token)
    assert end_id() in allowed(matcher)


@pytest.mark.parametrize("name", ["hermes", "hermes_compact"])
def test_reasoning_may_stand_before_required_calls(name: str) -> None:
    opened = AnswerFormat(THINK, True, FORMATS[name], TOOLS, required=True)
    answer = walk(opened, 1, begin="They ask.</think>")
    assert answer.calls and (answer.reasoning, answer.content) == ("They ask.", "")
    closed = AnswerFormat(THINK, False, FORMATS[name], TOOLS, required=True)
    answer = walk(closed, 2, begin="<think>They ask.</think>")
    assert answer.calls and (answer.reasoning, answer.content) == ("They ask.", "")


@pytest.mark.parametrize("name", ["qwen3_coder", "olmo3"])
def test_definitions_that_each_argument_would_repeat_are_limited(name: str) -> None:
    """Ten thousand arguments with definitions of as many values took minutes, in which nothing else ran."""
    definition = {"enum": [f"value {number}" for number in range(3000)]}
    for num_arguments in (900, 10_000):
        properties = {f"a{number}": {"$ref": "#/$defs/x"} for number in range(num_arguments)}
        tool = Tool("f", SOURCE, "", {"type": "object", "properties": properties, "$defs": {"x": definition}})
        started = time.process_time()
        with pytest.raises(InvalidRequest, match=r"too large|more than"):
            AnswerFormat(tool_format=FORMATS[name], tools=(tool,), required=True).grammar()
        assert time.process_time() - started < 1


@pytest.mark.parametrize("reasoning", [THINK, ReasoningFormat("other", "(thought)", "(/thought)")])
@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "mistral"])
def test_a_trigger_inside_of_reasoning_begins_no_call(name: str, reasoning: ReasoningFormat) -> None:
    """A thought that mentions the text of a call had to go on as a call, which nobody saw: the answer was empty.

    The markers of reasoning are special tokens of micro in the first case, and text in the second.
    """
    format = FORMATS[name]
    answers = AnswerFormat(reasoning, False, format, TOOLS)
    thought = f" \n{reasoning.begin}I could use {format.trigger} or not.{reasoning.end}"
    for begin in (f"{thought}\n\nHi {format.trigger}", f"Hi {format.trigger}"):
        answer = walk(answers, 1, begin=begin)
        assert answer.calls and answer.content == "Hi"
        assert answer.reasoning == ("" if begin.startswith("Hi") else f"I could use {format.trigger} or not.")
    assert walk(answers, 1, begin=f"{thought}\n\nHello!").content.startswith("Hello!")


def test_content_with_a_grammar_of_its_own_may_come_in_the_place_of_calls() -> None:
    answers = AnswerFormat(tool_format=FORMATS["hermes"], tools=TOOLS)
    content = json_schema({"enum": [["yes"], ["no"]]}, SOURCE)
    assert walk(answers, 1, begin='["y', content=content).content == '["yes"]'
    assert walk(answers, 1, begin="<tool_call>", content=content).calls


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("", True),
        ("a", True),
        ("ab", False),
        ("abc", False),
        ("ac", True),
        ("b", True),
        ("xyz!", False),
        ("xy\nz", True),
    ],
)
def test_the_pattern_of_texts_that_begin_otherwise(text: str, fits: bool) -> None:
    """Python reads the parts of Rust's syntax that the pattern has, but for its escapes."""
    pattern = re.sub(r"\\x\{([0-9a-f]+)\}", lambda match: f"\\U{int(match[1], 16):08x}", pattern_without(["ab", "xyz"]))
    assert (re.fullmatch(pattern, text) is not None) == fits
