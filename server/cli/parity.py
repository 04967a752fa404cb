"""Compares the engine's logits of an adapter with PEFT's, for the same tokens.

The adapter's own config may name code and regular expressions to run, so PEFT does not get it. It gets a config that is
rebuilt from the fields that the server read, and the tensors that the server checked.
"""

from __future__ import annotations

import re
import warnings
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel

from base_files.source import BaseSource
from base_files.stock_model import stock_model
from server.adapters.content.manifest import Manifest
from server.lora.weights import LoRAWeights
from server.model.loader import Base
from server.model.patches import ModelPatches, fix_rope
from server.model.runner import ModelRunner
from server.sequence import Batch, LoRARequest, SamplingParams, Segment, Sequence

MAX_DIFFERENCE = 1e-3
"""Largest difference of logits, relative to the largest logit. float32 rounding gives about 1e-6."""

_PROMPT_TOKENS, _NEW_TOKENS, _CHUNK = 20, 8, 12
_SENTENCE = (
    "A quick brown fox jumps over a lazy dog in 1923, and then? Nobody knows why it did so, nor what came of it."
)


@dataclass(frozen=True)
class Answer:
    """Prompt and generated token ids, and the logits of the generated ones [tokens, vocabulary]."""

    ids: abc.Sequence[int]
    logits: torch.Tensor

    @property
    def tokens(self) -> abc.Sequence[int]:
        return self.ids[-len(self.logits) :]


@dataclass(frozen=True)
class Parity:
    """The largest difference of logits, relative to the largest logit, and the number of equal greedy tokens.

    ``effect`` is the largest change of the base's logits by the adapter, relative likewise.
    """

    difference: float
    effect: float
    num_tokens: int
    num_equal: int

    @property
    def holds(self) -> bool:
        """Whether the logits are equal but for rounding; False for NaN."""
        return self.difference <= MAX_DIFFERENCE


@dataclass(frozen=True)
class Answers:
    """The engine's answers with the adapter, and the base's logits for the same tokens.

    ``max_model_len`` is the length that rotary frequencies were computed for.
    """

    adapted: abc.Sequence[Answer]
    plain: abc.Sequence[Answer]
    max_model_len: int


def answer_here(base: Base, manifest: Manifest, weights: LoRAWeights) -> Answers:
    """Greedy answers computed as in the server: in one batch with rows of the base, prompts in chunks."""
    length = min(base.max_model_len, _PROMPT_TOKENS + _NEW_TOKENS)
    num_new = min(_NEW_TOKENS, length - 1)
    prompts = [prompt[: length - num_new] for prompt in _prompts(base, manifest)]
    sequences = [
        Sequence(number, prompt, num_new, SamplingParams(temperature=0), adapters)
        for number, (adapters, prompt) in enumerate(product(((LoRARequest(manifest.weights_digest),), ()), prompts))
    ]
    runner = ModelRunner.of(base, num_slots=len(sequences), max_len=length)
    runner.add_adapter(manifest.weights_digest, weights)
    logits = torch.stack([_step(runner, sequences) for _ in range(num_new)], dim=1)  # [sequences, tokens, vocabulary]
    runner.remove_adapter(manifest.weights_digest)
    answers = [
        Answer(sequence.ids(0, sequence.num_tokens), rows) for sequence, rows in zip(sequences, logits, strict=True)
    ]
    return Answers(answers[: len(prompts)], answers[len(prompts) :], base.max_model_len)


def compare(source: BaseSource, manifest: Manifest, answers: Answers) -> Parity:
    """Compare answers with PEFT's on a freshly loaded base in float32. Raises whatever PEFT raises."""
    base = stock_model(source)
    fix_rope(base, answers.max_model_len, ModelPatches())  # as the server computes its frequencies
    model = _adapted(base, manifest)
    expected = torch.stack([_logits(model, answer) for answer in answers.adapted])
    adapted = torch.stack([answer.logits for answer in answers.adapted])
    plain = torch.stack([answer.logits for answer in answers.plain])
    tokens = torch.tensor([answer.tokens for answer in answers.adapted])
    return Parity(
        difference=_relative(adapted - expected, expected),
        effect=_relative(plain - expected, expected),
        num_tokens=tokens.numel(),
        num_equal=int((expected.argmax(dim=-1) == tokens).sum()),
    )


def _step(runner: ModelRunner, sequences: abc.Sequence[Sequence]) -> torch.Tensor:
    """Append the adapter's greedy token to each sequence and its twin on the base; logits [sequences, vocabulary]."""
    logits = torch.empty(0)
    while not len(logits):
        batch = Batch(
            tuple(
                Segment(sequence, sequence.id, sequence.num_computed, min(_CHUNK, sequence.num_uncomputed))
                for sequence in sequences
            )
        )
        logits, computed = runner.run(batch)
        for segment in batch.segments:
            segment.sequence.num_computed = segment.end
    row_of = {draw.sequence.id: row for row, draw in enumerate(computed.draws)}
    logits = logits[[row_of[sequence.id] for sequence in sequences]].float()
    tokens = logits[: len(logits) // 2].argmax(dim=-1).tolist()
    for sequence, token in zip(sequences, tokens * 2, strict=True):
        sequence.output_ids.append(token)
    return logits


def _prompts(base: Base, manifest: Manifest) -> list[tuple[int, ...]]:
    """A sentence, and ids spread over the vocabulary, first those whose embedding rows the adapter trained."""
    trained = [token for part in manifest.plan.parts.values() if part.tokens for token in part.tokens.indices]
    spread = [number * base.vocab_size // _PROMPT_TOKENS for number in range(_PROMPT_TOKENS)]
    mixed = list(dict.fromkeys([*trained[: _PROMPT_TOKENS // 4], *spread]))[:_PROMPT_TOKENS]
    ids = base.tokenizer(_SENTENCE, add_special_tokens=False)["input_ids"]
    words = [token for token in ids if token < base.vocab_size] or mixed
    return [tuple((words * _PROMPT_TOKENS)[:_PROMPT_TOKENS]), tuple((mixed * _PROMPT_TOKENS)[:_PROMPT_TOKENS])]


def _adapted(base: PreTrainedModel, manifest: Manifest) -> nn.Module:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**_clean_config(manifest)))
        set_peft_model_state_dict(model, _clean_tensors(manifest))
    return model.eval()


def _clean_config(manifest: Manifest) -> dict[str, Any]:
    """PEFT's config rebuilt from the parsed one: modules by name, rank and alpha of each as a number."""
    config = manifest.config
    modules, parameters = _targets(manifest)
    targets = [*modules, *parameters]
    tokens = {name: list(indices) for name, indices in config.token_indices.items()}
    return {
        "task_type": "CAUSAL_LM",
        "r": config.r,
        "lora_alpha": config.alpha,
        "rank_pattern": {re.escape(name): config.rank(name) for name in targets},
        "alpha_pattern": {re.escape(name): config.alpha_of(name) for name in targets},
        "target_modules": modules,
        "target_parameters": parameters or None,
        "modules_to_save": list(config.modules_to_save) or None,
        "trainable_token_indices": tokens.get("", tokens) or None,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_bias": config.lora_bias,
        "bias": config.bias,
        "ensure_weight_tying": config.tied,
    }


def _targets(manifest: Manifest) -> tuple[list[str], list[str]]:
    """Modules with a delta, and parameters outside linear layers, which PEFT's config names separately."""
    modules, parameters = [], []
    for module, part in manifest.plan.parts.items():
        parameters += [f"{module}.{name}" for name in part.parameters]
        if part.low_rank is not None:
            weight = f"{module}.weight"
            linear = part.shape.kind == "linear"
            trained = manifest.config.trained_name(weight)
            named = any(f".{trained}".endswith(f".{end}") for end in manifest.config.target_parameters)
            if part.low_rank.swapped or (linear and named):
                parameters.append(weight)
            else:
                modules.append(module)
    return modules, parameters


def _clean_tensors(manifest: Manifest) -> Mapping[str, torch.Tensor]:
    """The file's tensors under the names that the current PEFT writes."""
    names = manifest.plan.names
    return {names.get(name, name): tensor for name, tensor in safetensors.torch.load(manifest.data).items()}


@torch.inference_mode()
def _logits(model: nn.Module, answer: Answer) -> torch.Tensor:
    """Another model's logits for an answer's generated tokens [tokens, vocabulary]."""
    logits: torch.Tensor = model(input_ids=torch.tensor([answer.ids[:-1]]), use_cache=False).logits
    return logits[0, -len(answer.logits) :].float()


def _relative(difference: torch.Tensor, logits: torch.Tensor) -> float:
    return float(difference.abs().max() / logits.abs().max())
