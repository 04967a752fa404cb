"""Adapters on an int8 base do what PEFT does on a stock model with the same numbers, and rows stay independent."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from cpu_kernels.kernels import choose_linear
from cpu_kernels.native_kernel import available
from server.adapters.content.manifest import AdapterPolicy, read_manifest
from server.adapters.content.signature import BaseSignature
from server.lora.native import NativeLoRA
from server.lora.weights import LoRAWeights
from server.model.model_trace import signature_of
from server.sequence import LoRARequest
from tests.instruction_sets import PRODUCTS, needs
from tests.model.harness import Answer, Ask, Hosted, difference, host, prompts, stock_logits
from tests.model.int8_oracle import oracle_of, without_copies
from tests.model.peft_cases import CASES, TOLERANCE, base_of, make_adapter
from tests.tables import one_of_each

FINGERPRINT = f"sha256:{'0' * 64}"
LIMITS = AdapterPolicy(max_rank=16, max_bytes=1 << 24)
PAIRS = [
    (name, family) for name, case in CASES.items() for family in dict.fromkeys((case.families[0], case.families[-1]))
]
Adding = Literal["torch", "kernel", "product"]
"""By what deltas are added: the product of integers does it on CPUs with tiles, in bfloat16."""
every_way = pytest.mark.parametrize(
    "adding",
    ["torch", pytest.param("kernel", marks=needs(*PRODUCTS)), pytest.param("product", marks=needs("AMX"))],
)
ROUNDED = ("linear_parameter", "tokens", "tokens_by_module", "tokens_of_head", "experts", "one_expert_parameter")
"""What PEFT computes with other weights, in floats, where the engine adds to the product of integers."""

FLIPPED = 0.1
"""Largest difference of logits where an activation between two integers fell to the other side; measured: 0.045."""
ROUNDED_DELTAS = 0.08
"""The same where deltas are rounded as well, of an answer that has no other expert for it; measured: 0.05."""


@dataclass(frozen=True)
class Family:
    """A stock base, the engine's int8 copy of it, and a stock model with the copy's numbers."""

    base: PreTrainedModel
    hosted: Hosted
    oracle: PreTrainedModel
    signature: BaseSignature

    def read(self, folder: Path) -> LoRAWeights:
        """An adapter as the server reads and prepares it."""
        return self.hosted.runner.prepare(read_manifest(folder, self.signature, LIMITS))

    def make(self, case: str, family: str, folder: Path) -> PeftModel:
        """A case's adapter of the float base, saved to the folder; PEFT's model of it with int8 numbers."""
        folder.mkdir()
        make_adapter(self.base, CASES[case], family, folder)
        cleaned = without_copies(folder, folder.with_name(f"{folder.name}_cleaned"), self.base)
        return load(self.oracle, cleaned)


def load(base: PreTrainedModel, folder: Path) -> PeftModel:
    """PEFT's model of an adapter on a copy of a base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


@functools.cache
def family_of(name: str, *, adding: Adding = "torch") -> Family:
    """Made once; every test leaves it as it was."""
    linear = choose_linear()
    assert linear is not None
    base = base_of(name, torch.float32)
    hosted = host(copy.deepcopy(base), budget=64, linear=linear, native=available() and adding != "torch")
    if adding == "kernel":
        hosted.runner.bank.backend = NativeLoRA(
            list(hosted.runner.bank.base_modules), kernels=hosted.kernels, max_seqs=hosted.max_num_seqs
        )
    return Family(base, hosted, oracle_of(base, hosted.model), signature_of("base", FINGERPRINT, hosted.trace))


def check(answers: Sequence[Answer], model: torch.nn.Module, *, rounded: bool, deltas: bool = False) -> None:
    """Logits are the model's; an activation at the border of two integers may fall to either side.

    Where ``deltas`` are rounded as well, so much is near a border that every answer has some.
    """
    found = [difference(answer.logits, stock_logits(model, answer)) for answer in answers]
    if deltas:
        assert min(found) < ROUNDED_DELTAS
    else:
        assert max(found) < FLIPPED
        assert rounded or min(found) < TOLERANCE


@every_way
@pytest.mark.parametrize(("case", "name"), one_of_each(PAIRS))
def test_rows_are_pefts_on_the_same_numbers(case: str, name: str, adding: Adding, tmp_path: Path) -> None:
    family = family_of(name, adding=adding)
    peft, hosted = family.make(case, name, tmp_path / "it"), family.hosted
    hosted.add("it", family.read(tmp_path / "it"))
    lengths = (7, 21, 2, 1)  # short ones, too: of those at least one has no activation at a border
    asks = [Ask(prompt, 3, "it") for prompt in prompts(*lengths)]
    first, *answers, last = hosted.run([Ask(prompts(12)[0], 3), *asks, Ask(prompts(9)[0], 3)])
    hosted.runner.remove_adapter("it")
    check(answers, peft, rounded=case in ROUNDED, deltas=adding == "product")
    check([first, last], family.oracle, rounded=False)
    for answer in answers:
        assert difference(answer.logits, stock_logits(family.oracle, answer)) > FLIPPED


@pytest.mark.parametrize("case", ["all_linear", "dora", "embedding"])
def test_what_an_adapter_adds_is_near_what_it_adds_to_the_float_base(case: str, tmp_path: Path) -> None:
    """Whatever was rounded in the base, the difference that the adapter makes stays."""
    family = family_of("llama")
    folder = tmp_path / "it"
    family.make(case, "llama", folder)
    floats = load(family.base, folder)
    family.hosted.add("it", family.read(folder))
    ask = prompts(12)[0]
    (with_it,) = family.hosted.run([Ask(ask, 1, "it")])
    (without,) = family.hosted.run([Ask(ask, 1)])
    family.hosted.runner.remove_adapter("it")
    ours = with_it.logits - without.logits
    theirs = stock_logits(floats, with_it) - stock_logits(family.base, without)
    assert float(torch.cosine_similarity(ours, theirs)) > 0.98  # measured: 0.9935 and more
    assert 0.9 < float(ours.norm() / theirs.norm()) < 1.1


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2_tied"])
def test_copies_of_the_bases_own_weights_are_known_and_not_kept(name: str, tmp_path: Path) -> None:
    """PEFT saves the base's embeddings and head beside an adapter on them: what the integers were made of."""
    family = family_of(name)
    family.make("embedding_and_head", name, tmp_path / "it")
    manifest = read_manifest(tmp_path / "it", family.signature, LIMITS)
    assert any(part.own for part in manifest.plan.parts.values())
    weights = family.hosted.runner.prepare(manifest)
    assert not any(delta.own_names for delta in weights.deltas.values())


def test_weights_of_an_adapters_own_are_kept_in_floats(tmp_path: Path) -> None:
    family = family_of("llama")
    family.make("saved_head", "llama", tmp_path / "it")
    delta = family.read(tmp_path / "it").deltas["lm_head"]
    assert delta.own_names == ("weight",) and delta.own is not None
    assert delta.own.get_parameter("weight").dtype == torch.float32


@every_way
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma3"])
def test_rows_are_the_same_to_the_bit_alone_and_among_others(name: str, adding: Adding, tmp_path: Path) -> None:
    family = family_of(name, adding=adding)
    family.make("all_linear" if name != "qwen2" else "lora_bias", name, tmp_path / "it")
    alone = [family.hosted.run([Ask(prompt, 4)])[0] for prompt in prompts(30, 5, 17)]
    family.hosted.add("it", family.read(tmp_path / "it"))
    adapters = (None, "it", None)
    asks = [Ask(one.ask.prompt, 4, adapter) for one, adapter in zip(alone, adapters, strict=True)]
    beside = family.hosted.run(asks)
    family.hosted.runner.remove_adapter("it")
    for was, now, adapter in zip(alone, beside, adapters, strict=True):
        assert torch.equal(was.logits, now.logits) == (adapter is None)


@every_way
def test_compositions_add_up_on_the_integers(adding: Adding, tmp_path: Path) -> None:
    """Two adapters at once are the same as one of both their ranks; PEFT's own model is asked for the sum."""
    family = family_of("llama", adding=adding)
    folders = {case: tmp_path / case for case in ("all_linear", "rslora")}
    for case, folder in folders.items():
        family.make(case, "llama", folder)
        family.hosted.add(case, family.read(folder))
    uses = (LoRARequest("all_linear", 0.5), LoRARequest("rslora", -1.5))
    answers = family.hosted.run([Ask(prompt, 3, uses) for prompt in prompts(12, 7, 21)])
    for case in folders:
        family.hosted.runner.remove_adapter(case)
    check(answers, _composed(family, folders), rounded=False, deltas=adding == "product")


def _composed(family: Family, folders: dict[str, Path]) -> PeftModel:
    peft = PeftModel.from_pretrained(copy.deepcopy(family.oracle), str(folders["all_linear"]), adapter_name="one")
    peft.load_adapter(str(folders["rslora"]), adapter_name="two")
    tuner: Any = peft.base_model
    tuner.set_adapter(["one", "two"])
    modules: list[Any] = list(peft.modules())
    for module in modules:
        for name, factor in (("one", 0.5), ("two", -1.5)):
            if name in getattr(module, "lora_A", ()):
                module.set_scale(name, factor)
    return peft.eval()
