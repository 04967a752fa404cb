"""llama.cpp's own converter of adapters, and what ``adapters convert`` makes of its files.

The script is in no package of its own. It comes with the source of ``llama-cpp-python``, which is downloaded and
unpacked, never built.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from server.cli.convert.gguf import read_gguf_adapter
from server.cli.convert.lora_folder import write_lora_folder
from tests.model.foreign_adapters import PROVED, base, make_peft, signature_of

SOURCE = "llama-cpp-python==0.3.36"
PARTS = ("conversion/", "gguf-py/gguf/", "convert_lora_to_gguf.py", "convert_hf_to_gguf.py")


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with llama.cpp's Python scripts."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", SOURCE]
    done = subprocess.run(download, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        root = f"{tar.getnames()[0].partition('/')[0]}/vendor/llama.cpp/"
        wanted = tuple(root + part for part in PARTS)
        tar.extractall(folder, [one for one in tar.getmembers() if one.name.startswith(wanted)], filter="data")
    archive.unlink()
    return folder / root


@pytest.mark.parametrize(("architecture", "family"), PROVED)
def test_what_llama_cpp_converted_comes_back_to_the_bit(
    architecture: str, family: str, llama_cpp: Path, tmp_path: Path
) -> None:
    model = base(family)
    model.save_pretrained(tmp_path / "base")
    targets = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    fields = {"target_modules": targets} if family in ("llama", "qwen2") else {}
    source = make_peft(model, tmp_path / "peft", **fields)
    script = [str(llama_cpp / "convert_lora_to_gguf.py"), "--base", str(tmp_path / "base")]
    path = tmp_path / "adapter.gguf"
    done = subprocess.run(
        [sys.executable, *script, "--outfile", str(path), str(source)],
        env={**os.environ, "PYTHONPATH": str(llama_cpp / "gguf-py")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    adapter = read_gguf_adapter(path, max_bytes=1 << 24)
    assert adapter.architecture == architecture and adapter.alpha == 6
    tensors = adapter.convert(signature_of(model), model.config.get_text_config())
    write_lora_folder(tmp_path, tensors, base_model="base")
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
