"""The files of one adapter folder, each read once from one descriptor into private memory.

Nothing that happens to the folder afterwards reaches a running model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.adapters.content.file_kinds import what_is_missing
from server.adapters.content.opening import PermissionDenied, open_file, open_folder
from server.adapters.content.safetensors import MAX_HEADER_BYTES

CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE = "adapter_config.json", "adapter_model.safetensors", "quickchange.json"
TEMPLATE_FILE, TOKENIZER_FILE = "chat_template.jinja", "tokenizer_config.json"
GENERATION_FILE, SOURCE_FILE = "generation_config.json", "source.json"
MAX_JSON_BYTES = 1024 * 1024
OPTIONAL_FILES = {
    SIDECAR_FILE: MAX_JSON_BYTES,
    TEMPLATE_FILE: MAX_JSON_BYTES,
    TOKENIZER_FILE: 16 * MAX_JSON_BYTES,
    GENERATION_FILE: MAX_JSON_BYTES,
    SOURCE_FILE: MAX_JSON_BYTES,
}
UNREAD_FILES = {
    TEMPLATE_FILE: "the base's chat template is used",
    TOKENIZER_FILE: "its chat template and end token are unknown",
    GENERATION_FILE: "its sampling and end tokens are unknown",
    SOURCE_FILE: "the adapter counts as fetched from a hub",
}
"""Files that an adapter is served without where the server's user may not read them, and what that means.

The sidecar is none of them: it says which base the adapter is for.
"""

_READ_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, *OPTIONAL_FILES})


@dataclass(frozen=True)
class AdapterFiles:
    """The bytes of a folder. ``weights`` is the whole file, or only its header where no more was asked for.

    ``unread`` are files that are there and may not be read, and why.
    """

    config: bytes
    weights: bytes = field(repr=False)
    weights_size: int
    others: Mapping[str, bytes] = field(repr=False)
    created: int
    unread: Mapping[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether the weights are all there."""
        return len(self.weights) == self.weights_size

    def by_name(self) -> dict[str, bytes]:
        """Every file, as it is to be kept."""
        assert self.whole
        return {CONFIG_FILE: self.config, WEIGHTS_FILE: self.weights, **self.others}


def read_files(path: Path, *, max_bytes: int, whole: bool = True) -> AdapterFiles:
    """Read the folder. Raises ``ValueError`` or ``OSError`` where it holds no adapter, links or special files."""
    folder = open_folder(path)
    try:
        config = read_file_at(folder, CONFIG_FILE, MAX_JSON_BYTES)
        weights = read_file_at(folder, WEIGHTS_FILE, max_bytes, header_only=not whole)
        others, unread = _read_others(folder)
        if config is None or weights is None:
            raise ValueError(what_is_missing(folder, config=CONFIG_FILE, weights=WEIGHTS_FILE))
        created = int(os.fstat(folder).st_mtime)
    finally:
        os.close(folder)
    return AdapterFiles(config[0], weights[0], weights[1], others, created, unread)


def _read_others(folder: int) -> tuple[dict[str, bytes], dict[str, str]]:
    """The optional files, and why some of them are not read."""
    others: dict[str, bytes] = {}
    unread: dict[str, str] = {}
    for name, limit in OPTIONAL_FILES.items():
        try:
            found = read_file_at(folder, name, limit)
        except PermissionDenied as error:
            if name not in UNREAD_FILES:
                raise
            unread[name] = str(error)
            continue
        if found is not None:
            others[name] = found[0]
    if SOURCE_FILE in unread:
        others[SOURCE_FILE] = b"{}"  # a template of a folder from a hub is not trusted, whatever the note says
    return others, unread


def read_file(path: Path, limit: int) -> bytes | None:
    """One file, read as those of an adapter; None where there is none. Raises ``ValueError`` or ``OSError``."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = read_file_at(folder, path.name, limit)
    finally:
        os.close(folder)
    return None if found is None else found[0]


def read_file_at(folder: int, name: str, limit: int, *, header_only: bool = False) -> tuple[bytes, int] | None:
    """The file's bytes and its size, or None where there is none; links and special files are refused unread."""
    descriptor = open_file(folder, name)
    if descriptor is None:
        return None
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise ValueError(f"{name} has {size} bytes; the limit is {limit}")
        data = file.read(8 if header_only else size)
        if header_only:
            data += file.read(min(int.from_bytes(data, "little"), MAX_HEADER_BYTES))
            return data, max(size, len(data))
        return data, len(data)


Signature = tuple[tuple[str, int, int, int, int], ...]
"""The files of a folder by name, with inode, size, and times of content and of inode in nanoseconds."""


def signature_of(path: Path) -> Signature:
    """The folder's signature now; empty where it is gone. The inode's time cannot be set back, so no change hides."""
    files = []
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                files.append((entry.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(sorted(files))


def sizes_of(signature: Signature) -> frozenset[tuple[str, int]]:
    """Names and sizes of the files that an adapter is read from."""
    return frozenset((one[0], one[2]) for one in signature if one[0] in _READ_FILES)
