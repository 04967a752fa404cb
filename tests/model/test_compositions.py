"""Several adapters on one row, and an adapter at a weight, come out as PEFT's combination of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from server.sequence import LoRARequest
from tests.model.harness import Ask, prompts, stock_logits
from tests.model.harness import difference as distance
from tests.model.test_peft_cases import check, family_of, make

pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")

_ADAPTERS = {
    "llama": ("all_linear", "rslora", "patterns"),
    "gpt2_tied": ("embedding", "rslora", "pissa"),
    "gemma3": ("embedding", "rslora", "all_linear"),
}
_WEIGHTS = [(1.0, 1.0, 1.0), (0.7, -0.4, 2.0), (0.5, 0.25)]


def together(base: PreTrainedModel, folder: Path, names: tuple[str, ...]) -> PeftModel:
    """All of them on one base, by PEFT."""
    peft = PeftModel.from_pretrained(copy.deepcopy(base), str(folder / names[0]), names[0])
    for name in names[1:]:
        peft.load_adapter(str(folder / name), name)
    return peft


def combined(model: PeftModel, names: tuple[str, ...], weights: tuple[float, ...]) -> PeftModel:
    """PEFT's own combination: ranks end to end, each A times weight and scaling."""
    name = "_".join(map(str, range(len(model.peft_config))))
    model.add_weighted_adapter(list(names), list(weights), name, combination_type="cat")
    model.set_adapter(name)
    return model


@pytest.mark.parametrize("name", _ADAPTERS)
def test_deltas_add_up_as_pefts_cat(name: str, tmp_path: Path) -> None:
    """Different ranks, with and without rsLoRA, negative weights, one adapter scaled; side by side, and a base row."""
    family, adapters = family_of(name), _ADAPTERS[name]
    for adapter in adapters:
        make(adapter, name, tmp_path / adapter)
        family.hosted.add(adapter, family.read(tmp_path / adapter)[1])
    peft = together(family.base, tmp_path, adapters)
    mixes = [(adapters[: len(weights)], weights) for weights in (*_WEIGHTS, (0.3,))]
    asks = [
        Ask(prompt, 3, tuple(LoRARequest(*use) for use in zip(*mix, strict=True)))
        for prompt, mix in zip(prompts(9, 17, 5, 12), mixes, strict=True)
    ]
    plain, *answers = family.hosted.run([Ask(prompts(8)[0], 3), *asks])
    for answer, (names, weights) in zip(answers, mixes, strict=True):
        check(answer, combined(peft, names, weights).eval())
        assert distance(answer.logits, stock_logits(family.base, answer)) > 0.01
    check(plain, family.base)
    for adapter in adapters:
        family.hosted.runner.remove_adapter(adapter)


def test_an_adapter_of_weight_one_alone_is_the_adapter_to_the_bit(tmp_path: Path) -> None:
    family = family_of("llama")
    make("rslora", "llama", tmp_path / "it")
    family.hosted.add("it", family.read(tmp_path / "it")[1])
    ask = Ask(prompts(9)[0], 3, "it")
    (one,), (other,) = family.hosted.run([ask]), family.hosted.run([Ask(ask.prompt, 3, (LoRARequest("it", 1.0),))])
    family.hosted.runner.remove_adapter("it")
    assert torch.equal(one.logits, other.logits)
