"""Which inputs of an int8 base are multiplied in floats is measured on several kinds of text, once for a base."""

from __future__ import annotations

import errno
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from base_files.source import FolderBase
from base_files.stock_model import stock_model
from server.cli.folders import user_cache
from server.model import calibration
from server.model.attention.probe import ProbingAttention
from server.model.calibration import MOST_TOKENS, Calibration, calibration_ids
from server.model.calibration_texts import TEXTS
from server.model.loader import load_base
from server.model.mapped_files import MappedFiles
from server.model.quantizer import OutlierInputs, quantizable
from server.quantization.outliers import MOST, find_outliers
from tests.tiny_models import build_tiny_base

FINGERPRINT, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
CHANNEL = 5
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base one channel of which is large before the first layer's attention."""
    folder = build_tiny_base(tmp_path_factory.mktemp("tiny"))
    model = stock_model(FolderBase(folder))
    with torch.no_grad():
        model.get_parameter("model.layers.0.input_layernorm.weight")[CHANNEL] *= 100.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return stock_model(FolderBase(folder))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found


@pytest.fixture
def measure(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[..., OutlierInputs]:
    """Measure the tiny base, or read what was kept of it."""
    probe = ProbingAttention()
    probe.install(model)

    def run(cache: Path | None, fingerprint: str = FINGERPRINT, max_len: int = 256) -> OutlierInputs:
        weights = MappedFiles([folder / "model.safetensors"])
        return Calibration(fingerprint, weights, max_len, cache).outliers(model, probe, tokenizer)

    return run


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, measuring is an error."""

    def fail(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the base was measured again")

    return lambda: monkeypatch.setattr(calibration, "measure_outliers", fail)


def as_lists(found: OutlierInputs) -> dict[str, list[int] | None]:
    return {name: None if indices is None else indices.tolist() for name, indices in found.items()}


def test_an_input_that_is_large_on_one_kind_of_text_is_found() -> None:
    """Of 13 tokens of one English sentence, or of the median of all, it was not to be seen."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(320, 256, generator=source)
    assert find_outliers(x) is None
    x[64:128, CHANNEL] *= 40.0
    found = find_outliers(x)
    assert found is not None and found.tolist() == [CHANNEL]
    assert float(x[:, CHANNEL].abs().median()) < 1.5


def test_texts_are_of_several_kinds_and_some_hundred_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    sequences = calibration_ids(tokenizer, max_len=256, vocab_size=512)
    assert [len(ids) for ids in sequences] == [MOST_TOKENS] * len(TEXTS)
    assert sum(map(len, sequences)) >= 300
    assert [len(ids) for ids in calibration_ids(tokenizer, max_len=7, vocab_size=512)] == [7] * len(TEXTS)
    assert max(max(ids) for ids in calibration_ids(tokenizer, max_len=256, vocab_size=100)) < 100
    words = {unicodedata.name(letter).split()[0] for letter in "".join(TEXTS) if letter.isalpha()}
    assert words == {"LATIN", "CJK", "CYRILLIC"}


def test_every_linear_that_becomes_integers_is_measured_and_the_model_stays_as_it_was(
    model: PreTrainedModel, measure: Callable[..., OutlierInputs]
) -> None:
    ids, positions = torch.arange(20, 33)[None], torch.arange(13)[None]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = measure(None)
    assert found.keys() == quantizable(model).keys() and "lm_head" in found
    indices = found[FIRST]
    assert indices is not None and CHANNEL in indices.tolist()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    model.set_attn_implementation("sdpa")
    assert model(input_ids=ids, position_ids=positions).logits.shape == (1, 13, 512), "the head computes again"
    assert not any(module._forward_hooks for module in model.modules())


def test_what_was_measured_is_kept_for_the_next_start(
    tmp_path: Path, measure: Callable[..., OutlierInputs], no_pass: Callable[[], None]
) -> None:
    first = measure(tmp_path / "deep" / "cache")
    assert [path.name for path in (tmp_path / "deep" / "cache").iterdir()] == ["a" * 64 + ".json"]
    no_pass()
    assert as_lists(measure(tmp_path / "deep" / "cache")) == as_lists(first)
    with pytest.raises(AssertionError, match="measured again"):
        measure(tmp_path / "deep" / "cache", fingerprint=OTHER)
    with pytest.raises(AssertionError, match="measured again"):
        measure(tmp_path / "deep" / "cache", max_len=32)


def _changed(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(change(json.loads(data))).encode()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: b"[" * 100_000,
        lambda data: b"\xff\xfe",
        _changed(lambda kept: [kept]),
        _changed(lambda kept: kept | {"key": "0" * 64}),
        _changed(lambda kept: kept | {"linears": [1]}),
        _changed(lambda kept: kept | {"linears": {"no.such.linear": [1]}}),
        _changed(lambda kept: kept | {"linears": kept["linears"] | {FIRST: [32]}}),
        _changed(lambda kept: kept | {"linears": kept["linears"] | {FIRST: [-1]}}),
        _changed(lambda kept: kept | {"linears": kept["linears"] | {FIRST: [3, 3]}}),
        _changed(lambda kept: kept | {"linears": kept["linears"] | {FIRST: [True]}}),
        _changed(lambda kept: kept | {"linears": kept["linears"] | {FIRST: 5}}),
        _changed(lambda kept: kept | {"linears": kept["linears"] | {FIRST: list(range(MOST + 1))}}),
    ],
)
def test_what_is_kept_and_does_not_fit_is_measured_again(
    spoil: Callable[[bytes], bytes], tmp_path: Path, measure: Callable[..., OutlierInputs]
) -> None:
    first = measure(tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    path.write_bytes(spoil(good))
    assert as_lists(measure(tmp_path)) == as_lists(first)
    assert path.read_bytes() == good


def test_where_nothing_can_be_kept_the_base_starts_all_the_same(
    tmp_path: Path, measure: Callable[..., OutlierInputs], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level("INFO"):
        assert measure(tmp_path / "file" / "cache")
    assert "could not be cached" in caplog.text
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_leaves_no_half_of_a_file(
    tmp_path: Path, measure: Callable[..., OutlierInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed in the cache, beside one of every other process that had tried."""
    write_text = Path.write_text

    def write_half(path: Path, text: str, **named: Any) -> int:
        write_text(path, text[: len(text) // 2], **named)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", write_half)
        assert measure(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert measure(tmp_path) and len(list(tmp_path.iterdir())) == 1


def test_an_int8_base_is_loaded_with_what_was_kept(folder: Path, tmp_path: Path, no_pass: Callable[[], None]) -> None:
    def load() -> int:
        how: dict[str, Any] = {"device": "cpu", "dtype": "auto", "max_model_len": 64, "quantization": "int8"}
        base = load_base(str(folder), name="m", outlier_cache=tmp_path, **how)
        assert base.quantized is not None
        return base.quantized.num_outliers

    first = load()
    no_pass()
    assert load() == first > 0


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache("outliers") == tmp_path / "quickchange" / "outliers"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert user_cache("outliers") == tmp_path / "home" / ".cache" / "quickchange" / "outliers"
    assert list(tmp_path.iterdir()) == [], "nothing is made by asking"


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert user_cache("outliers") is None
