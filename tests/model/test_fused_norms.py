"""Norms as an accelerator has them: those that can be one operation, and what they compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationMixin

from server.model.attention.batched import BatchedAttention
from server.model.fused_ops import TorchRMSNorm, fuse_norms
from server.model.patches import ModelPatches
from tests.model.families import build
from tests.model.harness import host
from tests.model.test_batched_attention import started, step


def num_fused(model: torch.nn.Module) -> int:
    return sum(isinstance(module, TorchRMSNorm) for module in model.modules())


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", 7), ("qwen3", 13), ("gpt_oss", 9), ("gemma3", 0), ("gpt2", 0)]
)
def test_norms_that_compute_the_same_are_fused(family: str, expected: int) -> None:
    """Gemma adds one to its weights and GPT-2 subtracts the mean: they keep their code."""
    model = build(family)
    stock = copy.deepcopy(model)
    fuse_norms(model, ModelPatches())
    assert num_fused(model) == expected
    ids = torch.arange(3, 20)[None]
    assert torch.allclose(model(ids).logits, stock(ids).logits, atol=1e-4)


def test_in_bfloat16_they_are_nearer_to_the_truth_than_two_roundings() -> None:
    model = build("llama", dtype=torch.bfloat16)
    norm = model.get_submodule("model.norm")
    fused = TorchRMSNorm.like(norm)
    assert fused is not None
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    truth = copy.deepcopy(norm).float()(x.float())
    assert fused(x).dtype == torch.bfloat16
    assert (fused(x).float() - truth).abs().mean() < (norm(x).float() - truth).abs().mean()


_LOOKS = (
    "alias",
    "as_strided",
    "expand",
    "narrow",
    "permute",
    "select",
    "slice",
    "t",
    "transpose",
    "unsqueeze",
    "view",
)
VIEWS = frozenset((*_LOOKS, "detach", "detach_", "lift_fresh", "to"))
"""Operations that start no kernel; ``to`` starts one only where something changes, which here nothing does."""


class Operations(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def operations_of_generate(num_tokens: int) -> int:
    model = build("llama")
    model.set_attn_implementation("sdpa")
    ids = torch.arange(3, 15).repeat(5, 1)
    with torch.inference_mode(), Operations() as counted:
        GenerationMixin.generate(
            model,  # type: ignore[arg-type]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return int(counted.number)


def test_a_decoding_step_is_fewer_operations_than_transformers_own() -> None:
    """Each is a kernel to launch, and on a GPU small steps are little else."""
    model = build("llama")
    fuse_norms(model, ModelPatches())
    hosted = host(model, backend=BatchedAttention, max_num_seqs=5, budget=200)
    sequences = started(hosted, 12, 12, 12, 12, 15)
    with Operations() as counted:
        step(hosted, sequences)
    assert counted.number < 0.7 * (operations_of_generate(4) - operations_of_generate(3))
