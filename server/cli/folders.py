"""Where adapters and their versions are or will be, and what an adapter may be, by the settings; without torch."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from base_files.locate import EMBEDDED_BASE
from server.adapters.content.manifest import AdapterPolicy
from server.adapters.names import is_name
from server.adapters.versions import VersionStore
from server.errors import SettingsError
from server.metrics import BASE
from server.settings import Settings


class NotPublished(Exception):
    """There is no new adapter, and nothing was left behind; the text is for the person at the terminal."""


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
    """The state directory, where one is set. Raises ``SettingsError`` where it cannot be made."""
    if settings.state_dir is None:
        return None
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"state_dir {settings.state_dir} cannot be made ({error.strerror})") from None
    return VersionStore(settings.state_dir, keep=settings.keep_versions)


def demo_adapters() -> Path | None:
    """The adapters that come with the package; in a source checkout, its ``adapters`` folder."""
    package = Path(str(files("micro_base")))
    for folder in (package / "adapters", package.parent / "adapters"):
        if folder.is_dir():
            return folder
    return None


def adapter_folders(settings: Settings) -> list[Path]:
    """The operator's folder, then the demo adapters where the base is theirs."""
    demos = demo_adapters() if settings.demo_adapters and settings.base_model == EMBEDDED_BASE else None
    if demos is None or demos.resolve() == settings.adapters_dir.resolve():
        return [settings.adapters_dir]
    return [settings.adapters_dir, demos]


def check_folders(settings: Settings) -> None:
    """Raise ``SettingsError`` where a folder of adapters cannot be read; one that is not there yet is no error."""
    for folder in adapter_folders(settings):
        try:
            os.scandir(folder).close()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SettingsError(
                f"the adapters' folder {folder} cannot be read ({error.strerror}): let this user list it, or "
                "name another one by --adapters-dir"
            ) from None


def adapter_roots(settings: Settings) -> tuple[Path, ...]:
    """Where links may lead: the folders of the setting, else those of adapters and the hub's cache."""
    if settings.adapter_roots is not None:
        return settings.adapter_roots
    from huggingface_hub.constants import HF_HUB_CACHE  # HF_HOME and HF_HUB_CACHE count as they are now

    return (*adapter_folders(settings), Path(HF_HUB_CACHE))


def choose_target(settings: Settings, name: str, *, replace: bool = False) -> Path:
    """The folder that an adapter of this name gets. Raises ``NotPublished`` where it may not have it."""
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
        raise NotPublished(f"{target} is no folder of its own, so it is not replaced: remove it first")
    return target


def user_cache(name: str) -> Path | None:
    """A folder of the user's cache, which need not exist yet; None where the user has none.

    It is ``$XDG_CACHE_HOME/quickchange``, or ``~/.cache/quickchange``, as the XDG Base Directory Specification says: a
    variable that is no absolute path does not count.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError:
            return None
    return root / "quickchange" / name
