"""Architectures that come out right are served; those that do not are refused, and so would be a broken attention."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from server.errors import BaseModelRefused
from server.model import admission, attention
from server.model.admission import admit, shrink
from server.model.attention import FlatAttention, Layout
from server.model.kv_cache import KVCache, RowsLayout, Span
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


class IgnoresWindow(FlatAttention):
    def __call__(self, *args: Any, **others: Any) -> tuple[torch.Tensor, None]:
        return super().__call__(*args, **{**others, "sliding_window": None})


class WindowOneTooLarge(FlatAttention):
    def __call__(self, *args: Any, **others: Any) -> tuple[torch.Tensor, None]:
        window = others.get("sliding_window")
        return super().__call__(*args, **{**others, "sliding_window": None if window is None else window + 1})


class IgnoresSinks(FlatAttention):
    def __call__(self, *args: Any, **others: Any) -> tuple[torch.Tensor, None]:
        return super().__call__(*args, **{**others, "s_aux": None})


class IgnoresSoftCap(FlatAttention):
    def __call__(self, *args: Any, **others: Any) -> tuple[torch.Tensor, None]:
        return super().__call__(*args, **{**others, "softcap": None})


class IgnoresScaling(FlatAttention):
    def __call__(self, *args: Any, **others: Any) -> tuple[torch.Tensor, None]:
        return super().__call__(*args, **{**others, "scaling": None})


class LooksAtTheNeighbour(FlatAttention):
    """The first key of every sequence is that of the first sequence in the batch."""

    def _keys_and_values(
        self, layer: int, span: Span, window: int | None, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super()._keys_and_values(layer, span, window, key, value)
        keys = keys.clone()
        keys[:, :, 0] = key[:, :, 0]
        return keys, values


class LooksAtTheNeighboursSlot(FlatAttention):
    """Decoding reads another sequence's slot; prompts are right."""

    def _keys_and_values(
        self, layer: int, span: Span, window: int | None, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        other = Span(span.row, span.start, span.length, 1 - span.slot) if span.length == 1 else span
        return super()._keys_and_values(layer, other, window, key, value)


class MixesLayers(FlatAttention):
    """All layers keep their keys in the slots of the first."""

    def _note(self, *args: Any) -> tuple[Layout, int]:
        layout, layer = super()._note(*args)
        return layout, layer if self.cache is None else 0


class WritesOneFurther(KVCache):
    def write(self, layer: int, layout: RowsLayout, keys: torch.Tensor, values: torch.Tensor) -> None:
        further = tuple(replace(span, start=span.start + 1) for span in layout.spans)
        super().write(layer, Layout.of(further, torch.device("cpu")), keys, values)


class SeesTheFuture(Layout):
    def mask(self, span: Span, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        mask = super().mask(span, window, dtype)
        return None if mask is None else torch.zeros_like(mask)


class PositionsFromZero(Layout):
    """Every chunk counts its positions from zero."""

    @classmethod
    def of(cls, spans: tuple[Span, ...], device: torch.device) -> Layout:
        layout = super().of(spans, device)
        layout.positions = torch.cat([torch.arange(span.length) for span in spans])
        return layout


def _repeats_heads_wrongly(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Query heads are dealt to KV heads in turn, not in groups."""
    times = query.shape[1] // keys.shape[1]
    return _chunk(query, keys.repeat(1, times, 1, 1), values.repeat(1, times, 1, 1), mask, scale)


def _folds_heads_wrongly(query: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, ...]:
    """Likewise, where a single row is folded."""
    _, heads, rows, dim = query.shape
    turned = query[0].transpose(0, 1).reshape(rows, heads // kv_heads, kv_heads, dim).transpose(1, 2)
    return tuple(turned.contiguous()[row : row + 1] for row in range(rows))


_chunk = attention._chunk


@pytest.mark.parametrize(
    ("where", "name", "broken", "victim"),
    [
        (admission, "FlatAttention", IgnoresWindow, "Mistral"),
        (admission, "FlatAttention", IgnoresWindow, "Gemma 3 (text)"),
        (admission, "FlatAttention", WindowOneTooLarge, "Mistral"),
        (admission, "FlatAttention", WindowOneTooLarge, "GPT-OSS"),
        (admission, "FlatAttention", IgnoresSinks, "GPT-OSS"),
        (admission, "FlatAttention", IgnoresSoftCap, "Gemma 2"),
        (admission, "FlatAttention", IgnoresScaling, "Gemma 3 (text)"),
        (admission, "FlatAttention", IgnoresScaling, "Granite"),
        (admission, "FlatAttention", LooksAtTheNeighbour, "Llama"),
        (admission, "FlatAttention", LooksAtTheNeighboursSlot, "Llama"),
        (admission, "FlatAttention", MixesLayers, "Llama"),
        (admission, "KVCache", WritesOneFurther, "Llama"),
        (admission, "Layout", SeesTheFuture, "Qwen 3"),
        (admission, "Layout", PositionsFromZero, "Llama"),
        (admission, "fix_rope", lambda model, length: None, "Phi-3 with longrope"),
        (admission, "fix_rope", lambda model, length: None, "Llama with dynamic RoPE"),
        (attention, "_chunk", _repeats_heads_wrongly, "Llama 3.1 and later (scaled RoPE)"),
        (attention, "_folded", _folds_heads_wrongly, "Llama 3.1 and later (scaled RoPE)"),
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
