"""Decoder layers whose sums are in place, the first of them in one pass with the norm behind it.

``h = x + self_attn(input_layernorm(x))``, ``h + mlp(post_attention_layernorm(h))``: what Llama, Qwen and Mistral have.
As in ``fused_ops`` they are found by trying: a layer that gives another result keeps its stock code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from cpu_kernels.kernels import Kernels
from server.model.fused_ops import GatedMLP, RMSNorm, fuse_ops
from server.model.patches import ModelPatches

_CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PASSED_ON = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings"})
"""What models call their layers with, for the attention."""


def fuse_layers(model: nn.Module, patches: ModelPatches, kernels: Kernels) -> None:
    """Replace what ``fuse_ops`` replaces, and the ``forward`` of layers like Llama's."""
    fuse_ops(model, patches, kernels)
    for module in list(model.modules()):
        if {name for name, _ in module.named_children()} >= _CHILDREN:
            fused = FusedLayer.like(module, kernels)
            if fused is not None:
                patches.set_attribute(module, "forward", fused)


class FusedLayer:
    """The forward of one layer.

    A sum is written over the result of the attention or of the units, which are nobody else's; the layer's input stays.
    """

    def __init__(self, layer: nn.Module, kernels: Kernels) -> None:
        self._layer, self._kernels = layer, kernels
        self._stock = partial(type(layer).forward, layer)

    @classmethod
    def like(cls, layer: nn.Module, kernels: Kernels) -> FusedLayer | None:
        """One that computes what a layer's stock code does, None where that is something else.

        Attention and units are replaced meanwhile: they may need a cache, and tell last bits apart.
        """
        norm, units = layer.get_submodule("post_attention_layernorm"), layer.get_submodule("mlp")
        if type(norm) is not RMSNorm or not isinstance(units, GatedMLP):
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
