"""Adapters for another base beside those of this one: listed as such, without warnings, and named by a 404."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from server.adapters.aliases import parse_aliases
from server.adapters.content.manifest import read_manifest
from server.errors import AdapterRejected, ModelNotFound
from tests.adapter_folders import BASE, LIMITS, PREFIX, SIDECAR, AdapterHarness, make, write
from tests.unit.test_refusals_told import answers

OTHER = {"name": "smollm2", "fingerprint": "sha256:" + "b" * 64}


def foreign(folder: Path, name: str, *, base: str = "smollm2") -> Path:
    path = make(folder, name)
    write(path, sidecar=SIDECAR | {"base": OTHER | {"name": base}})
    return path


def wide(path: Path) -> None:
    """Replace the tensors by some that do not fit the base."""
    tensors = {f"{PREFIX}q_proj.lora_A.weight": torch.ones(2, 60), f"{PREFIX}q_proj.lora_B.weight": torch.ones(40, 2)}
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")


@pytest.fixture
def harness(tmp_path: Path) -> AdapterHarness:
    return AdapterHarness(tmp_path)


def rejections(harness: AdapterHarness) -> float | None:
    return harness.metrics.registry.get_sample_value("quickchange_adapter_rejections_total")


async def test_at_start_they_are_one_info_line_and_no_rejection(
    harness: AdapterHarness, caplog: pytest.LogCaptureFixture
) -> None:
    make(harness.first, "own")
    foreign(harness.first, "b")
    foreign(harness.first, "a")
    foreign(harness.first, "q", base="org/Qwen")
    with caplog.at_level(logging.INFO):
        await harness.watcher.start()
    assert caplog.messages == ["3 adapter folders are for other bases and not served: a, b (smollm2); q (Qwen)"]
    assert (harness.names, rejections(harness)) == (["own"], 0)


async def test_a_single_one_is_told_in_the_singular(harness: AdapterHarness, caplog: pytest.LogCaptureFixture) -> None:
    foreign(harness.first, "a")
    with caplog.at_level(logging.INFO):
        await harness.watcher.start()
    assert caplog.messages == ["1 adapter folder is for another base and not served: a (smollm2)"]


async def test_a_request_is_told_which_base_it_is_for_and_which_runs(harness: AdapterHarness) -> None:
    foreign(harness.first, "a")
    make(harness.first, "own")
    await harness.watcher.start()
    for error in await answers(harness, "a"):
        assert error["message"].startswith("The adapter `a` is not served: it was trained on another base (smollm2")
        assert "; this server runs base (" in error["message"]
    harness.adapters.set_aliases(parse_aliases(b'poet = "a"'))
    for model in ("own+a", "poet", "a:0.5"):
        with pytest.raises(ModelNotFound, match=r"`a` is not served: it was trained on another base \(smollm2"):
            await harness.adapters.acquire(model)


async def test_a_folder_replaced_by_an_adapter_of_this_base_is_served(
    harness: AdapterHarness, caplog: pytest.LogCaptureFixture
) -> None:
    path = foreign(harness.first, "a")
    await harness.watcher.start()
    write(path, sidecar=SIDECAR)
    await harness.watcher.scan()
    assert (harness.names, harness.sync.refusals, harness.sync.other_bases) == (["a"], {}, {})
    caplog.clear()
    with caplog.at_level(logging.INFO):
        foreign(harness.first, "late")
        await harness.watcher.scan()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "adapter folder late is not served: it was trained on another base (smollm2" in caplog.text


async def test_a_served_adapter_replaced_by_one_of_another_base_stays(
    harness: AdapterHarness, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(harness.first, "a")
    await harness.watcher.start()
    label = await harness.use("a")
    with caplog.at_level(logging.INFO):
        write(path, sidecar=SIDECAR | {"base": OTHER})
        await harness.watcher.scan()
    assert await harness.use("a") == label
    assert caplog.text.count("; the previous version is still served") == 1


async def test_the_same_name_with_other_weights_is_refused_aloud(
    harness: AdapterHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter of an earlier version of this base: whoever put it there expects it to work."""
    foreign(harness.first, "a", base="org/Base")
    await harness.watcher.start()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert rejections(harness) == 1


async def test_a_base_served_under_another_name_is_known_by_the_setting_too(tmp_path: Path) -> None:
    path = foreign(tmp_path, "a")
    with pytest.raises(AdapterRejected) as refused:
        read_manifest(path, replace(BASE, setting="models/smollm2"), LIMITS)
    assert refused.value.other_base is None


@pytest.mark.parametrize(
    ("named", "other"),
    [
        ("org/SmolLM2", "SmolLM2"),
        ("C:\\models\\SmolLM2", "SmolLM2"),
        ("/models/base", None),
        ("", None),
        (None, None),
        (7, None),
    ],
)
def test_without_a_sidecar_name_and_shapes_decide(tmp_path: Path, named: object, other: str | None) -> None:
    path = make(tmp_path, "a", base_model_name_or_path=named)
    wide(path)
    with pytest.raises(AdapterRejected, match="tensors do not fit the base base") as refused:
        read_manifest(path, BASE, LIMITS)
    assert refused.value.other_base == other


def test_an_adapter_that_fits_is_served_whatever_base_its_config_names(tmp_path: Path) -> None:
    """Copies and fine-tunes of a base have other names."""
    assert read_manifest(make(tmp_path, "a", base_model_name_or_path="org/Other"), BASE, LIMITS).base_check == "shapes"


def test_a_broken_adapter_that_names_another_base_is_refused_aloud(tmp_path: Path) -> None:
    path = make(tmp_path, "a", base_model_name_or_path="org/Other", r=4)
    with pytest.raises(AdapterRejected, match="have rank 2") as refused:
        read_manifest(path, BASE, LIMITS)
    assert refused.value.other_base is None


def test_its_reason_is_one_printable_line(tmp_path: Path) -> None:
    path = foreign(tmp_path, "a", base="bad\n\x1b[31mname")
    with pytest.raises(AdapterRejected) as refused:
        read_manifest(path, BASE, LIMITS)
    assert refused.value.other_base == "bad\\n\\x1b[31mname"
    assert json.dumps(refused.value.reason).isprintable()
