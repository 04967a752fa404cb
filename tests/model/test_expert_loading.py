"""Mixtures of experts from their files have the numbers that transformers makes of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from base_files.locate import find_base
from base_files.stock_model import is_mapped, stock_model
from benchmarks.parts.random_tokenizer import save_tokenizer
from server.model.loader import Base, load_base
from server.model.model_trace import ModelTrace
from server.model.quantizer import mixtures
from server.model.runner import ModelRunner
from server.quantization.int8_experts import Int8Experts
from tests.model.families import build_from
from tests.model.harness import Ask, Hosted, difference, host, prompts, stock_logits
from tests.model.mixtures import MIXTURES
from tests.model.mxfp4_bases import dequantized_by_transformers, save_gpt_oss

ASKS = [Ask(prompt, 6) for prompt in prompts(9, 4, 1)]
NEAR = 0.3
"""Of the largest logit: a router may choose another expert; measured: 0.15."""


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mxfp4") / "base"
    save_gpt_oss(folder)
    return folder


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stacked") / "base"
    build_from(MIXTURES["qwen3_moe"]).save_pretrained(folder)
    save_tokenizer(folder, MIXTURES["qwen3_moe"].vocab_size)
    return folder


def load(folder: Path, quantization: str, dtype: str = "float32") -> Base:
    return load_base(
        str(folder), name="mixture", device="cpu", dtype=dtype, max_model_len=64, quantization=quantization
    )


def hosted(base: Base) -> Hosted:
    return Hosted(base.model, ModelRunner.of(base, num_slots=3), ModelTrace(), base.patches, kernels=base.kernels)


def experts_of(model: PreTrainedModel) -> dict[str, Int8Experts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Experts)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mxfp4_base_is_the_model_that_transformers_dequantizes(gpt_oss: Path, dtype: torch.dtype) -> None:
    source = find_base(str(gpt_oss))
    assert not is_mapped(source)
    found, expected = stock_model(source, dtype), dequantized_by_transformers(gpt_oss, dtype)
    theirs = dict(expected.named_parameters())
    assert {name for name, _ in found.named_parameters()} == theirs.keys()
    for name, parameter in found.named_parameters():
        assert parameter.dtype == dtype and torch.equal(parameter, theirs[name]), name
    found.set_attn_implementation("eager")
    ids = torch.tensor([prompts(11)[0]])
    assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_its_greedy_answers_are_those_of_transformers(gpt_oss: Path) -> None:
    stock = dequantized_by_transformers(gpt_oss, torch.float32)
    for answer in hosted(load(gpt_oss, "none")).run(ASKS):
        logits = stock_logits(stock, answer)
        assert difference(answer.logits, logits) < 1e-5
        assert answer.tokens == logits.argmax(-1).tolist()


def test_in_int8_it_has_the_integers_of_the_dequantized_model(gpt_oss: Path) -> None:
    base, stock = load(gpt_oss, "int8"), dequantized_by_transformers(gpt_oss, torch.float32)
    assert_same_integers(base, stock)
    answers = hosted(base).run(ASKS)
    assert min(difference(answer.logits, stock_logits(stock, answer)) for answer in answers) < NEAR
    for answer in answers:
        (alone,) = hosted(base).run([answer.ask])
        assert torch.equal(alone.logits, answer.logits) and alone.tokens == answer.tokens


def test_matrices_of_every_expert_are_quantized_as_the_parameters_that_transformers_makes(qwen3_moe: Path) -> None:
    assert not is_mapped(find_base(str(qwen3_moe)))
    assert_same_integers(load(qwen3_moe, "int8"), build_from(MIXTURES["qwen3_moe"]))


def assert_same_integers(base: Base, stock: PreTrainedModel) -> None:
    found = experts_of(base.model)
    assert base.quantized is not None and found.keys() == mixtures(stock).keys() == set(base.quantized.mixtures)
    linear = base.kernels.linear_name
    expected = experts_of(host(copy.deepcopy(stock), linear=linear).model)
    for name, experts in found.items():
        theirs = dict(expected[name].dequantized().named_parameters())
        for weight, parameter in experts.dequantized().named_parameters():
            assert torch.equal(parameter, theirs[weight]), (name, weight)


def test_files_with_buffers_or_other_tensors_are_left_to_transformers(tmp_path: Path) -> None:
    """It knows what of them an architecture needs; DeepSeek's routers have a buffer."""
    build_from(MIXTURES["deepseek_v3"]).save_pretrained(tmp_path / "base")
    source = find_base(str(tmp_path / "base"))
    assert is_mapped(source)
    found = dict(stock_model(source).state_dict())
    assert all(torch.equal(found[name], one) for name, one in build_from(MIXTURES["deepseek_v3"]).state_dict().items())
