"""An adapter folder is read right, or refused with a sentence that says what to do."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from server.adapters.content.manifest import AdapterPolicy, Manifest, read_manifest
from server.errors import AdapterRejected
from server.lora.weights import LoRAWeights
from tests.adapter_folders import BASE, CONFIG, LIMITS, PREFIX, SIDECAR, tensors, write

BASE_MODULES: dict[str, nn.Module] = {
    "model.layers.0.q_proj": nn.Linear(6, 4, bias=False),
    "model.layers.0.v_proj": nn.Linear(6, 2, bias=False),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter folder."""
    path = tmp_path / "good"
    path.mkdir()
    write(path, config=CONFIG, weights=tensors())
    return path


def read(path: Path) -> Manifest:
    return read_manifest(path, BASE, LIMITS)


def refusal(path: Path) -> str:
    with pytest.raises(AdapterRejected) as caught:
        LoRAWeights.of(read(path), BASE_MODULES)
    return caught.value.reason


def test_a_folder_as_peft_writes_it_is_read(folder: Path) -> None:
    manifest = read(folder)
    assert (manifest.name, manifest.plan.rank, set(manifest.plan.modules)) == ("good", 2, set(BASE.modules))
    delta = LoRAWeights.of(manifest, BASE_MODULES).deltas["model.layers.0.q_proj"]
    assert delta.a is not None and delta.b is not None and delta.a.shape == (6, 2)
    assert torch.equal(delta.b, torch.full((2, 4), 2.0))  # alpha / r = 2 is folded in


def test_the_sidecar_changes_the_version_but_not_the_weights(folder: Path) -> None:
    plain = read(folder)
    write(folder, sidecar=SIDECAR)
    assert read(folder).weights_digest == plain.weights_digest
    assert read(folder).version_digest != plain.version_digest


def test_what_was_read_survives_the_file(folder: Path) -> None:
    manifest = read(folder)
    os.truncate(folder / "adapter_model.safetensors", 10)
    assert LoRAWeights.of(manifest, BASE_MODULES).deltas


def test_a_config_that_is_not_served_exactly_is_refused(folder: Path) -> None:
    """Each field has its case in test_peft_config.py."""
    write(folder, config=CONFIG | {"layer_replication": [[0, 1]]})
    assert "adapter_config.json: layer_replication = [[0, 1]] is not supported" in refusal(folder)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (lambda: tensors() | {f"{PREFIX}q_proj.lora_A.weight": torch.ones(3, 6)}, "do not fit the base"),
        (lambda: tensors() | {f"{PREFIX}q_proj.lora_A.weight": torch.full((2, 6), float("nan"))}, "NaN or infinity"),
        (lambda: {key: torch.zeros_like(value) for key, value in tensors().items()}, "would change nothing"),
        (lambda: {}, "holds no tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    folder: Path, weights: Callable[[], dict[str, torch.Tensor]], words: str
) -> None:
    """Each way not to fit has its case in test_plan.py."""
    write(folder, weights=weights())
    assert words in refusal(folder)


def test_a_file_over_the_limit_is_refused(folder: Path) -> None:
    with pytest.raises(AdapterRejected, match="the limit is 100"):
        read_manifest(folder, BASE, AdapterPolicy(8, 100))


def test_an_adapter_for_another_base_is_refused(folder: Path) -> None:
    write(folder, sidecar=SIDECAR | {"base": {"name": "other", "fingerprint": "sha256:" + "b" * 64}})
    assert "trained on another base (other" in refusal(folder)


def test_a_foreign_chat_template_is_refused_where_it_is_not_trusted(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert read(folder).defaults.chat_template == "{{ messages }}"
    with pytest.raises(AdapterRejected, match="it brings a chat template of its own"):
        read_manifest(folder, BASE, AdapterPolicy(8, 100_000, trust_chat_templates=False))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    assert "the weights are a pickle" in refusal(folder)


def _header(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":%s}'


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "truncated"),
        (struct.pack("<Q", 1 << 60), "announces a header"),
        (_header(b"[" * 10_000), "not valid JSON"),
        (_header(b"[]"), "not a JSON object"),
        (_header(b'{"a":{}}'), "malformed"),
        (
            _header(b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}') + bytes(2),
            "'a' has the type F8_E4M3, which is",
        ),
        (_header(b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}') + bytes(2), "save it as F32, F16 or BF16"),
        (_header(b'{"a":{"dtype":"nonsense","shape":[2],"data_offsets":[0,2]}}') + bytes(2), "malformed"),
        (_header(b'{"a":' + (ENTRY % "[0,4]").encode() + b"}"), "truncated"),
        (_header(b'{"a":' + (ENTRY % "[0,8]").encode() + b"}") + bytes(8), "does not fill"),
        (_header(b'{"a":' + (ENTRY % "[4,8]").encode() + b"}") + bytes(8), "overlaps another one or leaves a gap"),
        (_header(b'{"a":' + (ENTRY % "[0,4]").encode() + b"}") + bytes(8), "4 bytes more"),
        (_header(b'{"a":1,"a":2}'), "stands twice"),
    ],
)
def test_a_malformed_weights_file_is_refused(folder: Path, data: bytes, words: str) -> None:
    (folder / "adapter_model.safetensors").write_bytes(data)
    reason = refusal(folder)
    assert "adapter_model.safetensors: " in reason
    assert words in reason


def test_a_truncated_weights_file_is_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    assert "truncated" in refusal(folder)


def test_links_and_special_files_are_refused(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "elsewhere")
    weights.symlink_to(folder / "elsewhere")
    assert "is a link" in refusal(folder)
    weights.unlink()
    os.mkfifo(weights)
    assert "not a regular file" in refusal(folder)


@pytest.mark.parametrize("name", ["-x", "a b", "a:b", "ü", "a\n", "x" * 129])
def test_a_folder_whose_name_is_no_model_name_is_refused(folder: Path, name: str) -> None:
    assert "no model name" in refusal(folder.rename(folder.parent / name))


def test_a_folder_named_like_the_base_is_refused(folder: Path) -> None:
    assert "this name means the base model" in refusal(folder.rename(folder.parent / "base"))
