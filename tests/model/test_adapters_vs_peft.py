"""Rows of an adapter come out as PEFT computes them, whatever adapters the rows beside them use."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from server.adapters.content.manifest import AdapterPolicy, read_manifest
from server.lora.batched import BatchedTorchLoRA
from server.lora.weights import LoRAWeights
from server.model.model_trace import signature_of
from tests.model.families import FAMILIES, build, fix_long_factors
from tests.model.harness import Answer, Ask, Hosted, difference, host, prompts, stock_logits
from tests.tables import only

TOLERANCE = 1e-4
"""Largest difference of logits, as a share of PEFT's largest logit, in float32; measured: 3e-6."""

OF_EACH_KIND = ("llama", "gpt2", "gemma3", "phi3", "gpt_oss")
"""Plain; with Conv1D; with windows and norms of heads; with joined projections; with experts."""

FINGERPRINT = f"sha256:{'0' * 64}"
LIMITS = AdapterPolicy(max_rank=16, max_bytes=1 << 24)

_ATTENTION = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"], "phi3_longrope": ["qkv_proj"]}
_LAST_PROJECTION = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}
_HEAD = {"gpt_neox": "embed_out"}


@dataclass(frozen=True)
class Oracle:
    """A base, and the same base under PEFT once per adapter; ``hosted`` is the engine's copy, without adapters yet."""

    base: PreTrainedModel
    peft: Mapping[str, PeftModel]
    weights: Mapping[str, LoRAWeights]
    hosted: Hosted

    def expect(self, answer: Answer) -> torch.Tensor:
        """Logits by PEFT, or by the stock base where no adapter was asked for."""
        adapter = answer.ask.adapter
        assert not isinstance(adapter, tuple)
        return stock_logits(self.base if adapter is None else self.peft[adapter], answer)

    def check(self, answers: list[Answer]) -> None:
        """Every answer's logits are the oracle's; with an adapter they are far from the base's."""
        for answer in answers:
            assert difference(answer.logits, self.expect(answer)) < TOLERANCE
            if answer.ask.adapter is not None:
                assert difference(answer.logits, stock_logits(self.base, answer)) > 0.02


def configs(family: str) -> Mapping[str, dict[str, Any]]:
    """Adapters of different rank, scaling and reach."""
    attention = _ATTENTION.get(family, ["q_proj", "v_proj"])
    last = _LAST_PROJECTION.get(family, "self_attn.o_proj")
    return {
        "wide": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": attention},
        "patterns": {
            "r": 4, "lora_alpha": 4, "target_modules": "all-linear",
            "rank_pattern": {last: 7}, "alpha_pattern": {attention[0]: 12, last: 9.5},
        },
        "head": {"r": 4, "lora_alpha": 8, "target_modules": [*attention, _HEAD.get(family, "lm_head")]},
    }  # fmt: skip


def make_oracle(family: str, folder: Path) -> Oracle:
    """Adapters made and saved by PEFT, read from their folders by the server."""
    base = build(family)
    hosted = host(copy.deepcopy(base))
    if family == "phi3_longrope":
        fix_long_factors(base)
    signature = signature_of("base", FINGERPRINT, hosted.trace)
    peft, weights = {}, {}
    for seed, (name, fields) in enumerate(configs(family).items()):
        peft[name] = make_adapter(base, seed=seed, fan_in_fan_out=family == "gpt2", **fields)
        # beside a LoRA on the head PEFT would save a copy of the base's head, and say so in a warning
        peft[name].save_pretrained(str(folder / name), save_embedding_layers=False)
        weights[name] = hosted.runner.prepare(read_manifest(folder / name, signature, LIMITS))
    return Oracle(base, peft, weights, hosted)


def make_adapter(base: PreTrainedModel, *, seed: int, **fields: Any) -> PeftModel:
    """PEFT's model on a copy of the base, with A and B random."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **fields))
        assert isinstance(model, PeftModel)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("family", only(OF_EACH_KIND, FAMILIES))
def test_rows_equal_pefts_alone_among_equals_and_mixed(family: str, tmp_path: Path) -> None:
    oracle = make_oracle(family, tmp_path)
    hosted = oracle.hosted
    before, base_asks = _modules(hosted), [Ask(prompt, 6) for prompt in prompts(21, 5)]
    untouched = hosted.run(base_asks)
    for name, weights in oracle.weights.items():
        hosted.add(name, weights)
    alone = [hosted.run([Ask(prompts(21)[0], 4, name)])[0] for name in oracle.weights]
    equals = hosted.run([Ask(prompt, 4, "patterns", step=n) for n, prompt in enumerate(prompts(3, 40, 9))])
    mixed = hosted.run(_mixed(list(oracle.weights)))
    for answers in (alone, equals, mixed, hosted.run(base_asks)):
        oracle.check(answers)
    for name in oracle.weights:
        hosted.runner.remove_adapter(name)
    assert _modules(hosted) == before
    for was, now in zip(untouched, hosted.run(base_asks), strict=True):
        assert torch.equal(was.logits, now.logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_rows_equal_pefts_where_adapters_of_one_shape_are_computed_side_by_side(family: str, tmp_path: Path) -> None:
    """Four adapters alike, and modules that share an input; sequences join and leave, so that slots change."""
    base = build(family)
    groups = _groups(base)
    hosted = host(copy.deepcopy(base), groups=groups, max_num_seqs=6, budget=24)
    assert groups or family == "gpt2"
    signature = signature_of("base", FINGERPRINT, hosted.trace)
    peft, weights = {}, {}
    for seed, name in enumerate("abcd"):
        peft[name] = make_adapter(base, seed=seed, **configs(family)["wide"], fan_in_fan_out=family == "gpt2")
        peft[name].save_pretrained(str(tmp_path / name), save_embedding_layers=False)
        manifest = read_manifest(tmp_path / name, signature, LIMITS)
        weights[name] = hosted.runner.prepare(manifest)
        assert weights[name].num_bytes == manifest.plan.num_bytes and bool(weights[name].fused) == bool(groups)
        hosted.add(name, weights[name])
    oracle = Oracle(base, peft, weights, hosted)
    oracle.check(hosted.run(_mixed(list("abcd"))))
    backend = hosted.runner.bank.backend
    assert isinstance(backend, BatchedTorchLoRA)
    assert [slots.capacity for slots in backend._slots.values()] == [4]
    hosted.runner.bank.check_integrity()


def _groups(base: PreTrainedModel) -> list[tuple[str, ...]]:
    """The modules of each layer that receive the same tensor."""
    names = [name for name, _ in base.named_modules()]
    attention = [name.removesuffix("q_proj") for name in names if name.endswith("q_proj")]
    gated = [name.removesuffix("gate_proj") for name in names if name.endswith("gate_proj")]
    shared = [tuple(f"{one}{part}_proj" for part in "qkv") for one in attention]
    return shared + [(f"{one}gate_proj", f"{one}up_proj") for one in gated]


def _mixed(adapters: list[str]) -> list[Ask]:
    """Base and adapters in turn, long and short, more than there are slots, so that every step is another mixture."""
    chosen: list[str | None] = [None, *adapters, None, *adapters]
    lengths = (33, 6, 19, 2, 25, 11, 40, 1, 8, 17)
    return [Ask(prompt, 6, chosen[n], step=n) for n, prompt in enumerate(prompts(*lengths))]


def _modules(hosted: Hosted) -> dict[str, nn.Module]:
    return dict(hosted.model.named_modules())


def test_base_rows_are_the_same_to_the_bit_beside_adapters(tmp_path: Path) -> None:
    """A base row is computed by the base's linears alone; what is added to other rows does not touch it."""
    oracle = make_oracle("llama", tmp_path)
    hosted = oracle.hosted
    hosted.budget, beside = 64, prompts(12, 12)
    base = Ask(beside[0], 8)
    (plain, _) = hosted.run([base, Ask(beside[1], 8)])
    hosted.add("wide", oracle.weights["wide"])
    (mixed, _) = hosted.run([base, Ask(beside[1], 8, "wide")])
    assert torch.equal(plain.logits, mixed.logits)


def test_an_adapter_removed_leaves_the_others(tmp_path: Path) -> None:
    oracle = make_oracle("qwen2", tmp_path)
    for name in ("wide", "rslora"):
        oracle.hosted.add(name, oracle.weights[name])
    asks = [Ask(prompt, 4, "rslora") for prompt in prompts(20, 4)]
    before = oracle.hosted.run(asks)
    oracle.hosted.runner.remove_adapter("wide")
    after = oracle.hosted.run(asks)
    oracle.check(after)
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was.logits, now.logits)


def test_adding_twice_and_removing_what_is_not_there_change_nothing(tmp_path: Path) -> None:
    oracle = make_oracle("llama", tmp_path)
    before = _modules(oracle.hosted)
    oracle.hosted.runner.remove_adapter("wide")
    oracle.hosted.add("wide", oracle.weights["wide"])
    oracle.hosted.add("wide", oracle.weights["wide"])
    oracle.check(oracle.hosted.run([Ask(prompts(9)[0], 3, "wide")]))
    oracle.hosted.runner.remove_adapter("wide")
    assert _modules(oracle.hosted) == before


def test_bfloat16_base_with_adapters_is_as_near_to_the_truth_as_peft_in_bfloat16(tmp_path: Path) -> None:
    """Truth is PEFT in float32 on the same rounded base."""
    base = build("llama", dtype=torch.bfloat16)
    hosted = host(copy.deepcopy(base))
    ours = theirs = 0.0
    for seed, (name, fields) in enumerate(configs("llama").items()):
        peft = make_adapter(base, seed=seed, **fields)
        peft.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
        signature = signature_of("base", FINGERPRINT, hosted.trace)
        hosted.add(name, hosted.runner.prepare(read_manifest(tmp_path / name, signature, LIMITS)))
        (answer,) = hosted.run([Ask(prompts(21)[0], 6, name)])
        truth = stock_logits(copy.deepcopy(peft).float(), answer)
        ours += float((answer.logits - truth).abs().mean())
        theirs += float((stock_logits(peft, answer) - truth).abs().mean())
    assert ours < 1.25 * theirs
