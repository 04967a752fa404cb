"""A scripted engine and a small real tokenizer, so that the HTTP side can be driven without a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from server.adapters.adapter_cache import AdapterCache, Loaded
from server.adapters.adapter_library import AdapterLibrary
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.content.manifest import Listing, Manifest
from server.adapters.content.peft_config import LoRAConfig
from server.adapters.content.plan import AdapterPlan
from server.adapters.reader import AdapterReader
from server.adapters.registry import Adapter, AdapterRegistry
from server.api.state import BaseSize, ServerState
from server.api.tracing import RequestTracer
from server.engine.async_engine import AsyncEngine, Reservation
from server.errors import EngineUnavailable, GenerationFailed, QueueFull, TooManySequences
from server.metrics import Metrics
from server.sequence import Doubles, FinishReason, LoRARequest, SampledToken, SamplingParams, StepOutput
from server.text.prompt import PromptRenderer

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
TEMPLATE = """\
{{- bos_token }}
{%- set roles = ['<|system|>', '<|user|>', '<|assistant|>', '<|tool|>'] %}
{%- for message in messages %}
{%- if '<|' + message.role + '|>' not in roles %}{{ raise_exception('no role ' + message.role) }}{% endif %}
{{- '<|' + message.role + '|>' + (message.content or '') + '<|end|>' }}
{%- for call in message.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
BASE = "micro"
TEXTS = ("hello there, how are you today?", "the cat sat on the mat", "été naïve", "東京は日本の首都", "👩‍👩‍👧 🎉🎉 🇩🇪")


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with few merges, so that many characters take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=list(SPECIAL[3:]),
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def encode(text: str) -> list[int]:
    """Token ids of a text, special tokens included."""
    return list(small_tokenizer()(text, add_special_tokens=False)["input_ids"])


EOS = encode("<|end|>")[0]


@dataclass
class Script:
    """What a sequence says: the tokens of ``text``, then its end by EOS, by length, or in a failure."""

    text: str = "hello there"
    ids: list[int] | None = None
    then: str = "stop"  # stop | length | fail | die | hang
    delay: float = 0.0

    def outputs(self, sequence_id: int, num_logprobs: int | None = None) -> Iterator[StepOutput]:
        """The steps of one sequence."""
        ids = encode(self.text) if self.ids is None else self.ids
        body, last = (ids[:-1], ids[-1]) if self.then == "length" else (ids, EOS)
        yield from (StepOutput(sequence_id, _sampled(token, num_logprobs)) for token in body)
        if self.then in ("stop", "length"):
            yield StepOutput(sequence_id, _sampled(last, num_logprobs), FinishReason(self.then))


def _sampled(token: int, num_logprobs: int | None) -> SampledToken:
    """A token whose log probability tells its id; likelier is the one before it, and all others are impossible."""
    if num_logprobs is None:
        return SampledToken(token)
    top = [(token - 1, -0.25), (token, -token / 8), *((token + n, -math.inf) for n in range(1, 20))]
    return SampledToken(token, -token / 8, tuple(top[:num_logprobs]))


@dataclass(eq=False)
class FakeSequence:
    """``SubmittedSequence`` by script, from a task of its own."""

    engine: FakeEngine
    script: Script
    sequence_id: int
    sink: Callable[[StepOutput | Exception], None]
    num_cached: int = 0
    num_logprobs: int | None = None
    closed: bool = False
    prompt: tuple[SampledToken, ...] = ()
    ends_with_prompt: bool = False
    embedding: Doubles | None = None
    output_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._play())

    async def _play(self) -> None:
        """The script's outputs, then its end."""
        for output in self._outputs():
            await asyncio.sleep(self.script.delay)
            if output.token is not None:
                self.output_ids.append(output.token.id)
            self.sink(output)
        if self.script.then == "fail":
            self.sink(GenerationFailed("cannot go on: /secret/path"))
        if self.script.then == "die":
            self.sink(EngineUnavailable("The engine died."))
        if self.script.then == "hang":
            self.engine.num_hanging += 1

    def _outputs(self) -> Iterator[StepOutput]:
        """The results of the prompt, in two chunks, if there are any; then the script's, unless it ends there."""
        if self.prompt:
            yield StepOutput(self.sequence_id, None, prompt=self.prompt[:1])
        if self.ends_with_prompt and self.script.then in ("stop", "length"):
            yield StepOutput(
                self.sequence_id, None, FinishReason.LENGTH, prompt=self.prompt[1:], embedding=self.embedding
            )
        if self.ends_with_prompt:
            return
        if self.prompt[1:]:
            yield StepOutput(self.sequence_id, None, prompt=self.prompt[1:])
        yield from self.script.outputs(self.sequence_id, self.num_logprobs)

    def close(self) -> None:
        self.closed = True
        self._task.cancel()


@dataclass(frozen=True)
class Submitted:
    """One call of ``submit``."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    adapters: tuple[LoRARequest, ...]
    eos_ids: frozenset[int]
    cache_namespace: bytes
    owner: str = ""


@dataclass(eq=False)
class FakeEngine:
    """``AsyncEngine`` without an engine: the i-th sequence plays ``scripts[i]``, the last script again and again."""

    scripts: list[Script] = field(default_factory=lambda: [Script()])
    alive: bool = True
    max_model_len: int = 256
    step_seconds: float = 0.0
    capacity: int = 64
    num_cached: int = 0
    submitted: list[Submitted] = field(default_factory=list)
    sequences: list[FakeSequence] = field(default_factory=list)
    num_hanging: int = 0
    max_unfinished: int = 288

    @property
    def num_open(self) -> int:
        """Streams nobody closed."""
        return sum(not sequence.closed for sequence in self.sequences)

    @contextlib.contextmanager
    def reserve(self, num_sequences: int, *, owner: str | None = None) -> Iterator[Reservation]:
        """As the real one."""
        self.check_capacity(num_sequences, owner=owner)
        yield Reservation(owner, num_sequences)

    def check_capacity(self, num_sequences: int, *, owner: str | None = None) -> None:
        """As the real one, without shares of owners."""
        if num_sequences > self.max_unfinished:
            raise TooManySequences(num_sequences, self.max_unfinished)
        if not self.alive:
            raise EngineUnavailable("The engine is not running.")
        if self.num_open + num_sequences > self.capacity:
            raise QueueFull(self.capacity)

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        sink: Callable[[StepOutput | Exception], None],
        params: SamplingParams,
        max_tokens: int,
        adapters: tuple[LoRARequest, ...],
        eos_ids: frozenset[int],
        cache_namespace: bytes = b"",
        owner: str = "",
    ) -> FakeSequence:
        """As the real one."""
        self.check_capacity(1)
        script = self.scripts[min(len(self.sequences), len(self.scripts) - 1)]
        self.submitted.append(
            Submitted(tuple(prompt_ids), params, max_tokens, adapters, eos_ids, cache_namespace, owner)
        )
        sequence = FakeSequence(self, script, len(self.sequences), sink, self.num_cached, params.num_logprobs)
        if params.num_prompt_logprobs is not None:
            tokens = [_sampled(token, params.num_prompt_logprobs) for token in [*prompt_ids][1:]]
            sequence.prompt = tuple(token._replace(rank=2) for token in tokens)
        if params.embedding:
            sequence.embedding = np.array([len(prompt_ids), *map(float, [*prompt_ids][:3])])
        sequence.ends_with_prompt = not max_tokens
        self.sequences.append(sequence)
        return sequence


def adapter(name: str, **defaults: object) -> Adapter:
    """An adapter that exists only by name."""
    return adapter_with(name, GenerationDefaults(**defaults))  # type: ignore[arg-type]


def adapter_with(name: str, defaults: GenerationDefaults) -> Adapter:
    """An adapter that exists only by name, with these generation defaults."""
    config, path = LoRAConfig(r=8, alpha=8), Path("/adapters") / name
    listing = Listing(name, path, config, None, defaults, AdapterPlan({}), 1_700_000_000, {}, "shapes", None)
    return Adapter(listing, weights_digest=f"{name}-weights", version_digest=f"{name}-version".ljust(64, "0"))


@dataclass
class FakeReader:
    """``AdapterReader`` without folders: every adapter's bytes are where they were."""

    registry: AdapterRegistry

    async def manifest(self, path: Path, state: object, name: str) -> Manifest:
        """What names the current version."""
        current = self.registry.get(name).current
        assert current is not None
        return cast(Manifest, current)

    async def find_kept(self, name: str, prefix: str) -> list[str]:
        """None."""
        return []


def library(*adapters: Adapter) -> AdapterLibrary:
    """A library of these adapters, whose weights load at once."""

    async def load(manifest: Manifest) -> Loaded:
        return Loaded(1.0, 1000)

    metrics, registry = Metrics(), AdapterRegistry()
    for each in adapters:
        registry.publish(each, ())
    reader = cast(AdapterReader, FakeReader(registry))
    cache = AdapterCache(1_000_000, unload=lambda digest: None, is_wanted=registry.is_wanted)
    return AdapterLibrary(registry, cache, reader, load, base_names=(BASE,), metrics=metrics)


def server_state(
    engine: FakeEngine,
    *adapters: Adapter,
    base_defaults: GenerationDefaults | None = None,
    tracer: RequestTracer | None = None,
    strict_fields: bool = False,
) -> ServerState:
    """A server over a fake engine."""
    served = library(*adapters)
    return ServerState(
        created=1_700_000_000,
        prompts=PromptRenderer(small_tokenizer()),
        engine=cast(AsyncEngine, engine),
        adapters=served,
        metrics=served.metrics,
        default_max_tokens=64,
        eos_ids=frozenset({EOS}),
        version="0.0.test",
        computation="sha256:base cpu",
        base_size=BaseSize(11_000_000, 44_000_000, hidden_size=4, number_format="float32"),
        tracer=tracer,
        strict_fields=strict_fields,
        base_defaults=base_defaults or GenerationDefaults(),
    )


def ask(app: FastAPI, method: str, url: str, **how: Any) -> httpx.Response:
    """One request, through ASGI, on an event loop of its own."""

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, url, **how)

    return asyncio.run(send())


def events(response: httpx.Response) -> list[Any]:
    """The data of each event of a stream; ``[DONE]`` as it is."""
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    return [line if line == "[DONE]" else json.loads(line) for line in data]
