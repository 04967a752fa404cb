"""Makes transformers' config, tokenizer and model of a base, for server and trainer.

The only module of this package that imports torch and transformers. No remote code and no pickled weights are read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from base_files.errors import BaseUnloadable
from base_files.gguf_base import GGUFBase
from base_files.source import BaseSource


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
    except (OSError, ValueError, KeyError) as error:
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


def stock_model(source: BaseSource, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """The model in evaluation mode, without gradients, on the CPU; dtype "auto" keeps that of the files.

    Raises ``BaseUnloadable``.
    """
    model = _from_folder(source.name, source.path, dtype)
    model.eval().requires_grad_(False)
    return model


def _from_folder(name: str, folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """In the dtype of the files, the weights stay memory-mapped."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    load: Any = AutoModelForCausalLM.from_pretrained
    with _unloadable(name):
        loaded: tuple[PreTrainedModel, dict[str, Any]] = load(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]) or [str(key) for key in info["mismatched_keys"]]:
        raise BaseUnloadable(name, f"its files lack weights that the architecture has: {', '.join(missing[:3])}")
    return model


@contextmanager
def _unloadable(name: str) -> Iterator[None]:
    """Turns errors of transformers into ``BaseUnloadable``."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise BaseUnloadable(name, f"transformers cannot load it: {str(error)[:300]}") from error
