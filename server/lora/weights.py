"""One adapter's LoRA weights as tensors, scaling folded in (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from server.adapters.manifest import Manifest
from server.adapters.safetensors import TensorEntry
from server.errors import AdapterRejected


@dataclass(frozen=True)
class LoRADelta:
    """One module's delta: ``x @ a @ b`` with a [in, rank] and b [rank, out], float32, the scaling in b."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class LoRAWeights:
    """The deltas of every module an adapter touches."""

    deltas: Mapping[str, LoRADelta]

    @classmethod
    def of(cls, manifest: Manifest, device: torch.device) -> LoRAWeights:
        """Tensors from the manifest's bytes, copied to ``device``.

        Raises ``AdapterRejected`` where a number is not finite, or where every delta is zero.
        """
        deltas = {}
        for module, pair in manifest.pairs.items():
            a, b = _tensor(manifest.data, pair.a), _tensor(manifest.data, pair.b)
            if not (a.isfinite().all() and b.isfinite().all()):
                raise AdapterRejected(manifest.name, f"the weights of {module} hold NaN or infinity: train it again")
            scaling = manifest.config.scaling(module)
            deltas[module] = LoRADelta(a.t().contiguous().to(device), (b.t() * scaling).contiguous().to(device))
        if all(not delta.a.any() or not delta.b.any() for delta in deltas.values()):
            raise AdapterRejected(manifest.name, "all its deltas are zero, so it would change nothing: was it trained?")
        return cls(deltas)


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _tensor(data: bytes, entry: TensorEntry) -> torch.Tensor:
    """A tensor of the file in float32, from the bytes that its checked entry names."""
    own = bytearray(data[entry.begin : entry.end])
    return torch.frombuffer(own, dtype=_DTYPES[entry.dtype]).view(entry.shape).float()
