"""What version 2 of the sidecar adds: a second fingerprint, end tokens, variables of the template, a verdict."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.adapters.content.folder import folder_state
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.content.manifest import Manifest, read_manifest
from server.adapters.registry import Adapter
from server.api.app import create_app
from server.api.generation import end_ids, overlay
from server.errors import AdapterRejected
from server.text.prompt import PromptRenderer
from tests.adapter_folders import BASE, FINGERPRINT, LIMITS, SIDECAR, AdapterHarness, make, write
from tests.fakes import TEMPLATE, FakeEngine, adapter, ask, encode, server_state, small_tokenizer

V2, OTHER = "sha256:" + "c" * 64, "sha256:" + "b" * 64
KNOWING = replace(BASE, fingerprint_v2=V2)
MESSAGES = [{"role": "user", "content": "hello"}]
CHAT = {"model": "poet", "messages": MESSAGES}
VERDICT = {"status": "warn", "checks": {"loss": {"status": "pass", "value": 1.5}, "format": {"status": "warn"}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path, "good")


def read(path: Path, *, base: dict[str, Any] | None = None, **said: Any) -> Manifest:
    """The folder with a sidecar of version 2."""
    where = {"name": "base", "fingerprint_v2": V2} if base is None else {"name": "base", **base}
    write(path, sidecar=SIDECAR | {"schema_version": 2, "base": where} | said)
    return read_manifest(path, KNOWING, LIMITS)


def test_the_fingerprint_of_version_2_decides_where_it_is_there(folder: Path) -> None:
    assert read(folder).base_check == "fingerprint_v2"
    assert read(folder, base={"fingerprint": FINGERPRINT, "fingerprint_v2": V2}).base_check == "fingerprint_v2"
    resaved = {"fingerprint": OTHER, "fingerprint_v2": V2}
    assert read(folder, base=resaved).base_check == "fingerprint_v2", "the same weights in other files"


def test_the_fingerprint_of_version_1_is_accepted_alone(folder: Path) -> None:
    """Adapters that were published before there was another."""
    assert read(folder, base={"fingerprint": FINGERPRINT}).base_check == "fingerprint"
    assert read(folder, schema_version=1, base={"fingerprint": FINGERPRINT}).base_check == "fingerprint"
    write(folder, sidecar=SIDECAR)
    assert read_manifest(folder, KNOWING, LIMITS).base_check == "fingerprint"
    (folder / "quickchange.json").unlink()
    assert read_manifest(folder, KNOWING, LIMITS).base_check == "shapes"


def test_the_same_edges_with_other_weights_are_another_base(folder: Path) -> None:
    with pytest.raises(AdapterRejected, match="its fingerprint of version 1 is the same") as refused:
        read(folder, base={"fingerprint": FINGERPRINT, "fingerprint_v2": OTHER})
    assert f"another base (base, fingerprint {OTHER[:19]})" in str(refused.value)
    assert f"this server runs base ({V2[:19]})" in str(refused.value)


@pytest.mark.parametrize(
    "theirs", [{"fingerprint_v2": OTHER}, {"fingerprint": OTHER}, {"fingerprint": OTHER, "fingerprint_v2": OTHER}]
)
def test_another_fingerprint_is_another_base(folder: Path, theirs: dict[str, str]) -> None:
    with pytest.raises(AdapterRejected, match="it was trained on another base") as refused:
        read(folder, base=theirs)
    assert "version 1" not in str(refused.value)


def test_a_version_that_is_not_known_yet_is_refused_with_the_way_out(folder: Path) -> None:
    with pytest.raises(AdapterRejected, match=r"schema_version is 3; this server reads 1 and 2: update it"):
        read(folder, schema_version=3, something_new=True)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"end_tokens": [""]}, "end_tokens"),
        ({"end_tokens": "<|tool|>"}, "end_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "this name is the server's own"),
        ({"chat_template_kwargs": {"no-name": 1}}, "chat_template_kwargs.no-name"),
        ({"verdict": {"status": "fine"}}, "verdict.status is 'fine'"),
        ({"quality": {}}, "quality is no key of schema_version 2"),
        ({"schema_version": 1, "base": {"fingerprint": FINGERPRINT}, "verdict": VERDICT}, "verdict is no key of"),
        ({"base": {}}, "it needs fingerprint_v2 or fingerprint"),
    ],
)
def test_what_a_sidecar_says_wrong_is_named(folder: Path, said: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterRejected, match=r"quickchange\.json: ") as refused:
        read(folder, **said)
    assert words in str(refused.value)


DEEP = json.loads("[" * 300 + "]" * 300)


@pytest.mark.parametrize(
    ("value", "words"), [(DEEP, "nested more than 32 deep"), ("\ud800", "half of a surrogate pair")]
)
@pytest.mark.parametrize("place", ["chat_template_kwargs", "checks"])
def test_values_that_no_answer_could_show_are_refused(folder: Path, place: str, value: Any, words: str) -> None:
    """The adapter was served, and its details were a 500."""
    said: dict[str, Any] = {
        "chat_template_kwargs": {"chat_template_kwargs": {"x": value}},
        "checks": {"verdict": {"status": "pass", "checks": {"x": {"status": "pass", "figures": value}}}},
    }[place]
    with pytest.raises(AdapterRejected, match=words):
        read(folder, **said)


def test_values_that_are_nested_a_little_are_shown(folder: Path) -> None:
    nested = json.loads("[" * 30 + "]" * 30)
    *_, details = told(read(folder, chat_template_kwargs={"x": nested, "y": "é😀"}))
    assert details["defaults"]["chat_template_kwargs"] == {"x": nested, "y": "é😀"}


TOOL, PAD, HELLO = encode("<|tool|>")[0], encode("<|pad|>")[0], encode("hello")[0]


def test_end_tokens_end_an_answer_beside_the_bases_own(folder: Path) -> None:
    prompts = PromptRenderer(small_tokenizer())
    text = str(small_tokenizer().convert_ids_to_tokens(HELLO))
    defaults = read(folder, end_tokens=["<|tool|>", PAD, text]).defaults
    assert end_ids(defaults, (), prompts) == {TOOL, PAD, HELLO}
    assert end_ids(overlay(defaults, GenerationDefaults()), (), prompts) == {TOOL, PAD, HELLO}
    prompts.check_end_tokens(defaults.end_tokens)


def test_a_neighbours_end_of_turn_counts_where_the_sidecar_says_nothing(folder: Path) -> None:
    prompts = PromptRenderer(small_tokenizer())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|pad|>"}')
    assert end_ids(read(folder).defaults, (), prompts) == {PAD}
    assert end_ids(read(folder, end_tokens=["<|tool|>"]).defaults, (), prompts) == {TOOL}
    assert end_ids(read(folder, end_tokens=[]).defaults, (), prompts) == set()


@pytest.mark.parametrize("token", ["<|ghost|>", "hello there", 10**6])
def test_an_end_token_that_the_base_does_not_have_is_refused(token: str | int) -> None:
    """The answer would never end at it."""
    with pytest.raises(ValueError, match="which is no token of the base") as refused:
        PromptRenderer(small_tokenizer()).check_end_tokens(["<|tool|>", token])
    assert repr(token) in str(refused.value)


VARIABLE = "{{ messages[0].content }}{% if loud is defined and loud %}!{% endif %}{{ mark }}<|end|>"


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, "hello<|end|>"), ({"loud": True, "mark": "?", "unknown": [1]}, "hello!?<|end|>")]
)
def test_variables_reach_the_adapters_template(variables: dict[str, Any], expected: str) -> None:
    engine = FakeEngine()
    poet = adapter("poet", chat_template=VARIABLE, chat_template_kwargs=variables)
    assert ask(create_app(server_state(engine, poet)), "POST", "/v1/chat/completions", json=CHAT).status_code == 200
    assert list(engine.submitted[0].prompt_ids) == encode(expected)


def test_variables_reach_the_bases_template_and_no_other_request() -> None:
    tokenizer = small_tokenizer()
    prompts = PromptRenderer(tokenizer)
    plain = prompts.chat(MESSAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", TEMPLATE + "{% if think is false %}done{% endif %}")
        assert prompts.chat(MESSAGES, variables={"think": False}) == [*plain, *encode("done")]
        assert prompts.chat(MESSAGES) == plain


def test_a_control_token_in_a_variable_stays_text() -> None:
    prompts = PromptRenderer(small_tokenizer())
    ids = prompts.chat([{"role": "user", "content": "x"}], template=VARIABLE, variables={"mark": "<|tool|>"})
    assert TOOL not in ids and ids[-1] == encode("<|end|>")[0]


def test_variables_with_which_a_template_fails_are_told_when_the_folder_is_read() -> None:
    prompts = PromptRenderer(small_tokenizer())
    prompts.check_template(VARIABLE, {"mark": "."})
    with pytest.raises(ValueError, match="its chat template does not work"):
        prompts.check_template("{{ 1 / budget }}", {"budget": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_tokenizer(), "chat_template", "{{ 1 / budget }}")
        prompts.check_template(None)
        with pytest.raises(ValueError, match="its chat template does not work"):
            prompts.check_template(None, {"budget": 0})


def told(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """What the list of models and the model itself say of an adapter."""
    state = server_state(FakeEngine())
    state.adapters.registry.publish(Adapter.of(manifest), ())
    app = create_app(state)
    answers: list[httpx.Response] = [ask(app, "GET", url) for url in ("/v1/models", "/v1/models/good")]
    yield answers[0].json()["data"][1]
    yield answers[1].json()


def test_a_list_of_models_says_how_the_base_was_checked_and_what_the_trainer_found(folder: Path) -> None:
    for found in told(read(folder, verdict=VERDICT, chat_template_kwargs={"think": False}, end_tokens=[3])):
        assert (found["base_check"], found["verdict"]) == ("fingerprint_v2", "warn")
    assert found["checks"] == VERDICT["checks"]
    assert found["defaults"] == {"stop": ["###"], "chat_template_kwargs": {"think": False}, "end_tokens": [3]}
    for found in told(read(folder)):
        assert (found["base_check"], found["verdict"]) == ("fingerprint_v2", None)
    assert found["checks"] == {}


def test_details_say_whose_chat_template_it_is(folder: Path) -> None:
    """A copy of the base's with another line feed at its end was called the adapter's own."""
    base_template = "{{ messages[0].content }}\n{{ messages | length }}\n"
    texts = {"the base's": base_template.replace("\n", "\r\n") + "\n", "its own": "{{ messages[0].content }}"}
    for said, text in texts.items():
        (folder / "chat_template.jinja").write_bytes(text.encode())
        manifest = read_manifest(folder, replace(BASE, chat_template=base_template), LIMITS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(small_tokenizer(), "chat_template", base_template)
            *_, details = told(manifest)
        assert details["defaults"]["chat_template"] == said


async def test_the_log_says_how_the_base_was_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    harness = AdapterHarness(tmp_path)
    for name, sidecar in (("signed", SIDECAR), ("plain", None)):
        path = make(harness.first, name)
        if sidecar is not None:
            write(path, sidecar=sidecar)
        with caplog.at_level(logging.DEBUG):
            assert await harness.sync.add(name, path, folder_state(path))
    harness.reader.close()
    assert "adapter signed: 2 modules, rank 2, base checked by fingerprint\n" in caplog.text
    assert "adapter plain: 2 modules, rank 2, base checked by shapes\n" in caplog.text
