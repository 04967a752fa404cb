"""Fused operations: RMS norms, rotary embeddings, gated MLPs and the sums of decoder layers.

A decode step has hundreds of small operations between the linear layers, each of which costs more to start than to
compute. Each replacement is compared with the stock code on random inputs, and not used if the results differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from cpu_kernels.kernels import Kernels, Norm
from server.lora.layer import as_base
from server.model.patches import ModelPatches, with_globals
from server.module_proxy import ModuleProxy
from server.quantization.int8_modules import Int8Linear

logger = logging.getLogger("quickchange.model")
P = ParamSpec("P")
T = TypeVar("T")

_TOLERANCE = 1e-5
_TRIAL_SCALES = (1.0, 1.0, 30.0, 30.0, 1000.0, 1000.0)
"""Scales of the rows that gated MLPs are compared on, all in one input: their weights may be gigabytes to read."""
_SEPARATE = ("gate_proj", "up_proj", "down_proj")
_JOINED = ("gate_up_proj", "down_proj")
_EPSILONS = ("variance_epsilon", "eps")
_LAYER_CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PASSED_ON = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings"})
"""Keyword arguments of a layer, passed on to its attention."""
_ROTARY = "apply_rotary_pos_emb"
"""Name of the rotary embedding, a module-level function, in modelling code."""


def _trial(attempt: Callable[P, T | None]) -> Callable[P, T | None]:
    """A trial of a fused operation. If it raises anything, it returns None, and the stock code stays."""

    @wraps(attempt)
    def try_out(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return attempt(*args, **kwargs)
        except Exception:
            logger.debug("%s: the stock code stays", attempt.__qualname__, exc_info=True)
            return None

    return try_out


def fuse_ops(model: nn.Module, kernels: Kernels, patches: ModelPatches) -> None:
    """Replace norms, gated MLPs and rotary embeddings of a float32 model on a CPU, and ``forward`` of its layers."""
    patches.begin("fused ops")
    for name, module in list(model.named_modules()):
        fused = KernelRMSNorm.like(module, kernels) or GatedMLP.like(module, kernels)
        if fused is not None:
            patches.replace(model, name, fused)
    _fuse_rope(model, kernels, patches)
    for module in list(model.modules()):
        layer = FusedLayer.like(module, kernels)
        if layer is not None:
            patches.set_attribute(module, "forward", layer)


def fuse_norms(model: nn.Module, patches: ModelPatches) -> None:
    """Replace the norms that ``TorchRMSNorm`` computes; others, such as Gemma's with an offset, stay."""
    patches.begin("fused norms")
    for name, module in list(model.named_modules()):
        fused = TorchRMSNorm.like(module)
        if fused is not None:
            patches.replace(model, name, fused)


def _fuse_rope(model: nn.Module, kernels: Kernels, patches: ModelPatches) -> None:
    """Give attention modules a ``forward`` that calls a fused rotary embedding in place of the stock function."""
    fused: dict[Any, RotaryEmbedding | None] = {}
    copies: dict[Any, FunctionType | None] = {}
    for module in model.modules():
        forward = type(module).forward
        if forward not in copies:
            copies[forward] = _with_fused_rope(forward, fused, kernels)
        if (copy := copies[forward]) is not None:
            patches.set_attribute(module, "forward", MethodType(copy, module))


def _with_fused_rope(forward: Any, fused: dict[Any, RotaryEmbedding | None], kernels: Kernels) -> FunctionType | None:
    """None if the method is decorated or calls no rotary embedding that ``RotaryEmbedding`` computes."""
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    stock = forward.__globals__.get(_ROTARY)
    if stock not in fused:
        fused[stock] = RotaryEmbedding.like(stock, kernels) if callable(stock) else None
    embedding = fused[stock]
    return None if embedding is None else with_globals(forward, **{_ROTARY: embedding})


class KernelRMSNorm(nn.Module):
    """``x * (weight + offset) / sqrt(mean(x**2) + eps)`` (Zhang and Sennrich 2019) in float32, by a CPU kernel."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = weight
        self._eps, self._offset, self._kernels = eps, offset, kernels
        self._prepared: tuple[torch.Tensor | None, Norm | None] = (None, None)

    @classmethod
    @_trial
    def like(cls, stock: nn.Module, kernels: Kernels) -> KernelRMSNorm | None:
        """A replacement for the stock module, None if it computes something else."""
        weight, eps = _weight_and_eps(stock)
        if weight is None or weight.dtype != torch.float32 or weight.device.type != "cpu":
            return None
        x = torch.randn(1, 3, len(weight), generator=torch.Generator().manual_seed(0))
        expected = stock(x)
        for offset in (0.0, 1.0):
            norm = cls(weight, eps, offset, kernels)
            if _is_close(norm(x), expected):
                return norm
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] -> [..., dim]."""
        if x.dtype == torch.float32:  # conversions that do nothing take time, too
            return self._norm()(x)
        return self._norm()(x.float()).to(x.dtype)

    def of_sum(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The norm of ``x += other`` in place, both contiguous float32 [..., dim]; equal to ``forward`` to the bit."""
        return self._norm().of_sum(x, other)

    def _norm(self) -> Norm:
        """The kernel for the current weight, which an adapter may have replaced."""
        weight = self._parameters["weight"]
        prepared_weight, norm = self._prepared
        if norm is None or prepared_weight is not weight:
            assert weight is not None
            norm = self._kernels.rms_norm(weight + self._offset, self._eps)
            self._prepared = weight, norm
        return norm


class TorchRMSNorm(nn.Module):
    """``x * weight / sqrt(mean(x**2) + eps)`` by ``F.rms_norm``, rounded once.

    On an accelerator it is one kernel; stock code launches eight.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps

    @classmethod
    @_trial
    def like(cls, stock: nn.Module) -> TorchRMSNorm | None:
        """A replacement for the stock module, None if it computes something else."""
        weight, eps = _weight_and_eps(stock)
        if weight is None:
            return None
        x = torch.randn(1, 3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
        exact = F.rms_norm(x, weight.shape, weight.float(), eps)
        expected = stock(x)  # in float32, whatever the dtype of the weight
        if not isinstance(expected, torch.Tensor) or expected.dtype != torch.float32 or not _is_close(exact, expected):
            return None
        return cls(nn.Parameter(weight, requires_grad=False), eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] -> [..., dim]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)


def _weight_and_eps(stock: nn.Module) -> tuple[nn.Parameter | None, float]:
    """Weight [dim] and epsilon of a module that may be an RMS norm; no weight if it cannot be one."""
    values = [getattr(stock, name, None) for name in _EPSILONS]
    epsilons = [value for value in values if isinstance(value, float)]
    parameters = dict(stock.named_parameters())
    if not epsilons or list(parameters) != ["weight"] or parameters["weight"].ndim != 1 or list(stock.children()):
        return None, 0.0
    return parameters["weight"], epsilons[0]


class GatedMLP(ModuleProxy):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))`` (Shazeer 2020), activation and product in one kernel.

    Some models have GELU in place of SiLU, some one ``gate_up_proj``. If ``needed_rows``, int64 [n], are set, all other
    rows of the result are zeros: rows that are not needed after the last layer are not computed.
    """

    needed_rows: torch.Tensor | None = None

    def __init__(self, stock: nn.Module, kernels: Kernels, names: Sequence[str] = _SEPARATE, *, by_gelu: bool) -> None:
        super().__init__(stock)
        for name in names:
            self._modules[name] = stock.get_submodule(name)
        self._joined, self._by_gelu = names == _JOINED, by_gelu
        self._gate_and_mul = kernels.gelu_and_mul if by_gelu else kernels.silu_and_mul

    @classmethod
    @_trial
    def like(cls, stock: nn.Module, kernels: Kernels) -> GatedMLP | None:
        """A replacement for the stock module, None if it computes something else.

        Inputs of ``down_proj`` are compared: an int8 ``down_proj`` would magnify differences of the last bit.
        Rows of several scales are compared: some code clamps large values, and GELU is like its tanh form near zero.
        """
        children = {name for name, _ in stock.named_children()}
        names = next((names for names in (_SEPARATE, _JOINED) if children.issuperset(names)), None)
        if names is None or list(stock.parameters(recurse=False)):
            return None
        size = getattr(stock, "hidden_size", None) or getattr(stock.get_submodule(names[0]), "in_features", None)
        if not isinstance(size, int):
            return None
        x = torch.randn(1, len(_TRIAL_SCALES), size, generator=torch.Generator().manual_seed(0))
        x *= torch.tensor(_TRIAL_SCALES)[:, None]
        with ModelPatches() as trial:
            trial.replace_child(stock, "down_proj", nn.Identity())
            expected = stock(x)
            for by_gelu in (False, True):
                if _is_close_by_row(cls(stock, kernels, names, by_gelu=by_gelu)(x), expected):
                    break
            else:
                return None
        return cls(stock, kernels, names, by_gelu=by_gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, rows, dim] -> [1, rows, dim]."""
        rows = self.needed_rows
        if rows is None:
            return self._compute(x)
        y = torch.zeros_like(x)
        if len(rows):
            y[..., rows, :] = self._compute(x[..., rows, :])
        return y

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        gated = self._gated_by_linear(x)
        if gated is None:
            if self._joined:
                gate, up = self.gate_up_proj(x).chunk(2, -1)
            else:
                gate, up = self.gate_proj(x), self.up_proj(x)
            gated = self._gate_and_mul(gate, up)
        y: torch.Tensor = self.down_proj(gated)
        return y

    def _gated_by_linear(self, x: torch.Tensor) -> torch.Tensor | None:
        """Gated units from the int8 linear's own kernel, which does not write gate and up; None if it cannot."""
        gate = self._current("gate_up_proj" if self._joined else "gate_proj")
        if not isinstance(gate, Int8Linear):
            return None
        up = gate if self._joined else self._current("up_proj")
        return gate.gated(up, x, by_gelu=self._by_gelu)

    def _current(self, name: str) -> nn.Module:
        """The child that computes the step: the base's, unless an adapter changes it."""
        module = self._modules[name]  # the attribute may be a bypass
        assert module is not None
        return as_base(module)


class FusedLayer:
    """The ``forward`` of a layer such as Llama's: ``h = x + attention(norm(x))``, ``h + mlp(norm(h))``.

    The first sum and the norm behind it are one kernel. Sums are written into the results of attention and MLP; the
    layer's input is not changed.
    """

    def __init__(self, layer: nn.Module, kernels: Kernels) -> None:
        self._layer, self._kernels = layer, kernels
        self._stock = partial(type(layer).forward, layer)

    @classmethod
    @_trial
    def like(cls, layer: nn.Module, kernels: Kernels) -> FusedLayer | None:
        """A replacement for the layer's stock ``forward``, None if it computes something else.

        Attention, which may need a cache, and MLP are replaced by stand-ins for the comparison.
        """
        children = dict(layer.named_children())
        norm, mlp = children.get("post_attention_layernorm"), children.get("mlp")
        if not children.keys() >= _LAYER_CHILDREN or type(norm) is not KernelRMSNorm or not isinstance(mlp, GatedMLP):
            return None
        fused = cls(layer, kernels)
        x = torch.randn(1, 3, norm.weight.numel(), generator=torch.Generator().manual_seed(0))
        named = {name: object() for name in _PASSED_ON}
        before = x.clone()
        fused_attention, stock_attention = _FakeAttention(), _FakeAttention()
        with ModelPatches() as trial:
            trial.replace_child(layer, "mlp", _FakeMLP())
            trial.replace_child(layer, "self_attn", stock_attention)
            expected = fused._stock(x.clone(), **named)
            trial.replace_child(layer, "self_attn", fused_attention)
            found = fused(x, **named)
        is_equal = isinstance(expected, torch.Tensor) and torch.equal(found, expected) and torch.equal(x, before)
        return fused if is_equal and fused_attention.arguments == stock_attention.arguments else None

    def __call__(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> Any:
        """hidden_states [1, rows, dim] -> a new [1, rows, dim]."""
        if others or named.keys() != _PASSED_ON:
            return self._stock(hidden_states, *others, **named)
        layer: Any = self._layer
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **named)
        norm = layer._modules["post_attention_layernorm"]
        if type(norm) is KernelRMSNorm and not norm._forward_hooks and _can_add(attended, hidden_states):
            normed = norm.of_sum(attended, hidden_states)
        else:  # an adapter may have norms of its own
            attended = hidden_states + attended
            normed = layer.post_attention_layernorm(attended)
        y = layer.mlp(normed)
        if not _can_add(y, attended):
            return attended + y
        self._kernels.add_(y, attended)
        return y


class _FakeAttention(nn.Module):
    """Needs no cache, and records its arguments."""

    arguments: dict[str, Any]

    def forward(self, hidden_states: torch.Tensor, **named: Any) -> tuple[torch.Tensor, None]:
        self.arguments = named
        return 2.0 * hidden_states.roll(1, -1), None


class _FakeMLP(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(-1)


def _can_add(x: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        x.dtype == other.dtype == torch.float32
        and x.shape == other.shape
        and x.is_contiguous()
        and other.is_contiguous()
    )


def last_mlp(model: PreTrainedModel) -> GatedMLP | None:
    """The MLP of the last layer; None for a mixture of experts, whose MLPs see other rows."""
    layers = layers_of(model)
    found = [module for module in layers[-1].children() if isinstance(module, GatedMLP)] if len(layers) else []
    return found[0] if len(found) == 1 else None


def layers_of(model: PreTrainedModel) -> nn.ModuleList | list[nn.Module]:
    """The decoder's layers; empty if they are not exactly one list of modules."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [child for child in model.base_model.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    return lists[0] if len(lists) == 1 else []


class RotaryEmbedding:
    """``x * cos + rotate_half(x) * sin`` (Su et al. 2021) for queries and keys; other calls go to the stock code."""

    def __init__(self, stock: Callable[..., Any], kernels: Kernels) -> None:
        self._stock, self._rotate = stock, kernels.rotary_embedding

    @classmethod
    @_trial
    def like(cls, stock: Callable[..., Any], kernels: Kernels) -> RotaryEmbedding | None:
        """A replacement for the stock function, None if it computes something else."""
        fused = cls(stock, kernels)
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, heads, 3, 16, generator=generator) for heads in (4, 2))
        cos, sin = (torch.randn(1, 3, 16, generator=generator) for _ in range(2))
        pairs = zip(fused(q, k, cos, sin), stock(q, k, cos, sin), strict=True)
        return fused if all(_is_close(rotated, stock_rotated) for rotated, stock_rotated in pairs) else None

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


def _is_close(result: torch.Tensor, stock: Any) -> bool:
    return isinstance(stock, torch.Tensor) and torch.allclose(result, stock, rtol=_TOLERANCE, atol=_TOLERANCE)


def _is_close_by_row(result: torch.Tensor, stock: Any) -> bool:
    """Whether differences are small relative to the largest number of their row."""
    if not isinstance(stock, torch.Tensor) or stock.shape != result.shape:
        return False
    return bool(((result - stock).abs() <= _TOLERANCE * stock.abs().amax(-1, keepdim=True)).all())
