"""Thousands of adapters on disk: a start takes seconds, and those that nobody asks for cost next to nothing."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import httpx
import safetensors.torch
import torch

from tests.serving import ServerProcess, running_server

NUM_ADAPTERS = 2000
MAX_START, MAX_HASHING = 30.0, 120.0
"""Seconds until the server answers, and until every adapter's bytes are hashed; generous, the machine may be busy."""
MAX_IDLE_CPU = 0.1
"""Share of one core that an idle server may take."""
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}


def make_adapters(folder: Path) -> list[str]:
    """Adapters of rank 1 on one module of the embedded base."""
    generator = torch.Generator().manual_seed(0)
    names = [f"tiny-{number:04}" for number in range(NUM_ADAPTERS)]
    for name in names:
        (folder / name).mkdir(parents=True)
        a, b = torch.randn(1, 384, generator=generator), torch.randn(384, 1, generator=generator)
        weights = {f"{MODULE}.lora_A.weight": a, f"{MODULE}.lora_B.weight": b}
        safetensors.torch.save_file(weights, folder / name / "adapter_model.safetensors")
        (folder / name / "adapter_config.json").write_text(json.dumps(CONFIG))
    return names


def num_hashed(server: ServerProcess) -> int:
    """Adapters whose bytes were read."""
    listed = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    return sum(one.get("digest") is not None for one in listed)


def test_two_thousand_adapters(tmp_path: Path) -> None:
    names = make_adapters(tmp_path / "adapters")
    flags = ("--adapters-dir", str(tmp_path / "adapters"), "--no-demo-adapters", "--state-dir", str(tmp_path / "state"))
    since = time.perf_counter()
    with running_server(*flags) as server:
        started = time.perf_counter() - since
        assert server.models() == ["micro", *names]
        for name in random.Random(0).sample(names, 20):
            answer = ask(server, name)
            assert answer.headers["x-quickchange-adapter"].startswith(f"{name}@")
        server.until("all are hashed", lambda: num_hashed(server) == NUM_ADAPTERS, timeout=MAX_HASHING)
        hashed = time.perf_counter() - since
        idle = idle_share(server)
        print(f"\nstart {started:.1f} s, all hashed after {hashed:.1f} s, idle {idle:.3f} of a core, {server.usage()}")
        since = time.perf_counter()
        shutil.copytree(tmp_path / "adapters" / names[0], tmp_path / "adapters" / "late")
        server.until("one more is listed", lambda: "late" in server.models())
        print(f"one more is listed after {time.perf_counter() - since:.1f} s")
        shutil.rmtree(tmp_path / "adapters" / "late")
    since = time.perf_counter()
    with running_server(*flags) as server:
        again = time.perf_counter() - since
        print(f"second start {again:.1f} s")
        assert num_hashed(server) == NUM_ADAPTERS, "what was hashed before is known at the next start"
    assert max(started, again) < MAX_START
    assert idle < MAX_IDLE_CPU


def ask(server: ServerProcess, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def idle_share(server: ServerProcess) -> float:
    """Of one core, over twelve seconds in which nobody asks anything: a look at all folders is among them."""
    before, since = server.usage().cpu_seconds, time.perf_counter()
    time.sleep(12)
    return (server.usage().cpu_seconds - before) / (time.perf_counter() - since)
