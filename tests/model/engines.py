"""Engines on scripted models: their integrity is checked after each step, and once more when a test ends."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch

from server.engine.engine import Engine
from server.model.sampler import Sampler
from server.sequence import SampleRow, Sequence, StepOutput

made: list[Engine] = []
"""Those of the test at hand, by ``tracked``."""


def tracked(engine: Engine) -> Engine:
    """The engine, whose integrity is checked when the test ends."""
    made.append(engine)
    return engine


def token_ids(outputs: Iterable[StepOutput]) -> list[int | None]:
    """The token of each output."""
    return [output.token and output.token.id for output in outputs]


def sample(logits: torch.Tensor, draws: SequenceOf[SampleRow]) -> list[int | None]:
    """The ids that a sampler of its own chooses."""
    return [token and token.id for token in Sampler().sample(logits, draws)]


def step(engine: Engine) -> list[StepOutput]:
    """One step, after which all that is computed is known, and of each sequence all but the last token is computed.

    Tokens that a grammar forces are computed in the next step.
    """
    outputs = engine.step()
    engine.record_step(outputs, 0.001)
    engine.scheduler.check_integrity()
    for sequence in engine.scheduler.running.values():
        assert sequence.num_computed < sequence.num_tokens
        assert not sequence.decoding or sequence.num_uncomputed == 1 or sequence.matcher is not None
    return outputs


def finish(engine: Engine, *sequences: Sequence) -> list[StepOutput]:
    """Add sequences; every output until the engine is idle."""
    for sequence in sequences:
        engine.add(sequence)
    outputs: list[StepOutput] = []
    for _ in range(30_000):
        if engine.idle:
            return outputs
        outputs += step(engine)
    raise AssertionError("the engine does not come to an end")
