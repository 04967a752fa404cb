"""Constrained sequences in the engine: the mask, forced tokens, drafts, ends, failures, and the others in the batch."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLMatcher, LLParserLimits

from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.metrics import Metrics
from server.model.sampler import Sampler
from server.sequence import FinishReason, SampleRow, SamplingParams, StepOutput
from server.sequence import Sequence as EngineSequence
from server.text.grammar.compiler import CompiledGrammar, GrammarCompiler
from server.text.grammar.grammar import Grammar, choice, concatenate, json_schema, literal, regex, rules, triggered
from server.text.grammar.library import library_grammar
from server.text.grammar.matcher import GrammarMatcher
from server.text.grammar.schema import Source
from server.text.grammar.tokenizer import GrammarTokenizer
from tests.fakes import EOS, SPECIAL, encode, small_tokenizer
from tests.model import test_speculation as scripted
from tests.model.engines import finish, step, tracked
from tests.random_schemas import longest_document, random_schema

SOURCE = Source("response_format", "response_format")
WIDTH = len(small_tokenizer()) + 6
LENGTH = 4000
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "kind": {"const": "human"}},
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@cache
def tokenizer() -> GrammarTokenizer:
    return GrammarTokenizer(
        small_tokenizer().backend_tokenizer.to_str(),
        vocab_size=WIDTH,
        special_ids={encode(token)[0] for token in SPECIAL},
        eos_id=EOS,
    )


def compiled(grammar: Grammar) -> CompiledGrammar:
    return GrammarCompiler().compile(grammar, tokenizer())


def person() -> CompiledGrammar:
    return compiled(json_schema(PERSON, SOURCE))


def habits(seed: int) -> scripted.Model:
    """A model that looks at the last two tokens, and so repeats itself."""

    @cache
    def logits(last: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *last)))
        return 6 * torch.rand(WIDTH, generator=generator)

    return lambda sequence, history: logits(tuple(history[-2:])).clone()


def make(model: scripted.Model, *, drafts: int = 0, slots: int = 3, budget: int = 64) -> Engine:
    scheduler = Scheduler(
        max_num_seqs=slots, max_num_batched_tokens=budget, max_model_len=LENGTH, max_draft_tokens=drafts
    )
    return tracked(Engine(scheduler, scripted.ScriptedRunner(model), Sampler(), Metrics()))


@pytest.fixture(autouse=True)
def _long_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted, "LENGTH", LENGTH)
    monkeypatch.setattr(scripted, "VOCAB", WIDTH)


def ask(number: int, grammar: CompiledGrammar | None, **fields: Any) -> EngineSequence:
    params = fields.pop("params", SamplingParams(temperature=0))
    fields = {"max_tokens": 500, "eos_ids": frozenset({EOS}), **fields}
    return EngineSequence(number, tuple(encode(f"prompt {number}")), params=replace(params, grammar=grammar), **fields)


def run(engine: Engine, *sequences: EngineSequence) -> dict[int, list[StepOutput]]:
    outputs: dict[int, list[StepOutput]] = {sequence.id: [] for sequence in sequences}
    for output in finish(engine, *sequences):
        outputs[output.sequence_id].append(output)
    return outputs


def ids(outputs: Sequence[StepOutput]) -> list[int]:
    return [output.token.id for output in outputs if output.token is not None]


def text(outputs: Sequence[StepOutput]) -> str:
    shown = [token for token in ids(outputs) if token != EOS]
    return str(small_tokenizer().decode(shown))


def num_steps(engine: Engine) -> int:
    assert isinstance(engine.runner, scripted.ScriptedRunner)
    return len(engine.runner.batches)


@pytest.mark.parametrize("seed", range(12))
def test_a_document_is_valid_and_ends_by_stop(seed: int) -> None:
    """Random schemas, half of them seeded at temperature 1."""
    source = random.Random(seed)
    schema = random_schema(source)
    params = SamplingParams(temperature=seed % 2, seed=seed)
    asked = ask(1, compiled(json_schema(schema, SOURCE)), params=params, max_tokens=longest_document(schema) + 1)
    outputs = run(make(habits(seed), drafts=6 * (seed % 3)), asked)[1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(text(outputs)), schema)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_and_log_probabilities_change_no_token(seed: int, temperature: float) -> None:
    """Neither those of the others in the batch."""
    grammars = [
        person(),
        None,
        compiled(triggered([("a", literal("bc"))])),
        compiled(regex("(ab|c[0-9]{2}){30}", SOURCE)),
    ]

    def play(drafts: int, num_logprobs: int | None, budget: int) -> list[list[int]]:
        params = SamplingParams(temperature=temperature, seed=seed, num_logprobs=num_logprobs)
        asks = [ask(number, grammar, params=params, max_tokens=60) for number, grammar in enumerate(grammars)]
        engine = make(habits(seed), drafts=drafts, budget=budget)
        outputs = run(engine, *asks)
        return [ids(outputs[number]) for number in range(len(grammars))]

    plain = play(0, None, 64)
    assert play(8, None, 64) == plain
    assert play(8, None, 5) == plain
    assert play(0, 2, 64) == plain
    assert play(8, 0, 7) == plain


def test_forced_tokens_take_no_steps_of_their_own_and_are_counted() -> None:
    engine = make(habits(0))
    outputs = run(engine, ask(1, person()))[1]
    num_forced = scripted.count(engine, "forced_tokens")
    assert num_forced > 15
    assert num_steps(engine) <= len(ids(outputs)) - num_forced + 1
    assert scripted.count(engine, "accepted_draft_tokens") == scripted.count(engine, "draft_tokens") == 0


def test_log_probabilities_of_forced_tokens_are_the_models() -> None:
    params = SamplingParams(temperature=0, num_logprobs=1)
    model = habits(3)
    asked = ask(1, person(), params=params)
    outputs = run(make(model), asked)[1]
    history = list(asked.prompt_ids)
    for output in outputs:
        assert output.token is not None
        expected = model(asked, history).log_softmax(-1)[output.token.id].item()
        assert output.token.logprob == pytest.approx(expected, abs=1e-5)
        history.append(output.token.id)


def test_a_text_that_is_complete_ends_without_a_token_for_it() -> None:
    outputs = run(make(habits(0)), ask(1, compiled(choice(["yes"], SOURCE)), eos_ids=frozenset()))[1]
    assert text(outputs) == "yes"
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert EOS not in ids(outputs)


def test_where_a_text_may_end_or_go_on_the_end_tokens_of_the_sequence_decide() -> None:
    grammar = compiled(regex("[0-9]+", SOURCE))
    wants_end = lambda sequence, history: torch.nn.functional.one_hot(torch.tensor(EOS), WIDTH).float()  # noqa: E731
    outputs = run(make(wants_end), ask(1, grammar))[1]
    assert (len(ids(outputs)), outputs[-1].finish_reason) == (2, FinishReason.STOP)
    ignored = run(make(wants_end), ask(1, grammar, eos_ids=frozenset(), max_tokens=7))[1]
    assert (len(ids(ignored)), ignored[-1].finish_reason) == (7, FinishReason.LENGTH)
    assert EOS not in ids(ignored)


def test_an_empty_text_is_an_answer() -> None:
    for eos_ids in (frozenset({EOS}), frozenset()):
        outputs = run(make(habits(0)), ask(1, compiled(rules('start: ""', SOURCE)), eos_ids=eos_ids))[1]
        assert (text(outputs), outputs[-1].finish_reason) == ("", FinishReason.STOP)


def test_processors_come_first_and_cannot_take_the_last_allowed_token() -> None:
    """An end that ``min_tokens`` forbids and the grammar demands, and biases against all that is allowed."""
    grammar = compiled(choice(["a", "b"], SOURCE))
    (a,), (b,) = encode("a"), encode("b")
    processors = (("min_tokens", 9), ("logit_bias", ((a, -100.0), (b, -90.0))))
    stops = frozenset({EOS, a, b})
    outputs = run(make(habits(0)), ask(1, grammar, params=SamplingParams(temperature=0, processors=processors)))[1]
    assert (text(outputs), outputs[-1].finish_reason) == ("b", FinishReason.STOP)
    asked = ask(1, grammar, params=SamplingParams(temperature=0, processors=(("min_tokens", 9),)), eos_ids=stops)
    assert run(make(habits(0)), asked)[1][-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("max_tokens", range(1, 30))
def test_max_tokens_ends_a_document_right_there(max_tokens: int) -> None:
    whole = ids(run(make(habits(0)), ask(1, person()))[1])
    outputs = run(make(habits(0), drafts=4), ask(1, person(), max_tokens=max_tokens))[1]
    assert ids(outputs) == whole[:max_tokens]
    ends = FinishReason.STOP if max_tokens >= len(whole) else FinishReason.LENGTH
    assert outputs[-1].finish_reason is ends


class _FailingMatcher:
    """A matcher that reaches a limit after a few tokens."""

    pending: tuple[int, ...] = ()
    stopped = False

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._matcher = grammar.matcher()
        self.num_left = 3

    @property
    def failed(self) -> bool:
        return self.num_left <= 0

    def accept(self, token: int) -> bool:
        self.num_left -= 1
        return not self.failed

    def num_allowed(self, tokens: Sequence[int]) -> int:
        return 0

    def rows(self, drafts: Sequence[int], end_ids: Any) -> Any:
        return [self._matcher.rows((), end_ids)[0], *([None] * len(drafts))]


class _FailingGrammar:
    def matcher(self) -> _FailingMatcher:
        return _FailingMatcher(compiled(regex("[a-z]*", SOURCE)))


def test_a_limit_of_work_ends_that_sequence_alone() -> None:
    engine = make(habits(0))
    failing = EngineSequence(
        1, tuple(encode("x")), 50, SamplingParams(temperature=0, grammar=_FailingGrammar()), eos_ids=frozenset({EOS})
    )
    alone = run(make(habits(0)), ask(2, person()))[2]
    outputs = run(engine, failing, ask(2, person()))
    assert outputs[1][-1].failed is not None
    assert "grammar" in outputs[1][-1].failed
    assert ids(outputs[2]) == ids(alone)


def test_a_limit_of_work_that_a_mask_reaches_ends_no_text_as_if_it_were_complete() -> None:
    """llguidance then allows the end token alone: half a document ended by ``stop``."""
    limits = LLParserLimits(max_lexer_states=50, verbose_errors=False)
    grammar = library_grammar(regex("(a|b)*c[ab]{60}(foo|[a-z]+[0-9]+)*", SOURCE), tokenizer().special_tokens, EOS)

    class _Limited:
        def matcher(self) -> GrammarMatcher:
            matcher = LLMatcher(tokenizer().library, grammar, log_level=0, limits=limits)
            special_ids = frozenset(tokenizer().special_tokens.values())
            return GrammarMatcher(matcher, vocab_size=WIDTH, eos_id=EOS, special_ids=special_ids)

    params = SamplingParams(temperature=1, seed=1, grammar=_Limited())
    asked = EngineSequence(1, tuple(encode("x")), 200, params, eos_ids=frozenset({EOS}))
    last = run(make(habits(0)), asked)[1][-1]
    assert last.failed is not None
    assert "limits of work" in last.failed


def test_a_special_token_that_ends_answers_cannot_end_a_text_before_it_is_complete() -> None:
    """Bases have several such tokens; free text may hold those that are not the tokenizer's."""
    other_end = encode("<|tool|>")[0]
    grammar = compiled(triggered([("ab", literal("c"))], least=1, most=1))
    wants_end = lambda sequence, history: torch.nn.functional.one_hot(torch.tensor(other_end), WIDTH).float()  # noqa: E731
    asked = ask(1, grammar, eos_ids=frozenset({EOS, other_end}), max_tokens=9)
    outputs = run(make(wants_end), asked)[1]
    assert other_end not in ids(outputs)
    assert (len(ids(outputs)), outputs[-1].finish_reason) == (9, FinishReason.LENGTH)


def test_rows_without_a_grammar_keep_their_bits() -> None:
    sampler = Sampler()
    logits = torch.randn(3, WIDTH)
    before = logits.clone()
    grammar = person()
    free = [ask(number, None) for number in (1, 2)]
    constrained = ask(3, grammar)
    sampler.sample(logits, [SampleRow(free[0], 0), SampleRow(constrained, 0), SampleRow(free[1], 0)])
    assert torch.equal(logits, before)


def test_an_abort_in_the_middle_of_forced_tokens_frees_the_slot() -> None:
    engine = make(habits(0))
    engine.add(ask(1, person()))
    step(engine)
    engine.abort(1)
    assert engine.idle
    engine.scheduler.check_integrity()
    outputs = run(engine, ask(2, person()))[2]
    jsonschema.validate(json.loads(text(outputs)), PERSON)


def test_forced_tokens_of_many_sequences_stay_within_the_budget_of_a_step() -> None:
    grammar = compiled(concatenate(literal("x" * 400), regex("[0-9]{3}", SOURCE)))
    engine = make(habits(0), slots=4, budget=20)
    outputs = run(engine, *(ask(number, grammar if number else None, max_tokens=450) for number in range(4)))
    assert isinstance(engine.runner, scripted.ScriptedRunner)
    assert all(batch.num_rows <= 20 for batch in engine.runner.batches)
    assert all(text(outputs[number]).startswith("x" * 400) for number in (1, 2, 3))


def test_forced_tokens_whose_logits_are_needed_are_limited_in_a_step() -> None:
    """A long constant with log probabilities needed the logits of all its tokens at once: gigabytes."""
    constant = "0123456789" * 40
    grammar = compiled(literal(constant))
    params = SamplingParams(temperature=0, num_logprobs=0)
    engine = make(habits(0), budget=1000)
    outputs = run(engine, *(ask(number, grammar, params=params, max_tokens=450) for number in (1, 2)))
    assert isinstance(engine.runner, scripted.ScriptedRunner)
    most = engine.scheduler.max_scored_rows
    assert max(sum(len(segment.drafts) for segment in batch.segments) for batch in engine.runner.batches) == most
    assert all(text(outputs[number]) == constant and len(ids(outputs[number])) > most for number in (1, 2))
