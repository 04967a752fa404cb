"""Where a step's time goes, by kind, measured by timers around the model's modules and the engine's stages.

Each timer knows what ran inside it, and keeps only what was its own: a linear inside an adapter's layer is a linear's
time, the rest of that layer is the adapter's. What no timer claims (residual additions, activations written as
functions, rotary embeddings) stays with the module around it and is *elementwise*. Timers cost time themselves, so a
step is also timed without them. Layers that would be played as one call are computed operation by operation meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter as clock
from typing import Any

from torch import nn

from benchmarks.parts.engines import InProcessEngine
from server.lora import module_bypass
from server.lora.layer import AdaptedModule
from server.model.attention.interface import FlatAttention
from server.quantization.int8_modules import Int8Linear

KINDS = ("linears", "LoRA", "attention", "norms", "elementwise", "embedding", "head", "sampling", "scheduling", "rest")


class Stack:
    """Nested timers; ``own`` is each kind's time without that of what ran inside."""

    def __init__(self) -> None:
        self.own: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, float, float]] = []  # kind, since, seconds inside it

    def enter(self, kind: str) -> None:
        self._open.append((kind, clock(), 0.0))

    def leave(self) -> None:
        kind, since, inside = self._open.pop()
        whole = clock() - since
        self.own[kind] += whole - inside
        if self._open:
            outer, began, within = self._open[-1]
            self._open[-1] = (outer, began, within + whole)

    def around(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*inputs: Any, **named: Any) -> Any:
            self.enter(kind)
            try:
                return call(*inputs, **named)
            finally:
                self.leave()

        return timed


def kind_of(module: nn.Module, *, head: nn.Module | None) -> str:
    """What a module counts as; adapters' layers by where their code is, the others by what they are called."""
    name = type(module).__name__.lower()
    if getattr(module, "base", module) is head:
        return "head"
    if type(module).__module__.startswith("server.lora"):
        return "LoRA"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "linear" in name or "conv1d" in name:
        return "linears"
    return "norms" if "norm" in name else "elementwise"


@contextmanager
def timing(engine: InProcessEngine, stack: Stack) -> Iterator[None]:
    """While it lasts, every module and stage of the engine is timed, and no layer graph is replayed."""
    graphs, engine.runner.graphs = engine.runner.graphs, None
    module_bypass.remove(engine.base.model)
    head = engine.base.model.get_output_embeddings()
    head = getattr(head, "base", head)
    handles = []
    for module in engine.base.model.modules():
        kind = kind_of(module, head=head)
        handles.append(module.register_forward_pre_hook(lambda *_, kind=kind: stack.enter(kind)))
        handles.append(module.register_forward_hook(lambda *_: stack.leave()))
    layers = [module for module in engine.base.model.modules() if isinstance(module, AdaptedModule)]
    scheduler, sampler, runner = engine.engine.scheduler, engine.engine.sampler, engine.runner
    stages = (
        (scheduler, "schedule", "scheduling"),
        (scheduler, "update", "scheduling"),
        (sampler, "sample", "sampling"),
        (runner, "run", "rest"),
        (runner.bank, "begin_sorted", "LoRA"),
        (FlatAttention, "__call__", "attention"),
        (Int8Linear, "gated", "linears"),
        # an adapter's layer calls the base's linear past its hooks
        *((layer, "_compute", kind_of(layer.base, head=head)) for layer in layers),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in stages]
    for (owner, name, kind), (_, _, call) in zip(stages, before, strict=True):
        setattr(owner, name, stack.around(kind, call))
    try:
        yield
    finally:
        engine.runner.graphs = graphs
        for handle in handles:
            handle.remove()
        module_bypass.install(engine.base.model)
        for owner, name, call in before:
            if isinstance(owner, type) or name == "_compute":
                setattr(owner, name, call)
            else:
                delattr(owner, name)
