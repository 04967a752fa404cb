"""Which tokens end an answer and how it is sampled, of bases whose weights transformers does not read itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from base_files.locate import find_base
from base_files.packaged import PACKAGED_BASES
from base_files.source import FolderBase
from base_files.stock_model import model_without_weights
from tests.gguf_models import model_arrays, model_metadata, tokenizer_metadata, write_gguf_model
from tests.model.families import build
from tests.packaged_base import TINY
from tests.tiny_models import tiny_tokenizer


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GGUF file of the packaged base ``tiny``, a random Llama."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    model, path = build("llama"), TINY.path()
    path.parent.mkdir(parents=True)
    metadata = model_metadata(model, "llama") | tokenizer_metadata(tiny_tokenizer(), 512, "gpt-2")
    write_gguf_model(
        path, "llama", model_arrays(model, "llama") | {"token_embd.weight": torch.zeros(512, 64)}, metadata
    )
    monkeypatch.setitem(PACKAGED_BASES, "tiny", replace(TINY, num_bytes=path.stat().st_size))
    return path


@pytest.mark.parametrize("place", ["name", "file", "folder"])
def test_a_packaged_base_is_sampled_as_its_publisher_recommends_wherever_it_is_named(
    place: str, packaged: Path
) -> None:
    base_model = {"name": "tiny", "file": str(packaged), "folder": str(packaged.parent)}[place]
    config = model_without_weights(find_base(base_model), torch.float32).generation_config
    assert config is not None and (config.do_sample, config.temperature) == (True, 0.5)
    assert config.eos_token_id[0] == tiny_tokenizer().eos_token_id


def test_another_gguf_file_says_nothing_of_sampling(packaged: Path) -> None:
    other = packaged.rename(packaged.with_name("other.gguf"))
    config = model_without_weights(find_base(str(other)), torch.float32).generation_config
    assert config is not None and not config.do_sample
    assert config.eos_token_id[0] == tiny_tokenizer().eos_token_id


def test_a_folder_keeps_its_generation_config_where_the_model_is_made_without_weights(tmp_path: Path) -> None:
    """It was that of the architecture: answers did not end at tokens that only ``generation_config.json`` names."""
    build("llama").save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[3, 7], do_sample=True, temperature=0.6).save_pretrained(tmp_path)
    config = model_without_weights(FolderBase(tmp_path), torch.float32).generation_config
    assert config is not None and (config.eos_token_id, config.temperature) == ([3, 7], 0.6)
