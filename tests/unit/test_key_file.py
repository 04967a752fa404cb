"""The key file: what an entry may say, what is refused with which sentence, and the command that writes one."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest

from server.__main__ import main
from server.api.auth.key_file import MAX_KEYS, parse_keys, read_key_file
from server.api.auth.principal import AccessScope
from server.cli.access import read_keys
from server.errors import SettingsError
from server.settings import Settings

KEY = "a-key-with-more-than-thirty-two-characters"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()
FULL = f"""
[web-shop]
sha256 = "{DIGEST}"
scopes = ["infer", "metrics"]
adapters = ["helpdesk", "json"]
requests_per_minute = 60
max_concurrent = 4
"""


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_an_entry_is_a_principal_with_its_scopes_adapters_and_limits() -> None:
    (key,) = parse_keys(FULL.encode())
    principal = key.principal
    assert key.digest.hex() == DIGEST
    assert principal.label == "web-shop"
    assert principal.scopes == {AccessScope.INFER, AccessScope.METRICS}
    assert (principal.requests_per_minute, principal.max_concurrent) == (60, 4)
    assert principal.may_use("helpdesk") and not principal.may_use("tolstoy")
    assert principal.allows(AccessScope.METRICS) and not principal.allows(AccessScope.ADMIN)


def test_an_entry_with_a_digest_alone_is_for_inference_without_limits() -> None:
    principal = parse_keys(f'[a]\nsha256 = "{DIGEST.upper()}"'.encode())[0].principal
    assert principal.scopes == {AccessScope.INFER}
    assert (principal.adapters, principal.requests_per_minute, principal.max_concurrent) == (None, None, None)


def test_a_key_that_is_being_replaced_has_two_digests_and_one_principal() -> None:
    old, new = parse_keys(f'[a]\nsha256 = ["{DIGEST}", "{OTHER}"]'.encode())
    assert old.principal is new.principal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a", "not valid TOML"),
        ("a = 1", r"'a' is not a table"),
        ("['a b']", r"'a b' is no label"),
        ("[anonymous]", r"'anonymous' is no label"),
        ("[a]", r"'a' needs 'sha256'"),
        ("[a]\nsha256 = 3", r"'a' needs 'sha256'"),
        (f'[a]\nsha256 = "{KEY}"', r"not the key itself"),
        ("[a]\nsha256 = []", r"'a' has 0 digests"),
        (f"[a]\nsha256 = {[DIGEST] * 5}", r"'a' has 5 digests"),
        (f'[a]\nsha256 = "{DIGEST}"\nscope = ["infer"]', r"the field 'scope', which does not exist"),
        (f'[a]\nsha256 = "{DIGEST}"\nscopes = ["root"]', r"the scope 'root'"),
        (f'[a]\nsha256 = "{DIGEST}"\nscopes = []', r"at least one"),
        (f'[a]\nsha256 = "{DIGEST}"\nscopes = "infer"', r"'scopes' that is no list of strings"),
        (f'[a]\nsha256 = "{DIGEST}"\nadapters = "x"', r"'adapters' that is no list of strings"),
        (f'[a]\nsha256 = "{DIGEST}"\nscopes = ["admin"]\nadapters = ["x"]', r"'adapters' and the scope admin"),
        (f'[a]\nsha256 = "{DIGEST}"\nmax_concurrent = 0', r"max_concurrent = 0"),
        (f'[a]\nsha256 = "{DIGEST}"\nmax_concurrent = true', r"max_concurrent = True"),
        (f'[a]\nsha256 = "{DIGEST}"\nrequests_per_minute = 1.5', r"requests_per_minute = 1.5"),
        (f'[a]\nsha256 = "{DIGEST}"\n[b]\nsha256 = "{DIGEST}"', r"'a' and 'b' have the same key"),
    ],
)
def test_a_wrong_entry_is_named_and_no_key_is_repeated(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        parse_keys(text.encode())
    assert KEY not in str(caught.value) and DIGEST not in str(caught.value)


def test_the_number_of_keys_is_limited() -> None:
    entries = [f'[k{number}]\nsha256 = "{number:064x}"' for number in range(MAX_KEYS + 1)]
    assert len(parse_keys("\n".join(entries[:-1]).encode())) == MAX_KEYS
    with pytest.raises(ValueError, match=f"it has {MAX_KEYS + 1} keys"):
        parse_keys("\n".join(entries).encode())


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_change_is_refused_with_the_command_that_helps(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "keys.toml", FULL, mode)
    with pytest.raises(ValueError, match=rf"mode {mode:04o}.*chmod go-w {path}"):
        read_key_file(path)
    path.chmod(0o644)
    assert len(read_key_file(path)) == 1


def test_what_is_no_file_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ValueError, match="not a file"):
        read_key_file(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SettingsError, match=f"key file {path} cannot be used"):
            read_keys(Settings(api_keys=path))


def test_a_server_is_open_without_keys_or_with_an_admin_key_alone(tmp_path: Path) -> None:
    empty = write(tmp_path / "keys.toml", "")
    assert read_keys(Settings()).is_open
    assert read_keys(Settings(admin_key="an-admin-key-of-some-length")).is_open
    assert not read_keys(Settings(api_key="a-key-of-some-length")).is_open
    assert not read_keys(Settings(api_keys=empty)).is_open


def test_the_single_key_opens_inference_and_metrics() -> None:
    found = read_keys(Settings(api_key="a-key-of-some-length")).find(b"a-key-of-some-length")
    assert found is not None
    assert found.scopes == {AccessScope.INFER, AccessScope.METRICS}


def test_a_key_of_the_file_keeps_its_limits_where_it_is_also_set_as_the_single_key(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.toml", FULL)
    both = read_keys(Settings(api_keys=path, api_key=KEY)).find(KEY.encode())
    assert both is not None and both.label == "web-shop"
    admin = read_keys(Settings(api_keys=path, api_key=KEY, admin_key=KEY)).find(KEY.encode())
    assert admin is not None and admin.allows(AccessScope.ADMIN)


def test_a_new_key_is_shown_once_and_its_entry_is_one_of_the_key_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--requests-per-minute", "60", "--max-concurrent", "4"]
    assert main(["keys", "new", "web.shop", "--scope", "infer", "--adapter", "helpdesk", *limits]) == 0
    printed = capsys.readouterr()
    key = printed.err.splitlines()[-1]
    assert key not in printed.out and len(key) > 40
    keys = read_key_file(write(tmp_path / "keys.toml", printed.out))
    assert keys[0].digest == hashlib.sha256(key.encode()).digest()
    principal = keys[0].principal
    assert principal.label == "web.shop"
    assert principal.adapters == frozenset({"helpdesk"})
    assert (principal.requests_per_minute, principal.max_concurrent) == (60, 4)


def test_an_existing_key_gets_an_entry_and_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{KEY}\n"))
    assert main(["keys", "new", "old", "--stdin"]) == 0
    printed = capsys.readouterr()
    assert DIGEST in printed.out and KEY not in printed.out + printed.err


@pytest.mark.parametrize("number", ["many", "0", "1000001", "-1", "9" * 5000])
def test_a_limit_that_is_no_number_of_requests_is_explained(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "new", "a", f"--max-concurrent={number}"])
    assert f"{number!r:.40} is no whole number from 1 to 1,000,000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["new", "a b"], "'a b' is no label"),
        (["new", "admin_key"], "is no label"),
        (["new", "a", "--scope", "admin", "--adapter", "x"], "--adapter and --scope admin"),
        (["new", "a", "--adapter", "x/y"], "'x/y' is no adapter's name"),
        (["new", "a", "--stdin"], "32 characters or more"),
        (["old"], "there is no command 'old'"),
        ([], "there is no command"),
    ],
)
def test_a_key_that_cannot_be_made_is_explained(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("short\n"))
    assert main(["keys", *arguments]) != 0
    printed = capsys.readouterr()
    assert expected in printed.err and not printed.out
