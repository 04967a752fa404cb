"""Settings: where they come from, which wins, what a bad one is told, and that the README knows them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from server.cli.command_line import parse_settings
from server.errors import SettingsError
from server.settings import Settings

README = Path(__file__).parents[2] / "README.md"
FIELDS: dict[str, FieldInfo] = Settings.model_fields


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: ``.env`` is read from there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def settings_table() -> str:
    """The README's table of settings."""
    lines = ["| flag | default | |", "|---|---|---|"]
    for name, field in FIELDS.items():
        default = (
            ""
            if field.default is None
            else f"`{str(field.default).lower() if field.default is True else field.default}`"
        )
        choices = choices_of(field)
        description = f"{field.description}{f' One of: {choices}.' if choices else ''}".replace("|", "\\|")
        lines.append(f"| `{flag_of(name)}` | {default} | {description} |")
    return "\n".join(lines)


def choices_of(field: FieldInfo) -> str:
    """The values of a ``Literal``."""
    values: tuple[Any, ...] = get_args(field.annotation)
    return ", ".join(f"`{value}`" for value in values if isinstance(value, str))


def test_the_readme_has_every_setting_with_its_default_and_description() -> None:
    text = README.read_text(encoding="utf-8")
    assert "<!-- settings -->" in text, "the README's table of settings stands between two markers"
    printed = text.partition("<!-- settings -->")[2].partition("<!-- /settings -->")[0].strip()
    assert printed == settings_table()


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_described_in_a_sentence(name: str) -> None:
    description = FIELDS[name].description
    assert description
    assert description.endswith(".")


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_settings("serve", ["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert [name for name in FIELDS if flag_of(name) not in printed] == []


def test_a_flag_wins_over_the_environment_which_wins_over_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("QUICKCHANGE_PORT=1001", "QUICKCHANGE_MAX_NUM_SEQS=2", "QUICKCHANGE_THREADS=3", "SOMEBODY_ELSES=4")
    (folder / ".env").write_text("\n".join(lines))
    monkeypatch.setenv("QUICKCHANGE_PORT", "1002")
    monkeypatch.setenv("QUICKCHANGE_MAX_NUM_SEQS", "5")
    settings = parse_settings("serve", ["--port", "1003"])
    assert (settings.port, settings.max_num_seqs, settings.threads) == (1003, 5, 3)


def test_without_anything_the_defaults_hold() -> None:
    settings = parse_settings("serve", [])
    assert (settings.base_model, settings.host, settings.port) == ("micro", "127.0.0.1", 8000)
    assert settings.adapters_dir == Path("adapters")


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.annotation is bool])
def test_a_switch_has_a_flag_for_each_side(name: str) -> None:
    assert getattr(parse_settings("serve", [flag_of(name)]), name) is True
    assert getattr(parse_settings("serve", [flag_of(f"no_{name}")]), name) is False


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--port", "http", "'http'"),
        ("--port", "65536", "65535"),
        ("--device", "gpu", "'cpu'"),
        ("--dtype", "int8", "'bfloat16'"),
        ("--max-num-seqs", "0", "greater than or equal to 1"),
        ("--scan-interval", "0", "greater than 0"),
        ("--base-model", " ", "base_model is empty"),
    ],
)
def test_a_bad_value_is_named_with_its_flag_its_variable_and_what_would_do(
    flag: str, value: str, expected: str
) -> None:
    with pytest.raises(SettingsError) as raised:
        parse_settings("serve", [flag, value])
    message = str(raised.value)
    variable = f"QUICKCHANGE_{flag[2:].replace('-', '_').upper()}"
    assert all(part in message for part in (flag, variable, repr(value), expected)), message


def test_a_bad_value_in_the_environment_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKCHANGE_THREADS", "many")
    with pytest.raises(SettingsError, match=r"QUICKCHANGE_THREADS.*'many'"):
        parse_settings("serve", [])


def test_a_flag_that_is_not_there_ends_with_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, SettingsError)) as raised:
        parse_settings("serve", ["--prot", "1"])
    assert "--prot" in capsys.readouterr().err + str(raised.value)


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("micro", "micro"),
        ("smollm2", "smollm2"),
        ("/models/some-base/", "some-base"),
        ("org/some-base", "some-base"),
        ("/models/some-base.Q4_K_M.gguf", "some-base.Q4_K_M"),
        ("some-base-00001-of-00003.gguf", "some-base"),
    ],
)
def test_the_base_is_named_by_the_last_part_of_its_place(base: str, named: str) -> None:
    assert parse_settings("serve", ["--base-model", base]).base_name == named
    assert parse_settings("serve", ["--base-model", base, "--served-model-name", "mine"]).base_name == "mine"


def test_a_folder_of_the_same_name_does_not_rename_a_base_that_needs_no_path(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "smollm2").symlink_to("elsewhere")
    assert parse_settings("serve", ["--base-model", "smollm2"]).base_name == "smollm2"
    assert parse_settings("serve", ["--base-model", "./smollm2"]).base_name == "elsewhere"


@pytest.mark.parametrize(
    ("arguments", "roots"),
    [
        ([], None),
        (["--adapter-roots", "/a:/b"], ["/a", "/b"]),
        (["--adapter-roots", "/a", "--adapter-roots=/b"], ["/a", "/b"]),
        (['--adapter-roots=["/a,x", "/b:y"]'], ["/a,x", "/b:y"]),
        (["--adapter-roots="], []),
    ],
)
def test_roots_are_folders_in_one_text(
    arguments: list[str], roots: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = None if roots is None else tuple(Path(root) for root in roots)
    assert parse_settings("serve", arguments).adapter_roots == wanted
    monkeypatch.setenv("QUICKCHANGE_ADAPTER_ROOTS", "~/x:/y")
    assert parse_settings("serve", []).adapter_roots == (Path("~/x").expanduser(), Path("/y"))


@pytest.mark.parametrize("text", ['["/a"', "[1]", '[["/a"]]'])
def test_roots_that_are_no_list_are_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(SettingsError, match=r"adapter_roots .*write folders separated by ':', or a JSON list"):
        parse_settings("serve", [f"--adapter-roots={text}"])


@pytest.mark.parametrize("text", ["foo", "localhost:4318", "", "http://", "grpc://localhost:4317"])
def test_a_collector_that_is_no_url_is_refused_at_start(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--otlp-endpoint .*write the collector's URL, such as"):
        parse_settings("serve", ["--otlp-endpoint", text])


@pytest.mark.parametrize("text", ["http://localhost:4318", "https://[::1]:4318/otlp"])
def test_the_url_of_a_collector_is_taken_as_it_is(text: str) -> None:
    assert parse_settings("serve", ["--otlp-endpoint", text]).otlp_endpoint == text
