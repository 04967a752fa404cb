"""One adapter's weights: from the bytes of its file to the tensors of each module. Base modules are only read.

Every operation of torch here hands the interpreter to the engine's thread and must wait to get it back, so that under
load their number is the time a load takes.
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
from server.lora.delta import LoRADelta, ParameterDelta, TokenEmbeddings, in_floats, with_parameters

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_NUMBERS = 1 << 22


@dataclass(frozen=True, eq=False)
class FusedA:
    """An adapter's A of several modules in one tensor: ``a`` [in, rank of all]; ``columns`` says which are whose."""

    a: torch.Tensor
    columns: Mapping[str, slice]


@dataclass(frozen=True)
class LoRAWeights:
    """The changes of every module an adapter touches, and how far they are from the base: ``delta_norm`` is the
    Frobenius norm of all low-rank deltas, other biases, other rows and other weights together.

    ``fused`` has the A of modules that receive the same tensor: theirs are views into it."""

    deltas: Mapping[str, LoRADelta]
    delta_norm: float = 0.0
    fused: Sequence[FusedA] = ()

    @classmethod
    @torch.inference_mode()
    def of(cls, manifest: Manifest, base_modules: Mapping[str, nn.Module]) -> LoRAWeights:
        """Tensors from the manifest's bytes, on the base's device; any thread may do it.

        Raises ``AdapterRejected`` where they would change nothing, or overflow with their scaling.
        """
        preparation = _Preparation(manifest.data)
        prepared = {
            module: preparation.delta(part, base_modules[module]) for module, part in manifest.plan.parts.items()
        }
        deltas = {module: delta for module, delta in prepared.items() if delta is not None}
        norm = math.sqrt(preparation.squares) if preparation.squares >= 0 else math.nan
        doubtful = [module for module, delta in deltas.items() if not (delta.plain and math.isfinite(norm))]
        if vast := [module for module in doubtful if not (math.isfinite(norm) and deltas[module].finite)]:
            raise AdapterRejected(manifest.name, f"the weights of {vast[0]} are too large to compute with")
        if not deltas:
            raise AdapterRejected(manifest.name, "all its deltas are zero, so it would change nothing: was it trained?")
        return cls(deltas, norm)

    @property
    def num_bytes(self) -> int:
        return num_held_bytes(tensor for delta in self.deltas.values() for tensor in delta.tensors())

    @property
    def composable(self) -> bool:
        """Whether it is plain low-rank deltas, which can be scaled and added up."""
        return all(delta.plain for delta in self.deltas.values())


def num_held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory that tensors keep from being freed, what several share counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class QuantizedFrom(Protocol):
    """A weight that the base keeps as integers, as it was before."""

    def equals(self, weight: torch.Tensor) -> bool: ...


class _Preparation:
    """One file's tensors; those that two modules share are kept once. ``squares`` sums up the differences."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._tokens: dict[str, TokenEmbeddings] = {}
        self._own: dict[str, torch.Tensor] = {}
        self.squares = 0.0

    def delta(self, part: ModulePlan, base: nn.Module) -> LoRADelta | None:
        """A module's change, None where it is none."""
        before = self.squares
        if part.own or part.parameters or part.magnitude or part.tokens:
            original, base = getattr(base, "original", None), in_floats(base)
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
        """Whole parameters in the base's format, those that differ from the base's.

        PEFT saves copies of the base's own; where the base keeps integers, ``original`` knows what they were made of.
        """
        found = {}
        for name, entry in part.own.items():
            ours = base.get_parameter(name)
            if entry.name not in self._own:
                self._own[entry.name] = self._read(entry, ours)
            theirs = self._own[entry.name]
            same = torch.equal(theirs, ours) if original is None or name != "weight" else original.equals(theirs)
            if not same:
                found[name] = theirs
                self.squares += float((theirs.float() - ours.float()).square().sum())
        return found

    def _low_rank(self, one: LowRank, base: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """a [in, rank], the transpose of PEFT's, which few rows read faster, and b [rank, out] with the scaling."""
        a, b = self._read(one.a, _like(base)), self._read(one.b, _like(base))
        left, right = (b, a) if one.swapped else (a.t(), b.t())
        right = right.contiguous() * one.scaling
        self.squares += _square(left, right)
        return left, right

    def _dora_scale(
        self, part: ModulePlan, module: nn.Module, a: torch.Tensor | None, b: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The magnitude by the norm of each output's weights [out] (Liu et al. 2024, equation 5)."""
        if part.magnitude is None or a is None or b is None:
            return None
        norm = _weight_norm(module.get_parameter("weight"), a, b, in_out=part.shape.weight_is_in_out)
        return self._read(part.magnitude, _like(module)) / norm

    def _shift(
        self, part: ModulePlan, module: nn.Module, bias: torch.Tensor | None, scale: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What is added to a linear's result [out], so that it has the right bias once, and DoRA does not scale it."""
        if not part.shifted:
            return None
        shift = _like(module).new_zeros(part.shape.size[1])
        ours = module._parameters.get("bias")
        if ours is not None:
            shift += (ours if bias is None else bias).float() - ours.float() * (1.0 if scale is None else scale)
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

    def _parameter(self, one: LowRank, name: str, shape: ModuleShape, base: nn.Module) -> ParameterDelta:
        """PEFT's A [experts * rank, in] and B [out, rank * experts] as factors of the parameter's layout."""
        parameter, experts = base.get_parameter(name), num_experts(shape, name)
        a = self._read(one.a, _like(base)).view(experts, one.rank, -1)
        b = self._read(one.b, _like(base)).view(-1, one.rank, experts).permute(2, 0, 1)  # [experts, out, rank]
        left, right = (a.mT, b.mT) if shape.transposed and parameter.ndim == 3 else (b, a)
        left = left * one.scaling
        self.squares += _square(left, right)
        if parameter.ndim == 2:
            left, right = left[0], right[0]
        return ParameterDelta(left.to(parameter.dtype).contiguous(), right.to(parameter.dtype).contiguous())

    def _read(self, entry: TensorEntry, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the file in the format and on the device of another, from the bytes that its entry names."""
        own = bytearray(memoryview(self._data)[entry.begin : entry.end])
        return torch.frombuffer(own, dtype=_DTYPES[entry.dtype]).view(entry.shape).to(like.device, like.dtype)


def _like(module: nn.Module) -> torch.Tensor:
    """A tensor in float32 on the module's device; integers are on the CPU."""
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
    pairs = [(delta.a, delta.b), *((one.left, one.right) for one in delta.parameters.values())]
    return (
        any(a is not None and b is not None and bool(a.any()) and bool(b.any()) for a, b in pairs)
        or delta.shift is not None
        or bool(delta.own_names)
        or delta.tokens is not None
        or (delta.scale is not None and not torch.allclose(delta.scale, torch.ones_like(delta.scale), atol=1e-6))
    )


def _weight_norm(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, in_out: bool) -> torch.Tensor:
    """DoRA's norm of each output's column of ``W + a @ b`` [out], in float32 and in chunks, without the whole product.

    PEFT computes it at every step.
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
    """Rows of both, a few million numbers of the weight at a time."""
    size = max(1, _CHUNK_NUMBERS // weight.shape[1])
    return list(zip(weight.split(size), factor.split(size), strict=True))
