"""An adapter loaded and unloaded over HTTP a thousand times leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.serving import ROOT, ServerProcess, running_server, vary

NUM_CYCLES, WARM_UP = 1000, 100
NUM_CONTENTS, NUM_NAMES, KEEP = 10, 3, 2
MAX_RSS_GROWTH = 20_000_000
"""Bytes over all cycles, each of which takes in an adapter of 1.3 MB."""
POOL = 6
"""Threads that asyncio's own pool may still grow by."""
KEY = "cycles-key-0123456789"


def cycle(client: httpx.Client, number: int) -> None:
    """Load one of the contents, ask it now and then, and unload it."""
    name = f"guest-{number % NUM_NAMES}"
    body = {"lora_name": name, "lora_path": f"unlisted/content-{number % NUM_CONTENTS}"}
    loaded = client.post("/v1/load_lora_adapter", json=body)
    assert loaded.status_code == 200, loaded.text
    if number % 10 == 0:
        question = {"model": name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3}
        answer = client.post("/v1/chat/completions", json=question)
        assert answer.headers["x-quickchange-adapter"] == loaded.json()["adapter"]
    unloaded = client.post("/v1/unload_lora_adapter", json={"lora_name": name})
    assert unloaded.status_code == 200, unloaded.text


def test_a_thousand_cycles_leave_nothing(tmp_path: Path) -> None:
    unlisted = tmp_path / "adapters" / "unlisted"  # a folder of folders is no adapter
    for number in range(NUM_CONTENTS):
        vary(ROOT / "adapters" / "tolstoy", unlisted / f"content-{number}", rank=8, seed=number)
    flags = (
        "--adapters-dir", str(unlisted.parent), "--no-demo-adapters", "--scan-interval", "0.05",
        "--state-dir", str(tmp_path / "state"), "--keep-versions", str(KEEP), "--admin-key", KEY,
    )  # fmt: skip
    with (
        running_server(*flags) as server,
        httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client,
    ):
        for number in range(WARM_UP):
            cycle(client, number)
        before, series = server.usage(), server.series()
        for number in range(WARM_UP, WARM_UP + NUM_CYCLES):
            cycle(client, number)
        after = server.usage()
        print(f"\nbefore: {before}\nafter:  {after}")
        check_rest(server)
        assert after.rss - before.rss < MAX_RSS_GROWTH
        assert after.files <= before.files and after.threads <= before.threads + POOL
        assert server.series() == series
        assert len(list((tmp_path / "state" / "versions").iterdir())) <= NUM_NAMES * KEEP


def check_rest(server: ServerProcess) -> None:
    """Nothing is listed, and nothing is in memory any more."""
    assert server.models() == ["micro"]
    assert server.metric("quickchange_adapters_resident") == 0
    assert server.metric("quickchange_adapter_memory_bytes") == 0
