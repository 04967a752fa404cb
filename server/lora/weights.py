"""An adapter's weights: from the bytes of its file to the tensors of each module. Base modules are only read.

Each torch operation here releases the GIL to the engine thread and waits for it again, so that under load the time of a
load is proportional to their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import nn

from base_files.safetensors_header import TensorEntry
from server.adapters.content.manifest import Manifest
from server.adapters.content.module_plan import LowRank, ModulePlan, TokenRows, num_experts
from server.adapters.content.signature import ModuleShape
from server.errors import AdapterRejected
from server.lora.delta import AddsParameterDeltas, LoRADelta, ParameterDelta, TokenEmbeddings, dequantized
from server.module_proxy import with_parameters

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_NUMBERS = 1 << 22


@dataclass(frozen=True, eq=False)
class FusedA:
    """The A of several modules in one tensor: ``a`` [in, rank of all]; ``columns`` are those of each module."""

    a: torch.Tensor
    columns: Mapping[str, slice]


@dataclass(frozen=True)
class LoRAWeights:
    """An adapter's change of each module. ``delta_norm`` is the Frobenius norm of all differences from the base.

    ``fused`` has the A of modules that receive the same tensor; the A in their deltas are views of it.
    """

    deltas: Mapping[str, LoRADelta]
    delta_norm: float = 0.0
    fused: Sequence[FusedA] = ()

    @classmethod
    @torch.inference_mode()
    def of(cls, manifest: Manifest, base_modules: Mapping[str, nn.Module]) -> LoRAWeights:
        """Tensors from the manifest's bytes, on the base's device; for any thread.

        Raises ``AdapterRejected`` if they change nothing, or overflow with their scaling.
        """
        preparation = _Preparation(manifest.data)
        prepared = {
            module: preparation.delta(part, base_modules[module]) for module, part in manifest.plan.parts.items()
        }
        deltas = {module: delta for module, delta in prepared.items() if delta is not None}
        norm = math.sqrt(preparation.squares) if preparation.squares >= 0 else math.nan
        for module, delta in deltas.items():
            if not math.isfinite(norm) or not (delta.plain or delta.finite):  # a finite norm covers plain deltas
                raise AdapterRejected(manifest.name, f"the weights of {module} are too large to compute with")
        if not deltas:
            raise AdapterRejected(manifest.name, "all its deltas are zero, so it would change nothing: was it trained?")
        return cls(deltas, norm)

    @property
    def num_bytes(self) -> int:
        return num_held_bytes(tensor for delta in self.deltas.values() for tensor in delta.tensors())

    @property
    def composable(self) -> bool:
        """Whether all changes are plain low-rank deltas, which can be scaled and added."""
        return all(delta.plain for delta in self.deltas.values())


def num_held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages; a shared storage counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class QuantizedFrom(Protocol):
    """The stock weight of a quantized module."""

    def equals(self, weight: torch.Tensor) -> bool: ...


class _Preparation:
    """Reads the tensors of one file; modules may share them. ``squares`` sums the squared differences from the base."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._tokens: dict[str, TokenEmbeddings] = {}
        self._own: dict[str, torch.Tensor] = {}
        self.squares = 0.0

    def delta(self, part: ModulePlan, base: nn.Module) -> LoRADelta | None:
        """A module's change, None if it changes nothing."""
        before = self.squares
        if _needs_floats(part, base):
            original = getattr(base, "original", None)
            base = dequantized(base)
        else:
            original = None
        own = self._own_parameters(part, base, original)
        bias = own.pop("bias", None) if part.shape.kind == "linear" and "weight" not in own else None
        replaced = with_parameters(base, own) if own or part.parameters else None
        a, b = (None, None) if part.low_rank is None else self._low_rank(part.low_rank, base)
        scale = self._dora_scale(part, replaced or base, a, b)
        delta = LoRADelta(
            kind=part.shape.kind,
            a=a,
            b=b if b is None or scale is None else b * scale,
            scale=scale,
            shift=self._shift(part, replaced or base, bias, scale) if part.shape.kind == "linear" else None,
            own=replaced,
            own_names=tuple(own),
            tokens=None if part.tokens is None else self._token_embeddings(part.tokens, base),
            parameters={name: self._parameter(plan, name, part.shape, base) for name, plan in part.parameters.items()},
            embed_scale=float(getattr(base, "embed_scale", 1.0)) if part.shape.kind == "embedding" else 1.0,
            axis=part.shape.axis,
        )
        return delta if self.squares > before or _changes_something(delta) else None

    def _own_parameters(
        self, part: ModulePlan, base: nn.Module, original: QuantizedFrom | None
    ) -> dict[str, torch.Tensor]:
        """Whole parameters that differ from the base's, in the base's dtype.

        PEFT also saves unchanged ones; ``original`` recognizes those of a quantized base.
        """
        found = {}
        for name, entry in part.own.items():
            stock = base.get_parameter(name)
            if entry.name not in self._own:
                self._own[entry.name] = self._read(entry, stock)
            own = self._own[entry.name]
            if original is not None and name == "weight":
                is_unchanged = original.equals(own)
            else:
                is_unchanged = torch.equal(own, stock)
            if not is_unchanged:
                found[name] = own
                self.squares += float((own.float() - stock.float()).square().sum())
        return found

    def _low_rank(self, plan: LowRank, base: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """a [in, rank], a transposed view, which is faster for few rows, and b [rank, out] with the scaling."""
        a, b = self._read(plan.a, _like(base)), self._read(plan.b, _like(base))
        left, right = (b, a) if plan.swapped else (a.t(), b.t())
        right = right.contiguous() * plan.scaling
        self.squares += _square(left, right)
        return left, right

    def _dora_scale(
        self, part: ModulePlan, module: nn.Module, a: torch.Tensor | None, b: torch.Tensor | None
    ) -> torch.Tensor | None:
        """DoRA's magnitude divided by the norm of each output's weights [out] (Liu et al. 2024, equation 5)."""
        if part.magnitude is None or a is None or b is None:
            return None
        norm = _weight_norm(module.get_parameter("weight"), a, b, in_out=part.shape.weight_is_in_out)
        return self._read(part.magnitude, _like(module)) / norm

    def _shift(
        self, part: ModulePlan, module: nn.Module, bias: torch.Tensor | None, scale: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The change of a linear's bias [out]; DoRA does not scale it."""
        if not part.shifted:
            return None
        shift = _like(module).new_zeros(part.shape.size[1])
        stock_bias = module._parameters.get("bias")
        if stock_bias is not None:
            new_bias = stock_bias if bias is None else bias
            shift += new_bias.float() - stock_bias.float() * (1.0 if scale is None else scale)
        if part.lora_bias is not None and part.low_rank is not None:
            added = self._read(part.lora_bias, shift) * part.low_rank.scaling
            self.squares += float(added.square().sum())
            shift += added
        return shift if shift.any() else None

    def _token_embeddings(self, tokens: TokenRows, base: nn.Module) -> TokenEmbeddings:
        if tokens.rows.name not in self._tokens:
            indices = torch.tensor(tokens.indices, device=_like(base).device)
            order = indices.argsort()
            rows = self._read(tokens.rows, _like(base))[order]
            old = base.get_parameter("weight")[indices[order]].float()
            self.squares += float((rows - old).square().sum())
            self._tokens[tokens.rows.name] = TokenEmbeddings(indices[order], rows)
        return self._tokens[tokens.rows.name]

    def _parameter(self, plan: LowRank, name: str, shape: ModuleShape, base: nn.Module) -> ParameterDelta:
        """PEFT's A [experts * rank, in] and B [out, rank * experts] as factors of the parameter's layout."""
        num_dimensions, experts = len(shape.parameters[name]), num_experts(shape, name)
        a = self._read(plan.a, _like(base)).view(experts, plan.rank, -1)
        b = self._read(plan.b, _like(base)).view(-1, plan.rank, experts).permute(2, 0, 1)  # [experts, out, rank]
        left, right = (a.mT, b.mT) if shape.transposed and num_dimensions == 3 else (b, a)
        left = left * plan.scaling
        self.squares += _square(left, right)
        if num_dimensions == 2:
            left, right = left[0], right[0]
        parameter = base._parameters.get(name)
        dtype = torch.float32 if parameter is None else parameter.dtype
        return ParameterDelta(left.to(dtype).contiguous(), right.to(dtype).contiguous())

    def _read(self, entry: TensorEntry, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the file, with dtype and device of ``like``."""
        copy = bytearray(memoryview(self._data)[entry.begin : entry.end])
        return torch.frombuffer(copy, dtype=_DTYPES[entry.dtype]).view(entry.shape).to(like.device, like.dtype)


def _needs_floats(part: ModulePlan, base: nn.Module) -> bool:
    """Whether a module's change is computed with its whole weights, which are dequantized for it where necessary.

    Quantized experts add low-rank deltas of their weights to the products, and have biases in floats.
    """
    if isinstance(base, AddsParameterDeltas):
        return any(base._parameters.get(name) is None for name in part.own)
    return bool(part.own or part.parameters or part.magnitude or part.tokens)


def _like(module: nn.Module) -> torch.Tensor:
    """An empty float32 tensor on the module's device; quantized modules are on the CPU."""
    parameter = next(module.parameters(), None)
    return _float32_on(torch.device("cpu") if parameter is None else parameter.device)


@cache
def _float32_on(device: torch.device) -> torch.Tensor:
    return torch.empty(0, device=device)


def _square(left: torch.Tensor, right: torch.Tensor) -> float:
    """The sum of the squares of ``left @ right`` [..., x, rank] and [..., rank, y], from two small matrices."""
    total = float(((left.mT @ left) * (right @ right.mT)).sum())
    return 0.0 if total < 0 else total  # NaN stays


def _changes_something(delta: LoRADelta) -> bool:
    pairs = [(delta.a, delta.b), *((change.left, change.right) for change in delta.parameters.values())]
    return (
        any(a is not None and b is not None and bool(a.any()) and bool(b.any()) for a, b in pairs)
        or delta.shift is not None
        or bool(delta.own_names)
        or delta.tokens is not None
        or (delta.scale is not None and not torch.allclose(delta.scale, torch.ones_like(delta.scale), atol=1e-6))
    )


def _weight_norm(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, in_out: bool) -> torch.Tensor:
    """DoRA's norm of each output's column of ``W + a @ b`` [out], in float32 and in chunks.

    ``weight`` is [out, in], or [in, out] with ``in_out``; a [in, rank], b [rank, out] with the scaling.
    """
    if not in_out:
        rows = _chunks(weight, b.t())
        return torch.cat([torch.linalg.vector_norm(w.float() + part @ a.t(), dim=1) for w, part in rows])
    squares = torch.zeros(weight.shape[1], device=weight.device)
    for w, part in _chunks(weight, a):
        squares += (w.float() + part @ b).square().sum(0)
    return squares.sqrt()


def _chunks(weight: torch.Tensor, factor: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of weight and factor, a few million numbers of the weight at a time."""
    size = max(1, _CHUNK_NUMBERS // weight.shape[1])
    return list(zip(weight.split(size), factor.split(size), strict=True))
