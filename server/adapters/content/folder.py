"""The files of one adapter folder, each read once from one descriptor into private memory.

Nothing that happens to the folder afterwards reaches a running model.
"""

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
"""Of the weights file."""
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
"""Files that an adapter is served without where the server's user may not read them, and what that means.

``tokenizer.json`` is one only where a pointer or a web page lies in its place. Where it or ``added_tokens.json`` is
closed the adapter is refused: with the base's tokens its prompts would have other ids than in training. So it is where
the sidecar is closed, which says which base the adapter is for.
"""

_NO_ADAPTERS = frozenset({"__MACOSX", "__pycache__", "lost+found", "@eaDir"})
"""Folders that archivers, file systems and storage boxes put beside others."""
_READ_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, TOKENS_FILE, *OPTIONAL_FILES})


@dataclass(frozen=True)
class AdapterFiles:
    """The bytes of a folder. ``weights`` is the whole file, or only its header where no more was asked for.

    So is ``tokens``, the tokenizer, whose list of added tokens stands at the beginning. ``unread`` are files that are
    there and may not be read, and why.
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
        """Every file, as it is to be kept."""
        assert self.whole
        tokens = {TOKENS_FILE: self.tokens} if self.tokens else {}
        return {CONFIG_FILE: self.config, WEIGHTS_FILE: self.weights, **self.others, **tokens}


def read_files(path: Path, *, max_bytes: int, whole: bool = True, roots: Sequence[Path] = ()) -> AdapterFiles:
    """Read the folder, following links into ``roots``.

    Raises ``ValueError`` where it holds no adapter, other links or special files, ``OSError`` where trying again may
    help.
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
    if SOURCE_FILE not in others and (source := folder.hub_source) is not None:
        note = {"repo_id": source[0], "revision": source[1] or "no known revision", "added": "by a link into its cache"}
        others[SOURCE_FILE] = json.dumps(note).encode()
    return others, unread


def read_tokens_at(folder: Folder, unread: dict[str, str], *, whole: bool) -> bytes:
    """The tokenizer, or as much of it as lists the added tokens; nothing where there is none, or another thing."""
    found = read_file_at(folder, TOKENS_FILE, MAX_TOKENS_BYTES, most=None if whole else _TOKENS_HEAD)
    if found is not None and len(found[0]) < found[1] and listed_in_head(found[0]) is None:
        found = read_file_at(folder, TOKENS_FILE, MAX_TOKENS_BYTES)
    if found is not None and not found[0].strip():
        unread[TOKENS_FILE] = f"{TOKENS_FILE} is empty: copy it into the folder again"
        return b""
    if found is not None and (kind := kind_of_bytes(TOKENS_FILE, found[0])) is not None:
        unread[TOKENS_FILE] = kind  # as a repository's largest file after the weights it is often not fetched
        return b""
    return b"" if found is None else found[0]


def read_file(path: Path, limit: int, roots: Sequence[Path] = ()) -> bytes | None:
    """One file, read as those of an adapter; None where there is none. Raises as ``read_files``."""
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = read_file_at(Folder(parent, roots), path.name, limit)
    finally:
        os.close(parent)
    return None if found is None else found[0]


def read_file_at(
    folder: Folder, name: str, limit: int, *, header_only: bool = False, most: int | None = None
) -> tuple[bytes, int] | None:
    """The file's bytes, of which ``most`` are read, and its size; None where there is none.

    What may not be followed is refused unread.
    """
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
    """The adapter folders in a folder by name, of some names or of all, be they folders or links to folders.

    A link that leads in a circle or to a closed folder counts, so that it is refused with a sentence. Raises
    ``OSError`` where the folder, or what is in it, cannot be looked at.
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

What a link leads to, if that is inside the roots, has the link's name with a slash behind it. A folder that is a link
itself has its own entry, without a name. Folders inside an adapter's are none of its files, and left out.
"""


def folder_state(path: Path, roots: Sequence[Path] = ()) -> FolderState:
    """The folder's state now; empty where it is gone. The inode's time cannot be set back, so no change hides."""
    files = []
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            files.append(_entry("", status))
            if not leads_inside(path, roots):
                return tuple(files)
        with os.scandir(path) as entries:
            files += [one for entry in entries for one in _entries(entry.name, entry.path, roots)]
    return tuple(sorted(files))


def file_state(path: Path, roots: Sequence[Path] = ()) -> FolderState:
    """The state of one file; empty where it is gone."""
    return tuple(_entries(path.name, os.fspath(path), roots))


def follows_links(state: FolderState) -> bool:
    """Whether what was looked at is reached through links, whose targets tell of no events."""
    return any(not name or name.endswith("/") for name, *_ in state)


def sizes_of(state: FolderState) -> Mapping[str, int]:
    """Names and sizes of the files that an adapter is read from, through links where they are links."""
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
