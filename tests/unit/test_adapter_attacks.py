"""What somebody who may put files into the adapter folder, or name adapters, must not be able to do.

A folder is judged by its bytes, never obeyed: nothing in it is run, followed, waited for, or repeated in full.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pickle
import random
import shutil
import socket
import string
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from fastapi import FastAPI
from starlette.types import Message

from server.adapters.adapter_cache import Loaded
from server.adapters.content import folder as folder_module
from server.adapters.content.folder import folder_state
from server.adapters.content.manifest import AdapterPolicy, Manifest, list_folder, read_manifest
from server.adapters.reader import AdapterReader, FolderMoved
from server.api.app import create_app
from server.api.auth.access import Access
from server.api.auth.keys import KeyRing, admin_key
from server.api.state import BaseSize, ServerState
from server.engine.async_engine import AsyncEngine
from server.errors import AdapterRejected, InvalidRequest, ModelNotFound
from server.text import template_process
from server.text.prompt import PromptRenderer
from tests.adapter_folders import (
    BASE,
    CONFIG,
    FINGERPRINT,
    LIMITS,
    NUM_BYTES,
    PREFIX,
    SIDECAR,
    AdapterHarness,
    make,
    tensors,
    write,
)  # fmt: skip
from tests.fakes import EOS, FakeEngine, small_tokenizer

ROOT = Path(__file__).parents[2]
CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE = "adapter_config.json", "adapter_model.safetensors", "quickchange.json"
CHAT, MESSAGES = "/v1/chat/completions", [{"role": "user", "content": "hello"}]
KEY = "an-admin-key-of-some-length"
QUICK = 2.0
"""Seconds in which anything is refused."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path, "good")


@pytest.fixture
async def harness(tmp_path: Path) -> AdapterHarness:
    return AdapterHarness(tmp_path)


def read(path: Path, limits: AdapterPolicy = LIMITS) -> Manifest:
    return read_manifest(path, BASE, limits)


def within(seconds: float, work: Callable[..., Any], *arguments: Any) -> Any:
    """What the work returns or raises; a failure where it hangs."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(*arguments), None))
        except Exception as error:  # noqa: BLE001 - raised again below
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"it is not done after {seconds} s"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def refusal(path: Path, limits: AdapterPolicy = LIMITS) -> str:
    """Why a folder is refused, quickly and in a line that a log can hold; by its headers and by its bytes."""
    reasons = []
    for judge in (list_folder, read_manifest):
        since = time.perf_counter()
        with pytest.raises(AdapterRejected) as caught:
            within(20, judge, path, BASE, limits)
        assert time.perf_counter() - since < QUICK
        reasons.append(caught.value.reason)
    assert len(set(reasons)) == 1
    assert reasons[0].isprintable() and len(reasons[0]) < 1000
    return reasons[0]


def state_of(harness: AdapterHarness, engine: FakeEngine | None = None) -> ServerState:
    """A server over real folders and a fake engine."""
    return ServerState(
        created=1_700_000_000,
        prompts=PromptRenderer(small_tokenizer()),
        engine=cast(AsyncEngine, engine or FakeEngine()),
        adapters=harness.adapters,
        metrics=harness.metrics,
        default_max_tokens=64,
        eos_ids=frozenset({EOS}),
        computation="sha256:base cpu",
        base_size=BaseSize(11_000_000, 44_000_000, hidden_size=4, number_format="float32"),
        version="0.0.test",
        operator=harness.operator,
        access=Access(KeyRing((admin_key(KEY),))),
    )


async def call(app: FastAPI, method: str, path: str, body: Any = None, raw: bytes = b"") -> tuple[int, str]:
    """Status and body of a request with the admin's key, whose path goes to the application as it is."""
    content = raw or (b"" if body is None else json.dumps(body).encode())
    headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-length", str(len(content)).encode())]
    if content:
        headers.append((b"content-type", b"application/json"))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "replace"),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "server": ("test", 80),
        "client": ("test", 1),
    }
    requests: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
    responses: list[Message] = []

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        responses.append(message)

    await app(scope, receive, send)
    return responses[0]["status"], b"".join(one.get("body", b"") for one in responses).decode()


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": MESSAGES} | more


WATCHED = """
import json, socket, sys
from pathlib import Path
from server.adapters.content.signature import BaseSignature
from server.adapters.content.manifest import AdapterPolicy, read_manifest
from server.adapters.content.signature import linear
from server.errors import AdapterRejected

modules = {"model.layers.0.q_proj": linear(6, 4), "model.layers.0.v_proj": linear(6, 2)}
base = BaseSignature("base", sys.argv[1], modules)
warm, *paths = map(Path, sys.argv[2:])
read_manifest(warm, base, AdapterPolicy(max_rank=8, max_bytes=100_000))
events, watching = [], False

def watch(event, arguments):
    if watching and event.partition(".")[0] in ("open", "pickle", "socket", "import", "exec", "subprocess"):
        events.append([event, str(arguments[0]) if arguments else ""])

sys.addaudithook(watch)
for path in paths:
    watching = True
    try:
        read_manifest(path, base, AdapterPolicy(max_rank=8, max_bytes=100_000))
        said = ""
    except AdapterRejected as error:
        said = error.reason
    watching = False
    print(json.dumps({"said": said, "events": events}))
    events.clear()
"""
EXPECTED_FILES = {CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE, "chat_template.jinja", "tokenizer_config.json"} | {
    "generation_config.json", "source.json", "tokenizer.json", "added_tokens.json",
}  # fmt: skip


def watch(tmp_path: Path, *paths: Path) -> list[str]:
    """What is said of each folder by a process that opens nothing but the folder's known files, and does nothing else.

    Audit hooks cannot be taken away again, so that they get a process of their own.
    """
    warm = make(tmp_path, "warm")
    command = [sys.executable, "-c", WATCHED, FINGERPRINT, *map(str, (warm, *paths))]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    for path, line in zip(paths, lines, strict=True):
        opened = {argument for event, argument in line["events"] if event == "open" and not argument.isdigit()}
        assert opened <= EXPECTED_FILES | {str(path)}
        assert {event for event, _ in line["events"]} == {"open"}
    return [line["said"] for line in lines]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    """Code that runs when weights are unpickled: alone, beside good weights, or under their name."""
    evil = pickle.dumps(Bomb(tmp_path / "owned"))
    alone, beside, disguised = (make(tmp_path, name) for name in ("alone", "beside", "disguised"))
    for path, names in {
        alone: ["adapter_model.bin"],
        beside: ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "adapter_model.safetensors.pkl"],
        disguised: [WEIGHTS_FILE],
    }.items():
        for name in names:
            (path / name).write_bytes(evil)
    (alone / WEIGHTS_FILE).unlink()
    said = watch(tmp_path, alone, beside, disguised)
    assert "weights are a pickle" in said[0] and "save_pretrained writes safetensors" in said[0]
    assert said[1] == ""
    assert said[2].startswith(f"{WEIGHTS_FILE}: ")
    assert not (tmp_path / "owned").exists()


GADGETS: list[dict[str, Any]] = [
    {"base_model_name_or_path": "someone/else", "revision": "main"},
    {"base_model_name_or_path": "/etc"},
    {"base_model_name_or_path": "https://127.0.0.1:9/x"},
    {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
    {"megatron_core": "os"},
    {"corda_config": {"cache_file": "/etc/passwd", "covariance_file": "/etc/passwd"}},
    {"lora_ga_config": {"cache_file": "/etc/passwd"}},
    {"eva_config": {"rho": 10**9}},
    {"loftq_config": {"loftq_bits": 4}},
    {"runtime_config": {"ephemeral_gpu_offload": True}},
    {"velora_config": {"rank": 10**9}},
    {"inference_mode": False, "lora_dropout": 0.99, "fan_in_fan_out": True},
    {"target_modules": "(([a-z])+.)+[A-Z]([a-z])+$"},
    {"target_modules": "x" * 900_000},
    {"exclude_modules": "(a*)*b", "layers_pattern": "(a+)+$"},
    {"layers_pattern": ["(a+)+$"]},
]
"""Fields that PEFT opens, imports, evaluates or computes with, and that are none of our business."""


def test_another_base_that_is_named_is_compared_and_never_loaded(tmp_path: Path) -> None:
    """Configs that name code, files or a base elsewhere: nothing is opened, imported or connected to for them."""
    gadgets = [make(tmp_path, f"gadget-{number}", **config) for number, config in enumerate(GADGETS)]
    other = make(tmp_path, "other")
    write(other, sidecar=SIDECAR | {"base": {"name": "someone/else", "fingerprint": "sha256:" + "b" * 64}})
    *said, refused = watch(tmp_path, *gadgets, other)
    assert said == [""] * len(GADGETS)
    assert "it was trained on another base (someone/else" in refused


@pytest.mark.parametrize("config", GADGETS)
def test_what_does_not_concern_us_changes_nothing(tmp_path: Path, folder: Path, config: dict[str, Any]) -> None:
    """Fields that PEFT acts upon when it loads an adapter."""
    since = time.perf_counter()
    assert read(make(tmp_path, "gadget", **config)).plan == read(folder).plan
    assert time.perf_counter() - since < QUICK


def special(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put something that is no regular file in a file's place."""
    path.unlink(missing_ok=True)
    monkeypatch.chdir(path.parent)  # the name of a socket may not be long
    if kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
        except OSError:  # not as this user, or not on this system
            special(path, "socket", monkeypatch)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)


@pytest.mark.parametrize("kind", ["directory", "FIFO", "link to a device", "device", "socket"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that block, never end, or lead elsewhere. A directory left its descriptor open each time it was read."""
    for name in EXPECTED_FILES:
        path = make(tmp_path, f"folder-{name}")
        special(path / name, kind, monkeypatch)
        before = len(os.listdir("/dev/fd"))
        assert name in refusal(path)
        assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE])
def test_a_link_is_refused_wherever_it_leads(folder: Path, name: str) -> None:
    """A link reads files that only the server may read."""
    (folder / SIDECAR_FILE).write_text(json.dumps(SIDECAR))
    elsewhere = folder / "elsewhere"
    (folder / name).rename(elsewhere)
    for target in (elsewhere, Path("elsewhere"), Path("/etc/passwd"), Path("nowhere"), Path(name)):
        (folder / name).symlink_to(target)
        assert f"{name} is a link" in refusal(folder)
        (folder / name).unlink()


async def test_a_linked_folder_is_no_adapter(harness: AdapterHarness) -> None:
    """A link in the adapter folder serves what lies outside it."""
    outside = make(harness.first.parent, "outside")
    (harness.first / "linked").symlink_to(outside)
    await harness.watcher.scan()
    assert harness.names == []
    assert "the folder is a link" in refusal(harness.first / "linked")


async def test_a_folder_loaded_by_its_path_is_not_followed_outside(harness: AdapterHarness) -> None:
    """The folder above a loaded one is replaced by a link afterwards."""
    make(harness.first / "archive", "a")
    make(harness.first.parent / "outside", "a", lora_alpha=99)
    label = (await harness.operator.load("b", "archive/a", in_place=False)).label
    shutil.rmtree(harness.first / "archive")
    (harness.first / "archive").symlink_to(harness.first.parent / "outside")
    await harness.watcher.scan()
    assert [adapter.label for entry in harness.registry for adapter in entry.versions] in ([], [label])


def test_a_hard_link_is_the_file(tmp_path: Path, folder: Path) -> None:
    """A second name of a file is no less the file: the store of versions and package managers make them."""
    twin = make(tmp_path, "twin")
    (twin / WEIGHTS_FILE).unlink()
    os.link(folder / WEIGHTS_FILE, twin / WEIGHTS_FILE)
    assert read(twin).weights_digest == read(folder).weights_digest


async def test_a_file_of_aliases_that_is_none_does_not_stop_the_watcher(harness: AdapterHarness) -> None:
    """A FIFO blocks who opens it, for ever; a link leads elsewhere."""
    path = harness.first / "aliases.toml"
    os.mkfifo(path)
    make(harness.first, "a")
    try:
        await asyncio.wait_for(harness.watcher.scan(), 5)
    finally:
        with open(os.open(path, os.O_RDWR | os.O_NONBLOCK), "wb"):  # lets go whoever waits
            await asyncio.sleep(0.05)
    assert harness.names == ["a"]
    path.unlink()
    (harness.first.parent / "elsewhere").write_text('support = "a"\n')
    path.symlink_to(harness.first.parent / "elsewhere")
    await harness.watcher.scan()
    assert harness.adapters.names.aliases == {}
    path.unlink()
    path.write_text('support = "a"\n')
    await harness.watcher.scan()
    assert list(harness.adapters.names.aliases) == ["support"]


NAMES = [
    "../outside",
    "../../etc/passwd",
    "good/../../outside",
    "%2e%2e/outside",
    "..%2foutside",
    "..",
    ".",
    ".hidden",
    "/etc/passwd",
    "//outside",
    "file:///etc/passwd",
    "https://127.0.0.1/x",
    "good\0",
    "\0",
    "good\n",
    "good\r\nx-evil: 1",
    "‥/outside",
    "．．/outside",
    "..∕outside",
    "ｇｏｏｄ",
    "good\u200b",
    "good ",
    "CON",
    "good:stream",
    "..\\outside",
    "C:\\outside",
    "~/outside",
    "$HOME",
    "$(id)",
    "good;id",
    "{{7*7}}",
    "%s%n",
    "x" * 10_000,
    "../" * 1000 + "etc/passwd",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
async def test_names_lead_nowhere(harness: AdapterHarness, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Paths, control characters and look-alikes for names, in every place that takes one."""
    make(harness.first, "good")
    make(harness.first, ".hidden")
    outside = make(harness.first.parent, "outside")
    await harness.watcher.scan()
    app = create_app(state_of(harness))
    caplog.set_level(logging.DEBUG)
    replies = {
        "chat": await call(app, "POST", CHAT, chat(name)),
        "completion": await call(app, "POST", "/v1/completions", {"model": name, "prompt": "hello"}),
        "delete": await call(app, "DELETE", f"/v1/models/{name}"),
        "pin": await call(app, "POST", f"/v1/models/{name}/pin", {}),
        "load path": await call(app, "POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": name}),
        "load name": await call(app, "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": "../outside"}),
        "unload": await call(app, "POST", "/v1/unload_lora_adapter", {"lora_name": name}),
    }
    if name != "good\n":  # the router takes a line feed for the end of a path, and finds the name before it
        replies["get"] = await call(app, "GET", f"/v1/models/{name}")
    assert {where: status for where, (status, _) in replies.items() if status not in (400, 404, 405)} == {}
    assert all(set(json.loads(body)) == {"error"} for _, body in replies.values())
    assert (harness.names, harness.loaded, outside.is_dir()) == (["good"], [], True)
    assert all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.parametrize("field", ["model", "lora_name", "lora_path"])
@pytest.mark.parametrize("text", ['"\\ud800"', "7", "[]", "null", "true", '{"a": 1}'])
async def test_names_that_are_no_text_are_refused(harness: AdapterHarness, field: str, text: str) -> None:
    """Half a surrogate pair is text for Python until it is written anywhere."""
    app = create_app(state_of(harness))
    good = chat("good") if field == "model" else {"lora_name": "x", "lora_path": "good"}
    body = json.dumps(good | {field: "HERE"}).replace('"HERE"', text)
    url = CHAT if field == "model" else "/v1/load_lora_adapter"
    assert (await call(app, "POST", url, raw=body.encode()))[0] == 400


async def test_loading_a_folder_that_goes_away_is_answered(
    harness: AdapterHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder deleted between the look at its path and the look at its files: the request waited for ever."""
    path, mount = make(harness.first, "a"), harness.watcher.mount

    async def mount_and_lose(name: str, folder: Path) -> None:
        await mount(name, folder)
        shutil.rmtree(path)

    monkeypatch.setattr(harness.watcher, "mount", mount_and_lose)
    with pytest.raises((AdapterRejected, InvalidRequest, ModelNotFound)):
        await asyncio.wait_for(harness.operator.load("x", "a", in_place=False), 15)


def container(header: bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file, with any header, and a length that may lie."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def with_entry(entry: str, body: bytes = bytes(4), name: str = '"a"') -> bytes:
    return container(f"{{{name}: {entry}}}".encode(), body)


def entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0, 4]") -> str:
    return f'{{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}'


GOOD = safetensors.torch.save(tensors())
GOOD_HEADER = json.loads(GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")])
GOOD_BODY = GOOD[8 + int.from_bytes(GOOD[:8], "little") :]
FIRST, SECOND = f"{PREFIX}q_proj.lora_A.weight", f"{PREFIX}q_proj.lora_B.weight"


def changed(name: str, **fields: Any) -> bytes:
    """The good file, with one tensor's entry changed."""
    return container(json.dumps(GOOD_HEADER | {name: GOOD_HEADER[name] | fields}).encode(), GOOD_BODY)


ROOMY = replace(LIMITS, max_bytes=5_000_000)
MALFORMED: dict[str, bytes] = {
    **{f"cut at {size}": GOOD[:size] for size in (0, 1, 7, 8, 9, 100, len(GOOD) - len(GOOD_BODY), len(GOOD) - 1)},
    "a byte too many": GOOD + b"\0",
    "another file behind it": GOOD + GOOD,
    "a length of nothing": bytes(8) + GOOD[8:],
    "the largest length": container(b"{}", length=2**64 - 1),
    "a length with its sign bit": container(b"{}", length=2**63),
    "a length of 100 MB": container(b"{}", length=100_000_000),
    "a length beyond the file": container(b"{}", length=3),
    "no JSON": container(b"not JSON"),
    "no text": container(b"\xff\xfe\xfd"),
    "zeros": bytes(1000),
    "a list": container(b"[]"),
    "a number": container(b"7"),
    "null": container(b"null"),
    "two objects": container(b"{}{}"),
    "nothing in it": container(b"{}"),
    "only metadata": container(b'{"__metadata__": {"a": "b"}}'),
    "nested lists": container(b"[" * 90_000),
    "nested objects": container(b'{"a":' * 18_000),
    "a name twice": container(f'{{"a": {entry()}, "a": {entry()}}}'.encode(), bytes(4)),
    "a field twice": with_entry('{"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'),
    "the same bytes twice": changed(SECOND, data_offsets=GOOD_HEADER[FIRST]["data_offsets"], shape=[2, 6]),
    "overlapping by one": changed(SECOND, data_offsets=[one - 1 for one in GOOD_HEADER[SECOND]["data_offsets"]]),
    "a gap": changed(SECOND, data_offsets=[one + 1 for one in GOOD_HEADER[SECOND]["data_offsets"]]),
    "beyond the end": changed(SECOND, data_offsets=[10**6, 10**6 + 32]),
    "another shape": changed(FIRST, shape=[3, 6]),
    "transposed": changed(FIRST, shape=[6, 2]),
    "no dimensions": changed(FIRST, shape=[], data_offsets=[0, 4]),
    "an empty dimension": changed(FIRST, shape=[0, 6]),
    **{
        f"offsets {offsets}": with_entry(entry(offsets=offsets))
        for offsets in (
            "[-4, 0]", "[4, 0]", "[0, 8]", "[0, -4]", f"[0, {2**63}]", f"[{2**63}, {2**63 + 4}]",
            f"[{2**64}, {2**64 + 4}]", "[false, 4]", "[0, 4.0]", "[0, NaN]", "[0, Infinity]", "[0, 1e400]",
            '["0", "4"]', "[0]", "[0, 4, 8]", "[]", "4", "null", "{}", f"[0, {'9' * 4000}]", f"[0, {'9' * 5000}]",
        )
    },
    **{
        f"shape {shape[:40]}": with_entry(entry(shape=shape))
        for shape in (
            "[-1]", "[-1, -1]", "[true]", "[1.0]", "[NaN]", '["1"]', "[[1]]", "[null]", "1", "null", f"[{2**63}]",
            f"[{2**62}, 4]", f"[{2**32}, {2**32}]", f"[{'9' * 4000}]", "[0]", "[2]", f"[{'1, ' * 9000}1]",
            f"[{', '.join([str(2**62)] * 60_000)}]",
        )
    },
    **{
        f"dtype {dtype}": with_entry(entry(dtype=dtype, offsets=f"[0, {size}]"), bytes(size))
        for dtype, size in {
            '"F64"': 8, '"I64"': 8, '"I32"': 4, '"I8"': 1, '"U8"': 1, '"BOOL"': 1, '"F8_E4M3"': 1, '"F8_E5M2"': 1,
            '"F4"': 1, '"C64"': 8, '"f32"': 4, '"F32 "': 4, '""': 4, '"O"': 8, "null": 4, "7": 4, '["F32"]': 4,
        }.items()
    },
    **{
        f"an entry of {value}": with_entry(value)
        for value in ("null", "7", "[]", '"F32"', "{}", '{"dtype": "F32"}', '{"dtype": "F32", "shape": [1]}')
    },
    **{
        f"the name {name[:30]}": with_entry(entry(), name=json.dumps(name))
        for name in (
            "", "a\nERROR a line of its own", "\x1b[31mred", "\0", "\ud800", "\u202egnp", "x" * 900_000,
            "../../../etc/passwd", "a" + ".base_layer" * 60_000 + "!", "." * 500_000, "lora_A.weight" * 50_000,
        )
    },
}  # fmt: skip
"""Weights files that are none, each with what is wrong in it."""


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_weights_file_is_refused(folder: Path, data: bytes) -> None:
    """Offsets, sizes, names and types that lie, so that a reader reads beyond its bytes, or never ends.

    A name of 16,000 times ``.base_layer`` took three seconds, a shape of 80,000 numbers fifteen; both took four times
    as long for each doubling.
    """
    (folder / WEIGHTS_FILE).write_bytes(data)
    refusal(folder, ROOMY)


def test_the_good_file_of_these_tests_is_good(folder: Path) -> None:
    """Otherwise the files made from it would be refused for something else."""
    (folder / WEIGHTS_FILE).write_bytes(container(json.dumps(GOOD_HEADER).encode(), GOOD_BODY))
    assert read(folder).plan.rank == 2


NAN, INFINITY = float("nan"), float("inf")
NO_NUMBERS: list[Any] = [0, -1, True, "8", "high" * 1000, None, [], {}, 10**400]
NO_FLAGS: list[Any] = ["yes", 1, [], {"a": 1}]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        *[
            ({"init_lora_weights": init}, "init_lora_weights")
            for init in (
                "pissa", "PiSSA", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq", "LoftQ", "anything", "", 7,
                [], {}, ["pissa"], {"pissa": 1},
            )
        ],
        ({"init_lora_weights": "corda", "corda_config": {"cache_file": "/etc/passwd"}}, "init_lora_weights"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ({"arrow_config": {"path": "/etc"}}, "arrow_config"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": True}, "use_bdlora"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"peft_type": "XLORA", "adapters": {"a": "/etc"}}, "peft_type"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "/etc"}, "peft_type"),
        ({"peft_type": "POLY"}, "peft_type"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"task_type": "TOKEN_CLS"}, "task_type"),
        ({"task_type": {}}, "task_type"),
        *[({"lora_alpha": alpha}, "lora_alpha") for alpha in (
            INFINITY, NAN, -INFINITY, 1e308, 1e9, *NO_NUMBERS,
        )],
        *[({"r": r}, "r is ") for r in (2.5, 1e9, 10**9, 10**30, NAN, *NO_NUMBERS)],
        ({"r": 999_999_999}, "they are not of one adapter"),
        ({"rank_pattern": {"q_proj": 10**8}}, "they are not of one adapter"),
        *[({"rank_pattern": {"q_proj": rank}}, "rank_pattern") for rank in (0, -1, True, "2", 2.5, 10**30, None)],
        *[({"alpha_pattern": {"q_proj": alpha}}, "alpha_pattern") for alpha in (INFINITY, NAN, 1e308, 0, True)],
        ({"rank_pattern": [["q_proj", 2]]}, "rank_pattern"),
        ({"rank_pattern": {"(?=q)q_proj": 2}}, "lookarounds"),
        ({"alpha_pattern": {r"(q)_proj\1": 2}}, "backreferences"),
        ({"rank_pattern": {"(" * 300: 2}}, "cannot be matched"),
        ({"rank_pattern": {"x" * 600: 2}}, "characters; the limit is"),
        ({"rank_pattern": {"(.{0,30}){0,30}": 2}}, "cannot be matched"),
        ({"rank_pattern": {f"module{number}": 2 for number in range(3000)}}, "keys; the limit is"),
        ({"rank_pattern": {"\ud800": 2}}, "rank_pattern"),
        ({"modules_to_save": ["v_proj", "q_proj"], "target_modules": ["nothing"]}, None),
        ({"modules_to_save": "q_proj"}, "modules_to_save"),
        ({"modules_to_save": [["q_proj"]]}, "modules_to_save"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"target_modules": ["q_proj", 7]}, "target_modules"),
        ({"target_parameters": "q_proj"}, "target_parameters"),
        ({"trainable_token_indices": [0, 10**30]}, None),
        ({"trainable_token_indices": [True]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"lm_head": "all"}}, "trainable_token_indices"),
        ({"bias": ["all"]}, "bias"),
        ({"bias": "everything"}, "bias"),
        *[({flag: value}, flag) for flag in ("use_dora", "use_rslora", "lora_bias") for value in NO_FLAGS],
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True, "lora_bias": True}, "exclude each other"),
    ],
)  # fmt: skip
def test_a_hostile_config_is_refused(folder: Path, config: dict[str, Any], words: str | None) -> None:
    """Fields with which PEFT computes on the base, loads files, imports modules, or makes infinite scales.

    Where no words are given it asks for nothing that concerns this base, and may be served.
    """
    write(folder, config=CONFIG | config)
    since = time.perf_counter()
    if words is None:
        with contextlib.suppress(AdapterRejected):
            read(folder)
    else:
        assert words in refusal(folder)
    assert time.perf_counter() - since < 2 * QUICK


@pytest.mark.parametrize(
    "key", ["(a+)+$", "(a|a)*b", "(.*)*(.*)*(.*)*x", "(a*)*" * 50, ".*" * 170, "(x+x+)+y", "([^x]*)*q"]
)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_no_pattern_takes_long(folder: Path, name: str, key: str) -> None:
    """Expressions that take Python's engine for ever."""
    write(folder, config=CONFIG | {name: {f"({key}){number}": 2 for number in range(300)}})
    since = time.perf_counter()
    assert within(20, read, folder).plan.rank == 2
    assert time.perf_counter() - since < QUICK


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [f"module{number}" for number in range(50_000)]},
        {"trainable_token_indices": [number * (2**61 - 1) for number in range(1, 30_000)]},
        {"some_field": [[]] * 300_000},
        {"x" * 500_000: 1},
        {"some_field": "x" * 1_000_000},
        {"some_field": json.loads("[" * 400 + "]" * 400)},
    ],
    ids=["many names", "integers of one hash", "a long list", "a long field", "a long value", "a nested value"],
)
def test_no_config_takes_long(folder: Path, config: dict[str, Any]) -> None:
    """Lists and numbers that make every lookup slow: Python hashes all multiples of 2**61 - 1 alike."""
    write(folder, config=CONFIG | config)
    since = time.perf_counter()
    reason = ""
    try:
        within(60, read, folder)
    except AdapterRejected as error:
        reason = error.reason
    assert time.perf_counter() - since < QUICK
    assert len(reason) < 1000


def test_a_rank_over_the_limit_is_refused(folder: Path) -> None:
    """Rank and bytes decide what an adapter costs everybody."""
    weights = {name: one.repeat((8, 1) if "lora_A" in name else (1, 8)) for name, one in tensors().items()}
    write(folder, config=CONFIG | {"r": 16}, weights=weights)
    assert "its rank is 16; the limit is 8" in refusal(folder)
    write(folder, config=CONFIG | {"rank_pattern": {"q_proj|v_proj": 16}})
    assert "its rank is 16; the limit is 8" in refusal(folder)


def test_more_memory_than_there_is_for_adapters_is_refused_by_the_headers(folder: Path) -> None:
    """A file within its limit may take twice its size in memory."""
    assert "it needs 144 bytes in memory; the limit is 143" in refusal(folder, replace(LIMITS, max_memory=143))
    assert read(folder, replace(LIMITS, max_memory=144)).plan.num_bytes == 144


def test_modules_that_the_base_does_not_have_are_refused_however_many(folder: Path) -> None:
    """Thousands of modules, for a plan as large as the file."""
    header, at = {}, 0
    for number in range(3000):
        for part, shape in (("A", [2, 6]), ("B", [4, 2])):
            size = 4 * shape[0] * shape[1]
            header[f"base_model.model.model.layers.{number}.ghost.lora_{part}.weight"] = {
                "dtype": "F32", "shape": shape, "data_offsets": [at, at + size],
            }  # fmt: skip
            at += size
    (folder / WEIGHTS_FILE).write_bytes(container(json.dumps(header).encode(), bytes(at)))
    assert "and 2997 more: was it trained on another base?" in refusal(folder, replace(LIMITS, max_bytes=10**7))


@pytest.mark.parametrize("name", sorted(EXPECTED_FILES))
def test_a_file_over_its_limit_is_not_read(folder: Path, name: str) -> None:
    """Ten gigabytes of nothing take no room on disk, and would take all of the memory."""
    with open(folder / name, "ab") as file:
        file.truncate(10 << 30)
    tracemalloc.start()
    try:
        assert f"{name} has {10 << 30} bytes; the limit is" in refusal(folder)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_a_file_within_a_large_limit_is_listed_by_its_header_alone(folder: Path) -> None:
    """Thousands of large adapters at start: nothing but headers is read."""
    with open(folder / WEIGHTS_FILE, "ab") as file:
        file.truncate(10 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRejected, match="bytes more than its header describes"):
            list_folder(folder, BASE, replace(LIMITS, max_bytes=1 << 40))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", [FIRST, f"{PREFIX}v_proj.lora_B.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_none_are_found_wherever_they_are(
    folder: Path, dtype: torch.dtype, value: float, name: str, place: int
) -> None:
    """One NaN makes every answer one."""
    weights = {key: one.to(dtype) for key, one in tensors().items()}
    weights[name].view(-1)[place] = value
    write(folder, weights=weights)
    with pytest.raises(AdapterRejected, match="hold NaN or infinity"):
        read(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_and_smallest_numbers_are_numbers(folder: Path, dtype: torch.dtype) -> None:
    """Only the exponent of all ones is no number."""
    weights = {key: one.to(dtype) for key, one in tensors().items()}
    info = torch.finfo(dtype)
    weights[FIRST].view(-1)[:4] = torch.tensor([info.max, info.min, info.smallest_normal, 0], dtype=dtype)
    weights[FIRST].view(-1)[4:6] = torch.tensor([info.smallest_normal / 2, -0.0], dtype=dtype)
    write(folder, weights=weights)
    assert read(folder).plan.rank == 2


def overwrite_in_place(path: Path) -> None:
    """Other bytes in the same file, with the old size and the old time."""
    status, data = path.stat(), path.read_bytes()
    with open(path, "r+b") as file:
        file.write(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rename_over(path: Path) -> None:
    """Equal bytes in another file."""
    shutil.copy2(path, path.with_name("new"))
    path.with_name("new").rename(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights overwritten": lambda path: overwrite_in_place(path / WEIGHTS_FILE),
    "weights renamed over": lambda path: rename_over(path / WEIGHTS_FILE),
    "weights cut": lambda path: os.truncate(path / WEIGHTS_FILE, 100),
    "weights gone": lambda path: (path / WEIGHTS_FILE).unlink(missing_ok=True),
    "config replaced": lambda path: write(path, config=CONFIG | {"lora_alpha": 99}),
    "config broken": lambda path: (path / CONFIG_FILE).write_text("{"),
    "a sidecar": lambda path: write(path, sidecar=SIDECAR),
    "a file more": lambda path: (path / "README.md").write_text("new"),
    "another folder": lambda path: (path.rename(path.with_name("old")), make(path.parent, path.name, lora_alpha=99)),
    "folder gone": lambda path: path.rename(path.with_name("old")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_folder_that_changes_while_it_is_read_is_not_judged(
    tmp_path: Path, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files exchanged before, between and after those that are read: half of one version and half of another."""
    read_file, calls, phase, path = folder_module.read_file_at, 0, 0, tmp_path

    def step() -> None:
        nonlocal calls
        if calls == phase:
            change(path)
        calls += 1

    def read_and_step(*arguments: Any, **how: Any) -> Any:
        step()
        found = read_file(*arguments, **how)
        step()
        return found

    monkeypatch.setattr(folder_module, "read_file_at", read_and_step)
    reader = AdapterReader(BASE, LIMITS, check_defaults=lambda defaults: step())
    phases = 2 * len(EXPECTED_FILES) + 1  # around each file, and when all are read
    paths = [make(tmp_path / str(number), "good") for number in range(phases)]
    time.sleep(0.02)  # so that the changes get a time of their own
    for phase, path in enumerate(paths):
        calls = 0
        with pytest.raises(FolderMoved):
            await reader.manifest(path, folder_state(path), "good")
        assert calls > phase
    reader.close()


async def test_a_new_version_is_served_whole_or_not_at_all(tmp_path: Path) -> None:
    """A slow copy over a folder in use, file by file and byte by byte, in any order."""
    harness = AdapterHarness(tmp_path, settle=0.15)
    path = make(harness.first, "a")
    new = make(tmp_path, "new", r=4, lora_alpha=16)
    wide = {name: one.repeat((2, 1) if "lora_A" in name else (1, 2)) for name, one in tensors().items()}
    write(new, weights=wide, sidecar=SIDECAR)
    await harness.watcher.start()
    label = await harness.use("a")
    for names in ([CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE], [SIDECAR_FILE, WEIGHTS_FILE, CONFIG_FILE]):
        for name in names:
            data = (new / name).read_bytes()
            for size in (0, 1, 8, len(data) // 2, len(data)):
                (path / name).write_bytes(data[:size])
                await harness.watcher.scan()
                assert await harness.use(label) == label
        await asyncio.sleep(0.2)
        await harness.watcher.scan()
        assert (await harness.use("a")).removeprefix("a@") == read(new).version_digest[:12]
        shutil.rmtree(path)
        make(harness.first, "a")
        await asyncio.sleep(0.2)
        await harness.watcher.scan()
        assert await harness.use("a") == label


@pytest.mark.parametrize("size", [0, 1, 8, 100, -1])
async def test_a_copy_that_stalls_is_refused_and_the_version_before_stays(harness: AdapterHarness, size: int) -> None:
    """Half a file that stays so for longer than a folder takes to settle."""
    path = make(harness.first, "a")
    await harness.watcher.scan()
    label = await harness.use("a")
    (path / WEIGHTS_FILE).write_bytes(GOOD[:size])
    await harness.watcher.scan()
    assert await harness.use("a") == label
    assert "truncated" in str(harness.registry.get("a").refused)
    weights = tensors() | {FIRST: torch.full((2, 6), 3.0)}
    write(path, weights=weights)
    await harness.watcher.scan()
    assert await harness.use("a") != label


async def test_a_name_whose_folder_changes_before_it_was_hashed_stays_known(
    harness: AdapterHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder replaced soon after it was listed: its name was a 404 while its headers were read again."""
    path, listing = make(harness.first, "a"), harness.reader.listing
    await harness.watcher.scan()
    known = []

    async def watched(*arguments: Any) -> Any:
        known.append("a" in harness.registry)
        return await listing(*arguments)

    monkeypatch.setattr(harness.reader, "listing", watched)
    write(path, config=CONFIG | {"lora_alpha": 16})
    await harness.watcher.scan()
    assert False not in known
    assert (await harness.use("a")).removeprefix("a@") == read(path).version_digest[:12]


async def test_what_is_loaded_is_what_the_answers_label_says(tmp_path: Path) -> None:
    """A folder replaced again and again while it is asked for: weights of one version under the name of another."""
    loaded: dict[str, list[float]] = {}

    class Noting(AdapterHarness):
        async def _load(self, manifest: Manifest) -> Loaded:
            loaded.setdefault(manifest.weights_digest, []).append(manifest.config.alpha)
            await asyncio.sleep(0.001)
            return Loaded(1.0, NUM_BYTES)

    harness = Noting(tmp_path, room=2)
    path = make(harness.first, "a", lora_alpha=1)
    expected = {read(path).weights_digest: 1.0}
    await harness.watcher.scan()
    await harness.use("a")
    leases = []

    async def ask() -> None:
        while len(expected) < 20:
            lease = await harness.adapters.acquire("a")
            leases.append(lease)
            await asyncio.sleep(0.002)
            lease.release()

    asking = [asyncio.ensure_future(ask()) for _ in range(4)]
    for alpha in range(2, 21):
        write(path, config=CONFIG | {"lora_alpha": alpha})
        expected[read(path).weights_digest] = float(alpha)
        await harness.watcher.scan()
        await asyncio.sleep(0.01)
    await asyncio.wait_for(asyncio.gather(*asking), 15)
    harness.cache.check_integrity()
    assert len({lease.label for lease in leases}) > 5
    for lease in leases:
        digest = lease.adapters[0].adapter.weights_digest
        assert set(loaded[digest]) == {expected[digest]}


PAYLOADS = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__base__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ [''|attr('\\x5f\\x5fclass\\x5f\\x5f')] }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|map('attr', '__class__')|list }}",
    "{{ messages|groupby('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': messages}) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ strftime_now.__globals__ }}",
    "{{ dict.__class__.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ loop.__class__ }}{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{{ messages.__iter__.__self__.__class__ }}",
    "{{ (messages|list).append(1) }}",
    "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
    "{{ messages.pop() }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages[0].setdefault('x', 'x') }}",
    "{{ messages[0].__setitem__('content', 'x') }}",
    "{% set messages[0].content = 'x' %}",
    "{% set raise_exception.x = 1 %}",
    "{{ open('SECRET').read() }}",
    "{% include 'SECRET' %}",
    "{% import 'SECRET' as x %}{{ x }}",
    "{% extends 'SECRET' %}",
    "{{ get_source('SECRET') }}",
    "{{ config }}{{ request }}{{ environ }}{{ settings }}",
    "{% debug %}",
    "{% do messages.append(1) %}",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_template_gets_at_nothing_but_its_messages(tmp_path: Path, payload: str) -> None:
    """Code, files and other people's values by way of attributes; messages changed under the server's feet."""
    secret = tmp_path / "secret"
    secret.write_text("the secret of this test")
    prompts = PromptRenderer(small_tokenizer())
    before, messages = prompts.chat(MESSAGES), [dict(message) for message in MESSAGES]
    try:
        text = prompts.decode(prompts.chat(messages, template="." + payload.replace("SECRET", str(secret))))
    except InvalidRequest as error:
        text = str(error)
        assert text.startswith("The chat template refuses these messages: ")
    else:
        assert text in (".", ".[Undefined]") or text.startswith(".[(Undefined")
    assert "secret of" not in text
    assert messages == MESSAGES
    assert prompts.chat(MESSAGES) == before


BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "filters": "{{ ('ab ' * 1000000)|wordwrap(10)|length }}",
    "generators": "{% for a in range(99999) %}{{ range(99999)|map('string')|select('eq', '')|list }}{% endfor %}",
    "text": "{% for a in range(99999) %}{{ 'hello there ' * 9 }}{% endfor %}",
    "special tokens": "{% for a in range(99999) %}<|user|><|user|><|user|><|user|><|user|><|user|>{% endfor %}",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
async def test_a_template_without_an_end_is_broken_off_while_others_are_served(
    harness: AdapterHarness, bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loops, recursion and text without an end.

    What was broken off while jinja2 folded constants went on; text of 10 MB was made into tokens for ten seconds.
    """
    monkeypatch.setattr(template_process, "MAX_CPU_SECONDS", 0.3)
    write(make(harness.first, "bomb"), sidecar=SIDECAR | {"chat_template": bomb})
    await harness.watcher.scan()
    app = create_app(state_of(harness))
    await call(app, "POST", CHAT, chat(BASE.name))
    since = time.perf_counter()
    exploding = asyncio.ensure_future(call(app, "POST", CHAT, chat("bomb")))
    await asyncio.sleep(0.05)
    assert (await call(app, "POST", CHAT, chat(BASE.name)))[0] == 200
    assert time.perf_counter() - since < 2
    status, body = await exploding
    assert time.perf_counter() - since < 6
    assert status == 400
    assert "takes too long" in body or "characters" in body
    assert all(not harness.cache.num_leases(digest) for digest in harness.cache.digests)


def test_a_template_that_could_not_be_broken_off_is_refused_before_it_is_compiled() -> None:
    """A power of large numbers is one call into C, which holds up every thread of the process, for hours."""
    prompts = PromptRenderer(small_tokenizer())
    for bomb in (
        "{{ 9 ** 9 ** 9 }}",
        "{% if messages|length > 7 %}{{ 9**9**9 }}{% endif %}x",
        "{%- set x = 9 **9 %}{{ x }}",
    ):
        with pytest.raises(ValueError, match=r"\*\*"):
            within(5, prompts.check_template, bomb)
    prompts.check_template("**{{ messages[0].content }}** {# 9**9 #}{{ '**' }}")


@pytest.mark.parametrize(
    "more",
    [
        {"chat_template": "{{ 7 * 7 }}"},
        {"chat_template_kwargs": {"tokenize": True}},
        {"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}},
        {"template": "x"},
    ],
)
async def test_a_request_brings_no_template(harness: AdapterHarness, more: dict[str, Any]) -> None:
    """Templates and their arguments from clients."""
    app = create_app(state_of(harness))
    status, body = await call(app, "POST", CHAT, chat(BASE.name, **more))
    assert (status, json.loads(body)["error"]["code"]) == (400, "unsupported_parameter")


CANARY = "canary-7f3a"


async def test_what_an_adapter_says_stays_out_of_logs_metrics_and_errors(
    harness: AdapterHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """System prompts and templates are somebody's work, and may hold what nobody else should read."""
    caplog.set_level(logging.DEBUG)
    said = {
        "system_prompt": f"{CANARY} You rhyme.",
        "chat_template": "{{ raise_exception('two') if messages|length > 3 }}" + CANARY + "{{ messages[0].content }}",
        "stop": [f"{CANARY} stop"],
        "training": None,
        "quality": {CANARY: CANARY},
    }
    path = make(harness.first, "quiet")
    write(path, sidecar=SIDECAR | said)
    await harness.watcher.scan()
    app = create_app(state_of(harness))
    assert (await call(app, "POST", CHAT, chat("quiet")))[0] == 200
    four = {"messages": [{"role": "user", "content": "hello"}] * 4}
    replies = [
        await call(app, "POST", CHAT, chat("quiet") | four),
        await call(app, "POST", CHAT, chat("quiet", max_tokens=0)),
        await call(app, "POST", CHAT, chat("quiet", lora_scale=9)),
        await call(app, "POST", CHAT, chat("quiet@0000")),
        await call(app, "POST", CHAT, chat("quiet+quiet")),
        await call(app, "DELETE", "/v1/models/quieter"),
    ]
    write(path, config=CONFIG | {"layer_replication": [[0, 2]]})
    await harness.watcher.scan()
    replies.append(await call(app, "POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "quiet"}))
    assert all(status in (400, 404) for status, _ in replies), replies
    replies += [await call(app, "GET", url) for url in ("/metrics", "/v1/models", "/health")]
    assert len(caplog.records) > 3
    assert [body for _, body in replies if CANARY in body] == []
    assert [record for record in caplog.records if CANARY in record.getMessage() + (record.exc_text or "")] == []


EVIL, WORSE = "evil\nERROR a line of its own\x1b[31m\u2028", "\ud800"
RAW: dict[str, Callable[[Path], object]] = {
    "a tensor's name": lambda path: (path / WEIGHTS_FILE).write_bytes(with_entry(entry(), name=json.dumps(EVIL))),
    "a module's name": lambda path: (path / WEIGHTS_FILE).write_bytes(
        with_entry(entry(), name=json.dumps(f"base_model.model.{EVIL}.lora_A.weight"))
    ),
    "a tensor's name that is no text": lambda path: (path / WEIGHTS_FILE).write_bytes(
        with_entry(entry(), name=json.dumps(WORSE))
    ),
    "a field of the config": lambda path: write(path, config=CONFIG | {EVIL: 1}),
    "a field of the config that is no text": lambda path: write(path, config=CONFIG | {WORSE: 1}),
    "a value in the config": lambda path: write(path, config=CONFIG | {"peft_type": EVIL}),
    "a key of a pattern": lambda path: write(path, config=CONFIG | {"rank_pattern": {f"([{EVIL}": 2}}),
    "a field of the sidecar": lambda path: write(path, sidecar=SIDECAR | {EVIL: 1}),
    "a field of the sidecar that is no text": lambda path: write(path, sidecar=SIDECAR | {WORSE: 1}),
    "a nested field of the sidecar": lambda path: write(path, sidecar=SIDECAR | {"sampling": {EVIL: 1}}),
    "the base in the sidecar": lambda path: write(
        path, sidecar=SIDECAR | {"base": {"name": EVIL, "fingerprint": "sha256:" + "b" * 64}}
    ),
    "the folder's name": lambda path: path.rename(path.parent / EVIL),
    "a folder's name that is no text": lambda path: path.rename(os.fsdecode(os.fsencode(path.parent) + b"/\xff")),
    "a file that is no adapter's": lambda path: (path / WEIGHTS_FILE).rename(path / EVIL),
}


@pytest.mark.parametrize("damage", RAW.values(), ids=RAW)
async def test_no_text_of_a_folder_begins_a_line_of_its_own(
    harness: AdapterHarness, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    """Line feeds and terminal codes in names, which forge lines in the log, or cannot be written at all."""
    caplog.set_level(logging.DEBUG)
    path = make(harness.first, "a")
    damage(path)
    await harness.watcher.scan()
    if path.exists():
        load = {"lora_name": "x", "lora_path": "a"}
        status, body = await call(create_app(state_of(harness)), "POST", "/v1/load_lora_adapter", load)
        assert status == 400
        assert body.isprintable()
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("quickchange")]
    assert lines
    assert [line for line in lines if not line.isprintable()] == []


async def test_no_text_of_the_aliases_begins_a_line_of_its_own(
    harness: AdapterHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """The same, in the file of aliases."""
    make(harness.first, "a")
    for text in (
        f'{json.dumps(EVIL)} = "a"',
        f"a = {json.dumps(EVIL)}",
        f"a = {{{json.dumps(EVIL)} = 1}}",
        EVIL,
        "\ufffe",
    ):
        (harness.first / "aliases.toml").write_text(text)
        await harness.watcher.scan()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) >= 4
    assert [line for line in lines if not line.isprintable()] == []


async def test_a_refused_successor_can_be_asked_about(harness: AdapterHarness) -> None:
    """Why a folder is not served is told in the model's details, whatever its text holds."""
    path = make(harness.first, "a")
    await harness.watcher.scan()
    await harness.use("a")
    write(path, config=CONFIG | {EVIL + WORSE: 1})
    await harness.watcher.scan()
    status, body = await call(create_app(state_of(harness)), "GET", "/v1/models/a")
    assert status == 200
    assert "is not supported" in json.loads(body)["refused"]


async def test_ten_thousand_random_names_leave_no_trace_in_the_metrics(harness: AdapterHarness) -> None:
    """Labels made of what clients write fill the memory of the server, and that of whoever watches it."""
    make(harness.first, "good")
    await harness.watcher.scan()
    app = create_app(state_of(harness))

    async def series() -> set[str]:
        _, text = await call(app, "GET", "/metrics")
        return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}

    for model in ("good", "nobody", "good:x", "nobody+good"):
        await call(app, "POST", CHAT, chat(model))
    before = await series()
    assert 'quickchange_requests_total{adapter="good",finish_reason="stop"}' in before
    draw, signs = random.Random(7), string.ascii_letters + string.digits + "._-@:+/ é\n"
    for number in range(10_000):
        name = "".join(draw.choices(signs, k=draw.randint(1, 60)))
        if number % 20:
            with pytest.raises((ModelNotFound, InvalidRequest)):
                await harness.adapters.acquire(name)
        else:
            await call(app, "POST", CHAT, chat(name))
    assert await series() == before
    assert harness.names == ["good"]
