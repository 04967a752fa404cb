"""A folder that holds something else than PEFT's two files is refused with what it is and what to do."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.adapters.content.manifest import list_folder, read_manifest
from server.errors import AdapterRejected
from tests.adapter_folders import BASE, LIMITS, PREFIX, make, tensors, write

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 1234567\n"
CONVERT = "convert it: quickchange adapters convert FOLDER"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path, "good")


def reason(path: Path) -> str:
    """Why a folder is refused, the same by its headers and by its bytes."""
    reasons = []
    for judge in (list_folder, read_manifest):
        with pytest.raises(AdapterRejected) as caught:
            judge(path, BASE, LIMITS)
        reasons.append(caught.value.reason)
    assert reasons[0] == reasons[1]
    return reasons[0]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer_config.json", "quickchange.json"])
def test_a_git_lfs_pointer_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(POINTER)
    assert reason(folder).startswith(f"{name}: it is a git-lfs pointer in place of the file: run git lfs pull")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"/annex/objects/SHA256E-s12--ab.safetensors\n", "a git-annex pointer in place of the file"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page in place of the file: download it again"),
        (b"Entry not found", "a hub's error message in place of the file"),
        (b"Access to model someone/m is restricted", "a hub's error message in place of the file"),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), f"in GGUF, not safetensors: give it a name in .gguf and {CONVERT}"),
        (b"PK\x03\x04" + bytes(40), "a pickle of torch.save"),
        (b"\x80\x02" + bytes(40), "a pickle of torch.save"),
        (b"\x1f\x8b" + bytes(40), "a compressed archive: unpack it"),
    ],
)  # fmt: skip
def test_other_content_under_the_name_of_the_weights_is_named(folder: Path, content: bytes, words: str) -> None:
    (folder / WEIGHTS).write_bytes(content)
    assert f"{WEIGHTS}: it is {words}" in reason(folder)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json"],
            "the adapter is in shards (adapter_model-00001-of-00002.safetensors): load their tensors",
        ),
        (["adapters.safetensors", "0000100_adapters.safetensors"], f"is an adapter of mlx-lm: {CONVERT}"),
        (["support-lora.gguf"], f"support-lora.gguf is no file of PEFT's: if it is a LoRA in GGUF, {CONVERT}"),
        (["Modelfile"], f"Modelfile is a model description of Ollama's: if it names an ADAPTER, {CONVERT}"),
        (["Modelfile", "model.gguf", "model.safetensors"], f"if it names an ADAPTER, {CONVERT}"),
        (["model.safetensors"], "model.safetensors is a whole model, not an adapter: serve it with --base-model"),
        (["model-00001-of-00003.safetensors", "model.safetensors.index.json"], "is a whole model, not an adapter"),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin is a whole model"),
        (["zero_to_fp32.py", "latest"], "it is a checkpoint of DeepSpeed (zero_to_fp32.py): run zero_to_fp32.py"),
        (["pytorch_lora_weights.safetensors"], "a LoRA of diffusers, for a model that makes images"),
        (["adapter_model.safetensors.part"], "a download that is not finished"),
        (["adapter_model.bin"], "the weights are a pickle"),
        (["training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt"], f"{WEIGHTS} is missing: copy"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_config", [True, False])
def test_other_files_in_place_of_the_weights_are_named(
    folder: Path, names: list[str], words: str, has_config: bool
) -> None:
    (folder / WEIGHTS).unlink()
    for name in names:
        (folder / name).write_bytes(b"x")
    if not has_config:
        (folder / CONFIG).unlink()
        words = words.replace(f"{WEIGHTS} is missing: ", f"{CONFIG} and {WEIGHTS} are missing: ")
    assert words in reason(folder)


def test_files_of_others_beside_an_adapter_disturb_nobody(folder: Path) -> None:
    for name in ("adapters.safetensors", "model.safetensors", "lora.gguf", "adapter_model.bin", "training_args.bin"):
        (folder / name).write_bytes(b"x")
    assert read_manifest(folder, BASE, LIMITS).name == "good"


@pytest.mark.parametrize(
    ("nested", "shown"), [(["checkpoint-90", "checkpoint-500"], "checkpoint-500"), (["default", "runs"], "default")]
)
def test_an_adapter_in_a_folder_inside_is_named(folder: Path, nested: list[str], shown: str) -> None:
    (folder / WEIGHTS).unlink()
    for name in nested:
        (folder / name).mkdir()
        if name != "runs":
            shutil.copy(folder / CONFIG, folder / name)
    assert reason(folder).startswith(f"the adapter is in a sub-folder ({shown}): put that one right into")


def test_a_modelfile_comes_before_the_adapter_in_a_folder_beside_it(folder: Path) -> None:
    """The folder inside was named, and what the Modelfile says of the adapter would have been lost."""
    (folder / WEIGHTS).unlink()
    (folder / "Modelfile").write_text("FROM base\nADAPTER ./inside\n")
    make(folder, "inside")
    assert reason(folder).startswith("Modelfile is a model description of Ollama's")


@pytest.mark.parametrize("linked", [False, True])
def test_a_hubs_cache_of_a_repository_is_told_by_the_snapshot_in_it(tmp_path: Path, linked: bool) -> None:
    """It was told that PEFT's two files are missing, which lie two folders below."""
    repository = tmp_path / ("hub/models--org--name" if linked else "models--org--name")
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    for age, revision in enumerate(("b" * 40, "a" * 40)):
        path = make(repository / "snapshots", revision)
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    if linked:
        (tmp_path / "linked").symlink_to(repository)
        repository = tmp_path / "linked"
    with pytest.raises(AdapterRejected) as refused:
        read_manifest(repository, BASE, replace(LIMITS, roots=(tmp_path,)))
    assert f"a hub's cache of a whole repository, and the adapter is in snapshots/{'b' * 40}:" in refused.value.reason


def test_a_hostile_name_is_shown_in_a_line(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / ("a\n\x1b[31m" + "b" * 150 + ".gguf")).touch()
    said = reason(folder)
    assert said.isprintable() and len(said) < 250


def test_empty_tensors_of_zero_3_are_named(folder: Path) -> None:
    write(folder, weights={name: torch.empty(0) for name in tensors()})
    said = reason(folder)
    assert said.startswith(f"4 of its tensors are empty ({PREFIX}q_proj.lora_A.weight")
    assert "DeepSpeed ZeRO-3 saved them without gathering" in said
    assert "stage3_gather_16bit_weights_on_model_save" in said and "zero_to_fp32.py" in said


def test_flat_pieces_of_fsdp_are_named(folder: Path) -> None:
    write(folder, weights={name: tensor.flatten() for name, tensor in tensors().items()})
    assert "the pieces of FSDP: save it with a full state dict" in reason(folder)
