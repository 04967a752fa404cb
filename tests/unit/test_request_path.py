"""How many source files one request passes: a reader who follows it has to open each of them."""

from __future__ import annotations

from pathlib import Path

from base_files.source import FolderBase
from benchmarks.parts.random_adapters import write_adapters
from benchmarks.request_path import trace_request
from server.settings import Settings
from tests.tiny_models import build_tiny_base

MOST_FILES = 73
MOST_API_FILES = 28  # keys, hosts, origins, limits, names, the body in its parts, the format apart from its JSON


def test_a_streamed_request_with_an_adapter_passes_few_files(tmp_path: Path) -> None:
    """On a base in floats, without the files of kernels and of int8, which not every CPU runs."""
    base = build_tiny_base(tmp_path / "base")
    write_adapters(FolderBase(base), tmp_path / "adapters", ["a0"])
    settings = Settings(
        base_model=str(base),
        adapters_dir=tmp_path / "adapters",
        demo_adapters=False,
        threads=1,
        prefix_caching=True,
        scan_interval=0.1,
    )
    path = trace_request(settings, "a0", max_tokens=8)
    assert path.num_tokens == 8
    assert path.num_queues == 1, path.report()
    assert len(path.threads) == 3, "the event loop, the engine, and the one that renders the prompt"
    files = {file for file in path.files if not file.startswith("cpu_kernels/")}
    assert len(files) <= MOST_FILES, path.report()
    assert len([file for file in files if file.startswith("server/api/")]) <= MOST_API_FILES, path.report()
