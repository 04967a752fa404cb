"""Pages of mapped weights go back to the system, whatever the file is called, and nothing else does."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from server.model.mapped_files import MappedFiles
from tests.model.hub_layout import as_in_hub_cache

NUM_BYTES = 1 << 20
SLACK = 64 * 1024
"""Pages at the tensor's edges, which it shares with its neighbours."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"weight": torch.arange(NUM_BYTES // 4, dtype=torch.float32)}, folder / "model.safetensors")
    return folder


def read(path: Path) -> torch.Tensor:
    """The tensor in its mapping, all pages of it in memory."""
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor("weight")
    assert float(tensor.sum()) > 0
    return tensor


def resident(tensor: torch.Tensor) -> int:
    """Bytes in memory of the mapping that holds a tensor, as proc_pid_smaps(5) has them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16)
        elif inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("the tensor lies in no mapping")


def check_given_back(path: Path, files: MappedFiles, tensor: torch.Tensor) -> None:
    assert resident(tensor) >= NUM_BYTES
    files.release(tensor)
    assert resident(tensor) <= SLACK
    assert torch.equal(tensor, read(path)), "it is read again from the file"


def test_pages_of_a_file_go_back(folder: Path) -> None:
    tensor = read(path := folder / "model.safetensors")
    check_given_back(path, MappedFiles([path]), tensor)


def test_pages_of_a_link_into_a_hubs_cache_go_back(folder: Path, tmp_path: Path) -> None:
    """The system names a mapping by the file behind the link, whose name does not end in ``.safetensors``."""
    path = as_in_hub_cache(folder, tmp_path / "cache") / "model.safetensors"
    tensor = read(path)
    check_given_back(path, MappedFiles([path]), tensor)


def forged(tmp_path: Path, change: Callable[[re.Match[str]], str]) -> Path:
    """This process's mappings with device and inode, or the path, as another file system tells them."""
    text = Path("/proc/self/maps").read_text(encoding="utf-8")
    maps = tmp_path / "maps"
    maps.write_text(re.sub(r"([0-9a-f]+:[0-9a-f]+ \d+)( +)(/.*)", change, text), encoding="utf-8")
    return maps


def test_pages_go_back_where_the_mappings_device_is_not_the_files(folder: Path, tmp_path: Path) -> None:
    """As on btrfs and overlayfs."""
    tensor = read(path := folder / "model.safetensors")
    maps = forged(tmp_path, lambda found: f"ff:fe 1{found[2]}{found[3]}")
    check_given_back(path, MappedFiles([path], maps=maps), tensor)


def test_pages_go_back_where_the_mappings_path_is_not_the_files(folder: Path, tmp_path: Path) -> None:
    tensor = read(path := folder / "model.safetensors")
    maps = forged(tmp_path, lambda found: f"{found[1]}{found[2]}/elsewhere (deleted)")
    check_given_back(path, MappedFiles([path], maps=maps), tensor)


def test_pages_of_other_files_and_of_plain_memory_stay(folder: Path, tmp_path: Path) -> None:
    tensor = read(path := folder / "model.safetensors")
    (other := tmp_path / "other.safetensors").write_bytes(path.read_bytes())
    mine = torch.ones(NUM_BYTES // 4)
    files = MappedFiles([other])
    files.release(tensor)
    files.release(mine)
    assert resident(tensor) >= NUM_BYTES and float(mine.sum()) == NUM_BYTES // 4


def test_where_nothing_is_known_of_mappings_nothing_goes_back(folder: Path, tmp_path: Path) -> None:
    tensor = read(path := folder / "model.safetensors")
    MappedFiles([path], maps=tmp_path / os.devnull[1:]).release(tensor)
    assert resident(tensor) >= NUM_BYTES
