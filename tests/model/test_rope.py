"""Frequencies that depend on length are chosen once, for the longest sequence that may come; others stay."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedModel

from server.model.patches import ModelPatches, fix_rope
from tests.model.families import FAMILIES, LONGROPE_BORDER, build, build_from, fix_long_factors

HEAD_DIM = 16
TRAINED, THETA, FACTOR = 32, 10000.0, 4.0


def dynamic(length: int) -> torch.Tensor:
    """Dynamic NTK by its formula: theta grows by (factor * length / trained - (factor - 1)) ** (d / (d - 2))."""
    growth = (FACTOR * max(length, TRAINED) / TRAINED - (FACTOR - 1)) ** (HEAD_DIM / (HEAD_DIM - 2))
    return torch.tensor([1.0 / (THETA * growth) ** (n / HEAD_DIM) for n in range(0, HEAD_DIM, 2)])


def frequencies(model: PreTrainedModel, name: str = "inv_freq") -> torch.Tensor:
    """Those in use now."""
    found = getattr(model.get_submodule("model.rotary_emb"), name)
    assert isinstance(found, torch.Tensor)
    return found.clone()


def look(model: PreTrainedModel, length: int) -> None:
    """A forward of this length, after which stock code may have chosen anew."""
    with torch.inference_mode():
        model(input_ids=torch.full((1, length), 5), use_cache=False)


def llama(rope: dict[str, object]) -> PreTrainedModel:
    """A Llama trained on 32 tokens with this RoPE."""
    config = copy.deepcopy(FAMILIES["llama"])
    assert isinstance(config, LlamaConfig)
    return build_from(LlamaConfig(**{**config.to_dict(), "rope_parameters": rope, "max_position_embeddings": TRAINED}))


@pytest.mark.parametrize("family", ["llama", "llama3_rope", "gpt_oss", "qwen3"])
def test_frequencies_that_do_not_depend_on_length_stay(family: str) -> None:
    model = build(family)
    before = frequencies(model)
    fix_rope(model, 128, ModelPatches())
    look(model, 100)
    assert torch.equal(frequencies(model), before)


@pytest.mark.parametrize("length", [16, TRAINED, 48, 128])
def test_dynamic_rope_is_chosen_for_the_longest_and_kept(length: int) -> None:
    model = llama({"rope_type": "dynamic", "rope_theta": THETA, "factor": FACTOR})
    fix_rope(model, length, ModelPatches())
    torch.testing.assert_close(frequencies(model), dynamic(length))
    for other in (3, 60, 120, 5):
        look(model, other)
        torch.testing.assert_close(frequencies(model), dynamic(length))


def test_longrope_takes_the_short_factors_up_to_the_border_and_the_long_ones_beyond() -> None:
    short, long, expected = (build("phi3_longrope") for _ in range(3))
    before = frequencies(short)
    fix_long_factors(expected)
    fix_rope(short, LONGROPE_BORDER, ModelPatches())
    fix_rope(long, LONGROPE_BORDER + 1, ModelPatches())
    for length in (5, 100, 7):
        look(short, length)
        look(long, length)
        assert torch.equal(frequencies(short), before)
        torch.testing.assert_close(frequencies(long), frequencies(expected))


def test_fixed_frequencies_are_what_stock_code_uses_at_that_length() -> None:
    """Cosines and sines, attention scaling included, of a sequence exactly as long as the longest."""
    fixed, stock = build("phi3_longrope"), build("phi3_longrope")
    fix_rope(fixed, 100, ModelPatches())
    positions, x = torch.arange(100)[None], torch.zeros(1, 100, 64)
    ours, theirs = (model.get_submodule("model.rotary_emb")(x, positions) for model in (fixed, stock))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_of_different_kinds_are_fixed_each_for_itself() -> None:
    config = copy.deepcopy(FAMILIES["gemma3"]).to_dict()
    config["max_position_embeddings"] = TRAINED
    config["rope_parameters"] = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": THETA, "factor": FACTOR},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
    model = build_from(Gemma3TextConfig(**config))
    sliding = frequencies(model, "sliding_attention_inv_freq")
    fix_rope(model, 96, ModelPatches())
    look(model, 5)
    look(model, 110)
    torch.testing.assert_close(frequencies(model, "full_attention_inv_freq"), dynamic(96))
    assert torch.equal(frequencies(model, "sliding_attention_inv_freq"), sliding)
