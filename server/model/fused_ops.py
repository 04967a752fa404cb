"""Fused operations: RMS norms, rotary embeddings, gated MLPs and the sums of decoder layers.

A decode step has hundreds of small operations between the linear layers, each of which costs more to start than to
compute. Each replacement is tried against the stock code, which stays where the results differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
_LAYER_CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PASSED_ON = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings"})
"""What models call their layers with, for the attention."""
_ROTARY = "apply_rotary_pos_emb"
"""What modelling code calls its rotary embedding, a function of its module."""


def fuse_ops(model: nn.Module, kernels: Kernels, patches: ModelPatches) -> None:
    """Replace norms, gated MLPs and rotary embeddings of a float32 model on a CPU, and ``forward`` of its layers."""
    patches.begin("fused ops")
    for name, module in list(model.named_modules()):
        fused = RMSNorm.like(module, kernels) or GatedMLP.like(module, kernels)
        if fused is not None:
            patches.replace(model, name, fused)
    _fuse_rope(model, kernels, patches)
    for module in list(model.modules()):
        layer = FusedLayer.like(module, kernels)
        if layer is not None:
            patches.set_attribute(module, "forward", layer)


def fuse_norms(model: nn.Module, patches: ModelPatches) -> None:
    """Replace the norms that ``FusedRMSNorm`` computes; others, as those that add one to their weight, stay."""
    patches.begin("fused norms")
    for name, module in list(model.named_modules()):
        fused = FusedRMSNorm.like(module)
        if fused is not None:
            patches.replace(model, name, fused)


def _fuse_rope(model: nn.Module, kernels: Kernels, patches: ModelPatches) -> None:
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


class FusedLayer:
    """The ``forward`` of a layer such as Llama's: ``h = x + attention(norm(x))``, ``h + mlp(norm(h))``.

    The first sum is one kernel with the norm behind it. Sums are written over the results of attention and MLP, which
    are nobody else's; the layer's input stays.
    """

    def __init__(self, layer: nn.Module, kernels: Kernels) -> None:
        self._layer, self._kernels = layer, kernels
        self._stock = partial(type(layer).forward, layer)

    @classmethod
    def like(cls, layer: nn.Module, kernels: Kernels) -> FusedLayer | None:
        """One that computes what a layer's stock code does, None where that is something else.

        Attention and units are replaced meanwhile: they may need a cache, and tell last bits apart.
        """
        children = dict(layer.named_children())
        norm, mlp = children.get("post_attention_layernorm"), children.get("mlp")
        if not children.keys() >= _LAYER_CHILDREN or type(norm) is not RMSNorm or not isinstance(mlp, GatedMLP):
            return None
        fused = cls(layer, kernels)
        x = torch.randn(1, 3, norm.weight.numel(), generator=torch.Generator().manual_seed(0))
        named = {name: object() for name in _PASSED_ON}
        before = x.clone()
        ours, theirs = _StandIn(), _StandIn()
        try:
            with ModelPatches() as trial:
                trial.replace_child(layer, "mlp", _Flip())
                trial.replace_child(layer, "self_attn", theirs)
                expected = fused._stock(x.clone(), **named)
                trial.replace_child(layer, "self_attn", ours)
                found = fused(x, **named)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None
        same = isinstance(expected, torch.Tensor) and torch.equal(found, expected) and torch.equal(x, before)
        return fused if same and ours.given == theirs.given else None

    def __call__(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> Any:
        """hidden_states [1, rows, dim] -> a new [1, rows, dim]."""
        if others or named.keys() != _PASSED_ON:
            return self._stock(hidden_states, *others, **named)
        layer: Any = self._layer
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **named)
        norm = layer._modules["post_attention_layernorm"]
        if type(norm) is RMSNorm and not norm._forward_hooks and _can_add(attended, hidden_states):
            normed = norm.of_sum(attended, hidden_states)
        else:  # an adapter may have norms of its own
            attended = hidden_states + attended
            normed = layer.post_attention_layernorm(attended)
        y = layer.mlp(normed)
        if not _can_add(y, attended):
            return attended + y
        self._kernels.add_(y, attended)
        return y


class _StandIn(nn.Module):
    """An attention that needs no cache, and notes what it was given."""

    given: dict[str, Any]

    def forward(self, hidden_states: torch.Tensor, **named: Any) -> tuple[torch.Tensor, None]:
        """Something else than it is given."""
        self.given = named
        return 2.0 * hidden_states.roll(1, -1), None


class _Flip(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Something else again."""
        return x.flip(-1)


def _can_add(x: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        x.dtype == other.dtype == torch.float32
        and x.shape == other.shape
        and x.is_contiguous()
        and other.is_contiguous()
    )


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
        self._stock, self._rotate = stock, kernels.rotary_embedding

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
            return self._stock(q, k, cos, sin, *others, **named)
        return self._rotate(q, k, cos, sin)


def _alike(ours: torch.Tensor, theirs: Any) -> bool:
    return isinstance(theirs, torch.Tensor) and torch.allclose(ours, theirs, rtol=_TOLERANCE, atol=_TOLERANCE)
