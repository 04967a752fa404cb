"""``quickchange adapters``: the adapter folders, what is in them, and why one is not served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.adapters.manifest import BaseSignature, Limits, read_manifest
from server.adapters.registry import Adapter
from server.cli.serve import adapter_folders
from server.cli.settings import parse_settings
from server.errors import AdapterRejected
from server.lora.weights import LoRAWeights
from server.model.device import choose_device
from server.model.loader import load_base


def main(arguments: Sequence[str]) -> int:
    """Print a line for each folder; the exit status is 1 where one would be refused."""
    settings = parse_settings("adapters", arguments)
    base = load_base(
        settings.base_model,
        name=settings.base_name,
        device="cpu",
        dtype="float32",
        max_model_len=settings.max_model_len,
    )
    limits = Limits(settings.max_lora_rank, settings.max_adapter_bytes)
    folders = adapter_folders(settings)
    paths = {path.name: path for folder in reversed(folders) for path in _sub_folders(folder)}
    if not paths:
        print(f"no adapters in {', '.join(str(folder) for folder in folders)}")
        return 0
    return max(_report(path, base.signature, limits) for _, path in sorted(paths.items()))


def _report(path: Path, base: BaseSignature, limits: Limits) -> int:
    try:
        manifest = read_manifest(path, base, limits)
        LoRAWeights.of(manifest, choose_device("cpu"))
    except AdapterRejected as error:
        print(f"{path.name}: NOT SERVED: {error.reason}")
        return 1
    adapter = Adapter.of(manifest)
    print(
        f"{adapter.name}@{adapter.version_digest[:12]}: rank {adapter.rank}, {adapter.num_modules} modules, "
        f"{adapter.num_bytes / 1e6:.1f} MB, {path}"
    )
    return 0


def _sub_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
