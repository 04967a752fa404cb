"""Every family with its linears and embedding in int8: what becomes of it, and how near it stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cpu_kernels import kernels
from cpu_kernels.kernels import Kernels
from cpu_kernels.linear import FbgemmLinear
from server.errors import SettingsError
from server.model import loader
from server.quantization.int8_experts import WEIGHTS, follow_convention
from server.quantization.int8_modules import Int8Embedding, Int8Linear
from tests.model.families import FAMILIES, build, build_from, fix_long_factors
from tests.model.harness import Ask, difference, host, prompts, stock_logits
from tests.model.int8_bases import TWO_LINEARS, rounding
from tests.model.int8_oracle import oracle_of
from tests.model.peft_cases import CONFIGS

ASKS = [Ask(prompt, 4) for prompt in prompts(21, 5, 1)]
FAR = 0.2
"""Logits of sharp random models of 64 numbers a row, as a share of the largest; measured: 0.14 at most (Phi-3)."""
KEPT_IN_FLOATS = {
    "gpt2": {"transformer.wpe.weight"},
    "gpt_oss": {"sinks", "router.weight"},
}
"""Ends of names of what is left beside norms and biases."""

FBGEMM = FbgemmLinear.name


@pytest.fixture(params=TWO_LINEARS)
def linear(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_near_and_each_row_is_the_same_alone(family: str, linear: str) -> None:
    base = build(family)
    hosted = host(copy.deepcopy(base), linear=linear)
    if family == "phi3_longrope":
        fix_long_factors(base)
    answers, alone = hosted.run(ASKS), [hosted.run([ask])[0] for ask in ASKS]
    for answer, one in zip(answers, alone, strict=True):
        assert difference(answer.logits, stock_logits(base, answer)) < FAR
        assert torch.equal(answer.logits, one.logits)
        assert answer.tokens == one.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_is_the_stock_models_with_these_numbers(family: str) -> None:
    base = build(family)
    hosted = host(copy.deepcopy(base), linear=FBGEMM)
    oracle = oracle_of(base, hosted.model)
    if family == "phi3_longrope":
        fix_long_factors(oracle)
    differences = [difference(answer.logits, stock_logits(oracle, answer)) for answer in hosted.run(ASKS)]
    assert min(differences) < 1e-5 and max(differences) < 0.1  # an activation may fall to the other side of a border


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linears_and_the_embedding_are_integers_and_the_rest_is_told(family: str) -> None:
    floats, hosted = host(build(family)), host(build(family), linear=FBGEMM)
    stock = dict(floats.model.named_modules())
    found = {name: one for name, one in hosted.model.named_modules() if isinstance(one, Int8Linear)}
    routers = {name for name in stock if name.endswith("router")}
    linears = {name for name, shape in floats.trace.modules.items() if shape.kind == "linear"} - routers
    assert set(found) == linears
    assert isinstance(hosted.model.get_input_embeddings(), Int8Embedding)
    quantized = hosted.quantized
    assert quantized is not None and quantized.num_linears == len(linears)
    groups = floats.trace.groups
    assert len({linear.fused for linear in found.values()}) == len(linears) - sum(len(group) - 1 for group in groups)
    numbers = sum(stock[name].get_parameter("weight").numel() for name in linears)
    embedding = floats.model.get_input_embeddings().get_parameter("weight").numel()
    experts = [module for module in stock.values() if follow_convention(module)]
    numbers += sum(module.get_parameter(name).numel() for module in experts for name in WEIGHTS)
    assert quantized.num_experts == sum(len(module.get_parameter("down_proj")) for module in experts)
    assert quantized.num_bytes == numbers + embedding  # the head's packed form cannot be looked up in
    left = {name for name in quantized.unquantized if not name.endswith(("norm.weight", "layernorm.weight", "bias"))}
    left = {name for name in left if ".ln_" not in name}
    kept = tuple(KEPT_IN_FLOATS.get(family, ()))
    assert {name for name in left if not name.endswith(kept)} == set() if kept else left == set()
    assert all(any(name.endswith(end) for name in left) for end in kept)
    assert set(quantized.unquantized) == {name for name, _ in hosted.model.named_parameters()}


def test_what_a_probe_records_is_the_same_with_integers() -> None:
    for family in FAMILIES:
        floats, int8 = host(build(family)).trace, host(build(family), linear=FBGEMM).trace
        assert int8 == floats


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gpt2_tied", "gemma3"])
def test_a_head_that_shares_the_embeddings_weight_shares_its_integers(name: str) -> None:
    base = build_from(CONFIGS[name])
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    hosted = host(copy.deepcopy(base), linear=FBGEMM)
    embedding, head = hosted.model.get_input_embeddings(), hosted.model.get_output_embeddings()
    assert isinstance(embedding, Int8Embedding) and isinstance(head, Int8Linear)
    assert (embedding.original == head.original) == tied
    assert (torch.allclose(embedding.weight, head.weight, rtol=1e-6, atol=0.0)) == tied
    assert embedding.embed_scale == (8.0 if name == "gemma3" else 1.0)


def test_a_gemmas_embedding_has_its_scale() -> None:
    base = build_from(CONFIGS["gemma3"])
    stock, ours = base.get_input_embeddings(), host(copy.deepcopy(base), linear=FBGEMM).model
    ids = torch.arange(3, 90)[None]
    expected = stock(ids)
    error = float((ours.get_input_embeddings()(ids) - expected).norm() / expected.norm())
    # it shares the integers of the head, which the kernel multiplies
    assert error < rounding(Kernels(linear=FBGEMM), 0.01)


def test_small_linears_stay_in_floats() -> None:
    """Such as the routers of Mixtral and Qwen's mixtures: they decide more than they cost."""
    base = build("llama")
    layer = base.get_submodule("model.layers.0.self_attn")
    layer.o_proj = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)).requires_grad_(False)
    hosted = host(base, linear=FBGEMM)
    assert type(hosted.model.get_submodule("model.layers.0.self_attn.o_proj.0")) is nn.Linear
    assert hosted.quantized is not None
    assert {name for name in hosted.quantized.unquantized if "o_proj" in name} == {
        "model.layers.0.self_attn.o_proj.0.weight",
        "model.layers.0.self_attn.o_proj.1.weight",
    }


def test_small_experts_of_a_mixture_stay_in_floats_and_are_told() -> None:
    hosted = host(build_from(CONFIGS["qwen3_moe"]), linear=FBGEMM)
    assert hosted.quantized is not None
    told = {name.rpartition("mlp.")[2] for name in hosted.quantized.unquantized if "mlp." in name}
    assert told == {"experts.gate_up_proj", "experts.down_proj", "gate.weight"}


def test_a_step_of_which_no_row_yields_a_token_computes_no_logits() -> None:
    """A chunk of a long prompt asks the head for no row at all."""
    hosted = host(build("llama"), linear=FBGEMM, budget=8)
    (answer,) = hosted.run([Ask(prompts(40)[0], 2)])
    assert len(answer.tokens) == 2


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_int8_is_for_the_cpu(device: str) -> None:
    with pytest.raises(SettingsError, match=r"quantization is 'int8', but the device is '.*set device to 'cpu'"):
        loader._kernels(torch.device(device), int8=True)


def test_without_a_kernel_int8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose_linear", lambda: None)
    with pytest.raises(SettingsError, match="neither FBGEMM nor oneDNN"):
        loader.load_base(
            "micro", name="m", device="cpu", dtype="auto", max_model_len=64, kv_memory=None, quantization="int8"
        )


def test_without_quantization_nothing_is_made_integers() -> None:
    assert loader._kernels(torch.device("cuda"), int8=False).linear_name is None
    base = loader.load_base("micro", name="m", device="cpu", dtype="auto", max_model_len=64)
    assert base.quantized is None
    assert not any(isinstance(module, Int8Linear | Int8Embedding) for module in base.model.modules())
