"""What the fingerprints of a base see, and that server and trainer go by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import server.model.loader
import trainer.base
from base_files.errors import BaseMalformed
from base_files.fingerprint import base_fingerprint, base_fingerprint_v2
from tests.contract.large_base import SIZES, contents, write_base

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "fingerprint.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["folder"])
def test_a_base_has_the_golden_fingerprints(case: dict[str, str]) -> None:
    assert base_fingerprint(HERE / case["folder"]) == case["fingerprint"]
    assert base_fingerprint_v2(HERE / case["folder"]) == case["fingerprint_v2"]


def test_server_and_trainer_load_a_base_with_these_fingerprints() -> None:
    case = next(case for case in VECTORS["cases"] if case["folder"] == "tiny_base")
    golden = (case["fingerprint"], case["fingerprint_v2"])
    trained = trainer.base.load_base(str(HERE / "tiny_base"))
    assert (trained.fingerprints.v1, trained.fingerprints.v2) == golden
    served = server.model.loader.load_base(
        str(HERE / "tiny_base"), name="tiny", device="cpu", dtype="float32", max_model_len=32
    )
    assert (served.signature.fingerprint, served.signature.fingerprint_v2) == golden
    served.close()


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_of_large_tensors_the_same_windows_are_read_however_they_are_divided(shards: int, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", contents(), shards=shards)
    assert base_fingerprint_v2(folder) == VECTORS["large_base"]["fingerprint_v2"]


@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if size])
def test_a_change_at_either_end_of_any_tensor_is_seen(name: str, tmp_path: Path) -> None:
    for number, place in enumerate((0, SIZES[name] - 1)):
        tensors = contents()
        tensors[name][place] ^= 1
        assert (
            base_fingerprint_v2(write_base(tmp_path / str(number), tensors)) != VECTORS["large_base"]["fingerprint_v2"]
        )


MEBIBYTE, WINDOW = 1_048_576, 16_384


@pytest.mark.parametrize(
    ("place", "seen"),
    [
        (WINDOW - 1, True),
        (WINDOW, False),
        (MEBIBYTE - 1, False),
        (MEBIBYTE, True),
        (MEBIBYTE + WINDOW - 1, True),
        (2 * MEBIBYTE + WINDOW, False),
        (3 * MEBIBYTE + 77 - WINDOW - 1, False),
        (3 * MEBIBYTE + 77 - WINDOW, True),
    ],
)
def test_of_each_mebibyte_of_a_tensor_the_first_16_kibibytes_are_seen_and_the_last_of_all(
    place: int, seen: bool, tmp_path: Path
) -> None:
    tensors = contents()
    tensors["lm_head.weight"][place] ^= 1
    found = base_fingerprint_v2(write_base(tmp_path / "base", tensors))
    assert (found != VECTORS["large_base"]["fingerprint_v2"]) is seen


def write_model(folder: Path, *, merged: bool) -> Path:
    """A base in bfloat16 with an embedding and a head at the file's ends, and between them a linear, in which a LoRA
    delta may be merged."""
    folder.mkdir()
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=source) * 0.02
    if merged:
        weight += torch.randn(256, 4, generator=source) @ torch.randn(4, 256, generator=source) * 1e-3
    save_file(
        {
            "a.embed_tokens.weight": torch.ones(256, 256, dtype=torch.bfloat16),
            "b.layers.0.self_attn.q_proj.weight": weight.bfloat16(),
            "c.lm_head.weight": torch.ones(256, 256, dtype=torch.bfloat16),
        },
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_fine_tune_that_leaves_the_edges_as_they_were_is_another_base(tmp_path: Path) -> None:
    """Version 1 takes a base with a merged LoRA for the base itself, so that its adapters were served as verified."""
    base, tuned = write_model(tmp_path / "base", merged=False), write_model(tmp_path / "tuned", merged=True)
    assert base_fingerprint(base) == base_fingerprint(tuned)
    assert base_fingerprint_v2(base) != base_fingerprint_v2(tuned)


@pytest.mark.parametrize("field", ["hidden_size", "model_type"])
def test_another_architecture_is_another_base(field: str, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", contents())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {field: "other"}), encoding="utf-8")
    assert base_fingerprint_v2(folder) != VECTORS["large_base"]["fingerprint_v2"]


def test_what_no_weight_depends_on_is_the_same_base(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", contents())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": False}), encoding="utf-8")
    (folder / "consolidated.safetensors").write_bytes(b"other weights")
    assert base_fingerprint_v2(folder) == VECTORS["large_base"]["fingerprint_v2"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _backwards(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"data_offsets": [0, 0]', b'"data_offsets": [9, 0]'))


@pytest.mark.parametrize(
    "spoil",
    [_cut, _backwards, lambda path: path.write_bytes(b"\xff" * 16), lambda path: path.write_bytes(b""), Path.unlink],
    ids=["cut off", "offsets backwards", "a header without end", "empty", "missing"],
)
def test_a_malformed_file_is_refused(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", contents())
    spoil(folder / "model.safetensors")
    with pytest.raises(BaseMalformed, match="missing or malformed"):
        base_fingerprint_v2(folder)
