"""The frozen base in memory, with the fingerprints that tie an adapter to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.base_files import find_base
from trainer.errors import BaseModelError
from trainer.fingerprint import base_fingerprint, base_fingerprint_v2


@dataclass(frozen=True)
class Base:
    """A base in memory. ``name`` never holds a path: it goes into published files."""

    name: str
    folder: Path
    fingerprint: str
    fingerprint_v2: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(base_model: str) -> Base:
    """The base in float32 with its tokenizer. Remote code and pickled weights are never read."""
    name, folder = find_base(base_model)
    fingerprint, fingerprint_v2 = base_fingerprint(folder), base_fingerprint_v2(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, ImportError) as error:
        raise BaseModelError(f"base_model {base_model!r}: transformers cannot load {folder}: {error}") from error
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise BaseModelError(
            f"base_model {base_model!r}: its tokenizer needs a chat template, an end-of-turn token and the fast form; "
            "use an instruction-tuned base"
        )
    model.requires_grad_(False)
    model.name_or_path = name  # PEFT writes it into adapter_config.json, where a path of this machine helps nobody
    return Base(name, folder, fingerprint, fingerprint_v2, model, tokenizer)
