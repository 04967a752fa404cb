"""Makes transformers' config, tokenizer and model of a base, for server and trainer.

This module and ``deferred_weights`` are the only ones of this package that import torch or transformers. No remote code
and no pickled weights are read.

transformers itself reads the safetensors of a folder. Of other formats the model is made without memory and filled from
``BaseSource.tensors``: a weight of three dimensions, such as those of experts, is read by its outermost dimension, one
expert at a time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from base_files.deferred_weights import DeferredWeights, read_into
from base_files.errors import BaseMalformed, BaseTooLarge, BaseUnloadable
from base_files.gguf.base import GGUFBase
from base_files.load_progress import LoadProgress
from base_files.source import BaseSource, FolderBase
from base_files.tensors import SafetensorsTensor, StoredTensor


def is_mapped(source: BaseSource) -> bool:
    """Whether transformers itself reads the files, which are then mapped into memory.

    It reads safetensors, but not where experts are joined or dequantized that ``BaseSource.tensors`` gives one by one,
    unless the model has other names or buffers in the files: it knows those of every architecture.
    """
    if not isinstance(source, FolderBase):
        return False
    tensors = source.tensors()
    if all(isinstance(tensor, SafetensorsTensor) for tensor in tensors.values()):
        return True
    model = model_without_weights(source, torch.float32)
    with_aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return not dict(model.named_parameters()).keys() <= tensors.keys() <= with_aliases


def stock_config(source: BaseSource) -> PretrainedConfig:
    """Raises a ``BaseFilesError``."""
    if isinstance(source, GGUFBase):
        with _unloadable(source.name):
            made: PretrainedConfig = AutoConfig.for_model(**source.config)
            return made
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise BaseUnloadable(source.name, f"its config.json cannot be read: {str(error)[:300]}") from error
    return config


def stock_tokenizer(source: BaseSource) -> PreTrainedTokenizerBase:
    """Raises a ``BaseFilesError``."""
    if isinstance(source, GGUFBase):
        return _tokenizer_of_gguf(source)
    with _unloadable(source.name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def _tokenizer_of_gguf(source: GGUFBase) -> PreTrainedTokenizerBase:
    found = source.tokenizer
    with _unloadable(source.name):
        return PreTrainedTokenizerFast(
            tokenizer_object=found.build(),
            chat_template=found.chat_template,
            model_max_length=source.config["max_position_embeddings"],
            clean_up_tokenization_spaces=False,
            **found.special_tokens(),
        )


def stock_model(source: BaseSource, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in evaluation mode, without gradients, on the CPU. Raises a ``BaseFilesError``."""
    if is_mapped(source):
        return mapped_model(source, dtype)
    model = model_without_weights(source, dtype)
    tensors = _tensors_for(source.name, model, source.tensors())
    with _malformed(source.name), _progress(source.name, model) as progress:
        for parameter, owners in _owners(model).items():
            tensor = tensors[owners[0].parameter]
            weight = torch.empty(tensor.shape, dtype=parameter.dtype)
            read_into(weight, tensor, progress)
            _set_parameter(owners, weight)
    return _frozen(model)


def check_memory(
    source: BaseSource,
    dtype: torch.dtype,
    *,
    available: int | None,
    ways_out: str,
    num_bytes: Callable[[PreTrainedModel], int] | None = None,
) -> None:
    """Raises ``BaseTooLarge`` where the weights alone take more than ``available`` bytes; None means unknown.

    ``num_bytes`` counts those of a model without weights, if not all are in ``dtype``. Keys, values and activations
    come on top: a base that barely fits is not refused.
    """
    numbers = sum(math.prod(tensor.shape) for tensor in source.tensors().values())
    if available is None or numbers * dtype.itemsize <= available:
        return
    model = model_without_weights(source, dtype)
    needed = num_bytes(model) if num_bytes else sum(parameter.nbytes for parameter in model.parameters())
    if needed > available:
        raise BaseTooLarge(source.name, needed=needed, available=available, ways_out=ways_out)


def mapped_model(source: BaseSource, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model of a folder of safetensors. With "auto" it has the files' dtype, and its weights are mapped."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    load: Any = AutoModelForCausalLM.from_pretrained
    with _unloadable(source.name):
        loaded: tuple[PreTrainedModel, dict[str, Any]] = load(
            source.path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]) or [str(key) for key in info["mismatched_keys"]]:
        raise _lacks(source.name, missing)
    return _frozen(model)


def deferred_model(source: BaseSource) -> tuple[PreTrainedModel, DeferredWeights]:
    """The model in float32; weights of linears, embeddings and experts are read when they are asked for."""
    model = model_without_weights(source, torch.float32)
    tensors = _tensors_for(source.name, model, source.tensors())
    with _malformed(source.name), _progress(source.name, model) as progress:
        weights = DeferredWeights(source.name, progress)
        for owners in _owners(model).values():
            tensor = tensors[owners[0].parameter]
            if _is_read_by_module(owners[0].module, tensor):
                is_embedding = any(isinstance(owner.module, nn.Embedding) for owner in owners)
                _set_parameter(owners, weights.place(tensor, by_row=is_embedding))
            else:
                weight = torch.empty(tensor.shape)
                read_into(weight, tensor, progress)
                _set_parameter(owners, weight)
    return _frozen(model), weights


def _progress(name: str, model: PreTrainedModel) -> LoadProgress:
    return LoadProgress(f"reading {name}", sum(parameter.numel() for parameter in model.parameters()))


def model_without_weights(source: BaseSource, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on the ``meta`` device, which take no memory, and with its buffers computed."""
    config = stock_config(source)
    with _unloadable(source.name):
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for module in model.modules():
            for name in module._non_persistent_buffers_set:
                buffer = module._buffers[name]
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
        model.initialize_weights()  # computes buffers; a parameter on the meta device stays there
        model.tie_weights()
        model.generation_config = _generation_config(source) or model.generation_config
    return model


def _generation_config(source: BaseSource) -> GenerationConfig | None:
    """The tokens that end an answer and the sampling parameters; None where the base has none of its own."""
    if isinstance(source, GGUFBase):
        return GenerationConfig(**source.generation_config)
    if (source.path / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(source.path, local_files_only=True)
    return None


def _tensors_for(name: str, model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The tensor of each parameter, tied ones once. Raises ``BaseUnloadable`` where files and model do not agree."""
    parameters = dict(model.named_parameters())
    aliases = {alias for alias, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    if missing := sorted(parameters.keys() - tensors.keys()):
        raise _lacks(name, missing)
    if unused := sorted(tensors.keys() - parameters.keys() - aliases):
        raise BaseUnloadable(
            name,
            f"its files have tensors that {model.config.model_type} has no place for: {', '.join(unused[:3])}. Each "
            "may mean another computation",
        )
    for key, parameter in parameters.items():
        if tuple(parameter.shape) != tuple(tensors[key].shape):
            raise BaseUnloadable(
                name, f"tensor {key} has the shape {list(tensors[key].shape)}, its config asks for {[*parameter.shape]}"
            )
    return {key: tensors[key] for key in parameters}


@dataclass(frozen=True)
class _Owner:
    """A module that has a parameter as ``key``; ``parameter`` is the whole name."""

    module: nn.Module
    key: str
    parameter: str


def _owners(model: PreTrainedModel) -> Mapping[nn.Parameter, list[_Owner]]:
    """The modules of each parameter, several of a tied one."""
    owners: dict[nn.Parameter, list[_Owner]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append(_Owner(module, key, f"{name}.{key}".removeprefix(".")))
    return owners


def _is_read_by_module(module: nn.Module, tensor: StoredTensor) -> bool:
    """Whether only the module itself reads this weight, when it is called."""
    if len(tensor.shape) == 3:
        return not isinstance(module, nn.Conv1d)
    return len(tensor.shape) == 2 and isinstance(module, nn.Linear | nn.Embedding)


def _set_parameter(owners: Sequence[_Owner], weight: torch.Tensor) -> None:
    parameter = nn.Parameter(weight, requires_grad=False)
    for owner in owners:
        owner.module._parameters[owner.key] = parameter


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.eval().requires_grad_(False)
    return model


def _lacks(name: str, missing: list[str]) -> BaseUnloadable:
    return BaseUnloadable(name, f"its files lack weights that the architecture has: {', '.join(missing[:3])}")


@contextmanager
def _malformed(name: str) -> Iterator[None]:
    """Turns what a reader of tensors says into ``BaseMalformed``."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise BaseMalformed(name, str(error)) from error


@contextmanager
def _unloadable(name: str) -> Iterator[None]:
    """Turns errors of transformers into ``BaseUnloadable``."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise BaseUnloadable(name, f"transformers cannot load it: {str(error)[:300]}") from error
