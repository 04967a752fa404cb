"""The embedded base on a GPU says in float32 what it says on the CPU, token by token; a server there answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from server.model.attention.batched import BatchedAttention
from server.model.loader import load_base
from server.model.runner import ModelRunner
from tests.model.device_cases import CASES, Answers, Micro, check, check_in_bfloat16, loaded
from tests.model.families import build
from tests.model.harness import Ask, Hosted, difference, host, prompts, stock_logits
from tests.serving import ROOT, running_server
from tests.tiny_models import build_tiny_base

FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt_oss", "gpt2")
TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest stock logit on the CPU, in float32 without TF32."""


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_the_cpus(case: Callable[[Micro], Answers], cpu: Micro, gpu: Micro) -> None:
    check(case, cpu, gpu)


def test_it_serves_in_bfloat16(cpu: Micro) -> None:
    with loaded("cuda", "bfloat16") as rounded:
        check_in_bfloat16(cpu, rounded)


def on_the_gpu(family: str) -> Hosted:
    """A random model as the server hosts it there."""
    model = build(family)
    torch.nn.Module.to(model, device="cuda")
    return host(model, backend=BatchedAttention, max_num_seqs=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_attention_gives_the_stock_models_logits(family: str) -> None:
    asks = [Ask(prompt, 8, step=2 * n) for n, prompt in enumerate(prompts(3, 40, 5, 61, 17))]
    stock = build(family)
    for answer in on_the_gpu(family).run(asks):
        assert difference(answer.logits.cpu(), stock_logits(stock, answer)) < TOLERANCE


def test_products_in_float32_are_in_full() -> None:
    """TF32 would keep 10 bits of each factor."""
    assert torch.get_float32_matmul_precision() == "highest"
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.allclose((a.cuda() @ b.cuda()).cpu(), a @ b, atol=1e-3, rtol=0)


def test_a_closed_base_gives_its_memory_back(tmp_path: Path) -> None:
    folder = str(build_tiny_base(tmp_path))
    base = load_base(folder, name="tiny", device="cuda", dtype="float32", max_model_len=256)
    before = torch.cuda.memory_allocated()
    runner = ModelRunner.of(base, num_slots=256)
    assert torch.cuda.memory_allocated() - before > 2**22
    base.close()
    assert runner.attention.backend is None and torch.cuda.memory_allocated() == before


def test_a_server_on_the_gpu_answers() -> None:
    """Once every request there was a 500."""
    flags = ("--device", "cuda", "--dtype", "float32", "--adapters-dir", str(ROOT / "adapters"))
    with running_server(*flags) as server:
        for model in ("micro", "helpdesk", "tolstoy:0.7+shakespeare:0.3"):
            body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] > 0
