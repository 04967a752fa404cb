"""``quickchange adapters list``: every adapter with its pin and kept versions, and the aliases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from base_files.locate import base_on_disk
from server.adapters.aliases import ALIASES_FILE, MAX_ALIASES_BYTES, Alias, parse_aliases
from server.adapters.content.diagnostics import DiagnosticReport
from server.adapters.content.folder import UNREAD_FILES, read_file, sub_folders
from server.adapters.content.manifest import Manifest
from server.adapters.names import parse_model
from server.adapters.registry import Adapter
from server.adapters.versions import DIGITS, Pin, VersionStore
from server.cli.adapters_pins import describe
from server.cli.command_line import command_parser, parse_options, parse_settings, say
from server.cli.folders import adapter_folders, adapter_roots, open_store
from server.errors import SettingsError, first
from server.settings import Settings

if TYPE_CHECKING:
    from server.cli.adapter_checker import AdapterChecker

DESCRIPTION = """\
List adapters: one line per folder with name and version, rank, modules, memory and path, or why it is not served.
With --state-dir, the adapter's pin and kept versions follow, newest first; a request can name each as NAME@VERSION.
Aliases come last. The exit status is 1 if a folder, a pin or the alias file is refused; an adapter for another base
is listed as such, and is no fault."""


def main(arguments: Sequence[str]) -> int:
    _, rest = parse_options(command_parser("adapters list", DESCRIPTION), arguments)
    settings = parse_settings("adapters list", rest)
    folders, store = adapter_folders(settings), open_store(settings)
    paths = {name: path for folder in reversed(folders) for name, path in _folders_in(folder)}
    pins = {} if store is None else store.pins()
    kept = [] if store is None else store.names()
    if not paths:
        say(f"no adapters in {', '.join(str(folder) for folder in folders)}")
    checker = _checker(settings) if paths else None
    refused = False
    served = {settings.base_name}
    others: dict[str, str] = {}
    for name in sorted({*paths, *pins, *kept}):
        version = None
        if checker is not None and name in paths:
            report = _print_folder(checker, paths[name])
            if report.manifest is not None and not report.problems:
                version = report.manifest.version_digest
                served.add(name)
            elif report.other_base is not None:
                others[name] = report.other_base
            else:
                refused = True
        else:
            say(f"{name}: no folder of this name")
        if store is not None:
            refused |= _print_state(store, name, pins.get(name, Pin()), version)
    names = _Names(served, frozenset({*served, *kept}), others)
    refused |= _print_aliases(folders[0] / ALIASES_FILE, adapter_roots(settings), names)
    return int(refused)


@dataclass(frozen=True)
class _Names:
    """``known`` names have a version, served or kept; ``others`` maps adapters for another base to its name."""

    served: AbstractSet[str]
    known: AbstractSet[str]
    others: Mapping[str, str]


def _checker(settings: Settings) -> AdapterChecker:
    base_on_disk(settings.base_model)
    from server.cli.adapter_checker import AdapterChecker  # imports torch, which takes seconds

    return AdapterChecker.load(settings)


def _folders_in(folder: Path) -> list[tuple[str, Path]]:
    try:
        return list(sub_folders(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SettingsError(f"adapter folder {folder} cannot be read ({error.strerror})") from None


def _print_folder(checker: AdapterChecker, path: Path) -> DiagnosticReport:
    """Print a folder's line."""
    report, weights = checker.check(path)
    if report.other_base is not None:
        say(f"{path.name}: for another base: {report.other_base}, {path}")
        return report
    if weights is None or report.manifest is None:
        say(f"{path.name}: NOT SERVED: {first(report.problems, '; ')}")
        return report
    adapter, plan = Adapter.of(report.manifest), report.manifest.plan
    size = f"rank {plan.rank}, {len(plan.modules)} modules, {plan.num_bytes / 1e6:.1f} MB"
    say(f"{adapter.label}: {size}{_checked(report.manifest)}, {path}")
    for file, reason in report.manifest.unread.items():
        say(f"    served without its {file} ({UNREAD_FILES[file]}): {reason}")
    return report


def _checked(manifest: Manifest) -> str:
    """How the base was checked and the trainer's verdict, if there is a sidecar."""
    if manifest.sidecar is None:
        return ""
    verdict = manifest.sidecar.verdict
    note = "" if manifest.base_note is None else f" ({manifest.base_note})"
    return f", base by {manifest.base_check}{note}" + ("" if verdict is None else f", verdict {verdict.status}")


def _print_state(store: VersionStore, name: str, pin: Pin, current: str | None) -> bool:
    """Print pin and kept versions. True if the pinned version is missing."""
    kept = store.versions(name)
    words = []
    missing = pin.version is not None and pin.version not in {current, *(version.digest for version in kept)}
    if pin.version is not None:
        words.append(f"pinned at {pin.version[:DIGITS]}" + (", NOT SERVED: it is not kept" if missing else ""))
    if pin.resident:
        words.append("kept in memory")
    if words:
        say(f"    {', '.join(words)}")
    if kept:
        say(f"    versions: {', '.join(describe(version) for version in reversed(kept))}")
    return missing


def _print_aliases(path: Path, roots: Sequence[Path], names: _Names) -> bool:
    """Print the aliases. True if their file is refused."""
    try:
        aliases = parse_aliases(read_file(path, MAX_ALIASES_BYTES, roots) or b"")
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        say(f"{path}: NOT USED: {error}")
        return True
    for alias in aliases.values():
        shares = [f"{target.model} ({target.share:.0%})" for target in alias.targets]
        shown = ", ".join(shares) if len(shares) > 1 else alias.targets[0].model
        say(f"alias {alias.name} -> {shown}{_remark(alias, names)}")
    return False


def _remark(alias: Alias, names: _Names) -> str:
    if alias.name in names.served:
        return " (not used: something else has this name)"
    missing = {ref.name for target in alias.targets for ref in parse_model(target.model)} - names.known
    remarks = [f"{name} is for another base: {names.others[name]}" for name in sorted(missing & names.others.keys())]
    if absent := sorted(missing - names.others.keys()):
        remarks.append(f"there is no adapter {', '.join(absent)}")
    return f" ({'; '.join(remarks)})" if remarks else ""
