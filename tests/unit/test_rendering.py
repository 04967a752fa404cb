"""How a conversation becomes a prompt: variables, continuation, what a template does not show, and its limits."""

from __future__ import annotations

import copy
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.app import create_app
from server.api.ignored_fields import IGNORED_HEADER
from server.errors import InvalidRequest
from server.text.prompt import PromptRenderer
from server.text.template_process import TemplateLimitExceeded, template_processes
from server.text.template_variables import variables_of
from tests.fakes import FakeEngine, adapter, ask, server_state, small_tokenizer

CHAT = "/v1/chat/completions"
USER: dict[str, Any] = {"role": "user", "content": "hello"}
TURNS = "{% for message in messages %}{{ message.role }}={{ message.content }};{% endfor %}"
THINKING = TURNS + "{% if enable_thinking is defined %}thinking={{ enable_thinking }}{% endif %}"
EFFORT = TURNS + "{{ reasoning_effort }}"
PLAIN = TURNS + "{% if add_generation_prompt %}assistant={% endif %}"


def text_of(ids: Sequence[int]) -> str:
    """Token ids as text."""
    return str(small_tokenizer().decode(list(ids)))


def prompt_of(template: str, **fields: Any) -> tuple[str, httpx.Response]:
    """The prompt that a request with these fields becomes by a template, and the reply."""
    engine = FakeEngine()
    app = create_app(server_state(engine, adapter("poet", chat_template=template)))
    reply = ask(app, "POST", CHAT, json={"model": "poet", "messages": [USER], **fields})
    return (text_of(engine.submitted[0].prompt_ids) if engine.submitted else ""), reply


def rendered(template: str, *messages: dict[str, Any]) -> str:
    """The prompt of messages as text."""
    tokenizer = small_tokenizer()
    return str(tokenizer.decode(PromptRenderer(tokenizer).chat(messages, template=template)))


def test_the_variables_of_a_template_are_those_it_reads_and_the_server_does_not_set() -> None:
    template = "{% set ns = namespace(a=b) %}{{ bos_token }}{{ tools }}{{ messages }}{{ ns.a }}{{ range(2) }}"
    assert variables_of(template + "{{ c is defined }}") == {"b", "c"}
    assert variables_of("{% generation %}{{ d }}{% endgeneration %}") == {"d"}
    assert variables_of("{{") == set()


def test_a_request_sets_a_variable_of_the_template() -> None:
    assert prompt_of(THINKING, chat_template_kwargs={"enable_thinking": False})[0].endswith("thinking=False")
    assert prompt_of(THINKING, enable_thinking=False)[0].endswith("thinking=False")
    assert prompt_of(THINKING)[0].endswith(";")


@pytest.mark.parametrize("name", ["loud", "messages", "tools", "bos_token", "chat_template", "raise_exception"])
def test_another_variable_is_refused_and_those_that_exist_are_named(name: str) -> None:
    error = prompt_of(THINKING, chat_template_kwargs={name: "x"})[1].json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "chat_template_kwargs")
    assert "'enable_thinking'" in error["message"]


def test_variables_are_limited_in_number_and_depth() -> None:
    nested: Any = 1
    for _ in range(20):
        nested = [nested]
    for kwargs in ({f"x{number}": 1 for number in range(99)}, {"enable_thinking": nested}):
        reply = prompt_of(THINKING, chat_template_kwargs=kwargs)[1]
        assert reply.json()["error"]["param"] == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("template", "effort", "end", "ignored"),
    [
        (EFFORT, "low", "low", None),
        (THINKING, "none", "thinking=False", None),
        (THINKING, "high", "thinking=True", None),
        (THINKING.replace("enable_thinking", "thinking"), "none", "thinking=False", None),
        (PLAIN, "high", "assistant=", "reasoning_effort"),
    ],
)
def test_effort_is_what_the_template_has_a_variable_for(
    template: str, effort: str, end: str, ignored: str | None
) -> None:
    prompt, reply = prompt_of(template, reasoning_effort=effort)
    assert prompt.endswith(end)
    assert reply.headers.get(IGNORED_HEADER) == ignored


def test_a_request_overrides_the_variables_of_the_adapter() -> None:
    engine = FakeEngine()
    poet = adapter("poet", chat_template=EFFORT, chat_template_kwargs={"reasoning_effort": "low"})
    app = create_app(server_state(engine, poet))
    for fields in ({}, {"reasoning_effort": "high"}):
        ask(app, "POST", CHAT, json={"model": "poet", "messages": [USER], **fields})
    ends = [text_of(each.prompt_ids).rpartition(";")[2] for each in engine.submitted]
    assert ends == ["low", "high"]


def test_the_answer_continues_the_last_message() -> None:
    started = [USER, {"role": "assistant", "content": "the cat "}]
    prompt, _ = prompt_of(PLAIN, messages=started, continue_final_message=True)
    assert prompt == "user=hello;assistant=the cat "
    for fields in ({"messages": [USER]}, {"messages": started, "add_generation_prompt": True}):
        assert prompt_of(PLAIN, continue_final_message=True, **fields)[1].status_code == 400
    hidden = "{{ messages[0].content }}"
    assert prompt_of(hidden, messages=started, continue_final_message=True)[1].status_code == 400


def test_the_beginning_of_the_answer_is_left_out_on_request() -> None:
    assert prompt_of(PLAIN)[0].endswith("assistant=")
    assert prompt_of(PLAIN, add_generation_prompt=False)[0] == "user=hello;"


def test_a_name_is_shown_by_the_template_or_stands_before_the_content() -> None:
    named = {**USER, "name": "Ada"}
    assert rendered(TURNS, named) == "user=Ada: hello;"
    assert rendered("{% for m in messages %}[{{ m.name }}]{{ m.content }}{% endfor %}", named) == "[Ada]hello"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (TURNS, "assistant=<think>\nwhy\n</think>\n\nhello;"),
        ("{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}{% endfor %}", "why|hello"),
        ("{% for m in messages %}{{ m.thinking }}|{{ m.content }}{% endfor %}", "why|hello"),
        (TURNS + "{# [/THINK] #}", "assistant=[THINK]why[/THINK]hello;"),
    ],
)
def test_reasoning_that_is_replayed_goes_back_into_the_prompt(template: str, prompt: str) -> None:
    turn = {"role": "assistant", "content": "hello", "reasoning_content": "why"}
    shown = rendered(template, turn)
    assert "".join(shown.split()) == "".join(prompt.split())


DOUBLING = "{% set ns = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set ns.s = OP %}{% endfor %}{{ ns.s }}"
NESTED = "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}"
BOMBS = {
    "concatenation": DOUBLING.replace("OP", "ns.s ~ ns.s"),
    "addition": DOUBLING.replace("OP", "ns.s + ns.s"),
    "replacement": DOUBLING.replace("OP", "ns.s.replace('x', 'xxxxxxxx')"),
    "repetition": "{% if messages %}{{ 'x' * (10 ** 11) }}{% endif %}",
    "padding": "{{ 'x'.center(10 ** 11) }}",
    "nesting": NESTED,
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
}


@contextmanager
def peak_of_template_processes() -> Iterator[list[int]]:
    """The largest peak of memory, in kB, of this process's children that render templates; valid after the block."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            peak[0] = max(peak[0], *map(peak_of, children()), 0)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def children() -> list[Path]:
    """The folders in ``/proc`` of this process's children, whichever thread started them."""
    lists = [task.read_text() for task in Path("/proc/self/task").glob("*/children")]
    return [Path("/proc", pid) for pid in " ".join(lists).split()]


def peak_of(process: Path) -> int:
    """Its peak in kB; 0 if it renders no templates, or has ended."""
    with suppress(OSError):
        if b"template_worker" in (process / "cmdline").read_bytes():
            status = (process / "status").read_text()
            return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
    return 0


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_template_is_limited_in_memory_and_time_also_the_bases(bomb: str) -> None:
    """A trusted template that doubles a string took 2.4 GB of the server."""
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.chat_template = bomb
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    since = time.perf_counter()
    with peak_of_template_processes() as peak, pytest.raises(InvalidRequest, match="too much memory"):
        PromptRenderer(tokenizer).chat([USER])
    assert time.perf_counter() - since < 25
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    assert 0 < peak[0] < 600 * 1024


def test_a_template_is_rendered_after_another_ended_the_process() -> None:
    with pytest.raises(TemplateLimitExceeded):
        template_processes().render(BOMBS["addition"], {"messages": [1]})
    assert template_processes().render("a{{ x }}", {"x": "東"}) == "a東"


def test_a_template_that_refuses_a_system_turn_is_shown_tools() -> None:
    """Gemma 2's: every request with tools was a 400."""
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
    )
    for template, begin in ((refusing, "user=You can call"), (TURNS, "system=You can call")):
        engine = FakeEngine(max_model_len=2000)
        app = create_app(server_state(engine, adapter("poet", chat_template=template)))
        body = {"model": "poet", "messages": [USER], "tools": [{"type": "function", "function": {"name": "now"}}]}
        assert ask(app, "POST", CHAT, json=body).status_code == 200
        prompt = text_of(engine.submitted[0].prompt_ids)
        assert prompt.startswith(begin) and prompt.endswith("hello;") and '"now"' in prompt


def test_a_process_that_cannot_be_started_is_a_failure_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a 400 that said the template refuses the messages."""

    def fail(*arguments: object, **more: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(template_processes()._pool, "ask", fail)
    with pytest.raises(OSError, match="Too many open files"):
        rendered(PLAIN, USER)
