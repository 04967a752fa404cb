"""Recognises other files than PEFT's two by their names and first bytes, and says what to do about them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence

_CONVERT = "convert it: quickchange adapters convert FOLDER"
_MODELFILE, _SNAPSHOTS = "Modelfile", "snapshots"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_STATE_OF_A_RUN = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state|trainer_state).*")
"""Files of a trainer's state, which hold no weights of the adapter."""

_BY_NAME: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"adapter_model-\d+-of-\d+\.safetensors|adapter_model\.safetensors\.index\.json"),
        "the adapter is in shards ({0}): load their tensors with safetensors and save them as one "
        "adapter_model.safetensors",
    ),
    (re.compile(r"(?:\d+_)?adapters\.safetensors"), f"{{0}} is an adapter of mlx-lm: {_CONVERT}"),
    (re.compile(r".+\.gguf"), f"{{0}} is no file of PEFT's: if it is a LoRA in GGUF, {_CONVERT}"),
    (
        re.compile(r"pytorch_lora_weights\.safetensors"),
        "{0} is a LoRA of diffusers, for a model that makes images: it has no place in a language model",
    ),
    (
        re.compile(r"model(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?|pytorch_model.*\.bin|consolidated.*"),
        "{0} is a whole model, not an adapter: serve it with --base-model, or save the adapter before it is merged",
    ),
    (
        re.compile(r"zero_to_fp32\.py|global_step\d+"),
        "it is a checkpoint of DeepSpeed ({0}): run zero_to_fp32.py, or save with "
        "stage3_gather_16bit_weights_on_model_save, and put PEFT's two files here",
    ),
    (
        re.compile(r".+\.(?:incomplete|part|crdownload|aria2)"),
        "{0} is a download that is not finished: download it again",
    ),
)
"""File names by precedence, and the message for a folder that has them."""

_BY_BYTES: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        re.compile(rb"version https://git-lfs\."),
        "a git-lfs pointer in place of the file: run git lfs pull where it was cloned, and copy it again",
    ),
    (
        re.compile(rb"[./]*(?:\.git)?/annex/objects/"),
        "a git-annex pointer in place of the file: run git annex get where it was cloned, and copy it again",
    ),
    (
        re.compile(rb"(?i)\s*<(?:!doctype html|html|\?xml)"),
        "a web page in place of the file: download it again (a login or a licence may be asked for)",
    ),
    (
        re.compile(rb"(?:Entry|Repository) not found|Access to model|Invalid username or password"),
        "a hub's error message in place of the file: download it again (a login or a licence may be asked for)",
    ),
    (re.compile(rb"GGUF"), f"in GGUF, not safetensors: give it a name in .gguf and {_CONVERT}"),
    (
        re.compile(rb"PK\x03\x04|\x80[\x02-\x05]"),
        "a pickle of torch.save, which can run code when opened, under another name: load it where you trust it and "
        "save it again as safetensors",
    ),
    (re.compile(rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ"), "a compressed archive: unpack it"),
)


def kind_of_bytes(name: str, data: bytes) -> str | None:
    """A message for a file whose first bytes show another kind than its name; None for any other."""
    start = data[:512]
    return next((f"{name}: it is {message}" for pattern, message in _BY_BYTES if pattern.match(start)), None)


def what_is_missing(folder: int, *, config: str, weights: str) -> str:
    """A message for a folder, given by its descriptor, that lacks one of PEFT's files."""
    names, nested = _look(folder, config)
    missing = [name for name in (config, weights) if name not in names]
    if weights in missing:
        if _MODELFILE in names:
            return f"{_MODELFILE} is a model description of Ollama's: if it names an ADAPTER, {_CONVERT}"
        if _SNAPSHOTS in names and (revisions := _revisions(folder, config)):
            return (
                f"it is a hub's cache of a whole repository, and the adapter is in {revisions[0]}: put a link to that "
                "folder into the adapter folder, or copy it with cp -rL"
            )
        if nested:
            return f"the adapter is in a sub-folder ({nested[0]}): put that one right into the adapter folder"
        if (message := _by_name(names)) is not None:
            return message
        if any(name.endswith(_PICKLES) and not _STATE_OF_A_RUN.fullmatch(name) for name in names):
            return (
                f"{weights} is missing and the weights are a pickle, which can run code when opened; load the "
                "adapter with PEFT where you trust it and save it again: save_pretrained writes safetensors"
            )
    verb = "is" if len(missing) == 1 else "are"
    return f"{' and '.join(missing)} {verb} missing: copy PEFT's two files into the folder"


def _by_name(names: Sequence[str]) -> str | None:
    for pattern, message in _BY_NAME:
        if matching := [name for name in names if pattern.fullmatch(name)]:
            return message.format(_shown(matching[0]))
    return None


def _look(folder: int, config: str) -> tuple[list[str], list[str]]:
    """All names in a folder, and the names of its sub-folders with an adapter, newest checkpoint first."""
    with os.scandir(folder) as entries:
        listed = list(entries)
    names = sorted(entry.name for entry in listed)
    nested = [
        entry.name
        for entry in listed
        if entry.is_dir(follow_symlinks=False) and _holds(folder, f"{entry.name}/{config}")
    ]
    return names, [_shown(name) for name in sorted(nested, key=_number, reverse=True)]


def _revisions(folder: int, config: str) -> list[str]:
    """Paths of the adapters in a hub's cache of a repository, newest first."""
    found: list[tuple[int, str]] = []
    with contextlib.suppress(OSError):
        snapshots = os.open(_SNAPSHOTS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            with os.scandir(snapshots) as entries:
                found = [
                    (entry.stat(follow_symlinks=False).st_mtime_ns, entry.name)
                    for entry in entries
                    if entry.is_dir(follow_symlinks=False) and _holds(snapshots, f"{entry.name}/{config}")
                ]
        finally:
            os.close(snapshots)
    return [f"{_SNAPSHOTS}/{_shown(name)}" for _, name in sorted(found, reverse=True)]


def _holds(folder: int, path: str) -> bool:
    try:
        os.stat(path, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return True


def _number(name: str) -> tuple[int, str]:
    digits = re.search(r"(\d{1,18})$", name)
    return (int(digits[1]) if digits else -1, name)


def _shown(name: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in name[:80])
