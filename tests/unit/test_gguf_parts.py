"""A split GGUF is one model, whichever part is named; the one model of a folder is found, and what is none is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from base_files.gguf.file import check_is_model, find_gguf, read_gguf

NAMES = [f"blk.{block}.attn_q.weight" for block in range(5)]


def write(
    path: Path, *, tensors: list[str] = NAMES, keys: Mapping[str, Any] | None = None, alignment: int = 0, **options: Any
) -> None:
    """One file, or parts where ``options`` of gguf's writer say so; the file without ``.gguf`` is the parts' stem."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in (keys or {}).items():
        add: Any = {str: writer.add_string, int: writer.add_uint16, list: writer.add_array}[type(value)]
        add(key, value)
    for number, name in enumerate(tensors):
        writer.add_tensor(name, np.full((2, 32), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split(folder: Path, stem: str = "model", **options: Any) -> list[Path]:
    """Three parts of two, two and one tensors."""
    write(folder / f"{stem}.gguf", split_max_tensors=2, keys={"llama.block_count": 5}, **options)
    return sorted(folder.glob(f"{stem}-*.gguf"))


def part(path: Path, number: int, count: int = 3, *, total: int = 5, **more: Any) -> None:
    """A part in place of another one."""
    fields = {"split.no": number, "split.count": count, "split.tensors.count": total}
    write(path, keys={**fields, **more.pop("keys", {})}, **more)


@pytest.mark.parametrize("number", range(3))
def test_a_split_model_is_read_whole_from_any_of_its_parts(number: int, tmp_path: Path) -> None:
    parts = split(tmp_path)
    found = read_gguf(parts[number])
    assert found.paths == tuple(parts) and found.path == parts[0]
    assert found.metadata["llama.block_count"] == 5
    assert [found.read(name)[1, 7] for name in NAMES] == [0, 1, 2, 3, 4]
    assert [found.tensors[name].path for name in NAMES] == [parts[number // 2] for number in range(5)]


def test_a_first_part_without_tensors_is_one(tmp_path: Path) -> None:
    parts = split(tmp_path, small_first_shard=True)
    assert len(parts) == 4 and read_gguf(parts[0]).tensors.keys() == set(NAMES)


def test_a_split_of_one_is_a_file_like_any_other(tmp_path: Path) -> None:
    part(tmp_path / "any name.gguf", 0, 1)
    assert read_gguf(tmp_path / "any name.gguf").tensors.keys() == set(NAMES)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first, second, _ = split(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match=r"its part model-00002-of-00003\.gguf is missing"):
        read_gguf(first)


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    first, second, _ = split(tmp_path)
    for other in (tmp_path / "model.gguf", tmp_path / "model-00003-of-00003.gguf"):
        shutil.copy(second, other)
        with pytest.raises(ValueError, match=r"its name is not NAME-00002-of-00003\.gguf"):
            read_gguf(other)
    with pytest.raises(ValueError, match=r"model-00003-of-00003\.gguf: split\.no is 1, and by its place .* it is 2"):
        read_gguf(first)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"number": 1, "count": 4}, r"split\.count is 4, and by its place among the parts it is 3"),
        ({"number": 1, "tensors": NAMES[1:3]}, r"tensor blk\.1\.attn_q\.weight is in model-00001-of-00003\.gguf too"),
        ({"number": 1, "tensors": NAMES[2:4], "total": 6}, r"split\.tensors\.count is 6, and all parts hold 5"),
        ({"number": 1, "tensors": NAMES[2:3]}, r"split\.tensors\.count is 5, and all parts hold 4"),
        ({"number": 1, "keys": {"split.count": "3"}}, r"split\.count is '3': it must be a number"),
        ({"number": 1, "keys": {"split.no": [1, 2]}}, r"split\.no is array\(\[1, 2\].*: it must be a number"),
        ({"number": 1, "keys": {"llama.block_count": 6}}, r"llama\.block_count is not as in model-00001"),
        ({"number": 1, "keys": {"llama.rope.freq_base": 6}}, r"llama\.rope\.freq_base is not as in"),
    ],
)  # fmt: skip
def test_a_part_that_does_not_belong_to_the_others_is_refused(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    first, second, _ = split(tmp_path)
    part(second, **{"tensors": NAMES[2:4], **fields})
    with pytest.raises(ValueError, match=rf"model-0000\d-of-00003\.gguf: {words}"):
        read_gguf(first)


def test_parts_of_another_alignment_are_refused(tmp_path: Path) -> None:
    """gguf's writer aligns all parts as the first says, llama.cpp reads each by its own: one of them would be wrong."""
    first, *_ = split(tmp_path, alignment=64)
    with pytest.raises(
        ValueError, match=r"model-00002-of-00003\.gguf: its alignment is 32, that of model-00001.* is 64"
    ):
        read_gguf(first)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    first, _, third = split(tmp_path)
    third.write_bytes(third.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"model-00003-of-00003\.gguf: the file is truncated"):
        read_gguf(first)
    os.truncate(third, 0)
    with pytest.raises(ValueError, match=r"model-00003-of-00003\.gguf: the header is truncated"):
        read_gguf(first)


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "adapter": ({"general.type": "adapter"}, "a LoRA adapter"),
    "mmproj": ({"general.type": "mmproj"}, r"a projector of images or sound \(mmproj\)"),
    "old mmproj": ({"general.architecture": "clip"}, r"a projector of images or sound \(mmproj\)"),
    "control vector": ({"general.architecture": "controlvector"}, "a control vector"),
    "importance matrix": ({"general.type": "imatrix"}, "an importance matrix"),
    "vocabulary": ({"general.type": "vocab"}, "a vocabulary without weights"),
    "unknown": ({"general.type": "diffusion"}, "of general.type 'diffusion'"),
    "no text": ({"general.type": [1, 2]}, "of general.type"),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_what_is_no_model_is_refused_by_what_it_is(case: str, tmp_path: Path) -> None:
    keys, words = KINDS[case]
    write(tmp_path / "a.gguf", keys=keys)
    with pytest.raises(ValueError, match=f"it is {words}.*, no model"):
        check_is_model(read_gguf(tmp_path / "a.gguf").metadata)


@pytest.mark.parametrize("keys", [{}, {"general.type": "model"}])
def test_a_model_is_one_with_and_without_a_type(keys: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", keys=keys)
    check_is_model(read_gguf(tmp_path / "a.gguf").metadata)


def test_the_one_model_of_a_folder_is_found(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None
    (tmp_path / "README.md").touch()
    write(tmp_path / "model.GGUF")
    assert find_gguf(tmp_path) == tmp_path / "model.GGUF"
    write(tmp_path / "a-mmproj.gguf", keys={"general.type": "mmproj"})
    write(tmp_path / "adapter.gguf", keys={"general.type": "adapter"})
    assert find_gguf(tmp_path) == tmp_path / "model.GGUF"


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    parts = split(tmp_path)
    assert find_gguf(tmp_path) == parts[0]
    write(tmp_path / "mmproj.gguf", keys={"general.type": "mmproj"})
    assert find_gguf(tmp_path) == parts[0]
    parts[0].unlink()
    found = find_gguf(tmp_path)
    assert found is not None
    with pytest.raises(ValueError, match=r"its part model-00001-of-00003\.gguf is missing"):
        read_gguf(found)


def test_several_models_in_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("q4", "q8"):
        write(tmp_path / f"{name}.gguf")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"3 models in GGUF: name the file, one of q4\.gguf, q8\.gguf, torn\.gguf"):
        find_gguf(tmp_path)


def test_a_folder_of_nothing_but_companions_has_no_model(tmp_path: Path) -> None:
    """Whoever reads a file that is alone says the same of it."""
    write(tmp_path / "a.gguf", keys={"general.type": "adapter"})
    assert find_gguf(tmp_path) == tmp_path / "a.gguf"
    write(tmp_path / "b.gguf", keys={"general.type": "mmproj"})
    with pytest.raises(ValueError, match=r"no model in GGUF: a\.gguf is a LoRA adapter .*, b\.gguf is a projector"):
        find_gguf(tmp_path)
