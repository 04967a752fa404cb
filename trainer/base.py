"""The frozen base in memory, with the fingerprints that tie an adapter to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from base_files.errors import BaseFilesError
from base_files.locate import find_base
from base_files.memory import available_bytes
from base_files.names import base_name
from base_files.source import Fingerprints
from base_files.stock_model import check_memory, stock_model, stock_tokenizer
from base_files.weights_sample import WeightsSample, sample_of
from trainer.errors import BaseModelError

_WAYS_OUT = "It is trained on in float32: choose a smaller base, or use a machine with more memory."


@dataclass(frozen=True)
class TrainingBase:
    """A base in memory. ``name`` never holds a path: it goes into published files."""

    name: str
    fingerprints: Fingerprints
    sample: WeightsSample | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(base_model: str) -> TrainingBase:
    """The base in float32 with its tokenizer. Remote code and pickled weights are never read.

    Raises ``BaseModelError``.
    """
    try:
        source = find_base(base_model)
        fingerprints, sample = source.fingerprints(), sample_of(source)
        check_memory(source, torch.float32, available=available_bytes(), ways_out=_WAYS_OUT)
        tokenizer, model = stock_tokenizer(source), stock_model(source)
    except BaseFilesError as error:
        raise BaseModelError(str(error)) from error
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise BaseModelError(
            f"base_model {base_model!r}: its tokenizer needs a chat template, an end-of-turn token and the fast form; "
            "use an instruction-tuned base"
        )
    name = base_name(base_model)
    model.name_or_path = name  # PEFT writes it into adapter_config.json, which should hold no path of this machine
    return TrainingBase(name, fingerprints, sample, model, tokenizer)
