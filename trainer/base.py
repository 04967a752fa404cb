"""The frozen base in memory, with the fingerprints that tie an adapter to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from base_files.errors import BaseFilesError
from base_files.fingerprint import base_fingerprint, base_fingerprint_v2
from base_files.locate import EMBEDDED_BASE, find_base
from trainer.errors import BaseModelError


@dataclass(frozen=True)
class TrainingBase:
    """A base in memory. ``name`` never holds a path: it goes into published files."""

    name: str
    folder: Path
    fingerprint: str
    fingerprint_v2: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(base_model: str) -> TrainingBase:
    """The base in float32 with its tokenizer. Remote code and pickled weights are never read.

    Raises ``BaseModelError``.
    """
    try:
        folder = find_base(base_model)
    except BaseFilesError as error:
        raise BaseModelError(str(error)) from error
    try:
        fingerprint, fingerprint_v2 = base_fingerprint(folder), base_fingerprint_v2(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
        )
    except BaseFilesError as error:
        raise BaseModelError(str(error)) from error
    except (OSError, ValueError, ImportError) as error:
        raise BaseModelError(f"base_model {base_model!r}: transformers cannot load {folder}: {error}") from error
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise BaseModelError(
            f"base_model {base_model!r}: its tokenizer needs a chat template, an end-of-turn token and the fast form; "
            "use an instruction-tuned base"
        )
    model.requires_grad_(False)
    name = _name(base_model, folder)
    model.name_or_path = name  # PEFT writes it into adapter_config.json, which should hold no path of this machine
    return TrainingBase(name, folder, fingerprint, fingerprint_v2, model, tokenizer)


def _name(base_model: str, folder: Path) -> str:
    """``micro`` or a hub id as it is; a folder's name without its path."""
    is_path = base_model != EMBEDDED_BASE and Path(base_model).expanduser().is_dir()
    return folder.resolve().name if is_path else base_model
