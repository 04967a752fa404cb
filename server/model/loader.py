"""Runs the admission test, loads the base, and traces which modules adapters may change."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from adapter_format.messages import end_token_ids
from base_files.deferred_weights import ReadableWeights
from base_files.locate import find_base
from base_files.memory import available_bytes
from base_files.source import BaseSource, num_float_bytes
from base_files.stock_model import (
    check_memory,
    deferred_model,
    is_mapped,
    mapped_model,
    stock_config,
    stock_model,
    stock_tokenizer,
)
from base_files.weight_files import weight_files
from cpu_kernels.kernels import Kernels, choose_kernels
from server.adapters.content.base_samples import BaseSamples
from server.adapters.content.signature import BaseSignature
from server.adapters.content.templates import default_template
from server.errors import BaseModelRefused, SettingsError
from server.model.admission import admit
from server.model.attention.batched import BatchedAttention
from server.model.attention.cpu import TorchAttention, cpu_attention
from server.model.attention.interface import BackendFactory, FlatAttention
from server.model.attention.probe import ProbingAttention
from server.model.base_tokenizer import tokenizer_signature
from server.model.calibration import Calibration
from server.model.device import choose_device, choose_dtype, choose_float_dtype, choose_kv_dtype, prepare
from server.model.fused_ops import fuse_norms, fuse_ops
from server.model.kv_cache import AttentionMetadata, AttentionSegment, KVLayout, LayerShape, longest_within
from server.model.mapped_files import MappedFiles
from server.model.model_trace import PROBE_ROWS, ModelTrace, signature_of, trace_modules
from server.model.patches import ModelPatches, bypass_modules, fix_rope
from server.model.quantizer import IN_MEMORY, Quantized, mixtures, num_int8_bytes, quantizing

logger = logging.getLogger("quickchange.model")

_SENTENCE = "The old man looked at the sea for a long time, and then he said to the boys: 'Let us go home.'"


@dataclass(frozen=True)
class Base:
    """A base in memory, with its attention function installed; ``attention_backend`` makes a backend for a KV cache.

    ``shapes`` are the shapes of each layer's keys and values, kept as ``kv_dtype``; ``groups`` are linears that receive
    the same input, ``kernels`` its operations on a CPU; ``quantized`` counts its int8 and float parameters.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    attention: FlatAttention
    attention_backend: BackendFactory
    shapes: Sequence[LayerShape]
    signature: BaseSignature
    max_model_len: int
    eos_ids: frozenset[int]
    kv_dtype: torch.dtype
    kernels: Kernels
    groups: tuple[tuple[str, ...], ...] = ()
    quantized: Quantized | None = None
    patches: ModelPatches = field(default_factory=ModelPatches)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids are below this."""
        return self.signature.vocab_size

    @property
    def number_format(self) -> str:
        """That of its linear layers: int8, or the name of a floating-point type."""
        return str(self.model.dtype).removeprefix("torch.") if self.quantized is None else "int8"

    @property
    def num_parameters(self) -> int:
        if self.quantized is not None:
            return self.quantized.num_parameters
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def num_bytes(self) -> int:
        """The size of its weights in memory."""
        if self.quantized is not None:
            return self.quantized.num_bytes + sum(self.quantized.unquantized.values())
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def close(self) -> None:
        """Free the keys and values and undo all patches; no step can be computed any more.

        A quantized model gets its stock modules back, but quantized weights are None, so that a call raises, and other
        parameters keep their dtype.
        """
        self.patches.undo()


def load_base(
    base_model: str,
    *,
    name: str,
    device: str,
    dtype: str,
    max_model_len: int | None,
    kv_memory: int | None = None,
    quantization: str = "none",
    outlier_cache: Path | None = None,
) -> Base:
    """Load the base that the setting names; ``kv_memory``, in bytes, bounds its longest sequence.

    ``quantization`` "int8" quantizes its linears and embedding; ``outlier_cache`` caches the calibration.
    Raises a ``BaseFilesError``, ``BaseModelRefused`` or ``SettingsError``.
    """
    source = find_base(base_model)
    config = stock_config(source)
    torch_device, backend = _device_and_attention(device)
    admit(config, name=name, backend=backend)
    length = _length(config, max_model_len)
    is_int8 = quantization == "int8"
    kernels = _kernels(torch_device, int8=is_int8)
    fingerprints = source.fingerprints()
    float_dtype = None if is_int8 else choose_dtype(dtype, torch_device, num_float_bytes(source))
    model, weights = _readable_model(source, float_dtype, torch_device)
    tokenizer = stock_tokenizer(source)
    nn.Module.to(model, device=torch_device)
    patches = ModelPatches()
    probe = _install_probe(model, patches)
    calibration = Calibration(fingerprints.v2, weights, length, outlier_cache)
    if is_int8:
        trace, quantized = _quantize(model, kernels, probe, patches, calibration, tokenizer, dtype=dtype)
    else:
        trace, quantized = _probe(model, probe), None
    _check_calls(name, probe, config)
    kv_dtype = choose_kv_dtype(model.dtype) if is_int8 else model.dtype
    if kv_memory is not None:
        length = _affordable(KVLayout(tuple(probe.shapes), length, kv_dtype), kv_memory, asked=max_model_len)
    fix_rope(model, length, patches)
    on_cpu = backend is TorchAttention
    _fuse(model, kernels.ready(model.dtype), patches, on_cpu=on_cpu)
    attention = _install_attention(model, patches)
    probe.close()
    signature = replace(signature_of(name, fingerprints.v1, trace), fingerprint_v2=fingerprints.v2)
    return Base(
        model,
        tokenizer,
        attention,
        partial(cpu_attention, kernels=kernels) if on_cpu else backend,
        probe.shapes,
        replace(_with_tokenizer(signature, tokenizer, source.path), setting=base_model, samples=BaseSamples(source)),
        length,
        end_token_ids(model, tokenizer),
        kv_dtype,
        kernels,
        trace.groups,
        quantized,
        patches,
    )


def _install_probe(model: PreTrainedModel, patches: ModelPatches) -> ProbingAttention:
    """Replace the stock attention with a probe."""
    patches.begin("attention")
    patches.on_undo(partial(model.set_attn_implementation, model.config._attn_implementation))
    probe = ProbingAttention()
    probe.install(model)
    return probe


def _install_attention(model: PreTrainedModel, patches: ModelPatches) -> FlatAttention:
    """Replace the probe with the attention that serves."""
    patches.begin("KV cache")
    attention = FlatAttention()
    attention.install(model)
    patches.on_undo(attention.close)
    return attention


def _fuse(model: PreTrainedModel, kernels: Kernels, patches: ModelPatches, *, on_cpu: bool) -> None:
    """Replace modules with fused ones that compute the same."""
    if not on_cpu:
        fuse_norms(model, patches)
    elif model.dtype == torch.float32:
        fuse_ops(model, kernels, patches)
    bypass_modules(model, patches)


def _device_and_attention(device: str) -> tuple[torch.device, BackendFactory]:
    """The device of the setting, prepared, and its torch attention."""
    torch_device = choose_device(device)
    prepare(torch_device)
    return torch_device, TorchAttention if torch_device.type == "cpu" else BatchedAttention


def _with_tokenizer(signature: BaseSignature, tokenizer: PreTrainedTokenizerBase, path: Path) -> BaseSignature:
    """The signature with the base's chat template and tokenizer, for comparison with an adapter's."""
    template = default_template(tokenizer.chat_template)
    return replace(signature, chat_template=template, tokenizer=tokenizer_signature(tokenizer, path))


def _check_calls(name: str, probe: ProbingAttention, config: PretrainedConfig) -> None:
    """The admission test's check, of the real base: the shrunken copy has other layers."""
    if problem := probe.check_calls(config.get_text_config().num_hidden_layers):
        raise BaseModelRefused(name, problem)


def _kernels(device: torch.device, *, int8: bool) -> Kernels:
    """The kernels of a base. Raises ``SettingsError`` if int8 is asked for and there is no int8 linear kernel."""
    if int8 and device.type != "cpu":
        raise SettingsError(
            f"quantization is 'int8', but the device is {device.type!r}: int8 is for the CPU; set device to 'cpu', or "
            "quantization to 'none'"
        )
    kernels = choose_kernels(int8=int8, kv_dtype=choose_kv_dtype(torch.float32))
    if int8 and kernels.linear_name is None:
        raise SettingsError(
            f"quantization is 'int8', but torch {torch.__version__} has neither FBGEMM nor oneDNN here: set 'none'"
        )
    return kernels


def _num_unpacked_bytes(model: PreTrainedModel) -> int:
    """Bytes of large parameters that are not quantized, such as those of experts of an unknown form."""
    quantized = {parameter for experts in mixtures(model).values() for parameter in experts.parameters()}
    large = {parameter for parameter in model.parameters() if parameter.ndim > 2}
    return sum(parameter.nbytes for parameter in large - quantized)


def _check_memory(source: BaseSource, dtype: torch.dtype | None, device: torch.device) -> None:
    """Raises ``BaseTooLarge`` where the weights alone do not fit; a ``dtype`` of None stands for int8."""
    if device.type == "mps":
        return  # its memory is the machine's, and the system does not say what is free
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    smaller = "Choose a smaller base, or use a machine with more memory."
    if dtype is None:
        check_memory(source, torch.float32, available=available, ways_out=smaller, num_bytes=num_int8_bytes)
    else:
        int8 = "Set quantization to 'int8'. " if device.type == "cpu" else ""
        check_memory(source, dtype, available=available, ways_out=int8 + smaller)


def _readable_model(
    source: BaseSource, dtype: torch.dtype | None, device: torch.device
) -> tuple[PreTrainedModel, ReadableWeights]:
    """The stock model in ``dtype``. None is for one that will be quantized.

    Its weights are mapped in the dtype of their files, or read when it is time. Raises ``BaseTooLarge`` before
    anything is read for a model that does not fit into the memory of ``device``.
    """
    _check_memory(source, dtype, device)
    if dtype is not None:
        return stock_model(source, dtype), IN_MEMORY
    if not is_mapped(source):
        return deferred_model(source)
    return mapped_model(source), MappedFiles(weight_files(source.path))


def _length(config: PretrainedConfig, wanted: int | None) -> int:
    text = config.get_text_config()
    own = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2048
    if wanted is not None and wanted > own:
        raise SettingsError(
            f"max_model_len is {wanted}, but the base was made for {own} tokens: lower it, or leave it out"
        )
    return int(wanted or own)


def _affordable(layout: KVLayout, kv_memory: int, *, asked: int | None) -> int:
    """The longest sequence whose keys and values fit into ``kv_memory``. Raises ``SettingsError`` below ``asked``."""
    length = longest_within(kv_memory, layout)
    if length < min(asked or 2, layout.max_len):
        raise SettingsError(
            f"kv_memory is {kv_memory}, but one sequence of {asked or 2} tokens takes {layout.bytes_of(asked or 2)} "
            "bytes: raise --kv-memory, or lower --max-model-len"
        )
    if length < layout.max_len:
        logger.warning(
            "kv_memory holds %d of the base's %d tokens of context: max_model_len is %d", length, layout.max_len, length
        )
    return length


@torch.inference_mode()
def _probe(
    model: PreTrainedModel, probe: ProbingAttention, ids: Sequence[int] = range(3, 3 + PROBE_ROWS)
) -> ModelTrace:
    """One small forward pass: ``probe`` records the attention, the trace the modules that adapters may change."""
    metadata = AttentionMetadata.of((AttentionSegment(0, 0, PROBE_ROWS, 0),), model.device)
    probe.begin(metadata)
    rows = torch.tensor([list(ids)], device=model.device) % model.config.get_text_config().vocab_size
    with trace_modules(model) as trace:
        model(input_ids=rows, position_ids=metadata.positions[None], use_cache=False)
    return trace


def _quantize(
    model: PreTrainedModel,
    kernels: Kernels,
    probe: ProbingAttention,
    patches: ModelPatches,
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
) -> tuple[ModelTrace, Quantized]:
    """A probe that quantizes linears and embedding while it reads their weights from the files."""
    outliers = calibration.outliers(model, probe, tokenizer)
    float_dtype = choose_float_dtype(dtype, _num_unpacked_bytes(model))
    with quantizing(
        model, kernels, float_dtype, patches=patches, weights=calibration.weights, outliers=outliers
    ) as quantized:
        trace = _probe(model, probe, _ordinary_ids(tokenizer))
    for name in quantized.mixtures:  # adapters' deltas of them are in float32
        trace.modules[name] = replace(trace.modules[name], itemsize=torch.float32.itemsize)
    return trace, quantized


def _ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    """``PROBE_ROWS`` tokens of a sentence."""
    ids = [int(token) for token in tokenizer(_SENTENCE, add_special_tokens=False)["input_ids"]]
    return ids[:PROBE_ROWS] if len(ids) >= PROBE_ROWS else range(3, 3 + PROBE_ROWS)
