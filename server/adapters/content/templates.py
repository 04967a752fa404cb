"""Whether two chat templates are one, and which of several named ones a conversation takes; nothing is rendered."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

_MARK = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""What says which tokens are the assistant's, for training (transformers, ``return_assistant_tokens_mask``)."""

_SPACE = re.compile(r"\s+")


class _Marks(Extension):
    """Reads a generation block as its body alone."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the two marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def default_template(found: Any) -> str | None:
    """A tokenizer's template for conversations: its only one, or of several named ones the default."""
    if isinstance(found, dict):
        found = found.get("default")
    elif isinstance(found, list):
        named = [item for item in found if isinstance(item, dict) and item.get("name") == "default"]
        found = named[-1].get("template") if named else None
    return found if isinstance(found, str) and found else None


def is_same(template: str, base: str | None) -> bool:
    """Whether a template is the base's but for generation marks and white space at the end.

    White space decides nothing until both have the same other characters: then what jinja2 reads is compared, so that
    a stranger's template is parsed only where it is the base's but for blanks.
    """
    if base is None:
        return False
    if template.rstrip() == base.rstrip():
        return True
    if _without_space(template) != _without_space(base):
        return False
    try:
        return _read(template) == _read(base)
    except (TemplateError, RecursionError):
        return False


def _without_space(template: str) -> str:
    return _SPACE.sub("", _MARK.sub("", template))


def _read(template: str) -> nodes.Template:
    """A template as jinja2 reads it with transformers' settings, without marks and without white space at the end."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, loopcontrols])
    tree = environment.parse(template.rstrip())
    _join(tree)
    last = tree.body[-1] if tree.body else None
    if isinstance(last, nodes.Output) and isinstance(last.nodes[-1], nodes.TemplateData):
        last.nodes[-1].data = last.nodes[-1].data.rstrip()
        _join(tree)
    return tree


def _join(node: nodes.Node) -> None:
    """Join pieces of text and output that only a mark kept apart."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, _joined(value))
    for child in node.iter_child_nodes():
        _join(child)


def _joined(items: list[Any]) -> list[Any]:
    joined: list[Any] = []
    for item in items:
        last = joined[-1] if joined else None
        if isinstance(item, nodes.TemplateData) and not item.data:
            continue
        if isinstance(item, nodes.Output) and isinstance(last, nodes.Output):
            last.nodes.extend(item.nodes)
        elif isinstance(item, nodes.TemplateData) and isinstance(last, nodes.TemplateData):
            last.data += item.data
        else:
            joined.append(item)
    return joined
