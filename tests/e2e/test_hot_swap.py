"""Adapters replaced, overwritten, renamed, pinned and deleted under a running server's requests."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.serving import ROOT, ServerProcess, running_server, vary

SETTLE, GRACE = 0.2, 1.5
KEY = b"an-admin-key-for-tests"
LONG = 100
WEIGHTS = "adapter_model.safetensors"
QUESTION = "Write about a house by the river."
PROMPT, STOP = "Speak of war and peace.", "river"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}{{ ' and so on' * 9 }}"
HEADER = "x-quickchange-adapter"


@dataclass(frozen=True)
class Answer:
    """An answer, the label of what gave it, and how long its prompt was."""

    text: str
    label: str
    prompt_tokens: int


@dataclass(frozen=True)
class Stage:
    """A server with an adapter folder and a state directory of its own; ``before`` are its answers before a restart.

    Contents are written beside the folder, and copied or renamed into it.
    """

    server: ServerProcess
    client: OpenAI
    root: Path
    before: tuple[Answer, ...] = ()

    @property
    def folder(self) -> Path:
        """The adapter folder."""
        return self.root / "adapters"

    def put(self, name: str, number: int) -> None:
        """Rename a content into place, and wait until it is what the name means."""
        before, fresh, target = self.digest(name), content(self.root, number), self.folder / name
        if target.exists():
            target.rename(self.root / f"old-{fresh.name}")
        fresh.rename(target)
        self.server.until(f"{name} is new", lambda: self.digest(name) not in (None, before))

    def digest(self, name: str) -> str | None:
        """Of the version that a name means; None where it is not listed, or still to be hashed."""
        listed = httpx.get(f"{self.server.url}/v1/models").json()["data"]
        return next((model["digest"] for model in listed if model["id"] == name), None)

    def ask(self, model: str, *, max_tokens: int = 12, **more: Any) -> Answer:
        """An answer at temperature 0."""
        raw = self.client.chat.completions.with_raw_response.create(
            model=model,
            messages=more.pop("messages", [{"role": "user", "content": QUESTION}]),
            temperature=0,
            max_tokens=max_tokens,
            **more,
        )
        completion = raw.parse()
        assert completion.usage is not None
        return Answer(
            completion.choices[0].message.content or "", raw.headers.get(HEADER, ""), completion.usage.prompt_tokens
        )

    def admin(self, method: str, path: str, key: bytes = KEY, **body: Any) -> httpx.Response:
        """A request with the admin key."""
        headers = {b"authorization": b"Bearer " + key}
        return httpx.request(method, f"{self.server.url}{path}", json=body or None, headers=headers, timeout=30)


def content(root: Path, number: int, **sidecar: Any) -> Path:
    """A folder to be put in place; those of different numbers answer differently."""
    demo = ROOT / "adapters" / ("tolstoy", "shakespeare")[number % 2]
    path = root / f"content-{number}-{len(list(root.iterdir()))}"
    return vary(demo, path, factor=0.8 + 0.2 * number, rank=8, seed=number, **sidecar)


class Stream:
    """A long answer that is being streamed; its first piece has come."""

    def __init__(self, stage: Stage, model: str) -> None:
        raw = stage.client.chat.completions.with_raw_response.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=LONG,
            stream=True,
        )
        self.label = raw.headers[HEADER]
        self._pieces = (text for chunk in raw.parse() if (text := chunk.choices[0].delta.content))
        self.text = next(self._pieces)

    def rest(self) -> list[str]:
        """The pieces that come after this call."""
        pieces = list(self._pieces)
        self.text += "".join(pieces)
        return pieces


def client_of(server: ServerProcess) -> OpenAI:
    """OpenAI's own client; at the end of a ``with`` block it closes its connections."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A server in its second life: in the first, ``veteran`` was served in two versions.

    At its second start there are ``one`` and ``two``, and what has the weights of ``two`` and other
    generation defaults.
    """
    root = tmp_path_factory.mktemp("stage")
    (root / "adapters").mkdir()
    flags = ("--adapters-dir", str(root / "adapters"), "--no-demo-adapters", "--state-dir", str(root / "state"))
    times = ("--scan-interval", str(SETTLE), "--removal-grace", str(GRACE))
    with running_server(*flags, *times) as server, client_of(server) as client:
        first = Stage(server, client, root)
        first.put("veteran", 1)
        old = first.ask("veteran")
        first.put("veteran", 2)
        before = (old, first.ask("veteran"))
    defaults: dict[str, dict[str, Any]] = {
        "led": {"system_prompt": PROMPT}, "templated": {"chat_template": TEMPLATE}, "stopped": {"stop": [STOP]}
    }  # fmt: skip
    for name, number in (("one", 1), ("two", 2), *((name, 2) for name in defaults)):
        content(root, number, **defaults.get(name, {})).rename(root / "adapters" / name)
    with running_server(*flags, *times, "--admin-key", KEY.decode()) as server, client_of(server) as client:
        yield Stage(server, client, root, before)


def test_a_stream_ends_on_the_version_it_began_with_and_the_next_request_has_the_new_one(stage: Stage) -> None:
    stage.put("swapped", 6)
    old, whole = stage.ask("swapped"), stage.ask("swapped", max_tokens=LONG)
    stream = Stream(stage, "swapped")
    stage.put("swapped", 3)
    new = stage.ask("swapped")
    assert len(stream.rest()) > 10, "the stream was over before the adapter was replaced"
    assert (stream.text, stream.label) == (whole.text, old.label)
    assert new.text != old.text and new.label == f"swapped@{str(stage.digest('swapped'))[:12]}"
    assert stage.ask(old.label) == old
    assert stage.ask(old.label[: len("swapped@") + 6]) == old


def test_versions_outlive_a_restart_and_their_folder(stage: Stage) -> None:
    old, new = stage.before
    assert [stage.ask(answer.label) for answer in stage.before] == [old, new]
    assert stage.ask("veteran") == new
    shutil.rmtree(stage.folder / "veteran")
    stage.server.until("veteran is gone", lambda: stage.digest("veteran") is None)
    assert stage.ask(old.label) == old
    with pytest.raises(openai.NotFoundError):
        stage.ask("veteran")


def copy_slowly(source: Path, target: Path) -> Iterator[None]:
    """``cp -r``, file by file and piece by piece, with a pause after each; yields while something is missing."""
    target.mkdir(exist_ok=True)
    for file in ("adapter_config.json", "quickchange.json", WEIGHTS):
        data = (source / file).read_bytes()
        with open(target / file, "wb", buffering=0) as copy:
            for start in range(0, len(data), 1 + len(data) // 3):
                copy.write(data[start : start + 1 + len(data) // 3])
                if file != WEIGHTS or copy.tell() < len(data):
                    time.sleep(SETTLE / 3)
                    yield


def test_a_folder_that_is_being_copied_is_not_served_until_it_is_whole(stage: Stage) -> None:
    for _ in copy_slowly(stage.folder / "two", stage.folder / "copied"):
        assert "copied" not in stage.server.models()
    stage.server.until("it is listed", lambda: "copied" in stage.server.models())
    assert stage.ask("copied").text == stage.ask("two").text


def test_a_name_that_shares_its_weights_leaves_no_series_behind(stage: Stage) -> None:
    """Only names whose own request had loaded the weights were known to the metrics, and so forgotten."""
    stage.ask("two")
    shutil.copytree(stage.folder / "two", stage.folder / "twin")
    stage.server.until("it is listed", lambda: "twin" in stage.server.models())
    stage.ask("twin")
    assert stage.server.metric("quickchange_requests_total", adapter="twin", finish_reason="length") == 1
    shutil.rmtree(stage.folder / "twin")
    stage.server.until("it is gone", lambda: "twin" not in stage.server.models())
    assert [series for series in stage.server.series() if 'adapter="twin"' in series] == []


def test_while_a_folder_is_copied_over_another_the_other_is_served(stage: Stage) -> None:
    stage.put("covered", 3)
    old, new = stage.ask("covered"), stage.ask("two")
    for _ in copy_slowly(stage.folder / "two", stage.folder / "covered"):
        assert stage.ask("covered", max_tokens=2).label == old.label
    stage.server.until("the name has moved", lambda: stage.ask("covered").label != old.label)
    assert stage.ask("covered").text == new.text


def test_what_happens_to_the_files_does_not_reach_a_running_stream(stage: Stage) -> None:
    stage.put("spoiled", 4)
    whole = stage.ask("spoiled", max_tokens=LONG)
    stream = Stream(stage, "spoiled")
    weights = stage.folder / "spoiled" / WEIGHTS
    size = weights.stat().st_size
    with open(weights, "r+b", buffering=0) as file:
        file.write(bytes(size))
        file.truncate(100)
    assert len(stream.rest()) > LONG // 2
    assert (stream.text, stream.label) == (whole.text, whole.label)
    assert whole.text.startswith(stage.ask("spoiled").text[:30])


def test_a_name_taken_away_and_put_back_within_the_grace_is_never_missing(stage: Stage) -> None:
    stage.put("away", 3)
    old, fresh = stage.ask("away", max_tokens=1), content(stage.root, 4)
    (stage.folder / "away").rename(stage.root / "away")
    since = time.monotonic()
    while time.monotonic() - since < 2 * SETTLE:
        assert stage.ask("away", max_tokens=1).label == old.label
    fresh.rename(stage.folder / "away")
    stage.server.until("the name has moved", lambda: stage.ask("away", max_tokens=1).label != old.label)


def test_aliases_plain_and_weighted(stage: Stage) -> None:
    aliases = stage.folder / "aliases.toml"
    aliases.write_text('support = "one"\ncanary = {one = 0.5, two = 0.5}\n')
    stage.server.until("the aliases are listed", lambda: {"support", "canary"} <= set(stage.server.models()))
    assert stage.ask("support") == stage.ask("one")
    users = [f"user-{number}" for number in range(8)]
    labels = [stage.ask("canary", user=user, max_tokens=1).label for user in users]
    assert [stage.ask("canary", user=user, max_tokens=1).label for user in users] == labels
    assert set(labels) == {stage.ask("one").label, stage.ask("two").label}
    aliases.unlink()
    stage.server.until("the aliases are gone", lambda: "support" not in stage.server.models())


def test_adapters_are_scaled_and_added_up(stage: Stage) -> None:
    one, two, base = (stage.ask(model) for model in ("one", "two", "micro"))
    both = stage.ask("one:0.5+two:0.5")
    assert both.label == f"{one.label}:0.5+{two.label}:0.5"
    assert len({answer.text for answer in (one, two, both, base)}) == 4
    assert stage.ask(both.label) == both
    assert stage.ask("one:1+two:0").text == one.text
    assert stage.ask("one:0").text == base.text
    assert stage.ask("one", extra_body={"lora_scale": 0.5}) == stage.ask("one:0.5")
    assert stage.ask("one", extra_body={"lora_scale": 1}) == one
    assert stage.ask("micro", extra_body={"lora_scale": 1}) == stage.ask("micro")


@pytest.mark.parametrize(
    ("model", "scale", "error", "param"),
    [
        ("one:0.5+two", 0.5, openai.BadRequestError, "lora_scale"),
        ("micro", 0.5, openai.BadRequestError, "lora_scale"),
        ("one", 3, openai.BadRequestError, "lora_scale"),
        ("one:5+two", None, openai.BadRequestError, "model"),
        ("one+one", None, openai.BadRequestError, "model"),
        ("one+ghost", None, openai.NotFoundError, "model"),
        ("one@00000000", None, openai.NotFoundError, "model"),
    ],
)
def test_what_cannot_be_composed_is_refused(
    stage: Stage, model: str, scale: float | None, error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        stage.ask(model, extra_body={} if scale is None else {"lora_scale": scale})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/load_lora_adapter", {"lora_name": "guest", "lora_path": "one"}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "one"}),
        ("DELETE", "/v1/models/one", {}),
        ("POST", "/v1/models/one/pin", {"version": "abcd"}),
        ("POST", "/v1/models/one/unpin", {}),
        ("POST", "/v1/models/one/rollback", {}),
    ],
)
def test_without_the_key_nothing_is_changed(
    stage: Stage, server: ServerProcess, method: str, path: str, body: dict[str, Any]
) -> None:
    off = httpx.request(method, f"{server.url}{path}", json=body, headers={b"authorization": b"Bearer " + KEY})
    assert (off.status_code, off.json()["error"]["code"]) == (403, "admin_off")
    for wrong in (b"x", b"another-admin-key", "schlüssel-ohne-wert".encode(), b"\xff\xfe" * 8):
        answer = stage.admin(method, path, wrong, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert "one" in stage.server.models() and "guest" not in stage.server.models()


def test_load_unload_and_delete(stage: Stage) -> None:
    two = stage.ask("two")
    shutil.copytree(stage.folder / "two", stage.folder / "nested" / "guest")
    loaded = stage.admin("POST", "/v1/load_lora_adapter", lora_name="guest", lora_path="nested/guest")
    assert (loaded.status_code, loaded.json()["adapter"]) == (200, two.label.replace("two", "guest"))
    assert stage.ask("guest").text == two.text
    again = stage.admin("POST", "/v1/load_lora_adapter", lora_name="guest", lora_path="two")
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    outside = stage.admin("POST", "/v1/load_lora_adapter", lora_name="thief", lora_path="../state")
    assert (outside.status_code, outside.json()["error"]["param"]) == (400, "lora_path")
    assert stage.admin("POST", "/v1/unload_lora_adapter", lora_name="guest").status_code == 200
    assert "guest" not in stage.server.models()
    assert stage.admin("POST", "/v1/unload_lora_adapter", lora_name="guest").status_code == 404
    stage.put("doomed", 3)
    doomed = stage.ask("doomed", max_tokens=1)
    assert stage.admin("DELETE", "/v1/models/doomed").json() == {"id": "doomed", "object": "model", "deleted": True}
    assert "doomed" not in stage.server.models() and not (stage.folder / "doomed").exists()
    with pytest.raises(openai.NotFoundError):
        stage.ask(doomed.label)


def test_an_adapter_loaded_in_the_place_of_a_folder_stays_unloaded(stage: Stage) -> None:
    """The folder of that name, which had not changed, was served again at the next look."""
    stage.put("taken", 3)
    loaded = stage.admin("POST", "/v1/load_lora_adapter", lora_name="taken", lora_path="two", load_inplace=True)
    assert loaded.json()["adapter"] == stage.ask("two").label.replace("two", "taken")
    assert stage.admin("POST", "/v1/unload_lora_adapter", lora_name="taken").status_code == 200
    shutil.copytree(stage.folder / "two", stage.folder / "later")
    stage.server.until("the folders were looked at", lambda: "later" in stage.server.models())
    assert "taken" not in stage.server.models()


def test_pin_roll_back_and_unpin(stage: Stage) -> None:
    stage.put("pinned", 3)
    old = stage.ask("pinned")
    stage.put("pinned", 4)
    new = stage.ask("pinned")
    assert stage.admin("POST", "/v1/models/pinned/rollback").json()["pinned"] == old.label
    assert stage.ask("pinned") == old
    version = new.label.partition("@")[2]
    assert stage.admin("POST", "/v1/models/pinned/pin", version=version).json()["pinned"] == new.label
    assert stage.ask("pinned") == new
    assert stage.admin("POST", "/v1/models/pinned/pin", version="0" * 12).status_code == 404
    assert stage.admin("POST", "/v1/models/pinned/rollback").json()["pinned"] == old.label
    pin = json.loads((stage.root / "state" / "pins" / "pinned.json").read_text())
    assert pin["version"].startswith(old.label.partition("@")[2])
    assert stage.admin("POST", "/v1/models/pinned/unpin").status_code == 200
    assert stage.ask("pinned") == new


def test_a_model_tells_what_is_known_of_it(stage: Stage) -> None:
    label = stage.ask("led").label
    told = httpx.get(f"{stage.server.url}/v1/models/led").json()
    assert label == f"led@{told['digest'][:12]}" and told["digest"][:12] in told["versions"]
    assert (told["parent"], told["state"], told["leases"], told["refused"]) == ("micro", "resident", 0, None)
    assert (told["rank"], told["num_modules"], len(told["targets"])) == (8, 42, 7)
    assert told["num_bytes"] > 1_000_000 and told["delta_norm"] > 0
    assert (told["base_check"], told["composable"]) == ("fingerprint", True)
    assert told["pinned"] == {"version": None, "resident": False}
    assert told["defaults"] == {"system_prompt": PROMPT}
    assert httpx.get(f"{stage.server.url}/v1/models/ghost").status_code == 404


def test_an_adapters_generation_defaults_apply_where_the_request_says_nothing(stage: Stage) -> None:
    messages = [{"role": "system", "content": "Speak."}, {"role": "user", "content": QUESTION}]
    two, led, templated = (stage.ask(model) for model in ("two", "led", "templated"))
    assert two.prompt_tokens < led.prompt_tokens < templated.prompt_tokens
    with_its_own = stage.ask("led", messages=messages)
    assert with_its_own.prompt_tokens < led.prompt_tokens
    assert with_its_own.text == stage.ask("two", messages=messages).text


def test_stop_strings_of_adapter_and_request_are_united(stage: Stage) -> None:
    whole = stage.ask("two").text
    asked = whole.split()[2]
    assert STOP in whole and whole.index(asked) < whole.index(STOP)
    assert stage.ask("stopped").text == whole.partition(STOP)[0]
    assert stage.ask("stopped", stop=[asked]).text == whole.partition(asked)[0]
    assert stage.ask("stopped", stop=["nothing that comes"]).text == whole.partition(STOP)[0]
