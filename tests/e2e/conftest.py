"""One server on the embedded base for the whole tier, watching an adapter folder that tests may write into."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from base_files.locate import find_base
from tests.serving import ROOT, ServerProcess, running_server

DEMOS = ("dostoevsky", "helpdesk", "json", "shakespeare", "tolstoy")


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's adapter folder: a copy of the demo adapters."""
    folder = tmp_path_factory.mktemp("watched")
    for name in DEMOS:
        shutil.copytree(ROOT / "adapters" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def server(watched: Path) -> Iterator[ServerProcess]:
    """The running server."""
    with running_server("--adapters-dir", str(watched), "--scan-interval", "0.2", "--no-demo-adapters") as started:
        yield started


@pytest.fixture(scope="session")
def stock_models() -> dict[str, nn.Module]:
    """The base and two adapters, by transformers and PEFT in float32."""

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(find_base("micro").path, dtype=torch.float32).eval()

    adapters = {
        name: PeftModel.from_pretrained(base(), str(ROOT / "adapters" / name)).eval() for name in ("helpdesk", "json")
    }
    return {"micro": base(), **adapters}


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    """OpenAI's own client, checking every response against its types."""
    url = f"{server.url}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True) as made:
        yield made
