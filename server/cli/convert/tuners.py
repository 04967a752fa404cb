"""Converts PEFT's other tuners to LoRA and measures the difference, with PEFT on the stock base in float32."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapter_format.files import COMPANION_FILES, CONFIG_FILE, SOURCE_FILE, WEIGHTS_FILE
from base_files.errors import BaseFilesError
from base_files.source import BaseSource
from base_files.stock_model import stock_model
from cpu_kernels.cores import default_threads
from server.adapters.content.peft_config import parse_peft_config
from server.cli.convert.source import copy_files
from server.cli.folders import NotPublished

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Conversion:
    """The result. ``error`` is a share of the largest logit, ``lost`` of the largest change by the adapter."""

    ranks: tuple[int, ...]
    num_bytes: int
    error: float
    lost: float


def convert(
    source: Path,
    folder: Path,
    base_source: BaseSource,
    *,
    config: Mapping[str, Any],
    merging: bool,
    rank: float,
    threads: int | None,
) -> Conversion:
    """Fill ``folder`` with the adapter in ``source``, whose config is given, as LoRA, and measure what is in it.

    An integer ``rank`` is meant so, a fraction is the energy to keep; with ``merging`` a gain is what merging adds.
    Raises ``NotPublished``.
    """
    torch.set_num_threads(threads or default_threads())
    base = stock_model(base_source)
    vocabulary = base.config.get_text_config().vocab_size
    prompts = torch.randint(vocabulary, (4, 32), generator=torch.Generator().manual_seed(0))
    plain = _logits(base, prompts)
    with _peft_sentences("read the adapter on this base"):
        _check_fields(config)
        model = _load_adapter(base, source)
        wanted = _logits(model, prompts)
    with _peft_sentences("write it as LoRA"):
        if merging:
            _tell_gains_by_merging(model, stock_model(base_source))
        tensors = _to_lora(model, folder, rank=rank)
        del base, model  # before the base is loaded once more
    copy_files(source, folder, *COMPANION_FILES, SOURCE_FILE)
    with _peft_sentences("read the converted adapter"):
        got = _logits(_load_adapter(stock_model(base_source), folder), prompts)
    off, effect = float((got - wanted).abs().max()), float((wanted - plain).abs().max())
    if effect == 0:
        raise NotPublished("the adapter changes nothing on this base: is it the base it was trained on?")
    return Conversion(
        ranks=tuple(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")),
        num_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        error=off / float(wanted.abs().max()),
        lost=off / effect,
    )


def _load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter on the base, whose linears it takes over; every tensor of its file must find its place."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, str(folder))
    if strange := model.load_adapter(str(folder), "default").unexpected_keys:
        raise ValueError(f"the base has no place for {', '.join(strange[:3])}: was it trained on another base?")
    return model.eval()


def _check_fields(config: Mapping[str, Any]) -> None:
    """PEFT drops fields that it does not know, whatever they mean."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]].__dataclass_fields__
    if unknown := [name for name, value in config.items() if value and name not in known]:
        raise ValueError(f"this release of it knows no {', '.join(unknown)[:200]}")


@torch.inference_mode()
def _logits(model: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    """Logits of every position, [prompts, tokens, vocabulary]."""
    logits: torch.Tensor = model(input_ids=prompts, use_cache=False).logits
    return logits.float()


@torch.no_grad()
def _tell_gains_by_merging(model: PeftModel, base: PreTrainedModel) -> None:
    """Merge every linear, and let it give PEFT the difference to the untouched base for its gain."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.get_base_model().named_modules()):
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            layer.merge()
            gain = partial(_gain, layer.get_base_layer(), base.get_submodule(name))
            layer.__dict__.update(get_delta_weight=gain, supports_lora_conversion=lambda adapter: True)


def _gain(merged: nn.Module, untouched: nn.Module, adapter: str) -> torch.Tensor:
    return merged.get_parameter("weight") - untouched.get_parameter("weight")


def _to_lora(model: PeftModel, folder: Path, *, rank: float) -> Mapping[str, torch.Tensor]:
    from peft.tuners.lora.conversion import convert_to_lora

    config, tensors = convert_to_lora(model, rank=rank, progressbar=sys.stderr.isatty())
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    config.target_modules = sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors})
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    save_file(dict(tensors), folder / WEIGHTS_FILE)
    config.save_pretrained(str(folder))
    parse_peft_config(json.loads((folder / CONFIG_FILE).read_bytes()))
    return tensors


@contextmanager
def _peft_sentences(what: str) -> Iterator[None]:
    """Hide PEFT's warnings except that of missing tensors; turn its errors into ``NotPublished``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            yield
        except (NotPublished, BaseFilesError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise NotPublished(f"PEFT cannot {what} ({type(error).__name__}): {reason}") from error
