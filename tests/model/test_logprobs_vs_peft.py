"""Log probabilities of an engine's tokens are those of PEFT's forward pass over prompt and answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.metrics import Metrics
from server.model.sampler import Sampler
from server.sequence import LoRARequest, SampledToken, SamplingParams, Sequence
from tests.model.harness import Hosted, prompts
from tests.model.peft_cases import TOLERANCE
from tests.model.test_peft_cases import family_of, make

NUM_TOP = 7
_PENALTIES = (("repetition_penalty", 1.3), ("frequency_penalty", 0.5), ("logit_bias", ((9, 4.0), (50, -100.0))))
PARAMS = [
    SamplingParams(temperature=0, num_logprobs=NUM_TOP),
    SamplingParams(temperature=1.3, top_p=0.95, seed=1, num_logprobs=NUM_TOP),
    SamplingParams(temperature=0, num_logprobs=NUM_TOP, processors=_PENALTIES),
    SamplingParams(temperature=0.8, top_k=30, seed=2, num_logprobs=NUM_TOP, processors=_PENALTIES),
]


def run(hosted: Hosted, sequences: list[Sequence], *, max_drafts: int) -> tuple[dict[int, list[SampledToken]], float]:
    """The tokens of every sequence, and how many drafts were right."""
    scheduler = Scheduler(
        max_num_seqs=3, max_num_batched_tokens=64, max_model_len=hosted.max_len, max_draft_tokens=max_drafts
    )
    engine = Engine(scheduler, hosted.runner, Sampler(), Metrics())
    tokens: dict[int, list[SampledToken]] = {sequence.id: [] for sequence in sequences}
    for sequence in sequences:
        engine.add(sequence)
    while not engine.idle:
        outputs = engine.step()
        engine.record_step(outputs, 0.001)
        for output in outputs:
            assert output.token is not None
            tokens[output.sequence_id].append(output.token)
    return tokens, engine.metrics.registry.get_sample_value("quickchange_accepted_draft_tokens_total") or 0.0


@torch.inference_mode()
def check(sequence: Sequence, tokens: list[SampledToken], model: nn.Module) -> None:
    """Each token's log probability and those of the likeliest are the model's log softmax of its own logits."""
    ids = torch.tensor([[*sequence.prompt_ids, *(token.id for token in tokens[:-1])]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(sequence.prompt_ids) - 1 :].double()
    tolerance = 2 * TOLERANCE * float(logits.abs().max())  # of a logit, and of the logarithm of the sum of all
    for token, expected in zip(tokens, logits.log_softmax(-1), strict=True):
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=tolerance)
        assert len(token.top_logprobs) == NUM_TOP
        likeliest = expected.sort(descending=True).values[:NUM_TOP].tolist()
        assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(likeliest, abs=tolerance)
        for top, logprob in token.top_logprobs:
            assert logprob == pytest.approx(float(expected[top]), abs=tolerance)


@pytest.mark.parametrize("max_drafts", [0, 8])
@pytest.mark.parametrize(("case", "name"), [("all_linear", "llama"), ("embedding", "gemma3"), ("saved_head", "gpt2")])
def test_they_are_pefts_with_penalties_and_drafts_too(case: str, name: str, max_drafts: int, tmp_path: Path) -> None:
    """Penalties and filters decide what is chosen; log probabilities are the model's without them."""
    family = family_of(name)
    models: dict[str, nn.Module] = {"it": make(case, name, tmp_path / "it"), "": family.base}
    family.hosted.add("it", family.read(tmp_path / "it")[1])
    asked = [(params, uses) for params in PARAMS for uses in ((), (LoRARequest("it"),))]
    sequences = [  # the second time their tokens are drafted as they were the first time
        Sequence(number, prompts(12)[0], 30, params, uses) for number, (params, uses) in enumerate(asked * 2)
    ]
    found, num_accepted = run(family.hosted, sequences, max_drafts=max_drafts)
    family.hosted.runner.remove_adapter("it")
    assert num_accepted > 100 or not max_drafts
    for sequence in sequences:
        check(sequence, found[sequence.id], models["it" if sequence.adapters else ""])
