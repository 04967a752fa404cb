"""A GGUF file as a base: transformers gets the config and the parameters of the model that it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from base_files.gguf.architectures import ARCHITECTURES
from base_files.gguf.base import GGUFBase
from base_files.gguf.rope import llama3_factors
from base_files.stock_model import stock_config
from tests.gguf_models import model_arrays, model_metadata, plain_vocabulary, write_gguf_model
from tests.model.families import FAMILIES, WINDOW, build_from

MOE = {"num_experts_per_tok": 2}
LONG = {name: FAMILIES["phi3_longrope"].rope_parameters[f"{name}_factor"] for name in ("short", "long")}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LOCAL = {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": 2}
SOFT = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}
EXPERTS = {"expert_count": 4, "expert_used_count": 2}
PHI3 = {"attention.sliding_window": 0, "rope.scaling.original_context_length": 4096}
SCALED = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}


def like(family: str, name: str | None = None, **fields: Any) -> PretrainedConfig:
    """The config of a family with other fields, or of another class with the same sizes."""
    values = FAMILIES[family].to_dict()
    values["num_hidden_layers"] = fields.pop("layers", values["num_hidden_layers"])
    if name is None:
        return type(FAMILIES[family])(**{**values, **fields})
    kept = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    kept += ["num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"]
    config = getattr(transformers, name)(**{key: values[key] for key in kept}, **fields)
    assert isinstance(config, PretrainedConfig)
    return config


CASES: Mapping[str, tuple[str, PretrainedConfig, Mapping[str, Any]]] = {
    "llama": ("llama", FAMILIES["llama"], {}),
    "llama, biased": ("llama", like("llama", attention_bias=True, mlp_bias=True), {}),
    "llama, Llama 3's scaling": ("llama", FAMILIES["llama3_rope"], {}),
    "llama, linear scaling": (
        "llama", like("llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "mixtral": ("llama", like("llama", "MixtralConfig", num_local_experts=4, **MOE), EXPERTS),
    "qwen2": ("qwen2", FAMILIES["qwen2"], {}),
    "qwen2, yarn": ("qwen2", like("qwen2", rope_parameters=YARN), {"rope.scaling.type": "yarn", **SCALED}),
    "qwen3": ("qwen3", FAMILIES["qwen3"], {}),
    "qwen3moe": (
        "qwen3moe",
        like(
            "llama", "Qwen3MoeConfig", num_experts=4, head_dim=16, moe_intermediate_size=32, norm_topk_prob=True, **MOE
        ),
        {**EXPERTS, "expert_feed_forward_length": 32},
    ),
    "gemma": ("gemma", like("llama", "GemmaConfig", head_dim=32), {}),
    "gemma2": ("gemma2", like("gemma2", tie_word_embeddings=True), {**LOCAL, **SOFT}),
    "gemma3": ("gemma3", FAMILIES["gemma3"], LOCAL),
    "gemma3 without windows": ("gemma3", like("gemma3", layer_types=["full_attention"] * 4), {}),
    "smollm3": ("smollm3", like("llama", "SmolLM3Config", layers=5), {}),
    "phi3": ("phi3", FAMILIES["phi3"], PHI3),
    "phi3, long": (
        "phi3", FAMILIES["phi3_longrope"],
        {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": (1 + 2 / 5) ** 0.5},
    ),
    "gpt-oss": (
        "gpt-oss", FAMILIES["gpt_oss"],
        {
            **EXPERTS, "expert_feed_forward_length": 96, "attention.sliding_window": WINDOW,
            "rope.scaling.type": "yarn", **SCALED,
        },
    ),
}  # fmt: skip
"""llama.cpp's architecture, transformers' config, and the keys that its converter writes of it alone."""


def factors_of(case: str) -> dict[str, torch.Tensor]:
    """Tensors that scale rotations, as the converter writes them."""
    if case == "llama, Llama 3's scaling":
        return {"rope_freqs.weight": torch.from_numpy(llama3_factors(10000.0, 16, 8.0, 32))}
    if case == "phi3, long":
        return {f"rope_factors_{name}.weight": torch.tensor(values) for name, values in LONG.items()}
    return {}


def write_case(path: Path, case: str, model: PreTrainedModel, quantization: str = "F32") -> GGUFBase:
    architecture, _, keys = CASES[case]
    metadata = model_metadata(model, architecture) | {f"{architecture}.{key}": value for key, value in keys.items()}
    arrays = model_arrays(model, architecture) | factors_of(case)
    metadata |= plain_vocabulary(model.config.vocab_size)
    return GGUFBase(write_gguf_model(path, architecture, arrays, metadata, quantization=quantization))


def loaded(base: GGUFBase) -> PreTrainedModel:
    """The stock model of a base's config with all of its tensors, and nothing else."""
    config = stock_config(base)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    tensors = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in base.tensors().items()}
    keys = model.load_state_dict(tensors, strict=False)
    assert not keys.unexpected_keys
    assert keys.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    model.tie_weights()
    assert isinstance(model, PreTrainedModel)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Longer than windows and than the lengths before scaling, [2, 48, vocabulary]."""
    prompts = torch.randint(3, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=prompts, use_cache=False).logits
    return result


def test_every_architecture_has_a_case() -> None:
    assert {architecture for architecture, _, _ in CASES.values()} == ARCHITECTURES.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_file_in_float32_has_the_parameters_and_the_logits_of_its_model(case: str, tmp_path: Path) -> None:
    model = build_from(CASES[case][1])
    base = write_case(tmp_path / "a.gguf", case, model)
    found = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in base.tensors().items()}
    for name, parameter in model.named_parameters():
        shifted = CASES[case][0].startswith("gemma") and name.endswith("norm.weight")
        assert (found[name] - parameter).abs().max() <= (2**-23 if shifted else 0), name
    assert torch.equal(logits(loaded(base)), logits(model))


@pytest.mark.parametrize("case", ["llama", "qwen3moe", "gemma3"])
def test_a_quantized_file_has_the_logits_of_its_model_with_ggufs_own_rounding(case: str, tmp_path: Path) -> None:
    model = build_from(CASES[case][1])
    base = write_case(tmp_path / "a.gguf", case, model, "Q8_0")
    kind = gguf.GGMLQuantizationType.Q8_0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # rows change places, but none is changed
                rounded = gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(rounded))
    assert torch.equal(logits(loaded(base)), logits(model))


@pytest.mark.parametrize("case", ["llama", "gpt-oss", "mixtral", "gemma2"])
def test_rows_are_read_as_of_the_whole_tensor(case: str, tmp_path: Path) -> None:
    base = write_case(tmp_path / "a.gguf", case, build_from(CASES[case][1]))
    for name, tensor in base.tensors().items():
        whole, rows = tensor.read(), tensor.shape[0]
        assert whole.shape == tensor.shape and whole.dtype == np.float32
        for begin, end in ((0, 1), (rows // 3, rows // 3 + 2), (rows - 1, rows), (0, rows)):
            assert np.array_equal(tensor.read(begin, end), whole[begin:end]), (name, begin, end)


def test_numbers_are_those_of_config_json_and_not_their_float32(tmp_path: Path) -> None:
    """1e-05 came back as 9.999999747378752e-06, and a base differed from the folder that it was made of."""
    config = write_case(tmp_path / "a.gguf", "llama", build_from(like("llama", rms_norm_eps=1e-5))).config
    assert config["rms_norm_eps"] == 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_config_differs_from_the_folders_in_nothing_that_is_in_both(case: str, tmp_path: Path) -> None:
    """Token ids and the dtype are the tokenizer's and the file's."""
    theirs = CASES[case][1].to_dict()
    base = write_case(tmp_path / "a.gguf", case, build_from(CASES[case][1]))
    ours = stock_config(base).to_dict()
    apart = {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "architectures", "no_rope_layer_interval"}
    if case in ("qwen2, yarn", "gpt-oss"):
        apart |= {"rope_parameters"}  # with the defaults written out
    if case == "gemma3 without windows":
        apart |= {"sliding_window"}
    differing = {key for key in theirs.keys() & ours.keys() if theirs[key] != ours[key]} - apart
    assert {key: (theirs[key], ours[key]) for key in differing} == {}
