"""A model is found under its exact name first, then by the grammar, then as other servers and clients write it."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI

from server.adapters.aliases import parse_aliases
from server.adapters.model_names import ModelNames
from server.adapters.names import ModelRef
from server.adapters.registry import AdapterRegistry
from server.api.app import create_app
from server.api.auth.access import Access
from server.api.auth.keys import ApiKey, KeyRing, digest_of
from server.api.auth.principal import AccessScope, Principal
from server.errors import InvalidRequest, ModelNotFound
from tests.fakes import FakeEngine, adapter, ask, server_state

CHAT = "/v1/chat/completions"
ALIASES = """
support = "helpdesk"
writer = "tolstoy:0.5+helpdesk"
"客服/中文 1" = "helpdesk"
"openai/gpt-4o" = "tolstoy"
"a@b:c+d" = "helpdesk"
"gpt-4o" = "micro"
secret-canary = {"tolstoy" = 0.5, "secret" = 0.5}
"""


def names(*adapters: str, aliases: str = ALIASES) -> ModelNames:
    registry = AdapterRegistry()
    for name in adapters or ("helpdesk", "tolstoy", "secret", "Case", "case", "Mixed"):
        registry.publish(adapter(name), ())
    made = ModelNames(registry, ("micro", "org/Micro-1M", "Micro-1M"))
    made.aliases = parse_aliases(aliases.encode())
    return made


def resolved(text: str, may_use: Collection[str] | None = None) -> list[str] | None:
    """The adapters as ``name@version:weight``; None if a name is unknown."""
    try:
        found = names().resolve(text, may_use=lambda name: may_use is None or name in may_use)
    except ModelNotFound:
        return None
    if any(ref.version is None and ref.name not in names()._registry for ref in found.refs):
        return None
    return [
        ref.name + (f"@{ref.version}" if ref.version else "") + (f":{ref.scale:g}" if ref.scale != 1 else "")
        for ref in found.refs
    ]


HELPDESK = ["helpdesk"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("micro", []),
        ("helpdesk", HELPDESK),
        ("support", HELPDESK),
        ("gpt-4o", []),
        ("客服/中文 1", HELPDESK),
        ("a@b:c+d", HELPDESK),
        ("openai/gpt-4o", ["tolstoy"]),
        ("writer", ["tolstoy:0.5", "helpdesk"]),
        # the grammar, in which an alias stands for its adapters
        ("helpdesk@ab12:0.7+tolstoy", ["helpdesk@ab12:0.7", "tolstoy"]),
        ("support:0.7", ["helpdesk:0.7"]),
        ("客服/中文 1:0.7+tolstoy", ["helpdesk:0.7", "tolstoy"]),
        ("support@ab12", ["helpdesk@ab12"]),
        ("writer:0.5", ["tolstoy:0.25", "helpdesk:0.5"]),
        ("ghost@ab12", ["ghost@ab12"]),  # a version may be kept where the name is gone
        # Ollama's tag, a provider's prefix, the base before its adapter, the base's hub id
        ("helpdesk:latest", HELPDESK),
        ("micro:latest", []),
        ("openai/helpdesk", HELPDESK),
        ("hosted_vllm/openai/helpdesk", HELPDESK),
        ("openai/support", HELPDESK),
        ("openai/micro", []),
        ("org/Micro-1M", []),
        ("Micro-1M", []),
        ("litellm/org/Micro-1M", []),
        ("micro:helpdesk", HELPDESK),
        ("micro::helpdesk", HELPDESK),
        ("org/Micro-1M::helpdesk", HELPDESK),
        ("openai/micro:helpdesk:latest", HELPDESK),
        ("openai/helpdesk@ab12:0.7", ["helpdesk@ab12:0.7"]),
        ("openai/helpdesk:0.7+openai/tolstoy", ["helpdesk:0.7", "tolstoy"]),
        # another case, where only one name differs in nothing else
        ("HelpDesk", HELPDESK),
        ("OpenAI/HELPDESK:LATEST", None),
        ("OpenAI/HELPDESK", HELPDESK),
        ("MICRO", []),
        ("mixed:0.5", ["Mixed:0.5"]),
        ("Case", ["Case"]),
        ("case", ["case"]),
        ("CASE", None),
        ("openai/Case", ["Case"]),
        # never one of two, never a path
        ("other/gpt-4o", []),
        ("x/openai/gpt-4o", None),
        ("../helpdesk", None),
        ("/helpdesk", None),
        ("./helpdesk", None),
        ("helpdesk/", None),
        ("nobody", None),
        ("", None),
    ],
)
def test_a_model_text_means_one_model_or_none(text: str, meant: list[str] | None) -> None:
    assert resolved(text) == meant


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("micro:0.5", "'micro' is the base"),
        ("helpdesk+micro", "'micro' is the base"),
        ("gpt-4o:0.5", "the alias 'gpt-4o' is the base"),
        ("writer@ab12", "the alias 'writer' has a version already, or is a composition"),
        ("support+helpdesk", "stand for an adapter twice"),
        ("writer:2+tolstoy@ab12+Case+case", "more than 4"),
        ("helpdesk:heavy", "is no weight"),
        ("helpdesk@xy", "is no version"),
    ],
)
def test_what_cannot_be_composed_says_why(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        names().resolve(text)
    assert words in str(caught.value)
    assert caught.value.param == "model"


def test_an_adapter_comes_before_an_alias_of_its_name_and_the_base_before_both() -> None:
    made = names("a", "b", aliases='a = "b"\nmicro = "b"\n')
    assert made.resolve("a").refs == (ModelRef("a"),)
    assert made.resolve("micro").refs == ()
    assert made.visible_aliases(lambda name: True) == []


def test_an_alias_of_an_adapters_name_means_nothing_also_to_a_key_that_may_not_use_the_adapter() -> None:
    """Its description in ``/v1/models`` was the hidden adapter's."""
    made = names("a", "b", aliases='a = "b"\n')
    assert made.resolve("a", may_use={"b"}.__contains__).refs == (ModelRef("a"),)  # refused where it is used
    assert made.visible_aliases({"b"}.__contains__) == []


@pytest.mark.parametrize(
    "text", ["客服/中文 1:0.5", "客服/中文 1@ab12:0.5", "客服/中文 1+helpdesk", "helpdesk+客服/中文 1"]
)
def test_a_hidden_alias_is_refused_in_the_words_of_a_missing_one(text: str) -> None:
    """A name that no adapter can have told that it is an alias."""
    allowed = {"tolstoy"}.__contains__

    def refusal(made: ModelNames) -> str:
        try:
            refs = made.resolve(text, may_use=allowed).refs
        except (ModelNotFound, InvalidRequest) as error:
            return repr(error)
        return f"not checked: {refs}"

    assert refusal(names()) == refusal(names(aliases=""))


def test_what_a_key_may_not_use_does_not_exist_for_it() -> None:
    allowed = {"helpdesk", "tolstoy", "case"}
    for hidden in ("secret-canary", "SECRET-CANARY"):
        assert resolved(hidden) is not None
        assert resolved(hidden, allowed) is None
    assert resolved("CASE", allowed) == ["case"]
    made = names()
    visible = ["micro", "case", "helpdesk", "tolstoy", "a@b:c+d", "gpt-4o", "openai/gpt-4o", "support", "writer"]
    assert list(made.visible(allowed.__contains__)) == [*visible, "客服/中文 1"]


def test_the_nearest_names_are_those_most_alike() -> None:
    assert names().nearest("helpdesc")[0] == "helpdesk"
    assert names().nearest("Tolstoj")[0] == "tolstoy"
    assert "secret" not in names().nearest("secret", lambda name: name != "secret")
    assert len(names().nearest("gpt-5")) == 3


@pytest.mark.parametrize("text", ["x/" * 500_000, "micro:" * 200_000, "helpdesk:latest" * 60, "a" * 1000, "+" * 1000])
def test_any_text_is_looked_up_at_once(text: str) -> None:
    registry = AdapterRegistry()
    for number in range(2000):
        registry.publish(adapter(f"adapter-{number}"), ())
    made = ModelNames(registry, ("micro",))
    since = time.perf_counter()
    with pytest.raises((ModelNotFound, InvalidRequest)):
        raise ModelNotFound("") if made.resolve(text).refs[0].name not in registry else AssertionError
    made.nearest(text)
    assert time.perf_counter() - since < 0.5


def app_for(allowed: Collection[str] | None) -> FastAPI:
    """A server whose key 'key' may use some adapters."""
    state = server_state(FakeEngine(), *map(adapter, ("helpdesk", "tolstoy", "secret")))
    state.adapters.set_aliases(parse_aliases(ALIASES.encode()))
    scopes = frozenset({AccessScope.INFER})
    principal = Principal("key", "key", scopes, None if allowed is None else frozenset(allowed))
    access = Access(KeyRing((ApiKey(digest_of("key"), principal),), is_open=False))
    return create_app(replace(state, access=access))


def error_for(app: FastAPI, model: str) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    reply = ask(app, "POST", CHAT, json=body, headers={"authorization": "Bearer key"})
    assert reply.status_code == 404, reply.text
    return dict(reply.json()["error"])


@pytest.mark.parametrize(
    "model",
    ["{}", "{}@ab12", "{}:0.5", "helpdesk+{}", "{}+ghost", "ghost@ab12+{}@ab12", "openai/{}", "{}:latest", "micro::{}"],
)
def test_a_hidden_adapter_is_answered_like_a_missing_one(model: str) -> None:
    """Every member of a composition counts, and whatever the name is written like."""
    app = app_for({"helpdesk"})
    hidden, missing = error_for(app, model.format("secret")), error_for(app, model.format("sicret"))
    reason, _, nearest = hidden["message"].partition(" Nearest: ")
    assert reason == missing["message"].partition(" Nearest: ")[0].replace("sicret", "secret")
    assert "`secret" not in nearest
    assert (hidden["code"], hidden["param"]) == (missing["code"], missing["param"]) == ("model_not_found", "model")


def test_a_hidden_adapter_is_not_listed() -> None:
    headers = {"authorization": "Bearer key"}
    listed = ask(app_for({"helpdesk"}), "GET", "/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in listed] == ["micro", "helpdesk", "a@b:c+d", "gpt-4o", "support", "客服/中文 1"]
    for hidden in ("secret", "tolstoy", "writer", "secret-canary", "tolstoy@tolstoy-vers"):
        assert ask(app_for({"helpdesk"}), "GET", f"/v1/models/{hidden}", headers=headers).status_code == 404


def test_a_model_is_described_under_any_text_that_names_it() -> None:
    app, headers = app_for(None), {"authorization": "Bearer key"}
    for text, name in {"openai/helpdesk": "helpdesk", "客服/中文 1": "客服/中文 1", "MICRO": "micro"}.items():
        model = ask(app, "GET", f"/v1/models/{text}", headers=headers).json()
        assert (model["id"], model["max_model_len"], model["context_length"]) == (name, 256, 256)
    composed = ask(app, "GET", "/v1/models/helpdesk:0.5+tolstoy", headers=headers).json()
    assert (composed["id"], composed["parent"]) == ("helpdesk:0.5+tolstoy", "micro")
    assert len(composed["adapters"]) == 2
