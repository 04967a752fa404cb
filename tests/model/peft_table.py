"""Writes the tables of docs/adapters.md: ``python -m tests.model.peft_table``."""

from __future__ import annotations

import json
from pathlib import Path

from server.adapters.content.config_fields import FIELDS, NO_EFFECT, READ
from tests.model.peft_cases import CASES, TOLERANCE, Case, Names
from tests.model.tuner_outcomes import OUTCOMES, REFUSED, Outcome

PATH = Path(__file__).parents[2] / "docs" / "adapters.md"
MARK = "<!-- peft -->"

_HEAD = f"""
<!-- Written by `python -m tests.model.peft_table` from tests/model/peft_cases.py; a test keeps it true. -->

Each row is made and saved by PEFT with random tensors on small models of these families, loaded again by PEFT and by
the server, and run alone, among equals and beside others: no logit differs by more than {TOLERANCE:g} of the largest.

| what | fields of `LoraConfig` | proved on |
|---|---|---|
"""
_FIELDS = """
Every other active field is refused, with the reason:

| field | why it is refused |
|---|---|
"""

_TUNERS = """
Other tuners are refused by the server, and rewritten by `quickchange adapters convert`: exactly at the rank said (r and
k are the tuner's own), or approximately at a rank that keeps 99.99 % of each change's energy. What is lost then is a
share of the adapter's change of the logits, measured for random weights on a small model.

| tuner | as LoRA | rank | lost |
|---|---|---|---|
"""


def tables() -> str:
    """What stands between the marks."""
    rows = [
        f"| {case.feature} | {_fields(case)} | {', '.join(case.families).replace('_', '-')} |\n"
        for case in CASES.values()
    ]
    refused = [f"| `{name}` | {said} |\n" for name, said in FIELDS.items() if said not in (READ, NO_EFFECT)]
    silent = ", ".join(f"`{name}`" for name, said in FIELDS.items() if said == NO_EFFECT)
    tuners = "".join(_tuner(name, outcome) for name, outcome in OUTCOMES.items())
    never = ", ".join(f"`{kind}` ({reason})" for kind, reason in REFUSED.items())
    fields = _FIELDS + "".join(refused) + f"\nWithout effect when serving: {silent}.\n"
    return _HEAD + "".join(rows) + fields + _TUNERS + tuners + f"\nThere is no LoRA for: {never}.\n\n"


def _tuner(name: str, outcome: Outcome) -> str:
    lost = "" if outcome.lost is None else f"{outcome.lost:.1%}"
    return f"| {name} | {outcome.how} | {outcome.rank} | {lost} |\n"


def page(text: str) -> str:
    """The document with the tables brought up to date."""
    before, _, after = text.split(MARK)
    return f"{before}{MARK}\n{tables()}{MARK}{after}"


def _fields(case: Case) -> str:
    said = {name: value for name, value in case.fields(Names()).items() if name not in ("r", "lora_alpha")}
    if len(said) > 1 and said.get("target_modules") == list(Names().attention):
        del said["target_modules"]
    return ", ".join(f"`{name}={json.dumps(value)}`".replace("|", "\\|") for name, value in said.items())


if __name__ == "__main__":
    PATH.write_text(page(PATH.read_text(encoding="utf-8")), encoding="utf-8")
