"""An adapter of a folder is served on GGUF files of the same base, and the other way round; not on another base."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from base_files.gguf.base import GGUFBase
from base_files.source import BaseSource, FolderBase
from base_files.weights_sample import sample_of
from server.adapters.content.base_samples import BaseSamples
from server.adapters.content.manifest import AdapterPolicy, Manifest, read_manifest
from server.adapters.content.signature import BaseSignature, linear
from server.errors import AdapterRejected
from tests.gguf_models import model_arrays, model_metadata, tokenizer_metadata, write_gguf_model
from tests.tiny_models import build_tiny_base, tiny_tokenizer

POLICY = AdapterPolicy(max_rank=8, max_bytes=100_000)
MODULE = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> FolderBase:
    """A random base in bfloat16, as most are published."""
    path = build_tiny_base(tmp_path_factory.mktemp("folder") / "tiny")
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    return FolderBase(path)


def convert(folder: FolderBase, path: Path, quantization: str, change: Change = lambda *_: None) -> GGUFBase:
    """The folder's model as a GGUF file, with a change of its tensors or metadata."""
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.bfloat16)
    tensors = model_arrays(model, "llama")
    metadata = model_metadata(model, "llama") | tokenizer_metadata(tiny_tokenizer(), model.config.vocab_size, "gpt-2")
    change(tensors, metadata)
    return GGUFBase(write_gguf_model(path, "llama", tensors, metadata, quantization=quantization))


def adapter(path: Path, source: BaseSource, *, name: str = "tiny", sample: bool = True) -> Path:
    """An adapter of the module with the sidecar of a training on ``source``."""
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    prefix = f"base_model.model.{MODULE}.lora_"
    tensors = {f"{prefix}A.weight": torch.ones(2, 32), f"{prefix}B.weight": torch.ones(32, 2)}
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    fingerprints = source.fingerprints()
    reference: dict[str, Any] = {"name": name, "fingerprint_v2": fingerprints.v2}
    if fingerprints.v1 is not None:
        reference["fingerprint"] = fingerprints.v1
    if sample:
        taken = sample_of(source)
        assert taken is not None
        reference["sample"] = taken.to_json()
    sidecar = {"schema_version": 2, "base": reference, "created": "2026-01-01T00:00:00Z"}
    (path / "quickchange.json").write_text(json.dumps(sidecar))
    return path


def signature(source: BaseSource) -> BaseSignature:
    """What ``load_base`` makes of a base, with one module."""
    fingerprints = source.fingerprints()
    return BaseSignature(
        source.name,
        fingerprints.v1,
        {MODULE: linear(32, 32)},
        fingerprint_v2=fingerprints.v2,
        samples=BaseSamples(source),
    )


def served(path: Path, source: BaseSource) -> Manifest:
    return read_manifest(path, signature(source), POLICY)


def refusal(path: Path, source: BaseSource) -> str:
    with pytest.raises(AdapterRejected, match="it was trained on another base") as refused:
        served(path, source)
    return refused.value.reason


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_an_adapter_of_the_folder_is_served_on_the_file(tmp_path: Path, folder: FolderBase, quantization: str) -> None:
    manifest = served(adapter(tmp_path / "a", folder), convert(folder, tmp_path / "tiny.gguf", quantization))
    assert manifest.base_check == "weights_sample"
    assert manifest.base_note == f"trained on tiny in BF16; this base has these weights in {quantization}"


@pytest.mark.parametrize("quantization", ["F32", "Q8_0", "Q4_0"])
def test_an_adapter_of_the_file_is_served_on_the_folder_and_on_other_files(
    tmp_path: Path, folder: FolderBase, quantization: str
) -> None:
    path = adapter(tmp_path / "a", convert(folder, tmp_path / "tiny.gguf", quantization), name="tiny.gguf")
    assert served(path, folder).base_check == "weights_sample"
    assert served(path, convert(folder, tmp_path / "other.gguf", "Q5_0")).base_check == "weights_sample"


def test_a_renamed_file_is_the_same_base_by_its_fingerprint(tmp_path: Path, folder: FolderBase) -> None:
    def rename(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        metadata["general.name"] = "renamed"

    path = adapter(tmp_path / "a", convert(folder, tmp_path / "tiny.gguf", "Q8_0"))
    manifest = served(path, convert(folder, tmp_path / "renamed.gguf", "Q8_0", rename))
    assert (manifest.base_check, manifest.base_note) == ("fingerprint_v2", None)


def _norm(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    tensors["blk.0.attn_norm.weight"] = tensors["blk.0.attn_norm.weight"] * 1.01


def _weights(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """A small fine-tune of one linear layer."""
    weight = tensors["blk.1.ffn_down.weight"]
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    tensors["blk.1.ffn_down.weight"] = weight + 0.05 * weight.std() * noise


def _token(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    metadata["tokenizer.ggml.tokens"][-1] = "other"


def _theta(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    metadata["llama.rope.freq_base"] = 500000.0


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_norm, "the weights differ: layers.0.input_layernorm.weight has 1 (BF16) instead of 1.01 (F32)"),
        (_weights, "the weights differ: layers.1.mlp.down_proj.weight has "),
        (_token, "the tokens differ"),
        (_theta, "the architecture differs (rope_theta 10000.0 instead of 500000.0)"),
    ],
)
def test_another_base_is_refused_with_what_differs(
    tmp_path: Path, folder: FolderBase, quantization: str, change: Change, words: str
) -> None:
    other = convert(folder, tmp_path / "other.gguf", quantization, change)
    reason = refusal(adapter(tmp_path / "a", folder), other)
    assert words in reason
    assert reason.endswith(": start the server with that base, or train the adapter again")


def test_a_base_with_other_random_weights_is_refused_in_every_format(tmp_path: Path, folder: FolderBase) -> None:
    other = FolderBase(build_tiny_base(tmp_path / "other", seed=1))
    path = adapter(tmp_path / "a", folder)
    assert "the weights differ" in refusal(path, other)
    for quantization in ("F16", "Q8_0", "Q4_0"):
        assert "the weights differ" in refusal(path, convert(other, tmp_path / f"{quantization}.gguf", quantization))


@pytest.mark.parametrize("name", ["tiny", "tiny.gguf"])
def test_without_a_sample_the_base_beside_this_one_is_sampled(tmp_path: Path, folder: FolderBase, name: str) -> None:
    """The sidecar of an adapter that was trained before there were samples."""
    file = convert(folder, tmp_path / "tiny.gguf", "Q8_0")
    trained, runs = (folder, file) if name == "tiny" else (file, folder)
    beside = tmp_path / "bases"
    beside.mkdir()
    shutil.copytree(folder.path, beside / "tiny")
    shutil.copy(file.path, beside)
    path = adapter(tmp_path / "a", trained, name=name, sample=False)
    at_home = GGUFBase(beside / "tiny.gguf") if runs is file else FolderBase(beside / "tiny")
    assert served(path, at_home).base_check == "weights_sample"


def test_a_sidecar_of_version_1_is_compared_with_a_file_as_well(tmp_path: Path, folder: FolderBase) -> None:
    """The file has no fingerprint of version 1."""
    file = convert(folder, tmp_path / "file.gguf", "Q8_0")
    path = adapter(tmp_path / "a", folder, sample=False)
    reference = {"name": "tiny", "fingerprint": folder.fingerprints().v1}
    sidecar = {"schema_version": 1, "base": reference, "created": "2026-01-01T00:00:00Z"}
    (path / "quickchange.json").write_text(json.dumps(sidecar))
    assert f"this server runs file ({file.fingerprints().v2[:19]})" in refusal(path, file)
    shutil.copytree(folder.path, tmp_path / "tiny")
    assert served(path, file).base_check == "weights_sample"


def test_without_a_sample_and_without_its_base_it_is_refused_with_the_way_out(
    tmp_path: Path, folder: FolderBase
) -> None:
    other = FolderBase(build_tiny_base(tmp_path / "tiny", seed=1))
    file = convert(folder, tmp_path / "file.gguf", "Q8_0")
    reason = refusal(adapter(tmp_path / "a", folder, sample=False), file)
    assert other.path.parent == file.path.parent, "a base of this name with another fingerprint is beside the file"
    assert (
        "the sidecar has no sample of its base, and tiny is neither in the hub's cache nor beside this base" in reason
    )


def test_a_base_in_the_cache_of_the_hub_is_sampled(
    tmp_path: Path, folder: FolderBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(repo_id: str, file: str) -> str | None:
        assert file == "config.json"
        return str(folder.path / file) if repo_id == "org/tiny" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    file = convert(folder, tmp_path / "file.gguf", "Q8_0")
    known = adapter(tmp_path / "a", folder, name="org/tiny", sample=False)
    assert served(known, file).base_check == "weights_sample"
    assert "has no sample" in refusal(adapter(tmp_path / "b", folder, name="org/other", sample=False), file)


@pytest.mark.parametrize("name", ["../tiny", "/etc", "org/../tiny", ".", "org/a--b", "a/b/c", "~", "tiny\n"])
def test_a_name_that_is_a_path_is_not_followed(
    tmp_path: Path, folder: FolderBase, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "x").mkdir()
    shutil.copytree(folder.path, tmp_path / "tiny")
    file = convert(folder, tmp_path / "x/file.gguf", "Q8_0")
    assert "has no sample" in refusal(adapter(tmp_path / "a", folder, name=name, sample=False), file)


def test_a_folder_saved_in_another_type_is_the_same_base(tmp_path: Path, folder: FolderBase) -> None:
    path = adapter(tmp_path / "a", folder)
    copy = shutil.copytree(folder.path, tmp_path / "copy")
    AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).save_pretrained(copy)
    assert served(path, FolderBase(copy)).base_check == "weights_sample"


def test_a_sample_that_is_malformed_is_refused_by_the_tensor_s_name(tmp_path: Path, folder: FolderBase) -> None:
    path = adapter(tmp_path / "a", folder)
    sidecar = json.loads((path / "quickchange.json").read_text())
    sidecar["base"]["sample"]["tensors"]["norm.weight"] = "F32 32 AAAA"
    (path / "quickchange.json").write_text(json.dumps(sidecar))
    with pytest.raises(AdapterRejected, match=r"the sample of the base's tensor 'norm.weight' is malformed") as refused:
        served(path, convert(folder, tmp_path / "file.gguf", "Q8_0"))
    assert refused.value.other_base is None


def test_a_base_whose_tokens_are_unknown_is_not_compared(
    tmp_path: Path, folder: FolderBase, caplog: pytest.LogCaptureFixture
) -> None:
    path = adapter(tmp_path / "a", folder)
    without = shutil.copytree(folder.path, tmp_path / "without")
    AutoModelForCausalLM.from_pretrained(without, dtype=torch.float32).save_pretrained(without)
    (without / "tokenizer.json").unlink()
    assert "it has no tokenizer.json" in refusal(path, FolderBase(without))
    (without / "tokenizer.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert "start the server with that base" in refusal(path, FolderBase(without))
    assert "base without cannot be compared with others" in caplog.text
