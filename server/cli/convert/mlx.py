"""mlx-lm's adapters as PEFT's: ``adapters.safetensors`` and mlx-lm's own ``adapter_config.json``.

mlx-lm computes ``scale * (x @ lora_a) @ lora_b`` with lora_a [in, rank] and lora_b [rank, out], and DoRA's magnitude is
``m`` [out] (mlx_lm/tuner/lora.py and dora.py). An embedding has lora_a [tokens, rank] and lora_b [rank, dim], which act
on a tied head as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_format.files import CONFIG_FILE, WEIGHTS_FILE
from base_files.safetensors_header import FLOAT_DTYPES, TensorEntry, parse_header
from server.adapters.content.file_kinds import kind_of_bytes
from server.adapters.content.folder import MAX_JSON_BYTES
from server.adapters.content.signature import BaseSignature
from server.adapters.content.tensor_names import ModuleNames
from server.cli.folders import NotPublished
from server.errors import first

if TYPE_CHECKING:
    import torch

    from server.cli.convert.lora_folder import Delta, LoRATensors

MLX_WEIGHTS_FILE, OLD_WEIGHTS_FILE = "adapters.safetensors", "adapters.npz"
_LEAVES = ("lora_a", "lora_b", "m")


@dataclass(frozen=True)
class MLXAdapter:
    """An adapter whose config and header are in order; ``data`` is the whole weights file."""

    folder: Path
    scale: float
    dora: bool
    unused_alpha: float | None
    entries: Mapping[str, TensorEntry]
    data: bytes

    @property
    def kind(self) -> str:
        return "mlx-lm's DoRA" if self.dora else "mlx-lm's LoRA"

    def convert(self, base: BaseSignature) -> LoRATensors:
        """PEFT's tensors of it, for the modules of this base. Raises ``NotPublished``."""
        import safetensors.torch

        from server.cli.convert.lora_folder import LoRATensors

        tensors, names = safetensors.torch.load(self.data), ModuleNames(base.modules)
        deltas: dict[str, Delta] = {}
        for name in _modules_of(self.entries):
            module = names.find(name) or name
            if module in deltas:
                raise NotPublished(f"two modules of it are {module} of the base: {name} is one of them")
            parts = {leaf: tensors.get(f"{name}.{leaf}") for leaf in _LEAVES}
            shape = base.modules.get(module)
            if shape is not None and shape.kind == "embedding":
                deltas |= self._embedding(module, parts, base)
            else:
                deltas[module] = self._linear(module, parts)
        return LoRATensors(deltas, notes=self._notes())

    def _linear(self, module: str, parts: Mapping[str, torch.Tensor | None]) -> Delta:
        from server.cli.convert.lora_folder import Delta

        a, b = self._pair(module, parts)
        return Delta(a.T, b.T, self.scale * a.shape[1], magnitude=parts["m"])

    def _embedding(
        self, module: str, parts: Mapping[str, torch.Tensor | None], base: BaseSignature
    ) -> dict[str, Delta]:
        """The embedding's delta, and the same one on every head that shares its weight."""
        from server.cli.convert.lora_folder import Delta

        if parts["m"] is not None:
            raise NotPublished(
                f"{module} has DoRA's magnitude for each token, where PEFT has one for each dimension: it cannot be "
                "converted; train it again without the embedding among lora_parameters' keys"
            )
        a, b = self._pair(module, parts)
        alpha = self.scale * a.shape[1]
        heads = {head: Delta(b, a, alpha) for head, embedding in base.tied.items() if embedding == module}
        return {module: Delta(a.T, b.T, alpha, embedding=True), **heads}

    def _pair(self, module: str, parts: Mapping[str, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = parts["lora_a"], parts["lora_b"]
        if a is None or b is None:
            raise NotPublished(f"{module} has no {'lora_a' if a is None else 'lora_b'}: the adapter is damaged")
        if a.ndim == 3 or b.ndim == 3:
            raise NotPublished(
                f"{module} is a switch layer, with a delta for each expert, which is not converted: train it again "
                "with keys in lora_parameters that name no experts (self_attn.q_proj, self_attn.v_proj)"
            )
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise NotPublished(f"{module}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit each other")
        return a, b

    def _notes(self) -> tuple[str, ...]:
        if self.unused_alpha is None:
            return ()
        return (f"alpha {self.unused_alpha:g} in {CONFIG_FILE} is not used, as in mlx-lm: scale {self.scale:g} is",)


def is_mlx_folder(folder: Path) -> bool:
    """Whether a folder holds what mlx-lm saves, and not what PEFT does."""
    if not folder.is_dir() or (folder / WEIGHTS_FILE).exists():
        return False
    if any((folder / name).exists() for name in (MLX_WEIGHTS_FILE, OLD_WEIGHTS_FILE)):
        return True
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "fine_tune_type" in config


def read_mlx(folder: Path, *, max_bytes: int) -> MLXAdapter:
    """Read and check both files, without torch. Raises ``NotPublished``."""
    config = _read_config(folder)
    kind = _fine_tune_type(config)
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise NotPublished(f"{folder / CONFIG_FILE}: lora_parameters is {parameters!r:.80}: it must be an object")
    scale = _number(parameters.get("scale"))
    if scale is None:
        raise NotPublished(
            f"{folder / CONFIG_FILE}: lora_parameters.scale is {parameters.get('scale')!r:.40}: it must be a number; "
            "mlx-lm multiplies the delta by it and needs it too"
        )
    data = _read(folder / MLX_WEIGHTS_FILE, max_bytes)
    try:
        entries = parse_header(data)
    except ValueError as error:
        what = kind_of_bytes(MLX_WEIGHTS_FILE, data) or f"{MLX_WEIGHTS_FILE}: {error}"
        raise NotPublished(f"{folder}: {what}") from None
    _check_entries(entries, dora=kind == "dora")
    alpha = _number(parameters.get("alpha"))
    return MLXAdapter(folder, scale, kind == "dora", alpha, entries, data)


def _read_config(folder: Path) -> Mapping[str, Any]:
    if not (folder / MLX_WEIGHTS_FILE).is_file() and (folder / OLD_WEIGHTS_FILE).is_file():
        raise NotPublished(
            f"{folder / OLD_WEIGHTS_FILE} is of an early mlx-lm, which saved no scale with it: "
            f"train it again, or write {MLX_WEIGHTS_FILE} and {CONFIG_FILE} as a newer mlx-lm does"
        )
    path = folder / CONFIG_FILE
    try:
        config = json.loads(_read(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise NotPublished(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise NotPublished(f"{path} is not a JSON object")
    return config


def _fine_tune_type(config: Mapping[str, Any]) -> str:
    """Older configs say ``use_dora``, the oldest nothing: LoRA."""
    kind = config.get("fine_tune_type") or ("dora" if config.get("use_dora") else "lora")
    if kind == "full":
        raise NotPublished(
            "fine_tune_type is 'full': the file holds whole weights of layers, no adapter: fuse it into the base with "
            "mlx_lm.fuse and serve that as the base"
        )
    if kind not in ("lora", "dora"):
        raise NotPublished(f"fine_tune_type is {kind!r:.40}: lora and dora are converted")
    return str(kind)


def _check_entries(entries: Mapping[str, TensorEntry], *, dora: bool) -> None:
    """Raises ``NotPublished`` for tensors that are no part of such an adapter."""
    if strange := [name for name in entries if name.rpartition(".")[2] not in _LEAVES or "." not in name]:
        raise NotPublished(f"it holds tensors that are no lora_a, lora_b or m: {first(strange)}")
    if wrong := [f"{name} ({entry.dtype})" for name, entry in entries.items() if entry.dtype not in FLOAT_DTYPES]:
        raise NotPublished(f"its tensors must be floats, and some are not: {first(wrong)}")
    if not entries:
        raise NotPublished(f"{MLX_WEIGHTS_FILE} holds no tensors")
    modules = _modules_of(entries)
    odd = [module for module in modules if (f"{module}.m" in entries) != dora]
    if odd:
        there = "no" if dora else "a"
        raise NotPublished(
            f"{CONFIG_FILE} says {'dora' if dora else 'lora'}, and there is {there} magnitude (m) for {first(odd)}: "
            "the two files are not of one adapter"
        )


def _modules_of(entries: Mapping[str, TensorEntry]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in entries))


def _number(value: Any) -> float | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits else None


def _read(path: Path, limit: int) -> bytes:
    """A regular file's bytes. Raises ``NotPublished``."""
    try:
        if not path.is_file():
            raise NotPublished(f"{path} is missing: the folder must hold {MLX_WEIGHTS_FILE} and {CONFIG_FILE}")
        if (size := path.stat().st_size) > limit:
            raise NotPublished(f"{path} has {size} bytes; the limit is {limit}")
        return path.read_bytes()
    except OSError as error:
        raise NotPublished(f"{path} cannot be read: {error.strerror}") from None
