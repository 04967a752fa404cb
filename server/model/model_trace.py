"""Traces which modules of a model compute every row of a batch by itself, so that adapters may change them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.adapters.content.signature import BaseSignature, Kind, ModuleShape

PROBE_ROWS = 13
"""No model has this many heads or experts, so that no other axis is mistaken for the rows."""


@dataclass
class ModelTrace:
    """Result of a probe: ``modules`` compute every row, ``others`` do not; ``tied`` heads share an embedding's weight;
    ``groups`` are linears called one after another with the same input."""

    modules: dict[str, ModuleShape] = field(default_factory=dict)
    others: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    vocab_size: int = 0


@contextmanager
def trace_modules(model: PreTrainedModel) -> Iterator[ModelTrace]:
    """Trace a forward pass of ``PROBE_ROWS`` rows: every module with parameters whose inputs and results are by row.

    The trace is complete when the context ends; modules may be replaced within it.
    """
    trace = ModelTrace()
    leaves = {name: module for name, module in model.named_modules() if _is_leaf(module)}
    weights = {name: module._parameters.get("weight") for name, module in leaves.items()}
    same = {name: id(weight) for name, weight in weights.items() if weight is not None}
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    trace.vocab_size = embeddings.num_embeddings
    calls: list[tuple[str, torch.Tensor]] = []
    handles = [
        module.register_forward_hook(_record(name, trace.modules, calls), with_kwargs=True)
        for name, module in leaves.items()
    ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
    trace.others = frozenset(leaves) - frozenset(trace.modules)
    trace.tied = _tied(same, trace.modules)
    trace.groups = _groups([(name, x) for name, x in calls if trace.modules[name].kind == "linear"])


def signature_of(name: str, fingerprint: str | None, trace: ModelTrace) -> BaseSignature:
    """The base's signature, which adapters must fit, from a trace."""
    return BaseSignature(
        name, fingerprint, trace.modules, vocab_size=trace.vocab_size, tied=trace.tied, others=trace.others
    )


def _groups(calls: Sequence[tuple[str, torch.Tensor]]) -> tuple[tuple[str, ...], ...]:
    """Linears that were called one after another with the same tensor."""
    runs = [tuple(name for name, _ in run) for _, run in groupby(calls, key=lambda call: id(call[1]))]
    return tuple(run for run in runs if len(run) > 1 and len(set(run)) == len(run))


def _is_leaf(module: nn.Module) -> bool:
    """Whether it has parameters, all of them its own."""
    num_own = len(list(module.parameters(recurse=False)))
    return num_own > 0 and num_own == len(list(module.parameters()))


def _tied(weights: Mapping[str, int], modules: Mapping[str, ModuleShape]) -> Mapping[str, str]:
    """Linears that share an embedding's weight -> that embedding; ``weights``: ``id`` of each weight."""
    embeddings = {weights[name]: name for name, shape in modules.items() if shape.kind == "embedding"}
    return {
        name: embeddings[weights[name]]
        for name, shape in modules.items()
        if shape.kind == "linear" and weights[name] in embeddings
    }


def _record(name: str, modules: dict[str, ModuleShape], calls: list[tuple[str, torch.Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        inputs = [value for value in (*args, *named.values()) if isinstance(value, torch.Tensor)]
        outputs = [value for value in results if isinstance(value, torch.Tensor)]
        axes = {_row_axis(tensor) for tensor in (*inputs, *outputs)}
        axis = axes.pop()
        if inputs and outputs and not axes and axis is not None:
            modules[name] = _shape_of(module, inputs[0], outputs[0], axis)
            calls.append((name, inputs[0]))

    return hook


def _row_axis(tensor: torch.Tensor) -> int | None:
    """The axis of the rows: [rows, ...], [1, rows, ...] or [1, heads, rows, ...]."""
    for axis, size in enumerate(tensor.shape[:3]):
        if size == PROBE_ROWS:
            return axis
    return None


def _shape_of(module: nn.Module, x: torch.Tensor, output: torch.Tensor, axis: int) -> ModuleShape:
    parameters = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    kind, size = _kind(module, x, output)
    return ModuleShape(
        kind,
        parameters,
        size,
        transposed=isinstance(module, Conv1D) or getattr(module, "is_transposed", False) is True,
        itemsize=next(module.parameters()).itemsize,
        axis=axis,
    )


def _kind(module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> tuple[Kind, tuple[int, int]]:
    if isinstance(module, nn.Linear | Conv1D) and x.shape[:-1].numel() == PROBE_ROWS:
        return "linear", (x.shape[-1], output.shape[-1])
    if isinstance(module, nn.Embedding) and _is_lookup(module, x, output):
        return "embedding", (module.num_embeddings, module.embedding_dim)
    return "rows", (0, 0)


def _is_lookup(module: nn.Embedding, ids: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether the result is the embedding's rows, times ``embed_scale`` if it has one, as PEFT assumes."""
    if ids.dtype not in (torch.int64, torch.int32) or ids.numel() != PROBE_ROWS:
        return False
    if int(ids.max()) >= module.num_embeddings:
        return False
    scale = torch.as_tensor(getattr(module, "embed_scale", 1.0), device=output.device).to(output.dtype)
    return scale.numel() == 1 and torch.allclose(F.embedding(ids, module.weight) * scale, output, rtol=1e-2)
