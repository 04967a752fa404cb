"""Whatever kind of LoRA PEFT wrote, its rows come out as PEFT computes them from the same folder."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from server.adapters.content.manifest import AdapterPolicy, Manifest, read_manifest
from server.adapters.content.signature import BaseSignature
from server.lora.weights import LoRAWeights
from server.model.model_trace import signature_of
from tests.model.harness import Answer, Ask, Hosted, difference, host, prompts, stock_logits
from tests.model.peft_cases import CASES, MIXTURES, TOLERANCE, base_of, make_adapter
from tests.model.peft_table import PATH, page
from tests.tables import one_of_each

FINGERPRINT = f"sha256:{'0' * 64}"
LIMITS = AdapterPolicy(max_rank=16, max_bytes=1 << 24)
PAIRS = [(name, family) for name, case in CASES.items() for family in case.families]


@dataclass(frozen=True)
class Family:
    """A base, the engine's copy of it, and a plain adapter to stand beside others."""

    base: PreTrainedModel
    hosted: Hosted
    signature: BaseSignature

    def read(self, folder: Path) -> tuple[Manifest, LoRAWeights]:
        """An adapter as the server reads and prepares it."""
        manifest = read_manifest(folder, self.signature, LIMITS)
        return manifest, self.hosted.runner.prepare(manifest)


@functools.cache
def family_of(name: str, dtype: torch.dtype = torch.float32) -> Family:
    """Made once; every test leaves it as it was."""
    base = base_of(name, dtype)
    hosted = host(copy.deepcopy(base), budget=64)
    return Family(base, hosted, signature_of("base", FINGERPRINT, hosted.trace))


def make(case: str, family: str, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A case's adapter, saved to the folder and loaded again by PEFT."""
    folder.mkdir()
    return make_adapter(family_of(family, dtype).base, CASES[case], family, folder)


def check(answer: Answer, model: nn.Module) -> None:
    """The logits are the model's, and so is every token whose two likeliest are further apart than the tolerance."""
    expected = stock_logits(model, answer)
    assert difference(answer.logits, expected) < TOLERANCE
    best = expected.topk(2, dim=-1)
    for token, ids, values in zip(answer.tokens, best.indices, best.values, strict=True):
        if values[0] - values[1] > TOLERANCE * expected.abs().max():
            assert token == ids[0]


@pytest.mark.parametrize(("case", "name"), one_of_each(PAIRS))
def test_rows_equal_pefts_alone_among_equals_and_mixed(case: str, name: str, tmp_path: Path) -> None:
    family = family_of(name)
    models = {"it": make(case, name, tmp_path / "it"), "beside": make("rslora", name, tmp_path / "beside")}
    hosted, before = family.hosted, dict(family.hosted.model.named_modules())
    asks = [Ask(prompt, 3) for prompt in prompts(12, 7, 21)]
    untouched = hosted.run(asks)
    for adapter in models:
        hosted.add(adapter, family.read(tmp_path / adapter)[1])
    chosen = (("it",), ("it", "it", "it"), (None, "it", "beside"))
    for adapters in chosen:
        batch = [Ask(ask.prompt, 3, adapter) for ask, adapter in zip(asks, adapters, strict=False)]
        for answer in hosted.run(batch):
            check(answer, models.get(str(answer.ask.adapter), family.base))
            if answer.ask.adapter == "it":
                assert difference(answer.logits, stock_logits(family.base, answer)) > 0.01
    base_row = hosted.run([asks[0], Ask(asks[1].prompt, 3, "it"), Ask(asks[2].prompt, 3, "beside")])[0]
    assert_unchanged(base_row, untouched[0], name)
    for adapter in models:
        hosted.runner.remove_adapter(adapter)
    assert dict(hosted.model.named_modules()) == before
    for was, now in zip(untouched, hosted.run(asks), strict=True):
        assert torch.equal(was.logits, now.logits)


def assert_unchanged(now: Answer, was: Answer, family: str) -> None:
    """To the bit; but a mixture's experts compute rows in groups, which depend on what other rows choose."""
    assert torch.equal(now.logits, was.logits) or (
        family in MIXTURES and difference(now.logits, was.logits) < TOLERANCE
    )


@pytest.mark.parametrize("case", CASES)
def test_the_plan_knows_the_bytes_from_the_headers(case: str, tmp_path: Path) -> None:
    """Only what equals the base's own is dropped when the tensors are prepared."""
    name = CASES[case].families[0]
    make(case, name, tmp_path / "it")
    manifest, weights = family_of(name).read(tmp_path / "it")
    copies = any(part.own for part in manifest.plan.parts.values()) and "saved" not in case
    assert weights.num_bytes <= manifest.plan.num_bytes
    assert copies or weights.num_bytes == manifest.plan.num_bytes
    assert manifest.plan.composable <= weights.composable


BFLOAT16 = [("dora_embedding", "llama"), ("saved_both", "gemma3"), ("tokens", "gemma3"), ("experts", "qwen3_moe")]


@pytest.mark.parametrize(("case", "name"), BFLOAT16)
def test_a_bfloat16_base_is_as_near_to_the_truth_as_peft_in_bfloat16(case: str, name: str, tmp_path: Path) -> None:
    """Truth is PEFT in float32 on the same rounded base."""
    family = family_of(name, torch.bfloat16)
    peft = make(case, name, tmp_path / "it", torch.bfloat16)
    family.hosted.add("it", family.read(tmp_path / "it")[1])
    (answer,) = family.hosted.run([Ask(prompts(21)[0], 6, "it")])
    family.hosted.runner.remove_adapter("it")
    truth = stock_logits(copy.deepcopy(peft).float(), answer)
    ours = float((answer.logits - truth).abs().mean())
    theirs = float((stock_logits(peft, answer) - truth).abs().mean())
    assert ours < 1.25 * theirs


def test_an_adapter_is_prepared_from_the_bases_own_weights_whatever_is_wrapped(tmp_path: Path) -> None:
    """DoRA's norms are of the base; an adapter in memory that has a head of its own must not come into them."""
    family = family_of("llama")
    make("dora_embedding", "llama", tmp_path / "dora")
    make("saved_head", "llama", tmp_path / "own")
    alone = family.read(tmp_path / "dora")[1]
    family.hosted.add("own", family.read(tmp_path / "own")[1])
    beside = family.read(tmp_path / "dora")[1]
    family.hosted.runner.remove_adapter("own")
    one, other = alone.deltas["lm_head"].scale, beside.deltas["lm_head"].scale
    assert one is not None and other is not None and torch.equal(one, other)


def test_modelling_code_reads_the_bases_attributes_of_a_wrapped_module(tmp_path: Path) -> None:
    family = family_of("gpt_oss")
    make("experts", "gpt_oss", tmp_path / "it")
    plain = family.hosted.model.get_submodule("model.layers.0.mlp.experts")
    family.hosted.add("it", family.read(tmp_path / "it")[1])
    wrapped = family.hosted.model.get_submodule("model.layers.0.mlp.experts")
    family.hosted.runner.remove_adapter("it")
    assert wrapped is not plain
    assert wrapped.num_experts == plain.num_experts
    assert wrapped.gate_up_proj is plain.gate_up_proj
    with pytest.raises(AttributeError):
        _ = wrapped.nothing


def test_the_page_says_what_is_tested_here() -> None:
    text = PATH.read_text(encoding="utf-8")
    assert text == page(text), "run python -m tests.model.peft_table"
