"""Quantizes a base's linears during a probe, so that its weights are never all in memory.

The weight of a linear is read when the probe reaches it, and quantized together with those of the linears that receive
the same input; then its memory is released. Head and embedding, as large as many layers, are read piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from base_files.deferred_weights import ReadableWeights, row_slices
from cpu_kernels.int8_weights import Int8Rows, Outliers
from cpu_kernels.kernels import Kernels
from server.model.mapped_files import MappedFiles, trim
from server.model.patches import ModelPatches
from server.model.routers import compute_routers_by_row, router_linears
from server.quantization.int8_experts import (
    WEIGHTS,
    FloatExperts,
    Int8Experts,
    ReadExpert,
    follow_convention,
    num_experts,
    out_in,
)
from server.quantization.int8_modules import (
    FusedLinear,
    Int8Embedding,
    Int8Linear,
    WeightDigest,
    join_biases,
)
from server.quantization.outliers import find_outliers

IN_MEMORY: ReadableWeights = MappedFiles(())
"""Weights that are in memory and stay there."""
SMALLEST_SIDE = 32
"""Linears with fewer inputs or outputs are not quantized: routers and gates are cheap, and sensitive to errors."""


@dataclass
class Quantized:
    """Counts of a quantized base: its parameters, int8 linears and experts and their bytes, and outlier channels.

    ``mixtures`` names the modules of experts; ``unquantized`` has the bytes of each parameter that stayed in floats.
    """

    kernel: str
    num_parameters: int
    num_linears: int = 0
    num_experts: int = 0
    mixtures: list[str] = field(default_factory=list)
    num_bytes: int = 0
    num_outliers: int = 0
    unquantized: dict[str, int] = field(default_factory=dict)


OutlierInputs = Mapping[str, torch.Tensor | None]
"""Indices of the outlier channels, by linear; None if it has none."""


def quantizable(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linears that are to be quantized."""
    linears = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    routers = router_linears(model, mixtures(model))
    return {
        name: linear
        for name, linear in linears.items()
        if min(linear.get_parameter("weight").shape) >= SMALLEST_SIDE and linear not in routers
    }


def mixtures(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules of experts that are to be quantized."""
    return {
        name: module
        for name, module in model.named_modules()
        if follow_convention(module)
        and all(min(module.get_parameter(weight).shape[1:]) >= SMALLEST_SIDE for weight in WEIGHTS)
    }


def num_int8_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights after quantization, with their scales; a head has its own, also where it is tied."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    quantized = [linear.get_parameter("weight") for linear in quantizable(model).values()]
    quantized += [experts.get_parameter(name) for experts in mixtures(model).values() for name in WEIGHTS]
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and _is_lookup(embedding):
        quantized.append(embedding.get_parameter("weight"))
    total -= sum(weight.nbytes for weight in set(quantized))
    return total + sum(weight.numel() + 4 * weight.numel() // weight.shape[-1] for weight in quantized)


@contextmanager
def collect_outliers(
    model: PreTrainedModel, weights: ReadableWeights = IN_MEMORY
) -> Iterator[dict[str, torch.Tensor | None]]:
    """Collect the outlier channels of each linear and of experts during a forward pass; the model is not changed.

    Each of ``weights`` is released when it was used. The head computes no logits: those of many rows would be as large
    as the model.
    """
    found: dict[str, torch.Tensor | None] = {}
    last_input: torch.Tensor | None = None
    last_outliers: torch.Tensor | None = None

    def collect(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal last_input, last_outliers
            if args[0] is not last_input:  # linears with the same input share its outliers
                last_input = args[0]
                last_outliers = find_outliers(args[0])
            found[name] = last_outliers

        return hook

    def release(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            weights.release(parameter)

    handles = [module.register_forward_hook(collect(name)) for name, module in quantizable(model).items()]
    handles += [module.register_forward_hook(release) for module in model.modules()]
    head = model.get_output_embeddings()
    handles += _holding(model, weights, apart=(head, *mixtures(model).values()))
    with weights.one_pass("measuring outlier channels"), ModelPatches() as temporary:
        for handle in handles:
            temporary.on_undo(handle.remove)
        if head is not None:
            temporary.set_attribute(head, "forward", lambda x: x[..., :1])
        for name, experts in mixtures(model).items():
            temporary.set_attribute(experts, "forward", _watched(experts, weights, partial(found.__setitem__, name)))
        yield found


def _watched(
    experts: nn.Module, weights: ReadableWeights, note: Callable[[torch.Tensor | None], None]
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A forward that notes the outlier channels of the experts' input, and reads one expert after another."""
    compute = FloatExperts(experts, _reader(experts, weights))

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        note(find_outliers(hidden_states))
        return compute(hidden_states, top_k_index, top_k_weights)

    return forward


def _reader(experts: nn.Module, weights: ReadableWeights) -> ReadExpert:
    """Copies one expert's weight, whose memory is released."""

    def read(name: str, expert: int) -> torch.Tensor:
        stock = experts.get_parameter(name)[expert : expert + 1]
        weight = torch.empty(out_in(experts, stock[0]).shape, dtype=stock.dtype)
        for piece in weights.pieces(stock):
            weight.copy_(out_in(experts, piece[0]))
        return weight

    return read


@contextmanager
def quantizing(
    model: PreTrainedModel,
    kernels: Kernels,
    dtype: torch.dtype,
    *,
    patches: ModelPatches,
    weights: ReadableWeights = IN_MEMORY,
    outliers: OutlierInputs = MappingProxyType({}),
) -> Iterator[Quantized]:
    """Quantize linears and experts as a forward pass reaches them.

    Unquantized parameters are converted to ``dtype`` at the end. Undoing ``patches`` restores the stock modules, but
    with weights of None, so that a call raises: the stock weights are in no memory any more. Each of ``weights`` is
    released when it is quantized. Modules that are not in ``outliers`` get the outliers that the pass shows.
    """
    patches.begin("int8 weights")
    quantizer = _Quantizer(model, kernels, weights, outliers, patches)
    handles = [module.register_forward_hook(quantizer.note(name)) for name, module in quantizable(model).items()]
    head = model.get_output_embeddings()
    in_pieces = (head,) if type(head) is nn.Linear else ()
    handles += _holding(model, weights, apart=(*in_pieces, *quantizer.mixtures.values()))
    with weights.one_pass("quantizing weights"):
        with ModelPatches() as temporary:
            for handle in handles:
                temporary.on_undo(handle.remove)
            if type(head) is nn.Linear:
                temporary.set_attribute(head, "forward", quantizer.in_pieces(head))
            for name, experts in quantizer.mixtures.items():
                temporary.set_attribute(experts, "forward", quantizer.quantizing_experts(name, experts))
            yield quantizer.result
        quantizer.finish(dtype)


def _holding(
    model: PreTrainedModel, weights: ReadableWeights, *, apart: Collection[nn.Module | None]
) -> list[RemovableHandle]:
    """Hooks that read the weights of each module before it is called; of an embedding only the rows of its tokens."""

    def hold(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding) and _is_lookup(module):
            for token in args[0].unique().tolist():
                weights.hold(module.weight[token : token + 1])
        else:
            for parameter in module.parameters(recurse=False):
                weights.hold(parameter)

    return [module.register_forward_pre_hook(hold) for module in model.modules() if module not in apart]


def _is_lookup(embedding: nn.Embedding) -> bool:
    """Whether it returns its rows, times ``embed_scale`` if it has one."""
    return type(embedding).forward is nn.Embedding.forward or hasattr(embedding, "embed_scale")


def _copied(parameter: nn.Parameter, dtype: torch.dtype, weights: ReadableWeights) -> torch.Tensor:
    """The parameter in memory of its own."""
    if parameter.ndim < 2:
        return parameter.data.to(dtype, copy=True)
    copy = torch.empty_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
    for rows, piece in zip(row_slices(parameter), weights.pieces(parameter.data), strict=True):
        copy[rows] = piece
    return copy


class _Quantizer:
    """Collects linears that receive the same input, and packs them when the next input comes."""

    def __init__(
        self,
        model: PreTrainedModel,
        kernels: Kernels,
        weights: ReadableWeights,
        known: OutlierInputs,
        patches: ModelPatches,
    ) -> None:
        self._model, self._kernels, self._weights, self._known = model, kernels, weights, known
        self._patches = patches
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)
        self._embedding = model.get_input_embeddings()
        self._embedded: tuple[WeightDigest, Int8Rows] | None = None
        self._input: torch.Tensor | None = None
        self._outliers: torch.Tensor | None = None
        self._same_input: list[nn.Module] = []
        self.mixtures = mixtures(model)
        self._packed_experts: list[tuple[nn.Module, Int8Experts]] = []
        assert kernels.linear_name is not None
        self.result = Quantized(kernels.linear_name, sum(parameter.numel() for parameter in model.parameters()))

    def note(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """A hook for a linear, which is packed together with adjacent ones of the same input."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args[0] is not self._input:
                self._pack()
                self._input = args[0]
                self._outliers = self._known[name] if name in self._known else find_outliers(args[0])
            is_packed = module._parameters["weight"] is None
            if not is_packed and all(module is not waiting for waiting in self._same_input):
                self._same_input.append(module)

        return hook

    def in_pieces(self, head: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        """A forward for the head that reads its weight, as large as many layers, piece by piece."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            parts = []
            for piece in self._weights.pieces(head.weight):
                parts.append(F.linear(x, piece))
            y = torch.cat(parts, dim=-1)
            return y if head.bias is None else y + head.bias

        return forward

    def quantizing_experts(
        self, name: str, experts: nn.Module
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """A forward for experts that quantizes all of them, and computes with the integers."""

        def forward(
            hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            outliers = self._known[name] if name in self._known else find_outliers(hidden_states)
            int8 = Int8Experts.of(experts, _reader(experts, self._weights), self._kernels, outliers)
            trim()
            self._packed_experts.append((experts, int8))  # replaced later: hooks of this call want the stock module
            self.result.mixtures.append(name)
            self.result.num_outliers += 0 if outliers is None else len(outliers)
            return int8.forward(hidden_states, top_k_index, top_k_weights)

        return forward

    def finish(self, dtype: torch.dtype) -> None:
        """Pack the last linears and the embedding, and copy unquantized parameters into memory of their own."""
        self._pack()
        self._input = None
        self._replace_experts()
        compute_routers_by_row(self._model, self.mixtures, self._patches)
        self._quantize_embedding(dtype)
        for name, parameter in self._model.named_parameters():
            if parameter.is_floating_point():
                parameter.data = _copied(parameter, dtype, self._weights)
            self.result.unquantized[name] = parameter.nbytes
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16):
                    module._buffers[name] = buffer.to(dtype)
        trim()

    def _pack(self) -> None:
        """Quantize the linears that received the same input into one packed weight."""
        self._replace_experts()
        if not self._same_input:
            return
        modules = self._same_input
        weights = [module.get_parameter("weight") for module in modules]
        read = self._weights.pieces
        originals = [WeightDigest.of(weight, read=read) for weight in weights]
        out_in = [w.t() if isinstance(m, Conv1D) else w for w, m in zip(weights, modules, strict=True)]
        rows = Int8Rows.of(out_in, qmax=self._kernels.qmax, read=read)
        if weights[0] is self._embedding._parameters.get("weight"):
            self._embedded = originals[0], rows
        biases = [module._parameters.get("bias") for module in modules]
        outliers = None if self._outliers is None else Outliers.of(self._outliers, out_in, read=read)
        for weight in weights:
            self._weights.release(weight)
        sizes = [len(weight) for weight in out_in]
        fused = FusedLinear(self._kernels.linear(rows, join_biases(sizes, biases), outliers), sizes)
        for number, (module, original) in enumerate(zip(modules, originals, strict=True)):
            self._replace(module, Int8Linear(module, original, fused, number))
        self.result.num_linears += len(modules)
        self.result.num_outliers += 0 if outliers is None else len(outliers.indices)
        self.result.num_bytes += rows.integers.nbytes
        self._same_input = []

    def _quantize_embedding(self, dtype: torch.dtype) -> None:
        """The rows of the head where it shares the embedding's weight; its own where not."""
        stock = self._embedding
        if not (isinstance(stock, nn.Embedding) and _is_lookup(stock)):
            return
        original, rows = self._embedded or (
            WeightDigest.of(stock.weight, read=self._weights.pieces),
            Int8Rows.of([stock.weight], read=self._weights.pieces),
        )
        self._replace(stock, Int8Embedding(stock, original, rows, dtype))
        self.result.num_bytes += rows.integers.nbytes

    def _replace_experts(self) -> None:
        """Put packed experts into the places of the stock ones."""
        for stock, int8 in self._packed_experts:
            self.result.num_experts += num_experts(stock)
            self.result.num_bytes += sum(stock.get_parameter(name).numel() for name in WEIGHTS)
            self._replace(stock, int8, WEIGHTS)
        self._packed_experts = []

    def _replace(self, stock: nn.Module, module: nn.Module, weights: Sequence[str] = ("weight",)) -> None:
        """Replace a module under each of its names, and free its weights, which the patches would keep in memory.

        A weight becomes None: torch computes with a ``meta`` tensor from memory that was never written.
        """
        for name in self._names[stock]:
            self._patches.replace(self._model, name, module)
        for name in weights:
            stock._parameters[name] = None
