"""LoRA adapters in GGUF, as llama.cpp's ``convert_lora_to_gguf.py`` writes them, turned back into PEFT's.

llama.cpp computes ``alpha / rank * B @ A``, and ``B @ A`` where alpha is 0 or missing (llama-adapter.h). Some
architectures have the rows of q and k in another order, so that the two halves of a rotation stand side by side; that
is undone by the base's numbers of heads. An embedding's A is stored transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from base_files.gguf.architectures import ARCHITECTURES, TOP_LEVEL, Architecture
from base_files.gguf.file import GGUFFile, is_gguf, read_gguf
from server.adapters.content.file_kinds import kind_of_bytes
from server.adapters.content.tensor_names import ModuleNames
from server.cli.folders import NotPublished
from server.errors import first

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from server.adapters.content.signature import BaseSignature
    from server.cli.convert.lora_folder import Delta, LoRATensors

CONVERTED = {name: architecture for name, architecture in ARCHITECTURES.items() if name not in ("qwen3moe", "gpt-oss")}
"""Those whose adapters are converted: most of what others have to train is in their experts."""

_NAME = re.compile(r"(?:blk\.(\d+)\.)?([a-z0-9_]+)\.weight(?:\.lora_([ab]))?")
_READ = {"adapter.type", "adapter.lora.alpha", "adapter.lora.task_name"}


@dataclass(frozen=True)
class GGUFAdapter:
    """An adapter's file whose header is in order."""

    file: GGUFFile
    architecture: str
    alpha: float
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "a GGUF LoRA"

    def convert(self, base: BaseSignature, config: Any) -> LoRATensors:
        """PEFT's tensors of it, for this base and transformers' config of its text model. Raises ``NotPublished``."""
        from server.cli.convert.lora_folder import LoRATensors

        found = _known(self.architecture)
        if config.model_type not in found.model_types:
            raise NotPublished(
                f"it was made for llama.cpp's architecture {self.architecture} ({' or '.join(found.model_types)}), and "
                f"the base {base.name} is {config.model_type}: name the base it was trained on by --base-model"
            )
        self._check_heads(config)
        pairs, norms = self._sorted(found)
        if not pairs:
            raise NotPublished("it holds no lora_a and lora_b")
        names = ModuleNames(base.modules)
        deltas = {names.find(name) or name: self._delta(name, pair, found, config) for name, pair in pairs.items()}
        shift = np.float32(1.0 if found.norm_shift else 0.0)
        weights = {names.find(name) or name: _torch(self._read(tensor) - shift) for name, tensor in norms.items()}
        notes = self.notes
        if weights:
            notes += (f"it brings {len(weights)} norms of its own, which llama.cpp passes over; here they are used",)
        return LoRATensors(deltas, weights, notes)

    def _check_heads(self, config: Any) -> None:
        """Ollama's converter writes the base's numbers of heads: another base has its rows in another order."""
        numbers = {"head_count": config.num_attention_heads, "head_count_kv": _num_key_value_heads(config)}
        for what, needed in numbers.items():
            key = f"{self.architecture}.attention.{what}"
            value = self.file.metadata.get(key, needed)
            if value != needed:
                raise NotPublished(f"{key} is {value!r:.40}, and the base's is {needed}")

    def _sorted(self, architecture: Architecture) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Tensors' names by module: A and B, and weights of norms."""
        pairs: dict[str, dict[str, str]] = {}
        norms: dict[str, str] = {}
        known: dict[str, str]
        for name in self.file.tensors:
            module, letter = _module_of(name, architecture)
            known = norms if letter is None else pairs.setdefault(module, {})
            key = letter or module
            if key in known:
                raise NotPublished(f"two tensors are the same one of {module}: {known[key]} and {name}")
            known[key] = name
        return pairs, norms

    def _delta(self, module: str, pair: Mapping[str, str], architecture: Architecture, config: Any) -> Delta:
        from server.cli.convert.lora_folder import Delta

        if missing := [f"lora_{letter}" for letter in "ab" if letter not in pair]:
            raise NotPublished(f"{next(iter(pair.values()))} has no {missing[0]} beside it: the adapter is damaged")
        a, b = self._read(pair["a"]), self._read(pair["b"])
        embedding = module == TOP_LEVEL["token_embd"]
        a = a.T if embedding and a.ndim == 2 else a
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise NotPublished(f"{pair['a']} {list(a.shape)} and lora_b {list(b.shape)} do not fit each other")
        if architecture.permuted and (heads := _heads(module, config)):
            b = _unpermuted(b, heads, pair["b"])
        rank = a.shape[0]
        return Delta(_torch(a), _torch(b), self.alpha or float(rank), embedding=embedding)

    def _read(self, name: str) -> NDArray[Any]:
        try:
            return self.file.read(name)
        except (ValueError, OSError) as error:
            raise NotPublished(f"{self.file.path} cannot be read: {error}") from None


def read_gguf_adapter(path: Path, *, max_bytes: int) -> GGUFAdapter:
    """Read and check the header, without torch. Raises ``NotPublished``."""
    try:
        file = read_gguf(path)
        size = sum(part.stat().st_size for part in file.paths)
    except ValueError as error:
        raise NotPublished(f"{path.parent}: {_kind_of(path) or f'{path.name}: {error}'}") from None
    except OSError as error:
        raise NotPublished(f"{path} cannot be read: {error.strerror}") from None
    if size > max_bytes:
        raise NotPublished(f"{path} has {size} bytes; the limit is {max_bytes} (setting max_adapter_bytes)")
    _check_kind(file)
    architecture = str(file.metadata.get("general.architecture"))
    _known(architecture)
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float | int) or isinstance(alpha, bool) or not 0 <= alpha < float("inf"):
        raise NotPublished(f"{path}: adapter.lora.alpha is {alpha!r:.40}: it must be a number of 0 or more")
    return GGUFAdapter(file, architecture, float(alpha))


def _kind_of(path: Path) -> str | None:
    """What a file is instead of a GGUF, where its first bytes tell."""
    if not path.is_file() or is_gguf(path):
        return None
    with open(path, "rb") as file:
        return kind_of_bytes(path.name, file.read(512))


def _check_kind(file: GGUFFile) -> None:
    """Raises ``NotPublished`` for whatever is no plain LoRA adapter."""
    metadata, path = file.metadata, file.path
    if metadata.get("general.architecture") == "controlvector":
        raise NotPublished(f"{path} is a control vector, which is added to hidden states: it is no LoRA adapter")
    if metadata.get("general.type") != "adapter":
        raise NotPublished(
            f"{path} is a GGUF of general.type {metadata.get('general.type', 'model')!r:.40}, no adapter: adapters are "
            "written by llama.cpp's convert_lora_to_gguf.py"
        )
    if metadata.get("adapter.type") != "lora":
        raise NotPublished(f"{path}: adapter.type is {metadata.get('adapter.type')!r:.40}: only lora is converted")
    if "adapter.alora.invocation_tokens" in metadata:
        raise NotPublished(
            f"{path} is an activated LoRA (adapter.alora.invocation_tokens): it would act only from its invocation "
            "tokens on; train it again without them"
        )
    if strange := [key for key in metadata if key.startswith("adapter.") and key not in _READ]:
        raise NotPublished(f"{path}: what {first(strange)} asks for is not known here")


def _known(architecture: str) -> Architecture:
    if architecture not in CONVERTED:
        raise NotPublished(
            f"general.architecture is {architecture!r:.40}, whose names and layouts are not known here; known are "
            f"{', '.join(CONVERTED)}"
        )
    return CONVERTED[architecture]


def _module_of(name: str, architecture: Architecture) -> tuple[str, str | None]:
    """The module that a tensor belongs to, in transformers' words, and "a", "b", or None for a norm's weight."""
    match = _NAME.fullmatch(name)
    block, what, letter = match.groups() if match else (None, "", None)
    if what.endswith("_exps") or what.endswith("_shexp"):
        raise NotPublished(f"it holds deltas of experts, which are not converted: {name}")
    module = (TOP_LEVEL if block is None else architecture.blocks).get(what)
    if module is None or (letter is None) != what.endswith("_norm"):
        raise NotPublished(f"it holds a tensor that has no place in the architecture: {name}")
    return (module if block is None else f"model.layers.{int(block)}.{module}"), letter


def _heads(module: str, config: Any) -> int:
    """Heads whose rows were put in another order; 0 where none were."""
    if module.endswith(".q_proj"):
        return int(config.num_attention_heads)
    if module.endswith(".k_proj"):
        return _num_key_value_heads(config)
    return 0


def _num_key_value_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _unpermuted(b: NDArray[Any], heads: int, name: str) -> NDArray[Any]:
    """B [out, rank] with each head's rows as transformers has them: first all first halves, then all second ones."""
    rows, rank = b.shape
    if rows % (2 * heads):
        raise NotPublished(f"{name} has {rows} rows, which the base's {heads} heads do not divide: is it its base?")
    return b.reshape(heads, rows // heads // 2, 2, rank).swapaxes(1, 2).reshape(rows, rank)


def _torch(array: NDArray[Any]) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array).copy())
