"""Architectures that come out right are served; those that do not are refused, and so would be a broken attention."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from server.errors import BaseModelRefused
from server.model import admission
from server.model.admission import admit, shrink
from server.model.attention import cpu, probe
from server.model.attention.cpu import TorchAttention
from server.model.attention.interface import AttentionParams, FlatAttention
from server.model.attention.probe import ProbingAttention
from server.model.attention.sdpa import attend_chunk, chunk_mask
from server.model.kv_cache import AttentionMetadata, AttentionSegment, KVCache
from tests.model.architectures import REFUSED, SERVED, verdict
from tests.model.families import FAMILIES
from tests.model.models_table import PATH, table
from tests.tables import wide


@wide  # the families below are one of each kind
@pytest.mark.parametrize("name", SERVED)
def test_served(name: str) -> None:
    assert verdict(name).reason is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_the_engine_is_proved_on_is_served(family: str) -> None:
    admit(FAMILIES[family], name=family)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason_people_can_read(name: str) -> None:
    said = verdict(name)
    assert said.reason is not None
    assert said.reason.startswith(f"{said.model_type}: ")
    assert 20 < len(said.short_reason) < 250
    assert "\n" not in said.short_reason


@wide
def test_the_page_of_models_is_what_the_generator_writes() -> None:
    assert PATH.read_text(encoding="utf-8") == table(), "run python -m tests.model.models_table"


def test_admission_of_a_large_config_takes_about_a_second() -> None:
    """CPU time of this thread, so that a busy machine does not fail the test."""
    since = time.thread_time()
    admit(SERVED["Gemma 3 (text)"](), name="gemma3")
    assert time.thread_time() - since < 1.5


def test_admission_leaves_config_and_global_generator_alone() -> None:
    config = SERVED["Gemma 2"]()
    before, state = config.to_dict(), torch.get_rng_state()
    admit(config, name="gemma2")
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shrunken_config_keeps_every_kind_of_layer() -> None:
    config = shrink(SERVED["Gemma 3 (text)"]())
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.num_hidden_layers == len(config.layer_types) == 6
    assert config.sliding_window == 8


def called_with(function: type[FlatAttention], argument: str, change: Callable[[Any], Any]) -> type[FlatAttention]:
    """An attention function that reads one argument wrongly."""

    class Broken(function):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **named: Any) -> tuple[torch.Tensor, None]:
            result: tuple[torch.Tensor, None] = super().__call__(
                *args, **{**named, argument: change(named.get(argument))}
            )
            return result

    return Broken


def ignored(value: Any) -> None:
    return None


def one_too_large(window: int | None) -> int | None:
    return None if window is None else window + 1


@pytest.mark.parametrize("function", [ProbingAttention, FlatAttention])
@pytest.mark.parametrize(
    ("argument", "change", "victim"),
    [
        ("sliding_window", ignored, "Mistral"),
        ("sliding_window", ignored, "Gemma 3 (text)"),
        ("sliding_window", one_too_large, "Mistral"),
        ("sliding_window", one_too_large, "GPT-OSS"),
        ("s_aux", ignored, "GPT-OSS"),
        ("softcap", ignored, "Gemma 2"),
        ("scaling", ignored, "Gemma 3 (text)"),
        ("scaling", ignored, "Granite"),
    ],
)
def test_an_attention_function_that_reads_an_argument_wrongly_admits_nothing(
    monkeypatch: pytest.MonkeyPatch,
    function: type[FlatAttention],
    argument: str,
    change: Callable[[Any], Any],
    victim: str,
) -> None:
    monkeypatch.setattr(admission, function.__name__, called_with(function, argument, change))
    with pytest.raises(BaseModelRefused, match="logits differ"):
        admit(SERVED[victim](), name=victim)


class LooksAtTheNeighbour(ProbingAttention):
    """The first key of every sequence is that of the first sequence in the batch."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        assert self._metadata is not None
        key = key.clone()
        for segment in self._metadata.segments:
            key[:, :, segment.row] = key[:, :, 0]
        return super().attend(layer, query, key, value, params)


class LooksAtTheNeighboursSlot(KVCache):
    """Decoding reads another sequence's slot; prompts are right."""

    def read(self, layer: int, segment: AttentionSegment, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        other = replace(segment, slot=1 - segment.slot) if segment.length == 1 else segment
        return super().read(layer, other, window)


class WritesOneFurther(KVCache):
    def write(self, layer: int, metadata: AttentionMetadata, keys: torch.Tensor, values: torch.Tensor) -> None:
        further = tuple(replace(segment, start=segment.start + 1) for segment in metadata.segments)
        super().write(layer, AttentionMetadata.of(further, torch.device("cpu")), keys, values)


class PositionsFromZero(AttentionMetadata):
    """Every chunk counts its positions from zero."""

    @classmethod
    def of(cls, segments: tuple[AttentionSegment, ...], device: torch.device) -> AttentionMetadata:
        positions = torch.cat([torch.arange(segment.length) for segment in segments])
        return replace(AttentionMetadata.of(segments, device), positions=positions)


def _mixes_layers(backend: TorchAttention, layer: int, *others: Any) -> torch.Tensor:
    """All layers keep their keys in the slots of the first."""
    return _attend(backend, 0, *others)


def _sees_the_future(*args: Any) -> torch.Tensor | None:
    mask = chunk_mask(*args)
    return None if mask is None else torch.zeros_like(mask)


def _repeats_heads_wrongly(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, params: AttentionParams
) -> torch.Tensor:
    """Query heads are dealt to KV heads in turn, not in groups."""
    times = query.shape[1] // keys.shape[1]
    return attend_chunk(query, keys.repeat(1, times, 1, 1), values.repeat(1, times, 1, 1), mask, params)


def _folds_heads_wrongly(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Likewise, where a single row is folded."""
    _, heads, rows, dim = query.shape
    return query.view(heads // kv_heads, kv_heads, rows, dim).permute(2, 1, 0, 3)


_attend = TorchAttention.attend


@pytest.mark.parametrize(
    ("where", "name", "broken", "victim"),
    [
        (admission, "ProbingAttention", LooksAtTheNeighbour, "Llama"),
        (admission, "KVCache", LooksAtTheNeighboursSlot, "Llama"),
        (admission, "KVCache", WritesOneFurther, "Llama"),
        (admission, "AttentionMetadata", PositionsFromZero, "Llama"),
        (admission, "fix_rope", lambda model, length, patches: None, "Phi-3 with longrope"),
        (admission, "fix_rope", lambda model, length, patches: None, "Llama with dynamic RoPE"),
        (TorchAttention, "attend", _mixes_layers, "Llama"),
        (cpu, "chunk_mask", _sees_the_future, "Qwen 3"),
        (cpu, "attend_chunk", _repeats_heads_wrongly, "Llama 3.1 and later (scaled RoPE)"),
        (probe, "attend_chunk", _repeats_heads_wrongly, "Llama 3.1 and later (scaled RoPE)"),
        (cpu, "fold_heads", _folds_heads_wrongly, "Llama 3.1 and later (scaled RoPE)"),
    ],
)
def test_a_broken_engine_admits_nothing(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, broken: object, victim: str
) -> None:
    """The test of architectures is itself tested: whatever is broken on purpose must be noticed."""
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(BaseModelRefused, match="logits differ"):
        admit(SERVED[victim](), name=victim)


@pytest.mark.parametrize("place", [0, 1])
def test_logits_that_are_not_numbers_are_refused_in_whichever_sequence(place: int) -> None:
    """Once ``max`` over the sequences forgot a NaN that was not in the first of them."""
    stock = [torch.ones(3, 5), torch.ones(2, 5)]
    ours = [logits.clone() for logits in stock]
    ours[place][1, 1] = math.nan
    with pytest.raises(admission._Refused):
        admission._check(ours, stock, "they differ")


def test_a_head_that_computes_all_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner asks for sampled rows only; a model that ignores that would hand out its neighbours' logits."""
    from transformers import LlamaForCausalLM

    stock = LlamaForCausalLM.forward

    def forward(self: Any, *, logits_to_keep: object = 0, **others: Any) -> Any:
        return stock(self, **others)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(BaseModelRefused, match="logits_to_keep"):
        admit(SERVED["Llama"](), name="llama")


def test_a_config_that_cannot_be_shrunk_is_refused_with_the_reason() -> None:
    class Broken(PretrainedConfig):
        model_type = "broken"

    with pytest.raises(BaseModelRefused, match="broken: a small random copy of it could not be built"):
        admit(Broken(), name="broken")
