"""Experts in a base's files, joined into the parameters of transformers and read one at a time."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from base_files.errors import BaseMalformed
from base_files.source import FolderBase
from base_files.tensors import StoredTensor
from tests.model.families import _config, build_from
from tests.model.peft_cases import CONFIGS

EXPERTS, OUTPUTS, INPUTS = 5, 6, 64
PREFIX = "model.layers.0.mlp.experts"
_SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTURES = {
    "qwen3_moe": CONFIGS["qwen3_moe"],
    "mixtral": _config("MixtralConfig", **_SMALL, num_local_experts=4),
    "olmoe": _config("OlmoeConfig", **_SMALL, num_experts=4),
    "qwen2_moe": _config(
        "Qwen2MoeConfig", **_SMALL, num_experts=4, moe_intermediate_size=40, shared_expert_intermediate_size=40
    ),
    "gpt_oss": CONFIGS["gpt_oss"],
}


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> FolderBase:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return FolderBase(folder)


def packed(*, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks, and scales with every exponent but that of NaN."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, OUTPUTS, INPUTS // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 255, (experts, OUTPUTS, INPUTS // 32), generator=generator, dtype=torch.uint8)
    scales.view(-1)[:3] = torch.tensor([0, 1, 254], dtype=torch.uint8)
    return blocks, scales


def bits(floats: np.ndarray) -> list[int]:
    return np.ascontiguousarray(floats).view(np.uint32).ravel().tolist()


def test_mxfp4_is_dequantized_as_by_transformers_to_the_bit(tmp_path: Path) -> None:
    """Expert by expert, and with negative zeros; both halves of a byte, each block's scale, the axes swapped."""
    blocks, scales = packed()
    base = save(tmp_path / "base", {f"{PREFIX}.down_proj_blocks": blocks, f"{PREFIX}.down_proj_scales": scales})
    (tensor,) = base.tensors().values()
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    assert tensor.name == f"{PREFIX}.down_proj" and tensor.dtype == "MXFP4"
    assert tensor.shape == expected.shape == (EXPERTS, INPUTS, OUTPUTS)
    assert tensor.num_bytes == blocks.numel() + scales.numel()
    assert bits(tensor.read()) == bits(expected)
    for begin, end in ((0, 1), (2, 4), (EXPERTS - 1, EXPERTS)):
        assert bits(tensor.read(begin, end)) == bits(expected[begin:end])


@pytest.mark.parametrize("family", MIXTURES)
def test_a_saved_mixture_has_the_tensors_of_the_models_parameters(family: str, tmp_path: Path) -> None:
    """Whatever the layout in which transformers saves a family's experts."""
    model = build_from(copy.deepcopy(MIXTURES[family]))
    model.save_pretrained(tmp_path / "base")
    tensors = FolderBase(tmp_path / "base").tensors()
    assert set(tensors) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_same(tensors[name], parameter)


def assert_same(tensor: StoredTensor, parameter: torch.Tensor) -> None:
    assert tensor.shape == tuple(parameter.shape) and tensor.num_bytes == parameter.nbytes
    assert np.array_equal(tensor.read(), parameter.numpy())
    last = len(parameter) - 1
    assert np.array_equal(tensor.read(last), parameter[last:].numpy())


def test_in_bfloat16_as_well(tmp_path: Path) -> None:
    model: PreTrainedModel = build_from(CONFIGS["qwen3_moe"], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    name = f"{PREFIX}.gate_up_proj"
    tensor = FolderBase(tmp_path / "base").tensors()[name]
    assert tensor.dtype == "BF16"
    assert np.array_equal(tensor.read(1, 3), model.get_parameter(name)[1:3].float().numpy())


def test_what_does_not_fit_together_is_told(tmp_path: Path) -> None:
    blocks, scales = packed(experts=1)
    gate = torch.zeros(4, 8)
    whole = {f"{PREFIX}.{number}.{name}_proj.weight": gate.clone() for number in range(3) for name in ("gate", "up")}
    cases: dict[str, dict[str, torch.Tensor]] = {
        "_blocks has no .*_scales": {f"{PREFIX}.down_proj_blocks": blocks},
        "is no MXFP4: its shape is": {
            f"{PREFIX}.down_proj_blocks": blocks,
            f"{PREFIX}.down_proj_scales": scales[:, :, :1].contiguous(),
        },
        "expert 1 of 3 has no up_proj": {n: t for n, t in whole.items() if n != f"{PREFIX}.1.up_proj.weight"},
        "gate_proj differ in shape": whole | {f"{PREFIX}.2.gate_proj.weight": torch.zeros(5, 8)},
        "have different widths": {
            f"{PREFIX}.0.gate_proj.weight": gate,
            f"{PREFIX}.0.up_proj.weight": torch.zeros(4, 9),
        },
    }
    for number, (sentence, tensors) in enumerate(cases.items()):
        with pytest.raises(BaseMalformed, match=sentence):
            save(tmp_path / str(number), tensors).tensors()
