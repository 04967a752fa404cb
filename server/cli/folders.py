"""Folders of adapters and versions, and the adapter policy, from the settings; without torch."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from base_files.names import EMBEDDED_BASE
from base_files.packaged import PACKAGED_BASES
from server.adapters.content.manifest import AdapterPolicy
from server.adapters.names import is_name
from server.adapters.versions import VersionStore
from server.errors import SettingsError
from server.metrics import BASE
from server.settings import Settings


class NotPublished(Exception):
    """No adapter was published, and no files remain. The text is printed."""


def policy_of(settings: Settings) -> AdapterPolicy:
    return AdapterPolicy(
        max_rank=settings.max_lora_rank,
        max_bytes=settings.max_adapter_bytes,
        max_memory=settings.adapter_memory,
        trust_chat_templates=settings.trust_chat_templates,
        trusted_templates=settings.trusted_names,
        roots=adapter_roots(settings),
    )


def open_store(settings: Settings) -> VersionStore | None:
    """The state directory; None if none is set. Raises ``SettingsError`` if it cannot be made or read."""
    if settings.state_dir is None:
        return None
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        os.scandir(settings.state_dir).close()
    except OSError as error:
        raise SettingsError(f"state_dir {settings.state_dir} cannot be made or read ({error.strerror})") from None
    return VersionStore(settings.state_dir, keep=settings.keep_versions)


def demo_adapters() -> Path | None:
    """The adapters that come with the package; in a source checkout, its ``adapters`` folder."""
    package = Path(str(files("micro_base")))
    for folder in (package / "adapters", package.parent / "adapters"):
        if folder.is_dir():
            return folder
    return None


def adapter_folders(settings: Settings) -> list[Path]:
    """The operator's folder, then, for the embedded and the packaged bases, that of the demo adapters."""
    has_demos = settings.base_model in (EMBEDDED_BASE, *PACKAGED_BASES)
    demos = demo_adapters() if settings.demo_adapters and has_demos else None
    if demos is None or demos.resolve() == settings.adapters_dir.resolve():
        return [settings.adapters_dir]
    return [settings.adapters_dir, demos]


def check_folders(settings: Settings) -> None:
    """Raise ``SettingsError`` if a folder of adapters cannot be read; it need not exist yet."""
    for folder in adapter_folders(settings):
        try:
            os.scandir(folder).close()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SettingsError(
                f"adapter folder {folder} cannot be read ({error.strerror}): give this user read permission, or set "
                "--adapters-dir"
            ) from None


def adapter_roots(settings: Settings) -> tuple[Path, ...]:
    """Folders that links may lead into. Default: the adapter folders and the hub's cache."""
    if settings.adapter_roots is not None:
        return settings.adapter_roots
    from huggingface_hub.constants import HF_HUB_CACHE  # reads HF_HOME and HF_HUB_CACHE at import

    return (*adapter_folders(settings), Path(HF_HUB_CACHE))


def choose_target(settings: Settings, name: str, *, replace: bool = False) -> Path:
    """The folder for a new adapter of this name. Raises ``NotPublished`` for a bad name or an existing folder."""
    if not is_name(name):
        raise NotPublished(
            f"{name!r} is no adapter name: choose one with --name, of letters, digits, '.', '_' and '-', 128 at most, "
            "beginning with a letter or digit"
        )
    if name in (BASE, settings.base_name):
        raise NotPublished(f"the name {name} means the base model: choose another with --name")
    target = settings.adapters_dir / name
    if not os.path.lexists(target):
        return target
    if not replace:
        raise NotPublished(f"{target} exists already: choose another --name")
    if target.is_symlink() or not target.is_dir():
        raise NotPublished(f"{target} is a link or a file, which --replace does not replace: remove it first")
    return target


def user_cache(name: str) -> Path | None:
    """``name`` in ``$XDG_CACHE_HOME/quickchange`` or ``~/.cache/quickchange``; None if there is no home directory.

    As the XDG Base Directory Specification says, a relative ``XDG_CACHE_HOME`` is ignored.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError:
            return None
    return root / "quickchange" / name
