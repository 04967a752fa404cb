"""``quickchange adapters``: what each sub-command says and leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from base_files.fingerprint import base_fingerprint_v2
from server.__main__ import main
from server.adapters.versions import Pin, VersionStore
from server.cli.adapters import COMMANDS
from tests.adapter_folders import AdapterHarness, make, tensors, write
from tests.serving import ROOT
from tests.tiny_models import build_tiny_base

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"0"}
OLD, MIDDLE, NEW = "aa11" + "0" * 60, "bb22" + "0" * 60, "bb33" + "0" * 60

Run = Callable[..., int]


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    """Three versions of helpdesk."""
    store = VersionStore(tmp_path / "state", keep=3)
    for digest in (OLD, MIDDLE, NEW):
        store.put("helpdesk", digest, FILES)
    return store


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return lambda *words: main(["adapters", *words, "--state-dir", str(tmp_path / "state")])


def test_an_unknown_sub_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "dance"]) == 2
    said = capsys.readouterr()
    assert "there is no command 'dance'" in said.err and "quickchange adapters check DIR|NAME" in said.err
    assert said.out == ""


def test_help_names_every_sub_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    assert main(["help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_sub_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["adapters", command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"quickchange adapters {command}" in said and "quickchange serve" in said


@pytest.mark.parametrize(
    "before",
    [
        ["--state-dir", "STATE"],
        ["--state-dir=STATE", "--no-prefix-caching"],
        ["--base-model", "list", "--state-dir", "STATE"],
    ],
)
def test_settings_may_stand_before_the_command(store: VersionStore, before: list[str]) -> None:
    """The command's name was an unrecognized argument there."""
    settings = [word.replace("STATE", str(store.state_dir)) for word in before]
    assert main(["adapters", *settings, "pin", "helpdesk"]) == 0
    assert store.pins() == {"helpdesk": Pin(None, resident=True)}


def test_what_is_no_command_behind_a_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["adapters", "--log-level", "info", "dance"])
    assert "dance" in capsys.readouterr().err


def test_a_name_is_kept_in_memory_and_stays_at_its_version(store: VersionStore, run: Run) -> None:
    store.set_pin("helpdesk", Pin(OLD))
    assert run("pin", "helpdesk") == 0
    assert store.pins() == {"helpdesk": Pin(OLD, resident=True)}


@pytest.mark.parametrize("version", ["aa11", "AA11", "aa110", OLD])
def test_a_name_is_held_at_the_version_that_begins_so_and_stays_in_memory(
    store: VersionStore, run: Run, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store.set_pin("helpdesk", Pin(resident=True))
    assert run("pin", f"helpdesk@{version}") == 0
    assert store.pins() == {"helpdesk": Pin(OLD, resident=True)}
    assert capsys.readouterr().out.startswith("helpdesk is pinned to aa1100000000 (20")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("helpdesk@cc44", "no kept version of helpdesk begins with cc44; kept, newest first: bb3300000000 (20"),
        ("helpdesk@bb", "'bb' is no version: write the first 4 to 64 hex digits; kept, newest first: bb33"),
        ("helpdesk@main", "'main' is no version"),
        ("helpdesk@", "'' is no version"),
        ("../x", "'../x' is no adapter's name"),
        ("heldpesk@aa11", "no kept version of heldpesk begins with aa11; "),
    ],
)
def test_what_is_no_kept_version_is_refused_with_what_there_is(
    store: VersionStore, run: Run, words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pin", words) == 1
    assert sentence in capsys.readouterr().err
    assert store.pins() == {}


def test_a_beginning_that_several_versions_share_is_refused_with_all_of_them(
    store: VersionStore, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    store.put("helpdesk", "bb3344" + "0" * 58, FILES)
    assert run("pin", "helpdesk@bb33") == 1
    said = capsys.readouterr().err
    assert "2 versions of helpdesk begin with bb33" in said and "bb3344000000" in said and "bb3300000000" in said


def test_a_name_that_was_never_kept_is_told_by_the_names_that_were(
    store: VersionStore, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rollback", "heldpesk") == 1
    assert "keeps no version of heldpesk, only of helpdesk" in capsys.readouterr().err
    assert run("pin", "heldpesk") == 0
    assert "as soon as it exists" in capsys.readouterr().out


def test_a_pin_is_taken_away(store: VersionStore, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    store.set_pin("helpdesk", Pin(OLD, resident=True))
    assert run("unpin", "helpdesk") == 0
    assert capsys.readouterr().out == "helpdesk is no longer pinned to aa1100000000 nor kept in memory\n"
    assert run("unpin", "helpdesk") == 0
    assert capsys.readouterr().out == "helpdesk was not pinned\n"
    assert store.pins() == {}


def test_rolling_back_goes_one_version_at_a_time_until_there_is_none(
    store: VersionStore, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    store.set_pin("helpdesk", Pin(resident=True))
    for version in (MIDDLE, OLD):
        assert run("rollback", "helpdesk") == 0
        assert store.pins() == {"helpdesk": Pin(version, resident=True)}
    assert run("rollback", "helpdesk") == 1
    assert "helpdesk has no version before the served one" in capsys.readouterr().err
    assert store.pins()["helpdesk"].version == OLD


def test_rolling_back_from_a_version_that_is_gone_goes_to_the_newest(store: VersionStore, run: Run) -> None:
    store.set_pin("helpdesk", Pin("cc44" + "0" * 60))
    assert run("rollback", "helpdesk") == 0
    assert store.pins()["helpdesk"].version == NEW


@pytest.mark.parametrize("command", ["pin", "unpin", "rollback"])
def test_without_a_state_directory_it_says_how_to_set_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", command, "helpdesk"]) == 1
    said = capsys.readouterr().err
    assert "--state-dir" in said and "QUICKCHANGE_STATE_DIR" in said


def test_the_state_directory_may_come_from_the_environment_or_before_the_name(
    store: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["adapters", "pin", "--state-dir", str(store.state_dir), "--no-demo-adapters", "helpdesk"]) == 0
    monkeypatch.setenv("QUICKCHANGE_STATE_DIR", str(store.state_dir))
    assert main(["adapters", "pin", "helpdesk@aa11"]) == 0
    assert store.pins() == {"helpdesk": Pin(OLD, resident=True)}


def test_a_state_directory_that_is_none_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["adapters", "pin", "helpdesk", "--state-dir", str(tmp_path / "file")]) == 1
    assert "file cannot be used: Not a directory" in capsys.readouterr().err


def test_pins_are_set_without_torch(tmp_path: Path) -> None:
    """They are for scripts, and importing torch takes seconds."""
    program = f"""import sys; from server.__main__ import main
assert main(["adapters", "pin", "helpdesk", "--state-dir", {str(tmp_path)!r}]) == 0
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.splitlines()[-1:], done.stderr) == (["[]"], "")


async def test_a_running_server_obeys(tmp_path: Path, run: Run) -> None:
    harness = AdapterHarness(tmp_path, state=True)
    path = make(harness.first, "helpdesk")
    await harness.watcher.scan()
    old = await harness.version("helpdesk")
    write(path, weights={name: 2 * tensor for name, tensor in tensors().items()})
    await harness.watcher.scan()
    new = await harness.version("helpdesk")
    assert new != old
    assert run("rollback", "helpdesk") == 0
    await harness.watcher.scan()
    assert await harness.version("helpdesk") == old
    assert run("unpin", "helpdesk") == 0
    await harness.watcher.scan()
    assert await harness.version("helpdesk") == new


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


def put(folder: Path, name: str, **config: Any) -> Path:
    """An adapter of rank 2 on one linear of the tiny base."""
    path = folder / name
    path.mkdir(parents=True)
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(said | config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    weights = {f"{prefix}A.weight": torch.ones(2, 32), f"{prefix}B.weight": torch.ones(32, 2)}
    safetensors.torch.save_file(weights, path / "adapter_model.safetensors")
    return path


def test_the_list_has_folders_pins_kept_versions_and_aliases(
    tmp_path: Path, base: Path, store: VersionStore, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapters"
    path = put(folder, "good")
    put(folder, "bad", use_qalora=True, layer_replication=[[0, 1]])
    store.put("good", OLD, FILES)
    store.set_pin("good", Pin(OLD, resident=True))
    store.set_pin("helpdesk", Pin("cc44" + "0" * 60))
    (folder / "aliases.toml").write_text(
        'good = "bad"\nlost = "nobody"\nsupport = {"helpdesk@bb22" = 9, "helpdesk@bb33" = 1}\n'
    )
    assert run("--base-model", str(base), "--threads", "1", "--adapters-dir", str(folder)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("bad: NOT SERVED: ") and "use_qalora" in lines[0] and "layer_replication" in lines[0]
    assert lines[1].startswith("good@") and lines[1].endswith(f": rank 2, 1 modules, 0.0 MB, {path}")
    assert lines[2] == "    pinned at aa1100000000, kept in memory"
    assert lines[3].startswith("    versions: aa1100000000 (20")
    assert lines[4:6] == ["helpdesk: no folder of this name", "    pinned at cc4400000000, NOT SERVED: it is not kept"]
    assert [word for word in lines[6].split() if len(word) == 12] == [NEW[:12], MIDDLE[:12], OLD[:12]]
    assert lines[7:] == [
        "alias good -> bad (not used: something else has this name)",
        "alias lost -> nobody (there is no adapter nobody)",
        "alias support -> helpdesk@bb22 (90%), helpdesk@bb33 (10%)",
    ]


def test_a_list_without_faults_ends_well(
    tmp_path: Path, base: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(tmp_path / "adapters", "good")
    signed = put(tmp_path / "adapters", "signed")
    said = {"name": "tiny", "fingerprint_v2": base_fingerprint_v2(base)}
    sidecar = {"schema_version": 2, "base": said, "created": "2026-01-01T00:00:00Z", "verdict": {"status": "fail"}}
    (signed / "quickchange.json").write_text(json.dumps(sidecar))
    settings = ["--base-model", str(base), "--threads", "1", "--adapters-dir", str(tmp_path / "adapters")]
    assert run("list", *settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f": rank 2, 1 modules, 0.0 MB, {path}")
    assert lines[1].endswith(f": rank 2, 1 modules, 0.0 MB, base by fingerprint_v2, verdict fail, {signed}")
    (tmp_path / "adapters/aliases.toml").write_text("good = 3")
    assert run("list", *settings) == 1
    assert "aliases.toml: NOT USED: " in capsys.readouterr().out


def test_an_adapter_for_another_base_is_listed_as_such_and_is_no_fault(
    tmp_path: Path, base: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapters"
    other = put(folder, "other")
    sidecar = {"base": {"name": "smollm2", "fingerprint": "sha256:" + "b" * 64}, "created": "2026-01-01T00:00:00Z"}
    (other / "quickchange.json").write_text(json.dumps({"schema_version": 1} | sidecar))
    (folder / "aliases.toml").write_text('poet = {"other" = 1, "lost" = 1}\n')
    settings = ["--base-model", str(base), "--threads", "1", "--adapters-dir", str(folder)]
    assert run("list", *settings) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"other: for another base: smollm2, {other}",
        "alias poet -> other (50%), lost (50%) (other is for another base: smollm2; there is no adapter lost)",
    ]
    assert run("check", "other", "--no-probe", *settings) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{other}: NOT SERVED, for another base: smollm2"
    problems = [line for line in lines if line.startswith("  problem ")]
    assert len(problems) == 1 and "it was trained on another base (smollm2, fingerprint" in problems[0]
    assert "start the server with that base, or train the adapter again" in problems[0]


def test_what_is_kept_is_listed_where_there_are_no_folders(
    tmp_path: Path, store: VersionStore, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list", "--no-demo-adapters", "--adapters-dir", str(tmp_path / "none")) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"no adapters in {tmp_path / 'none'}\nhelpdesk: no folder of this name\n    versions: bb33")


def test_links_are_judged_as_by_the_server(
    tmp_path: Path, base: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its aliases were read through any link, and waited for where they were a FIFO."""
    folder, aliases = tmp_path / "adapters", tmp_path / "adapters" / "aliases.toml"
    (folder / "in").parent.mkdir()
    (folder / "in").symlink_to(put(folder, ".kept").name)
    (folder / "out").symlink_to(put(tmp_path, "outside"))
    (tmp_path / "elsewhere.toml").write_text('support = "in"\n')
    aliases.symlink_to(tmp_path / "elsewhere.toml")
    settings = ["--base-model", str(base), "--threads", "1", "--adapters-dir", str(folder)]
    assert run("list", *settings) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("in@") and "out: NOT SERVED: the folder is a link to '" in lines[1]
    assert "aliases.toml: NOT USED: aliases.toml is a link to '" in lines[2] and "leads outside" in lines[2]
    assert run("list", *settings, "--adapter-roots", str(tmp_path)) == 0
    assert capsys.readouterr().out.splitlines()[2] == "alias support -> in"
    aliases.unlink()
    os.mkfifo(aliases)
    assert run("list", *settings) == 1
    assert "aliases.toml is not a regular file" in capsys.readouterr().out
