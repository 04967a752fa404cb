"""Engines in this process, all driven the same way: a closed loop of clients, prompts as ids, no early end."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel

from base_files.locate import find_base
from base_files.stock_model import stock_model
from cpu_kernels.cores import default_threads
from server.adapters.content.manifest import AdapterPolicy, read_manifest
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.lora.weights import LoRAWeights
from server.metrics import Metrics
from server.model.kv_cache import KVLayout
from server.model.loader import Base, load_base
from server.model.runner import ModelRunner
from server.model.sampler import Sampler
from server.sequence import LoRARequest, SamplingParams, Sequence, StepOutput

GREEDY = SamplingParams(temperature=0.0)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ask:
    """A prompt, how many tokens of answer, and the number of the adapter that gives it, None for the base."""

    prompt_ids: tuple[int, ...]
    num_tokens: int
    adapter: int | None = None
    params: SamplingParams = GREEDY


class ClosedLoop(Protocol):
    """What a comparison needs of an engine."""

    def run(self, asks: SequenceOf[Ask], num_clients: int) -> float:
        """Answer all, ``num_clients`` of them at a time; seconds."""
        ...


class InProcessEngine:
    """Our engine without HTTP and without its thread; the adapters are prepared, and ``hold`` puts them on the base."""

    def __init__(self, base: Base, engine: Engine, runner: ModelRunner, adapters: dict[str, LoRAWeights]) -> None:
        self.base, self.engine, self.runner = base, engine, runner
        self._adapters, self._digests = adapters, list(adapters)
        self._held: set[str] = set()
        self._number = 0

    def hold(self, num_adapters: int) -> None:
        """Have the first ``num_adapters`` on the base and no others; with 0 the base is as if there were none."""
        wanted = set(self._digests[:num_adapters])
        for digest in self._held - wanted:
            self.runner.remove_adapter(digest)
        for digest in self._digests[:num_adapters]:
            if digest not in self._held:
                self.runner.add_adapter(digest, self._adapters[digest])
        self._held = wanted

    @property
    def adapter_bytes(self) -> list[int]:
        """Bytes of each adapter's tensors."""
        return [weights.num_bytes for weights in self._adapters.values()]

    def close(self) -> None:
        self.base.close()

    def add(self, ask: Ask, *, eos_ids: frozenset[int] = frozenset()) -> Sequence:
        uses = () if ask.adapter is None else (LoRARequest(self._digests[ask.adapter]),)
        self._number += 1
        sequence = Sequence(self._number, ask.prompt_ids, ask.num_tokens, ask.params, uses, eos_ids)
        self.engine.add(sequence)
        return sequence

    def step(self) -> list[StepOutput]:
        since = time.perf_counter()
        outputs = self.engine.step()
        self.engine.record_step(outputs, time.perf_counter() - since)
        return outputs

    def run(self, asks: SequenceOf[Ask], num_clients: int) -> float:
        """Seconds for all, none of them ended early."""
        return self.run_counted(asks, num_clients)[0]

    def run_counted(
        self, asks: SequenceOf[Ask], num_clients: int, *, eos_ids: frozenset[int] = frozenset()
    ) -> tuple[float, int]:
        """A sequence joins whenever one ends: seconds, and output tokens."""
        since = time.perf_counter()
        waiting, flying, tokens = iter(asks), 0, 0
        while True:
            while flying < num_clients and (ask := next(waiting, None)) is not None:
                self.add(ask, eos_ids=eos_ids)
                flying += 1
            if not flying:
                return time.perf_counter() - since, tokens
            outputs = self.step()
            tokens += len(outputs)
            flying -= sum(output.last for output in outputs)

    def seconds_to_first_token(self, ask: Ask) -> float:
        """Alone on the engine; the sequence runs to its end, so that what it leaves behind may be of use."""
        since = time.perf_counter()
        sequence = self.add(ask)
        while not sequence.output_ids:
            self.step()
        seconds = time.perf_counter() - since
        while not self.engine.idle:
            self.step()
        return seconds


def in_process_engine(
    base_model: str,
    adapters: SequenceOf[Path] = (),
    *,
    device: str = "cpu",
    dtype: str = "auto",
    quantization: str = "none",
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 512,
    max_prefill_tokens: int = 128,
    max_len: int = 1024,
    prefix_caching: bool = False,
) -> InProcessEngine:
    """The engine as the server builds it, but for prefixes: who asks the same again would only measure their reuse.

    Raises what ``load_base`` and ``read_manifest`` raise."""
    torch.set_num_threads(default_threads())
    base = load_base(
        base_model, name="base", device=device, dtype=dtype, max_model_len=max_len, quantization=quantization
    )
    num_slots = 2 * max_num_seqs if prefix_caching else max_num_seqs
    layout = KVLayout(tuple(base.shapes), max_len, base.kv_dtype)
    slots = SlotTable(num_slots, max_len=max_len, bytes_of=layout.bytes_of, reuses=prefix_caching)
    runner = ModelRunner.of(base, num_slots=num_slots)
    manifests = [read_manifest(path, base.signature, AdapterPolicy(256, 1 << 30)) for path in adapters]
    weights = {manifest.weights_digest: runner.prepare(manifest) for manifest in manifests}
    scheduler = Scheduler(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_prefill_tokens=max_prefill_tokens,
        max_model_len=max_len,
        slots=slots,
    )
    engine = Engine(scheduler, runner, Sampler(base.kernels.softmax_rows), Metrics())
    made = InProcessEngine(base, engine, runner, weights)
    made.hold(len(adapters))
    return made


class Stock:
    """transformers' own ``generate`` on the base: batches of requests of one length, all of which end together."""

    def __init__(self, base_model: str, *, device: torch.device, dtype: str) -> None:
        torch.set_num_threads(default_threads())
        loaded = stock_model(find_base(base_model), getattr(torch, dtype))
        self._model = torch.nn.Module.to(loaded, device=device)
        self._device = device

    def run(self, asks: SequenceOf[Ask], num_clients: int) -> float:
        """``num_clients`` at a time. Seconds."""
        since = time.perf_counter()
        for first in range(0, len(asks), num_clients):
            generate(self._model, asks[first : first + num_clients], self._device)
        return time.perf_counter() - since


class Peft:
    """PEFT's own model: one request after another with ``set_adapter``, or batches with ``adapter_names``."""

    def __init__(self, base_model: str, adapters: SequenceOf[Path], *, dtype: str, mixed: bool) -> None:
        torch.set_num_threads(default_threads())
        loaded = stock_model(find_base(base_model), getattr(torch, dtype))
        self._model = PeftModel.from_pretrained(loaded, adapters[0], adapter_name="0")
        for number, path in enumerate(adapters[1:], start=1):
            self._model.load_adapter(path, adapter_name=str(number))
        self._model.eval()
        self._mixed = mixed

    def run(self, asks: SequenceOf[Ask], num_clients: int) -> float:
        """In turn, or ``num_clients`` at a time; asks of a batch must be of one length. Seconds."""
        since = time.perf_counter()
        if self._mixed:
            for first in range(0, len(asks), num_clients):
                batch = asks[first : first + num_clients]
                names = ["__base__" if ask.adapter is None else str(ask.adapter) for ask in batch]
                generate(self._model, batch, _CPU, adapter_names=names)
        else:
            for ask in asks:
                assert ask.adapter is not None, "with set_adapter there is always one"
                self._model.set_adapter(str(ask.adapter))
                generate(self._model, [ask], _CPU)
        return time.perf_counter() - since


@torch.inference_mode()
def generate(model: Any, batch: SequenceOf[Ask], device: torch.device, **named: Any) -> None:
    """One greedy batch, waited for; all asks must be of one length."""
    lengths = {(len(ask.prompt_ids), ask.num_tokens) for ask in batch}
    assert len(lengths) == 1, "a batch of several lengths would need padding"
    assert all(ask.params.greedy for ask in batch), "sampling is compared within our engine alone"
    ids, num_tokens = torch.tensor([ask.prompt_ids for ask in batch], device=device), batch[0].num_tokens
    done = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
        **named,
    )
    assert done.cpu().shape[1] == ids.shape[1] + num_tokens
