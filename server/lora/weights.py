"""One adapter's weights as tensors, scaling folded in (Hu et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from server.adapters.content.manifest import Manifest
from server.errors import AdapterRejected
from server.lora.delta import Delta
from server.lora.prepare import Preparation


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

    deltas: Mapping[str, Delta]
    delta_norm: float = 0.0
    fused: Sequence[FusedA] = ()

    @classmethod
    @torch.inference_mode()
    def of(cls, manifest: Manifest, base_modules: Mapping[str, nn.Module]) -> LoRAWeights:
        """Tensors from the manifest's bytes, on the base's device; any thread may do it.

        Raises ``AdapterRejected`` where they would change nothing, or overflow with their scaling.
        """
        preparation = Preparation(manifest.data)
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
        """Bytes in memory."""
        return num_held_bytes(tensor for delta in self.deltas.values() for tensor in delta.tensors())

    @property
    def composable(self) -> bool:
        """Whether it is plain low-rank deltas, which can be scaled and added up."""
        return all(delta.plain for delta in self.deltas.values())


def num_held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory that tensors keep from being freed, what several share counted once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (one.untyped_storage() for one in tensors)}
    return sum(storages.values())
