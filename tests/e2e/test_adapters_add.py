"""``quickchange adapters add`` as a process, against a stand-in of the hub on the loopback: no outside network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from server.__main__ import main
from tests.serving import ROOT

REPO, COMMIT, OLD_COMMIT = "someone/parrot", "a" * 40, "b" * 40
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
BODIES = {
    CONFIG: b'{"peft_type": "LORA"}',
    WEIGHTS: bytes(range(256)) * 1000,
    CARD: b"# parrot\n",
    "chat_template.jinja": b"{{ messages }}",
}
POISON = {
    "adapter_model.bin": b"pickle", "evil.py": b"import os", "../outside": b"x", "sub/adapter_config.json": b"{}",
    "model.safetensors": b"base", "training_args.bin": b"pickle",
}  # fmt: skip
PROGRAM = "import sys; from server.cli.adapters_add import main; sys.exit(main(sys.argv[1:]))"


@dataclass
class Hub:
    """What the stand-in holds and how it misbehaves; ``asked`` is every request, as ``METHOD path``.

    ``break_off`` is the number of times that the body of the weights ends in the middle; after that the rest is served,
    or, where ``gone``, an error.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(BODIES))
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": OLD_COMMIT})
    said_sizes: dict[str, int] = field(default_factory=dict)
    api_error: tuple[int, str] | None = None
    file_error: tuple[int, str] | None = None
    break_off: int = 0
    gone: bool = False
    asked: list[str] = field(default_factory=list)

    def downloaded(self) -> set[str]:
        """The paths of the files whose bytes were asked for, those behind a redirect by their own names."""
        paths = [line.removeprefix("GET ") for line in self.asked if line.startswith("GET ")]
        found = {path.rpartition("/")[2] for path in paths if "/resolve/" in path}
        return found | ({WEIGHTS} if any(path.startswith("/cdn/") for path in paths) else set())


class Handler(BaseHTTPRequestHandler):
    """The three endpoints that huggingface_hub 2.4 uses: model info, resolve (HEAD and GET), and the bucket behind."""

    hub: Hub

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if match := re.fullmatch(rf"/api/models/{REPO}(?:/revision/(.+))?", path):
            self._info(match[1] or "main")
        elif match := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2])
        elif path == f"/cdn/{WEIGHTS}":
            self._weights()
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound"})

    def _info(self, revision: str) -> None:
        if self.hub.api_error:
            status, code = self.hub.api_error
            self._send(status, {"X-Error-Code": code} if code else {})
            return
        commit = self.hub.revisions.get(revision)
        if commit is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
            return
        sizes = {name: len(body) for name, body in self.hub.files.items()} | self.hub.said_sizes
        siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
        info = {"id": REPO, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _resolve(self, commit: str, name: str) -> None:
        if self.hub.file_error:
            status, code = self.hub.file_error
            self._send(status, {"X-Error-Code": code} if code else {})
            return
        assert commit in (COMMIT, OLD_COMMIT), "a file is asked for at a commit, not at a branch that may move"
        body = self.hub.files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
        if name == WEIGHTS:  # large files are elsewhere
            where = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{name}"
            linked = {"X-Linked-Size": str(len(body)), "X-Linked-ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
            self._send(302, headers | linked | {"Location": where})
        else:
            self._send(200, headers, body)

    def _weights(self) -> None:
        body = self.hub.files[WEIGHTS]
        begin = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])  # type: ignore[index]
        if self.hub.break_off > 0:
            self.hub.break_off -= 1
            self._send(206 if begin else 200, {}, body[begin:], cut=len(body) // 2 - begin)
        elif self.hub.gone:
            self._send(503, {})
        else:
            ranged = {"Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"} if begin else {}
            self._send(206 if begin else 200, ranged, body[begin:])

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", *, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body)), "Connection": "close"}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The stand-in, with one adapter and files beside it that nobody should want."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": (hub := Hub())}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def add(hub: Hub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with its own cache and adapter folder under ``folder``."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1", "QUICKCHANGE_ADAPTERS_DIR": str(folder / "adapters"),
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def entries(folder: Path) -> list[str]:
    """What is in the adapter folder, dot-names included."""
    return sorted(path.name for path in (folder / "adapters").iterdir()) if (folder / "adapters").is_dir() else []


def check_refused(done: subprocess.CompletedProcess[str], folder: Path, *words: str) -> None:
    """One sentence, no traceback, nothing left behind."""
    assert done.returncode == 1 and done.stdout == "", done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("quickchange: ")]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line, line
    assert entries(folder) == []


def test_an_adapter_at_main_is_fetched_as_regular_files_and_nothing_else_is(hub: Hub, tmp_path: Path) -> None:
    hub.files |= POISON
    done = add(hub, tmp_path, REPO)
    assert (done.returncode, entries(tmp_path)) == (0, ["parrot"]), done.stderr
    folder = tmp_path / "adapters" / "parrot"
    assert {path.name for path in folder.iterdir()} == {*BODIES, "source.json"}
    for name, body in BODIES.items():
        assert not (folder / name).is_symlink() and (folder / name).read_bytes() == body
    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", source.pop("added"))
    assert source == {"repo_id": REPO, "revision": COMMIT}
    assert hub.downloaded() == set(BODIES)
    touched = {path.partition(f"/resolve/{COMMIT}/")[2] for path in hub.asked if "/resolve/" in path}
    assert touched == set(BODIES)
    assert "quickchange adapters check parrot" in done.stdout and COMMIT[:12] in done.stdout
    assert f"fetching {WEIGHTS} (0.3 MB)" in done.stderr and "\r" not in done.stderr


def test_a_revision_and_another_name_and_a_setting_after_them(hub: Hub, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    done = add(hub, tmp_path, "--adapters-dir", str(elsewhere), "--no-demo-adapters", f"{REPO}@v1", "--name", "bird")
    assert done.returncode == 0, done.stderr
    assert json.loads((elsewhere / "bird" / "source.json").read_text(encoding="utf-8"))["revision"] == OLD_COMMIT
    assert f"GET /api/models/{REPO}/revision/v1" in hub.asked and entries(tmp_path) == []


def test_a_body_that_breaks_off_once_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.break_off = 1
    assert add(hub, tmp_path, REPO).returncode == 0
    assert (tmp_path / "adapters" / "parrot" / WEIGHTS).read_bytes() == BODIES[WEIGHTS]


def test_a_body_that_breaks_off_for_good_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.break_off, hub.gone = 1, True
    check_refused(add(hub, tmp_path, REPO), tmp_path, "HTTP 503", REPO)


def test_a_pickle_is_refused_with_the_way_out(hub: Hub, tmp_path: Path) -> None:
    hub.files = {CONFIG: b"{}", "adapter_model.bin": b"pickle"}
    check_refused(add(hub, tmp_path, REPO), tmp_path, "pickle", "save_pretrained, which writes safetensors")
    assert hub.downloaded() == set()


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_repository_that_is_no_adapter_is_refused(hub: Hub, tmp_path: Path, missing: str) -> None:
    del hub.files[missing]
    check_refused(add(hub, tmp_path, REPO), tmp_path, f"no PEFT adapter: {missing} is missing")
    assert hub.downloaded() == set()


def test_weights_over_the_limit_are_refused_before_they_are_fetched(hub: Hub, tmp_path: Path) -> None:
    done = add(hub, tmp_path, REPO, "--max-adapter-bytes", "255999")
    check_refused(done, tmp_path, f"{WEIGHTS} has 256000 bytes; the limit is 255999", "max_adapter_bytes")
    assert hub.downloaded() == set()


def test_weights_that_are_larger_than_the_hub_said_are_refused_too(hub: Hub, tmp_path: Path) -> None:
    hub.said_sizes = {WEIGHTS: 10}
    check_refused(add(hub, tmp_path, REPO, "--max-adapter-bytes", "1000"), tmp_path, "256000 bytes; the limit is 1000")


def test_a_large_companion_is_refused_and_a_large_card_left_out(hub: Hub, tmp_path: Path) -> None:
    hub.files[CARD] = b"x" * (1024 * 1024 + 1)
    assert add(hub, tmp_path, REPO).returncode == 0
    assert not (tmp_path / "adapters" / "parrot" / CARD).exists()
    hub.files["chat_template.jinja"] = b"x" * (1024 * 1024 + 1)
    done = add(hub, tmp_path, REPO, "--name", "other")
    assert done.returncode == 1 and "chat_template.jinja has 1048577 bytes" in done.stderr
    assert entries(tmp_path) == ["parrot"]


def test_a_name_that_is_taken_is_kept_unless_replaced(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "adapters" / "parrot"
    folder.mkdir(parents=True)
    (folder / "mine").write_text("old", encoding="utf-8")
    done = add(hub, tmp_path, REPO)
    assert done.returncode == 1 and "exists already" in done.stderr and hub.asked == []
    hub.break_off, hub.gone = 1, True
    assert add(hub, tmp_path, "--replace", REPO).returncode == 1
    assert (folder / "mine").read_text(encoding="utf-8") == "old" and entries(tmp_path) == ["parrot"]
    hub.gone = False
    assert add(hub, tmp_path, "--replace", REPO).returncode == 0
    assert not (folder / "mine").exists() and (folder / WEIGHTS).exists() and entries(tmp_path) == ["parrot"]


def test_a_link_is_not_replaced(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "parrot").symlink_to(tmp_path)
    done = add(hub, tmp_path, REPO, "--replace")
    assert done.returncode == 1 and "which --replace does not replace" in done.stderr and hub.asked == []


@pytest.mark.parametrize("name", ["../up", ".hidden", "a b", "x" * 129, "base", "micro"])
def test_names_that_no_adapter_may_have_are_refused_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """In this process, which may not ask the hub: it would say so."""
    status = main(["adapters", "add", REPO, f"--name={name}", "--adapters-dir", str(tmp_path / "adapters")])
    check_refused(subprocess.CompletedProcess([], status, *capsys.readouterr()), tmp_path, "name", "--name")


@pytest.mark.parametrize(
    ("repo", "error", "words"),
    [
        ("someone/nobody", None, ("no repository someone/nobody", "private", "HF_TOKEN")),
        ("a/b/c", None, ("'a/b/c' is no repository", "ORG/NAME")),
        (f"{REPO}@v9", None, (f"{REPO} has no revision 'v9'",)),
        (REPO, (401, "RepoNotFound"), ("no repository", "HF_TOKEN")),
        (REPO, (403, "GatedRepo"), (f"{REPO} is gated", "accept its terms")),
        (REPO, (403, ""), ("forbids access", "HF_TOKEN")),
        (REPO, (500, ""), ("HTTP 500", "try again")),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: Hub, tmp_path: Path, repo: str, error: tuple[int, str] | None, words: tuple[str, ...]
) -> None:
    hub.api_error = error
    check_refused(add(hub, tmp_path, repo), tmp_path, *words)


def test_a_gated_repository_that_lists_its_files_is_refused_at_the_first(hub: Hub, tmp_path: Path) -> None:
    hub.file_error = (403, "GatedRepo")
    check_refused(add(hub, tmp_path, REPO), tmp_path, f"{REPO} is gated", "HF_TOKEN")


def test_a_hub_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    nobody = Hub(url="http://127.0.0.1:9")
    check_refused(add(nobody, tmp_path, REPO), tmp_path, "could not be downloaded", "check the network")


def test_an_adapter_folder_that_cannot_be_written_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "adapters").write_text("a file", encoding="utf-8")
    done = add(hub, tmp_path, REPO)
    assert done.returncode == 1 and "parrot cannot be written: " in done.stderr and "Traceback" not in done.stderr
