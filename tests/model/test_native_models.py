"""Every family with native kernels for all they can do: near to what torch computes, and each row the same alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cpu_kernels.kernels import choose_linear
from server.model.attention.cpu import NativeAttention, TorchAttention, cpu_attention
from server.model.fused_ops import GatedMLP
from server.model.runner import ModelRunner
from tests.instruction_sets import NUMBA, needs
from tests.model.families import FAMILIES, build
from tests.model.harness import Answer, Ask, difference, host, prompts

pytestmark = needs(NUMBA)
ASKS = [Ask(prompt, 6) for prompt in prompts(21, 5, 1, 70)]
GATED = {*FAMILIES} - {"gpt_oss", "gpt2", "gpt_neox"}


def with_equal_past(ours: Answer, theirs: Answer) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of both up to the first token that differs, where it does; the rows after it answer other texts."""
    differ = [n for n, (one, other) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)) if one != other]
    end = differ[0] + 1 if differ else len(ours.tokens)
    return ours.logits[:end], theirs.logits[:end]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_logits_are_those_of_torch_and_rows_are_the_same_alone(family: str, quantization: str) -> None:
    """With integers an activation may fall to the other side of a border."""
    linear = choose_linear() if quantization == "int8" else None
    expected = host(build(family), linear=linear).run(ASKS)
    hosted = host(build(family), linear=linear, native=True)
    assert any(isinstance(module, GatedMLP) for module in hosted.model.modules()) == (family in GATED)
    assert isinstance(hosted.runner.attention_backend, NativeAttention)
    found, alone = hosted.run(ASKS), [hosted.run([ask])[0] for ask in ASKS]
    far = [difference(*with_equal_past(ours, theirs)) for ours, theirs in zip(found, expected, strict=True)]
    assert min(far) < 1e-5 and max(far) < (1e-5 if linear is None else 0.1)
    for answer, one in zip(found, alone, strict=True):
        assert answer.tokens == one.tokens
        if linear is not None:
            assert torch.equal(answer.logits, one.logits)


def test_a_runner_has_native_attention_where_there_is_a_kernel_for_the_dtype_in_which_it_keeps_keys() -> None:
    """It may be another than the base was made for."""
    hosted = host(build("llama"), linear=choose_linear(), native=True)
    attention, shapes, kernels = hosted.runner.attention, hosted._cache.layout.shapes, hosted.kernels
    backend = partial(cpu_attention, kernels=kernels)
    for dtype in (torch.float32, torch.bfloat16):
        ModelRunner(hosted.model, attention, shapes, backend, num_slots=2, max_len=64, kv_dtype=dtype, kernels=kernels)
        assert isinstance(attention.backend, NativeAttention)
        assert attention.backend.cache.layout.dtype == dtype
    ModelRunner(
        hosted.model, attention, shapes, backend, num_slots=2, max_len=64, kv_dtype=torch.float16, kernels=kernels
    )
    assert isinstance(attention.backend, TorchAttention)
