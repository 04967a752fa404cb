"""Adapters as other tools write them, made from PEFT's: mlx-lm's files, and llama.cpp's GGUF by its own writer."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig, PreTrainedModel

from server.adapters.content.signature import BaseSignature, ModuleShape, embedding, linear
from tests.model.families import FAMILIES, build, build_from

FAMILIES_OF = {
    "llama": ("llama", "mistral"), "qwen2": ("qwen2",), "qwen3": ("qwen3",), "gemma": ("gemma",), "gemma2": ("gemma2",),
    "gemma3": ("gemma3",), "phi3": ("phi3",), "smollm3": ("smollm3",),
}  # fmt: skip
"""Families of tests/model/families.py by llama.cpp's name for them, and gemma."""

PROVED = [(architecture, family) for architecture, families in FAMILIES_OF.items() for family in families]
_PEFT_NAME = re.compile(r"base_model\.model\.(.+?)\.(lora|lora_embedding|lora_magnitude_vector)(_A|_B|)(?:\.weight)?")


@cache
def base(family: str) -> PreTrainedModel:
    """A small random base, of which k has fewer heads than q."""
    if family != "gemma":
        return build(family)
    like = FAMILIES["llama"].to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return build_from(GemmaConfig(**{name: like[name] for name in names}, num_key_value_heads=2, head_dim=16))


def signature_of(model: PreTrainedModel) -> BaseSignature:
    """What the server would know of a base, of its linears, embeddings and norms."""
    modules: dict[str, ModuleShape] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear):
            modules[name] = linear(module.in_features, module.out_features)
        elif isinstance(module, torch.nn.Embedding):
            modules[name] = embedding(module.num_embeddings, module.embedding_dim)
        elif weight is not None:
            modules[name] = ModuleShape("rows", {"weight": tuple(weight.shape)})
    tied = {"lm_head": "model.embed_tokens"} if model.config.tie_word_embeddings else {}
    return BaseSignature("base", f"sha256:{'a' * 64}", modules, tied=tied)


def make_peft(base: PreTrainedModel, folder: Path, **fields: Any) -> Path:
    """A LoRA adapter with random tensors, as PEFT saves it; ``base`` is left alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        config = LoraConfig(
            task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **fields}
        )
        model = get_peft_model(copy.deepcopy(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def logits_of(base: PreTrainedModel, adapter: Path | None = None) -> torch.Tensor:
    """Logits of the stock base, or of PEFT's model of it, [2, 24, vocabulary]."""
    vocabulary = base.config.get_text_config().vocab_size
    prompts = torch.randint(3, vocabulary, (2, 24), generator=torch.Generator().manual_seed(7))
    model: Any = base
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(copy.deepcopy(base), str(adapter)).eval()
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=prompts, use_cache=False).logits
    return result


def deltas_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """PEFT's A, B and magnitude ("" for it) by module; those of an embedding are "eA" and "eB"."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = _PEFT_NAME.fullmatch(name)
        assert match is not None, name
        part = match[3].removeprefix("_")
        found.setdefault(match[1], {})[f"e{part}" if match[2] == "lora_embedding" else part] = tensor
    return found


def write_mlx(folder: Path, source: Path, **fields: Any) -> Path:
    """The adapter in a PEFT folder as mlx-lm saves it."""
    config = json.loads((source / "adapter_config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for module, parts in deltas_of(source).items():
        a, b = (parts["eA"], parts["eB"]) if "eA" in parts else (parts["A"], parts["B"])
        tensors |= {f"{module}.lora_a": a.T.contiguous(), f"{module}.lora_b": b.T.contiguous()}
        if "" in parts:
            tensors[f"{module}.m"] = parts[""]
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    said = {
        "fine_tune_type": "dora" if config["use_dora"] else "lora",
        "model": "some/base",
        "num_layers": 16,
        "lora_parameters": {"rank": config["r"], "scale": config["lora_alpha"] / config["r"], "dropout": 0.0},
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=4))
    return folder


def permuted(b: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows as llama.cpp's ``LlamaModel.permute`` puts them."""
    return b.reshape(num_heads, 2, b.shape[0] // num_heads // 2, *b.shape[1:]).swapaxes(1, 2).reshape(b.shape)


def gguf_arrays(source: Path, model: PreTrainedModel, architecture: str) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT folder under the names, and in the order, that llama.cpp's converter gives them."""
    config = model.config.get_text_config()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found: dict[str, torch.Tensor] = {}
    for module, parts in deltas_of(source).items():
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        assert name is not None, module
        a, b = (parts["eA"].T, parts["eB"]) if "eA" in parts else (parts["A"], parts["B"])
        leaf = module.rpartition(".")[2]
        if architecture in ("llama", "smollm3") and leaf in heads:
            b = permuted(b, heads[leaf])
        found |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    return found


def write_gguf(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    architecture: str = "llama",
    alpha: float | None = 6.0,
    quantization: str = "F32",
    general_type: str | None = "adapter",
    adapter_type: str | None = "lora",
    more: Mapping[str, Any] | None = None,
    max_tensors: int = 0,
) -> Path:
    """A GGUF file by gguf's own writer, with what ``convert_lora_to_gguf.py`` says in it.

    With ``max_tensors`` it is split, and the parts are beside ``path``.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=max_tensors)
    if general_type is not None:
        writer.add_type(general_type)
    if adapter_type is not None:
        writer.add_string(gguf.Keys.Adapter.TYPE, adapter_type)
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, value in (more or {}).items():
        add: Any = {list: writer.add_array, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(key, value)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor.numpy(), dtype=np.float32)
        fits = array.shape[-1] % gguf.constants.GGML_QUANT_SIZES[kind][0] == 0
        used = kind if fits else gguf.GGMLQuantizationType.F16  # as llama.cpp's converter falls back
        writer.add_tensor(name, gguf.quants.quantize(array, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
