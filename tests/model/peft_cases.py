"""Every kind of LoRA adapter that PEFT writes and the server plays: how PEFT makes it, and on which families."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel

from tests.model.families import CONTEXT, FAMILIES, VOCAB_SIZE, _config, build_from

TOLERANCE = 1e-4
"""Largest difference of logits, as a share of PEFT's largest logit, in float32; measured: 3e-6."""


@dataclass(frozen=True)
class Names:
    """What a family calls its modules."""

    attention: tuple[str, ...] = ("q_proj", "v_proj")
    last: str = "self_attn.o_proj"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"


_GPT2 = Names(("c_attn",), "attn.c_proj", "wte", "ln_f")
_NAMES = {"gpt2": _GPT2, "gpt2_tied": _GPT2}


def _with(family: str, **fields: Any) -> PretrainedConfig:
    config = copy.deepcopy(FAMILIES[family])
    for name, value in fields.items():
        setattr(config, name, value)
    return config


CONFIGS: Mapping[str, PretrainedConfig] = {
    "llama": FAMILIES["llama"],
    "llama_tied": _with("llama", tie_word_embeddings=True),
    "qwen2": FAMILIES["qwen2"],
    "gpt2": FAMILIES["gpt2"],
    "gpt2_tied": _with("gpt2", tie_word_embeddings=True),
    "gemma3": _with("gemma3", tie_word_embeddings=True),
    "gpt_oss": FAMILIES["gpt_oss"],
    "qwen3_moe": _config(
        "Qwen3MoeConfig", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, moe_intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=CONTEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
MIXTURES = ("gpt_oss", "qwen3_moe")


@dataclass(frozen=True)
class Case:
    """A feature, PEFT's fields for it, and the families it is proved on.

    ``changed_base`` ends the names of the base's own parameters that training changed and PEFT saves; ``convert`` saves
    what began by changing the base as plain LoRA.
    """

    feature: str
    fields: Callable[[Names], dict[str, Any]]
    families: tuple[str, ...] = ("llama", "gpt2")
    changed_base: tuple[str, ...] = ()
    convert: bool = False


def _lora(names: Names) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "target_modules": list(names.attention)}


_EVERY = ("llama", "gpt2", "gemma3", "gpt_oss", "qwen3_moe")
_TIED = ("llama_tied", "gpt2_tied", "gemma3")
_EMBEDDINGS = ("llama", "llama_tied", "gpt2", "gpt2_tied", "gemma3")
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

CASES: Mapping[str, Case] = {
    "all_linear": Case("every linear", lambda _: {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, _EVERY),
    "regex": Case(
        "modules by an expression",
        lambda n: {"r": 4, "target_modules": rf".*\.(0|2)\..*({'|'.join(n.attention)})"}, ("llama", "gpt2"),
    ),
    "layers": Case(
        "some layers", lambda n: _lora(n) | {"layers_to_transform": [1], "exclude_modules": ["k_proj"]},
    ),
    "rslora": Case("rsLoRA", lambda n: _lora(n) | {"r": 3, "lora_alpha": 5, "use_rslora": True}),
    "patterns": Case(
        "ranks and alphas by expressions",
        lambda n: {
            "r": 4, "lora_alpha": 4, "target_modules": "all-linear",
            "rank_pattern": {rf".*\.[01]\.{n.last}": 7, n.last: 2}, "alpha_pattern": {"(q|c)_?.*": 12, n.last: 9.5},
        },
        _EVERY,
    ),
    "head": Case("the head", lambda n: _lora(n) | {"target_modules": [*n.attention, n.head]}, ("llama", *_TIED)),
    "lora_bias": Case("bias of B", lambda n: _lora(n) | {"lora_bias": True}, ("qwen2", "gpt2", "llama")),
    "bias_all": Case("every bias", lambda n: _lora(n) | {"bias": "all"}, ("qwen2", "gpt2", "gpt_oss")),
    "bias_lora_only": Case("biases of the modules", lambda n: _lora(n) | {"bias": "lora_only"}, ("qwen2", "gpt2")),
    "bias_both": Case(
        "bias of B and every bias", lambda n: _lora(n) | {"bias": "all", "lora_bias": True}, ("qwen2", "gpt2")
    ),
    "dora": Case("DoRA", lambda n: _lora(n) | {"use_dora": True, "target_modules": "all-linear"}, _EVERY[:-1]),
    "dora_bias": Case(
        "DoRA, rsLoRA and biases", lambda n: _lora(n) | {"use_dora": True, "use_rslora": True, "bias": "all"},
        ("qwen2", "gpt2"),
    ),
    "dora_embedding": Case(
        "DoRA on embeddings and head",
        lambda n: _lora(n) | {"use_dora": True, "target_modules": [n.embedding, n.head, *n.attention]}, _EMBEDDINGS,
    ),
    "embedding": Case(
        "embeddings", lambda n: _lora(n) | {"target_modules": [n.embedding, *n.attention]}, _EMBEDDINGS
    ),
    "embedding_tied": Case(
        "embeddings tied to the head",
        lambda n: _lora(n) | {"target_modules": [n.embedding, *n.attention], "ensure_weight_tying": True}, _TIED,
    ),
    "embedding_and_head": Case(
        "embeddings and head", lambda n: _lora(n) | {"target_modules": [n.embedding, n.head]}, _EMBEDDINGS
    ),
    "embedding_changed": Case(
        "the base's embeddings changed beside it",
        lambda n: _lora(n) | {"target_modules": [n.embedding, n.head]}, ("llama", "llama_tied", "gemma3"),
        changed_base=("embed_tokens.base_layer.weight",),
    ),
    "saved_head": Case("a head of its own", lambda n: _lora(n) | {"modules_to_save": [n.head]}, _EMBEDDINGS),
    "saved_embedding": Case(
        "embeddings of its own", lambda n: _lora(n) | {"modules_to_save": [n.embedding]}, _EMBEDDINGS
    ),
    "saved_both": Case(
        "both of its own", lambda n: _lora(n) | {"modules_to_save": [n.embedding, n.head]}, _EMBEDDINGS
    ),
    "saved_tied": Case(
        "both of its own, tied",
        lambda n: _lora(n) | {"modules_to_save": [n.embedding], "ensure_weight_tying": True}, _TIED,
    ),
    "saved_norm": Case("norms of its own", lambda n: _lora(n) | {"modules_to_save": [n.norm]}, _EVERY),
    "saved_linear": Case(
        "other modules of its own, and biases",
        lambda n: _lora(n) | {"modules_to_save": [n.last, n.norm], "bias": "all"}, ("llama", "gpt2", "qwen2"),
    ),
    "tokens": Case("rows for tokens", lambda n: _lora(n) | {"trainable_token_indices": [150, 3, 77]}, _EMBEDDINGS),
    "tokens_by_module": Case(
        "rows for tokens, by module",
        lambda n: _lora(n) | {"trainable_token_indices": {n.embedding: [5, 150, 9], n.head: [7, 8]}}, _EMBEDDINGS,
    ),
    "tokens_of_head": Case(
        "rows for tokens of the head", lambda n: _lora(n) | {"trainable_token_indices": {n.head: [199, 0, 8]}},
        ("llama", "llama_tied"),
    ),
    "experts": Case(
        "parameters of experts",
        lambda n: _lora(n) | {"target_parameters": _EXPERTS, "rank_pattern": {"experts.down_proj": 2}}, MIXTURES,
    ),
    "one_expert_parameter": Case(
        "one parameter of experts",
        lambda _: {"r": 2, "target_modules": [], "target_parameters": _EXPERTS[1:]}, MIXTURES,
    ),
    "router": Case(
        "parameters of routers and biases of experts",
        lambda n: _lora(n) | {"target_parameters": ["router.weight", "gate.weight", "experts.gate_up_proj_bias"]},
        MIXTURES,
    ),
    "linear_parameter": Case(
        "weights by target_parameters",
        lambda n: {"r": 3, "target_modules": [], "target_parameters": [f"{n.last}.weight", f"{n.embedding}.weight"]},
        ("llama", "gpt2", "gemma3"),
    ),
    "pissa": Case(
        "PiSSA, saved with path_initial_model_for_weight_conversion",
        lambda n: _lora(n) | {"init_lora_weights": "pissa"}, ("llama", "gpt2"), convert=True,
    ),
    "olora": Case(
        "OLoRA, saved so",
        lambda n: _lora(n) | {"init_lora_weights": "olora", "use_rslora": True}, ("llama",), convert=True,
    ),
    "mica": Case("MiCA", lambda n: _lora(n) | {"init_lora_weights": "mica"}, ("llama",)),
    "velora": Case("VeLoRA", lambda n: _lora(n) | {"velora_config": {"num_groups": 8}}, ("llama",)),
}  # fmt: skip


def base_of(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """The stock model of a family."""
    return build_from(CONFIGS[family], dtype=dtype)


def names_of(family: str) -> Names:
    """What it calls its modules."""
    return _NAMES.get(family, Names())


def make_adapter(base: PreTrainedModel, case: Case, family: str, folder: Path) -> PeftModel:
    """Have PEFT make an adapter with random tensors, save it, and load it again on the unchanged base."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        config = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=False, **case.fields(names_of(family)))
        model = get_peft_model(copy.deepcopy(base), config)
        assert isinstance(model, PeftModel)
        if case.convert:
            model.save_pretrained(str(folder / "init"))
        _shake(model, case.changed_base)
        start = str(folder / "init") if case.convert else None
        model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=start)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    return loaded.eval()


def _shake(model: PeftModel, changed_base: tuple[str, ...]) -> None:
    """Random changes to all that is trained."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name.endswith(changed_base or "\n"):
            spread = 0.1 if "lora_" in name else 0.3 * float(parameter.std())
            parameter.add_(torch.randn_like(parameter) * spread)
