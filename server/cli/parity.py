"""Whether an adapter answers here as it does under PEFT: the same tokens through both, and how far the logits differ.

PEFT never sees the adapter's own config, in which a stranger may name code and expressions to run: it gets one that is
written anew from what the server read, and the tensors whose bytes the server checked.
"""

from __future__ import annotations

import re
import warnings
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel

from server.adapters.content.manifest import Manifest
from server.lora.weights import LoRAWeights
from server.model.loader import Base, load_stock
from server.model.patches import ModelPatches, fix_rope
from server.model.runner import ModelRunner
from server.sequence import Batch, LoRARequest, SamplingParams, Segment, Sequence

MAX_DIFFERENCE = 1e-3
"""Of logits, as a share of the largest; float32 explains some 1e-6."""

_PROMPT_TOKENS, _NEW_TOKENS, _CHUNK = 20, 8, 12
_SENTENCE = (
    "A quick brown fox jumps over a lazy dog in 1923, and then? Nobody knows why it did so, nor what came of it."
)


@dataclass(frozen=True)
class Answer:
    """A prompt with the tokens that followed, and the logits from which each was taken [tokens, vocabulary]."""

    ids: abc.Sequence[int]
    logits: torch.Tensor

    @property
    def tokens(self) -> abc.Sequence[int]:
        return self.ids[-len(self.logits) :]


@dataclass(frozen=True)
class Parity:
    """How near two computations are: the largest difference of logits, as a share of the largest, and equal tokens.

    ``effect`` is by how much the adapter changes the base's logits, likewise.
    """

    difference: float
    effect: float
    num_tokens: int
    num_equal: int

    @property
    def holds(self) -> bool:
        """Whether they are the same but for rounding; NaN is not."""
        return self.difference <= MAX_DIFFERENCE


@dataclass(frozen=True)
class Answers:
    """What the engine said: the adapter, and what the base alone makes of the same tokens.

    ``max_model_len`` is what rotary frequencies were chosen for.
    """

    adapted: abc.Sequence[Answer]
    plain: abc.Sequence[Answer]
    max_model_len: int


def answer_here(base: Base, manifest: Manifest, weights: LoRAWeights) -> Answers:
    """The adapter's greedy answers, computed as when the server runs: beside rows of the base, prompts in chunks."""
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
    answers = [Answer(one.ids(0, one.num_tokens), rows) for one, rows in zip(sequences, logits, strict=True)]
    return Answers(answers[: len(prompts)], answers[len(prompts) :], base.max_model_len)


def compare(base_folder: Path, manifest: Manifest, answers: Answers) -> Parity:
    """Hold answers against PEFT's, on a fresh base in float32. Raises whatever PEFT raises."""
    base = load_stock(base_folder)
    fix_rope(base, answers.max_model_len, ModelPatches())  # frequencies are those of the server's longest sequence
    model = _adapted(base, manifest)
    theirs = torch.stack([_logits(model, answer) for answer in answers.adapted])
    ours, plain = (torch.stack([one.logits for one in some]) for some in (answers.adapted, answers.plain))
    said = torch.tensor([one.tokens for one in answers.adapted])
    return Parity(
        difference=_share(ours - theirs, theirs),
        effect=_share(plain - theirs, theirs),
        num_tokens=said.numel(),
        num_equal=int((theirs.argmax(dim=-1) == said).sum()),
    )


def _step(runner: ModelRunner, sequences: abc.Sequence[Sequence]) -> torch.Tensor:
    """The next token of every sequence, chosen by those with the adapter; the logits [sequences, vocabulary]."""
    logits = torch.empty(0)
    while not len(logits):
        batch = Batch(
            tuple(Segment(one, one.id, one.num_computed, min(_CHUNK, one.num_uncomputed)) for one in sequences)
        )
        logits, computed = runner.run(batch)
        for segment in batch.segments:
            segment.sequence.num_computed = segment.end
    row_of = {draw.sequence.id: row for row, draw in enumerate(computed.draws)}
    logits = logits[[row_of[one.id] for one in sequences]].float()
    tokens = logits[: len(logits) // 2].argmax(dim=-1).tolist()
    for one, token in zip(sequences, tokens * 2, strict=True):
        one.output_ids.append(token)
    return logits


def _prompts(base: Base, manifest: Manifest) -> list[tuple[int, ...]]:
    """A sentence, and ids from all over the vocabulary, those first for which the adapter brings rows of its own."""
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
    """PEFT's config of what the server read: modules by their names, ranks and alphas as numbers of each."""
    config, (modules, parameters) = manifest.config, _targets(manifest)
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
    """The modules with a delta, and the parameters that PEFT's config has to name because no linear holds them."""
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
    """The file's tensors under the names that PEFT itself writes today."""
    names = manifest.plan.names
    return {names.get(name, name): tensor for name, tensor in safetensors.torch.load(manifest.data).items()}


@torch.inference_mode()
def _logits(model: nn.Module, answer: Answer) -> torch.Tensor:
    """What another model has for the rows from which an answer's tokens were taken [tokens, vocabulary]."""
    logits: torch.Tensor = model(input_ids=torch.tensor([answer.ids[:-1]]), use_cache=False).logits
    return logits[0, -len(answer.logits) :].float()


def _share(difference: torch.Tensor, whole: torch.Tensor) -> float:
    return float(difference.abs().max() / whole.abs().max())
