"""An adapter of SmolLM2's folder on GGUF files of SmolLM2: served within their rounding, and nothing else.

The sentences on what cannot be told apart in docs/adapters.md are held here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.quantization_config import GgufConfig

from base_files.gguf.base import GGUFBase
from base_files.sample_comparison import compare
from base_files.source import FolderBase
from base_files.weights_sample import WeightsSample, sample_of
from tests.gguf_models import Arrays, model_arrays, model_metadata, tokenizer_metadata, write_gguf_model
from tests.serving import running_server

NAME = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> FolderBase:
    """The GGUF as transformers dequantizes it, in bfloat16."""
    path = tmp_path_factory.mktemp("folder") / NAME
    model = AutoModelForCausalLM.from_pretrained(
        smollm2.parent,
        gguf_file=smollm2.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name).save_pretrained(path)
    return FolderBase(path)


@pytest.fixture(scope="module")
def model(folder: FolderBase) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    assert isinstance(loaded, PreTrainedModel)
    return loaded


@pytest.fixture(scope="module")
def metadata(folder: FolderBase, model: PreTrainedModel) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return model_metadata(model, "llama") | tokenizer_metadata(tokenizer, model.config.vocab_size, "smollm")


def sampled(source: FolderBase | GGUFBase) -> WeightsSample:
    sample = sample_of(source)
    assert sample is not None
    return sample


def as_in_a_sidecar(sample: WeightsSample) -> WeightsSample:
    text = json.dumps(sample.to_json())
    assert len(text) <= 8_000
    return WeightsSample.parse(json.loads(text))


@pytest.fixture
def written(tmp_path: Path, model: PreTrainedModel, metadata: dict[str, Any]) -> Callable[..., GGUFBase]:
    """Writes the model as a GGUF file in a type, its matrices or norms moved by a share of their spread."""

    def write(quantization: str, *, matrices: float = 0.0, norms: float = 0.0) -> GGUFBase:
        source = torch.Generator().manual_seed(0)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            share = matrices if tensor.dim() == 2 else norms
            return tensor + share * tensor.std() * torch.randn(tensor.shape, generator=source) if share else tensor

        arrays: Arrays = {name: moved(tensor) for name, tensor in model_arrays(model, "llama").items()}
        return GGUFBase(write_gguf_model(tmp_path / "other.gguf", "llama", arrays, metadata, quantization=quantization))

    return write


def test_the_package_s_file_and_the_folder_of_it_have_the_same_sample(smollm2: Path, folder: FolderBase) -> None:
    pair = sampled(GGUFBase(smollm2)), sampled(folder)
    for trained, served in (pair, pair[::-1]):
        assert compare(as_in_a_sidecar(trained), served, same_container=False) is None
    assert [sample.weights_format for sample in pair] == ["Q4_1", "BF16"]


@pytest.mark.parametrize("quantization", ["F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_another_rounding_is_the_same_base(
    quantization: str, smollm2: Path, folder: FolderBase, written: Callable[..., GGUFBase]
) -> None:
    other = sampled(written(quantization))
    assert compare(as_in_a_sidecar(sampled(folder)), other, same_container=False) is None
    assert compare(as_in_a_sidecar(sampled(GGUFBase(smollm2))), other, same_container=True) is None
    assert compare(as_in_a_sidecar(other), sampled(folder), same_container=False) is None


@pytest.mark.parametrize(
    ("quantization", "shares"),
    [
        ("F16", {"matrices": 0.001}),
        ("Q8_0", {"matrices": 0.001}),
        ("Q8_0", {"matrices": 0.01}),
        ("Q5_0", {"matrices": 0.05}),
        ("Q4_1", {"matrices": 0.1}),
        ("Q4_0", {"matrices": 0.1}),
        ("Q4_0", {"norms": 0.01}),
        ("Q4_1", {"matrices": 0.01, "norms": 0.01}),
    ],
)
def test_a_fine_tune_beyond_the_rounding_is_another_base(
    quantization: str, shares: dict[str, float], folder: FolderBase, written: Callable[..., GGUFBase]
) -> None:
    problem = compare(as_in_a_sidecar(sampled(folder)), sampled(written(quantization, **shares)), same_container=False)
    assert problem is not None and problem.startswith("the weights differ: ")


@pytest.mark.parametrize("quantization", ["Q5_0", "Q4_1", "Q4_0"])
def test_matrices_moved_within_the_rounding_cannot_be_told_apart(
    quantization: str, folder: FolderBase, written: Callable[..., GGUFBase]
) -> None:
    """A limit, not a wish: norms stayed, and rounding moves the matrices more than the fine-tune did."""
    moved = sampled(written(quantization, matrices=0.01))
    assert compare(as_in_a_sidecar(sampled(folder)), moved, same_container=False) is None


def adapter(path: Path, base: FolderBase, *, sample: bool) -> Path:
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{prefix}A.weight": torch.ones(2, 576), f"{prefix}B.weight": torch.full((576, 2), 1e-4)}
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    reference: dict[str, Any] = {"name": base.name, "fingerprint_v2": base.fingerprints().v2}
    reference |= {"sample": sampled(base).to_json()} if sample else {}
    sidecar = {"schema_version": 2, "base": reference, "created": "2026-01-01T00:00:00Z"}
    (path / "quickchange.json").write_text(json.dumps(sidecar))
    return path


def test_a_server_of_the_package_s_file_serves_an_adapter_of_the_folder(
    smollm2: Path, folder: FolderBase, tmp_path: Path
) -> None:
    adapter(tmp_path / "sampled", folder, sample=True)
    adapter(tmp_path / "unsampled", folder, sample=False)
    with running_server("--base-model", "smollm2", "--adapters-dir", str(tmp_path)) as server:
        details = httpx.get(f"{server.url}/v1/models/sampled").json()
        refused = httpx.get(f"{server.url}/v1/models/unsampled").json()["error"]["message"]
        body = {"model": "sampled", "prompt": "The capital of France is", "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"]
    note = f"trained on {NAME} in BF16; this base has these weights in Q4_1"
    assert (details["base_check"], details["base_note"]) == ("weights_sample", note)
    assert f"trained on another base ({NAME}" in refused and "the sidecar has no sample of its base" in refused
    assert any(f"adapters sampled: {note}" in line for line in server.log)
    others = [line for line in server.log if "for other bases and not served: " in line]
    assert len(others) == 1 and f"unsampled ({NAME})" in others[0] and "(micro)" in others[0], "demo adapters too"
