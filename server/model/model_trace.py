"""Which modules of a model see every row of a batch, each row by itself, so that adapters may touch them."""

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
"""A number that is no model's count of heads or experts, so that no other axis is taken for the rows."""


@dataclass
class ModelTrace:
    """What a probe saw: modules that see every row; those that do not; heads that share an embedding's weight; linears
    that get the same input, one after another."""

    modules: dict[str, ModuleShape] = field(default_factory=dict)
    others: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    vocab_size: int = 0


@contextmanager
def trace_modules(model: PreTrainedModel) -> Iterator[ModelTrace]:
    """While a batch of ``PROBE_ROWS`` runs, note every module with parameters whose inputs and results are by row.

    What it says is whole at the end; modules may be replaced meanwhile.
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
        module.register_forward_hook(_note(name, trace.modules, calls), with_kwargs=True)
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


def signature_of(name: str, fingerprint: str, trace: ModelTrace) -> BaseSignature:
    """What an adapter must fit, from the shapes in the trace of a probe."""
    return BaseSignature(
        name, fingerprint, trace.modules, vocab_size=trace.vocab_size, tied=trace.tied, others=trace.others
    )


def _groups(calls: Sequence[tuple[str, torch.Tensor]]) -> tuple[tuple[str, ...], ...]:
    """Names of linears that were called with the very same tensor, one after another."""
    runs = [tuple(name for name, _ in run) for _, run in groupby(calls, key=lambda call: id(call[1]))]
    return tuple(run for run in runs if len(run) > 1 and len(set(run)) == len(run))


def _is_leaf(module: nn.Module) -> bool:
    """Whether it has parameters, all of them its own."""
    own = sum(1 for _ in module.parameters(recurse=False))
    return own > 0 and own == sum(1 for _ in module.parameters())


def _tied(weights: Mapping[str, int], modules: Mapping[str, ModuleShape]) -> Mapping[str, str]:
    """Linears that hold an embedding's weight as theirs, with the embedding; ``weights`` are identities."""
    embeddings = {weights[name]: name for name, shape in modules.items() if shape.kind == "embedding"}
    return {
        name: embeddings[weights[name]]
        for name, shape in modules.items()
        if shape.kind == "linear" and weights[name] in embeddings
    }


def _note(name: str, seen: dict[str, ModuleShape], calls: list[tuple[str, torch.Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        inputs = [one for one in (*args, *named.values()) if isinstance(one, torch.Tensor)]
        outputs = [one for one in (output if isinstance(output, tuple) else (output,)) if isinstance(one, torch.Tensor)]
        axes = {_axis(one) for one in (*inputs, *outputs)}
        axis = axes.pop()
        if inputs and outputs and not axes and axis is not None:
            seen[name] = _shape_of(module, inputs[0], outputs[0], axis)
            calls.append((name, inputs[0]))

    return hook


def _axis(tensor: torch.Tensor) -> int | None:
    """Where the rows are: [rows, ...], [1, rows, ...] or [1, heads, rows, ...]."""
    shape = tensor.shape
    return next((axis for axis in range(min(3, len(shape))) if shape[axis] == PROBE_ROWS), None)


def _shape_of(module: nn.Module, first: torch.Tensor, output: torch.Tensor, axis: int) -> ModuleShape:
    parameters = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    kind, size = _kind(module, first, output)
    return ModuleShape(
        kind,
        parameters,
        size,
        transposed=isinstance(module, Conv1D) or getattr(module, "is_transposed", False) is True,
        itemsize=next(module.parameters()).itemsize,
        axis=axis,
    )


def _kind(module: nn.Module, first: torch.Tensor, output: torch.Tensor) -> tuple[Kind, tuple[int, int]]:
    if isinstance(module, nn.Linear | Conv1D) and first.shape[:-1].numel() == PROBE_ROWS:
        return "linear", (first.shape[-1], output.shape[-1])
    if isinstance(module, nn.Embedding) and _looks_up(module, first, output):
        return "embedding", (module.num_embeddings, module.embedding_dim)
    return "rows", (0, 0)


def _looks_up(module: nn.Embedding, ids: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether the result is the rows of the ids, times ``embed_scale`` where there is one, as PEFT takes it."""
    if ids.dtype not in (torch.int64, torch.int32) or ids.numel() != PROBE_ROWS:
        return False
    if int(ids.max()) >= module.num_embeddings:
        return False
    scale = torch.as_tensor(getattr(module, "embed_scale", 1.0), device=output.device).to(output.dtype)
    return scale.numel() == 1 and torch.allclose(F.embedding(ids, module.weight) * scale, output, rtol=1e-2)
