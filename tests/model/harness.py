"""Hosts a model as the server does, runs sequences through the engine, and asks the stock code."""

from __future__ import annotations

import random
from collections import abc
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import GenerationMixin, PreTrainedModel

from cpu_kernels.kernels import Kernels
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.lora.weights import LoRAWeights
from server.metrics import Metrics
from server.model import loader
from server.model.attention.cpu import cpu_attention
from server.model.attention.interface import BackendFactory
from server.model.fused_ops import fuse_ops
from server.model.kv_cache import KVCache
from server.model.model_trace import ModelTrace
from server.model.patches import ModelPatches, fix_rope
from server.model.quantizer import Quantized, quantizing
from server.model.runner import ModelRunner
from server.model.sampler import Sampler
from server.sequence import LoRARequest, SampledToken, SampleRow, SamplingParams, Sequence
from tests.model.families import CONTEXT, VOCAB_SIZE
from tests.model.held import held_bytes

BUDGET = 16
NUM_SLOTS = 3
NUM_CACHES = 4
GREEDY = SamplingParams(temperature=0)


class RecordingSampler(Sampler):
    """The server's sampler, keeping the logits it was given for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: dict[int, list[torch.Tensor]] = {}

    def sample(self, logits: torch.Tensor, draws: abc.Sequence[SampleRow]) -> list[SampledToken | None]:
        """As the server's."""
        assert len(logits) == len(draws)
        tokens = super().sample(logits, draws)
        for row, draw, token in zip(logits, draws, tokens, strict=True):
            if token is not None:
                self.logits.setdefault(draw.sequence.id, []).append(row.float().clone())
        return tokens


@dataclass(frozen=True)
class Ask:
    """What a test wants generated: joins at ``step``."""

    prompt: tuple[int, ...]
    num_tokens: int = 10
    adapter: str | tuple[LoRARequest, ...] | None = None
    step: int = 0
    params: SamplingParams = GREEDY

    @property
    def adapters(self) -> tuple[LoRARequest, ...]:
        """One adapter's name, several uses, or none, as the engine takes them."""
        return (LoRARequest(self.adapter),) if isinstance(self.adapter, str) else self.adapter or ()


@dataclass(frozen=True)
class Answer:
    """The tokens of one sequence, and the logits each was taken from [num_tokens, vocab]."""

    ask: Ask
    tokens: list[int]
    logits: torch.Tensor
    num_cached: int = 0

    @property
    def ids(self) -> list[int]:
        """Prompt and output."""
        return [*self.ask.prompt, *self.tokens]


@dataclass
class Hosted:
    """A model with the engine's attention in it; ``kv_memory`` is there where prefixes are reused."""

    model: PreTrainedModel
    runner: ModelRunner
    trace: ModelTrace
    patches: ModelPatches
    max_num_seqs: int = NUM_SLOTS
    budget: int = BUDGET
    kv_memory: int | None = None
    quantized: Quantized | None = None
    kernels: Kernels = field(default_factory=Kernels)

    def run(self, asks: abc.Sequence[Ask]) -> list[Answer]:
        """Every ask through scheduler, runner and sampler; with an integrity check after each step."""
        sampler = RecordingSampler()
        scheduler = Scheduler(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_model_len=self.max_len,
            slots=None if self.kv_memory is None else self._slots(self.kv_memory),
        )
        engine = Engine(scheduler, self.runner, sampler, Metrics())
        sequences = [Sequence(n, ask.prompt, ask.num_tokens, ask.params, ask.adapters) for n, ask in enumerate(asks)]
        pending = sorted(zip(sequences, asks, strict=True), key=lambda one: one[1].step)
        step = 0
        while pending or not engine.idle:
            while pending and (pending[0][1].step <= step or engine.idle):
                engine.add(pending.pop(0)[0])
            outputs = engine.step()
            assert not any(output.failed for output in outputs)
            scheduler.check_integrity()
            step += 1
        return [
            Answer(ask, sequence.output_ids, torch.stack(sampler.logits[sequence.id]), sequence.num_cached)
            for sequence, ask in zip(sequences, asks, strict=True)
        ]

    @property
    def max_len(self) -> int:
        """Longest sequence the slots hold."""
        return self._cache.keys[0].shape[2]

    @property
    def _cache(self) -> KVCache:
        return self.runner.attention_backend.cache

    def _slots(self, kv_memory: int) -> SlotTable:
        return SlotTable(
            self._cache.keys[0].shape[0],
            max_len=self.max_len,
            max_bytes=kv_memory,
            bytes_of=self._cache.layout.bytes_of,
            reuses=True,
        )

    def add(self, digest: str, weights: LoRAWeights) -> str:
        """Put an adapter in; what the bank then counts is what it keeps in memory."""
        self.runner.add_adapter(digest, weights)
        bank = self.runner.bank
        assert held_bytes(bank) == bank.num_bytes + bank.backend.num_bytes
        return digest


def host(
    model: PreTrainedModel,
    *,
    max_model_len: int = CONTEXT,
    max_num_seqs: int = NUM_SLOTS,
    budget: int = BUDGET,
    kv_memory: int | None = None,
    groups: abc.Sequence[tuple[str, ...]] = (),
    linear: str | None = None,
    native: bool = False,
    backend: BackendFactory | None = None,
) -> Hosted:
    """Install the engine in a model, in the order in which ``load_base`` does; its stock forward is gone afterwards.

    With a ``linear`` its linears and embedding become int8, and it names what multiplies them; with ``native`` native
    kernels do what they can. ``backend`` attends, by default that of a CPU.
    """
    kernels = Kernels(linear=linear, native=native).ready()
    patches = ModelPatches()
    probe = loader._install_probe(model, patches)
    quantized = nullcontext() if linear is None else quantizing(model, kernels, torch.float32, patches=patches)
    with quantized as what:
        trace = loader._probe(model, probe)
    fix_rope(model, max_model_len, patches)
    if native:
        fuse_ops(model, kernels, patches)
    if backend is None:
        backend = partial(cpu_attention, kernels=kernels)
    attention = loader._install_attention(model, patches)
    probe.close()
    num_slots = max_num_seqs if kv_memory is None else max_num_seqs + NUM_CACHES
    runner = ModelRunner(
        model,
        attention,
        probe.shapes,
        backend,
        num_slots=num_slots,
        max_len=max_model_len,
        groups=groups,
        kernels=kernels,
        patches=patches,
    )
    return Hosted(model, runner, trace, patches, max_num_seqs, budget, kv_memory, what, kernels)


def prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts of these lengths."""
    source = random.Random(seed)
    return [tuple(source.randrange(3, VOCAB_SIZE) for _ in range(length)) for length in lengths]


@torch.inference_mode()
def generate(model: PreTrainedModel, ask: Ask) -> list[int]:
    """What stock ``generate`` gives for an ask, alone."""
    ids = torch.tensor([ask.prompt])
    output = GenerationMixin.generate(
        model,  # type: ignore[arg-type]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ask.num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return [int(token) for token in output[0, len(ask.prompt) :]]


@torch.inference_mode()
def stock_logits(model: torch.nn.Module, answer: Answer) -> torch.Tensor:
    """What the stock forward gives for the rows an answer's tokens were taken from, in one pass [num_tokens, vocab]."""
    output = model(input_ids=torch.tensor([answer.ids[:-1]]), use_cache=False)
    logits: torch.Tensor = output.logits[0, len(answer.ask.prompt) - 1 :].float()
    return logits


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest of theirs; NaN is infinite."""
    share = float((ours - theirs).abs().max() / theirs.abs().max())
    return share if share == share else float("inf")


def margin(logits: torch.Tensor) -> float:
    """How far the likeliest token stands above the next in the closest row, as a share of the largest logit."""
    best = logits.topk(2, dim=-1).values
    return float((best[:, 0] - best[:, 1]).min() / logits.abs().max())
