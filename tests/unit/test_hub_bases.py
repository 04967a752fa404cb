"""What is fetched of a base from a hub: one set of weights, and the small files it needs."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from base_files.errors import BaseMalformed, BaseNotFound
from base_files.locate import base_on_disk, find_base
from base_files.names import BASE_MODEL_HELP
from base_files.weight_files import num_weight_bytes
from server.settings import Settings

REVISION = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}})
SMALL = (
    "additional_chat_templates/rag.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
OTHERS = (
    ".gitattributes",
    "README.md",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "fp16/model.safetensors",
    "gguf/model-q4.gguf",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/consolidated.safetensors",
    "original/params.json",
    "original/tokenizer.model",
    "pytorch_model.bin",
    "tf_model.h5",
)
"""Beside the weights in repositories of Mistral, Meta and others."""


class FakeHub:
    """A repository by its files' names, with the real library's choice among them."""

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.folder = root / "snapshots" / REVISION
        self.files = files
        self.revisions: list[str | None] = []

    def __call__(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
    ) -> str:
        assert repo_id == "someone/base"
        self.revisions.append(revision)
        for name in filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(INDEX if name.endswith(".index.json") else name, encoding="utf-8")
        return str(self.folder)

    @property
    def fetched(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def make_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], FakeHub]:
    def make(files: Sequence[str]) -> FakeHub:
        hub = FakeHub(tmp_path, files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
        return hub

    return make


def test_of_a_base_in_shards_the_index_says_what_is_fetched(make_hub: Callable[[Sequence[str]], FakeHub]) -> None:
    """Mistral's repositories have the same weights a second time, in one file, which was fetched and counted, too."""
    hub = make_hub([*SMALL, *SHARDS, "model.safetensors.index.json", *OTHERS])
    assert find_base("someone/base").path == hub.folder
    assert hub.fetched == {*SMALL, *SHARDS, "model.safetensors.index.json"}
    assert hub.revisions == [None, REVISION], "the weights are of the commit whose index was read"


def test_of_a_base_in_one_file_this_is_fetched(make_hub: Callable[[Sequence[str]], FakeHub]) -> None:
    hub = make_hub([*SMALL, "model.safetensors", *OTHERS])
    assert find_base("someone/base").path == hub.folder
    assert hub.fetched == {*SMALL, "model.safetensors"}


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}'])
def test_an_index_that_names_no_files_is_a_base_that_cannot_be_had(
    index: str, make_hub: Callable[[Sequence[str]], FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.INDEX", index)
    make_hub([*SMALL, *SHARDS, "model.safetensors.index.json"])
    with pytest.raises(BaseNotFound, match="someone/base"):
        find_base("someone/base")


def test_a_full_disk_is_named_where_a_download_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason was the name of the exception alone, OSError, with the advice to check the network."""

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(BaseNotFound, match="No space left on device"):
        find_base("someone/base")


def test_only_the_files_that_are_loaded_count(tmp_path: Path) -> None:
    """The number format ``auto`` rests on their size."""
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(1000))
    (tmp_path / "model.safetensors.index.json").write_text(INDEX, encoding="utf-8")
    for name in SHARDS:
        (tmp_path / name).write_bytes(bytes(10))
    assert num_weight_bytes(tmp_path) == 20
    (tmp_path / "model.safetensors").write_bytes(bytes(5))
    assert num_weight_bytes(tmp_path) == 5, "transformers loads this one, where it is there"


def test_a_shard_that_is_missing_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(INDEX, encoding="utf-8")
    with pytest.raises(BaseMalformed, match=SHARDS[0]):
        num_weight_bytes(tmp_path)


@pytest.mark.parametrize("base_model", ["no-such-folder", "./no/such", "/no/such", "a/b/c", "a/b.gguf"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_without_asking_a_hub(base_model: str) -> None:
    with pytest.raises(BaseNotFound, match=f"base_model must be {re.escape(BASE_MODEL_HELP)}") as refused:
        base_on_disk(base_model)
    assert refused.value.base_model == base_model
    assert base_on_disk("someone/base") is None


@pytest.mark.parametrize(
    ("files", "missing"), [((), r"config\.json"), (("config.json",), "safetensors of transformers")]
)
def test_a_repository_of_gguf_files_alone_is_told_what_to_do(
    files: Sequence[str], missing: str, make_hub: Callable[[Sequence[str]], FakeHub]
) -> None:
    """Those with a config.json were taken for a base whose weights are damaged."""
    make_hub(["README.md", "model.Q4_K_M.gguf", *files])
    with pytest.raises(BaseNotFound, match=f"no {missing}; if it holds GGUF files, download one and name its path"):
        find_base("someone/base")


@pytest.mark.parametrize("base_model", ["x" * 300, "~no-such-user/base"])
def test_a_path_that_the_system_refuses_is_a_sentence(base_model: str) -> None:
    """The system's error went through as a traceback, on the server already where its settings name the base."""
    with pytest.raises(BaseNotFound, match=r"its path cannot be used|no such folder"):
        base_on_disk(base_model)
    assert Settings(base_model=base_model).base_name
