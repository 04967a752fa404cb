"""Ollama's Modelfile as an adapter folder: ADAPTER becomes the tensors, SYSTEM and PARAMETER the sidecar.

Instructions without a field in the sidecar are printed. A simple TEMPLATE is translated to Jinja; instead of any other,
``--chat-template`` is needed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.adapters.content.folder import MAX_JSON_BYTES
from server.adapters.content.signature import BaseSignature
from server.cli.convert.go_template import translate
from server.cli.folders import NotPublished
from server.errors import InvalidRequest, first

if TYPE_CHECKING:
    from adapter_format.messages import Message
    from server.text.prompt import PromptRenderer

BASES_TEMPLATE = "base"
"""The value of ``--chat-template`` that means the base's own."""

MAX_STOP_STRINGS = 16

_SYSTEM, _ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, who is there?"}
_ANSWER = {"role": "assistant", "content": "It is me."}
_PROBES: Sequence[Sequence[Message]] = (
    (_ASKED,), (_SYSTEM, _ASKED), (_ASKED, _ANSWER, _ASKED), (_SYSTEM, _ASKED, _ANSWER, _ASKED),
)  # fmt: skip
"""Conversations by which two templates are told apart."""

_WITHOUT_FIELD = {"DRAFT": "a draft model", "PARSER": "a parser of answers", "REQUIRES": "a version of Ollama"}

MAX_BYTES = 1024 * 1024
INSTRUCTIONS = frozenset({
    "FROM", "LICENSE", "TEMPLATE", "SYSTEM", "ADAPTER", "DRAFT", "RENDERER", "PARSER", "PARAMETER", "MESSAGE",
    "REQUIRES",
})  # fmt: skip
ROLES = ("system", "user", "assistant")

_INSTRUCTION = re.compile(r"[ \t]*([A-Za-z]+)[ \t]+(.*)", re.DOTALL)
_WORD = re.compile(r"([A-Za-z0-9_]+)[ \t]+(.*)", re.DOTALL)
_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
_QUOTES = ('"""', '"')


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``name`` in capitals; ``key`` is a PARAMETER's name or a MESSAGE's role, else empty."""

    name: str
    value: str
    line: int
    key: str = ""


@dataclass(frozen=True)
class Modelfile:
    """Its instructions in order."""

    instructions: Sequence[Instruction]

    def values(self, name: str) -> list[str]:
        return [instruction.value for instruction in self.instructions if instruction.name == name]

    def last(self, name: str) -> str | None:
        """The last instruction of this name wins; None where there is none, or it says nothing."""
        values = self.values(name)
        return values[-1] if values and values[-1] else None

    def parameters(self) -> Iterator[tuple[str, str]]:
        """Names, in small letters, and values of every PARAMETER."""
        for instruction in self.instructions:
            if instruction.name == "PARAMETER":
                yield instruction.key.lower(), instruction.value


def parse_modelfile(text: str) -> Modelfile:
    """The instructions of a file, read as Ollama reads it (parser/parser.go).

    An instruction is a word in any case at the beginning of a line; its value goes to the line's end, or, where it
    begins with a quote or three, to a line that ends with them. ``#`` is a comment only where an instruction could
    begin. Raises ``ValueError`` with a sentence that names the line.
    """
    lines = _LINES.findall(text.removeprefix("\ufeff"))
    instructions: list[Instruction] = []
    number = 0
    while number < len(lines):
        line, begun = lines[number], number + 1
        number += 1
        if not line.strip() or line.lstrip(" \t").startswith("#"):
            continue
        name, rest = _begin(line, begun)
        key, value = _keyed(name, rest, begun)
        pieces = [value.lstrip()]
        opened = next((quotes for quotes in _QUOTES if pieces[0].startswith(quotes)), "")
        while not _is_closed(pieces, opened):
            if number == len(lines):
                raise ValueError(f"line {begun}: the quote after {name} is not closed")
            pieces.append(lines[number])
            number += 1
        value = "".join(pieces).strip()
        instructions.append(Instruction(name, value[len(opened) : len(value) - len(opened)], begun, key))
    if not any(instruction.name == "FROM" for instruction in instructions):
        raise ValueError("it has no FROM, so it is no Modelfile")
    return Modelfile(instructions)


def _begin(line: str, number: int) -> tuple[str, str]:
    """The instruction's name, in capitals, and what stands behind it."""
    match = _INSTRUCTION.fullmatch(line)
    name = "" if match is None else match[1].upper()
    if match is None or name not in INSTRUCTIONS:
        known = ", ".join(sorted(INSTRUCTIONS))
        raise ValueError(f"line {number}: {line.strip()!r:.60} is no instruction with a value; there are {known}")
    return name, match[2]


def _keyed(name: str, rest: str, number: int) -> tuple[str, str]:
    """A PARAMETER's name or a MESSAGE's role, and the value behind it."""
    if name not in ("PARAMETER", "MESSAGE"):
        return "", rest
    match = _WORD.fullmatch(rest)
    if match is None:
        raise ValueError(f"line {number}: {name} needs a word and a value, and is followed by {rest.strip()!r:.60}")
    if name == "MESSAGE" and match[1] not in ROLES:
        known = ", ".join(ROLES)
        raise ValueError(f"line {number}: the role of a MESSAGE is {match[1]!r:.40}; it must be one of {known}")
    return match[1], match[2]


def _is_closed(pieces: Sequence[str], opened: str) -> bool:
    """Whether the last line ends with the quotes that the first one begins with."""
    last = pieces[-1].rstrip()
    return last.endswith(opened) and (len(pieces) > 1 or len(last) >= 2 * len(opened))


@dataclass(frozen=True)
class Wishes:
    """What a Modelfile asks for beside its adapter: fields of the sidecar, licences, and what is not carried over.

    ``template`` is a TEMPLATE that can be translated, ``notes`` say what became of other ones.
    """

    sidecar: dict[str, Any]
    licences: tuple[str, ...]
    base: str
    lost: tuple[str, ...] = ()
    template: str | None = None
    notes: tuple[str, ...] = ()

    def write_into(self, folder: Path) -> None:
        if self.licences:
            (folder / "LICENSE").write_text("\n\n".join(self.licences) + "\n", encoding="utf-8")

    def sidecar_for(self, base: BaseSignature, present: Mapping[str, Any]) -> dict[str, Any]:
        """The whole sidecar, for this base, over what stands in one that is there already."""
        sample = None if base.samples is None else base.samples.served
        reference = {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "fingerprint_v2": base.fingerprint_v2,
            "sample": None if sample is None else sample.to_json(),
        }
        return {
            "schema_version": 2,
            "base": {key: value for key, value in reference.items() if value is not None},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **present,
            **self.sidecar,
        }


def read_modelfile(path: Path) -> Modelfile:
    """Parse a file. Raises ``NotPublished``."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise NotPublished(f"{path} is no Modelfile: it is no regular file of {MAX_BYTES} bytes at most")
        return parse_modelfile(path.read_bytes().decode())
    except UnicodeDecodeError:
        raise NotPublished(f"{path} is no Modelfile: it is not UTF-8 text") from None
    except ValueError as error:
        raise NotPublished(f"{path}: {error}") from None
    except OSError as error:
        raise NotPublished(f"{path} cannot be read: {error.strerror}") from None


def adapter_path(modelfile: Modelfile, path: Path) -> Path:
    """Where its one ADAPTER is; a relative path counts from the Modelfile's folder. Raises ``NotPublished``."""
    named = modelfile.values("ADAPTER")
    if not named:
        raise NotPublished(
            f"{path} has no ADAPTER: an adapter folder needs one; SYSTEM and PARAMETER alone can be sent with requests"
        )
    if len(named) > 1:
        raise NotPublished(
            f"{path} has {len(named)} ADAPTER lines ({first(named)}): convert each by itself and ask for "
            "model 'NAME+OTHER', which adds them up"
        )
    try:
        found = (path.parent / Path(named[0]).expanduser()).absolute()
    except RuntimeError as error:
        raise NotPublished(f"ADAPTER {named[0]!r:.80} has no folder: {error}") from None
    if not found.exists():
        raise NotPublished(f"ADAPTER {named[0]!r:.80} is not there: {found}")
    return found.parent if found.suffix == ".safetensors" else found


def read_wishes(modelfile: Modelfile, *, chat_template: str | None) -> Wishes:
    """What it asks for beside the adapter. Raises ``NotPublished`` where a chat template must be chosen first."""
    read = _Parameters()
    for name, value in modelfile.parameters():
        read.take(name, value)
    sidecar: dict[str, Any] = {}
    if (system := modelfile.last("SYSTEM")) is not None:
        sidecar["system_prompt"] = system
    if read.stop:
        sidecar["stop"] = read.stop[:MAX_STOP_STRINGS]
    if read.sampling:
        sidecar["sampling"] = read.sampling
    translated = None
    if chat_template is not None and chat_template != BASES_TEMPLATE:
        sidecar["chat_template"] = _read_template(Path(chat_template))
    elif chat_template is None:
        translated = _translatable(modelfile)
    replaced = [name for name in ("TEMPLATE", "RENDERER") if modelfile.last(name)]
    used = "the base's own" if chat_template == BASES_TEMPLATE else f"that of {chat_template}"
    return Wishes(
        sidecar,
        tuple(modelfile.values("LICENSE")),
        modelfile.values("FROM")[-1],
        (*read.lost(), *_without_field(modelfile)),
        translated,
        tuple(f"{name}: not used, the chat template is {used}" for name in replaced if chat_template is not None),
    )


def settle_template(template: str, prompts: PromptRenderer, *, begin: str) -> tuple[str | None, str]:
    """A TEMPLATE as Jinja, None where it is the base's own, and a line to print.

    ``begin`` is the text of the token that begins every prompt of this base; Ollama puts it there by itself.
    """
    is_there = bool(begin) and template.lstrip().startswith(begin)
    translated = translate(template, begin="" if is_there else begin)
    ours = [_renders(prompts, probe, None) for probe in _PROBES]
    if None not in ours and ours == [_renders(prompts, probe, translated) for probe in _PROBES]:
        return None, "TEMPLATE: it is the base's own chat template"
    return translated, "TEMPLATE: translated to Jinja, in quickchange.json; it is not the base's"


@dataclass
class _Parameters:
    """PARAMETER by PARAMETER; of one that comes twice the last counts, but for ``stop``."""

    sampling: dict[str, float | int] = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, value: str) -> None:
        if name == "stop":
            if value and value not in self.stop:
                self.stop.append(value)
        elif name in _NUMBERS:
            self._number(name, value)
        else:
            self.others[name] = value

    def _number(self, name: str, value: str) -> None:
        key, read, fits, is_default = _NUMBERS[name]
        try:
            number = read(value)
        except ValueError:
            raise NotPublished(f"PARAMETER {name} is {value!r:.40}: it must be a number") from None
        self.sampling.pop(key, None)
        self.others.pop(name, None)
        if fits(number):
            self.sampling[key] = number
        elif not is_default(number):
            self.others[name] = value

    def lost(self) -> list[str]:
        """What the sidecar cannot say, with its value."""
        found = [f"PARAMETER {name} {value:.60}" for name, value in self.others.items()]
        return found + [f"PARAMETER stop {value:.60}" for value in self.stop[MAX_STOP_STRINGS:]]


_NUMBERS: Mapping[str, tuple[str, Callable[[str], Any], Callable[[Any], bool], Callable[[Any], bool]]] = {
    "temperature": ("temperature", float, lambda number: 0 <= number <= 2, lambda number: False),
    "top_p": ("top_p", float, lambda number: 0 < number <= 1, lambda number: False),
    "min_p": ("min_p", float, lambda number: 0 <= number <= 1, lambda number: False),
    "top_k": ("top_k", int, lambda number: number >= 1, lambda number: number <= 0),
    "num_predict": ("max_tokens", int, lambda number: number >= 1, lambda number: number < 0),
}
"""By PARAMETER: the sidecar's field, how it is read, what the sidecar can say, and what is the default here anyway."""


def _without_field(modelfile: Modelfile) -> list[str]:
    """Instructions that the sidecar has no field for."""
    found = [
        f"{name} {value:.60} ({_WITHOUT_FIELD[name]})" for name in _WITHOUT_FIELD for value in modelfile.values(name)
    ]
    if messages := modelfile.values("MESSAGE"):
        found.append(f"MESSAGE ({len(messages)} of them), which Ollama puts before conversations: send them yourself")
    return found


def _translatable(modelfile: Modelfile) -> str | None:
    """A TEMPLATE that can be translated, None where there is none. Raises ``NotPublished`` for any other."""
    template = modelfile.last("TEMPLATE")
    what, why = "TEMPLATE", ""
    if modelfile.last("RENDERER"):
        what, why = "RENDERER", "which is code of Ollama's own"
    elif template is None:
        return None
    else:
        try:
            translate(template)
        except ValueError as error:
            why = f"which cannot be translated from Go's template language: {error}"
    if not why:
        return template
    raise NotPublished(
        f"it has a {what}, {why}. Say which chat template the adapter is to have: --chat-template {BASES_TEMPLATE} for "
        "the base's own, which is what most Modelfiles repeat, or --chat-template FILE.jinja for another one"
    )


def _renders(prompts: PromptRenderer, messages: Sequence[Message], template: str | None) -> list[int] | None:
    """Prompt ids by a template, None for the base's; None where it refuses."""
    try:
        return prompts.chat(messages, template=template)
    except InvalidRequest:
        return None


def _read_template(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise NotPublished(f"{path} has more than {MAX_JSON_BYTES} bytes: it is no chat template")
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise NotPublished(f"--chat-template {path} cannot be read: {error}") from None
    if not text.strip():
        raise NotPublished(f"--chat-template {path} is empty")
    return text
