"""Compares chat templates, and picks the default of several named ones; nothing is rendered."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

_MARK = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""Generation marks, which only training uses (transformers, ``return_assistant_tokens_mask``)."""

_SPACE = re.compile(r"\s+")


class _Marks(Extension):
    """Parses a generation block as its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the two marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


TEMPLATE_EXTENSIONS = (_Marks, loopcontrols)


def default_template(template: Any) -> str | None:
    """A tokenizer's chat template: its only one, or of several named ones the default."""
    if isinstance(template, dict):
        template = template.get("default")
    elif isinstance(template, list):
        defaults = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = defaults[-1].get("template") if defaults else None
    return template if isinstance(template, str) and template else None


def is_same(template: str, base: str | None) -> bool:
    """Whether a template is the base's apart from generation marks and trailing white space.

    Only templates that are equal without white space are parsed and compared as syntax trees, so that an untrusted
    template is not parsed otherwise.
    """
    if base is None:
        return False
    if template.rstrip() == base.rstrip():
        return True
    if _without_space(template) != _without_space(base):
        return False
    try:
        return _parse(template) == _parse(base)
    except (TemplateError, RecursionError):
        return False


def template_environment() -> Environment:
    """Parses templates under transformers' settings, without generation marks."""
    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=TEMPLATE_EXTENSIONS)


def _without_space(template: str) -> str:
    return _SPACE.sub("", _MARK.sub("", template))


def _parse(template: str) -> nodes.Template:
    """The syntax tree under transformers' settings, without generation marks and trailing white space."""
    tree = template_environment().parse(template.rstrip())
    _join(tree)
    last = tree.body[-1] if tree.body else None
    if isinstance(last, nodes.Output) and isinstance(last.nodes[-1], nodes.TemplateData):
        last.nodes[-1].data = last.nodes[-1].data.rstrip()
        _join(tree)
    return tree


def _join(node: nodes.Node) -> None:
    """Join adjacent text and output nodes, which a removed mark separated."""
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
