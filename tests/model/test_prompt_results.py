"""Log probabilities of prompts, and embeddings: the stock model's and PEFT's, alone, in chunks and beside others."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.metrics import Metrics
from server.model.logprobs import max_scored_rows
from server.model.sampler import Sampler
from server.sequence import (
    Batch,
    Doubles,
    FinishReason,
    LoRARequest,
    SampledToken,
    SamplingParams,
    Sequence,
    StepOutput,
)
from tests.model.engines import finish
from tests.model.families import FAMILIES, build, fix_long_factors
from tests.model.harness import Hosted, host, prompts
from tests.model.int8_bases import TWO_LINEARS
from tests.model.peft_cases import TOLERANCE
from tests.model.test_peft_cases import family_of, make
from tests.model.test_scheduler import ScriptedRunner

NUM_TOP = 5
SCORE = SamplingParams(temperature=0, num_prompt_logprobs=NUM_TOP)
EMBED = SamplingParams(temperature=0, embedding=True)
PLAIN = SamplingParams(temperature=0)
Uses = tuple[LoRARequest, ...]


@dataclass
class Results:
    """What a sequence got."""

    prompt: list[SampledToken] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    embedding: Doubles | None = None
    end: StepOutput | None = None


def run(
    hosted: Hosted, sequences: list[Sequence], *, budget: int = 16, scored: int = 8, slots: SlotTable | None = None
) -> dict[int, Results]:
    """All sequences together; the results of each."""
    scheduler = Scheduler(
        max_num_seqs=hosted.max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=hosted.max_len,
        max_draft_tokens=4,
        max_scored_rows=scored,
        slots=slots,
    )
    results = {sequence.id: Results() for sequence in sequences}
    for output in finish(Engine(scheduler, hosted.runner, Sampler(), Metrics()), *sequences):
        found = results[output.sequence_id]
        assert found.end is None and output.failed is None
        found.prompt += output.prompt
        found.tokens += [] if output.token is None else [output.token.id]
        found.embedding = output.embedding
        found.end = output if output.last else None
    assert all(found.end for found in results.values())
    return results


@torch.inference_mode()
def stock(model: nn.Module, prompt: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities [rows, vocab] and last hidden states [rows, hidden] of a stock model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder: Any = base.base_model
    ids = torch.tensor([prompt])
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    return model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1), hidden


def check_scores(found: list[SampledToken], prompt: tuple[int, ...], logprobs: torch.Tensor) -> None:
    """Each token behind the first has the log probability and the rank of the row before it, and the likeliest."""
    assert [token.id for token in found] == list(prompt[1:])
    tolerance = 2 * TOLERANCE * float(logprobs.abs().max())
    for token, row in zip(found, logprobs, strict=False):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=tolerance)
        assert token.rank is not None
        assert (row > row[token.id] + tolerance).sum() < token.rank <= (row > row[token.id] - tolerance).sum() + 1
        likeliest = row.sort(descending=True).values[:NUM_TOP].tolist()
        assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(likeliest, abs=tolerance)


def check_embedding(found: Doubles | None, hidden: torch.Tensor) -> None:
    """The mean of the last hidden states over all tokens."""
    expected = hidden.double().mean(0).numpy()
    assert found is not None and np.abs(found - expected).max() < 2 * TOLERANCE * float(hidden.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_the_stock_models_in_chunks_beside_generating_sequences(family: str) -> None:
    """Soft caps, windows, experts and position embeddings: what the decoder hands to the head, and what that makes."""
    model = build(family)
    expected = copy.deepcopy(model)
    if family == "phi3_longrope":
        fix_long_factors(expected)
    hosted = host(model)
    first, second, third, short = prompts(40, 23, 30, 1)
    asks = [
        Sequence(0, first, 0, SCORE),
        Sequence(1, second, 0, EMBED),
        Sequence(2, third, 4, PLAIN),
        Sequence(3, second, 3, SCORE),
        Sequence(4, short, 0, SCORE),
        Sequence(5, short, 0, EMBED),
    ]
    found = run(hosted, asks)
    for number in (0, 3, 4):
        check_scores(found[number].prompt, asks[number].prompt_ids, stock(expected, asks[number].prompt_ids)[0])
    for number in (1, 5):
        check_embedding(found[number].embedding, stock(expected, asks[number].prompt_ids)[1])
    assert found[2].tokens == run(hosted, [Sequence(2, third, 4, PLAIN)])[2].tokens
    assert [len(found[number].tokens) for number in range(6)] == [0, 0, 4, 3, 0, 0]


@pytest.mark.parametrize(("case", "name"), [("all_linear", "llama"), ("embedding", "gemma3"), ("saved_head", "gpt2")])
def test_with_an_adapter_they_are_pefts_mixed_with_the_base(case: str, name: str, tmp_path: Path) -> None:
    family = family_of(name)
    models: dict[Uses, nn.Module] = {(LoRARequest("it"),): make(case, name, tmp_path / "it"), (): family.base}
    family.hosted.add("it", family.read(tmp_path / "it")[1])
    asks = [
        Sequence(number, prompt, 2 * (number % 2) if params is SCORE else 0, params, uses)
        for number, (prompt, params, uses) in enumerate(
            (prompt, params, uses) for prompt in prompts(33, 12) for params in (SCORE, EMBED) for uses in models
        )
    ]
    found = run(family.hosted, asks)
    family.hosted.runner.remove_adapter("it")
    for ask in asks:
        logprobs, hidden = stock(models[ask.adapters], ask.prompt_ids)
        if ask.params.embedding:
            check_embedding(found[ask.id].embedding, hidden)
        else:
            check_scores(found[ask.id].prompt, ask.prompt_ids, logprobs)


@pytest.mark.parametrize("linear", TWO_LINEARS)
def test_on_an_int8_base_they_are_the_same_to_the_bit_beside_others_and_change_none(linear: str) -> None:
    """The fused last layer computes only the rows that are needed, and other sequences in the step need fewer."""
    hosted = host(build("llama"), linear=linear, native=True, budget=64)
    first, second, third = prompts(14, 9, 11)
    asks = [Sequence(0, first, 2, SCORE), Sequence(1, second, 0, EMBED), Sequence(2, third, 5, PLAIN)]
    together = run(hosted, asks, budget=64, scored=64)
    for ask in asks:
        copied = Sequence(ask.id, ask.prompt_ids, ask.max_tokens, ask.params)
        alone = run(hosted, [copied], budget=64, scored=64)[ask.id]
        assert (alone.prompt, alone.tokens) == (together[ask.id].prompt, together[ask.id].tokens)
        assert np.array_equal(alone.embedding, together[ask.id].embedding)  # type: ignore[arg-type]


def test_a_steps_scored_rows_are_limited_and_all_sequences_come_to_their_end() -> None:
    """The logits of a step take no more memory than those of so many rows, whatever the prompts' lengths."""
    runner = ScriptedRunner()
    scheduler = Scheduler(max_num_seqs=3, max_num_batched_tokens=64, max_model_len=64, max_scored_rows=8)
    engine = Engine(scheduler, runner, Sampler(), Metrics())
    long, other = tuple(range(1, 31)), tuple(range(1, 12))
    asks = [Sequence(1, long, 0, SCORE), Sequence(2, other, 3, SCORE), Sequence(3, long, 2, PLAIN)]
    outputs = finish(engine, *asks)
    assert max(runner.num_sampled) <= 8 + 1
    assert lengths_of(runner.batches, 3)[0] == 30
    assert sum(lengths_of(runner.batches, 1)) == 30 and max(lengths_of(runner.batches, 1)) == 8
    scored = {ask.id: [t.id for out in outputs if out.sequence_id == ask.id for t in out.prompt] for ask in asks}
    assert scored == {1: list(long[1:]), 2: list(other[1:]), 3: []}
    assert [out.finish_reason for out in outputs if out.sequence_id == 1][-1] is FinishReason.LENGTH
    assert engine.idle


def lengths_of(batches: list[Batch], sequence_id: int) -> list[int]:
    """Rows of a sequence in each batch that has any."""
    return [part.length for batch in batches for part in batch.segments if part.sequence.id == sequence_id]


def test_logits_of_scored_rows_take_at_most_64_mib_for_any_vocabulary() -> None:
    assert [max_scored_rows(size) for size in (2_000, 49_152, 262_144, 2_000_000)] == [8388, 341, 64, 16]


def test_a_prompt_may_fill_the_context_if_nothing_is_generated() -> None:
    engine = Engine(
        Scheduler(max_num_seqs=1, max_num_batched_tokens=64, max_model_len=16), ScriptedRunner(), Sampler(), Metrics()
    )
    outputs = finish(engine, Sequence(1, tuple(range(1, 17)), 0, SCORE))
    assert sum(len(output.prompt) for output in outputs) == 15


def test_they_reuse_no_prefix_and_leave_theirs_to_others() -> None:
    """A reused row would have no result."""
    hosted = host(build("llama"), kv_memory=2**30, max_num_seqs=1)
    (prompt,) = prompts(40)
    asks = [
        Sequence(number, prompt, max_tokens, params)
        for number, (max_tokens, params) in enumerate([(2, PLAIN), (0, SCORE), (0, EMBED), (2, SCORE), (2, PLAIN)])
    ]
    found = run(hosted, asks, slots=hosted._slots(2**30))
    assert [ask.num_cached for ask in asks] == [0, 0, 0, 0, 39]
    assert found[4].tokens == found[0].tokens == found[3].tokens
    assert len(found[1].prompt) == len(found[3].prompt) == 39


@pytest.mark.parametrize("params", [SCORE, EMBED])
def test_results_that_are_not_finite_end_their_sequence_with_an_error(params: SamplingParams) -> None:
    model = build("llama")
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    with torch.no_grad():
        embeddings.weight[7] = float("nan")
    hosted = host(model)
    scheduler = Scheduler(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=hosted.max_len)
    engine = Engine(scheduler, hosted.runner, Sampler(), Metrics())
    good, bad = Sequence(1, (3, 4, 5), 0, params), Sequence(2, (3, 7, 5), 0, params)
    outputs = {output.sequence_id: output for output in finish(engine, good, bad)}
    assert outputs[1].failed is None and outputs[1].finish_reason is FinishReason.LENGTH
    assert outputs[2].failed == "the results of the prompt are NaN or infinite"
