"""What a GGUF says that would be computed otherwise, or not at all, refuses the file by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from base_files.errors import BaseMalformed, BaseUnloadable
from base_files.gguf.base import GGUFBase
from base_files.gguf.config import NEUTRAL, NO_EFFECT
from base_files.gguf.rope import llama3_factors
from base_files.stock_model import stock_config
from tests.gguf_models import Arrays, Metadata, model_arrays, model_metadata, plain_vocabulary, write_gguf_model
from tests.model.families import build

ARCHITECTURE = "llama"
Change = Callable[[Arrays, Metadata], Any]


def changed(path: Path, change: Change, architecture: str = ARCHITECTURE) -> GGUFBase:
    """A file of a random Llama in which something is another way."""
    model = build("llama")
    arrays = model_arrays(model, ARCHITECTURE)
    metadata = model_metadata(model, ARCHITECTURE) | plain_vocabulary(model.config.vocab_size)
    change(arrays, metadata)
    return GGUFBase(write_gguf_model(path / "a.gguf", architecture, arrays, metadata))


def with_key(key: str, value: object) -> Change:
    return lambda arrays, metadata: metadata.update({f"{ARCHITECTURE}.{key}": value})


def with_tensor(name: str, *shape: int) -> Change:
    return lambda arrays, metadata: arrays.update({name: torch.ones(shape)})


REFUSED: dict[str, tuple[Change, str]] = {
    "a key": (with_key("attention.temperature_length", 3), r"keys that are not understood: llama\.attention\.temp"),
    "experts in no layer": (with_key("nextn_predict_layers", 1), "nextn_predict_layers is 1"),
    "not causal": (with_key("attention.causal", False), "attention.causal is False"),
    "a number that is text": (with_key("block_count", "3"), "llama.block_count is '3': it must be an integer"),
    "a number below 0": (with_key("rope.freq_base", float("nan")), "llama.rope.freq_base is nan"),
    "no rotation": (with_key("rope.freq_base", 0.0), "rope.freq_base is 0: it must be above 1"),
    "more layers than tensors": (with_key("block_count", 2**32 - 1), "block_count is 4294967295, and the file has 30"),
    "no heads": (with_key("attention.head_count", 0), "attention.head_count must be above 0"),
    "layers of several widths": (with_key("feed_forward_length", [96, 96, 64]), "llama.feed_forward_length is array"),
    "values of another length": (with_key("attention.value_length", 8), "attention.value_length is 8"),
    "part of a head rotated": (with_key("rope.dimension_count", 8), "rope.dimension_count is 8"),
    "a scaling": (with_key("rope.scaling.type", "ntk"), "rope.scaling.type is 'ntk'"),
    "a norm": (with_tensor("blk.0.attn_q_norm.weight", 16), r"not understood: blk\.0\.attn_q_norm\.weight"),
    "another layer": (with_tensor("blk.3.attn_norm.weight", 64), r"not understood: blk\.3\.attn_norm\.weight"),
    "factors of long texts": (with_tensor("rope_factors_long.weight", 8), "not understood: rope_factors_long"),
    "factors of nothing known": (
        lambda arrays, _: arrays.update({"rope_freqs.weight": torch.linspace(1, 8, 8)}),
        "rope_freqs.weight, from 1 to 8, are those of no known scaling",
    ),
    "factors of a length": (with_tensor("rope_freqs.weight", 4), r"rope_freqs.weight has the shape \[4\]"),
    "factors below 0": (
        lambda arrays, _: arrays.update({"rope_freqs.weight": -torch.ones(8)}), "numbers that are not above 0",
    ),
    "two scalings": (
        lambda *file: (with_tensor("rope_freqs.weight", 8)(*file), with_key("rope.scaling.factor", 2.0)(*file)),
        "it has rope_freqs.weight, and a scaling of type linear by 2",
    ),
    "a missing tensor": (
        lambda arrays, _: arrays.pop("blk.1.ffn_up.weight"), r"lacks tensors .* has: blk\.1\.ffn_up\.weight",
    ),
    "a tensor's shape": (
        with_tensor("blk.1.ffn_up.weight", 64, 96), r"blk\.1\.ffn_up\.weight \[64, 96\] instead of \[96, 64\]",
    ),
    "no embedding": (lambda arrays, _: arrays.pop("token_embd.weight"), "no tensor token_embd.weight"),
    "a missing key": (lambda _, metadata: metadata.pop("llama.block_count"), "its metadata has no llama.block_count"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_understood_refuses_the_file_by_its_name(what: str, tmp_path: Path) -> None:
    change, sentence = REFUSED[what]
    base = changed(tmp_path, change)
    with pytest.raises(BaseMalformed, match=sentence) as refusal:
        assert base.config and base.tensors()
    assert str(refusal.value).startswith("base model 'a' cannot be read: ")


def test_an_architecture_that_is_not_read_is_refused_with_those_that_are(tmp_path: Path) -> None:
    base = changed(tmp_path, lambda arrays, metadata: None, architecture="mamba")
    with pytest.raises(BaseMalformed, match=r"general.architecture is 'mamba'; llama, .* are read .* hub id"):
        assert base.config


def test_a_config_that_transformers_refuses_is_refused_with_its_sentence(tmp_path: Path) -> None:
    """Its validation raises an exception that is no ValueError."""
    base = changed(tmp_path, with_key("embedding_length", 66))
    with pytest.raises(BaseUnloadable, match=r"hidden size \(66\) is not a multiple"):
        stock_config(base)


def test_keys_without_effect_are_listed_with_a_reason_and_accepted(tmp_path: Path) -> None:
    assert all(reason for reason in NO_EFFECT.values())
    values: dict[str, Any] = dict.fromkeys(NO_EFFECT, 1) | {key: values[0] for key, values in NEUTRAL.items()}

    def change(arrays: Arrays, metadata: Metadata) -> None:
        metadata |= {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}

    base = changed(tmp_path, change)
    assert base.config["num_hidden_layers"] == 3 and len(base.tensors()) == 30


def test_what_the_file_does_not_say_has_llama_cpps_default(tmp_path: Path) -> None:
    """transformers' own are others: 32 heads of keys for Llama, and what the class was first written for."""

    def change(arrays: Arrays, metadata: Metadata) -> None:
        for key in ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base"):
            metadata.pop(f"{ARCHITECTURE}.{key}")

    config = changed(tmp_path, change).config
    assert (config["num_key_value_heads"], config["head_dim"]) == (4, 16)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("original", [8192, 4096, 131072])
def test_factors_of_rotations_become_the_scaling_they_were_made_of(
    factor: float, original: int, tmp_path: Path
) -> None:
    """Left out, such a file answers well up to a few thousand tokens, and then worse and worse."""
    factors = torch.from_numpy(llama3_factors(500000.0, 16, factor, original))

    def change(arrays: Arrays, metadata: Metadata) -> None:
        arrays["rope_freqs.weight"] = factors
        metadata[f"{ARCHITECTURE}.rope.freq_base"] = 500000.0

    assert changed(tmp_path, change).config["rope_parameters"] == {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": original,
    }  # fmt: skip


def test_factors_of_1_scale_nothing(tmp_path: Path) -> None:
    base = changed(tmp_path, with_tensor("rope_freqs.weight", 8))
    assert base.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_a_base_is_named_without_its_path_and_its_part(tmp_path: Path) -> None:
    assert GGUFBase(tmp_path / "Qwen3-0.6B-Q8_0.gguf").name == "Qwen3-0.6B-Q8_0"
    assert GGUFBase(tmp_path / "big-00001-of-00003.gguf").name == "big"
    assert GGUFBase(tmp_path / "a.gguf", "smollm2").name == "smollm2"
