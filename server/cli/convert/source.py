"""Converts adapters of other trainers to PEFT folders: finds the format, converts, checks on the base, publishes."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapter_format.files import COMPANION_FILES, CONFIG_FILE, SIDECAR_FILE, SOURCE_FILE, WEIGHTS_FILE
from adapter_format.publishing import published_folder
from adapter_format.sidecar import parse_sidecar
from base_files.gguf.file import is_gguf
from base_files.locate import find_base
from base_files.names import base_name
from server.adapters.content.folder import MAX_JSON_BYTES
from server.adapters.content.peft_config import parse_peft_config
from server.cli.convert.gguf import GGUFAdapter, read_gguf_adapter
from server.cli.convert.mlx import MLXAdapter, is_mlx_folder, read_mlx
from server.cli.convert.ollama import Wishes, adapter_path, read_modelfile, read_wishes, settle_template
from server.cli.folders import NotPublished
from server.errors import InvalidRequest
from server.settings import Settings

if TYPE_CHECKING:
    from server.cli.adapter_checker import AdapterChecker

Format = Literal["peft", "mlx", "gguf", "modelfile"]
_OLD_GGML = (b"algg", b"ggla")


@dataclass(frozen=True)
class PEFTAdapter:
    """A plain LoRA folder of PEFT, which a Modelfile names; it is copied."""

    folder: Path
    kind: str = "PEFT's LoRA"


@dataclass(frozen=True)
class ConversionSource:
    """An adapter that can be converted, and what a Modelfile asks for beside it."""

    adapter: MLXAdapter | GGUFAdapter | PEFTAdapter
    wishes: Wishes | None = None


@dataclass(frozen=True)
class Converted:
    """The result of a conversion; ``notes`` are lines to print."""

    num_modules: int
    num_bytes: int
    rank: int
    notes: tuple[str, ...]


def find_source(path: Path) -> Path:
    """The one Modelfile or .gguf of a folder that holds no other adapter; else the path itself."""
    if not path.is_dir() or is_mlx_folder(path) or (path / WEIGHTS_FILE).exists():
        return path
    modelfiles, ggufs = [path / "Modelfile"], sorted(path.glob("*.gguf"))
    return next((found[0] for found in (modelfiles, ggufs) if len(found) == 1 and found[0].is_file()), path)


def format_of(path: Path) -> Format:
    """Which format a path is in, by what is there; a folder that is nothing else is PEFT's."""
    if is_mlx_folder(path):
        return "mlx"
    if path.is_dir() or not path.exists():
        return "peft"
    return "gguf" if is_gguf(path) or path.suffix == ".gguf" else "modelfile"


def default_name(path: Path, kind: Format) -> str:
    """The new adapter's name without ``--name``."""
    whole = path.resolve()
    return {"mlx": whole.name, "gguf": whole.name.removesuffix(".gguf"), "modelfile": whole.parent.name}.get(
        kind, f"{whole.name}-lora"
    )


def read_source(path: Path, kind: Format, *, max_bytes: int, chat_template: str | None) -> ConversionSource:
    """Read and check all that can be without the base. Raises ``NotPublished``."""
    if kind != "modelfile":
        return ConversionSource(_read_adapter(path, max_bytes))
    _refuse_old_ggml(path)
    modelfile = read_modelfile(path)
    wishes = read_wishes(modelfile, chat_template=chat_template)
    return ConversionSource(_read_adapter(adapter_path(modelfile, path), max_bytes), wishes)


def publish_converted(source: ConversionSource, target: Path, settings: Settings) -> Converted:
    """Convert for the base of the settings, check as the server would, and publish. Raises ``NotPublished``."""
    find_base(settings.base_model)
    print(f"reading the base {settings.base_model}, against which it is checked", file=sys.stderr, flush=True)
    from server.cli.adapter_checker import AdapterChecker  # imports torch, which takes seconds

    with closing(AdapterChecker.load(settings, dtype=settings.dtype)) as checker, published_folder(target) as folder:
        print(f"converting {source.adapter.kind}", file=sys.stderr, flush=True)
        return fill_folder(source, folder, checker, name=target.name, base_model=base_name(settings.base_model))


def fill_folder(
    source: ConversionSource, folder: Path, checker: AdapterChecker, *, name: str, base_model: str
) -> Converted:
    """Write the whole adapter into an empty folder and check it as the server does. Raises ``NotPublished``."""
    base = checker.base.signature
    notes = _write_adapter(source.adapter, folder, checker, base_model)
    if source.wishes is not None:
        notes += (f"FROM {source.wishes.base}: here the base is {base.name}",)
        notes += _write_wishes(source.wishes, folder, checker)
        notes += tuple(f"not carried over: {line}" for line in source.wishes.lost)
    found, weights = checker.check(folder, name=name)
    if weights is None or found.plan is None:
        raise NotPublished(
            f"converted, it would not be served on the base {base.name}: {'; '.join(found.problems[:3])} "
            "(--base-model names the base that it was trained on)"
        )
    return Converted(len(found.plan.parts), (folder / WEIGHTS_FILE).stat().st_size, found.plan.rank, notes)


def _write_adapter(
    adapter: MLXAdapter | GGUFAdapter | PEFTAdapter, folder: Path, checker: AdapterChecker, base_model: str
) -> tuple[str, ...]:
    """Write PEFT's files and their companions; returns lines to print."""
    from server.cli.convert.lora_folder import write_lora_folder

    base = checker.base.signature
    match adapter:
        case PEFTAdapter():
            copy_files(adapter.folder, folder, CONFIG_FILE, WEIGHTS_FILE, *COMPANION_FILES, SOURCE_FILE)
            return ()
        case MLXAdapter():
            tensors = adapter.convert(base)
            copy_files(adapter.folder, folder, *COMPANION_FILES, SOURCE_FILE)
        case GGUFAdapter():
            tensors = adapter.convert(base, checker.base.model.config.get_text_config())
    try:
        write_lora_folder(folder, tensors, base_model=base_model)
    except ValueError as error:
        raise NotPublished(f"it cannot be written as PEFT's LoRA: {error}") from None
    return tensors.notes


def _write_wishes(wishes: Wishes, folder: Path, checker: AdapterChecker) -> tuple[str, ...]:
    """Write the sidecar and the licences; returns lines to print."""
    path, notes = folder / SIDECAR_FILE, wishes.notes
    try:
        present: Any = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise NotPublished(f"{SIDECAR_FILE} beside the Modelfile's ADAPTER is not valid JSON: {error}") from None
    sidecar = wishes.sidecar_for(checker.base.signature, present if isinstance(present, dict) else {})
    if wishes.template is not None:
        template, note = settle_template(wishes.template, checker.prompts, begin=_begin(checker))
        notes += (note,)
        sidecar |= {} if template is None else {"chat_template": template}
    try:
        parse_sidecar(sidecar)
    except ValueError as error:
        raise NotPublished(f"the Modelfile cannot be written as a sidecar: {error}") from None
    path.write_text(json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    wishes.write_into(folder)
    return notes


def _begin(checker: AdapterChecker) -> str:
    """The text of the token that begins every prompt, by the base's tokenizer or its chat template; "" for none."""
    bos = checker.base.tokenizer.bos_token_id
    starts = [checker.prompts.completion("x")[:1]]
    with contextlib.suppress(InvalidRequest):
        starts.append(checker.prompts.chat([{"role": "user", "content": "x"}])[:1])
    return str(checker.base.tokenizer.bos_token) if bos is not None and [bos] in starts else ""


def _read_adapter(path: Path, max_bytes: int) -> MLXAdapter | GGUFAdapter | PEFTAdapter:
    if is_mlx_folder(path):
        return read_mlx(path, max_bytes=max_bytes)
    if path.is_dir():
        return _read_peft(path)
    _refuse_old_ggml(path)
    return read_gguf_adapter(path, max_bytes=max_bytes)


def _read_peft(folder: Path) -> PEFTAdapter:
    """A folder that needs no conversion. Raises ``NotPublished``."""
    path = folder / CONFIG_FILE
    if not path.is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise NotPublished(
            f"{folder} holds neither PEFT's {CONFIG_FILE} and {WEIGHTS_FILE} nor mlx-lm's files: name the adapter's "
            "folder or its .gguf file"
        )
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
        parse_peft_config(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise NotPublished(f"{path} is of no adapter that can be copied: {error}") from None
    return PEFTAdapter(folder)


def copy_files(source: Path, folder: Path, *names: str) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _refuse_old_ggml(path: Path) -> None:
    if not path.is_file():
        return
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic in _OLD_GGML:
        raise NotPublished(
            f"{path} is an adapter of llama.cpp before GGUF ({magic.decode()}), which is not read: make it again from "
            "PEFT's folder"
        )
