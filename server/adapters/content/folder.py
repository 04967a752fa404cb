"""Reads the files of one adapter folder into memory, each once; later changes of the folder do not affect them."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapter_format.files import (
    ADDED_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    SIDECAR_FILE,
    SOURCE_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    TOKENS_FILE,
    WEIGHTS_FILE,
)
from server.adapters.content.added_tokens import listed_in_head
from server.adapters.content.file_kinds import kind_of_bytes, what_is_missing
from server.adapters.content.safe_open import PASSING, Folder, PermissionDenied, leads_inside

MAX_JSON_BYTES = 1024 * 1024
MAX_HEADER_BYTES = 16 * MAX_JSON_BYTES
"""Limit of the weights file's header."""
OPTIONAL_FILES = {
    SIDECAR_FILE: MAX_JSON_BYTES,
    TEMPLATE_FILE: MAX_JSON_BYTES,
    TOKENIZER_FILE: 16 * MAX_JSON_BYTES,
    GENERATION_FILE: MAX_JSON_BYTES,
    SOURCE_FILE: MAX_JSON_BYTES,
    ADDED_FILE: MAX_JSON_BYTES,
}
MAX_TOKENS_BYTES, _TOKENS_HEAD = 48 * MAX_JSON_BYTES, MAX_JSON_BYTES // 4
UNREAD_FILES = {
    TEMPLATE_FILE: "the base's chat template is used",
    TOKENIZER_FILE: "its chat template and end token are unknown",
    GENERATION_FILE: "its sampling and end tokens are unknown",
    SOURCE_FILE: "the adapter counts as fetched from a hub",
    TOKENS_FILE: "tokens that it adds are unknown",
}
"""Files that an adapter is served without if the server's user may not read them, and the consequence.

``tokenizer.json`` counts only if it is a git-lfs pointer or a web page. An adapter whose ``tokenizer.json`` or
``added_tokens.json`` may not be read is refused: its prompts would have other ids than in training. So is one whose
sidecar, which names the base, may not be read.
"""

_NO_ADAPTERS = frozenset({"__MACOSX", "__pycache__", "lost+found", "@eaDir"})
"""Folders that archivers, file systems and network storage create."""
_READ_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, TOKENS_FILE, *OPTIONAL_FILES})


@dataclass(frozen=True)
class AdapterFiles:
    """The bytes of a folder's files. ``weights`` is the whole file or only its header.

    ``tokens`` is ``tokenizer.json``, the whole file or its beginning with the list of added tokens. ``unread`` maps
    files that may not be read to the reason.
    """

    config: bytes
    weights: bytes = field(repr=False)
    weights_size: int
    others: Mapping[str, bytes] = field(repr=False)
    created: int
    unread: Mapping[str, str] = field(default_factory=dict)
    tokens: bytes = field(default=b"", repr=False)

    @property
    def whole(self) -> bool:
        return len(self.weights) == self.weights_size

    def by_name(self) -> dict[str, bytes]:
        """Every file by name."""
        assert self.whole
        tokens = {TOKENS_FILE: self.tokens} if self.tokens else {}
        return {CONFIG_FILE: self.config, WEIGHTS_FILE: self.weights, **self.others, **tokens}


def read_files(path: Path, *, max_bytes: int, whole: bool = True, roots: Sequence[Path] = ()) -> AdapterFiles:
    """Read the folder, following links into ``roots``.

    Raises ``ValueError`` for no adapter, other links or special files; ``OSError`` for temporary errors.
    """
    with Folder.opened(path, roots) as folder:
        config = read_file_at(folder, CONFIG_FILE, MAX_JSON_BYTES)
        weights = read_file_at(folder, WEIGHTS_FILE, max_bytes, header_only=not whole)
        others, unread = _read_others(folder)
        tokens = read_tokens_at(folder, unread, whole=whole)
        if config is None or weights is None:
            raise ValueError(what_is_missing(folder.descriptor, config=CONFIG_FILE, weights=WEIGHTS_FILE))
        created = int(os.fstat(folder.descriptor).st_mtime)
        folder.check_links()
    return AdapterFiles(config[0], weights[0], weights[1], others, created, unread, tokens)


def _read_others(folder: Folder) -> tuple[dict[str, bytes], dict[str, str]]:
    """The optional files, and the reasons why some may not be read."""
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
        others[SOURCE_FILE] = b"{}"  # any note makes the folder one from a hub, whose template is not trusted
    source = folder.hub_source
    if SOURCE_FILE not in others and source is not None:
        repo_id, revision = source
        note = {"repo_id": repo_id, "revision": revision or "no known revision", "added": "by a link into its cache"}
        others[SOURCE_FILE] = json.dumps(note).encode()
    return others, unread


def read_tokens_at(folder: Folder, unread: dict[str, str], *, whole: bool) -> bytes:
    """``tokenizer.json``, or its beginning with the list of added tokens; empty if missing or another kind of file."""
    found = read_file_at(folder, TOKENS_FILE, MAX_TOKENS_BYTES, most=None if whole else _TOKENS_HEAD)
    if found is not None and len(found[0]) < found[1] and listed_in_head(found[0]) is None:
        found = read_file_at(folder, TOKENS_FILE, MAX_TOKENS_BYTES)
    if found is None:
        return b""
    data, _ = found
    if not data.strip():
        unread[TOKENS_FILE] = f"{TOKENS_FILE} is empty: copy it into the folder again"
        return b""
    kind = kind_of_bytes(TOKENS_FILE, data)
    if kind is not None:
        unread[TOKENS_FILE] = kind  # large files of a repository are often left as pointers
        return b""
    return data


def read_file(path: Path, limit: int, roots: Sequence[Path] = ()) -> bytes | None:
    """Read one file as those of an adapter; None if there is none. Raises as ``read_files``."""
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = read_file_at(Folder(parent, roots), path.name, limit)
    finally:
        os.close(parent)
    return None if found is None else found[0]


def read_file_at(
    folder: Folder, name: str, limit: int, *, header_only: bool = False, most: int | None = None
) -> tuple[bytes, int] | None:
    """The file's bytes, at most ``most``, and its size; None if there is none."""
    descriptor = folder.open(name)
    if descriptor is None:
        return None
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise ValueError(f"{name} has {size} bytes; the limit is {limit}")
        data = file.read(8 if header_only else min(size, size if most is None else most))
        if header_only:
            data += file.read(min(int.from_bytes(data, "little"), MAX_HEADER_BYTES))
            return data, max(size, len(data))
        return data, len(data) if most is None else max(size, len(data))


def sub_folders(folder: Path, names: Collection[str] | None = None) -> Iterator[tuple[str, Path]]:
    """Names and paths of the sub-folders, and links to folders, that may hold adapters; of all names or some.

    Circular links and links to unreadable folders are included: they are refused later, with a reason. Raises
    ``OSError`` if the folder or its entries cannot be read.
    """
    for name in sorted(os.listdir(folder) if names is None else names):
        if not name.startswith(".") and name not in _NO_ADAPTERS and _is_folder(folder / name):
            yield name, folder / name


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in PASSING or not os.path.islink(path):
            raise
        return True


FolderState = tuple[tuple[str, int, int, int, int], ...]
"""The files of a folder by name, with inode, size, and times of content and of inode in nanoseconds.

The target of a link into the roots is listed under the link's name and a slash. A folder that is a link has an entry
of its own with an empty name. Sub-folders are left out.
"""


def folder_state(path: Path, roots: Sequence[Path] = ()) -> FolderState:
    """The folder's present state; empty if it is gone. Every change shows: an inode's time cannot be set back."""
    files = []
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            files.append(_entry("", status))
            if not leads_inside(path, roots):
                return tuple(files)
        with os.scandir(path) as entries:
            for entry in entries:
                files += _entries(entry.name, entry.path, roots)
    return tuple(sorted(files))


def file_state(path: Path, roots: Sequence[Path] = ()) -> FolderState:
    """The state of one file; empty if it is gone."""
    return tuple(_entries(path.name, os.fspath(path), roots))


def follows_links(state: FolderState) -> bool:
    """Whether it has links; file system events do not cover their targets."""
    return any(not name or name.endswith("/") for name, *_ in state)


def sizes_of(state: FolderState) -> Mapping[str, int]:
    """Sizes of an adapter's files by name; of a link, its target's."""
    sizes = {name.rstrip("/"): size for name, _, size, *_ in sorted(state)}
    return {name: size for name, size in sizes.items() if name in _READ_FILES}


def _entries(name: str, path: str, roots: Sequence[Path]) -> Iterator[tuple[str, int, int, int, int]]:
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            yield _entry(name, status)
        if stat.S_ISLNK(status.st_mode) and leads_inside(path, roots):
            yield _entry(f"{name}/", os.stat(path))


def _entry(name: str, status: os.stat_result) -> tuple[str, int, int, int, int]:
    return name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
