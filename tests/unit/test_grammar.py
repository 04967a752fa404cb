"""Grammars: composition, refusals in the server's own words, limits, and the cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from server.errors import InvalidRequest
from server.text.grammar.compiler import GrammarCompiler
from server.text.grammar.grammar import (
    Grammar,
    choice,
    concatenate,
    json_object,
    json_schema,
    literal,
    one_of,
    regex,
    repeat,
    rules,
    triggered,
)
from server.text.grammar.matcher import GrammarMatcher
from server.text.grammar.schema import Source
from server.text.grammar.tokenizer import GrammarTokenizer
from server.text.grammar.trial import grammar_trial
from tests.fakes import EOS, SPECIAL, encode, small_tokenizer

SOURCE = Source("response_format", "response_format 'person'")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ROOM = 8
"""Logits beside the vocabulary, as in bases whose embedding is padded."""


@cache
def tokenizer() -> GrammarTokenizer:
    small = small_tokenizer()
    return GrammarTokenizer(
        small.backend_tokenizer.to_str(),
        vocab_size=len(small) + ROOM,
        special_ids={encode(token)[0] for token in SPECIAL},
        eos_id=EOS,
    )


def text_of(token_ids: tuple[int, ...]) -> str:
    return str(small_tokenizer().decode(list(token_ids)))


def started(grammar: Grammar) -> GrammarMatcher:
    return GrammarCompiler().compile(grammar, tokenizer()).matcher()


def follows(grammar: Grammar, text: str) -> bool:
    """Whether a grammar allows a text, special tokens in it as such, and then the end."""
    matcher = started(grammar)
    if not all(matcher.accept(token) for token in encode(text)):
        return False
    row = matcher.rows((), {EOS})[0]
    return row is not None and row.allowed is not None and bool(row.allowed[EOS])


def test_a_document_by_a_schema_is_on_one_line_and_its_fixed_parts_are_forced() -> None:
    grammar = json_schema(PERSON, SOURCE)
    assert follows(grammar, '{"name": "Ada", "age": 36}')
    assert not follows(grammar, '{"name":"Ada","age":36}')
    assert not follows(grammar, '{"name": "Ada"}')
    assert text_of(started(grammar).pending).startswith('{"name":')


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (choice(["yes", "no"], SOURCE), "no", "maybe"),
        (regex(r"[0-9]{3}/[a-z]+", SOURCE), "123/abc", "12/abc"),
        (regex("", SOURCE), "", "a"),
        (rules('start: "a" b\nb: /[0-9]/', SOURCE), "a7", "ab"),
        (rules('root ::= "a"\n  | "b" [0-9]+', SOURCE), "b77", "a7"),
        (json_object(SOURCE), '{\n  "a": [1, {"b": null}]\n}', "[1]"),
        (json_object(SOURCE), "{}", '{"a":         1}'),
        (json_schema(True, SOURCE), "null", "nul"),
        (concatenate(literal("<"), one_of([literal("a"), literal("b")]), literal(">")), "<b>", "<c>"),
        (repeat(literal("ab"), separator=literal(", "), most=2), "ab, ab", "ab, ab, ab"),
        (repeat(literal("ab"), separator=literal(", "), least=2), "ab, ab, ab", "ab"),
        (repeat(literal("ab"), least=0), "", "a"),
    ],
)
def test_a_grammar_allows_its_texts_and_no_others(grammar: Grammar, right: str, wrong: str) -> None:
    assert follows(grammar, right)
    assert not follows(grammar, wrong)


@pytest.mark.parametrize("trigger", ["[CALL]", "<|tool|>"])
def test_behind_a_trigger_free_text_must_follow_the_body(trigger: str) -> None:
    """Also where the trigger is a special token."""
    grammar = triggered([(trigger, concatenate(literal("{"), regex("[0-9]+", SOURCE), literal("}")))])
    assert follows(grammar, "no call at all\n{x}")
    assert follows(grammar, f"text {trigger}{{12}} text {trigger}{{3}}")
    assert not follows(grammar, f"text {trigger}{{x}}")
    assert follows(grammar, "<|user|> as without a grammar")


def test_with_a_limit_the_answer_ends_after_that_many_bodies() -> None:
    grammar = triggered([("[CALL]", literal("{1}"))], most=1)
    assert follows(grammar, "text [CALL]{1}")
    assert follows(grammar, "no call")
    assert not follows(grammar, "text [CALL]{1} more")


def test_the_beginning_of_free_text_may_be_forbidden() -> None:
    """Also where it is a special token."""
    for begin in ("<think>", "<|tool|>"):
        grammar = triggered([("[CALL]", literal("{1}"))], most=1, not_begin=begin)
        for text in ("", "<thi", "x", f"x {begin} y", "[CALL]{1}", f"x {begin}[CALL]{{1}}", "<|user|>[CALL]{1}"):
            assert follows(grammar, text), text
        for text in (begin, f" \n{begin}", f"{begin} x[CALL]{{1}}", "<|user|>[CALL]{x}"):
            assert not follows(grammar, text), text


def test_text_of_a_request_that_looks_like_a_special_token_stays_text() -> None:
    """llguidance would force the special token, which the grammar then refuses: the sequence failed."""
    grammar = json_schema({"const": "a<|end|>b"}, SOURCE)
    pending = started(grammar).pending
    assert EOS not in pending
    assert text_of(pending) == '"a<|end|>b"'
    assert list(started(literal("a<|tool|>b")).pending) == encode("a<|tool|>b")


def test_no_row_of_the_logits_without_a_token_is_allowed() -> None:
    row = started(triggered([("[CALL]", literal("x"))])).rows((), {EOS})[0]
    assert row is not None and row.allowed is not None
    assert len(row.allowed) == len(small_tokenizer()) + ROOM
    assert not row.allowed[-ROOM:].any()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"properties": {"a": {"not": {}}}}, "at 'properties.a.not': this keyword is not supported"),
        ({"type": "strin"}, "at 'type'"),
        ({"$ref": "http://example.com/schema"}, "only references into the schema itself"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"$ref": "#"}, "no document can follow it"),
        ({"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
          "$ref": "#/$defs/n"}, "would have no end"),
        ({"enum": [f"v{number}" for number in range(100_000)]}, "more than"),
        ({"properties": {f"p{number}": {} for number in range(5000)}}, "more than"),
        ({"type": "string", "format": "uri-template"}, "the format 'uri-template' is not supported"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "(a"}, "a regular expression in it is not valid"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "no document can follow it"),
        ({"minLength": 10**30}, "at 'minLength'"),
        ({"items": [{}]}, "prefixItems"),
        ({"const": float("nan")}, "not finite"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_by_name(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        started(json_schema(schema, SOURCE))
    assert str(refused.value).startswith("Invalid schema for response_format 'person': ")
    assert reason in str(refused.value)
    assert (refused.value.param, refused.value.code) == ("response_format", "invalid_json_schema")


def test_a_refusal_never_quotes_the_request() -> None:
    canary = "canary7f3a"
    for grammar in (
        regex(f"({canary}", SOURCE),
        rules(f"start: {canary}", SOURCE),
        rules(f"root ::= {canary}", SOURCE),
        json_schema({"const": canary, "type": "integer"}, SOURCE),
        json_schema({"$ref": f"#/$defs/{canary}"}, SOURCE),
    ):
        with pytest.raises(InvalidRequest) as refused:
            started(grammar)
        assert canary not in str(refused.value)


def test_a_deep_schema_is_refused_before_anything_recurses_into_it() -> None:
    schema: dict[str, Any] = {}
    for _ in range(50_000):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="levels deep"):
        json_schema(schema, SOURCE)


def test_notes_and_options_of_the_library_have_no_effect() -> None:
    notes = {"title": "T", "x-guidance": {"lenient": True, "whitespace_flexible": True}, "format": "int32"}
    assert json_schema({**PERSON, **notes}, SOURCE) == json_schema(PERSON, SOURCE)


def test_a_lenient_schema_leaves_out_what_is_not_supported() -> None:
    assert follows(json_schema({"type": "array", "uniqueItems": True}, SOURCE, lenient=True), "[1, 1]")


def test_of_several_schemas_the_refused_one_is_named() -> None:
    bad = json_schema({"type": "string", "pattern": "("}, Source("tools[1].function.parameters", "function 'f'"))
    with pytest.raises(InvalidRequest, match="for function 'f'") as refused:
        started(one_of([json_schema(PERSON, SOURCE), bad]))
    assert refused.value.param == "tools[1].function.parameters"


def test_compiled_grammars_are_kept_within_a_limit_of_bytes() -> None:
    size = GrammarCompiler().compile(json_schema({"const": 0}, SOURCE), tokenizer()).num_bytes
    compiler = GrammarCompiler(max_bytes=3 * size)
    schemas = [json_schema({"const": number}, SOURCE) for number in range(5)]
    compiled = [compiler.compile(schema, tokenizer()) for schema in schemas]
    assert compiler.num_bytes <= 3 * size
    assert compiler.compile(schemas[4], tokenizer()) is compiled[4]
    assert compiler.compile(schemas[0], tokenizer()) is not compiled[0]


def test_a_refused_grammar_is_refused_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler()
    messages = []
    for _ in range(2):
        with pytest.raises(InvalidRequest) as refused:
            compiler.compile(json_schema({"$ref": "#"}, SOURCE), tokenizer())
        messages.append((str(refused.value), refused.value.param, refused.value.code))
        monkeypatch.setattr("server.text.grammar.compiler.grammar_trial", None)
    assert messages[0] == messages[1]


def test_a_refusal_is_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar that a busy machine had no time for was refused for as long as the server ran."""
    compiler = GrammarCompiler()
    with monkeypatch.context() as busy:
        busy.setattr(grammar_trial()._pool, "ask", lambda job: None)
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="too much time"):
                compiler.compile(json_schema(PERSON, SOURCE), tokenizer())
    with pytest.raises(InvalidRequest, match="too much time"):
        compiler.compile(json_schema(PERSON, SOURCE), tokenizer())
    monkeypatch.setattr("server.text.grammar.compiler.REFUSED_SECONDS", 0.0)
    assert compiler.compile(json_schema(PERSON, SOURCE), tokenizer()).num_bytes


def test_matchers_of_one_grammar_do_not_affect_each_other() -> None:
    compiled = GrammarCompiler().compile(choice(["aa", "bb"], SOURCE), tokenizer())
    first, second = compiled.matcher(), compiled.matcher()
    assert first.accept(encode("a")[0])
    assert second.accept(encode("b")[0])
    assert not first.failed
    assert not second.failed


@pytest.mark.parametrize(
    "grammar",
    [
        rules("start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(4000)) + 'r4000: "a"', SOURCE),
        json_schema({"type": "integer", "multipleOf": 1_000_003}, SOURCE),
        json_schema({"allOf": [{"type": "string", "pattern": f"a{{{n}}}b*"} for n in range(40)]}, SOURCE),
    ],
)
def test_a_grammar_that_would_crash_or_exhaust_the_server_is_refused(grammar: Grammar) -> None:
    """The first overflows the library's stack, the others need seconds, hundreds of megabytes, or forever."""
    with pytest.raises(InvalidRequest, match="it needs too much time or memory to compile"):
        started(grammar)
    assert follows(json_schema(PERSON, SOURCE), '{"name": "Ada", "age": 36}')


def test_an_object_of_a_thousand_optional_properties_can_be_followed() -> None:
    schema = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(1000)}}
    assert follows(json_schema(schema, SOURCE), '{"p7": 1, "p999": 2}')
