"""``quickchange adapters add``: downloads an adapter from the hub into the adapter folder.

Only an adapter's own files are downloaded, all from one commit. The folder is renamed into place when it is complete,
so a running server sees the whole adapter or none.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adapter_format.files import (
    CARD_FILE,
    COMPANION_FILES,
    CONFIG_FILE,
    SOURCE_FILE,
    TOKENS_FILE,
    WEIGHTS_FILE,
)
from adapter_format.publishing import published_folder
from server.adapters.content.folder import MAX_JSON_BYTES, MAX_TOKENS_BYTES, OPTIONAL_FILES
from server.cli.command_line import command_parser, parse_options, parse_settings
from server.cli.folders import NotPublished, choose_target

DESCRIPTION = """\
Download a PEFT adapter from the Hugging Face hub into --adapters-dir: the adapter's own files only, weights as
safetensors only, never a pickle or code. HF_TOKEN and HF_ENDPOINT have their usual meaning in huggingface_hub."""


_PICKLES = (".bin", ".pt", ".pth", ".pkl")
_TIMEOUT = 30.0


@dataclass(frozen=True)
class HubSource:
    """A repository of the hub, and a branch, tag or commit of it."""

    repo_id: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> HubSource:
        repo_id, _, revision = text.partition("@")
        return cls(repo_id, revision or None)


def main(arguments: Sequence[str]) -> int:
    """Download and publish; the exit status is 1 if no adapter was added."""
    parser = command_parser("adapters add", DESCRIPTION)
    parser.add_argument("source", metavar="REPO_ID[@REVISION]", help="for example ORG/NAME, or ORG/NAME@v2")
    parser.add_argument("--name", help="name of the adapter (default: the last part of REPO_ID)")
    parser.add_argument("--replace", action="store_true", help="replace an existing adapter of that name")
    options, rest = parse_options(parser, arguments, switches=("--replace",))
    settings = parse_settings("adapters add", rest)
    source = HubSource.parse(options.source)
    name = options.name or source.repo_id.rpartition("/")[2]
    try:
        target = choose_target(settings, name, replace=options.replace)
        with published_folder(target, replace=options.replace) as partial:
            commit = fetch(source, partial, max_bytes=settings.max_adapter_bytes)
    except (NotPublished, OSError) as error:
        print(f"quickchange: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{name}: {source.repo_id} at {commit[:12]} was added in {target}")
    print(f"next: quickchange adapters check {name}")
    return 0


def fetch(source: HubSource, folder: Path, *, max_bytes: int) -> str:
    """Download the adapter into an empty folder, with a note of its source; returns the commit.

    Raises ``NotPublished``.
    """
    api = HfApi()
    try:
        info = api.model_info(source.repo_id, revision=source.revision, files_metadata=True, timeout=_TIMEOUT)
        commit = str(info.sha)
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
        for name in _choose(sizes, source.repo_id, max_bytes):
            if not sys.stderr.isatty():  # on a terminal, huggingface_hub draws a progress bar
                print(f"fetching {name} ({shown_size(sizes[name])})", file=sys.stderr, flush=True)
            api.hf_hub_download(source.repo_id, name, revision=commit, local_dir=folder)
    except NotPublished:
        raise
    except Exception as error:
        raise NotPublished(_sentence(error, source)) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # metadata of huggingface_hub
    for path in folder.iterdir():
        _check_size(path.name, path.lstat().st_size, max_bytes)
    note = {
        "repo_id": source.repo_id,
        "revision": commit,
        "added": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (folder / SOURCE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return commit


def _choose(sizes: Mapping[str, int | None], repo_id: str, max_bytes: int) -> list[str]:
    """The files to download. Raises ``NotPublished`` if they are no adapter or too large."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in sizes]
    if missing == [WEIGHTS_FILE] and any(name.endswith(_PICKLES) for name in sizes):
        raise NotPublished(
            f"{repo_id} has its weights as a pickle only, which can run code when opened: if you trust the repository, "
            "load the adapter with PEFT and save it again with save_pretrained, which writes safetensors"
        )
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise NotPublished(f"{repo_id} is no PEFT adapter: {' and '.join(missing)} {verb} missing")
    chosen = [name for name in (CONFIG_FILE, WEIGHTS_FILE, *COMPANION_FILES) if name in sizes]
    for name in chosen:
        _check_size(name, sizes[name] or 0, max_bytes)
    if CARD_FILE in sizes and (sizes[CARD_FILE] or 0) <= MAX_JSON_BYTES:
        chosen.append(CARD_FILE)
    return chosen


def _check_size(name: str, size: int, max_bytes: int) -> None:
    limit, setting = {**OPTIONAL_FILES, TOKENS_FILE: MAX_TOKENS_BYTES}.get(name, MAX_JSON_BYTES), ""
    if name == WEIGHTS_FILE:
        limit, setting = max_bytes, " (setting max_adapter_bytes)"
    if size > limit:
        raise NotPublished(f"{name} has {size} bytes; the limit is {limit}{setting}")


def _sentence(error: BaseException, source: HubSource) -> str:
    """A message for an error of the hub: what failed, and what to do."""
    repo_id = source.repo_id
    match error:
        case HFValidationError():
            return f"{repo_id!r} is no repository of the hub: write ORG/NAME"
        case GatedRepoError():
            return f"{repo_id} is gated: accept its terms on its page at the hub, and set HF_TOKEN to your token"
        case RevisionNotFoundError():
            return f"{repo_id} has no revision {source.revision!r}"
        case RepositoryNotFoundError():
            return f"the hub has no repository {repo_id}, or it is private: check the name, or set HF_TOKEN"
        case HfHubHTTPError() if error.response.status_code == 401:
            return "the hub does not accept the token: check HF_TOKEN"
        case HfHubHTTPError() if error.response.status_code == 403:
            return f"the hub forbids access to {repo_id}: check what the token in HF_TOKEN may read"
        case HfHubHTTPError():
            return f"the hub answered with HTTP {error.response.status_code} for {repo_id}: try again later"
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set, so nothing can be downloaded: unset it"
        case LocalEntryNotFoundError() if error.__cause__ is not None:
            return _sentence(error.__cause__, source)
        case OSError(strerror=str(reason)):
            return f"the downloaded files cannot be written: {reason}"
    reason = " ".join(str(error).split())[:200]
    return f"{repo_id} could not be downloaded ({type(error).__name__}: {reason}): check the network and try again"


def shown_size(size: int | None) -> str:
    if size is None:
        return "size unknown"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"
