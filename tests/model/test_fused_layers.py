"""Layers with sums in place give the bits of the stock code around the same norms and units, or keep that code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from cpu_kernels.kernels import Kernels
from server.model.fused_ops import _PASSED_ON, FusedLayer, KernelRMSNorm, fuse_ops
from server.model.patches import ModelPatches
from server.module_proxy import with_parameters
from tests.instruction_sets import NUMBA, needs
from tests.model.families import FAMILIES, build

pytestmark = needs(NUMBA)
OTHERWISE = {
    "gemma2": "norms behind attention and units",
    "gemma3": "as gemma2",
    "gpt_oss": "experts",
    "gpt2": "layers of other modules, with LayerNorm",
    "gpt_neox": "as gpt2",
}
"""Families whose layers keep their stock code, and why."""


class _Mixed(nn.Module):
    """An attention of its input alone."""

    def forward(self, hidden_states: torch.Tensor, **named: Any) -> tuple[torch.Tensor, None]:
        """Rows get something of the row before."""
        return hidden_states + 0.5 * hidden_states.roll(1, -2), None


class _Louder(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """Twice what it was."""
        return 2.0 * super().forward(hidden_states, *others, **named)


class _Forgetful(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """The same, but its attention is told of no cache."""
        return super().forward(hidden_states, *others, **{**named, "past_key_values": None})


class _Scattered(nn.Module):
    """Units whose result does not lie in one piece."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Something else than x."""
        return (3.0 * x).transpose(-1, -2).contiguous().transpose(-1, -2)


def layer_of(kind: type[LlamaDecoderLayer] = LlamaDecoderLayer, size: int = 48) -> Any:
    """A layer with fused parts, and another attention."""
    config = LlamaConfig(hidden_size=size, intermediate_size=80, num_attention_heads=2)
    layer = kind(config, 0).requires_grad_(False).eval()
    nn.init.uniform_(layer.post_attention_layernorm.weight)
    layer.add_module("self_attn", _Mixed())
    fuse_ops(nn.ModuleList([layer]), Kernels(native=True).ready(), ModelPatches())
    return layer


def named() -> dict[str, Any]:
    """What models give their layers, in which nobody looks here."""
    return dict.fromkeys(_PASSED_ON)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_fused_where_they_are_as_those_of_llama(family: str) -> None:
    model = build(family)
    fuse_ops(model, Kernels(native=True).ready(), ModelPatches())
    fused = [one for one in model.modules() if isinstance(one.forward, FusedLayer)]
    assert len(fused) == (0 if family in OTHERWISE else model.config.num_hidden_layers)


@pytest.mark.parametrize("size", [16, 52, 896])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 40])
def test_a_fused_layer_gives_the_bits_of_the_stock_code(size: int, num_rows: int) -> None:
    layer, x = layer_of(size=size), torch.randn(1, num_rows, size)
    assert isinstance(layer.forward, FusedLayer)
    before = x.clone()
    got = layer(x, **named())
    assert torch.equal(got, type(layer).forward(layer, x, **named()))
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", [_Louder, _Forgetful])
def test_a_layer_that_does_more_or_less_keeps_its_code(kind: type[LlamaDecoderLayer]) -> None:
    layer = layer_of(kind)
    assert not isinstance(layer.forward, FusedLayer)
    assert isinstance(layer.self_attn, _Mixed)


def test_what_is_called_otherwise_or_not_in_one_piece_takes_the_long_way() -> None:
    layer, x = layer_of(), torch.randn(1, 4, 48)
    expected = layer(x, **named())
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x, None, **{name: None for name in _PASSED_ON if name != "attention_mask"}), expected)
    layer.add_module("mlp", _Scattered())
    scattered = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(layer(scattered, **named()), type(layer).forward(layer, x, **named()))


def test_a_layer_takes_the_norm_of_an_adapter_and_whoever_listens() -> None:
    layer, x = layer_of(), torch.randn(1, 4, 48)
    stock, other = type(layer).forward, layer_of()
    expected = layer(x, **named())
    own = with_parameters(layer.post_attention_layernorm, {"weight": torch.rand(48)})
    layer.post_attention_layernorm = own
    changed = layer(x, **named())
    assert torch.equal(changed, stock(layer, x, **named())) and not torch.equal(changed, expected)
    layer.add_module("post_attention_layernorm", Qwen2RMSNorm(48).requires_grad_(False))
    assert torch.equal(layer(x, **named()), stock(layer, x, **named()))
    seen: list[nn.Module] = []
    other.post_attention_layernorm.register_forward_hook(lambda module, *_: seen.append(module))
    other(x, **named())
    assert seen == [other.post_attention_layernorm]


@pytest.mark.parametrize("size", [1, 15, 16, 33, 48, 896])
@pytest.mark.parametrize("num_rows", [1, 3, 64])
def test_the_norm_of_a_sum_is_that_of_the_sum_to_the_bit(size: int, num_rows: int) -> None:
    x, other = torch.randn(1, num_rows, size), torch.randn(1, num_rows, size)
    kernels = Kernels(native=True).ready()
    norm = KernelRMSNorm(nn.Parameter(torch.rand(size), requires_grad=False), 1e-6, 0.0, kernels)
    expected = x + other
    kept = other.clone()
    assert torch.equal(norm.of_sum(x, other), norm(expected))
    assert torch.equal(x, expected) and torch.equal(other, kept)
