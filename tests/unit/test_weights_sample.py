"""The sample of a base: its text, its size, and which deviations are those of a format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from base_files.common_architecture import common_architecture, differing_fields
from base_files.gguf.blocks import BLOCK_TYPES
from base_files.sample_comparison import BLOCK_LEVELS, compare
from base_files.source import FolderBase
from base_files.vocabulary import vocabulary_digest
from base_files.weights_sample import FLOATS, Floats, SampledTensor, WeightsSample, sample_of
from tests.tiny_models import build_tiny_base

MOST_BYTES = 8_000
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types that gguf's package writes."""
NUM_MATRICES = 21


def in_format(values: Floats, dtype: str) -> Floats:
    """``values`` as a file of this type has them."""
    kind = gguf.GGMLQuantizationType[dtype]
    found: Floats = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind).astype(np.float32)
    return found.reshape(values.shape)


def sampled(weights: Mapping[str, Floats], dtype: str, *, norms: str = "F32") -> WeightsSample:
    """A base of these values, the matrices in ``dtype``."""
    tensors = {
        name: SampledTensor(kind, (64,) if "norm" in name else (576, 576), in_format(values, kind))
        for name, values in weights.items()
        for kind in [norms if "norm" in name else dtype]
    }
    return WeightsSample({"model_type": "llama", "rope_theta": 1e5}, "sha256:" + "1" * 64, tensors)


@pytest.fixture(scope="module")
def weights() -> dict[str, Floats]:
    """Values in bfloat16, as a base is published."""
    source = np.random.default_rng(0)
    found = {f"layers.{number}.weight": source.standard_normal(32) for number in range(NUM_MATRICES)}
    found |= {f"layers.{number}.norm.weight": 1 + 0.1 * source.standard_normal(8) for number in range(6)}
    return {name: in_format(values.astype(np.float32), "BF16") for name, values in found.items()}


def tuned(weights: Mapping[str, Floats], share: float, *, norms: bool = False) -> dict[str, Floats]:
    """Every matrix moved by ``share`` of its spread; with ``norms``, these instead."""
    source = np.random.default_rng(1)
    return {
        name: (values + share * source.standard_normal(values.shape)).astype(np.float32)
        if ("norm" in name) == norms
        else values
        for name, values in weights.items()
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> WeightsSample:
    sample = sample_of(FolderBase(build_tiny_base(tmp_path_factory.mktemp("tiny"))))
    assert sample is not None
    return sample


def difference(trained: WeightsSample, served: WeightsSample) -> str | None:
    return compare(trained, served, same_container=False)


def test_a_sample_survives_the_sidecar_and_stays_small(tiny: WeightsSample) -> None:
    text = json.dumps(tiny.to_json())
    assert WeightsSample.parse(json.loads(text)).to_json() == tiny.to_json()
    micro = sample_of(FolderBase(Path("micro_base")))
    assert micro is not None
    assert max(len(text), len(json.dumps(micro.to_json()))) <= MOST_BYTES


@pytest.mark.parametrize("dtype", [*FLOATS, *BLOCKS])
@pytest.mark.parametrize("back", [False, True])
def test_every_format_of_the_same_weights_is_accepted(weights: dict[str, Floats], dtype: str, back: bool) -> None:
    """Through the text of a sidecar, which rounds values of block types to float16."""
    pair = [sampled(weights, "BF16", norms="BF16"), sampled(weights, dtype)]
    trained, served = reversed(pair) if back else pair
    assert difference(WeightsSample.parse(json.loads(json.dumps(trained.to_json()))), served) is None


@pytest.mark.parametrize("trained", BLOCKS)
@pytest.mark.parametrize("served", BLOCKS)
def test_two_roundings_of_the_same_weights_are_accepted(weights: dict[str, Floats], trained: str, served: str) -> None:
    assert difference(sampled(weights, trained), sampled(weights, served)) is None


@pytest.mark.parametrize("dtype", BLOCKS)
def test_a_folder_of_dequantized_weights_is_accepted(weights: dict[str, Floats], dtype: str) -> None:
    rounded = {name: in_format(values, dtype) if "norm" not in name else values for name, values in weights.items()}
    assert difference(sampled(rounded, "BF16"), sampled(weights, dtype)) is None


@pytest.mark.parametrize(
    ("dtype", "share"),
    [("F32", 0.001), ("BF16", 0.001), ("F16", 0.001), ("Q8_0", 0.002), ("Q5_0", 0.1), ("Q5_1", 0.1), ("Q4_0", 0.2),
     ("Q4_1", 0.2)],
)  # fmt: skip
def test_weights_that_moved_beyond_the_rounding_are_another_base(
    weights: dict[str, Floats], dtype: str, share: float
) -> None:
    problem = difference(sampled(weights, "BF16"), sampled(tuned(weights, share), dtype))
    assert problem is not None and problem.startswith("the weights differ: ")


@pytest.mark.parametrize("dtype", [*FLOATS, *BLOCKS])
def test_norms_that_moved_are_another_base_in_every_format(weights: dict[str, Floats], dtype: str) -> None:
    """They are float32 in a GGUF, whatever its matrices are in."""
    problem = difference(sampled(weights, "BF16", norms="BF16"), sampled(tuned(weights, 0.003, norms=True), dtype))
    assert problem is not None and "norm.weight has " in problem and "these formats allow no difference" in problem


@pytest.mark.parametrize("dtype", BLOCKS)
def test_other_weights_are_another_base(weights: dict[str, Floats], dtype: str) -> None:
    others = {name: in_format(values[::-1].copy(), "BF16") for name, values in weights.items() if "norm" not in name}
    problem = difference(sampled(weights, "BF16"), sampled(weights | others, dtype))
    assert problem is not None and "(BF16) instead of " in problem and f"({dtype})" in problem


def fitted(values: Floats, importance: Floats) -> Floats:
    """Q4_0 with the scale that has the least weighted error, as llama.cpp looks for it with an importance matrix."""
    extreme = values[np.argmax(np.abs(values))]
    scales = [-extreme / (8 + 0.1 * step) for step in range(-9, 10)]
    rounded = [np.clip(np.rint(values / scale), -8, 7) * scale for scale in scales]
    best: Floats = min(rounded, key=lambda found: float((importance * (found - values) ** 2).sum())).astype(np.float32)
    return best


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_scales_that_a_tool_fits_are_accepted(weights: dict[str, Floats], spread: float) -> None:
    """Values of little importance are cut off, by several levels at worst."""
    source = np.random.default_rng(2)
    served = dict(sampled(weights, "Q4_0").tensors)
    for name, values in weights.items():
        if "norm" not in name:
            importance = (values**2 * source.exponential(1, values.shape) ** spread).astype(np.float32)
            served[name] = replace(served[name], values=fitted(values, importance))
    trained = sampled(weights, "BF16")
    assert difference(trained, replace(trained, tensors=served)) is None


def test_what_differs_is_named(weights: dict[str, Floats]) -> None:
    trained, served = sampled(weights, "BF16"), sampled(weights, "Q8_0")
    theta = replace(served, architecture={**served.architecture, "rope_theta": 1e4})
    assert difference(trained, theta) == "the architecture differs (rope_theta 100000.0 instead of 10000.0)"
    assert difference(trained, replace(served, vocabulary="sha256:" + "2" * 64)) == "the tokens differ"
    assert "no tokenizer.json" in str(difference(trained, replace(served, vocabulary=None)))
    one = replace(served, tensors=dict(list(served.tensors.items())[1:]))
    assert difference(trained, one) == "the tensor layers.0.weight cannot be compared"
    unknown = {name: replace(tensor, dtype="Q9") for name, tensor in served.tensors.items()}
    assert "in Q9, whose rounding is not known" in str(difference(trained, replace(served, tensors=unknown)))


def test_two_folders_in_the_same_format_are_told_apart_by_their_fingerprints_alone(weights: dict[str, Floats]) -> None:
    """A fine-tune of layers that are not sampled has the same sample."""
    trained = sampled(weights, "BF16")
    assert "in the same format" in str(compare(trained, trained, same_container=True))
    assert compare(trained, sampled(weights, "F32"), same_container=True) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("F32 4", "a type, a shape and values are expected"),
        ("F32 4 AAAA", "it has 3 bytes of values, and 4 values of 4 bytes are expected"),
        ("F32 1 AACAfw==", "infinite or no numbers"),
        ("BF16 1 =", "a type, a shape"),
    ],
)
def test_a_malformed_sample_is_refused_by_its_name(text: str, words: str) -> None:
    sample = {"architecture": {}, "vocabulary": None, "tensors": {"norm.weight": text}}
    with pytest.raises(ValueError, match=r"the sample of the base's tensor 'norm.weight' is malformed: ") as refused:
        WeightsSample.parse(sample)
    assert words in str(refused.value)


def test_every_block_type_that_is_read_has_its_levels() -> None:
    assert {kind.name for kind in BLOCK_TYPES.values()} == {*FLOATS, *BLOCK_LEVELS}


LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [
        {"head_dim": 16, "num_key_value_heads": 4},
        {"rope_theta": 10000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rms_norm_eps": 9.999999747378752e-06},
        {"model_type": "mistral", "sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"hidden_act": "silu"},
    ],
)
def test_forms_of_the_same_architecture_are_equal(other: dict[str, Any]) -> None:
    assert differing_fields(common_architecture(LLAMA), common_architecture(LLAMA | other)) == []


@pytest.mark.parametrize(
    "other",
    [
        {"num_key_value_heads": 2},
        {"head_dim": 32},
        {"rope_theta": 500000.0},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rms_norm_eps": 1e-6},
        {"model_type": "qwen2"},
    ],
)
def test_another_architecture_is_told_by_its_field(other: dict[str, Any]) -> None:
    (field,) = differing_fields(common_architecture(LLAMA), common_architecture(LLAMA | other))
    assert " instead of " in field


def test_a_text_model_inside_another_is_that_model() -> None:
    text = LLAMA | {"model_type": "gemma3_text", "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4},
    }}  # fmt: skip
    alone = LLAMA | {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert common_architecture({"model_type": "gemma3", "text_config": text}) == common_architecture(alone)


def test_marks_of_spaces_placeholders_and_the_byte_of_a_tab_are_no_difference() -> None:
    folder = {0: "a", 1: "\u2581\u2581", 3: "b", 4: "\t"}
    converted = {0: "a", 1: "  ", 2: "[PAD2]", 3: "b", 4: "<0x09>"}
    assert vocabulary_digest(folder) == vocabulary_digest(converted)
    assert vocabulary_digest({**folder, 3: "c"}) != vocabulary_digest(folder)
