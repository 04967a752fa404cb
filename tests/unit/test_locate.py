"""What a base setting finds on this machine, and what the base is called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from base_files.errors import BaseNotFound
from base_files.gguf.base import GGUFBase
from base_files.locate import base_on_disk
from base_files.names import base_name
from base_files.packaged import PACKAGED_BASES, PackagedBase
from base_files.source import FolderBase
from server.settings import Settings
from tests.packaged_base import MODEL, TINY


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedBase:
    """``tiny``, fetched; another folder of this name is in the working folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setitem(PACKAGED_BASES, "tiny", TINY)
    TINY.path().parent.mkdir(parents=True)
    TINY.path().write_bytes(MODEL)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    return TINY


def test_a_packaged_base_its_file_and_its_folder_are_one_file_under_three_names(packaged: PackagedBase) -> None:
    path = packaged.path()
    for base_model, name in (("tiny", "tiny"), (str(path), "tiny.Q4_1"), (str(path.parent), "tiny")):
        found = base_on_disk(base_model)
        assert isinstance(found, GGUFBase) and found.path == path
        assert base_name(base_model) == Settings(base_model=base_model).base_name == found.name == name
    with pytest.raises(BaseNotFound, match=r"no config\.json and no GGUF file"):
        base_on_disk("./tiny")


def test_a_file_is_a_gguf_by_its_bytes_and_its_name_holds_no_path(tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(MODEL)
    assert isinstance(base_on_disk(str(blob)), GGUFBase)
    assert base_name(str(blob)) == "sha256-0123"
    blob.write_bytes(b"PK")
    with pytest.raises(BaseNotFound, match="the file is not a GGUF"):
        base_on_disk(str(blob))


def test_a_folder_with_weights_of_transformers_is_such_a_model_and_else_its_gguf_is(tmp_path: Path) -> None:
    """Repositories of GGUF files often hold a config.json without weights, which was taken for a broken model."""
    (tmp_path / "config.json").write_text("{}")
    assert isinstance(base_on_disk(str(tmp_path)), FolderBase)
    (tmp_path / "model.Q4_1.gguf").write_bytes(MODEL)
    assert isinstance(base_on_disk(str(tmp_path)), GGUFBase)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert isinstance(base_on_disk(str(tmp_path)), FolderBase)


def test_a_packaged_base_that_went_away_is_told_with_the_command(packaged: PackagedBase) -> None:
    shutil.rmtree(packaged.path().parent)
    with pytest.raises(BaseNotFound, match="run: quickchange base get tiny"):
        base_on_disk("tiny")
