"""The same arithmetic in fewer operations: RMS norms, the rotation of queries and keys, and gated units.

A decoding step is hundreds of small operations between the products, each of which costs more to start than to compute.
What is replaced is found by trying it: where the stock code gives another result, it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from cpu_kernels.kernels import Kernels, Norm
from server.lora.layer import as_base
from server.model.patches import ModelPatches, with_globals
from server.quantization.int8_modules import Int8Linear

_TOLERANCE = 1e-5
_APART, _JOINED = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")
_EPSILONS = ("variance_epsilon", "eps")
_ROTARY = "apply_rotary_pos_emb"
"""What modelling code calls its rotary embedding, a function of its module."""


def fuse_ops(model: nn.Module, patches: ModelPatches, kernels: Kernels) -> None:
    """Replace the norms of a float32 model on a CPU, and its rotary embedding.

    Each is then one operation of ``kernels``, and so is what gates a layer's units.
    """
    patches.begin("fused ops")
    for name, module in list(model.named_modules()):
        fused = RMSNorm.like(module, kernels) or GatedMLP.like(module, kernels)
        if fused is not None:
            patches.replace(model, name, fused)
    _fuse_rope(model, patches, kernels)


def fuse_norms(model: nn.Module, patches: ModelPatches) -> None:
    """Replace the norms that ``FusedRMSNorm`` computes; others, as those that add one to their weight, stay."""
    patches.begin("fused norms")
    for name, module in list(model.named_modules()):
        fused = FusedRMSNorm.like(module)
        if fused is not None:
            patches.replace(model, name, fused)


def _fuse_rope(model: nn.Module, patches: ModelPatches, kernels: Kernels) -> None:
    """Give attention modules a ``forward`` that finds our rotary embedding where stock code finds its own function."""
    fused: dict[Any, RotaryEmbedding | None] = {}
    copies: dict[Any, FunctionType | None] = {}
    for module in model.modules():
        forward = type(module).forward
        if forward not in copies:
            copies[forward] = _with_fused_rope(forward, fused, kernels)
        if (copy := copies[forward]) is not None:
            patches.set_attribute(module, "forward", MethodType(copy, module))


def _with_fused_rope(forward: Any, fused: dict[Any, RotaryEmbedding | None], kernels: Kernels) -> FunctionType | None:
    """None for a method that is decorated, calls no rotary embedding, or one that computes something else."""
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    stock = forward.__globals__.get(_ROTARY)
    if stock not in fused:
        fused[stock] = RotaryEmbedding.like(stock, kernels) if callable(stock) else None
    embedding = fused[stock]
    return None if embedding is None else with_globals(forward, **{_ROTARY: embedding})


class RMSNorm(nn.Module):
    """``x * (weight + offset) / sqrt(mean(x**2) + eps)`` (Zhang and Sennrich 2019) over the last axis, in float32."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = weight
        self._eps, self._offset, self._kernels = eps, offset, kernels
        self._prepared: tuple[torch.Tensor | None, Norm | None] = (None, None)

    @classmethod
    def like(cls, stock: nn.Module, kernels: Kernels) -> RMSNorm | None:
        """One that computes what a stock module does, None where that is something else."""
        weight, eps = _weight_and_eps(stock)
        if weight is None or weight.dtype != torch.float32 or weight.device.type != "cpu":
            return None
        x = torch.randn(1, 3, len(weight), generator=torch.Generator().manual_seed(0))
        try:
            expected = stock(x)
        except (RuntimeError, TypeError):
            return None
        candidates = (cls(weight, eps, offset, kernels) for offset in (0.0, 1.0))
        return next((one for one in candidates if _alike(one(x), expected)), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] -> [..., dim]."""
        if x.dtype == torch.float32:  # no calls of torch that change nothing: among cold caches each takes time
            return self._norm()(x)
        return self._norm()(x.float()).to(x.dtype)

    def of_sum(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Of ``x += other`` in place, both contiguous float32 [..., dim]; to the bit as ``forward``."""
        return self._norm().of_sum(x, other)

    def _norm(self) -> Norm:
        """Prepared again where an adapter has put another weight in the place of the last one."""
        weight, norm = self._prepared
        if weight is not (own := self._parameters["weight"]) or norm is None:
            assert own is not None
            norm = self._kernels.rms_norm(own + self._offset, self._eps)
            self._prepared = own, norm
        return norm


class FusedRMSNorm(nn.Module):
    """``x * weight / sqrt(mean(x**2) + eps)`` by torch's own operation, rounded once.

    On an accelerator it is one kernel where modelling code launches eight.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps

    @classmethod
    def like(cls, stock: nn.Module) -> FusedRMSNorm | None:
        """One that computes what a stock module does, None where that is something else."""
        weight, eps = _weight_and_eps(stock)
        if weight is None:
            return None
        x = torch.randn(1, 3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
        exact = F.rms_norm(x, weight.shape, weight.float(), eps)
        try:
            expected = stock(x)  # which computes in float32, whatever the weight is kept in
        except (RuntimeError, TypeError):
            return None
        if not isinstance(expected, torch.Tensor) or expected.dtype != torch.float32 or not _alike(exact, expected):
            return None
        return cls(nn.Parameter(weight, requires_grad=False), eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] -> [..., dim]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)


def _weight_and_eps(stock: nn.Module) -> tuple[nn.Parameter | None, float]:
    """Of a module that may be an RMS norm: its one parameter, [dim], and its epsilon; no weight where it is none."""
    eps = next((value for name in _EPSILONS if isinstance(value := getattr(stock, name, None), float)), None)
    parameters = dict(stock.named_parameters())
    if eps is None or list(parameters) != ["weight"] or parameters["weight"].ndim != 1 or list(stock.children()):
        return None, 0.0
    return parameters["weight"], eps


class GatedMLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))`` (Shazeer 2020), the middle of it in one pass.

    Some have GELU for SiLU, some ``gate_up_proj`` for the first two. Where ``only`` is set, int64 [n], other rows are
    zeros: nobody looks at them behind the last layer.
    """

    only: torch.Tensor | None = None

    def __init__(self, stock: nn.Module, kernels: Kernels, names: Sequence[str] = _APART, *, by_gelu: bool) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, stock.get_submodule(name))
        self._joined, self._by_gelu = names == _JOINED, by_gelu
        self._gate_and_mul = kernels.gelu_and_mul if by_gelu else kernels.silu_and_mul
        self._stock = (stock,)  # in a tuple, so that it is no submodule

    @classmethod
    def like(cls, stock: nn.Module, kernels: Kernels) -> GatedMLP | None:
        """One that computes what a stock module does, None where that is something else.

        What goes into ``down_proj`` is compared: its integers may fall to the other side of a border for a last bit.
        """
        children = {name for name, _ in stock.named_children()}
        names = next((names for names in (_APART, _JOINED) if children >= {*names}), None)
        if names is None or list(stock.parameters(recurse=False)):
            return None
        size = getattr(stock, "hidden_size", None) or getattr(stock.get_submodule(names[0]), "in_features", None)
        if not isinstance(size, int):
            return None
        x = torch.randn(1, 3, size, generator=torch.Generator().manual_seed(0))
        try:
            with ModelPatches() as trial:
                trial.replace_child(stock, "down_proj", nn.Identity())
                candidates = [cls(stock, kernels, names, by_gelu=by_gelu) for by_gelu in (False, True)]
                expected = stock(x)
                found = next((one for one in candidates if _alike(one(x), expected)), None)
        except (RuntimeError, TypeError):
            return None
        return None if found is None else cls(stock, kernels, names, by_gelu=found._by_gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, rows, dim] -> [1, rows, dim]."""
        if self.only is None:
            return self._of_rows(x)
        y = torch.zeros_like(x)
        if len(self.only):
            y[..., self.only, :] = self._of_rows(x[..., self.only, :])
        return y

    def _of_rows(self, x: torch.Tensor) -> torch.Tensor:
        units = self._as_one_product(x)
        if units is None:
            gate, up = self.gate_up_proj(x).chunk(2, -1) if self._joined else (self.gate_proj(x), self.up_proj(x))
            units = self._gate_and_mul(gate, up)
        y: torch.Tensor = self.down_proj(units)
        return y

    def _as_one_product(self, x: torch.Tensor) -> torch.Tensor | None:
        """The gated units, where no adapter changes what they are made of; gates and ups are never in memory then."""
        names = ("gate_up_proj",) * 2 if self._joined else ("gate_proj", "up_proj")
        gate, up = (as_base(module) for name in names if (module := self._modules[name]))  # attributes may be bypasses
        return gate.gated(up, x, by_gelu=self._by_gelu) if isinstance(gate, Int8Linear) else None

    def __getattr__(self, name: str) -> Any:
        """Whatever else modelling code reads of the stock module."""
        if name == "_stock" or name.startswith("__"):
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stock[0], name)


def last_units(model: PreTrainedModel) -> GatedMLP | None:
    """Those of the last layer, where they are its own: an expert's, inside of a mixture, get other rows."""
    layers = layers_of(model)
    found = [module for module in layers[-1].children() if isinstance(module, GatedMLP)] if len(layers) else []
    return found[0] if len(found) == 1 else None


def layers_of(model: PreTrainedModel) -> nn.ModuleList | list[nn.Module]:
    """The decoder's layers; none where they are not a list of their own."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [one for one in model.base_model.children() if isinstance(one, nn.ModuleList) and len(one) == count]
    return lists[0] if len(lists) == 1 else []


class RotaryEmbedding:
    """``x * cos + rotate_half(x) * sin`` (Su et al. 2021) for queries and keys; other calls go to the stock code."""

    def __init__(self, stock: Callable[..., Any], kernels: Kernels) -> None:
        self.stock, self._rotate = stock, kernels.rotary_embedding

    @classmethod
    def like(cls, stock: Callable[..., Any], kernels: Kernels) -> RotaryEmbedding | None:
        """One that computes what a stock function does, None where that is something else."""
        fused, generator = cls(stock, kernels), torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, heads, 3, 16, generator=generator) for heads in (4, 2))
        cos, sin = (torch.randn(1, 3, 16, generator=generator) for _ in range(2))
        try:
            expected = stock(q, k, cos, sin)
        except (RuntimeError, TypeError, ValueError):
            return None
        pairs = zip(fused(q, k, cos, sin), expected, strict=True)
        return fused if all(_alike(ours, theirs) for ours, theirs in pairs) else None

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **named: Any
    ) -> Any:
        """q and k [1, heads, rows, dim], cos and sin [1, rows, dim]."""
        if (
            others
            or named
            or not q.shape[-1] == k.shape[-1] == cos.shape[-1]
            or not q.dtype == k.dtype == torch.float32
            or not q.stride(-1) == k.stride(-1) == q.shape[0] == 1
        ):
            return self.stock(q, k, cos, sin, *others, **named)
        return self._rotate(q, k, cos, sin)


def _alike(ours: torch.Tensor, theirs: Any) -> bool:
    return isinstance(theirs, torch.Tensor) and torch.allclose(ours, theirs, rtol=_TOLERANCE, atol=_TOLERANCE)
