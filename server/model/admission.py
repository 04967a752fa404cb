"""The admission test: is an architecture computed correctly when sequences are concatenated in one row?

Most of transformers' modelling code is. Some is not, and fails silently: state carried from one sequence into the next,
a window that exists in the mask only, an attention function of its own. So before a base is served, a shrunken copy of
its config with random weights is run both ways: each sequence alone by stock code; and two sequences in one batch by
the server's attention, in chunks, and token by token from KV slots. Logits must agree.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from server.errors import BaseModelRefused
from server.model.attention.cpu import TorchAttention
from server.model.attention.interface import AttentionBackend, BackendFactory, FlatAttention
from server.model.attention.probe import ProbingAttention
from server.model.kv_cache import AttentionMetadata, AttentionSegment, KVCache
from server.model.patches import ModelPatches, fix_rope

TOLERANCE = 1e-3
"""Largest difference allowed between logits, as a share of the largest stock logit; float32 leaves about 1e-6."""

_LENGTHS = (37, 21)
_CONTEXT = 64
_WINDOW = 8
_TRAINED = 32
"""Original context of a model with scaled RoPE: one of the two sequences is longer, one shorter."""
_SIZES: dict[str, int] = {
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "intermediate_size": 96, "n_inner": 96, "ffn_hidden_size": 96,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "intermediate_size_mlp": 96, "head_dim": 16,
    "global_head_dim": 16, "num_attention_heads": 4, "n_head": 4, "vocab_size": 256, "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16, "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128,
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "query_pre_attn_scalar": 12, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "mamba_d_head": 16, "mamba_n_heads": 8,
    "mamba_d_state": 16, "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Values of fields that the config has."""

_AT_MOST = {"num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention_window_size")
_MAX_LAYERS = 6


def admit(config: PretrainedConfig, *, name: str, backend: BackendFactory = TorchAttention) -> None:
    """Return if the architecture may be served with this attention.

    Raises ``BaseModelRefused`` with the reason.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(0)
            _compare(shrink(config), backend)
    except _Refused as refused:
        raise BaseModelRefused(name, f"{config.model_type}: {refused}") from None
    except Exception as error:
        reason = f"a small random copy of it could not be built and run ({type(error).__name__}: {str(error)[:200]})"
        raise BaseModelRefused(name, f"{config.model_type}: {reason}") from error


class _Refused(Exception):
    """The reason why the architecture may not be served."""


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """A tiny copy of the config with every kind of layer it has, windows of 8 and a context of 128."""
    text = copy.deepcopy(config.get_text_config())
    before = text.to_dict()
    _shrink_layers(text, before)
    _shrink_heads(text, before)
    for field, size in _SIZES.items():
        if before.get(field) is not None and not (field == "head_dim" and before.get("kv_lora_rank")):
            setattr(text, field, size)
    for field, most in _AT_MOST.items():
        if before.get(field) is not None:
            setattr(text, field, min(before[field], most))
    for field in _WINDOWS:
        if before.get(field) is not None:
            setattr(text, field, _WINDOW)
    _shrink_rope(text)
    return text


def _shrink_layers(text: PretrainedConfig, before: dict[str, Any]) -> None:
    """Few layers, first one of each kind."""
    kinds = before.get("layer_types") or before.get("layers_block_type")
    count = min(_MAX_LAYERS, before.get("num_hidden_layers") or before.get("n_layer") or 2)
    if kinds:
        shown = list(dict.fromkeys(kinds))[:_MAX_LAYERS]
        shown = (shown + list(kinds))[: max(count, len(shown))]
        count = len(shown)
        if before.get("layer_types"):
            text.layer_types = shown
    for field, value in before.items():
        per_layer = isinstance(value, list) and len(value) == before.get("num_hidden_layers") and field != "layer_types"
        if per_layer and field not in ("layers_block_type",):
            setattr(text, field, value[:count])
    for field in ("num_hidden_layers", "n_layer"):
        if before.get(field) is not None:
            setattr(text, field, count)
    if before.get("num_kv_shared_layers"):
        text.num_kv_shared_layers = 0


def _shrink_heads(text: PretrainedConfig, before: dict[str, Any]) -> None:
    """Keep the kind of attention: multi-head, multi-query or grouped-query; latent attention gets matching sizes."""
    if before.get("kv_lora_rank"):
        text.head_dim, text.qk_head_dim = 8, 24
    kv_heads = before.get("num_key_value_heads")
    if kv_heads and kv_heads == before.get("num_attention_heads"):
        text.num_key_value_heads = 4
    elif kv_heads:
        text.num_key_value_heads = min(kv_heads, 2)


def _shrink_rope(text: PretrainedConfig) -> None:
    """Cut per-frequency factors to the number of frequencies of the small heads."""
    parameters = getattr(text, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    layered = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in layered or [parameters]:
        heads = getattr(text, "num_attention_heads", 4)
        dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        frequencies = int(dim * rope.get("partial_rotary_factor", 1.0)) // 2
        for field in ("short_factor", "long_factor"):
            if field in rope:
                rope[field] = rope[field][:frequencies]
        if "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] = _TRAINED
        if "dynamic" in str(rope.get("rope_type")):
            text.max_position_embeddings = _TRAINED
    if getattr(text, "original_max_position_embeddings", None):
        text.original_max_position_embeddings = _TRAINED


def _compare(config: PretrainedConfig, backend: BackendFactory) -> None:
    """Compare stock logits of two sequences with the server's: in one batch, in chunks, and token by token."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    _randomize(model)
    fix_rope(model, _CONTEXT, ModelPatches())
    sequences = [torch.randint(3, 200, (length,)) for length in _LENGTHS]
    stock = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
    probe, attention = ProbingAttention(), FlatAttention()
    try:
        probe.install(model)
        _compare_whole(model, probe, sequences, stock)
        cpu = torch.device("cpu")
        cache = KVCache(probe.shapes, num_slots=2, max_len=_CONTEXT, dtype=torch.float32, device=cpu)
        attention.backend = backend(cache)
        attention.install(model)
        decoded = _in_chunks(model, attention.backend, sequences)
        _check(decoded, stock, "chunks of a prompt and tokens decoded from a KV slot differ")
    finally:
        probe.close()
        attention.close()


def _compare_whole(
    model: PreTrainedModel, probe: ProbingAttention, sequences: list[torch.Tensor], stock: list[torch.Tensor]
) -> None:
    """Compare both sequences in one batch, without a cache."""
    pieces = [(number, 0, len(ids)) for number, ids in enumerate(sequences)]
    whole = _flat(model, probe, sequences, pieces)
    _check(whole, stock, "sequences in one batch influence each other")
    if problem := probe.check_calls(model.config.num_hidden_layers):
        raise _Refused(problem)
    _check_kept_rows(model, sequences, torch.cat(whole))


def _check_kept_rows(model: PreTrainedModel, sequences: list[torch.Tensor], logits: torch.Tensor) -> None:
    """Check that the head computes the requested rows only."""
    keep = torch.tensor([2, _LENGTHS[0], sum(_LENGTHS) - 1])
    ids, positions = torch.cat(sequences)[None], torch.cat([torch.arange(length) for length in _LENGTHS])[None]
    kept = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep).logits[0]
    if kept.shape != logits[keep].shape:
        raise _Refused("its head cannot be told which rows to compute (it ignores logits_to_keep)")
    _check([kept], [logits[keep]], "rows chosen for the head differ")


def _in_chunks(model: PreTrainedModel, backend: AttentionBackend, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of both sequences, computed in steps that mix chunks of one with single tokens of the other."""
    steps = [[(0, 0, 5)], [(0, 5, 18), (1, 0, 11)], [(0, 18, 19), (1, 11, 17)]]
    for first, second in zip(range(19, _LENGTHS[0]), itertools.count(17), strict=False):
        steps.append([(0, first, first + 1)])
        if second < _LENGTHS[1]:
            steps[-1].append((1, second, second + 1))
    parts: list[list[torch.Tensor]] = [[], []]
    for step in steps:
        for part, rows in zip(parts, _flat(model, backend, sequences, step), strict=True):
            part.append(rows)
    return [torch.cat(part) for part in parts]


def _flat(
    model: PreTrainedModel,
    attention: ProbingAttention | AttentionBackend,
    sequences: list[torch.Tensor],
    pieces: list[tuple[int, int, int]],
) -> list[torch.Tensor]:
    """One flat pass over pieces (sequence, start, end): the logits of each sequence's rows, [rows, vocab]."""
    segments, row = [], 0
    for sequence, start, end in pieces:
        segments.append(AttentionSegment(row, start, end - start, slot=sequence))
        row += end - start
    metadata = AttentionMetadata.of(tuple(segments), torch.device("cpu"))
    attention.begin(metadata)
    ids = torch.cat([sequences[sequence][start:end] for sequence, start, end in pieces])
    logits = model(input_ids=ids[None], position_ids=metadata.positions[None], use_cache=False).logits[0]
    none = logits[:0]
    found = {segment.slot: logits[segment.rows] for segment in segments}
    return [found.get(number, none) for number in range(len(sequences))]


def _check(logits: list[torch.Tensor], stock: list[torch.Tensor], failure: str) -> None:
    scale = max(float(expected.abs().max()) for expected in stock)
    differences = [(found - expected).abs().max() for found, expected in zip(logits, stock, strict=True)]
    difference = float(torch.stack(differences).max()) / scale
    if not difference < TOLERANCE:
        raise _Refused(f"{failure} (logits differ by {difference:.2g} of their range; {TOLERANCE:.0e} is allowed)")


def _randomize(model: PreTrainedModel) -> None:
    """Weights large enough that attention is sharp: with the usual tiny weights no error would be visible."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
