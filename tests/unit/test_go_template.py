"""Simple templates of Ollama's, as Jinja: they render what Ollama renders, and what is not read is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from server.cli.convert.go_template import translate

CHATML = """\
{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
LLAMA2 = "[INST] {{ if .System }}<<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ end }}{{ .Prompt }} [/INST] {{ .Response }}</s>"
ALPACA = """\
{{- if .System }}
{{ .System }}
{{- else }}
Do as you are told.
{{- end }}

{{ if .Prompt -}}
### Instruction:
{{ .Prompt }}

{{ end -}}
### Response:
{{ .Response }}
"""


def render(template: str, *messages: str, tools: Sequence[dict[str, str]] = ()) -> str:
    """The prompt of messages, each a letter for its role, a colon and its text, in transformers' own sandbox."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    said = [{"role": roles[one[0]], "content": one[2:]} for one in messages]
    rendered: Any = render_jinja_template([said], chat_template=template, tools=list(tools) or None)
    return str(rendered[0][0])


@pytest.mark.parametrize(
    ("template", "messages", "prompt"),
    [
        (CHATML, ("u:Hi",), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            CHATML,
            ("s:Be brief", "u:Hi", "a:Yes?", "u:Go"),
            "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            "Yes?<|im_end|>\n<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n",
        ),
        (CHATML, ("u:Hi", "u:Go"), "<|im_start|>user\nHi\n\nGo<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, ("u:Hi", "a:Once"), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nOnce"),
        (
            LLAMA2,
            ("s:Be brief", "u:Hi", "a:Yes?", "u:Go"),
            "[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nHi [/INST] Yes?</s>[INST] Go [/INST] ",
        ),
        (
            LLAMA2,
            ("u:Hi", "a:Yes?", "s:Be brief", "u:Go"),
            "[INST] Hi [/INST] Yes?</s>[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nGo [/INST] ",
        ),
        (ALPACA, ("u:Hi",), "\nDo as you are told.\n\n### Instruction:\nHi\n\n### Response:\n"),
        (ALPACA, ("s:Be brief", "u:Hi"), "\nBe brief\n\n### Instruction:\nHi\n\n### Response:\n"),
        ("{{ .Prompt }}", ("u:Hi", "a:Yes?", "u:Go"), "HiYes?Go"),
        ("{{/* a note */}}Q: {{ .Prompt }}\n", ("u:Hi",), "Q: Hi\n"),
        ("\u3000{{- .Prompt -}} \n\xa0\n", ("u:Hi",), "\u3000Hi\xa0\n"),
        ("{{ if and .System (not .Response) }}S{{ else if .Prompt }}P{{ else }}N{{ end }}", ("u:Hi",), "P"),
        ("{{ if or .System .Prompt }}\"{{ .Prompt }}\" {% x %} é😀{{ end }}", ("u:{{ x }}",), '"{{ x }}" {% x %} é😀'),
    ],
)  # fmt: skip
def test_a_template_renders_as_in_ollama(template: str, messages: Sequence[str], prompt: str) -> None:
    assert render(translate(template), *messages) == prompt


def test_a_long_template_takes_no_longer_by_its_square() -> None:
    """With a list cut anew at each action, and a pattern that began anew at each brace, a megabyte took minutes."""
    translate("{{ .Prompt }} " * 5_000)
    with pytest.raises(ValueError, match="not closed"):
        translate("{{" * 100_000)


def test_the_token_that_begins_a_text_comes_once() -> None:
    template = translate(LLAMA2, begin="<s>")
    assert render(template, "u:Hi", "a:Yes?", "u:Go") == "<s>[INST] Hi [/INST] Yes?</s>[INST] Go [/INST] "


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ range .Messages }}{{ end }}", "range .Messages"),
        ("{{ if .Tools }}{{ end }}", "if .Tools"),
        ("{{ .Prompt | json }}", "json"),
        ('{{ if eq .Role "user" }}{{ end }}', "eq .Role"),
        ("{{ if and .System", "not closed"),
        ("{{ if .System }}", "has no end"),
        ("{{ if .System }}{{ else }}{{ else }}{{ end }}", "has no end"),
        ("{{ end }}", "belongs to no if"),
        ("{{ if not .System .Prompt }}{{ end }}", "is not read"),
        ("{{ if (.System }}{{ end }}", "is not read"),
        ("{{ if }}{{ end }}", "is not read"),
        ("{{ if .System }}" * 99, "nested"),
        ("{{ if " + "(" * 5000 + ".System }}{{ end }}", "is not read"),
        ("{{ $x := .System }}", "is not read"),
        ("{{ .Suffix }}", "is not read"),
    ],
)
def test_what_is_not_read_is_named(template: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        translate(template)


def test_what_the_template_has_no_place_for_is_refused_when_it_is_asked_for() -> None:
    template = translate(CHATML)
    with pytest.raises(TemplateError, match="no place for tools"):
        render(template, "u:Hi", tools=[{"type": "function"}])
    with pytest.raises(TemplateError, match="no place for the role tool"):
        render(template, "u:Hi", "t:42")
