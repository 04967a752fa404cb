"""A real server process for tests, ``python -m server`` on a free loopback port, and adapters for it to serve."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[1]
_SERVING = re.compile(r"serving on (https?://\S+)")


@dataclass(frozen=True)
class Usage:
    """What a process holds: ``rss`` in bytes without the keys and values it keeps, ``files`` are open descriptors."""

    rss: int
    threads: int
    files: int
    cpu_seconds: float


@dataclass
class ServerProcess:
    """A running server: where it listens, what it has logged so far, and the key that opens its metrics."""

    url: str
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=self.headers)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        text = self.get("/metrics").text
        total = 0.0
        for line in text.splitlines():
            sample, _, value = line.rpartition(" ")
            if re.split(r"[{ ]", sample)[0] == name and all(
                f'{key}="{label}"' in sample for key, label in labels.items()
            ):
                total += float(value)
        return total

    def models(self) -> list[str]:
        """The names in the model list."""
        return [model["id"] for model in self.get("/v1/models").json()["data"]]

    def series(self) -> set[str]:
        """The names and labels of all samples."""
        lines = self.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    def usage(self) -> Usage:
        """What the process holds now, as Linux tells it."""
        kept = int(self.metric("quickchange_kv_memory_bytes"))
        proc = Path("/proc", str(self.process.pid))
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        times = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
        return Usage(
            rss=1024 * int(status["VmRSS"].split()[0]) - kept,
            threads=int(status["Threads"]),
            files=min(_num_open_files(proc) for _ in range(10)),
            cpu_seconds=sum(map(int, times)) / os.sysconf("SC_CLK_TCK"),
        )

    def until(self, description: str, condition: object, *, timeout: float = 30.0) -> None:
        """Wait until ``condition()`` holds; fails with the description and the end of the log."""
        assert callable(condition)
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{description}: not within {timeout} s\n" + "\n".join(self.log[-20:])
            time.sleep(0.05)


def _num_open_files(proc: Path) -> int:
    """Now; a moment later the server has closed the connection that asked for its metrics, which is no leak."""
    time.sleep(0.05)
    return len(list((proc / "fd").iterdir()))


@contextlib.contextmanager
def running_server(
    *flags: str, cwd: Path = ROOT, port: int = 0, start_timeout: float = 120.0
) -> Iterator[ServerProcess]:
    """Start a server and wait until it listens; at the end it must stop by SIGTERM with status 0."""
    with started_server(*flags, cwd=cwd, port=port, start_timeout=start_timeout) as server:
        yield server
    status = server.process.returncode
    assert status == 0, f"the server ended with status {status}:\n" + "\n".join(server.log[-20:])


@contextlib.contextmanager
def started_server(
    *flags: str, cwd: Path = ROOT, port: int = 0, start_timeout: float = 120.0
) -> Iterator[ServerProcess]:
    """Start a server and wait until it listens; stop it by SIGTERM at the end, unless it has ended."""
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUICKCHANGE_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    server = ServerProcess("", process)
    thread = threading.Thread(target=_read_log, args=(server,), daemon=True)
    thread.start()
    try:
        server.until("the server listens", lambda: server.url or process.poll() is not None, timeout=start_timeout)
        server.until(
            "the server answers", lambda: _healthy(server) or process.poll() is not None, timeout=start_timeout
        )
        assert process.poll() is None, "the server did not start:\n" + "\n".join(server.log)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)
        thread.join(5)


def _read_log(server: ServerProcess) -> None:
    assert server.process.stderr is not None
    with server.process.stderr as lines:
        for line in lines:
            server.log.append(line.rstrip())
            if match := _SERVING.search(line):
                server.url = match[1]


def _healthy(server: ServerProcess) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{server.url}/health", timeout=1.0, verify=False).status_code == 200
    return False


def vary(
    source: Path, target: Path, *, factor: float = 1.0, rank: int | None = None, seed: int | None = None, **sidecar: Any
) -> Path:
    """Write another adapter than the one it is made of.

    Its delta is multiplied by ``factor`` and cut to ``rank``, with some noise where there is a ``seed``.
    ``sidecar`` are fields of its ``quickchange.json``, such as generation defaults.
    """
    config = json.loads((source / "adapter_config.json").read_text())
    scaling, rank = config["lora_alpha"] / config["r"], rank or config["r"]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in safetensors.torch.load_file(source / "adapter_model.safetensors").items():
        cut = tensor[:rank] if "lora_A" in name else factor * tensor[:, :rank]
        noise = 0.0 if generator is None else 0.4 * cut.std() * torch.randn(cut.shape, generator=generator)
        tensors[name] = (cut + noise).contiguous()
    content = json.loads((source / "quickchange.json").read_text())
    content = {key: content[key] for key in ("schema_version", "base", "created")} | sidecar
    target.mkdir(parents=True)
    (target / "adapter_config.json").write_text(json.dumps(config | {"r": rank, "lora_alpha": scaling * rank}))
    safetensors.torch.save_file(tensors, target / "adapter_model.safetensors")
    (target / "quickchange.json").write_text(json.dumps(content))
    return target
