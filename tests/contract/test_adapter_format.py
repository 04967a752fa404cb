"""What server and trainer share of an adapter folder; what its JSON schema accepts is a sidecar, and nothing else."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file

from adapter_format.messages import end_token_ids, plain_messages, with_system_prompt
from adapter_format.publishing import published_folder
from adapter_format.sidecar import parse_sidecar

HERE = Path(__file__).parent
VALID = sorted(HERE.glob("sidecar_valid_*.json"))
INVALID = sorted(HERE.glob("sidecar_invalid_*.json"))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


SCHEMA = _read(HERE / "sidecar.schema.json")


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_valid_sidecar_is_read_and_written_again_says_the_same(path: Path) -> None:
    jsonschema.validate(_read(path), SCHEMA)
    assert json.loads(parse_sidecar(_read(path)).to_json()) == _read(path)


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_sidecar_is_refused_with_the_field(path: Path) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(_read(path), SCHEMA)
    with pytest.raises(ValueError, match=r"quickchange\.json: "):
        parse_sidecar(_read(path))


SYSTEM, USER = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    "messages", [[SYSTEM, USER], [USER, SYSTEM], [USER, {"role": "developer", "content": "Be kind."}]]
)
def test_a_system_prompt_gives_way_to_a_system_turn_wherever_it_stands(messages: list[dict[str, str]]) -> None:
    """The trainer once looked at the first turn alone, so that it trained two system turns where the server has one."""
    assert with_system_prompt(messages, "Be brief.") == messages
    assert with_system_prompt([USER], "Be brief.") == [{"role": "system", "content": "Be brief."}, USER]


def test_messages_become_what_templates_expect() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "tool_calls": [call, {"function": {"name": "odd", "arguments": "{"}}]},
    ]
    plain = plain_messages(messages, "{{ messages }}")
    assert plain[0] == {"role": "system", "content": "one\ntwo"}
    assert [one["function"]["arguments"] for one in plain[1]["tool_calls"]] == [{"a": 1}, "{"]
    assert plain_messages(messages, "{% if role == 'developer' %}")[0]["role"] == "developer"
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}, "what was given stays as it was"


def test_every_token_that_the_base_names_ends_a_turn() -> None:
    tokenizer = SimpleNamespace(eos_token_id=2)
    config, generation = SimpleNamespace(eos_token_id=5), SimpleNamespace(eos_token_id=[7, 8])
    assert end_token_ids(SimpleNamespace(config=config, generation_config=generation), tokenizer) == {2, 7, 8}
    assert end_token_ids(SimpleNamespace(config=config), tokenizer) == {2, 5}
    nothing = SimpleNamespace(eos_token_id=None)
    assert end_token_ids(SimpleNamespace(config=nothing, generation_config=nothing), nothing) == frozenset()


@pytest.mark.parametrize("num_renames", [0, 1])
def test_an_interrupt_between_the_renames_keeps_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_renames: int
) -> None:
    """Ctrl-C left the adapter under another name, which the next process with the same id deleted."""
    target = tmp_path / "fox"
    with published_folder(target) as partial:
        (partial / "a").write_text("old")
    stock, done = Path.rename, []

    def interrupted(path: Path, to: Path) -> Path:
        done.append(path)
        if len(done) == num_renames + 1:
            raise KeyboardInterrupt
        return stock(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), published_folder(target, replace=True) as partial:
        (partial / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["fox"]
    assert (target / "a").read_text() == "old"


def test_an_adapter_that_a_killed_process_moved_aside_is_moved_back(tmp_path: Path) -> None:
    """A process with the same id, which in a container is every process, deleted it."""
    target, old = tmp_path / "fox", tmp_path / f".fox.old-{os.getpid()}"
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(RuntimeError), published_folder(target, replace=True):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["fox"]
    assert (target / "a").read_text() == "old"


def test_a_folder_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "adapters" / "fox"
    with published_folder(target) as partial:
        (partial / "a").write_text("new")
        assert not target.exists() and partial.name.startswith(".")
    assert (target / "a").read_text() == "new"
    with pytest.raises(RuntimeError), published_folder(target, replace=True) as partial:
        raise RuntimeError
    with pytest.raises(OSError, match="not empty"), published_folder(target) as partial:
        (partial / "a").write_text("another's")
    assert [path.name for path in target.parent.iterdir()] == ["fox"]
    assert (target / "a").read_text() == "new"


def test_a_full_disk_is_an_error_that_names_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    """safetensors raises an exception of its own for it, so that commands ended in a traceback."""
    target = tmp_path / "fox"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=r"fox cannot be written: .*File too large"),
            published_folder(target) as partial,
        ):
            save_file({"a": np.zeros(4096)}, partial / "adapter_model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
