"""Batching: which examples make a step, and their padded tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from trainer.masking import IGNORED, Encoded

MicroBatch = list[int]  # indices into the list of examples


@dataclass(frozen=True)
class TrainingBatch:
    """``input_ids`` and ``targets``, [rows, length] each; a target is the token after its position, or ``IGNORED``.

    Rows are padded at the end, so a causal model needs no mask: no real token attends to padding.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor

    @property
    def num_trained(self) -> int:
        return int((self.targets != IGNORED).sum())


def collate(examples: Sequence[Encoded]) -> TrainingBatch:
    """The examples as rows, padded to the longest of them."""
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros(len(examples), length, dtype=torch.long)
    targets = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        targets[row, : len(example.labels) - 1] = torch.tensor(example.labels[1:])
    return TrainingBatch(input_ids, targets)


def plan_steps(
    lengths: Sequence[int],
    *,
    batch_tokens: int,
    micro_batch_tokens: int,
    epochs: int | None,
    max_steps: int | None,
    seed: int,
) -> list[list[MicroBatch]]:
    """The micro-batches of every step: shuffled each epoch, a step ends once it holds ``batch_tokens``.

    The last step of an epoch may be smaller. Ends at ``epochs`` or ``max_steps``, one of which must be given.
    """
    assert lengths and (epochs or max_steps), "epochs or max_steps must be given"
    rng = random.Random(f"order:{seed}")
    steps: list[list[MicroBatch]] = []
    epoch = 0
    while (epochs is None or epoch < epochs) and (max_steps is None or len(steps) < max_steps):
        order = rng.sample(range(len(lengths)), len(lengths))
        steps += [by_length(lengths, step, micro_batch_tokens) for step in _chunks(lengths, order, batch_tokens)]
        epoch += 1
    return steps[:max_steps]


def by_length(lengths: Sequence[int], chosen: Sequence[int], max_tokens: int) -> list[MicroBatch]:
    """``chosen`` sorted by length and cut into micro-batches of at most ``max_tokens``, padding included.

    An example longer than that is a micro-batch of its own.
    """
    micro_batches: list[MicroBatch] = []
    for index in sorted(chosen, key=lambda index: lengths[index]):
        if micro_batches and (len(micro_batches[-1]) + 1) * lengths[index] <= max_tokens:
            micro_batches[-1].append(index)
        else:
            micro_batches.append([index])
    return micro_batches


def _chunks(lengths: Sequence[int], order: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    tokens = 0
    for index in order:
        chunk.append(index)
        tokens += lengths[index]
        if tokens >= batch_tokens:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk
