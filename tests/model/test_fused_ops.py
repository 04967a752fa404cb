"""Fewer operations a step: what replaces stock code computes what it does, and is found where it should be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama import LlamaConfig, modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from cpu_kernels.kernels import Kernels
from server.lora import module_bypass
from server.model.fused_ops import GatedMLP, KernelRMSNorm, RotaryEmbedding, fuse_ops
from server.model.patches import ModelPatches
from server.module_proxy import with_parameters
from tests.instruction_sets import NUMBA, needs
from tests.model.families import FAMILIES, build

WITH_LAYER_NORMS = {"gpt2", "gpt2_untied", "gpt_neox"}


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs(NUMBA))], ids=["torch", "native"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_fused_model_gives_the_stock_logits(family: str, native: bool) -> None:
    stock = build(family)
    ids = torch.arange(3, 40)[None] % stock.config.get_text_config().vocab_size
    expected = stock(ids).logits
    model = copy.deepcopy(stock)
    fuse_ops(model, Kernels(native=native).ready(), ModelPatches())
    module_bypass.install(model)
    got = model(ids).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    norms = [one for one in model.modules() if isinstance(one, KernelRMSNorm)]
    assert bool(norms) == (family not in WITH_LAYER_NORMS)


@needs(NUMBA)
def test_gated_units_take_rows_in_any_shape() -> None:
    """Mixtures of experts call theirs with rows alone, [rows, dim], which were refused in the middle of a step."""
    stock = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48)).requires_grad_(False)
    fused, x = GatedMLP.like(stock, Kernels(native=True).ready()), torch.randn(2, 3, 32)
    assert fused is not None
    for rows in (x, x[:1], x[0], x[0, :1], x.transpose(0, 1), x[:0]):
        torch.testing.assert_close(fused(rows), stock(rows), rtol=1e-5, atol=1e-6)
    for only in (torch.tensor([2, 0]), torch.tensor([], dtype=torch.long)):
        fused.needed_rows = only
        for rows in (x[:1], x[0]):
            others = torch.ones(3, 1).index_fill(0, only, 0.0)
            torch.testing.assert_close(fused(rows), stock(rows) * (1.0 - others), rtol=1e-5, atol=1e-6)


class _Clamped(LlamaMLP):
    """As DeepSeek V4's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x).clamp(max=10.0), self.up_proj(x).clamp(min=-10.0, max=10.0)
        y: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return y


class _Broken(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("it wants a cache")


def mlp(kind: type[LlamaMLP] = LlamaMLP, size: int = 32, activation: str = "silu") -> LlamaMLP:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=size, intermediate_size=2 * size, hidden_act=activation, num_attention_heads=1)
    stock = kind(config)
    for parameter in stock.requires_grad_(False).parameters():
        nn.init.normal_(parameter, std=0.02)
    return stock


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs(NUMBA))], ids=["torch", "native"])
@pytest.mark.parametrize("size", [8, 32, 512])
def test_units_that_differ_only_when_they_are_large_keep_their_code(size: int, native: bool) -> None:
    """One input of ordinary size was tried: a clamp was never reached, and erf-GELU passed for its tanh form."""
    kernels = Kernels(native=native).ready()
    for kind, activation in ((_Clamped, "silu"), (LlamaMLP, "gelu")):
        assert GatedMLP.like(mlp(kind, size, activation), kernels) is None
    for activation in ("silu", "gelu_pytorch_tanh"):
        assert GatedMLP.like(mlp(LlamaMLP, size, activation), kernels) is not None


def test_a_trial_that_raises_anything_keeps_the_stock_code() -> None:
    """A KeyError ended the start of the server."""
    broken = mlp(_Broken)
    children = list(broken.children())
    assert GatedMLP.like(broken, Kernels()) is None
    assert list(broken.children()) == children

    def raises(*args: object) -> None:
        raise LookupError

    assert RotaryEmbedding.like(raises, Kernels()) is None


@needs(NUMBA)
def test_gated_units_are_found_before_a_product_that_tells_last_bits_apart() -> None:
    """As one of integers does, where a unit lies on a border: a layer kept its stock code, and so none was recorded."""

    class LastBits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1e6 * (1e7 * x).frac()

    stock = LlamaMLP(LlamaConfig(hidden_size=256, intermediate_size=512)).requires_grad_(False)
    stock.add_module("down_proj", LastBits())
    fused = GatedMLP.like(stock, Kernels(native=True).ready())
    assert fused is not None and fused.down_proj is stock.down_proj
    assert isinstance(stock.down_proj, LastBits)


def test_a_norm_takes_the_weight_of_an_adapter() -> None:
    stock = Qwen2RMSNorm(48, eps=1e-5)
    fused = KernelRMSNorm.like(stock, Kernels())
    assert fused is not None
    x, own = torch.randn(1, 5, 48), torch.rand(48)
    before = fused(x)
    other = with_parameters(fused, {"weight": own})
    assert torch.allclose(other(x), before * own, rtol=1e-5, atol=1e-6)
    assert torch.equal(fused(x), before)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-3, 1e3, 1e15])
def test_a_norm_is_that_of_stock_for_rows_of_any_size(size: float) -> None:
    stock = Qwen2RMSNorm(48, eps=1e-6)
    fused = KernelRMSNorm.like(stock, Kernels())
    assert fused is not None
    x = torch.randn(1, 5, 48) * size
    assert torch.allclose(fused(x), stock(x), rtol=1e-5, atol=1e-7)


def test_what_is_no_rms_norm_stays() -> None:
    assert KernelRMSNorm.like(nn.LayerNorm(48), Kernels()) is None
    assert KernelRMSNorm.like(nn.Linear(48, 48), Kernels()) is None
    assert KernelRMSNorm.like(Qwen2RMSNorm(48).bfloat16(), Kernels()) is None


def test_a_rotary_embedding_leaves_calls_that_it_cannot_serve_to_the_stock_code() -> None:
    calls = []

    def stock(*args: object, **named: object) -> str:
        calls.append((len(args), named))
        return "stock"

    embedding = RotaryEmbedding(stock, Kernels())
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    narrow = torch.randn(1, 3, 8)
    assert embedding(q, k, narrow, narrow) == "stock"  # only a part of a head is rotated
    full = torch.randn(1, 3, 16)
    assert embedding(q, k, full, full, unsqueeze_dim=2) == "stock"
    assert embedding(q.bfloat16(), k.bfloat16(), full, full) == "stock"
    assert len(calls) == 3
    ours = embedding(q, k, full, full)
    theirs = modeling_llama.apply_rotary_pos_emb(q, k, full, full)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.listed = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Through both."""
        y: torch.Tensor = self.listed[0](self.first(x))
        return y


def test_a_bypass_gives_way_to_hooks_and_to_other_modules() -> None:
    layer, x = _Layer(), torch.randn(2, 4)
    expected = layer(x)
    module_bypass.install(layer)
    assert isinstance(layer.first, module_bypass.ModuleBypass) and isinstance(layer.listed, nn.ModuleList)
    assert torch.equal(layer(x), expected)
    assert layer.first.in_features == 4 and layer.first.weight is layer._modules["first"].weight  # type: ignore[union-attr]
    assert [name for name, _ in layer.named_modules()] == ["", "first", "listed", "listed.0"]
    other = nn.Linear(4, 4)
    module_bypass.replace(layer, "first", other)
    assert layer.first.module is other and not torch.equal(layer(x), expected)
    module_bypass.remove(layer)
    seen: list[nn.Module] = []
    layer.first.register_forward_hook(lambda module, *_: seen.append(module))
    layer(x)
    assert seen == [other]
    module_bypass.install(layer)
    assert layer.first is other  # somebody listens
