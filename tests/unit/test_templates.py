"""Which chat templates are the base's own but for marks and blanks, and whom the operator trusts with others."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from server.adapters.content.manifest import Manifest, read_manifest
from server.adapters.content.templates import default_template, is_same
from server.cli.command_line import parse_settings
from server.cli.folders import policy_of
from server.errors import AdapterRejected
from server.text.prompt import PromptRenderer
from tests.adapter_folders import BASE, LIMITS, make
from tests.fakes import encode, small_tokenizer

BASE_TEMPLATE = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}{{ message.content }} :
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
MARKED = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}{{ message.content }} :
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
ASSISTANT = "        {{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>' }}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path, "good")


def read(path: Path, *, trusted: frozenset[str] = frozenset(), base_template: str = BASE_TEMPLATE) -> Manifest:
    base = replace(BASE, chat_template=base_template)
    return read_manifest(path, base, replace(LIMITS, trust_chat_templates=False, trusted_templates=trusted))


@pytest.mark.parametrize(
    "template",
    [
        BASE_TEMPLATE,
        BASE_TEMPLATE.rstrip(),
        BASE_TEMPLATE + "\n \n",
        MARKED,
        MARKED.replace("{%- generation %}", "{%- generation -%}"),
        MARKED.replace("{%- endgeneration %}", "{%- endgeneration -%}"),
        BASE_TEMPLATE.replace(" :", " : "),  # jinja takes the blank away
        BASE_TEMPLATE.replace("{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %}"),
        BASE_TEMPLATE.replace(" :", "{% generation %} :{% endgeneration %}"),
    ],
)
def test_a_template_that_is_the_bases_but_for_marks_and_its_end_is_the_bases(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    assert read(folder).defaults.chat_template == BASE_TEMPLATE


@pytest.mark.parametrize(
    "template",
    [
        BASE_TEMPLATE.replace(" :", " ;"),
        BASE_TEMPLATE.replace(ASSISTANT, f"        {{% generation %}}\n{ASSISTANT}        {{% endgeneration %}}\n"),
        BASE_TEMPLATE.replace(" :", ":"),
        BASE_TEMPLATE.replace("<|im_end|>'", "<|im_end|> '"),
        BASE_TEMPLATE.replace("<|im_end|>'", "<|im_end|>{% generation %}'"),
        BASE_TEMPLATE.replace("{{ message.content }}", "{% generation %} {{ message.content }}{% endgeneration %}"),
        MARKED.replace("{%- endgeneration %}", ""),
        MARKED.replace("generation %}", "generation %}{{ evil }}"),
        "\n" + BASE_TEMPLATE.replace("{%- for", "{% for"),
        "",
    ],
)
def test_any_other_difference_makes_it_another_template(folder: Path, template: str) -> None:
    assert not is_same(template, BASE_TEMPLATE)
    (folder / "chat_template.jinja").write_text(template)
    if template:
        with pytest.raises(AdapterRejected, match="a chat template of its own"):
            read(folder)


def test_marks_of_the_base_are_none_of_the_adapters(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(BASE_TEMPLATE)
    assert read(folder, base_template=MARKED).defaults.chat_template == MARKED


def test_blanks_are_compared_where_jinja_leaves_them() -> None:
    assert is_same("a {%- generation -%} b{% endgeneration %}", "ab")
    assert not is_same("a {% generation %} b{% endgeneration %}", "ab")
    assert is_same("a\n{% generation %}\nb{% endgeneration %}\n", "a\nb")


def test_a_strangers_template_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.adapters.content.templates._parse", lambda template: pytest.fail("parsed"))
    assert not is_same("{{ a }}{% generation %}{{ '" + "b" * 100_000 + "' }}{% endgeneration %}", "{{ a }}")


def test_the_version_is_of_the_template_as_it_was_written(folder: Path) -> None:
    """A name@digest stays what it was, whichever templates count as the base's."""
    (folder / "chat_template.jinja").write_text(MARKED)
    trusting = replace(LIMITS, trust_chat_templates=True)
    other = read_manifest(folder, replace(BASE, chat_template="another"), trusting)
    assert other.defaults.chat_template == MARKED
    assert read(folder).version_digest == other.version_digest


@pytest.mark.parametrize(
    ("found", "template"),
    [
        ("a", "a"),
        ("", None),
        (None, None),
        ({"tool_use": "b", "default": "a"}, "a"),
        ({"tool_use": "b"}, None),
        ([{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}], "a"),
        ([{"name": "default"}, 3], None),
        (7, None),
    ],
)
def test_of_several_named_templates_conversations_take_the_default(found: object, template: str | None) -> None:
    assert default_template(found) == template


def test_a_base_with_several_templates_is_compared_with_its_default() -> None:
    """Such a base counted as one without a template, so that its own one beside an adapter was a stranger's."""
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.chat_template = {"default": "{{ messages[0].content }}!", "tool_use": "{{ tools|length }} tools"}
    prompts = PromptRenderer(tokenizer)
    messages = [{"role": "user", "content": "hello"}]
    assert prompts.chat_template == "{{ messages[0].content }}!"
    assert prompts.chat(messages, template=prompts.chat_template) == encode("hello!")


def test_the_operator_trusts_the_templates_of_single_adapters(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}?")
    settings = parse_settings("serve", ["--trusted-templates", "other, good"])
    trusted = policy_of(settings).trusted_templates
    assert trusted == {"other", "good"}
    assert read(folder, trusted=trusted).defaults.chat_template == "{{ messages[0].content }}?"
    with pytest.raises(AdapterRejected, match="--trusted-templates good for this adapter alone, or remove"):
        read(folder, trusted=frozenset({"other"}))


def test_nothing_in_the_adapters_own_folder_is_a_permission(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}?")
    for name in ("aliases.toml", ".env", "trusted_templates"):
        (folder / name).write_text('trusted_templates = "good"\nQUICKCHANGE_TRUSTED_TEMPLATES=good\n')
    with pytest.raises(AdapterRejected, match="a chat template of its own"):
        read(folder)
